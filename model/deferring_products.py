"""Products that add to the residual stream and norm it on the way, so that between two of them nothing runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from paddock.pallas_kernels import ScaledRows

from .activations import Activations, Normed
from .products import Norm, Products


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeferringProducts(Products):
    """For layers that are whole on a device. `multiply_add`, an entry of the MATMUL_ADD table, ends a block; what it
    gives `multiply` and `fused_swiglu` must take."""

    multiply_add: Callable[..., tuple[jax.Array, ScaledRows]]

    def leave(
        self,
        placed: Activations,
        x: jax.Array,
        hidden: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None,
        norm: Norm | None,
    ) -> tuple[jax.Array, Normed | None]:
        if norm is None or bias is not None:
            return super().leave(placed, x, hidden, weight, bias, norm)
        scale, eps = norm
        return self.multiply_add(hidden, weight, x, scale, eps=eps)
