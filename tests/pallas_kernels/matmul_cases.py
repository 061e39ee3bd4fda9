"""Operands of matrix products whose sums neither vanish nor grow, and how far off a product is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def operands(
    m: int, k: int, n: int, *, transposed: bool = False, dtype: Any = jnp.bfloat16
) -> tuple[jax.Array, jax.Array]:
    """x [m, k] and w [k, n] or [n, k]."""
    keys = jax.random.split(jax.random.key(m + k + n))
    x = jax.random.normal(keys[0], (m, k), dtype)
    w = jax.random.normal(keys[1], (n, k) if transposed else (k, n), dtype) * k**-0.5
    return x, w


def exact(x: jax.Array, w: jax.Array, transposed: bool, epilogue: str, residual: jax.Array | None) -> np.ndarray:
    """The product in float64 numpy, epilogue included."""
    wide = np.asarray(x, np.float64) @ (np.asarray(w, np.float64).T if transposed else np.asarray(w, np.float64))
    if epilogue == "swiglu":
        gate, up = wide[:, 0::2], wide[:, 1::2]
        wide = gate / (1 + np.exp(-gate)) * up
    return wide if residual is None else wide + np.asarray(residual, np.float64)


def relative_error(out: jax.Array, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(out, np.float64) - wanted) / np.linalg.norm(wanted))
