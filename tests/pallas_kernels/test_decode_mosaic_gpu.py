"""The Mosaic GPU decode kernel, compiled, on a real GPU."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import dense_decode, make_case, quantized_case, random_queries, relative_error

from paddock.pallas_kernels import DECODE_ATTENTION

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(32, 8, 128), (64, 8, 128), (32, 2, 128), (32, 32, 128), (9, 3, 64), (32, 1, 64), (64, 1, 128)],
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


def test_a_long_sequence_beside_short_ones() -> None:
    lengths = [3, 131072, 0, 70000, 1, 64]
    case = make_case(lengths, kv_heads=2, head_dim=128, page_size=64, slots=2048, dtype=jnp.bfloat16)
    arguments = (random_queries(len(lengths), 8, 128, jnp.bfloat16), case.k_pages, case.v_pages, case.page_table)
    for _ in range(3):  # what blocks tell each other must be clean again after every call
        out = DECODE_ATTENTION["mosaic"](*arguments, jnp.int32(lengths), scale=0.1)
        assert relative_error(out, dense_decode(arguments[0], case, lengths, 0.1)) <= 1e-2


def test_more_pairs_than_blocks_at_a_time() -> None:
    lengths = [int(length) for length in np.random.default_rng(3).integers(0, 700, 256)]
    case = make_case(lengths, kv_heads=8, head_dim=64, page_size=64, slots=11, dtype=jnp.bfloat16)
    q = random_queries(len(lengths), 16, 64, jnp.bfloat16)
    out = DECODE_ATTENTION["mosaic"](q, case.k_pages, case.v_pages, case.page_table, jnp.int32(lengths), scale=0.1)
    assert relative_error(out, dense_decode(q, case, lengths, 0.1)) <= 1e-2


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize(("head_dim", "page_size"), [(128, 64), (64, 16), (128, 128)])
def test_quantized_pages_equal_the_reference(dtype: Any, head_dim: int, page_size: int) -> None:
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, 1500]
    shape = dict(kv_heads=2, head_dim=head_dim, page_size=page_size, slots=1500 // page_size + 1)
    case = quantized_case(lengths, dtype=dtype, **shape)
    q = random_queries(len(lengths), 8, head_dim, jnp.bfloat16)
    arguments = (case.k_pages, case.v_pages, case.page_table, jnp.int32(lengths))
    scales = dict(k_scale=case.k_scale, v_scale=case.v_scale)
    out = DECODE_ATTENTION["mosaic"](q, *arguments, scale=0.1, **scales)
    wanted = DECODE_ATTENTION["reference"](q.astype(jnp.float32), *arguments, scale=0.1, **scales)
    assert relative_error(out, np.asarray(wanted, np.float64)) <= 1e-2
