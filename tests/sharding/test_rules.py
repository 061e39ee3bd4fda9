"""Rules from logical to mesh axes: how they are read, fitted to a mesh, and turned into partition specs."""

from __future__ import annotations

import pytest
from jax.sharding import PartitionSpec

from paddock.sharding import MeshConfig, ShardingRules


def fitted(mesh: str, rules: str) -> ShardingRules:
    return ShardingRules.parse(rules).for_mesh(MeshConfig.parse(mesh), explicit=rules)


def test_what_is_not_said_keeps_its_default() -> None:
    rules = ShardingRules.parse(" mlp=x, vocab = pipe + tensor ,q_heads=")
    assert (rules.mlp, rules.vocab, rules.q_heads) == (("x",), ("pipe", "tensor"), ())
    assert (rules.kv_heads, rules.layers, rules.embed) == (("tensor",), ("pipe",), ())
    assert ShardingRules.parse("") == ShardingRules()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlp", "rules: 'mlp' is not of the form logical=mesh, as in 'mlp=tensor,vocab=a+b'"),
        ("mlp=x,mlp=y", "rules: logical axis 'mlp' is given twice"),
        (
            "heads=x",
            "rules: unknown logical axis 'heads'; there are batch, embed, q_heads, kv_heads, head_dim, mlp, vocab, "
            "layers, pages",
        ),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        ShardingRules.parse(text)
    assert str(error.value) == message


def test_defaults_are_dropped_where_the_mesh_lacks_their_axis() -> None:
    assert fitted("", "") == ShardingRules(q_heads=(), kv_heads=(), mlp=(), vocab=(), layers=())
    assert fitted("tensor=2", "vocab=") == ShardingRules(vocab=(), layers=())
    assert fitted("x=2", "mlp=x") == ShardingRules(q_heads=(), kv_heads=(), mlp=("x",), vocab=(), layers=())


@pytest.mark.parametrize(
    ("mesh", "rules", "message"),
    [
        ("x=2", "mlp=tensor", "rules: mlp names mesh axis 'tensor', but the mesh is x=2"),
        ("", "mlp=x", "rules: mlp names mesh axis 'x', but the mesh is one device"),
        ("x=2,y=4", "mlp=y", "rules: no rule uses mesh axis 'x' of size 2"),
        ("x=2", "mlp=x+x", "rules: mlp uses a mesh axis twice: x+x"),
    ],
)
def test_rules_that_do_not_fit_the_mesh(mesh: str, rules: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        fitted(mesh, rules)
    assert str(error.value) == message


def test_an_axis_of_one_device_needs_no_rule() -> None:
    assert fitted("x=1,tensor=2", "").mlp == ("tensor",)


def test_partition_specs() -> None:
    rules = fitted("x=2,y=2", "mlp=x,vocab=x+y")
    assert rules.spec(("vocab", "embed")) == PartitionSpec(("x", "y"), None)
    assert rules.spec((None, "mlp")) == PartitionSpec(None, "x")
    assert rules.spec(()) == PartitionSpec()


def test_a_mesh_axis_splits_one_dimension_of_an_array() -> None:
    rules = fitted("x=2,y=2", "mlp=y,embed=x+y")
    with pytest.raises(
        ValueError, match=r"^rules: mesh axis 'y' is used twice in an array with axes \('embed', 'mlp'\)$"
    ):
        rules.spec(("embed", "mlp"))
