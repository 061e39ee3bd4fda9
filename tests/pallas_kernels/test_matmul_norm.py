"""Adding parts and residual, and the norm of that: the reference, and the kernel in the CPU interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paddock.pallas_kernels.matmul_norm import add_norm_mosaic, add_norm_reference

EPS = 1e-5
IMPLEMENTATIONS = [add_norm_reference, lambda *a, **k: add_norm_mosaic(*a, interpret=True, **k)]


def arguments(parts: int, rows: int, padded: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    sums = jax.random.normal(keys[0], (parts, padded, width)).at[:, rows:].set(jnp.nan)
    residual = jax.random.normal(keys[1], (rows, width), jnp.bfloat16)
    return sums, residual, jax.random.uniform(keys[2], (width,), jnp.bfloat16, 0.5, 2.0)


@pytest.mark.parametrize("add_norm", IMPLEMENTATIONS, ids=["reference", "mosaic"])
@pytest.mark.parametrize(("parts", "rows", "padded"), [(4, 3, 8), (1, 2, 2)])
def test_equals_numpy(add_norm: Callable[..., Any], parts: int, rows: int, padded: int) -> None:
    sums, residual, scale = arguments(parts, rows, padded, 256)
    total, normed = add_norm(sums, residual, scale, eps=EPS)
    assert total.dtype == normed.dtype == jnp.bfloat16
    wanted = np.asarray(residual, np.float64) + np.asarray(sums[:, :rows], np.float64).sum(0)
    np.testing.assert_allclose(np.asarray(total, np.float64), wanted, rtol=2**-8, atol=1e-6)
    wide = np.asarray(total, np.float64)
    wide = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS) * np.asarray(scale, np.float64)
    np.testing.assert_allclose(np.asarray(normed, np.float64), wide, rtol=2**-7)


@pytest.mark.parametrize("add_norm", IMPLEMENTATIONS, ids=["reference", "mosaic"])
def test_arguments_that_do_not_fit_are_refused(add_norm: Callable[..., Any]) -> None:
    sums, residual, scale = arguments(2, 4, 4, 256)
    with pytest.raises(ValueError, match=r"parts must have 3 axes .* got shape \(2, 3, 256\)"):
        add_norm(sums[:, :3], residual, scale, eps=EPS)
    with pytest.raises(ValueError, match=r"scale must have shape \(256,\): got \(128,\)"):
        add_norm(sums, residual, scale[:128], eps=EPS)


def test_what_the_kernel_cannot_do_is_refused() -> None:
    sums, residual, scale = arguments(2, 4, 4, 256)
    with pytest.raises(ValueError, match="multiple of 128: got 192"):
        add_norm_mosaic(sums[..., :192], residual[:, :192], scale[:192], eps=EPS, interpret=True)
    with pytest.raises(ValueError, match="one dtype: got bfloat16 and float32"):
        add_norm_mosaic(sums, residual, scale.astype(jnp.float32), eps=EPS, interpret=True)
