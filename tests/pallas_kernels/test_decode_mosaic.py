"""The Mosaic GPU decode kernel in the CPU interpreter, on tiny shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import dense_decode, make_case, quantized_case, random_queries, relative_error

from paddock.pallas_kernels import decode_merge
from paddock.pallas_kernels.checks import check_scales
from paddock.pallas_kernels.decode_mosaic import decode_mosaic
from paddock.pallas_kernels.decode_reference import decode_reference

SCALE = 0.125


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "lengths"),
    [
        (3, 1, 64, 16, [0, 15, 17, 70]),  # pages smaller than a tile; shares that end inside sequences
        (9, 1, 128, 64, [64, 65]),  # a page a tile; more query heads than one swizzled tile has rows
        (2, 2, 64, 128, [129]),  # half a page a tile; no grouping
    ],
)
def test_equals_dense_attention_in_a_poisoned_pool(
    heads: int, kv_heads: int, head_dim: int, page_size: int, lengths: list[int]
) -> None:
    slots = -(-max(lengths) // page_size) + 1
    case = make_case(
        lengths, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, slots=slots, dtype=jnp.bfloat16
    )
    q = random_queries(len(lengths), heads, head_dim, jnp.bfloat16)
    out = decode_mosaic(q, case.k_pages, case.v_pages, case.page_table, jnp.int32(lengths), scale=SCALE, interpret=True)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, dense_decode(q, case, lengths, SCALE)) <= 1e-2


def test_parts_are_merged_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_merge, "LOADED", 1)
    lengths = [190]  # a tile for each of the three blocks
    case = make_case(lengths, kv_heads=1, head_dim=64, page_size=64, slots=3, dtype=jnp.bfloat16)
    q = random_queries(1, 2, 64, jnp.bfloat16)
    out = decode_mosaic(q, case.k_pages, case.v_pages, case.page_table, jnp.int32(lengths), scale=SCALE, interpret=True)
    assert relative_error(out, dense_decode(q, case, lengths, SCALE)) <= 1e-2


@pytest.mark.parametrize(("dtype", "page_size"), [(jnp.int8, 64), (jnp.float8_e4m3fn, 32)])
def test_quantized_pages_equal_the_reference(dtype: Any, page_size: int) -> None:
    lengths = [0, 65]
    case = quantized_case(lengths, kv_heads=1, head_dim=64, page_size=page_size, slots=5, dtype=dtype)
    q = random_queries(len(lengths), 3, 64, jnp.bfloat16)
    scales = dict(k_scale=case.k_scale, v_scale=case.v_scale)
    arguments = (case.k_pages, case.v_pages, case.page_table, jnp.int32(lengths))
    out = decode_mosaic(q, *arguments, scale=SCALE, interpret=True, **scales)
    wanted = decode_reference(q.astype(jnp.float32), *arguments, scale=SCALE, **scales)
    assert relative_error(out, np.asarray(wanted, np.float64)) <= 1e-2


@pytest.mark.parametrize("attend", [decode_reference, decode_mosaic])
def test_quantized_pages_without_scales_are_refused(attend: Any) -> None:
    pages = jnp.zeros((3, 2, 16, 64), jnp.int8)
    arguments = (jnp.zeros((1, 4, 64), jnp.bfloat16), pages, pages, jnp.zeros((1, 2), jnp.int32), jnp.int32([5]))
    with pytest.raises(ValueError, match="k_scale goes with pages of 8 bits"):
        attend(*arguments, scale=SCALE)


def test_scales_that_do_not_fit_are_refused() -> None:
    pages, scale = jnp.zeros((3, 2, 16, 64), jnp.int8), jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"v_scale must be float32\(3, 2\): got float32\(1, 2\)"):
        check_scales(pages, scale, scale[:1])
    with pytest.raises(ValueError, match="8 bits, and only with them: got pages of bfloat16"):
        check_scales(pages.astype(jnp.bfloat16), scale, None)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size", "heads", "named"),
    [
        (jnp.float32, 64, 16, 4, "float32"),
        (jnp.bfloat16, 80, 16, 4, "head_dim 64 or 128: got 80"),
        (jnp.bfloat16, 64, 8, 4, "page size .* got 8"),
        (jnp.bfloat16, 64, 48, 4, "page size .* got 48"),
        (jnp.bfloat16, 64, 96, 4, "page size .* got 96"),
        (jnp.bfloat16, 64, 16, 130, "query heads per kv head: got 65"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(
    dtype: Any, head_dim: int, page_size: int, heads: int, named: str
) -> None:
    pages = jnp.zeros((3, 2, page_size, head_dim), dtype)
    with pytest.raises(ValueError, match=named):
        decode_mosaic(
            jnp.zeros((2, heads, head_dim), dtype),
            pages,
            pages,
            jnp.zeros((2, 2), jnp.int32),
            jnp.zeros(2, jnp.int32),
            scale=SCALE,
            interpret=True,
        )


def test_refused_where_there_is_no_gpu() -> None:
    pages = jnp.zeros((3, 2, 16, 64), jnp.bfloat16)
    arguments = (jnp.zeros((2, 4, 64), jnp.bfloat16), pages, pages, jnp.zeros((2, 2), jnp.int32))
    # From our check on JAX 0.10, from JAX's lowering for the CPU on later versions.
    with (
        pytest.raises(ValueError, match=r"JAX 0\.11 or newer|interpret mode"),
        jax.default_device(jax.devices("cpu")[0]),
    ):
        decode_mosaic(*arguments, jnp.ones(2, jnp.int32), scale=SCALE)
