"""The device mesh: names and sizes of its axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

# The axis that counts replicas: an engine, its weights and its pages each. No array is split over it.
DATA = "data"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Names and sizes of the mesh axes, slowest-varying first: ``(("pipe", 2), ("tensor", 4))``."""

    axes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        for name, size in self.axes:
            if not name.isidentifier():
                raise ValueError(f"mesh: axis name {name!r} is not an identifier")
            if size < 1:
                raise ValueError(f"mesh: axis {name!r} has size {size}; sizes start at 1")
            if names.count(name) > 1:
                raise ValueError(f"mesh: axis {name!r} is given twice")

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """Read ``"pipe=2,tensor=4"``; an empty string is one device. Raises ValueError naming the bad part."""
        axes = []
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, size = part.partition("=")
            if not equals or not size.strip().isdecimal():
                raise ValueError(f"mesh: {part!r} is not of the form axis=size, as in 'pipe=2,tensor=4'")
            axes.append((name.strip(), int(size)))
        return cls(tuple(axes))

    @property
    def num_devices(self) -> int:
        return math.prod(size for _, size in self.axes)

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.axes)

    @property
    def num_replicas(self) -> int:
        return self.sizes.get(DATA, 1)

    def replica_devices(self, index: int, devices: Sequence[jax.Device]) -> list[jax.Device]:
        """The devices of replica `index` in the order of `without_data`. Raises ValueError when there are too few."""
        self.check_count(devices)
        grid = np.array(devices[: self.num_devices], dtype=object).reshape([size for _, size in self.axes])
        names = [name for name, _ in self.axes]
        if DATA in names:
            grid = np.take(grid, [index], axis=names.index(DATA))
        return list(grid.flat)

    @property
    def without_data(self) -> MeshConfig:
        """The mesh of one replica."""
        return MeshConfig(tuple((name, size) for name, size in self.axes if name != DATA))

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes) or "one device"

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over the first `num_devices` devices. Raises ValueError when there are too few."""
        devices = jax.devices() if devices is None else devices
        self.check_count(devices)
        axes = self.axes or (("tensor", 1),)
        names, sizes = zip(*axes, strict=True)
        grid = np.array(devices[: self.num_devices], dtype=object).reshape(sizes)
        # Auto: the compiler propagates shardings from the weights' and the caches' partition specs.
        return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))

    def check_count(self, devices: Sequence[jax.Device]) -> None:
        """Raises ValueError when `devices` are too few."""
        if len(devices) < self.num_devices:
            raise ValueError(f"mesh {self} needs {self.num_devices} devices, but there are {len(devices)}")
