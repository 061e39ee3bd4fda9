"""Paged prefill attention as one persistent Pallas kernel for NVIDIA Hopper (Mosaic GPU)."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from .checks import check_prefill
from .compat import bound, mosaic_mode
from .prefill_mosaic_body import attend
from .prefill_mosaic_items import work_items
from .prefill_mosaic_share import BLOCK, COLUMNS, ROWS, TILED, piece_of

BLOCKS = 132  # thread blocks: the SMs of an H100 or H200 (SXM); on other chips another number would only be faster
BUFFER_BYTES = 128 * 1024  # of keys and values on their way, in SMEM
DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_DIMS = (64, 128)


def check_prefill_mosaic(dtype: Any, head_dim: int, page_size: int) -> None:
    """Raise ValueError naming what `prefill_mosaic` cannot run on."""
    if dtype not in DTYPES:
        raise ValueError(f"prefill_mosaic needs bfloat16 or float16: got {jnp.dtype(dtype).name}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"prefill_mosaic needs head_dim 64 or 128: got {head_dim}")
    if page_size not in (16, 32) and (page_size < 64 or page_size % 64):
        raise ValueError(f"prefill_mosaic needs a page size of 16, 32 or a multiple of 64: got {page_size}")


@functools.partial(jax.jit, static_argnames=("scale", "interpret"))  # traced once, not once a layer
def prefill_mosaic(
    q: Float[Array, "T H h"],
    k_pages: Float[Array, "P K p h"],
    v_pages: Float[Array, "P K p h"],
    page_table: Int[Array, "C N"],
    q_start: Int[Array, " C"],
    q_len: Int[Array, " C"],
    kv_len: Int[Array, " C"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "T H h"]:
    """As `prefill_reference`: one grid for every mix of chunks, no gather of the cache, no padding to the longest.

    The chunks and the gaps between them are cut into items of 64 rows of two heads that share their keys (128 rows of
    one head where they do not pair), sorted by their tokens on the device; a program computes that list once, however
    many layers use it. As many thread blocks as the chip has SMs take items in turn. One warpgroup of each loads
    queries, and keys and values page by page; two multiply, each computing the softmax of a block of 128 tokens while
    the tensor cores work on the values of the block before and for the other one (FlashAttention-3, arXiv 2407.08608;
    FlashAttention-4 rescales as seldom). Scores, softmax and sums are float32. `interpret` runs the kernel on the CPU,
    for tests.
    Raises ValueError where the kernel cannot run: see `check_prefill_mosaic`, JAX older than 0.11 (but for
    `interpret`); and, from JAX's lowering, a platform that is no NVIDIA GPU.
    """
    check_prefill(q, k_pages, v_pages, page_table, q_start, q_len, kv_len)
    if k_pages.dtype != q.dtype:
        raise ValueError(f"prefill_mosaic needs q and pages of one dtype: got {q.dtype} and {k_pages.dtype}")
    rows, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    check_prefill_mosaic(q.dtype, head_dim, page_size)
    mode = mosaic_mode(interpret)
    pair = heads // kv_heads % 2 == 0
    items, counts = work_items(q_start, q_len, kv_len, rows, ROWS if pair else 2 * ROWS)

    stages = BUFFER_BYTES // (2 * BLOCK * head_dim * q.dtype.itemsize)
    pieces = BLOCK // piece_of(page_size)
    tiled = functools.partial(plgpu.SMEM, dtype=q.dtype, transforms=TILED)

    def viewed_twice(*shape: int) -> Any:
        # Rows of 128 swizzled bytes are the same bytes as tiles of 8 such rows, but only the first may be copied from
        # and to rows of q that are no multiple of 8.
        if interpret:
            return plgpu.SMEM(shape, q.dtype)
        return plgpu.RefUnion(plgpu.SMEM(shape, q.dtype, transforms=TILED[1:]), tiled(shape))

    scratch = dict(
        q_smem=viewed_twice(2, 2, head_dim // COLUMNS, ROWS, COLUMNS),
        k_smem=tiled((stages, BLOCK, head_dim)),
        v_smem=tiled((stages, BLOCK, head_dim)),
        out_smem=viewed_twice(2, head_dim // COLUMNS, ROWS, COLUMNS),
        q_ready=plgpu.Barrier(num_arrivals=head_dim // COLUMNS, num_barriers=4),
        q_free=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        k_ready=plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )
    if interpret:
        scratch["scores_stand_in"] = plgpu.SMEM((2, ROWS, BLOCK), jnp.float32)
        scratch["sums_stand_in"] = plgpu.SMEM((2, ROWS, head_dim), jnp.float32)
    return plgpu.kernel(
        bound(attend, scale=scale * math.log2(math.e), pair=pair, interpret=interpret),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=scratch,
        grid=(2 if interpret else BLOCKS,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=mode,
    )(q, k_pages, v_pages, page_table, items, counts)
