"""Decode attention in jnp whose cost follows the live tokens: the default on CPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .checks import check_decode
from .pages import read_pages

# Chosen on 2 shared cores (XLA CPU, JAX 0.10.2, float32, H=9 K=3 h=64), where blocks of 32 to 256 tokens and steps of
# 1024 to 4096 tokens lay within 20% of each other; smaller steps cost more. Against this list of work items, walking
# all rows to the end of the longest took 1.1 to 1.5 times as long on lengths 50..1500 (0.8 to 1 on equal lengths), one
# row at a time 1.4 to 2. Half of the time is the copy out of the pages: pages of 64 take about 3/4 of the time of 16.
BLOCK = 64  # tokens of a work item
STEP_ITEMS = 32  # most work items of one loop step; a small batch takes fewer, so that few idle
_LOWEST = -1e30  # below every score, yet finite: exp(-inf - _LOWEST) is 0, not NaN


@functools.partial(jax.jit, static_argnames="scale")  # traced once, not once a layer
def decode_blocked(
    q: Float[Array, "B H h"],
    k_pages: Float[Array, "P K p h"],
    v_pages: Float[Array, "P K p h"],
    page_table: Int[Array, "B N"],
    kv_len: Int[Array, " B"],
    *,
    scale: float,
) -> Float[Array, "B H h"]:
    """As `decode_reference`, at the cost of the tokens that are alive.

    Every row's tokens are cut into blocks; all blocks of all rows form one list of work items, and a loop whose trip
    count is read from kv_len takes the next items, whichever rows they belong to. So one executable serves any mix of
    lengths, long rows do not make short ones wait, and rows with kv_len 0 cost nothing. Scores, softmax and sums are
    float32; partial results merge by their maxima (FlashAttention, arXiv 2205.14135; Flash-Decoding's split of K/V).
    Raises ValueError where the arguments do not fit together.
    """
    check_decode(q, k_pages, v_pages, page_table, kv_len)
    batch, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    pages_per_item = max(1, min(BLOCK // page_size, page_table.shape[1]))
    span = pages_per_item * page_size  # tokens of an item
    width = max(1, min(STEP_ITEMS, max(8, 4 * batch)) * BLOCK // max(span, BLOCK))  # items W of a step
    queries = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    items = -(-kv_len // span)
    ends = jnp.cumsum(items)

    def step(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, mass, total = carry
        item = index * width + jnp.arange(width)
        row = jnp.minimum((item[:, None] >= ends[None, :]).sum(1), batch - 1)
        block = item - (ends - items)[row]
        left = jnp.where(item < ends[-1], kv_len[row] - block * span, 0)  # live tokens from the item's first one on
        k, v, alive = read_pages(k_pages, v_pages, page_table, row, block * pages_per_item, left, pages_per_item)
        # [W, K, t, G] and then a copy to [W, K, G, t]: without the barrier XLA turns the product around, which on CPU
        # costs 1.1 to 4 times as much, since its small side is then the left one.
        scores = jnp.einsum("wkth,wkgh->wktg", k.astype(q.dtype), queries[row], preferred_element_type=jnp.float32)
        scores = lax.optimization_barrier(scores).swapaxes(2, 3) * scale
        scores = jnp.where(alive[:, None, None, :], scores, -jnp.inf)
        mine = row[:, None] == jnp.arange(batch)[None, :]  # [W, B]
        peaks = jnp.where(mine[:, :, None, None], scores.max(-1)[:, None], -jnp.inf)  # [W, B, K, G]
        new_peak = jnp.maximum(peak, peaks.max(0))
        weights = jnp.exp(scores - new_peak[row][..., None])
        partial = jnp.einsum(
            "wkgt,wkth->wkgh", weights.astype(q.dtype), v.astype(q.dtype), preferred_element_type=jnp.float32
        )
        decay, owner = jnp.exp(peak - new_peak), mine.astype(jnp.float32)
        mass = mass * decay + jnp.einsum("wb,wkg->bkg", owner, weights.sum(-1))
        total = total * decay[..., None] + jnp.einsum("wb,wkgh->bkgh", owner, partial)
        return new_peak, mass, total

    zeros = jnp.zeros(queries.shape, jnp.float32)
    start = (jnp.full_like(zeros[..., 0], _LOWEST), zeros[..., 0], zeros)
    _, mass, total = lax.fori_loop(0, -(-ends[-1] // width), step, start)
    return (total / jnp.where(mass > 0, mass, 1)[..., None]).reshape(q.shape).astype(q.dtype)
