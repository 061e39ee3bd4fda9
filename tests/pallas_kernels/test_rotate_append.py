"""Rotating and appending in one: the reference, and the kernel in the CPU interpreter and on a GPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import make_case, pools_with, relative_error, with_new_tokens

from paddock.pallas_kernels import ROTATE_APPEND
from paddock.pallas_kernels.rotate_append import rotate_append_reference
from paddock.pallas_kernels.rotate_append_mosaic import rotate_append_mosaic


def check(append: Any, tokens: int, heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: Any) -> None:
    """Every token is the last of a sequence of its own; all other places of the pools are full or poisoned."""
    lengths = [1 + 5 * i % (2 * page_size) for i in range(tokens)]
    case = make_case(lengths, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, slots=3, dtype=dtype)
    new = with_new_tokens(case, lengths, heads, dtype)
    position = np.array(lengths) - 1
    page = np.asarray(case.page_table)[np.arange(tokens), position // page_size]
    pools = jax.tree.map(jnp.copy, (case.k_pages, case.v_pages))  # they may be donated
    q, *after = append(new.qkv, new.cos, new.sin, *pools, jnp.asarray(page), jnp.int32(position % page_size))
    assert (q.shape, q.dtype) == ((tokens, kv_heads, heads // kv_heads, head_dim), dtype)
    assert relative_error(q, np.asarray(new.rotated[:, :, :-2], np.float64)) <= (1e-6 if dtype == jnp.float32 else 1e-3)
    for pool, want in zip(after, pools_with(case, lengths, new), strict=True):
        # A key turned in float32 may be rounded the other way.
        np.testing.assert_allclose(np.asarray(pool, np.float32), want, rtol=1e-2, atol=1e-4)


def test_the_reference_rotates_and_writes_nothing_else() -> None:
    check(rotate_append_reference, 5, 6, 2, 64, 16, jnp.float32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 2, 128), (9, 3, 64), (2, 1, 64)],  # whole lanes; rows that fill no lane; a query and a key in one lane
)
def test_the_kernel_in_the_interpreter(heads: int, kv_heads: int, head_dim: int) -> None:
    check(functools.partial(rotate_append_mosaic, interpret=True), 3, heads, kv_heads, head_dim, 16, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 700])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64), (4, 1, 64), (32, 8, 64), (128, 8, 128)]
)
def test_the_kernel_on_a_gpu(tokens: int, heads: int, kv_heads: int, head_dim: int) -> None:
    append = jax.jit(ROTATE_APPEND["mosaic"], donate_argnums=(3, 4))
    check(append, tokens, heads, kv_heads, head_dim, 64, jnp.bfloat16)


def test_what_the_kernel_cannot_do_is_refused() -> None:
    pages, place = jnp.zeros((3, 2, 16, 64), jnp.bfloat16), jnp.int32([1])
    qkv, angles = jnp.zeros((1, 2, 4, 64), jnp.bfloat16), jnp.zeros((1, 32))
    with pytest.raises(ValueError, match="one dtype: got float16 and bfloat16"):
        rotate_append_mosaic(qkv.astype("float16"), angles, angles, pages, pages, place, place)
    narrow = pages[..., :32]
    with pytest.raises(ValueError, match="head_dim 64 or 128: got 32"):
        rotate_append_mosaic(qkv[..., :32], angles[:, :16], angles[:, :16], narrow, narrow, place, place)
