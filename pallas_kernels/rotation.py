"""Rotary position embeddings as kernels and model share them (Su et al. 2021)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def apply_rope(
    x: Float[Array, "T N h"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "T N h"]:
    """Turns every head of `x` by its token's angles, in float32; returns x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def split_rotated(
    qkv: Float[Array, "T K G2 h"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> tuple[Float[Array, "T K G h"], Float[Array, "T K h"], Float[Array, "T K h"]]:
    """Rotated queries and keys, and the values, of rows with G queries, a key and a value for each kv head."""
    tokens, kv_heads, _, head_dim = qkv.shape
    # Keys are rotated with the queries: one rotation over [T, K*(G+1), h].
    rotated = apply_rope(qkv[:, :, :-1].reshape(tokens, -1, head_dim), cos, sin)
    rotated = rotated.reshape(tokens, kv_heads, -1, head_dim)
    return rotated[:, :, :-1], rotated[:, :, -1], qkv[:, :, -1]
