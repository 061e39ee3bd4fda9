"""Rotation and append together, in plain jnp: what the kernels that do both are tested against."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .append_reference import append_reference
from .checks import check_decode_append, check_rotation
from .decode_reference import decode_reference
from .rotation import split_rotated


def rotate_append_reference(
    qkv: Float[Array, "T K G2 h"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    k_pages: Float[Array, "P K p h"],
    v_pages: Float[Array, "P K p h"],
    page: Int[Array, " T"],
    offset: Int[Array, " T"],
) -> tuple[Float[Array, "T K G h"], Float[Array, "P K p h"], Float[Array, "P K p h"]]:
    """Rotated queries, and the pools with each row's rotated key and its value at token offset[t] of page[t].

    `qkv` holds for each kv head its G queries, its key and its value (G2 = G + 2); cos and sin [T, h/2] are float32.
    Raises ValueError for shapes that do not fit together.
    """
    check_rotation(qkv, cos, sin, k_pages, v_pages)
    q, k, v = split_rotated(qkv, cos, sin)
    return q, *append_reference(k_pages, v_pages, k, v, page, offset)


def decode_append_reference(
    qkv: Float[Array, "B K G2 h"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    k_pages: Float[Array, "P K p h"],
    v_pages: Float[Array, "P K p h"],
    page_table: Int[Array, "B N"],
    kv_len: Int[Array, " B"],
    *,
    scale: float,
    ahead: Float[Array, "E D"] | None = None,
) -> tuple[Float[Array, "B K G h"], Float[Array, "P K p h"], Float[Array, "P K p h"]]:
    """`decode_reference` of each row's last token, which is not in the pages yet, and the pools with it.

    Row b's key and value go to token kv_len[b]-1 of the sequence; a row with kv_len 0 gives zeros and writes nothing.
    `ahead` is what will be read next: a kernel may ask the cache for it.
    Otherwise as `rotate_append_reference`. Raises ValueError where the arguments do not fit together.
    """
    check_decode_append(qkv, cos, sin, k_pages, v_pages, page_table, kv_len)
    num_pages, _, page_size, _ = k_pages.shape
    position = jnp.maximum(kv_len - 1, 0)
    page = jnp.take_along_axis(page_table, position[:, None] // page_size, axis=1)[:, 0]
    # A scatter drops what goes to a page that there is not.
    page = jnp.where(kv_len > 0, page, num_pages)
    q, k_pages, v_pages = rotate_append_reference(qkv, cos, sin, k_pages, v_pages, page, position % page_size)
    out = decode_reference(q.reshape(q.shape[0], -1, q.shape[3]), k_pages, v_pages, page_table, kv_len, scale=scale)
    return out.reshape(q.shape), k_pages, v_pages
