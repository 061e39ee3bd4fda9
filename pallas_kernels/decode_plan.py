"""How paged decode attention is divided over the blocks of a GPU: equal shares of all tokens, whatever the lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

TILE_TOKENS = 64  # what a step of the kernel multiplies: the rows of one wgmma
ENOUGH = 32  # tiles of a share that hide how long a worker takes to start


def tiles_of(length: Any) -> Any:
    """Tiles of a sequence of `length` tokens; one for an empty sequence, whose output somebody must clear."""
    return jnp.maximum(lax.div(length + (TILE_TOKENS - 1), TILE_TOKENS), 1)


def _split(tiles: Any, among: int) -> Any:
    return lax.div(tiles + (among - 1), among)


def work_plan(kv_len: Int[Array, " B"], kv_heads: int, workers: int, resident: int) -> Int[Array, "shares 6"]:
    """(sequence, kv head, first tile, number of tiles, the sequence's kv_len, 0) of every worker's share; one more row
    of zeros ends the list. In the last column kernels count, and leave it as it was.

    The tiles of all (sequence, kv head) pairs in a row, cut in equal shares as stream-K cuts matrix products
    (arXiv 2301.03598), so that one grid serves every mix of lengths. `resident` of the workers run at a time: up to
    `ENOUGH` tiles are a share as long as each of those gets one, and the rest goes to whoever is done first (some
    multiprocessors read memory a quarter faster than others).
    The layers of a step call it with the same `kv_len`, and XLA computes it once. Kernels that share a plan must run
    one after the other, as layers do: each takes what the one before gave.
    """
    order = jnp.arange(kv_len.shape[0])
    tiles = tiles_of(kv_len)
    # A sum over a triangle: one fused kernel, where a cumulative sum is several.
    ends = kv_heads * jnp.where(order[:, None] >= order[None, :], tiles[None, :], 0).sum(axis=1)
    share = jnp.maximum(_split(ends[-1], workers), jnp.minimum(_split(ends[-1], resident), ENOUGH))
    start = jnp.arange(workers + 1) * share
    count = jnp.clip(ends[-1] - start, 0, share)
    sequence = jnp.minimum((ends[None, :] <= start[:, None]).sum(axis=1), order[-1])
    inside = start - (ends - kv_heads * tiles)[sequence]
    head, tile = jnp.divmod(inside, tiles[sequence])
    return jnp.where(
        count[:, None] > 0, jnp.stack([sequence, head, tile, count, kv_len[sequence], start * 0], axis=1), 0
    ).astype(jnp.int32)


def sharers(worker: Any, first_tile: Any, count: Any, tiles: Any, share: Any) -> tuple[Any, Any]:
    """Of `tiles` in a (sequence, kv head), `worker` has `count` from `first_tile` on, its share being `share` like all
    others': the worker that has the first of them, and how many others have some."""
    before = lax.div(first_tile + share - 1, share)
    taken = jnp.where(before > 0, first_tile - (before - 1) * share, count)
    return worker - before, lax.div(tiles - taken + share - 1, share)


def walk(plan_ref: Any, len_ref: Any, kv_heads: int, visit: Callable[..., Any], state: Any) -> None:
    """In a kernel over `worker`s: state = visit(sequence, head, first tile, tiles, kv_len, state) for each piece of a
    share."""

    def step(carry: Any) -> Any:
        sequence, head, tile, left, length, state = carry
        next_sequence = jnp.where(head + 1 == kv_heads, sequence + 1, sequence)
        next_sequence = jnp.minimum(next_sequence, len_ref.shape[0] - 1)
        next_length = len_ref[next_sequence]  # on its way meanwhile
        count = jnp.minimum(left, tiles_of(length) - tile)
        state = visit(sequence, head, tile, count, length, state)
        head = jnp.where(head + 1 == kv_heads, 0, head + 1)
        return next_sequence, head, jnp.int32(0), left - count, next_length, state

    share = tuple(plan_ref[lax.axis_index("worker"), i] for i in range(5))
    lax.while_loop(lambda carry: carry[3] > 0, step, (*share, state))
