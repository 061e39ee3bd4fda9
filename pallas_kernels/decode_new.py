"""A sequence's new token inside the decode kernel: turned, sent to its page, and put among those fetched."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .compat import load, load_transposed, store_transposed
from .decode_merge import LAYOUT, along_rows

WIDTH = 64  # of head_dim that are in registers at a time: the rows of the layout


def turn_and_append(gmem: Any, smem: Any, sequence: Any, head: Any, length: Any, is_last: Any) -> None:
    """Rotate the queries and the new key in `smem.q_fetched` into `smem.q` and `smem.out`, whose row G is then the key
    and G+1 the value; if `is_last`, this share holds the sequence's end, and both are sent to their page.

    The factors [B, h] in `gmem.rotation` are those of a dimension itself and of its partner half a head away.
    """
    group, head_dim, page_size = gmem.out.shape[2], gmem.k.shape[3], gmem.k.shape[2]
    starts = range(0, head_dim, WIDTH)
    # Loads that the wait for the queries hides.
    own, others = (
        [load(factors.at[sequence, pl.ds(start, WIDTH)], LAYOUT.reduce(1)) for start in starts]
        for factors in gmem.rotation
    )
    position = jnp.maximum(length - 1, 0)
    page = gmem.table[sequence, lax.div(position, page_size)]
    plgpu.barrier_wait(smem.q_ready.at[0])
    values = [
        load_transposed(smem.q_fetched.at[:, pl.ds(start, WIDTH)], LAYOUT).astype(jnp.float32) for start in starts
    ]
    if head_dim > WIDTH:
        partners = values[len(values) // 2 :] + values[: len(values) // 2]
    else:  # turned by half a head, by way of two copies below each other
        for start in (0, head_dim):
            smem.twice.at[pl.ds(start, head_dim)][...] = values[0]
        plgpu.commit_smem()
        partners = [load(smem.twice.at[pl.ds(head_dim // 2, head_dim)], LAYOUT)]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was sent before has left smem.out
    for start, value, partner, mine, theirs in zip(starts, values, partners, own, others, strict=True):
        turned = value * along_columns(mine, value) + partner * along_columns(theirs, value)
        is_value = lax.broadcasted_iota(jnp.int32, value.shape, 1) == group + 1
        turned = jnp.where(is_value, value, turned).astype(smem.q.dtype)
        store_transposed(smem.q.at[:, pl.ds(start, WIDTH)], turned)
        store_transposed(smem.out.at[:, pl.ds(start, WIDTH)], turned)
    plgpu.commit_smem()

    @pl.when(is_last)
    def _append() -> None:
        place = page, head, lax.rem(position, page_size)
        for row, pool in enumerate((gmem.k, gmem.v)):
            plgpu.copy_smem_to_gmem(smem.out.at[group + row], pool.at[place])


def put_token(smem: Any, tile: Any, row: int, token: Any, group: int) -> None:
    """Make the new key (row 0) or value (row 1) the tile's token `token`, and all after it zeros, which stop NaNs."""
    for start in range(0, tile.shape[1], WIDTH):
        columns = pl.ds(start, WIDTH)
        part = tile.at[:, columns]
        values, new = load(part, LAYOUT), load(smem.out.at[group + row, columns], LAYOUT.reduce(0))
        index = lax.broadcasted_iota(jnp.int32, values.shape, 0)
        values = jnp.where(index == token, along_rows(new, values), values)
        part[...] = jnp.where(index <= token, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def along_columns(vector: Any, matrix: Any) -> Any:
    """`vector` [m], of a value for every row, as a matrix like `matrix` [m, n]."""
    return lax.broadcast_in_dim(vector, matrix.shape, [0])
