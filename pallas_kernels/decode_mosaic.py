"""Paged decode attention at the speed of the memory: Pallas kernels for NVIDIA Hopper (Mosaic GPU)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Num

from .checks import check_decode, check_decode_append, check_scales
from .compat import bound, kernel, mosaic_mode
from .decode_fetch import PIECES
from .decode_kernel import attend
from .decode_merge import merge_share
from .decode_new import WIDTH
from .decode_plan import TILE_TOKENS, work_plan

RESIDENT = 2 * 132  # thread blocks that run at a time: two on each multiprocessor of an H100 or H200
MOST_WAVES = 4  # times as many blocks as run at a time, where there are many (sequence, kv head) pairs
# From so many (sequence, kv head) pairs on their parts are merged by the last block that has one, a kernel less. The
# parts of fewer, of which each may have a hundred, a kernel of its own merges faster, by many blocks.
FEWEST_PAIRS = 8
MERGED = 64  # of head_dim, by a block of that kernel: the fewest, so that many blocks merge
STAGES = 3  # tiles of K and V in flight for each: 3 * 2 * 16 KiB at head_dim 128
INTERPRETED_RESIDENT = 3
# Of the matrix after attention, asked for by a kernel that leaves the memory idle while it begins and ends: 16 MiB made
# a step of 32 rows 1.3% faster, and one of 256 rows, whose attention keeps the memory busy, 0.9% slower (H100).
AHEAD_BYTES, AHEAD_WAVES = 16 * 2**20, 2
DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_DIMS = (64, 128)
MOST_GROUP = 64
# What quantized pages are multiplied as: types that hold each of their values exactly.
WIDENED = {jnp.dtype(jnp.int8): jnp.bfloat16, jnp.dtype(jnp.float8_e4m3fn): jnp.float16}
SMEM_ROWS = 8  # of one swizzled tile


def check_mosaic(dtype: Any, head_dim: int, page_size: int, group: int) -> None:
    """Raise ValueError naming what `decode_mosaic` cannot run on; `group` is the number of query heads a kv head."""
    if dtype not in DTYPES:
        raise ValueError(f"decode_mosaic needs bfloat16 or float16: got {jnp.dtype(dtype).name}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"decode_mosaic needs head_dim 64 or 128: got {head_dim}")
    if page_size < 16 or (TILE_TOKENS % page_size and page_size % TILE_TOKENS):
        raise ValueError(f"decode_mosaic needs a page size of 16, 32 or a multiple of 64: got {page_size}")
    if group > MOST_GROUP:
        raise ValueError(f"decode_mosaic takes at most {MOST_GROUP} query heads per kv head: got {group}")


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))  # traced once, not once a layer
def decode_mosaic(
    q: Float[Array, "B H h"],
    k_pages: Num[Array, "P K p h"],
    v_pages: Num[Array, "P K p h"],
    page_table: Int[Array, "B N"],
    kv_len: Int[Array, " B"],
    *,
    scale: float,
    k_scale: Float[Array, "P K"] | None = None,
    v_scale: Float[Array, "P K"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B H h"]:
    """Decode attention whose thread blocks share all tokens of the batch equally, whatever the lengths.

    Each walks its tiles of 64 tokens: one warpgroup fetches, one computes; what lies across shares is merged by the
    last block that has a part of it, or by a small second kernel where pairs of sequence and kv head are few. Scores,
    softmax, sums and the parts to merge are float32. K is the left side of the products and the query heads are the
    right one, so that a group of 4 costs 8 columns, not 64 rows. Pages of int8 or float8_e4m3fn hold values divided by
    k_scale and v_scale.
    `interpret` runs the kernels on the CPU, for tests.
    Raises ValueError where the kernel cannot run: q of a dtype other than bfloat16 or float16, head_dim other than 64
    or 128, a page size that neither divides 64 nor is a multiple of it (16 at least), more than 64 query heads a kv
    head, JAX older than 0.11 (but for `interpret`); and, from JAX's lowering, a platform that is no NVIDIA GPU.
    The online softmax is FlashAttention's (arXiv 2205.14135), the paging vLLM's (arXiv 2309.06180), merging parts by
    their log-sum-exp Flash-Decoding's (pytorch.org/blog/flash-decoding).
    """
    check_decode(q, k_pages, v_pages, page_table, kv_len)
    check_scales(k_pages, k_scale, v_scale)
    batch, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    group = heads // kv_heads
    check_mosaic(q.dtype, head_dim, page_size, group)
    scales = () if k_scale is None or v_scale is None else (k_scale, v_scale)
    if scales and k_pages.dtype not in WIDENED:
        raise ValueError(f"decode_mosaic takes scales with pages of int8 or float8_e4m3fn: got {k_pages.dtype}")
    if not scales and k_pages.dtype != q.dtype:
        raise ValueError(f"decode_mosaic needs q and pages of one dtype: got {q.dtype} and {k_pages.dtype}")
    queries = q.reshape(batch, kv_heads, group, head_dim)
    out, _, _ = _attend(queries, k_pages, v_pages, page_table, kv_len, scales, (), scale, interpret)
    return out.reshape(q.shape)


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def decode_append_mosaic(
    qkv: Float[Array, "B K G2 h"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    k_pages: Float[Array, "P K p h"],
    v_pages: Float[Array, "P K p h"],
    page_table: Int[Array, "B N"],
    kv_len: Int[Array, " B"],
    *,
    scale: float,
    ahead: Float[Array, "E D"] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B K G h"], Float[Array, "P K p h"], Float[Array, "P K p h"]]:
    """`decode_append_reference` in the kernels of `decode_mosaic`: a step's rotation and append cost no kernel more.

    Every thread block rotates the queries that it attends for. The one that has a sequence's end rotates the new key
    as well, sends it and the value to their page, and begins its softmax with them: nobody else reads that row, so that
    no block waits for another. In place once the pools are donated. Of `ahead` [E, D] the cache is asked for a part,
    where rows are few.
    Raises ValueError as `decode_mosaic` does, and for pages that are quantized.
    """
    check_decode_append(qkv, cos, sin, k_pages, v_pages, page_table, kv_len)
    page_size, head_dim = k_pages.shape[2:]
    check_mosaic(qkv.dtype, head_dim, page_size, qkv.shape[2] - 2)
    if k_pages.dtype != qkv.dtype:
        raise ValueError(f"decode_append_mosaic needs qkv and pages of one dtype: got {qkv.dtype} and {k_pages.dtype}")
    # Of a dimension itself, and of its partner half a head away: computed once for all layers.
    rotation = jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)
    return _attend(qkv, k_pages, v_pages, page_table, kv_len, (), rotation, scale, interpret, ahead)


def _attend(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    kv_len: Array,
    scales: tuple[Array, ...],
    rotation: tuple[Array, ...],
    scale: float,
    interpret: bool,
    ahead: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The output [B, K, G, h] and the pools, which a `rotation` makes new; the arguments as the kernel has them."""
    batch, kv_heads, vectors, head_dim = q.shape
    group = vectors - (2 if rotation else 0)
    wide = WIDENED[k_pages.dtype] if scales else q.dtype
    resident = INTERPRETED_RESIDENT if interpret else RESIDENT
    waves = min(max(round(batch * kv_heads / resident), 1), MOST_WAVES)
    workers = waves * resident
    # The interpreter's blocks cannot count each other.
    merges = not interpret and batch * kv_heads >= FEWEST_PAIRS
    plan = work_plan(kv_len, kv_heads, workers, resident)
    following = () if ahead is None or interpret or waves > AHEAD_WAVES else (ahead,)
    rows, fetched = (pl.cdiv(count, SMEM_ROWS) * SMEM_ROWS for count in (group, vectors))
    settings: dict[str, Any] = dict(
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=mosaic_mode(interpret) or False,
    )
    extra: dict[str, Any] = {}
    if scales:
        extra |= {name: _tiled((TILE_TOKENS, head_dim), wide) for name in ("k_wide", "v_wide")}
    if rotation and head_dim <= WIDTH:
        extra["twice"] = plgpu.SMEM((2 * head_dim, fetched), jnp.float32)
    pools: tuple[Any, Any] = (jax.new_ref(k_pages), jax.new_ref(v_pages)) if rotation else (k_pages, v_pages)
    out, parts, lse = kernel(
        bound(
            attend,
            scale=scale,
            rotated=not rotation,
            ahead_bytes=AHEAD_BYTES if following else 0,
            merges=merges,
            interpret=interpret,
        ),
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), q.dtype),
            jax.ShapeDtypeStruct((workers, 2, head_dim, rows), jnp.float32),
            jax.ShapeDtypeStruct((workers, 2, rows), jnp.float32),
        ),
        scratch_types=dict(
            q_fetched=plgpu.SMEM((fetched, head_dim), q.dtype),
            q=_tiled((fetched, head_dim), wide),
            k=_tiled((STAGES, TILE_TOKENS, head_dim), k_pages.dtype),
            v=_tiled((STAGES, TILE_TOKENS, head_dim), k_pages.dtype),
            weights=_tiled((rows, TILE_TOKENS), wide),
            out=plgpu.SMEM((fetched, head_dim), q.dtype),
            **extra,
            q_ready=plgpu.Barrier(num_barriers=1),
            q_free=plgpu.Barrier(num_barriers=1),
            k_ready=plgpu.Barrier(num_arrivals=PIECES, num_barriers=STAGES),
            v_ready=plgpu.Barrier(num_arrivals=PIECES, num_barriers=STAGES),
            k_free=plgpu.Barrier(num_barriers=STAGES),
            v_free=plgpu.Barrier(num_barriers=STAGES),
        ),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=2,
        thread_name="warpgroup",
        **settings,
    )(q, *pools, page_table, kv_len, plan, *scales, *rotation, *following)
    if not merges:
        out_ref = jax.new_ref(out)  # what is still missing is written in place
        kernel(
            bound(merge_share, interpret=interpret),
            scratch_types=dict(out_smem=plgpu.SMEM((rows, MERGED), q.dtype)),
            grid=(workers, head_dim // MERGED),
            grid_names=("worker", "columns"),
            compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
            interpret=settings["interpret"],
        )(parts, lse, plan, kv_len, out_ref)
        out = jax.freeze(out_ref)
    if rotation:
        k_pages, v_pages = (jax.freeze(pool) for pool in pools)
    return out, k_pages, v_pages


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory as tensor cores read it: tiles of 8 rows and 64 columns, swizzled."""
    transforms = plgpu.TilingTransform((SMEM_ROWS, 64)), plgpu.SwizzleTransform(64 * jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=transforms)
