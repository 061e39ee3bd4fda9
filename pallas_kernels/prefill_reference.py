"""Prefill attention written to be read: for each chunk, every row scores every token of the chunk's pages."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .checks import check_prefill
from .decode_reference import gather_tokens, masked_softmax


def prefill_reference(
    q: Float[Array, "T H h"],
    k_pages: Float[Array, "P K p h"],
    v_pages: Float[Array, "P K p h"],
    page_table: Int[Array, "C N"],
    q_start: Int[Array, " C"],
    q_len: Int[Array, " C"],
    kv_len: Int[Array, " C"],
    *,
    scale: float,
) -> Float[Array, "T H h"]:
    """Causal attention of C ragged chunks of new tokens, whose own keys and values are in the pages already.

    Chunk c is rows q_start[c] .. q_start[c]+q_len[c]-1 of q, the last q_len[c] of the kv_len[c] tokens of its sequence
    (page table row c); each row attends to the tokens up to its own. Chunks may lie in any order; q_len 0 is no chunk,
    and rows of no chunk give zeros. Computed in float32. Entries and pages past kv_len have no influence.
    Raises ValueError where the arguments do not fit together.
    """
    check_prefill(q, k_pages, v_pages, page_table, q_start, q_len, kv_len)
    rows, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    token = jnp.arange(page_table.shape[1] * k_pages.shape[2])  # [S]
    queries = q.astype(jnp.float32).reshape(rows, kv_heads, heads // kv_heads, head_dim)

    def attend(out: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        table, start, length, total = chunk
        alive = token < total
        k = gather_tokens(k_pages, table[None], alive[None])[0]  # [S, K, h]
        v = gather_tokens(v_pages, table[None], alive[None])[0]
        index = jnp.arange(rows) - start  # of each row in this chunk
        mine = (index >= 0) & (index < length)
        position = total - length + index
        visible = mine[:, None] & alive[None, :] & (token[None, :] <= position[:, None])  # [T, S]
        weights = masked_softmax(scale * jnp.einsum("tkgh,skh->kgts", queries, k), visible[None, None])
        return out + jnp.einsum("kgts,skh->tkgh", weights, v), None

    out, _ = lax.scan(attend, jnp.zeros(queries.shape), (page_table, q_start, q_len, kv_len))
    return out.reshape(q.shape).astype(q.dtype)
