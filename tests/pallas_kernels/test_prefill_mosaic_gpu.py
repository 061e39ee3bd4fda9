"""The Mosaic GPU prefill kernel, compiled, on a real GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import make_case, random_queries, relative_error

from paddock.pallas_kernels import PREFILL_ATTENTION

pytestmark = pytest.mark.gpu

ROWS = 910  # no multiple of 8
# (q_start, q_len, kv_len): chunks out of order at odd rows, gaps, an unused one, one row, exact blocks of 64 and 128.
CHUNKS = [
    (70, 17, 50),
    (0, 0, 0),
    (92, 132, 132),
    (20, 1, 65),
    (0, 16, 16),
    (22, 40, 200),
    (230, 300, 1111),
    (531, 64, 64),
    (600, 128, 256),
    (728, 129, 1024),
    (860, 47, 129),
]


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 192])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [(32, 8, 128, jnp.bfloat16), (4, 1, 128, jnp.float16), (9, 3, 64, jnp.bfloat16), (2, 2, 128, jnp.bfloat16)],
)
def test_equals_the_reference(heads: int, kv_heads: int, head_dim: int, dtype: Any, page_size: int) -> None:
    start, length, total = jnp.int32(CHUNKS).T
    slots = -(-1111 // page_size) + 1
    lengths = [chunk[2] for chunk in CHUNKS]
    case = make_case(lengths, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, slots=slots, dtype=dtype)
    q = random_queries(ROWS, heads, head_dim, dtype)
    arguments = (case.k_pages, case.v_pages, case.page_table, start, length, total)
    out = PREFILL_ATTENTION["mosaic"](q, *arguments, scale=head_dim**-0.5)
    reference = jax.jit(PREFILL_ATTENTION["reference"], static_argnames="scale")
    wanted = np.asarray(reference(q.astype(jnp.float32), *arguments, scale=head_dim**-0.5), np.float64)
    assert out.dtype == dtype
    assert relative_error(out, wanted) <= 1e-2
    for first, count, _ in CHUNKS:  # no chunk hides behind the others
        if count:
            assert relative_error(out[first : first + count], wanted[first : first + count]) <= 1e-2
    outside = np.ones(ROWS, bool)
    for first, count, _ in CHUNKS:
        outside[first : first + count] = False
    assert not np.asarray(out, np.float32)[outside].any()


def test_large_scores_keep_their_precision() -> None:
    # The running maximum of a row grows by far more than the kernel tolerates before it rescales.
    chunks = [(0, 200, 700)]
    case = make_case([700], kv_heads=2, head_dim=128, page_size=64, slots=11, dtype=jnp.bfloat16)
    q = 30 * random_queries(200, 8, 128, jnp.bfloat16)
    arguments = (case.k_pages, case.v_pages, case.page_table, *jnp.int32(chunks).T)
    out = PREFILL_ATTENTION["mosaic"](q, *arguments, scale=128**-0.5)
    wanted = PREFILL_ATTENTION["reference"](q.astype(jnp.float32), *arguments, scale=128**-0.5)
    assert relative_error(out, np.asarray(wanted, np.float64)) <= 1e-2
