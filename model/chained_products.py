"""Every product of a layer by kernels that take turns without a pause."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from .activations import Activations
from .products import Norm, Products


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainedProducts(Products):
    """For layers that are whole on a device, and rows so few that products are bound by reading weights: each of these
    kernels fetches its first weights while the one before it ends, whatever that is.

    `multiply` is an entry of the MATMUL table, `multiply_add_norm` one of MATMUL_ADD_NORM.
    """

    multiply: Callable[[jax.Array, jax.Array], jax.Array]
    multiply_add_norm: Callable[..., tuple[jax.Array, jax.Array]]

    def project(self, x: Float[Array, "T D"], weight: jax.Array) -> jax.Array:
        out = self.multiply(x, weight.reshape(weight.shape[0], -1))
        return out.reshape(x.shape[0], *weight.shape[1:])

    def leave(
        self,
        placed: Activations,
        x: jax.Array,
        hidden: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None,
        norm: Norm | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        if norm is None or bias is not None:
            return super().leave(placed, x, hidden, weight, bias, norm)
        scale, eps = norm
        return self.multiply_add_norm(hidden, weight, x, scale, eps=eps)
