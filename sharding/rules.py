"""Sharding rules: which mesh axes each logical axis of an array is split over."""

from __future__ import annotations

import dataclasses

from jax.sharding import PartitionSpec

from .mesh import MeshConfig

Axes = tuple[str, ...]
LogicalAxes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """One field per logical axis: the mesh axes it is split over, major first; empty is replicated.

    Arrays name their dimensions by these logical axes (None is never split), layers are never named: the same
    table places weights, caches and activations.
    """

    batch: Axes = ()
    embed: Axes = ()
    q_heads: Axes = ("tensor",)
    kv_heads: Axes = ("tensor",)
    head_dim: Axes = ()
    mlp: Axes = ("tensor",)
    vocab: Axes = ("tensor",)
    layers: Axes = ("pipe",)
    pages: Axes = ()

    @classmethod
    def parse(cls, text: str) -> ShardingRules:
        """Read ``"mlp=tensor,vocab=pipe+tensor,embed="`` over the defaults. Raises ValueError on an unknown axis."""
        known = [field.name for field in dataclasses.fields(cls)]
        changes: dict[str, Axes] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, axes = part.partition("=")
            name = name.strip()
            if not equals:
                raise ValueError(f"rules: {part!r} is not of the form logical=mesh, as in 'mlp=tensor,vocab=a+b'")
            if name not in known:
                raise ValueError(f"rules: unknown logical axis {name!r}; there are {', '.join(known)}")
            if name in changes:
                raise ValueError(f"rules: logical axis {name!r} is given twice")
            changes[name] = tuple(axis.strip() for axis in axes.split("+") if axis.strip())
        return dataclasses.replace(cls(), **changes)

    def for_mesh(self, mesh: MeshConfig, *, explicit: str = "") -> ShardingRules:
        """These rules with the default axes that `mesh` lacks dropped.

        `explicit` is the text the user gave: an axis named there that the mesh lacks raises ValueError, and so
        does a mesh axis of size > 1 that no rule uses.
        """
        named = {part.partition("=")[0].strip() for part in explicit.split(",")}
        changes = {}
        for field in dataclasses.fields(self):
            axes: Axes = getattr(self, field.name)
            missing = [axis for axis in axes if axis not in mesh.sizes]
            if missing and field.name in named:
                raise ValueError(f"rules: {field.name} names mesh axis {missing[0]!r}, but the mesh is {mesh}")
            if len(set(axes)) != len(axes):
                raise ValueError(f"rules: {field.name} uses a mesh axis twice: {'+'.join(axes)}")
            changes[field.name] = tuple(axis for axis in axes if axis in mesh.sizes)
        rules = dataclasses.replace(self, **changes)
        used = {axis for field in dataclasses.fields(rules) for axis in getattr(rules, field.name)}
        for axis, size in mesh.axes:
            if size > 1 and axis not in used:
                raise ValueError(f"rules: no rule uses mesh axis {axis!r} of size {size}")
        return rules

    def spec(self, axes: LogicalAxes) -> PartitionSpec:
        """The partition spec of an array whose dimensions are `axes`. Raises ValueError on double use."""
        entries: list[Axes | str | None] = []
        seen: set[str] = set()
        for axis in axes:
            mesh_axes: Axes = getattr(self, axis) if axis is not None else ()
            twice = seen.intersection(mesh_axes)
            if twice:
                raise ValueError(f"rules: mesh axis {min(twice)!r} is used twice in an array with axes {axes}")
            seen.update(mesh_axes)
            entries.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
        return PartitionSpec(*entries)
