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
    assert (rules.layers, rules.embed) == (("pipe",), ())
    assert rules.kv_heads == (), "kv heads stay with their query heads"
    assert ShardingRules.parse("") == ShardingRules()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlp", "rules: 'mlp' is not of the form logical=mesh, as in 'mlp=tensor,vocab=a+b'"),
        ("mlp=x,mlp=y", "rules: logical axis 'mlp' is given twice"),
        (
            "heads=x",
            "rules: unknown logical axis 'heads'; there are batch, tokens, embed, q_heads, kv_heads, head_dim, mlp, "
            "vocab, layers, pages",
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
    assert fitted("pipe=2,tensor=2", "").vocab == ("pipe", "tensor"), "no stage is heavier than another"
    assert fitted("x=2", "mlp=x") == ShardingRules(q_heads=(), kv_heads=(), mlp=("x",), vocab=(), layers=())


@pytest.mark.parametrize(
    ("mesh", "rules", "message"),
    [
        ("x=2", "mlp=tensor", "rules: mlp names mesh axis 'tensor', but the mesh is x=2"),
        ("", "mlp=x", "rules: mlp names mesh axis 'x', but the mesh is one device"),
        ("x=2,y=4", "mlp=y", "rules: no rule uses mesh axis 'x' of size 2"),
        ("x=2", "mlp=x+x", "rules: mlp uses a mesh axis twice: x+x"),
        ("data=2", "mlp=data", "rules: mlp names 'data', which counts replicas and splits no array"),
        (
            "x=2,y=2",
            "batch=x,pages=y",
            "rules: pages=y and batch=x differ; a sequence's pages lie where its rows are computed, so both must name "
            "the same mesh axes",
        ),
        (
            "x=2,y=2",
            "q_heads=x,kv_heads=y",
            "rules: q_heads=x does not begin with kv_heads=y; a kv head is kept with its query heads, and those of one "
            "kv head may be split further",
        ),
        (
            "pipe=2",
            "mlp=pipe",
            "rules: mlp and layers both use mesh axis 'pipe'; a stage holds whole layers, and only vocab may be split "
            "over the stages too",
        ),
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


def test_in_an_activation_the_first_dimension_keeps_the_axis() -> None:
    rules = fitted("x=2,y=2", "batch=x+y,q_heads=y,embed=x")
    assert rules.spec(("batch", "q_heads"), yields=True) == PartitionSpec(("x", "y"), None)
    assert rules.spec(("embed", "q_heads"), yields=True) == PartitionSpec("x", "y")


def test_what_follows_another_axis() -> None:
    rules = fitted("x=2,y=2", "batch=x,q_heads=y")
    assert (rules.pages, rules.tokens, rules.kv_heads) == (("x",), ("x",), ("y",))
    assert fitted("x=2", "batch=x,tokens=").tokens == ()
    assert ShardingRules.parse(str(rules)) == rules
