"""After the products a kernel that adds to the residual stream and norms the sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from .activations import Activations, Normed
from .products import Norm, Products


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormedProducts(Products):
    """For layers that are whole on a device. `add_norm` is an entry of the ADD_NORM table: of an addition and a norm
    XLA makes three kernels, each of which costs more to begin than to run where rows are few."""

    add_norm: Callable[..., Any]

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
        parts = self.parts(hidden, weight)
        with jax.named_scope("norm"):
            return self.add_norm(parts, x, scale, eps=eps)
