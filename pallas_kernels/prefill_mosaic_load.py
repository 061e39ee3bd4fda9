"""The warpgroup of the prefill kernel that loads."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .prefill_mosaic_share import BLOCK, ROWS, Share, piece_of


def load(
    share: Share,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    table_ref: Any,
    *,
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    q_ready: Any,
    q_free: Any,
    k_ready: Any,
    v_ready: Any,
    k_free: Any,
    v_free: Any,
) -> None:
    """Load each item's queries, one item ahead, and its keys and values in blocks, as soon as there is room.

    q_ref [T, H, h]; k_ref, v_ref [P, K, p, h]; table_ref [C, N]; q_smem [2, 2, h/64, 64, 64]; k_smem, v_smem
    [stages, BLOCK, h]. There must be an item.
    """
    kv_heads, page_size = k_ref.shape[1:3]
    stages, piece = k_smem.shape[0], piece_of(page_size)
    pieces = BLOCK // piece
    total = share.total
    live = share.turns(total)

    def pages_of(chunk: Any, tokens: Any, step: Any) -> tuple[Any, ...]:
        entries: list[Any] = []
        for i in range(pieces):
            # Past the end: the last piece again, for the table may say anything there.
            wanted = jnp.clip(step * pieces + i, 0, lax.div(tokens - 1, piece))
            entries += [table_ref[chunk, lax.div(wanted * piece, page_size)], lax.rem(wanted * piece, page_size)]
        return tuple(entries)

    def load_item(turn: Any, carry: Any) -> Any:
        done, (head, chunk, row, _, tokens, _) = carry
        following = share.item(turn + 1, total)
        kv_head = lax.div(head, share.heads // kv_heads)
        buffer, extra = lax.rem(turn, 2), turn == live
        steps = jnp.where(extra, 1, pl.cdiv(tokens, BLOCK))

        def fetch(pool: Any, target: Any, ready: Any, entries: tuple[Any, ...]) -> None:
            for i in range(pieces):
                source = pool.at[entries[2 * i], kv_head, pl.ds(entries[2 * i + 1], piece)]
                plgpu.copy_gmem_to_smem(source, target.at[pl.ds(i * piece, piece)], ready)

        @pl.when(turn >= 2)
        def _await_room() -> None:
            plgpu.barrier_wait(q_free.at[buffer])

        for wg in range(2):
            rows = pl.ds(row + wg % share.tall * ROWS, ROWS)
            for i, column in enumerate(share.columns):
                source = q_ref.at[rows, head + wg % share.wide, column]
                plgpu.copy_gmem_to_smem(source, q_smem.at[buffer, wg, i], q_ready.at[2 * buffer + wg])

        def load_block(step: Any, entries: tuple[Any, ...]) -> Any:
            upcoming = pages_of(chunk, tokens, step + 1)  # read while this block waits for room
            slot, used = lax.rem(done + step, stages), done + step >= stages

            @pl.when(used)
            def _await_keys_room() -> None:
                plgpu.barrier_wait(k_free.at[slot])

            fetch(k_ref, k_smem.at[slot], k_ready.at[slot], entries)

            @pl.when(jnp.logical_not(extra))
            def _load_values() -> None:
                @pl.when(used)
                def _await_values_room() -> None:
                    plgpu.barrier_wait(v_free.at[slot])

                fetch(v_ref, v_smem.at[slot], v_ready.at[slot], entries)

            return upcoming

        lax.fori_loop(0, steps, load_block, pages_of(chunk, tokens, 0))
        return done + steps, following

    # One item more than there are, of which nothing is used: so every item can end with the next one's first keys.
    done, _ = lax.fori_loop(0, live + 1, load_item, (jnp.int32(0), share.item(jnp.int32(0), total)))

    # No barrier may end with completions that nobody saw.
    plgpu.barrier_wait(q_free.at[lax.rem(live - 1, 2)])
    for i in range(1, stages + 1):

        @pl.when(done >= i)
        def _see_keys_freed(i: int = i) -> None:
            plgpu.barrier_wait(k_free.at[lax.rem(done - i, stages)])

        @pl.when(done > i)
        def _see_values_freed(i: int = i) -> None:
            plgpu.barrier_wait(v_free.at[lax.rem(done - 1 - i, stages)])
