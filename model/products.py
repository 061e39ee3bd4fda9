"""How a layer's products are computed, and what goes with them: by the compiler, unless a subclass knows better."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from .activations import Activations, Normed

# The scale [D] and epsilon of the norm that follows.
Norm = tuple[jax.Array, float]


def project(x: Float[Array, "T D"], weight: jax.Array) -> jax.Array:
    """x times `weight` [D, ...], as [T, ...].

    Always a product of two matrices: with more axes XLA's CPU backend copies the weight, transposed, at every step.
    """
    out = x @ weight.reshape(weight.shape[0], -1)
    return out.reshape(x.shape[0], *weight.shape[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Products:
    """The compiler's: it fuses what it can, and puts in the sums over devices where the layout needs them.

    `multiply`, of rows and a weight of more axes, is in the place of `project`, and `multiply_parts`, of a device's own
    hidden rows [T, E] and weight [E, D], gives parts [S, R, D] of what a subclass sums.
    Where there is no bias `fused_swiglu` computes `swiglu` for as many rows as are in `fused_rows`, and `added`, of
    hidden rows, weight and residual stream, ends a block for as many as are in `added_rows`, if the weight is deeper
    than wide.
    """

    multiply: Callable[[Any, jax.Array], jax.Array] | None = None
    multiply_parts: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    fused_swiglu: Callable[[Any, jax.Array], jax.Array] | None = None
    fused_rows: tuple[range, ...] = ()
    added: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    added_rows: range = range(0)

    def project(self, x: Normed, weight: jax.Array) -> jax.Array:
        """See `project`."""
        multiply: Callable[[Any, jax.Array], jax.Array] = self.multiply or project
        return multiply(x, weight)

    def parts(self, hidden: Float[Array, "T E"], weight: Float[Array, "E D"]) -> Float[Array, "S R D"]:
        """Their product, in S parts to be added up, of R rows, the first T of which count."""
        return (hidden @ weight)[None] if self.multiply_parts is None else self.multiply_parts(hidden, weight)

    def swiglu(
        self, x: Normed, gate_up: Float[Array, "D F 2"], bias: Float[Array, "F 2"] | None
    ) -> Float[Array, "T F"]:
        """SwiGLU's hidden rows (Shazeer 2020)."""
        if self.fused_swiglu is not None and bias is None and any(x.shape[0] in rows for rows in self.fused_rows):
            return self.fused_swiglu(x, gate_up)
        both = self.project(x, gate_up)
        if bias is not None:
            both = both + bias[None]
        return jax.nn.silu(both[..., 0]) * both[..., 1]

    def leave(
        self,
        placed: Activations,
        x: Float[Array, "T D"],
        hidden: Float[Array, "T E"],
        weight: Float[Array, "E D"],
        bias: Float[Array, " D"] | None,
        norm: Norm | None,
    ) -> tuple[Float[Array, "T D"], Normed | None]:
        """From a block back to the residual stream `x`: that, and the next block's norm of it where that comes with it.

        `norm` is None after the last layer.
        """
        if (
            self.added is not None
            and bias is None
            and x.shape[0] in self.added_rows
            and weight.shape[0] > weight.shape[1]
        ):
            return self.added(hidden, weight, x), None
        out = hidden @ weight
        out = out if bias is None else out + bias[None]
        return placed.residual(x + placed.residual(out)), None
