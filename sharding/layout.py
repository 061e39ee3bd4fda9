"""A layout: a mesh and its rules, and what they do to an array."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from .mesh import MeshConfig
from .rules import LogicalAxes, ShardingRules


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """An array described but not made: shape, dtype and the logical axis of each dimension (None: never split)."""

    shape: tuple[int, ...]
    dtype: Any
    axes: LogicalAxes

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in rank")

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * jax.numpy.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with the rules that place arrays on it. Equal layouts share their `NamedSharding` objects."""

    mesh: Mesh
    rules: ShardingRules

    @classmethod
    def build(cls, mesh: str | MeshConfig = "", rules: str = "", devices: Sequence[jax.Device] | None = None) -> Layout:
        """From the two flags' texts. Raises ValueError naming the axis that is wrong."""
        mesh = MeshConfig.parse(mesh) if isinstance(mesh, str) else mesh
        return cls(mesh.build(devices), ShardingRules.parse(rules).for_mesh(mesh, explicit=rules))

    def num_shards(self, axis: str) -> int:
        """How many pieces logical axis `axis` is cut into."""
        return math.prod(self.mesh.shape[name] for name in getattr(self.rules, axis))

    @functools.cache  # noqa: B019 - layouts live as long as the process; fresh NamedShardings miss JAX's fast path
    def sharding(self, axes: LogicalAxes = ()) -> NamedSharding:
        return NamedSharding(self.mesh, self.rules.spec(axes))

    def place(self, spec: ArraySpec) -> NamedSharding:
        """The sharding of `spec`. Raises ValueError if a dimension does not divide, with the nearest sizes that do."""
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            shards = 1 if axis is None else self.num_shards(axis)
            if size % shards:
                low = size // shards * shards
                near = f"{low} or {low + shards}" if low else str(shards)
                raise ValueError(
                    f"{axis} of size {size} does not divide over {'+'.join(getattr(self.rules, axis or ''))} "
                    f"({shards} shards); the nearest sizes that do are {near}"
                )
        return self.sharding(spec.axes)

    def abstract(self, spec: ArraySpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=self.place(spec))

    def bytes_per_device(self, spec: ArraySpec) -> int:
        return spec.num_bytes // math.prod(self.num_shards(axis) for axis in spec.axes if axis is not None)

    def constrain(self, x: jax.Array, axes: LogicalAxes) -> jax.Array:
        """Ask the compiler to lay `x` out by the rules at this point of the program."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes))
