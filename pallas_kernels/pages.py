"""Reading a run of pages for several rows at once."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def read_pages(
    k_pages: Float[Array, "P K p h"],
    v_pages: Float[Array, "P K p h"],
    page_table: Int[Array, "B N"],
    row: Int[Array, " W"],
    slot: Int[Array, " W"],
    left: Int[Array, " W"],
    count: int,
) -> tuple[Float[Array, "W K t h"], Float[Array, "W K t h"], Bool[Array, "W t"]]:
    """Keys, values and liveness of the t = count*p tokens from page slot[w] of table row row[w] on, w = 0 .. W-1.

    Only the first left[w] of them are alive: the other values are 0, since a weight of 0 would not stop a NaN, and the
    other keys are anything at all (mask their scores).
    """
    pages, kv_heads, page_size, head_dim = k_pages.shape
    offset = jnp.arange(count)
    entry = slot[:, None] + offset[None, :]
    dead = (offset * page_size)[None, :] >= left[:, None]
    # "clip" keeps the read of the table in bounds; a dead entry reads page 0, whatever the table says.
    page = jnp.where(dead, 0, page_table.at[row[:, None], entry].get(mode="clip"))  # [W, count]
    # One axis of indices into one axis of (page, kv head) tiles is the fastest gather on XLA CPU.
    tile = (page[:, None, :] * kv_heads + jnp.arange(kv_heads)[None, :, None]).reshape(-1)
    shape = (row.shape[0], kv_heads, count * page_size, head_dim)

    def read(pool: Array) -> Array:
        tiles = pool.reshape(pages * kv_heads, page_size * head_dim)
        return tiles.at[tile].get(mode="promise_in_bounds").reshape(shape)

    alive = jnp.arange(count * page_size)[None, :] < left[:, None]
    return read(k_pages), jnp.where(alive[:, None, :, None], read(v_pages), 0), alive
