"""What a layout does to one array: shards, bytes, and sizes that do not divide."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paddock.sharding import ArraySpec, Layout


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout.build("x=2,y=4", "mlp=y,vocab=x+y,embed=x")


def test_shards(layout: Layout) -> None:
    assert {axis: layout.num_shards(axis) for axis in ("embed", "mlp", "vocab", "q_heads")} == {
        "embed": 2,
        "mlp": 4,
        "vocab": 8,
        "q_heads": 1,
    }


def test_an_array_made_from_its_spec_lies_as_planned(layout: Layout) -> None:
    spec = ArraySpec((6, 8, 3), "bfloat16", ("embed", "mlp", None))
    assert spec.num_bytes == 6 * 8 * 3 * 2
    assert layout.bytes_per_device(spec) == spec.num_bytes // 8
    abstract = layout.abstract(spec)
    assert (abstract.shape, abstract.dtype) == (spec.shape, jnp.bfloat16)
    array = jax.device_put(np.arange(6 * 8 * 3).reshape(spec.shape).astype(spec.dtype), abstract.sharding)
    for shard in array.addressable_shards:
        assert shard.data.shape == (3, 2, 3)
        assert shard.data.nbytes == layout.bytes_per_device(spec)
    # x is the slower axis of the mesh: device 5 holds the second half of embed and the second quarter of mlp.
    held = {shard.device: shard.index for shard in array.addressable_shards}
    assert held[jax.devices()[5]][:2] == (slice(3, 6), slice(2, 4))


def test_what_no_rule_splits_is_whole_on_every_device(layout: Layout) -> None:
    spec = ArraySpec((5,), "float32", ("q_heads",))
    assert layout.place(spec).is_fully_replicated
    assert layout.bytes_per_device(spec) == spec.num_bytes == 20


@pytest.mark.parametrize(
    ("axis", "size", "message"),
    [
        ("mlp", 10, "mlp of size 10 does not divide over y (4 shards); the nearest sizes that do are 8 or 12"),
        ("vocab", 33, "vocab of size 33 does not divide over x+y (8 shards); the nearest sizes that do are 32 or 40"),
        ("mlp", 3, "mlp of size 3 does not divide over y (4 shards); the nearest sizes that do are 4"),
    ],
)
def test_sizes_that_do_not_divide(layout: Layout, axis: str, size: int, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        layout.place(ArraySpec((7, size), "float32", (None, axis)))
    assert str(error.value) == message


def test_a_spec_names_every_dimension() -> None:
    with pytest.raises(ValueError, match=r"^shape \(2, 3\) and axes \('mlp',\) differ in rank$"):
        ArraySpec((2, 3), "float32", ("mlp",))


def test_equal_layouts_share_their_shardings(layout: Layout) -> None:
    """JAX's dispatch is fast for the sharding objects that it has seen."""
    again = Layout.build("x=2,y=4", "mlp=y,vocab=x+y,embed=x")
    assert again == layout
    assert again.sharding(("mlp",)) is layout.sharding(("mlp",))


def test_constrain_lays_out_a_value_inside_a_program(layout: Layout) -> None:
    doubled = jax.jit(lambda x: layout.constrain(2 * x, (None, "mlp")))(jnp.ones((3, 8)))
    assert doubled.sharding.is_equivalent_to(layout.sharding((None, "mlp")), ndim=2)
