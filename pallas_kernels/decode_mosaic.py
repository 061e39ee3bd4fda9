"""Paged decode attention at the speed of the memory: one Pallas kernel for NVIDIA Hopper (Mosaic GPU)."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from .checks import check_decode
from .compat import load_transposed, mosaic_mode, product, semaphore_signal, semaphores, store_transposed
from .decode_merge import LAYOUT, along_rows, merge_share, owner_of, store_output
from .decode_plan import TILE_TOKENS, tiles_of, walk, work_plan

WORKERS = 2 * 132  # thread blocks: two on each multiprocessor of an H100 or H200, one computes while the other waits
STAGES = 3  # tiles of K and V in flight for each: 3 * 2 * 16 KiB at head_dim 128
INTERPRETED_WORKERS = 5
DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_DIMS = (64, 128)
MOST_GROUP = 64
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
    k_pages: Float[Array, "P K p h"],
    v_pages: Float[Array, "P K p h"],
    page_table: Int[Array, "B N"],
    kv_len: Int[Array, " B"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B H h"]:
    """Decode attention whose thread blocks share all tokens of the batch equally, whatever the lengths.

    Each walks its tiles of 64 tokens: one warpgroup fetches, one computes. Scores, softmax, sums and what blocks hand
    each other are float32. K is the left side of the products and the query heads the right one, so that a group of 4
    costs 8 columns, not 64 rows. `interpret` runs the kernel on the CPU, for tests.
    Raises ValueError where the kernel cannot run: a dtype other than bfloat16 or float16, head_dim other than 64 or
    128, a page size that neither divides 64 nor is a multiple of it (16 at least), more than 64 query heads a kv head,
    JAX older than 0.11 (but for `interpret`); and, from JAX's lowering, a platform that is no NVIDIA GPU.
    The online softmax is FlashAttention's (arXiv 2205.14135), the paging vLLM's (arXiv 2309.06180), merging parts by
    their log-sum-exp Flash-Decoding's (pytorch.org/blog/flash-decoding).
    """
    check_decode(q, k_pages, v_pages, page_table, kv_len)
    batch, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    group = heads // kv_heads
    if k_pages.dtype != q.dtype:
        raise ValueError(f"decode_mosaic needs q and pages of one dtype: got {q.dtype} and {k_pages.dtype}")
    check_mosaic(q.dtype, head_dim, page_size, group)

    workers = INTERPRETED_WORKERS if interpret else WORKERS
    plan = work_plan(kv_len, kv_heads, workers)
    rows = pl.cdiv(group, SMEM_ROWS) * SMEM_ROWS
    plain = functools.partial(plgpu.SMEM, dtype=q.dtype)
    tiled = functools.partial(plain, transforms=(plgpu.TilingTransform((SMEM_ROWS, 64)), plgpu.SwizzleTransform(128)))
    copies = pl.cdiv(TILE_TOKENS, page_size)
    settings: dict[str, Any] = dict(
        grid=(workers,),
        grid_names=("worker",),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=mosaic_mode(interpret),
    )
    out, parts, lse = plgpu.kernel(
        functools.partial(_attend, scale=scale, merge=not interpret),
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, group, head_dim), q.dtype),
            jax.ShapeDtypeStruct((workers, 2, head_dim, rows), jnp.float32),
            jax.ShapeDtypeStruct((workers, 2, rows), jnp.float32),
        ),
        scratch_types=dict(
            q_fetched=plain((rows, head_dim)),
            q=tiled((rows, head_dim)),
            k=tiled((STAGES, TILE_TOKENS, head_dim)),
            v=tiled((STAGES, TILE_TOKENS, head_dim)),
            weights=tiled((rows, TILE_TOKENS)),
            out=plain((rows, head_dim)),
            q_ready=plgpu.Barrier(num_barriers=1),
            q_free=plgpu.Barrier(num_barriers=1),
            k_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            v_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=STAGES),
            k_free=plgpu.Barrier(num_barriers=STAGES),
            v_free=plgpu.Barrier(num_barriers=STAGES),
        ),
        num_threads=2,
        thread_name="warpgroup",
        **settings,
    )(q.reshape(batch, kv_heads, group, head_dim), k_pages, v_pages, page_table, kv_len, plan)
    if interpret:  # the interpreter knows no semaphores: there the merge is a kernel of its own
        out = _merge_apart(parts, lse, plan, kv_len, out, settings)
    return out.reshape(batch, heads, head_dim)


def _merge_apart(*arrays: Any) -> Array:
    *inputs, out, settings = arrays
    refs = [jax.new_ref(array) for array in (*inputs, out)]
    mesh = plgpu.Mesh(grid=settings.pop("grid"), grid_names=settings.pop("grid_names"))

    @pl.core_map(mesh, **settings)
    def merge() -> None:
        rows, head_dim = inputs[0].shape[:1:-1]
        pl.run_scoped(lambda smem: merge_share(*refs, smem), plgpu.SMEM((rows, head_dim), out.dtype))

    return jax.freeze(refs[-1])


def _attend(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    table_ref: Any,
    len_ref: Any,
    plan_ref: Any,
    out_ref: Any,
    parts_ref: Any,
    lse_ref: Any,
    *,
    scale: float,
    merge: bool,
    **scratch: Any,
) -> None:
    """Kernel body. q_ref, out_ref [B, K, G, h]; k_ref, v_ref [P, K, p, h]; table_ref [B, N]; len_ref [B]."""
    gmem = SimpleNamespace(q=q_ref, k=k_ref, v=v_ref, table=table_ref, len=len_ref, plan=plan_ref)
    gmem = SimpleNamespace(**vars(gmem), out=out_ref, parts=parts_ref, lse=lse_ref)
    smem = SimpleNamespace(**scratch)
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == 0)(functools.partial(_compute, gmem, smem, scale, semaphores(WORKERS) if merge else None))
    pl.when(warpgroup == 1)(functools.partial(_fetch, gmem, smem))


def _fetch(gmem: Any, smem: Any) -> None:
    """The warpgroup that sends for a share's queries and tiles, as far ahead as there is room."""
    kv_heads, page_size = gmem.k.shape[1:3]
    piece = min(page_size, TILE_TOKENS)
    free = [smem.q_free.at[0], *(barrier.at[i] for barrier in (smem.k_free, smem.v_free) for i in range(STAGES))]
    for barrier in free:
        plgpu.barrier_arrive(barrier)

    def fetch_piece(sequence: Any, head: Any, first_tile: Any, count: Any, ring: Any) -> Any:
        length = gmem.len[sequence]

        def pages_of(tile: Any) -> tuple[Any, ...]:
            # A page past the end is the tile's first again: the table says nothing true about it.
            tokens = [tile * TILE_TOKENS + i * piece for i in range(TILE_TOKENS // piece)]
            tokens = [jnp.where(token < length, token, tokens[0]) for token in tokens]
            return tuple(gmem.table[sequence, lax.div(token, page_size)] for token in tokens)

        pages = pages_of(first_tile)
        plgpu.barrier_wait(smem.q_free.at[0])
        own = smem.q_fetched.at[pl.ds(0, gmem.q.shape[2])]  # rows beyond give columns that nobody reads
        plgpu.copy_gmem_to_smem(gmem.q.at[sequence, head], own, smem.q_ready.at[0])

        def fetch_tile(i: Any, carry: Any) -> Any:
            ring, pages = carry
            slot, tile = lax.rem(ring, STAGES), first_tile + i
            inside = pl.ds(lax.rem(tile * TILE_TOKENS, page_size) if page_size > TILE_TOKENS else 0, piece)
            following = pages_of(jnp.minimum(tile + 1, tiles_of(length) - 1))  # a look-up must not wait for room
            for pool, tiles, ready, done in (
                (gmem.k, smem.k, smem.k_ready, smem.k_free),
                (gmem.v, smem.v, smem.v_ready, smem.v_free),
            ):
                plgpu.barrier_wait(done.at[slot])
                for j, page in enumerate(pages):
                    target = tiles.at[slot, pl.ds(j * piece, piece)]
                    plgpu.copy_gmem_to_smem(pool.at[page, head, inside], target, ready.at[slot])
            return ring + 1, following

        ring, _ = lax.fori_loop(0, jnp.where(length > 0, count, 0), fetch_tile, (ring, pages))
        return ring

    walk(gmem.plan, gmem.len, kv_heads, fetch_piece, jnp.int32(0))
    for barrier in free:
        plgpu.barrier_wait(barrier)


def _compute(gmem: Any, smem: Any, scale: float, finished: Any) -> None:
    """The warpgroup that attends: total [h, rows], everything else with a column for each query head too."""
    worker = lax.axis_index("worker")
    kv_heads, head_dim, rows = gmem.k.shape[1], gmem.k.shape[3], smem.q.shape[0]

    def attend_piece(sequence: Any, head: Any, first_tile: Any, count: Any, ring: Any) -> Any:
        length = gmem.len[sequence]
        plgpu.barrier_wait(smem.q_ready.at[0])
        store_transposed(smem.q, load_transposed(smem.q_fetched, LAYOUT))
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem.q_free.at[0])

        def attend_tile(i: Any, carry: Any) -> Any:
            ring, total, peak, mass = carry
            slot, left = lax.rem(ring, STAGES), length - (first_tile + i) * TILE_TOKENS
            plgpu.barrier_wait(smem.k_ready.at[slot])
            scores = product(smem.k.at[slot], smem.q, b_transposed=True)
            plgpu.barrier_arrive(smem.k_free.at[slot])
            # Powers of 2 instead of e: the hardware has an instruction for them.
            alive = lax.broadcasted_iota(jnp.int32, scores.shape, 0) < left
            scores = jnp.where(alive, scores * (scale * math.log2(math.e)), -jnp.inf)
            new_peak = jnp.maximum(peak, scores.max(axis=0))
            weights = jnp.exp2(scores - along_rows(new_peak, scores))
            decay = jnp.exp2(peak - new_peak)
            mass = mass * along_rows(decay, mass) + weights
            store_transposed(smem.weights, weights.astype(smem.weights.dtype))

            plgpu.barrier_wait(smem.v_ready.at[slot])

            @pl.when(left < TILE_TOKENS)
            def _drop_values_past_the_end() -> None:
                # A weight of 0 does not stop a NaN left in the page by another sequence.
                for start in range(0, head_dim, 64):
                    part = smem.v.at[slot, :, pl.ds(start, 64)]
                    values = part[...]
                    alive = lax.broadcasted_iota(jnp.int32, values.shape, 0) < left
                    part[...] = jnp.where(alive, values, jnp.zeros_like(values))

            plgpu.commit_smem()
            update = product(smem.v.at[slot], smem.weights, a_transposed=True, b_transposed=True)
            plgpu.barrier_arrive(smem.v_free.at[slot])
            return ring + 1, total * along_rows(decay, total) + update, new_peak, mass

        start = (
            ring,
            jnp.zeros((head_dim, rows), jnp.float32),
            jnp.full((rows,), -jnp.inf, jnp.float32),
            jnp.zeros((TILE_TOKENS, rows), jnp.float32),  # summed over the tokens at the end only
        )
        ring, total, peak, mass = lax.fori_loop(0, jnp.where(length > 0, count, 0), attend_tile, start)
        mass = mass.sum(axis=0)
        mass = jnp.where(mass > 0, mass, 1.0)  # no token at all: zeros
        total = total / along_rows(mass, total)
        whole = count == tiles_of(length)

        @pl.when(whole)
        def _store() -> None:
            store_output(total, smem.out, gmem.out.at[sequence, head])

        @pl.when(jnp.logical_not(whole))
        def _hand_over() -> None:
            target = worker, jnp.where(first_tile > 0, 0, 1)
            gmem.parts.at[target][...] = total
            gmem.lse.at[target][...] = peak + jnp.log(mass) * math.log2(math.e)
            if finished is not None:

                @pl.when(first_tile > 0)
                def _tell_the_owner() -> None:
                    semaphore_signal(finished.at[owner_of(worker, first_tile, gmem.plan[0, 3])])

        return ring

    walk(gmem.plan, gmem.len, kv_heads, attend_piece, jnp.int32(0))
    if finished is not None:
        merge_share(gmem.parts, gmem.lse, gmem.plan, gmem.len, gmem.out, smem.out, finished)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
