"""The work of a prefill attention, cut into items on the device."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Int


def work_items(
    q_start: Int[Array, " C"], q_len: Int[Array, " C"], kv_len: Int[Array, " C"], rows: int, tile: int
) -> tuple[Int[Array, "5 M"], Int[Array, " 2"]]:
    """The chunks and the gaps between them, in items of at most `tile` of the `rows` rows of q, heaviest first.

    An item is (chunk, first row, number of rows, tokens that its last row sees, kv_len of the chunk); those of gaps
    see 0 tokens. Behind the items: how many see tokens, and how many there are. M is rows // tile + 2*C + 1.
    """
    chunks = q_len.shape[0]
    begin = jnp.where(q_len > 0, q_start, rows)
    end = jnp.where(q_len > 0, q_start + q_len, rows)
    gap = jnp.concatenate([jnp.zeros(1, jnp.int32), end])  # where the rows of no chunk may begin
    after = jnp.where(begin[None, :] >= gap[:, None], begin[None, :], rows).min(1)
    start = jnp.concatenate([begin, gap])
    length = jnp.concatenate([q_len, after - gap])
    total = jnp.concatenate([kv_len, jnp.zeros_like(gap)])
    blocks = -(-length // tile)
    last = jnp.cumsum(blocks)
    item = jnp.arange(rows // tile + 2 * chunks + 1, dtype=jnp.int32)
    owner = jnp.minimum((item[:, None] >= last[None, :]).sum(1, dtype=jnp.int32), 2 * chunks)
    first = (item - (last - blocks)[owner]) * tile
    height = jnp.minimum(tile, length[owner] - first)
    tokens = jnp.where(owner < chunks, total[owner] - length[owner] + first + height, 0)
    tokens = jnp.where(item < last[-1], tokens, -1)
    fields = jnp.stack([jnp.minimum(owner, chunks - 1), start[owner] + first, height, tokens, total[owner]])
    counts = jnp.stack([(tokens > 0).sum(dtype=jnp.int32), last[-1]])
    return fields[:, jnp.argsort(-tokens, stable=True)], counts
