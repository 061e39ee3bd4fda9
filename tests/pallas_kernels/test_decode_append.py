"""Decode attention that rotates and appends on its way: the reference, and the kernel in the CPU interpreter and on a
GPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import dense_decode, make_case, pools_with, relative_error, with_new_tokens

from paddock.pallas_kernels import DECODE_APPEND
from paddock.pallas_kernels.checks import check_decode_append
from paddock.pallas_kernels.decode_mosaic import decode_append_mosaic
from paddock.pallas_kernels.rotate_append import decode_append_reference

SCALE = 0.125
Shape = tuple[int, int, int, int, list[int]]
# query heads, kv heads, head_dim, page size, lengths
SMALL: list[Shape] = [
    (3, 1, 64, 32, [0, 1, 33, 70]),  # pages smaller than a tile; shares that end inside sequences
    (9, 1, 128, 64, [64, 65]),  # a page a tile; more query heads than one swizzled tile has rows
    (2, 2, 64, 128, [129]),  # half a page a tile; no grouping; a tile of a new token alone
]
LARGE: list[Shape] = [
    (heads, kv_heads, head_dim, page_size, [0, 1, 2, 63, 64, 65, 127, 128, 129, 1000, 16, 17, 1500, 449, 0])
    for heads, kv_heads, head_dim in ((32, 8, 128), (64, 8, 128), (9, 3, 64), (32, 2, 64), (8, 1, 128))
    for page_size in (16, 32, 64, 128)
]


def check(attend: Any, shape: Shape, dtype: Any, bound: float) -> None:
    heads, kv_heads, head_dim, page_size, lengths = shape
    slots = -(-max(lengths) // page_size) + 1
    case = make_case(lengths, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, slots=slots, dtype=dtype)
    new = with_new_tokens(case, lengths, heads, dtype)
    pools = case.k_pages, case.v_pages
    out, *after = attend(new.qkv, new.cos, new.sin, *pools, case.page_table, jnp.int32(lengths), scale=SCALE)
    assert (out.shape, out.dtype) == ((len(lengths), kv_heads, heads // kv_heads, head_dim), dtype)
    queries = new.rotated[:, :, :-2].reshape(len(lengths), heads, head_dim)
    wanted = dense_decode(queries, case, lengths, SCALE).reshape(out.shape)
    assert relative_error(out, wanted) <= bound
    assert not np.asarray(out, np.float32)[[length == 0 for length in lengths]].any()
    for pool, want in zip(after, pools_with(case, lengths, new), strict=True):
        # A key turned in float32 may be rounded the other way.
        np.testing.assert_allclose(np.asarray(pool, np.float32), want, rtol=1e-2, atol=1e-4)


def test_the_reference_equals_dense_attention() -> None:
    check(decode_append_reference, SMALL[0], jnp.float32, 1e-6)


@pytest.mark.parametrize("shape", SMALL)
def test_the_kernel_equals_dense_attention_in_a_poisoned_pool(shape: Shape) -> None:
    check(functools.partial(decode_append_mosaic, interpret=True), shape, jnp.bfloat16, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE)
def test_the_kernel_on_a_gpu(shape: Shape) -> None:
    ahead = jnp.zeros((4096, 4096), jnp.bfloat16)
    check(functools.partial(DECODE_APPEND["mosaic"], ahead=ahead), shape, jnp.bfloat16, 1e-2)


@pytest.mark.gpu
def test_step_after_step_in_place() -> None:
    """Tokens appended by the kernel are what its next call reads; 256 sequences take several waves of blocks."""
    lengths = [int(length) for length in np.random.default_rng(3).integers(1, 400, 256)]
    shape = dict(kv_heads=8, head_dim=128, page_size=64, slots=8, dtype=jnp.bfloat16)
    case = make_case([length + 3 for length in lengths], **shape)
    step = {name: jax.jit(DECODE_APPEND[name], static_argnames="scale") for name in ("mosaic", "reference")}
    pools = {name: (jnp.nan_to_num(case.k_pages), jnp.nan_to_num(case.v_pages)) for name in step}
    for i in range(3):
        kv_len = jnp.int32(lengths) + i + 1
        new = with_new_tokens(make_case(lengths, **shape), lengths, 32, jnp.bfloat16)
        out = {}
        for name, attend in step.items():
            arguments = (new.qkv * (i + 1), new.cos, new.sin, *pools[name], case.page_table, kv_len)
            out[name], *pools[name] = attend(*arguments, scale=0.1)
        assert relative_error(out["mosaic"], np.asarray(out["reference"], np.float64)) <= 1e-2


def test_arguments_that_do_not_fit_are_refused() -> None:
    pages, length, table = jnp.zeros((3, 2, 16, 64), jnp.bfloat16), jnp.int32([5]), jnp.zeros((1, 2), jnp.int32)
    qkv, angles = jnp.zeros((1, 2, 4, 64), jnp.bfloat16), jnp.zeros((1, 32))
    with pytest.raises(ValueError, match=r"sin must be float32\(1, 32\): got float32\(1, 16\)"):
        check_decode_append(qkv, angles, angles[:, :16], pages, pages, table, length)
    with pytest.raises(ValueError, match="qkv has 4 kv heads, but k_pages 2"):
        check_decode_append(jnp.tile(qkv, (1, 2, 1, 1)), angles, angles, pages, pages, table, length)
    with pytest.raises(ValueError, match=r"rows, kv heads, query heads of each \+ 2, head_dim\): got \(1, 2, 2, 64\)"):
        check_decode_append(qkv[:, :, :2], angles, angles, pages, pages, table, length)
    with pytest.raises(ValueError, match="one dtype: got float16 and bfloat16"):
        decode_append_mosaic(qkv.astype("float16"), angles, angles, pages, pages, table, length, scale=SCALE)


@pytest.mark.gpu
def test_calls_of_one_program_share_a_plan() -> None:
    """As the layers of a step do: blocks count in it, and must leave nothing of their counts to the next call."""
    lengths = [6_000, 3, 70, 3_000, 1, 1_500, 64, 65, 700, 129, 1_000, 2_000]
    case = make_case(lengths, kv_heads=8, head_dim=128, page_size=64, slots=100, dtype=jnp.bfloat16)
    new = with_new_tokens(case, lengths, 32, jnp.bfloat16)
    arguments = (new.cos, new.sin, case.k_pages, case.v_pages, case.page_table, jnp.int32(lengths))

    @jax.jit
    def layers(qkv: jax.Array) -> list[jax.Array]:
        outs: list[jax.Array] = []
        for factor in (1, 2, 1, 2, 1):
            after = 0 * outs[-1].sum() if outs else 0  # one after the other, as layers run
            outs.append(DECODE_APPEND["mosaic"](qkv * factor + after, *arguments, scale=0.1)[0])
        return outs

    for _ in range(20):
        first, second, *others = layers(new.qkv)
        assert jnp.isfinite(first).all()
        assert all((out == (first, second)[i % 2]).all() for i, out in enumerate(others))
    assert not (first == second).all()
