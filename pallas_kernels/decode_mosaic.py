"""Paged decode attention at the speed of the memory: Pallas kernels for NVIDIA Hopper (Mosaic GPU)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Num

from .checks import check_decode, check_scales
from .compat import mosaic_mode
from .decode_kernel import attend
from .decode_merge import merge_share
from .decode_plan import TILE_TOKENS, work_plan

RESIDENT = 2 * 132  # thread blocks that run at a time: two on each multiprocessor of an H100 or H200
MOST_WAVES = 4  # times as many blocks as run at a time, where there are many (sequence, kv head) pairs
STAGES = 3  # tiles of K and V in flight for each: 3 * 2 * 16 KiB at head_dim 128
INTERPRETED_RESIDENT = 3
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

    Each walks its tiles of 64 tokens: one warpgroup fetches, one computes; a small second kernel merges what lies
    across shares. Scores, softmax, sums and the parts to merge are float32. K is the left side of the products and the
    query heads are the right one, so that a group of 4 costs 8 columns, not 64 rows. Pages of int8 or float8_e4m3fn
    hold values divided by k_scale and v_scale. `interpret` runs the kernels on the CPU, for tests.
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
    wide = WIDENED[k_pages.dtype] if scales else q.dtype

    resident = INTERPRETED_RESIDENT if interpret else RESIDENT
    waves = min(max(round(batch * kv_heads / resident), 1), MOST_WAVES)
    workers = waves * resident
    plan = work_plan(kv_len, kv_heads, workers, resident)
    rows = pl.cdiv(group, SMEM_ROWS) * SMEM_ROWS
    copies = pl.cdiv(TILE_TOKENS, page_size)
    settings: dict[str, Any] = dict(
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=mosaic_mode(interpret) or False,
    )
    out, parts, lse = plgpu.kernel(
        functools.partial(attend, scale=scale),
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), q.dtype),
            jax.ShapeDtypeStruct((workers, 2, head_dim, rows), jnp.float32),
            jax.ShapeDtypeStruct((workers, 2, rows), jnp.float32),
        ),
        scratch_types=dict(
            q_fetched=plgpu.SMEM((rows, head_dim), q.dtype),
            q=_tiled((rows, head_dim), wide),
            k=_tiled((STAGES, TILE_TOKENS, head_dim), k_pages.dtype),
            v=_tiled((STAGES, TILE_TOKENS, head_dim), k_pages.dtype),
            weights=_tiled((rows, TILE_TOKENS), wide),
            out=plgpu.SMEM((rows, head_dim), q.dtype),
            **({name: _tiled((TILE_TOKENS, head_dim), wide) for name in ("k_wide", "v_wide")} if scales else {}),
            q_ready=plgpu.Barrier(num_barriers=1),
            q_free=plgpu.Barrier(num_barriers=1),
            k_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            v_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            k_free=plgpu.Barrier(num_barriers=STAGES),
            v_free=plgpu.Barrier(num_barriers=STAGES),
        ),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=2,
        thread_name="warpgroup",
        **settings,
    )(q.reshape(batch, kv_heads, group, head_dim), k_pages, v_pages, page_table, kv_len, plan, *scales)
    out_ref = jax.new_ref(out)  # the merge writes what is still missing in place
    refs = [*map(jax.new_ref, (parts, lse, plan, kv_len)), out_ref]

    columns = 64 if waves == 1 else head_dim  # few sequences may have many parts each: more blocks then merge them

    @pl.core_map(plgpu.Mesh(grid=(workers, head_dim // columns), grid_names=("worker", "columns")), **settings)
    def merge() -> None:
        pl.run_scoped(functools.partial(merge_share, *refs), plgpu.SMEM((rows, columns), q.dtype))

    return jax.freeze(out_ref).reshape(batch, heads, head_dim)


def _tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory as tensor cores read it: tiles of 8 rows and 64 columns, swizzled."""
    transforms = plgpu.TilingTransform((SMEM_ROWS, 64)), plgpu.SwizzleTransform(64 * jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=transforms)
