"""The half of the decode kernel that fetches: a warpgroup sends for queries, keys and values ahead of their use."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .decode_plan import TILE_TOKENS, tiles_of, walk

PIECE = 16  # tokens of a copy where a tile is not full: what lies past the end would be memory traffic for nothing
PIECES = TILE_TOKENS // PIECE  # arrivals that make a tile of keys, or of values, ready


def pages_of(gmem: Any, sequence: Any, length: Any, tile: Any) -> list[Any]:
    """The pages of a tile: one, or several that are smaller. One past the end is the tile's first again, and a tile
    past the end the last: the table says nothing true about what is not there. Page 0 where there is nothing at all."""
    page_size = gmem.k.shape[2]
    tile = jnp.minimum(tile, tiles_of(length) - 1)
    tokens = [tile * TILE_TOKENS + first for first in range(0, TILE_TOKENS, min(page_size, TILE_TOKENS))]
    tokens = [jnp.where(token < length, token, tokens[0]) for token in tokens]
    pages = [gmem.table[sequence, lax.div(token, page_size)] for token in tokens]
    return [jnp.where(length > 0, page, 0) for page in pages]


def fetch(gmem: Any, smem: Any) -> None:
    """Send for the queries and tiles of a share. Of a new token whose key is in `gmem.q` nothing is in the pages."""
    kv_heads, page_size = gmem.k.shape[1:3]
    stages = smem.k.shape[0]
    free = [smem.q_free.at[0], *(barrier.at[i] for barrier in (smem.k_free, smem.v_free) for i in range(stages))]
    for barrier in free:
        plgpu.barrier_arrive(barrier)

    def fetch_share(sequence: Any, head: Any, first_tile: Any, count: Any, length: Any, ring: Any) -> Any:
        pages = pages_of(gmem, sequence, length, first_tile)
        plgpu.barrier_wait(smem.q_free.at[0])
        own = smem.q_fetched.at[pl.ds(0, gmem.q.shape[2])]  # rows beyond give columns that nobody reads
        plgpu.copy_gmem_to_smem(gmem.q.at[sequence, head], own, smem.q_ready.at[0])

        def fetch_tile(i: Any, carry: Any) -> Any:
            ring, pages = carry
            slot, tile = lax.rem(ring, stages), first_tile + i
            inside = lax.rem(tile * TILE_TOKENS, page_size) if page_size > TILE_TOKENS else 0
            left = length - (1 if gmem.rotation else 0) - tile * TILE_TOKENS
            following = pages_of(gmem, sequence, length, tile + 1)  # a look-up must not wait for room
            for pool, tiles, ready, done in (
                (gmem.k, smem.k, smem.k_ready, smem.k_free),
                (gmem.v, smem.v, smem.v_ready, smem.v_free),
            ):
                plgpu.barrier_wait(done.at[slot])
                _fetch_tile(pool, tiles.at[slot], ready.at[slot], head, pages, inside, left)
            return ring + 1, following

        ring, _ = lax.fori_loop(0, jnp.where(length > 0, count, 0), fetch_tile, (ring, pages))
        return ring

    walk(gmem.plan, gmem.len, kv_heads, fetch_share, jnp.int32(0))
    for barrier in free:
        plgpu.barrier_wait(barrier)


def _fetch_tile(pool: Any, tile: Any, ready: Any, head: Any, pages: list[Any], inside: Any, left: Any) -> None:
    """Send for the first `left` tokens of a tile, which begins at token `inside` of its first page."""
    width = TILE_TOKENS // len(pages)  # tokens of a page that are in the tile

    @pl.when(left >= TILE_TOKENS)
    def _whole() -> None:
        for j, page in enumerate(pages):
            plgpu.copy_gmem_to_smem(pool.at[page, head, pl.ds(inside, width)], tile.at[pl.ds(j * width, width)], ready)
        for _ in range(PIECES - len(pages)):
            plgpu.barrier_arrive(ready)

    @pl.when(left < TILE_TOKENS)
    def _in_pieces() -> None:
        for start in range(0, TILE_TOKENS, PIECE):
            source = pool.at[pages[start // width], head, pl.ds(inside + start % width, PIECE)]
            target = tile.at[pl.ds(start, PIECE)]
            pl.when(left > start)(functools.partial(plgpu.copy_gmem_to_smem, source, target, ready))
            pl.when(left <= start)(lambda: plgpu.barrier_arrive(ready))
