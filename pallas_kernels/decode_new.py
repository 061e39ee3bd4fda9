"""A sequence's new token inside the decode kernel: turned, sent to its page, and the first to be attended."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .compat import load, load_transposed, store_transposed
from .decode_merge import LAYOUT

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


def attend_new(smem: Any, group: int, rows: int) -> tuple[Any, Any]:
    """The new token's score for each of the queries [rows], in float32 and not yet scaled, and its value [h, rows]:
    where the softmax of a share with the sequence's end begins."""
    head_dim = smem.out.shape[1]
    score = jnp.zeros((WIDTH, rows), jnp.float32)
    for start in range(0, head_dim, WIDTH):
        columns = pl.ds(start, WIDTH)
        queries = load_transposed(smem.out.at[pl.ds(0, rows), columns], LAYOUT).astype(jnp.float32)
        key = load(smem.out.at[group, columns], LAYOUT.reduce(1)).astype(jnp.float32)
        score = score + queries * along_columns(key, queries)
    value = load(smem.out.at[group + 1], LAYOUT.reduce(1)).astype(jnp.float32)
    return score.sum(axis=0), lax.broadcast_in_dim(value, (head_dim, rows), [0])


def along_columns(vector: Any, matrix: Any) -> Any:
    """`vector` [m], of a value for every row, as a matrix like `matrix` [m, n]."""
    return lax.broadcast_in_dim(vector, matrix.shape, [0])
