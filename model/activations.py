"""How activations are laid out between and inside the blocks, and when a weight is gathered."""

from __future__ import annotations

import dataclasses

import jax

from paddock.pallas_kernels import ScaledRows
from paddock.sharding import Layout

# Rows [T, D] behind a norm, or those whose division by their root mean square is left to who multiplies them.
Normed = jax.Array | ScaledRows


@dataclasses.dataclass(frozen=True)
class Activations:
    """The constraints that a model puts on its activations: everything else follows by propagation.

    The residual stream is split by `tokens`, and by `embed` over what tokens leave. A block works on rows that are
    whole over the mesh axes of its inner dimension (q_heads or mlp): where tokens use one of those, rows are gathered
    on the way in and reduce-scattered on the way out (sequence parallelism, Korthikanti et al. 2022).
    """

    layout: Layout

    def residual(self, x: jax.Array) -> jax.Array:
        """The residual stream [T, D], or what a block adds to it."""
        return self.layout.constrain(x, ("tokens", "embed"))

    def entering(self, x: Normed, inner: str) -> Normed:
        """The normed rows [T, D] that a block over logical axis `inner` takes."""
        if isinstance(x, ScaledRows):  # where no row is split, nor any layer
            return x
        return self._rows(x, inner, ("embed",))

    def inside(self, x: jax.Array, inner: str, *others: str | None) -> jax.Array:
        """A block's hidden rows [T, inner, others...]."""
        return self._rows(x, inner, (inner, *others))

    def _rows(self, x: jax.Array, inner: str, others: tuple[str | None, ...]) -> jax.Array:
        rules = self.layout.rules
        rows = tuple(axis for axis in rules.tokens if axis not in getattr(rules, inner))
        split = dataclasses.replace(rules, tokens=rows)
        return self.layout.constrain_spec(x, split.spec(("tokens", *others), yields=True))

    def used(self, weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """`weight`, whose dimensions are `axes`, whole along embed over the mesh axes that split the tokens
        (weight-gathered layouts: Pope et al. 2022, section 3.2.3); itself in all others."""
        rules = self.layout.rules
        kept = tuple(axis for axis in rules.embed if axis not in rules.tokens)
        if kept == rules.embed:
            return weight
        return self.layout.constrain_spec(weight, dataclasses.replace(rules, embed=kept).spec(axes))
