"""Meshes read from a flag's text, and built over the first devices."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType

from paddock.sharding import MeshConfig


def test_the_first_axis_varies_slowest() -> None:
    config = MeshConfig.parse(" pipe=2, tensor=3,")
    assert config == MeshConfig((("pipe", 2), ("tensor", 3)))
    assert (config.num_devices, config.sizes) == (6, {"pipe": 2, "tensor": 3})
    assert MeshConfig.parse(str(config)) == config
    mesh = config.build()
    assert mesh.axis_names == ("pipe", "tensor")
    assert mesh.devices.tolist() == [jax.devices()[:3], jax.devices()[3:6]]
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


def test_no_text_is_one_device() -> None:
    config = MeshConfig.parse("")
    assert (config.num_devices, str(config)) == (1, "one device")
    assert config.build().devices.tolist() == jax.devices()[:1]


def test_it_takes_the_devices_it_is_given() -> None:
    others = jax.devices()[4:6]
    assert MeshConfig.parse("x=2").build(others).devices.tolist() == others


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor", "mesh: 'tensor' is not of the form axis=size, as in 'pipe=2,tensor=4'"),
        ("pipe=2,tensor=two", "mesh: 'tensor=two' is not of the form axis=size, as in 'pipe=2,tensor=4'"),
        ("tensor=²", "mesh: 'tensor=²' is not of the form axis=size, as in 'pipe=2,tensor=4'"),
        ("tensor=-2", "mesh: 'tensor=-2' is not of the form axis=size, as in 'pipe=2,tensor=4'"),
        ("tensor=", "mesh: 'tensor=' is not of the form axis=size, as in 'pipe=2,tensor=4'"),
        ("x=2,y=1,x=4", "mesh: axis 'x' is given twice"),
        ("x=0", "mesh: axis 'x' has size 0; sizes start at 1"),
        ("x y=2", "mesh: axis name 'x y' is not an identifier"),
        ("=2", "mesh: axis name '' is not an identifier"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        MeshConfig.parse(text)
    assert str(error.value) == message


def test_too_few_devices() -> None:
    with pytest.raises(ValueError, match=r"^mesh pipe=2,tensor=8 needs 16 devices, but there are 8$"):
        MeshConfig.parse("pipe=2,tensor=8").build()
    with pytest.raises(ValueError, match=r"^mesh x=2 needs 2 devices, but there are 1$"):
        MeshConfig.parse("x=2").build(jax.devices()[:1])
