"""Operands of matrix products whose sums neither vanish nor grow, what should come out, and how far off it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def operands(m: int, k: int, n: int, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, jax.Array]:
    """x [m, k] and w [k, n]."""
    keys = jax.random.split(jax.random.key(m + k + n))
    return jax.random.normal(keys[0], (m, k), dtype), jax.random.normal(keys[1], (k, n), dtype) * k**-0.5


def exact(x: jax.Array, w: jax.Array, epilogue: str = "none", residual: jax.Array | None = None) -> np.ndarray:
    """The product in float64 numpy, epilogue included."""
    wide = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    if epilogue == "swiglu":
        gate, up = wide[:, 0::2], wide[:, 1::2]
        wide = gate / (1 + np.exp(-gate)) * up
    return wide if residual is None else wide + np.asarray(residual, np.float64)


def exact_norm(total: jax.Array, scale: jax.Array, eps: float) -> np.ndarray:
    """The root-mean-square norm of what came out as a sum."""
    wide = np.asarray(total, np.float64)
    return wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps) * np.asarray(scale, np.float64)


def relative_error(out: jax.Array, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(out, np.float64) - wanted) / np.linalg.norm(wanted))
