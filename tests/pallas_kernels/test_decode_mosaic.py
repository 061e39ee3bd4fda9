"""The Mosaic GPU decode kernel in the CPU interpreter, on tiny shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from paged_cases import dense_decode, make_case, random_queries, relative_error

from paddock.pallas_kernels.decode_mosaic import decode_mosaic

SCALE = 0.125


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "lengths"),
    [
        (6, 2, 64, 16, [0, 1, 15, 16, 17, 290]),  # pages smaller than a step; more steps than stages
        (9, 1, 128, 64, [63, 64, 65, 200]),  # a page a step; more query heads than one tile of rows
        (2, 2, 64, 128, [129, 300]),  # half a page a step; no grouping
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
