"""A block's way back into the residual stream, and the norm before the next block, written to be read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def add_norm_reference(
    parts: Float[Array, "S R D"], residual: Float[Array, "M D"], scale: Float[Array, " D"], *, eps: float
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """(residual + the sum of the parts, the root-mean-square norm of that times `scale`), in residual's dtype.

    Rows of parts past M do not count. Sums and statistics are float32, the latter of the rounded sum (RMSNorm: Zhang &
    Sennrich 2019). Raises ValueError where the arguments do not fit together.
    """
    check_add_norm(parts, residual, scale)
    total = residual.astype(jnp.float32) + parts[:, : residual.shape[0]].astype(jnp.float32).sum(axis=0)
    total = total.astype(residual.dtype)
    wide = total.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, wide.astype(total.dtype) * scale[None]


def check_add_norm(parts: jax.Array, residual: jax.Array, scale: jax.Array) -> None:
    """Raise ValueError unless the arguments of an addition with norm fit together."""
    if parts.ndim != 3 or parts.shape[1] < residual.shape[0] or parts.shape[2] != residual.shape[1]:
        raise ValueError(f"parts [S, R, D] and residual [M, D] do not fit together: {parts.shape}, {residual.shape}")
    if scale.shape != residual.shape[1:] or scale.dtype != residual.dtype:
        raise ValueError(f"scale must be {residual.dtype}{residual.shape[1:]}: got {scale.dtype}{scale.shape}")
