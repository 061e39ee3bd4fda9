"""Counting bytes without arrays or devices."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from paddock.sharding import ArraySpec, Layout, MeshConfig
from paddock.sharding.memory import DeviceBytes, PlannedLayout, count_bytes, show_bytes, smallest_meshes

MATRIX = ArraySpec((64, 96), jnp.bfloat16, ("embed", "mlp"))
NORM = ArraySpec((64,), jnp.float32, ("embed",))


@pytest.mark.parametrize(
    ("mesh", "rules", "matrix", "norm"),
    [
        ("", "", 64 * 96 * 2, 256),
        ("tensor=8", "", 64 * 12 * 2, 256),
        ("x=2,y=4", "embed=x,mlp=y,q_heads=,vocab=", 32 * 24 * 2, 128),
        ("x=2,y=4", "mlp=x+y,q_heads=,vocab=", 64 * 12 * 2, 256),
    ],
)
def test_bytes_of_a_device(mesh, rules, matrix, norm):
    planned = PlannedLayout.of(mesh, rules)
    assert count_bytes(planned, [(MATRIX, 3), (NORM, 2)]) == 3 * matrix + 2 * norm
    placed = Layout.build(mesh, rules)
    assert count_bytes(placed, [(MATRIX, 3), (NORM, 2)]) == 3 * matrix + 2 * norm


def test_more_devices_than_there_are():
    assert count_bytes(PlannedLayout.of("data=9,tensor=32"), [(MATRIX, 1)]) == 64 * 3 * 2


def test_what_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"mlp of size 96 does not divide over tensor \(5 shards\).*95 or 100"):
        count_bytes(PlannedLayout.of("tensor=5"), [(MATRIX, 1)])


def test_smallest_meshes():
    """1,000 bytes split over everything, 10 more on each tensor shard; three stages cannot be had."""

    def need(mesh: MeshConfig) -> DeviceBytes:
        pipe, tensor = mesh.sizes.get("pipe", 1), mesh.sizes.get("tensor", 1)
        if pipe == 3:
            raise ValueError("no")
        return DeviceBytes(weights=1000 // (pipe * tensor), temp=10 * tensor)

    def found(available: int) -> list[str]:
        return [str(mesh) for mesh, _ in smallest_meshes(need, lambda _: available, tensor=[1, 2, 4], pipe=range(1, 5))]

    assert found(2000) == ["one device"]
    assert found(515) == ["pipe=2"]
    assert found(520) == ["tensor=2", "pipe=2"]
    assert found(270) == ["pipe=2,tensor=2", "pipe=4"]
    assert found(269) == ["pipe=4"]
    assert found(5) == []


def test_bytes_as_text():
    assert [show_bytes(n) for n in (0, 1023, 1536, 5 * 2**20, 80 * 2**30)] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "5 MiB",
        "80 GiB",
    ]
    need = DeviceBytes(weights=2**30, kv_cache=2**29)
    assert str(need) == "1 GiB of weights, 512 MiB of kv cache: 1.5 GiB in all"
    assert need.fits(3 * 2**29)
    assert not need.fits(3 * 2**29 - 1)
