"""Decode attention written to be read: the whole page table is gathered and every score computed."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from .checks import check_decode, check_scales


def decode_reference(
    q: Float[Array, "B H h"],
    k_pages: Num[Array, "P K p h"],
    v_pages: Num[Array, "P K p h"],
    page_table: Int[Array, "B N"],
    kv_len: Int[Array, " B"],
    *,
    scale: float,
    k_scale: Float[Array, "P K"] | None = None,
    v_scale: Float[Array, "P K"] | None = None,
) -> Float[Array, "B H h"]:
    """Attention of one new token per row b to tokens 0 .. kv_len[b]-1, token s in page page_table[b, s // p].

    Query head k*G + g reads kv head k. Computed in float32. A row with kv_len 0 gives zeros. What the table says past
    a row's last page, and what pages hold past kv_len, has no influence, be it out of range or NaN.
    Pages of int8 or float8_e4m3fn hold values divided by k_scale and v_scale, one for each page and kv head.
    Raises ValueError where the arguments do not fit together.
    """
    check_decode(q, k_pages, v_pages, page_table, kv_len)
    check_scales(k_pages, k_scale, v_scale)
    k_pages, v_pages = dequantized(k_pages, k_scale), dequantized(v_pages, v_scale)
    batch, heads, head_dim = q.shape
    kv_heads = k_pages.shape[1]
    alive = jnp.arange(page_table.shape[1] * k_pages.shape[2])[None, :] < kv_len[:, None]  # [B, S]
    k = gather_tokens(k_pages, page_table, alive)  # [B, S, K, h]
    v = gather_tokens(v_pages, page_table, alive)
    queries = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads, head_dim)
    scores = scale * jnp.einsum("bkgh,bskh->bkgs", queries, k)
    weights = masked_softmax(scores, alive[:, None, None, :])
    return jnp.einsum("bkgs,bskh->bkgh", weights, v).reshape(q.shape).astype(q.dtype)


def dequantized(pages: Num[Array, "P K p h"], scale: Float[Array, "P K"] | None) -> Float[Array, "P K p h"]:
    """The values that pages stand for: float32 where they have a scale."""
    return pages if scale is None else pages.astype(jnp.float32) * scale[:, :, None, None]


def gather_tokens(pages: Num[Array, "P K p h"], page_table: Int[Array, "B N"], alive: Array) -> Float[Array, "B S K h"]:
    """The tokens of each row in order, as float32, S = N*p; zeros where `alive` [B, S] is false."""
    rows, slots = page_table.shape
    _, kv_heads, page_size, head_dim = pages.shape
    # "fill" turns an index that is out of range into zeros instead of reading the nearest page.
    tokens = pages.at[page_table].get(mode="fill", fill_value=0)  # [B, N, K, p, h]
    tokens = tokens.swapaxes(2, 3).reshape(rows, slots * page_size, kv_heads, head_dim)
    return jnp.where(alive[:, :, None, None], tokens.astype(jnp.float32), 0)


def masked_softmax(scores: Float[Array, "... S"], mask: Array) -> Float[Array, "... S"]:
    """Softmax over the last axis where `mask` is true and 0 elsewhere; all 0 where it is nowhere true."""
    peak = jnp.max(scores, axis=-1, keepdims=True, where=mask, initial=-1e30)
    weights = jnp.where(mask, jnp.exp(scores - peak), 0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)
