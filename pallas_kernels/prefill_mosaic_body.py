"""The prefill kernel: one warpgroup loads, two multiply."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .early_launch import await_kernel_before, launch_kernel_after
from .prefill_mosaic_load import load
from .prefill_mosaic_ops import Interpreted, TensorCores
from .prefill_mosaic_share import BLOCK, COLUMNS, PRODUCER, ROWS, Share

REGISTERS = {"increase": 240, "decrease": 24}  # of a thread that multiplies, and of one that loads
GROWTH = 8.0  # powers of 2 by which a row's scores may outgrow the maximum they are measured against


def attend(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    table_ref: Any,
    items_ref: Any,
    counts_ref: Any,
    out_ref: Any,
    *,
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    out_smem: Any,
    q_ready: Any,
    q_free: Any,
    k_ready: Any,
    v_ready: Any,
    k_free: Any,
    v_free: Any,
    scores_stand_in: Any = None,
    sums_stand_in: Any = None,
    scale: float,
    pair: bool,
    interpret: bool,
) -> None:
    """Kernel body. q_ref, out_ref [T, H, h]; k_ref, v_ref [P, K, p, h]; table_ref [C, N]; items_ref [5, M]."""
    launch_kernel_after(interpret)
    await_kernel_before(interpret)
    heads, head_dim = q_ref.shape[1:]
    stages, dtype = k_smem.shape[0], k_smem.dtype
    share = Share(items_ref, counts_ref, heads, head_dim, pair)
    total = share.total
    live = share.turns(total)
    wg = lax.axis_index("wg")
    # Two views of the same bytes: copies may start at any row of q, products want tiles of 8 rows.
    q_copied, q_tiled = (q_smem, q_smem) if interpret else q_smem
    out_copied, out_tiled = (out_smem, out_smem) if interpret else out_smem
    cores = Interpreted() if interpret else TensorCores()

    def slot_of(step: Any) -> Any:
        return lax.rem(step, stages)

    @pl.when(wg == PRODUCER)
    def _load() -> None:
        plgpu.set_max_registers(REGISTERS["decrease"], action="decrease")
        barriers = dict(q_ready=q_ready, q_free=q_free, k_ready=k_ready, v_ready=v_ready, k_free=k_free, v_free=v_free)

        @pl.when(live > 0)
        def _load_items() -> None:
            refs = (q_ref, k_ref, v_ref, table_ref)
            load(share, *refs, q_smem=q_copied, k_smem=k_smem, v_smem=v_smem, **barriers)

    @pl.when(wg < PRODUCER)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS["increase"], action="increase")
        offset = 0 if pair else wg * ROWS
        scores_ref, sums_ref = (scores_stand_in.at[wg], sums_stand_in.at[wg]) if interpret else (None, None)

        def multiply_keys(scores: Any, buffer: Any, slot: Any) -> None:
            for c, column in enumerate(share.columns):
                cores.multiply_transposed(scores, q_tiled.at[buffer, wg, c], k_smem.at[slot, :, column])

        def weigh(scores: Any, visible: Any, peak: Any, mass: Any) -> Any:
            """Weights of a block, and each row's new maximum, sum of weights and factor for what came before."""
            if visible is not None:
                row, column = (cores.iota(scores.shape, axis) for axis in (0, 1))
                scores = jnp.where(column <= row + visible, scores, -jnp.inf)
            top = scores.max(axis=1) * scale
            # A maximum that lags behind a little serves as well, and spares most multiplications of the total.
            top = top if peak is None else jnp.where(top > peak + GROWTH, top, peak)
            weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(top, scores.shape, [0]))
            if peak is None:
                return weights, top, weights.sum(axis=1), top
            decay = jnp.exp2(peak - top)
            return weights, top, mass * decay + weights.sum(axis=1), decay

        def send(fill: Any, head: Any, row: Any, height: Any) -> None:
            """Let `fill` write the output's tiles, and copy those of its rows that are the item's."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            fill()
            plgpu.commit_smem()
            count, to, to_head = height - offset, row + offset, head + (wg if pair else 0)

            def copy(first: Any, size: int) -> None:
                for c, column in enumerate(share.columns):
                    source = out_copied.at[wg, c, pl.ds(first, size)]
                    plgpu.copy_smem_to_gmem(source, out_ref.at[pl.ds(to + first, size), to_head, column])

            pl.when(count >= ROWS)(lambda: copy(0, ROWS))
            pl.when(count < ROWS)(  # the rows after them belong to others
                lambda: lax.fori_loop(0, jnp.maximum(count, 0), lambda r, _: copy(r, 1), None)
            )

        def store(result: Any) -> None:
            for c, start in enumerate(range(0, head_dim, COLUMNS)):
                out_tiled[wg, c] = result[:, start : start + COLUMNS]

        def drop_values_past(left: Any, slot: Any) -> None:
            """Zeros for the values after the first `left`: a weight of 0 does not stop a NaN left by others."""

            @pl.when(left < BLOCK)
            def _drop() -> None:
                cores.clear(v_smem, slot, left)
                plgpu.commit_smem()

        def first_row(fields: Any) -> Any:
            return fields[4] - fields[3] + offset  # its position in the sequence

        def attend_items() -> None:
            def await_keys(step: Any) -> None:
                plgpu.barrier_wait(k_ready.at[slot_of(step)])

            def begin(scores: Any) -> Any:
                multiply_keys(scores, 0, 0)
                return cores.read(scores, 0)

            start = share.item(jnp.int32(0), total)
            plgpu.barrier_wait(q_ready.at[wg])
            await_keys(0)
            scores = cores.scoped(begin, (ROWS, BLOCK), scores_ref)
            plgpu.barrier_arrive(k_free.at[0])
            weights, peak, mass, _ = weigh(scores, first_row(start), None, None)
            await_keys(1)

            def attend_item(turn: Any, carry: Any) -> Any:
                done, fields, *state = carry
                head, _, row, height, tokens, limit = fields
                following = share.item(turn + 1, total)
                steps = pl.cdiv(tokens, BLOCK)
                own = first_row(fields)
                buffer = lax.rem(turn, 2)

                def advance(sums: Any, weights: Any, step: Any, buffer: Any, await_values: bool = True) -> Any:
                    """Scores of the step; meanwhile the weights of the step before meet their values."""
                    slot, previous = slot_of(step), slot_of(step - 1)

                    def issue(scores: Any) -> Any:
                        multiply_keys(scores, buffer, slot)
                        if await_values:
                            plgpu.barrier_wait(v_ready.at[previous])
                        cores.multiply(sums, weights, v_smem.at[previous])
                        return cores.read(scores, 1)

                    scores = cores.scoped(issue, (ROWS, BLOCK), scores_ref)
                    plgpu.barrier_arrive(k_free.at[slot])
                    return scores

                def attend_block(step: Any, state: Any, masked: bool) -> Any:
                    def overlap(sums: Any, weights: Any, peak: Any, mass: Any, _: Any) -> Any:
                        scores = advance(sums, weights, done + step, buffer)
                        fresh = weigh(scores, own - step * BLOCK if masked else None, peak, mass)
                        weights, peak, mass, decay = lax.optimization_barrier(fresh)
                        # Also keeps the wait for the values' product behind the softmax that should overlap it.
                        await_keys(done + step + 1)
                        so_far = cores.read(sums, 0)
                        plgpu.barrier_arrive(v_free.at[slot_of(done + step - 1)])
                        return weights.astype(dtype), peak, mass, cores.rescale(so_far, decay)

                    return cores.resumed(overlap, state, sums_ref)

                full = jnp.clip(lax.div(own + 1, BLOCK), 1, steps)  # steps that every row sees all of
                state = (*state, cores.zeros((ROWS, head_dim), jnp.float32))
                state = lax.fori_loop(1, full, functools.partial(attend_block, masked=False), state)
                state = lax.fori_loop(full, steps, functools.partial(attend_block, masked=True), state)
                mass = state[2]

                end = done + steps
                plgpu.barrier_arrive(q_free.at[buffer])
                plgpu.barrier_wait(q_ready.at[2 * (1 - buffer) + wg])
                plgpu.barrier_wait(v_ready.at[slot_of(end - 1)])
                drop_values_past(limit - (steps - 1) * BLOCK, slot_of(end - 1))

                def overlap_next(sums: Any, weights: Any, *_: Any) -> Any:
                    scores = advance(sums, weights, end, 1 - buffer, await_values=False)
                    fresh = weigh(scores, first_row(following), None, None)
                    weights, peak, mass, _ = lax.optimization_barrier(fresh)
                    pl.when(turn + 1 < live)(lambda: await_keys(end + 1))
                    result = cores.read(sums, 0)
                    plgpu.barrier_arrive(v_free.at[slot_of(end - 1)])
                    return weights.astype(dtype), peak, mass, result

                *state, result = cores.resumed(overlap_next, state, sums_ref)
                result = result * lax.broadcast_in_dim(1 / mass, result.shape, [0])
                send(lambda: store(result.astype(dtype)), head, row, height)
                return end, following, *state

            state = (jnp.int32(0), start, weights.astype(dtype), peak, mass)
            lax.fori_loop(0, live, attend_item, state)

        pl.when(live > 0)(attend_items)

        everything = share.total_with_gaps

        def clear_item(turn: Any, _: Any) -> None:
            head, _, row, height, _, _ = share.item(turn, everything)
            send(lambda: cores.clear(out_tiled, wg, 0), head, row, height)

        lax.fori_loop(live, share.turns(everything), clear_item, None)
        plgpu.wait_smem_to_gmem(0)
