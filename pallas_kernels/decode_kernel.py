"""The body of `decode_mosaic`: one warpgroup of a thread block fetches, the other attends."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .compat import load_transposed, product, store_transposed
from .decode_merge import LAYOUT, along_rows, store_output
from .decode_plan import TILE_TOKENS, tiles_of, walk

COLUMNS = 64  # of a tile that are in registers at a time


def attend(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    table_ref: Any,
    len_ref: Any,
    plan_ref: Any,
    *others: Any,
    scale: float,
    **scratch: Any,
) -> None:
    """q_ref, out_ref [B, K, G, h]; k_ref, v_ref [P, K, p, h]; table_ref [B, N]; len_ref [B]; plan_ref: `work_plan`.

    `others`: the scales [P, K] of keys and of values where they are quantized, then out_ref, and parts_ref and lse_ref
    as `merge_share` has them.
    """
    *scales, out_ref, parts_ref, lse_ref = others
    gmem = SimpleNamespace(q=q_ref, k=k_ref, v=v_ref, table=table_ref, len=len_ref, plan=plan_ref, scales=scales)
    gmem.out, gmem.parts, gmem.lse = out_ref, parts_ref, lse_ref
    smem = SimpleNamespace(**scratch)
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == 0)(functools.partial(_compute, gmem, smem, scale))
    pl.when(warpgroup == 1)(functools.partial(_fetch, gmem, smem))


def _pages_of(gmem: Any, sequence: Any, length: Any, tile: Any) -> list[Any]:
    """The pages of a tile: one, or several that are smaller. One past the end is the tile's first again, and a tile
    past the end the last: the table says nothing true about what is not there. Page 0 where there is nothing at all."""
    page_size = gmem.k.shape[2]
    tile = jnp.minimum(tile, tiles_of(length) - 1)
    tokens = [tile * TILE_TOKENS + first for first in range(0, TILE_TOKENS, min(page_size, TILE_TOKENS))]
    tokens = [jnp.where(token < length, token, tokens[0]) for token in tokens]
    pages = [gmem.table[sequence, lax.div(token, page_size)] for token in tokens]
    return [jnp.where(length > 0, page, 0) for page in pages]


def _fetch(gmem: Any, smem: Any) -> None:
    """Send for the queries and tiles of a share, as far ahead as there is room."""
    kv_heads, page_size = gmem.k.shape[1:3]
    stages, piece = smem.k.shape[0], min(page_size, TILE_TOKENS)
    free = [smem.q_free.at[0], *(barrier.at[i] for barrier in (smem.k_free, smem.v_free) for i in range(stages))]
    for barrier in free:
        plgpu.barrier_arrive(barrier)

    def fetch_piece(sequence: Any, head: Any, first_tile: Any, count: Any, ring: Any) -> Any:
        length = gmem.len[sequence]
        pages = _pages_of(gmem, sequence, length, first_tile)
        plgpu.barrier_wait(smem.q_free.at[0])
        own = smem.q_fetched.at[pl.ds(0, gmem.q.shape[2])]  # rows beyond give columns that nobody reads
        plgpu.copy_gmem_to_smem(gmem.q.at[sequence, head], own, smem.q_ready.at[0])

        def fetch_tile(i: Any, carry: Any) -> Any:
            ring, pages = carry
            slot, tile = lax.rem(ring, stages), first_tile + i
            inside = pl.ds(lax.rem(tile * TILE_TOKENS, page_size) if page_size > TILE_TOKENS else 0, piece)
            following = _pages_of(gmem, sequence, length, tile + 1)  # a look-up must not wait for room
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


def _compute(gmem: Any, smem: Any, scale: float) -> None:
    """Attend: total is [h, rows], and everything else has a column for each of the group's query heads too."""
    worker = lax.axis_index("worker")
    kv_heads, head_dim, rows = gmem.k.shape[1], gmem.k.shape[3], smem.q.shape[0]
    quantized = bool(gmem.scales)

    def attend_piece(sequence: Any, head: Any, first_tile: Any, count: Any, ring: Any) -> Any:
        length = gmem.len[sequence]
        plgpu.barrier_wait(smem.q_ready.at[0])
        store_transposed(smem.q, load_transposed(smem.q_fetched, LAYOUT).astype(smem.q.dtype))
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem.q_free.at[0])

        def scales_of(tile: Any) -> list[list[Any]]:
            pages = _pages_of(gmem, sequence, length, tile) if quantized else []
            return [[pool[page, head] for page in pages] for pool in gmem.scales]

        def attend_tile(i: Any, carry: Any) -> Any:
            ring, scales, total, peak, mass = carry
            slot, left = lax.rem(ring, smem.k.shape[0]), length - (first_tile + i) * TILE_TOKENS
            following = scales_of(first_tile + i + 1)  # on their way while this tile is computed
            k, v = smem.k.at[slot], smem.v.at[slot]

            plgpu.barrier_wait(smem.k_ready.at[slot])
            if quantized:
                _copy_columns(k, smem.k_wide, None)
                k = smem.k_wide
                plgpu.commit_smem()
            scores = product(k, smem.q, b_transposed=True)
            plgpu.barrier_arrive(smem.k_free.at[slot])
            # Powers of 2 instead of e: the hardware has an instruction for them.
            scores = scores * (scale * math.log2(math.e))
            if quantized:
                scores = scores * _by_token(scales[0], scores)
            scores = jnp.where(lax.broadcasted_iota(jnp.int32, scores.shape, 0) < left, scores, -jnp.inf)
            new_peak = jnp.maximum(peak, scores.max(axis=0))
            weights = jnp.exp2(scores - along_rows(new_peak, scores))
            decay = jnp.exp2(peak - new_peak)
            mass = mass * along_rows(decay, mass) + weights
            if quantized:  # relative to the largest, lest small scales times small weights vanish in 16 bits
                largest = functools.reduce(jnp.maximum, scales[1])
                largest = jnp.where(largest > 0, largest, 1.0)
                weights = weights * _by_token([value / largest for value in scales[1]], weights)
            store_transposed(smem.weights, weights.astype(smem.weights.dtype))

            plgpu.barrier_wait(smem.v_ready.at[slot])
            # A weight of 0 does not stop a NaN left past the end by another sequence.
            if quantized:
                _copy_columns(v, smem.v_wide, left)
                v = smem.v_wide
            else:
                pl.when(left < TILE_TOKENS)(functools.partial(_copy_columns, v, v, left))
            plgpu.commit_smem()
            update = product(v, smem.weights, a_transposed=True, b_transposed=True)
            plgpu.barrier_arrive(smem.v_free.at[slot])
            if quantized:
                update = update * largest
            return ring + 1, following, total * along_rows(decay, total) + update, new_peak, mass

        start = (
            ring,
            scales_of(first_tile),
            jnp.zeros((head_dim, rows), jnp.float32),
            jnp.full((rows,), -jnp.inf, jnp.float32),
            jnp.zeros((TILE_TOKENS, rows), jnp.float32),  # summed over the tokens at the end only
        )
        ring, _, total, peak, mass = lax.fori_loop(0, jnp.where(length > 0, count, 0), attend_tile, start)
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

        return ring

    walk(gmem.plan, gmem.len, kv_heads, attend_piece, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy_columns(source: Any, target: Any, left: Any) -> None:
    """Copy tokens [t, h] in shared memory, cast, but zeros from row `left` on, if it is given."""
    for start in range(0, source.shape[1], COLUMNS):
        columns = slice(None), pl.ds(start, COLUMNS)
        values = source.at[columns][...].astype(target.dtype)
        if left is not None:
            alive = lax.broadcasted_iota(jnp.int32, values.shape, 0) < left
            values = jnp.where(alive, values, jnp.zeros_like(values))
        target.at[columns][...] = values


def _by_token(values: list[Any], matrix: Any) -> Any:
    """A factor for every row of `matrix` [t, n]: scalars of as many equal runs of its rows."""
    token, run = lax.broadcasted_iota(jnp.int32, matrix.shape, 0), matrix.shape[0] // len(values)
    factors = values[0]
    for i, value in enumerate(values[1:], 1):
        factors = jnp.where(token >= i * run, jnp.broadcast_to(value, matrix.shape), factors)
    return factors
