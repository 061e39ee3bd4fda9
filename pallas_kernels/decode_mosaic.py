"""Paged decode attention as one Pallas kernel for NVIDIA Hopper (Mosaic GPU)."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from .checks import check_decode
from .compat import mosaic_mode, wgmma_transposed

ROWS = 64  # wgmma multiplies at least 64 rows: the G query heads of one kv head, padded
BLOCK = 64  # tokens a step; four pages of 16 or one page of 64, so that a step's tiles have one shape
STAGES = 3  # blocks of K and V in flight: 3 * 2 * 16 KiB at head_dim 128, two CTAs on an SM
DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_DIMS = (64, 128)
TILE = 8  # rows of one swizzled SMEM tile: what a copy may address


def check_mosaic(dtype: Any, head_dim: int, page_size: int, group: int) -> None:
    """Raise ValueError naming what `decode_mosaic` cannot run on; `group` is the number of query heads a kv head."""
    if dtype not in DTYPES:
        raise ValueError(f"decode_mosaic needs bfloat16 or float16: got {jnp.dtype(dtype).name}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"decode_mosaic needs head_dim 64 or 128: got {head_dim}")
    if page_size < 16 or (BLOCK % page_size and page_size % BLOCK):
        raise ValueError(f"decode_mosaic needs a page size of 16, 32 or a multiple of 64: got {page_size}")
    if group > ROWS:
        raise ValueError(f"decode_mosaic takes at most {ROWS} query heads per kv head: got {group}")


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))  # traced once, not once a layer
def decode_mosaic(
    q: Float[Array, "B H h"],
    k_pages: Float[Array, "P K p h"],
    v_pages: Float[Array, "P K p h"],
    page_table: Int[Array, "B N"],
    kv_len: Int[Array, " B"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B H h"]:
    """Decode attention with one thread block per (sequence, kv head) that walks the sequence's own pages only.

    Scores, softmax and sums are float32. `interpret` runs the kernel on the CPU, for tests.
    Raises ValueError where the kernel cannot run: a dtype other than bfloat16 or float16, head_dim other than 64 or
    128, a page size that neither divides 64 nor is a multiple of it (16 at least), more than 64 query heads a kv head,
    JAX older than 0.11 (but for `interpret`); and, from JAX's lowering, a platform that is no NVIDIA GPU.
    The online softmax is FlashAttention's (arXiv 2205.14135), the paging vLLM's (arXiv 2309.06180).
    """
    check_decode(q, k_pages, v_pages, page_table, kv_len)
    batch, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    group = heads // kv_heads
    if k_pages.dtype != q.dtype:
        raise ValueError(f"decode_mosaic needs q and pages of one dtype: got {q.dtype} and {k_pages.dtype}")
    check_mosaic(q.dtype, head_dim, page_size, group)

    rows = pl.cdiv(group, TILE) * TILE
    grouped = jnp.pad(q.reshape(batch, kv_heads, group, head_dim), ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    tiles = (plgpu.TilingTransform((TILE, 64)), plgpu.SwizzleTransform(128))
    smem = functools.partial(plgpu.SMEM, dtype=q.dtype, transforms=tiles)
    pieces = pl.cdiv(BLOCK, page_size)
    out = plgpu.kernel(
        functools.partial(_attend_one_head, scale=scale),
        out_type=jax.ShapeDtypeStruct(grouped.shape, q.dtype),
        scratch_types=dict(
            q_smem=smem((ROWS, head_dim)),
            k_smem=smem((STAGES, BLOCK, head_dim)),
            v_smem=smem((STAGES, BLOCK, head_dim)),
            weights_smem=smem((ROWS, BLOCK)),
            q_ready=plgpu.Barrier(),
            k_ready=plgpu.Barrier(num_arrivals=pieces, num_barriers=STAGES),
            v_ready=plgpu.Barrier(num_arrivals=pieces, num_barriers=STAGES),
        ),
        grid=(batch, kv_heads),
        grid_names=("sequence", "kv_head"),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=mosaic_mode(interpret),
    )(grouped, k_pages, v_pages, page_table, kv_len)
    return out[:, :, :group].reshape(batch, heads, head_dim)


def _attend_one_head(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    table_ref: Any,
    len_ref: Any,
    out_ref: Any,
    *,
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    weights_smem: Any,
    q_ready: Any,
    k_ready: Any,
    v_ready: Any,
    scale: float,
) -> None:
    """Kernel body. q_ref, out_ref [B, K, rows, h]; k_ref, v_ref [P, K, p, h]; table_ref [B, N]; len_ref [B]."""
    sequence, head = lax.axis_index("sequence"), lax.axis_index("kv_head")
    rows, head_dim = q_ref.shape[2:]
    page_size = k_ref.shape[2]
    piece = min(page_size, BLOCK)
    length = len_ref[sequence]
    blocks = pl.cdiv(length, BLOCK)

    def fetch(block: Any, slot: Any) -> None:
        for i in range(BLOCK // piece):
            token = block * BLOCK + i * piece
            # A piece past the end reads the block's first page again: the table says nothing true about the others.
            token = jnp.where(token < length, token, block * BLOCK)
            page = table_ref[sequence, lax.div(token, page_size)]
            source = (page, head, pl.ds(lax.rem(token, page_size), piece))
            target = (slot, pl.ds(i * piece, piece))
            plgpu.copy_gmem_to_smem(k_ref.at[source], k_smem.at[target], k_ready.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[source], v_smem.at[target], v_ready.at[slot])

    # Rows of q_smem after the first `rows` stay unwritten: they give rows of the output that nobody reads.
    plgpu.copy_gmem_to_smem(q_ref.at[sequence, head], q_smem.at[pl.ds(0, rows)], q_ready)
    for stage in range(STAGES):
        pl.when(stage < blocks)(functools.partial(fetch, stage, stage))
    plgpu.barrier_wait(q_ready)

    def attend(block: Any, carry: Any) -> Any:
        total, peak, mass = carry
        slot = lax.rem(block, STAGES)
        plgpu.barrier_wait(k_ready.at[slot])

        def multiply_keys(scores: Any) -> Any:
            wgmma_transposed(scores, q_smem, k_smem.at[slot])
            return scores[...]

        scores = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, BLOCK), jnp.float32))
        left = length - block * BLOCK
        # Powers of 2 instead of e: the hardware has an instruction for them.
        alive = lax.broadcasted_iota(jnp.int32, scores.shape, 1) < left
        scores = jnp.where(alive, scores * (scale * math.log2(math.e)), -jnp.inf)
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        weights = jnp.exp2(scores - lax.broadcast_in_dim(new_peak, scores.shape, [0]))
        decay = jnp.exp2(peak - new_peak)
        mass = mass * decay + weights.sum(axis=1)
        weights_smem[...] = weights.astype(weights_smem.dtype)

        plgpu.barrier_wait(v_ready.at[slot])

        @pl.when(left < BLOCK)
        def _drop_values_past_the_end() -> None:
            # A weight of 0 does not stop a NaN left in the page by another sequence.
            values = v_smem[slot]
            alive = lax.broadcasted_iota(jnp.int32, values.shape, 0) < left
            v_smem[slot] = jnp.where(alive, values, jnp.zeros_like(values))

        plgpu.commit_smem()

        def multiply_values(result: Any) -> Any:
            plgpu.wgmma(result, weights_smem, v_smem.at[slot])
            return result[...]

        update = pl.run_scoped(multiply_values, plgpu.ACC((ROWS, head_dim), jnp.float32))
        total = total * lax.broadcast_in_dim(decay, total.shape, [0]) + update
        pl.when(block + STAGES < blocks)(functools.partial(fetch, block + STAGES, slot))
        return total, new_peak, mass

    start = (
        jnp.zeros((ROWS, head_dim), jnp.float32),
        jnp.full((ROWS,), -jnp.inf, jnp.float32),
        jnp.zeros((ROWS,), jnp.float32),
    )
    total, _, mass = lax.fori_loop(0, blocks, attend, start)
    mass = jnp.where(mass > 0, mass, 1.0)  # no token at all: zeros
    q_smem[...] = (total / lax.broadcast_in_dim(mass, total.shape, [0])).astype(q_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_smem.at[pl.ds(0, rows)], out_ref.at[sequence, head])
    plgpu.wait_smem_to_gmem(0)
