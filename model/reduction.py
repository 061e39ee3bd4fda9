"""Sums over the devices of a tensor-parallel group by a kernel of ours, where the model would leave them to XLA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from paddock.sharding import Axes, Layout

from .activations import Activations
from .products import Norm, Products


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduction(Products):
    """How partial products over `axes` are summed: entries of the ALL_REDUCE and ALL_REDUCE_ADD_NORM tables, and the
    table of mailboxes [devices of the mesh, devices of a group + 2, 2] for those that need it."""

    layout: Layout
    axes: Axes
    all_reduce: Callable[..., Any]
    all_reduce_add_norm: Callable[..., Any]
    mailboxes: jax.Array | None

    def leave(
        self,
        placed: Activations,
        x: jax.Array,
        hidden: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None,
        norm: Norm | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        if bias is None and norm is not None:
            return self.add_norm(x, hidden, weight, *norm)
        x = self.add(x, hidden, weight)
        return (x if bias is None else x + bias[None]), None

    def add(self, x: jax.Array, hidden: jax.Array, weight: jax.Array) -> jax.Array:
        """x [T, D] + hidden [T, E] times weight [E, D], of which each device has its own piece of E."""

        def local(x: jax.Array, hidden: jax.Array, weight: jax.Array, box: jax.Array | None) -> jax.Array:
            return x + self.all_reduce(hidden @ weight, axis_name=self.axes, mailbox=_own(box))

        whole = PartitionSpec()
        return self.layout.shard_map(local, (whole, *self._split), whole)(x, hidden, weight, self.mailboxes)

    def add_norm(
        self, x: jax.Array, hidden: jax.Array, weight: jax.Array, scale: jax.Array, eps: float
    ) -> tuple[jax.Array, jax.Array]:
        """`add`, and its root-mean-square norm times `scale` [D]."""

        def local(
            x: jax.Array, hidden: jax.Array, weight: jax.Array, box: jax.Array | None, scale: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            common = {"axis_name": self.axes, "mailbox": _own(box)}
            return self.all_reduce_add_norm(self.parts(hidden, weight), x, scale, eps=eps, **common)

        whole = PartitionSpec()
        mapped = self.layout.shard_map(local, (whole, *self._split, whole), (whole, whole))
        return mapped(x, hidden, weight, self.mailboxes, scale)

    @property
    def _split(self) -> tuple[PartitionSpec, ...]:
        """Of hidden rows, of a weight, of the mailboxes: every device of the mesh has its own."""
        return PartitionSpec(None, self.axes), PartitionSpec(self.axes), PartitionSpec(self.layout.mesh.axis_names)


def _own(mailboxes: jax.Array | None) -> jax.Array | None:
    return None if mailboxes is None else mailboxes[0]


def reduction_axes(layout: Layout) -> Axes:
    """The mesh axes that partial products of attention and MLP are summed over.

    Raises ValueError for a layout whose sums are not plain all-reduces over one group of devices.
    """
    rules = layout.rules
    if rules.q_heads != rules.mlp:
        raise ValueError(f"rules: q_heads over {rules.q_heads} and mlp over {rules.mlp} are summed over other devices")
    for axis in ("tokens", "embed", "head_dim", "layers"):
        if layout.num_shards(axis) > 1:
            raise ValueError(f"rules: {axis} is split, so that blocks end in more than an all-reduce")
    if layout.num_shards("mlp") == 1:
        raise ValueError("rules: neither q_heads nor mlp is split, so that there is nothing to reduce")
    return rules.mlp
