"""Rotation and append as one Pallas kernel for NVIDIA Hopper (Mosaic GPU)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from .checks import check_append, check_rotation
from .compat import bound, kernel, load, mosaic_mode, placed
from .early_launch import await_kernel_before, launch_kernel_after

LANE = 128  # values that the threads of a block turn at a time: one head, or two of 64
LAYOUT = plgpu.Layout.WG_STRIDED((LANE,), vec_size=1)


@functools.partial(jax.jit, static_argnames=("interpret",))  # traced once, not once a layer
def rotate_append_mosaic(
    qkv: Float[Array, "T K G2 h"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    k_pages: Float[Array, "P K p h"],
    v_pages: Float[Array, "P K p h"],
    page: Int[Array, " T"],
    offset: Int[Array, " T"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "T K G h"], Float[Array, "P K p h"], Float[Array, "P K p h"]]:
    """`rotate_append_reference` with one thread block per token, which reads the token's row once and writes it once.

    In place once the pools are donated. `interpret` runs the kernel on the CPU, for tests. Raises ValueError for shapes
    that do not fit together, pages of another dtype than `qkv`, a head_dim other than 64 or 128 and JAX older than 0.11
    (but for `interpret`), and, from JAX's lowering, on a platform that is no NVIDIA GPU.
    """
    check_rotation(qkv, cos, sin, k_pages, v_pages)
    check_append(k_pages, v_pages, qkv[:, :, -2], qkv[:, :, -1], page, offset)
    tokens, kv_heads, vectors, head_dim = qkv.shape
    if LANE not in (head_dim, 2 * head_dim):
        raise ValueError(f"rotate_append_mosaic needs head_dim 64 or 128: got {head_dim}")
    if k_pages.dtype != qkv.dtype:
        raise ValueError(f"rotate_append_mosaic needs qkv and pages of one dtype: got {qkv.dtype} and {k_pages.dtype}")
    per_lane = LANE // head_dim
    rows = pl.cdiv(kv_heads * (vectors - 1), per_lane) * per_lane
    # Of a dimension itself, and of its partner half a head away: computed once for all layers.
    factors = jnp.tile(cos, (1, 2 * per_lane)), jnp.tile(jnp.concatenate([-sin, sin], axis=1), (1, per_lane))
    pools = jax.new_ref(k_pages), jax.new_ref(v_pages)
    (q,) = kernel(
        bound(_turn_token, interpret=interpret),
        out_type=(jax.ShapeDtypeStruct((tokens, kv_heads * (vectors - 2), head_dim), qkv.dtype),),
        scratch_types=dict(
            fetched=plgpu.SMEM((rows + 2 * per_lane, head_dim), qkv.dtype),  # a lane to spare at either end
            turned=plgpu.SMEM((rows, head_dim), qkv.dtype),
            values=plgpu.SMEM((kv_heads, head_dim), qkv.dtype),
            ready=plgpu.Barrier(num_arrivals=kv_heads + 2),
        ),
        grid=(tokens,),
        grid_names=("token",),
        # Layouts are given, for inferring them takes time that grows with the square of the heads (3.4 s for 40).
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=mosaic_mode(interpret) or False,
    )(qkv, *factors, page, offset, *pools)
    return q.reshape(tokens, kv_heads, -1, head_dim), jax.freeze(pools[0]), jax.freeze(pools[1])


def _turn_token(
    qkv_ref: Any,
    own_ref: Any,
    partner_ref: Any,
    page_ref: Any,
    offset_ref: Any,
    k_pages_ref: Any,
    v_pages_ref: Any,
    q_ref: Any,
    *,
    fetched: Any,
    turned: Any,
    values: Any,
    ready: Any,
    interpret: bool,
) -> None:
    """Kernel body: fetched and turned [rows, h], the queries before the keys; values [K, h]."""
    launch_kernel_after(interpret)
    await_kernel_before(interpret)
    token = lax.axis_index("token")
    kv_heads, vectors, head_dim = qkv_ref.shape[1:]
    group, half, queries = vectors - 2, head_dim // 2, kv_heads * (vectors - 2)
    first = LANE // head_dim
    for head in range(kv_heads):
        own = fetched.at[pl.ds(first + head * group, group)]
        plgpu.copy_gmem_to_smem(qkv_ref.at[token, head, pl.ds(0, group)], own, ready)
    plgpu.copy_gmem_to_smem(qkv_ref.at[token, :, group], fetched.at[pl.ds(first + queries, kv_heads)], ready)
    plgpu.copy_gmem_to_smem(qkv_ref.at[token, :, group + 1], values, ready)
    target = page_ref[token], slice(None), offset_ref[token]
    own_factor, partner_factor = (load(ref.at[token], LAYOUT) for ref in (own_ref, partner_ref))
    in_first_half = lax.rem(placed(lax.broadcasted_iota(jnp.int32, (LANE,), 0), LAYOUT), head_dim) < half
    plgpu.barrier_wait(ready)
    plgpu.copy_smem_to_gmem(values, v_pages_ref.at[target])
    for row in range(0, turned.shape[0], first):
        value, after, before = (_lane(fetched, row + first, shift, interpret) for shift in (0, half, -half))
        result = value * own_factor + jnp.where(in_first_half, after, before) * partner_factor
        _put_lane(turned, row, result.astype(turned.dtype), interpret)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(turned.at[pl.ds(0, queries)], q_ref.at[token])
    plgpu.copy_smem_to_gmem(turned.at[pl.ds(queries, kv_heads)], k_pages_ref.at[target])
    plgpu.wait_smem_to_gmem(0)


# The interpreter has no refs of another shape, so that it reads the whole of one and writes rows.
def _lane(ref: Any, row: int, shift: int, interpret: bool) -> Any:
    """LANE float32 values from `shift` after a row's start on."""
    start = row * ref.shape[1] + shift
    if interpret:
        return ref[...].reshape(-1)[start : start + LANE].astype(jnp.float32)
    return load(ref.reshape(-1).at[pl.ds(start, LANE)], LAYOUT).astype(jnp.float32)


def _put_lane(ref: Any, row: int, values: Any, interpret: bool) -> None:
    if interpret:
        ref.at[pl.ds(row, LANE // ref.shape[1])][...] = values.reshape(-1, ref.shape[1])
    else:
        ref.reshape(-1).at[pl.ds(row * ref.shape[1], LANE)][...] = values
