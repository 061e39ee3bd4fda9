"""Which of a mesh's devices share an island, by the order in which they fill islands: last axis fastest."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np

from .mesh import MeshConfig


@functools.lru_cache(maxsize=4096)
def span(mesh: MeshConfig, axes: tuple[str, ...], island: int) -> tuple[int, int]:
    """How many devices `axes` join, and over how many islands the widest such group lies."""
    axes = tuple(axis for axis in axes if axis in mesh.sizes)
    if not axes:
        return 1, 1
    groups = list(_grid(mesh, axes, island))
    return len(groups[0]), max(len(set(group)) for group in groups)


@functools.lru_cache(maxsize=4096)
def hop_leaves(mesh: MeshConfig, axes: tuple[str, ...], island: int) -> bool:
    """Whether some stage's next one, the first after the last, is in another island."""
    return any(a != b for group in _grid(mesh, axes, island) for a, b in zip(group, group[1:] + group[:1], strict=True))


def _grid(mesh: MeshConfig, axes: tuple[str, ...], island: int) -> Iterator[tuple[int, ...]]:
    """For each group of devices that `axes` distinguish, in which islands they are; devices fill islands in order."""
    names = list(mesh.sizes)
    ids = np.arange(mesh.num_devices).reshape(tuple(mesh.sizes.values())) // island
    ids = np.moveaxis(ids, [names.index(axis) for axis in axes], range(len(axes)))
    return map(tuple, ids.reshape(math.prod(mesh.sizes[axis] for axis in axes), -1).T.tolist())
