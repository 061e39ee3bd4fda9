"""Bytes per device: what a layout needs, counted from described arrays. No array is made and no device is asked.

A layout is judged in about 0.1 ms, so that a search may try thousands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from .layout import ArraySpec, Layout
from .mesh import MeshConfig
from .rules import ShardingRules

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """Bytes on each device by kind: weights, pages of the KV cache, the rest of what persists from step to step, and
    what a step needs while it runs."""

    weights: int = 0
    kv_cache: int = 0
    state: int = 0
    temp: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def fits(self, available: int) -> bool:
        return self.total <= available

    def __str__(self) -> str:
        parts = [f"{show_bytes(n)} of {kind.replace('_', ' ')}" for kind, n in dataclasses.asdict(self).items() if n]
        return f"{', '.join(parts)}: {show_bytes(self.total)} in all"


@dataclasses.dataclass(frozen=True)
class PlannedLayout(Layout):
    """A layout over devices that need not be there: it can tell shapes and bytes, and place nothing."""

    mesh: Any

    @classmethod
    def of(cls, mesh: str | MeshConfig, rules: str = "") -> PlannedLayout:
        """The layout of one replica. Raises ValueError as `Layout.build` does, but for the number of devices."""
        mesh = MeshConfig.parse(mesh) if isinstance(mesh, str) else mesh
        fitted = ShardingRules.parse(rules).for_mesh(mesh, explicit=rules)
        names, sizes = zip(*(mesh.without_data.axes or (("tensor", 1),)), strict=True)
        return cls(AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names)), fitted)


def count_bytes(layout: Layout, arrays: Iterable[tuple[ArraySpec, int]]) -> int:
    """Bytes per device of `arrays`, each with how many there are of it.

    Raises ValueError naming the axis that does not divide, with the nearest sizes that do.
    """
    total = 0
    for spec, count in arrays:
        if any(size % shards for size, shards in zip(spec.shape, layout.shards(spec), strict=True)):
            layout.place(spec)
        total += count * layout.bytes_per_device(spec)
    return total


def smallest_meshes(
    need: Callable[[MeshConfig], DeviceBytes],
    available: Callable[[MeshConfig], int],
    *,
    tensor: Iterable[int],
    pipe: Iterable[int],
) -> list[tuple[MeshConfig, DeviceBytes]]:
    """Of the meshes with these sizes, those of the fewest devices on which `need` fits `available`, both in bytes per
    device, with what they need.

    Meshes for which `need` raises ValueError are left out; the list is empty when none fits.
    """
    pipes = sorted(set(pipe))
    sizes = sorted((t * p, p, t) for t in set(tensor) for p in pipes)
    found: list[tuple[MeshConfig, DeviceBytes]] = []
    for devices, p, t in sizes:
        if found and devices > found[0][0].num_devices:
            break
        mesh = MeshConfig(tuple((name, size) for name, size in (("pipe", p), ("tensor", t)) if size > 1))
        try:
            needed = need(mesh)
        except ValueError:
            continue
        if needed.fits(available(mesh)):
            found.append((mesh, needed))
    return found


def show_bytes(count: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} bytes"
