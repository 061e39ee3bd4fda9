"""Prefill attention in jnp whose cost follows the live chunks: the default on CPU, and on GPU for now."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .checks import check_prefill
from .pages import read_pages

# (rows of q, tokens) at a time. CPU: of 32..256 x 64..512 the fastest on eight chunks of 64 tokens and within 2% of it
# on one of 512 (H=9 K=3 h=64); 64 tokens after a cached 1,000 would take 0.8 of the time with 128 x 128, but eight
# chunks of 64 would take 2.5 times as long. Elsewhere a loop step costs a round trip to the host: few, large ones.
CPU_BLOCKS = (64, 64)
OTHER_BLOCKS = (512, 1024)


@functools.partial(jax.jit, static_argnames="scale")  # traced once, not once a layer
def prefill_blocked(
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
    """As `prefill_reference`, at the cost of the chunks and prefixes that are alive.

    The outer loop runs over the blocks of rows of all chunks, the inner one over the blocks of tokens up to the last
    row's own; both trip counts are read from the lengths, so one executable serves any mix of chunks. Scores, softmax
    and sums are float32; the online softmax is FlashAttention's (arXiv 2205.14135).
    Raises ValueError where the arguments do not fit together.
    """
    check_prefill(q, k_pages, v_pages, page_table, q_start, q_len, kv_len)
    arguments = (q, k_pages, v_pages, page_table, q_start, q_len, kv_len)
    return lax.platform_dependent(
        *arguments,
        cpu=functools.partial(_attend, scale=scale, blocks=CPU_BLOCKS),
        default=functools.partial(_attend, scale=scale, blocks=OTHER_BLOCKS),
    )


def _attend(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    q_start: Array,
    q_len: Array,
    kv_len: Array,
    *,
    scale: float,
    blocks: tuple[int, int],
) -> Array:
    """`prefill_blocked` with `blocks` = (rows of q, tokens) at a time."""
    query_block, key_block = blocks
    rows, heads, head_dim = q.shape
    chunks = page_table.shape[0]
    _, kv_heads, page_size, _ = k_pages.shape
    group = heads // kv_heads
    pages_per_block = max(1, min(key_block // page_size, page_table.shape[1]))
    span = pages_per_block * page_size
    height = min(query_block, rows)
    counts = -(-q_len // height)  # blocks of rows of each chunk
    ends = jnp.cumsum(counts)
    # Rows of padding, so that the last block of the last chunk is a whole slice too.
    queries = jnp.pad(q, ((0, height), (0, 0), (0, 0)))

    def attend_rows(index: Array, out: Array) -> Array:
        chunk = jnp.minimum((index >= ends).sum(), chunks - 1)
        first = (index - (ends - counts)[chunk]) * height  # of these rows in their chunk
        end = jnp.minimum(first + height, q_len[chunk])
        prefix = kv_len[chunk] - q_len[chunk]
        tokens = prefix + end  # that any of these rows may see
        # Position of each row [q]; rows after the chunk's last repeat it, rather than compute NaN from foreign pages.
        own = jnp.minimum(prefix + first + jnp.arange(height), tokens - 1)
        block = lax.dynamic_slice_in_dim(queries, q_start[chunk] + first, height)
        block = block.reshape(height, kv_heads, group, head_dim).transpose(1, 2, 0, 3)  # [K, G, q, h]

        def attend_keys(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            peak, mass, total = carry
            left = tokens - step * span
            k, v, _ = read_pages(
                k_pages, v_pages, page_table, chunk[None], (step * pages_per_block)[None], left[None], pages_per_block
            )
            scores = jnp.einsum("kgqh,kth->kgqt", block, k[0].astype(q.dtype), preferred_element_type=jnp.float32)
            visible = (step * span + jnp.arange(span))[None, :] <= own[:, None]  # [q, t]
            scores = jnp.where(visible[None, None], scores * scale, -jnp.inf)
            new_peak = jnp.maximum(peak, scores.max(-1))  # finite from step 0 on: every row sees token 0
            weights = jnp.exp(scores - new_peak[..., None])
            decay = jnp.exp(peak - new_peak)
            partial = jnp.einsum(
                "kgqt,kth->kgqh", weights.astype(q.dtype), v[0].astype(q.dtype), preferred_element_type=jnp.float32
            )
            return new_peak, mass * decay + weights.sum(-1), total * decay[..., None] + partial

        zeros = jnp.zeros(block.shape, jnp.float32)
        start = (jnp.full_like(zeros[..., 0], -jnp.inf), zeros[..., 0], zeros)
        _, mass, total = lax.fori_loop(0, -(-tokens // span), attend_keys, start)
        result = (total / mass[..., None]).transpose(2, 0, 1, 3).reshape(height, heads, head_dim).astype(q.dtype)
        old = lax.dynamic_slice_in_dim(out, q_start[chunk] + first, height)
        mine = jnp.arange(height) < end - first  # the rows after them are another chunk's
        return lax.dynamic_update_slice_in_dim(
            out, jnp.where(mine[:, None, None], result, old), q_start[chunk] + first, 0
        )

    return lax.fori_loop(0, ends[-1], attend_rows, jnp.zeros_like(queries))[:rows]
