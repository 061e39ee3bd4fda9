"""A layout: a mesh and its rules, and what they do to an array."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .mesh import MeshConfig
from .rules import Axes, LogicalAxes, ShardingRules


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """An array described but not made: shape, dtype and the logical axis of each dimension (None: never split).

    `yields`: a mesh axis that two dimensions name splits the first of them (caches, activations) instead of being an
    error (weights).
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: LogicalAxes
    yields: bool = False

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
    def build(
        cls,
        mesh: str | MeshConfig = "",
        rules: str = "",
        devices: Sequence[jax.Device] | None = None,
        *,
        replica: int = 0,
    ) -> Layout:
        """From the two flags' texts: the layout of one replica, where the mesh has an axis ``data``.

        Raises ValueError naming the axis that is wrong.
        """
        mesh = MeshConfig.parse(mesh) if isinstance(mesh, str) else mesh
        fitted = ShardingRules.parse(rules).for_mesh(mesh, explicit=rules)
        mine = mesh.replica_devices(replica, jax.devices() if devices is None else devices)
        return cls(mesh.without_data.build(mine), fitted)

    def num_shards(self, axis: str) -> int:
        """How many pieces logical axis `axis` is cut into."""
        return self.size_of(getattr(self.rules, axis))

    def size_of(self, mesh_axes: Axes) -> int:
        """How many groups of devices the mesh axes distinguish."""
        return math.prod(self.mesh.shape[name] for name in mesh_axes)

    @functools.cache  # noqa: B019 - layouts live as long as the process; fresh NamedShardings miss JAX's fast path
    def sharding(self, axes: LogicalAxes = (), *, yields: bool = False) -> NamedSharding:
        return NamedSharding(self.mesh, self.rules.spec(axes, yields=yields))

    def shards(self, spec: ArraySpec) -> tuple[int, ...]:
        """How many pieces each dimension of `spec` is cut into."""
        entries = self.rules.spec(spec.axes, yields=spec.yields)
        return tuple(self.size_of((entry,) if isinstance(entry, str) else entry or ()) for entry in entries)

    def place(self, spec: ArraySpec) -> NamedSharding:
        """The sharding of `spec`. Raises ValueError if a dimension does not divide, with the nearest sizes that do."""
        for size, axis, shards in zip(spec.shape, spec.axes, self.shards(spec), strict=True):
            if size % shards:
                low = size // shards * shards
                near = f"{low} or {low + shards}" if low else str(shards)
                raise ValueError(
                    f"{axis} of size {size} does not divide over {'+'.join(getattr(self.rules, axis or ''))} "
                    f"({shards} shards); the nearest sizes that do are {near}"
                )
        return self.sharding(spec.axes, yields=spec.yields)

    def abstract(self, spec: ArraySpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=self.place(spec))

    def bytes_per_device(self, spec: ArraySpec) -> int:
        return spec.num_bytes // math.prod(self.shards(spec))

    def stage(self, index: int) -> Layout:
        """The layout of pipeline stage `index`: its own devices, without the layers' mesh axes."""
        layers = self.rules.layers
        names = [name for name in self.mesh.axis_names if name not in layers]
        grid = self.mesh.devices.transpose([self.mesh.axis_names.index(name) for name in (*layers, *names)])
        if not names:  # a mesh has at least one axis
            names, grid = ["stage"], grid[..., None]
        grid = grid.reshape(-1, *grid.shape[len(layers) :])[index]
        vocab = tuple(axis for axis in self.rules.vocab if axis not in layers)
        rules = dataclasses.replace(self.rules, layers=(), vocab=vocab)
        return Layout(Mesh(grid, names, axis_types=self.mesh.axis_types[:1] * len(names)), rules)

    def constrain(self, x: jax.Array, axes: LogicalAxes) -> jax.Array:
        """Ask the compiler to lay activation `x` out by the rules at this point of the program."""
        return self.constrain_spec(x, self.rules.spec(axes, yields=True))

    def constrain_spec(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self._mesh_here(), spec))

    def whole(self, tree: Any) -> Any:
        """Every array of `tree` whole on each device, here and not just where it comes from: the compiler otherwise
        splits small arrays as their users like it, and then a scatter of them is a sum over devices."""
        if self.mesh.size == 1:
            return tree
        return jax.tree.map(lambda x: self.constrain(x, (None,) * x.ndim), tree)

    def shard_map(
        self, fn: Callable[..., Any], in_specs: Any, out_specs: Any, *, over: Sequence[str] | None = None
    ) -> Callable[..., Any]:
        """`fn` on each device's own shards, over the mesh axes `over` (all that are left, by default); the compiler
        goes on splitting over the others. May be nested."""
        mesh = self._mesh_here()
        manual = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if "Manual" in str(kind)}
        names = set(mesh.axis_names if over is None else over) - manual
        return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)

    def _mesh_here(self) -> Any:
        """The mesh as the program sees it at this point: inside a `shard_map` some of its axes are taken."""
        here = jax.sharding.get_abstract_mesh()
        return self.mesh if here.empty else here

    def put(self, x: np.ndarray) -> jax.Array:
        """The host's array, whole on every device. In a mesh over several processes each must give the same."""
        return self.put_sharded(x, self.sharding())

    def sent(self, x: np.ndarray) -> jax.Array | np.ndarray:
        """`x` as an argument of a compiled call that wants it whole on every device, never written to again. The call
        itself puts a host's array there in a tenth of the time that `put` takes, unless several processes must."""
        return x if self._is_local else self.put(x)

    @functools.cached_property
    def _is_local(self) -> bool:
        return self.sharding().is_fully_addressable

    def put_sharded(self, x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
