"""Rows on their way from one product to the next, through a norm that has no kernel of its own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledRows:
    """Rows times the scale of a root-mean-square norm, which are still to be divided by that: `rows` [M, D], parts of
    the sums of the squares before the scale, `squares` [R, P] float32 of R >= M rows, and the norm's `eps`.

    A product commutes with the division, so that whoever multiplies the rows divides what comes out, and the squares
    are summed where the rows are made, a part for each piece of columns.
    """

    rows: Float[Array, "M D"]
    squares: Float[Array, "R P"]
    eps: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape


def scale_rows(total: Float[Array, "M D"], scale: Float[Array, " D"], eps: float) -> ScaledRows:
    """The rows `total` of a residual stream, before a norm."""
    wide = total.astype(jnp.float32)
    rows = wide * scale.astype(jnp.float32)[None]
    return ScaledRows(rows.astype(total.dtype), jnp.sum(wide * wide, axis=1, keepdims=True), eps)


def rows_of(x: Array | ScaledRows) -> Array:
    """The rows that a product of x multiplies."""
    return x.rows if isinstance(x, ScaledRows) else x


def divide(product: Float[Array, "M N"], x: Array | ScaledRows) -> Float[Array, "M N"]:
    """A float32 product of x, once more than its rows are multiplied."""
    if not isinstance(x, ScaledRows):
        return product
    mean = jnp.sum(x.squares[: x.shape[0]], axis=1, keepdims=True) / x.shape[1]
    return product * lax.rsqrt(mean + x.eps)
