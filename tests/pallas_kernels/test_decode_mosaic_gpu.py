"""The Mosaic GPU decode kernel, compiled, on a real GPU."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import make_case, random_queries, relative_error

from paddock.pallas_kernels import DECODE_ATTENTION

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (64, 8, 128), (32, 32, 128), (9, 3, 64), (32, 1, 64)]
)
def test_equals_the_reference(heads: int, kv_heads: int, head_dim: int, page_size: int) -> None:
    around = [n * page_size + change for n in (1, 3) for change in (-1, 0, 1)]
    random = [int(length) for length in np.random.default_rng(2).integers(2, 1500, 8)]
    lengths = [0, 1, 63, 64, 65, *around, *random, 2048, 0]
    case = make_case(
        lengths,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        slots=2048 // page_size + 1,
        dtype=jnp.bfloat16,
    )
    q = random_queries(len(lengths), heads, head_dim, jnp.bfloat16)
    arguments = (q, case.k_pages, case.v_pages, case.page_table, jnp.int32(lengths))
    out = DECODE_ATTENTION["mosaic"](*arguments, scale=head_dim**-0.5)
    wanted = DECODE_ATTENTION["reference"](q.astype(jnp.float32), *arguments[1:], scale=head_dim**-0.5)
    assert relative_error(out, np.asarray(wanted, np.float64)) <= 1e-2
    assert not np.asarray(out, np.float32)[[0, -1]].any()  # kv_len 0
