"""Sharding rules: which mesh axes each logical axis of an array is split over."""

from __future__ import annotations

import dataclasses

from jax.sharding import PartitionSpec

from .mesh import DATA, MeshConfig

Axes = tuple[str, ...]
LogicalAxes = tuple[str | None, ...]

# What follows another axis unless it is named itself: heads stay together, and pages stay with their sequences.
_FOLLOWS = {"kv_heads": "q_heads", "pages": "batch", "tokens": "batch"}
# What lies outside the layers, and may use the layers' mesh axes too.
_OUTSIDE_LAYERS = ("layers", "vocab")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """One field per logical axis: the mesh axes it is split over, major first; empty is replicated.

    Arrays name their dimensions by these logical axes (None is never split), layers are never named: the same
    table places weights, caches and activations.

    `batch` splits sequences: their rows in attention and, with them, their `pages`. `tokens` splits the rows of the
    residual stream between the blocks, by default as `batch` does; split over the axis of heads and mlp it is sequence
    parallelism (Korthikanti et al. 2022). In a weight a mesh axis may be used once. In an activation or a cache the
    first dimension that names it keeps it: with `embed=x,tokens=x` weights lie split and are gathered when they are
    used, with `batch=x,q_heads=x` projections are split by heads and attention by sequences (Pope et al. 2022).
    """

    batch: Axes = ()
    tokens: Axes = ()
    embed: Axes = ()
    q_heads: Axes = ("tensor",)
    kv_heads: Axes = ("tensor",)
    head_dim: Axes = ()
    mlp: Axes = ("tensor",)
    vocab: Axes = ("pipe", "tensor")
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
        for follower, leader in _FOLLOWS.items():
            if leader in changes:
                changes.setdefault(follower, changes[leader])
        return dataclasses.replace(cls(), **changes)

    def for_mesh(self, mesh: MeshConfig, *, explicit: str = "") -> ShardingRules:
        """These rules with the default axes that `mesh` lacks dropped.

        `explicit` is the text the user gave: an axis named there that the mesh lacks raises ValueError, and so
        does a mesh axis of size > 1 that no rule uses, or rules that cannot hold together.
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
            if DATA in axes:
                raise ValueError(f"rules: {field.name} names {DATA!r}, which counts replicas and splits no array")
            changes[field.name] = tuple(axis for axis in axes if axis in mesh.sizes)
        rules = dataclasses.replace(self, **changes)
        used = {axis for field in dataclasses.fields(rules) for axis in getattr(rules, field.name)}
        for axis, size in mesh.axes:
            if size > 1 and axis not in used and axis != DATA:
                raise ValueError(f"rules: no rule uses mesh axis {axis!r} of size {size}")
        rules._check()
        return rules

    def _check(self) -> None:
        if self.pages != self.batch:
            raise ValueError(
                f"rules: pages={'+'.join(self.pages)} and batch={'+'.join(self.batch)} differ; a sequence's pages lie "
                "where its rows are computed, so both must name the same mesh axes"
            )
        if self.kv_heads != self.q_heads[: len(self.kv_heads)]:
            raise ValueError(
                f"rules: q_heads={'+'.join(self.q_heads)} does not begin with kv_heads={'+'.join(self.kv_heads)}; a kv "
                "head is kept with its query heads, and those of one kv head may be split further"
            )
        for field in dataclasses.fields(self):
            both = set(getattr(self, field.name)).intersection(self.layers)
            if both and field.name not in _OUTSIDE_LAYERS:
                raise ValueError(
                    f"rules: {field.name} and layers both use mesh axis {min(both)!r}; a stage holds whole layers, and "
                    "only vocab may be split over the stages too"
                )

    def spec(self, axes: LogicalAxes, *, yields: bool = False) -> PartitionSpec:
        """The partition spec of an array whose dimensions are `axes`.

        A mesh axis that two dimensions name raises ValueError, or, with `yields`, splits the first of them.
        """
        entries: list[Axes | str | None] = []
        seen: set[str] = set()
        for axis in axes:
            mesh_axes: Axes = getattr(self, axis) if axis is not None else ()
            twice = seen.intersection(mesh_axes)
            if twice and not yields:
                raise ValueError(f"rules: mesh axis {min(twice)!r} is used twice in an array with axes {axes}")
            mesh_axes = tuple(name for name in mesh_axes if name not in seen)
            seen.update(mesh_axes)
            entries.append(mesh_axes[0] if len(mesh_axes) == 1 else (mesh_axes or None))
        return PartitionSpec(*entries)

    def __str__(self) -> str:
        """All fields, in the form that `parse` reads."""
        return ",".join(f"{field.name}={'+'.join(getattr(self, field.name))}" for field in dataclasses.fields(self))
