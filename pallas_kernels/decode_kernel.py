"""The body of the decode kernels: one warpgroup of a thread block fetches, the other attends."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .arrival import arrive
from .compat import load, load_transposed, placed, product, store_transposed
from .decode_fetch import fetch, pages_of
from .decode_merge import LAYOUT, along_rows, store_output
from .decode_new import attend_new, turn_and_append
from .decode_plan import TILE_TOKENS, sharers, tiles_of, walk
from .early_launch import await_kernel_before, launch_kernel_after
from .merge_inline import merge_inline
from .prefetch import prefetch

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
    rotated: bool,
    ahead_bytes: int,
    merges: bool,
    interpret: bool,
    **scratch: Any,
) -> None:
    """q_ref, out_ref [B, K, G, h]; k_ref, v_ref [P, K, p, h]; table_ref [B, N]; len_ref [B]; plan_ref: `work_plan`.

    `others`: the scales [P, K] of keys and of values where they are quantized, then out_ref, and parts_ref and lse_ref
    as `merge_parts` has them. If not yet `rotated`, q_ref is qkv [B, K, G+2, h], `others` begins with the factors
    [B, h] of `turn_and_append`, and the last of a sequence's kv_len tokens is the one in qkv. With `ahead_bytes` a
    matrix to `prefetch` is the last of the inputs. Unless it `merges`, parts are left to `merge_share`.
    """
    *inputs, out_ref, parts_ref, lse_ref = others
    ahead = inputs.pop() if ahead_bytes else None
    gmem = SimpleNamespace(q=q_ref, k=k_ref, v=v_ref, table=table_ref, len=len_ref, plan=plan_ref)
    gmem.scales, gmem.rotation = (inputs, []) if rotated else ([], inputs)
    gmem.out, gmem.parts, gmem.lse = out_ref, parts_ref, lse_ref
    smem = SimpleNamespace(**scratch)
    launch_kernel_after(interpret)
    await_kernel_before(interpret)
    warpgroup = lax.axis_index("warpgroup")
    pl.when(warpgroup == 0)(functools.partial(_compute, gmem, smem, scale, merges))

    @pl.when(warpgroup == 1)
    def _fetch() -> None:
        fetch(gmem, smem)
        if ahead is not None:
            prefetch(ahead, ahead_bytes, lax.axis_index("worker"), lax.axis_size("worker"))


def _compute(gmem: Any, smem: Any, scale: float, merges: bool) -> None:
    """Attend: total is [h, rows], and everything else has a column for each of the group's query heads too."""
    worker = lax.axis_index("worker")
    kv_heads, head_dim, rows = gmem.k.shape[1], gmem.k.shape[3], smem.weights.shape[0]
    quantized, appends = bool(gmem.scales), bool(gmem.rotation)
    scale = scale * math.log2(math.e)  # powers of 2 instead of e: the hardware has an instruction for them

    def attend_share(sequence: Any, head: Any, first_tile: Any, count: Any, length: Any, ring: Any) -> Any:
        tiles = tiles_of(length)
        total = placed(jnp.zeros((head_dim, rows), jnp.float32), LAYOUT)
        peak = placed(jnp.full((rows,), -jnp.inf, jnp.float32), LAYOUT.reduce(0))
        mass = placed(jnp.zeros((TILE_TOKENS, rows), jnp.float32), LAYOUT)  # summed over the tokens at the end only
        stored = length  # tokens whose keys and values are in the pages
        if appends:
            stored = length - 1
            is_last = jnp.logical_and(first_tile + count == tiles, length > 0)
            turn_and_append(gmem, smem, sequence, head, length, is_last)
            score, value = attend_new(smem, gmem.out.shape[2], rows)
            total = _only_if(is_last, head_dim, value)
            peak = score * scale + jnp.where(is_last, 0.0, -jnp.inf)
            mass = _only_if(is_last, 1, jnp.ones_like(mass))
        else:
            plgpu.barrier_wait(smem.q_ready.at[0])
            store_transposed(smem.q, load_transposed(smem.q_fetched, LAYOUT).astype(smem.q.dtype))
            plgpu.commit_smem()
        plgpu.barrier_arrive(smem.q_free.at[0])
        queries = smem.q.at[pl.ds(0, rows)]

        def scales_of(tile: Any) -> list[list[Any]]:
            pages = pages_of(gmem, sequence, length, tile) if quantized else []
            return [[pool[page, head] for page in pages] for pool in gmem.scales]

        def attend_tile(i: Any, carry: Any) -> Any:
            ring, scales, total, peak, mass = carry
            slot, left = lax.rem(ring, smem.k.shape[0]), stored - (first_tile + i) * TILE_TOKENS
            following = scales_of(first_tile + i + 1)  # on their way while this tile is computed
            k, v = smem.k.at[slot], smem.v.at[slot]

            plgpu.barrier_wait(smem.k_ready.at[slot])
            if quantized:
                _copy_columns(k, smem.k_wide, None)
                k = smem.k_wide
                plgpu.commit_smem()
            scores = product(k, queries, b_transposed=True)
            plgpu.barrier_arrive(smem.k_free.at[slot])
            scores = scores * scale
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

        start = ring, scales_of(first_tile), total, peak, mass
        ring, _, total, peak, mass = lax.fori_loop(0, jnp.where(length > 0, count, 0), attend_tile, start)
        mass = mass.sum(axis=0)
        mass = jnp.where(mass > 0, mass, 1.0)  # no token at all: zeros
        total = total / along_rows(mass, total)
        whole = count == tiles

        @pl.when(whole)
        def _store() -> None:
            store_output(total, smem.out.at[pl.ds(0, rows)], gmem.out.at[sequence, head])

        @pl.when(jnp.logical_not(whole))
        def _hand_over() -> None:
            target = worker, jnp.where(first_tile > 0, 0, 1)
            gmem.parts.at[target][...] = total
            gmem.lse.at[target][...] = peak + jnp.log(mass) * math.log2(math.e)
            if not merges:
                return
            # All shares are as long as the first, but for the last.
            owner, others = sharers(worker, first_tile, count, tiles, gmem.plan[0, 3])

            @pl.when(arrive(gmem.plan, owner, others) > 0)
            def _merge() -> None:
                merge_inline(gmem.parts, gmem.lse, gmem.out, owner, others, sequence * kv_heads + head)

        return ring

    walk(gmem.plan, gmem.len, kv_heads, attend_share, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _only_if(condition: Any, count: int, matrix: Any) -> Any:
    """The first `count` rows of `matrix`, and zeros; nothing but zeros unless `condition`."""
    row = lax.broadcasted_iota(jnp.int32, matrix.shape, 0)
    return jnp.where(row < jnp.where(condition, count, 0), matrix, jnp.zeros_like(matrix))


def _copy_columns(source: Any, target: Any, left: Any) -> None:
    """Copy tokens [t, h] in shared memory, cast, but zeros from row `left` on, if it is given."""
    for start in range(0, source.shape[1], COLUMNS):
        columns = slice(None), pl.ds(start, COLUMNS)
        values = load(source.at[columns], LAYOUT).astype(target.dtype)
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
