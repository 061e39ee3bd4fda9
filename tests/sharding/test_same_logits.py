"""A model in a layout: the sizes it takes there, and the same logits wherever it lies."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from tiny_config import CONFIG

from paddock.checkpoints import init_dummy_params
from paddock.model import Dims, forward, param_specs
from paddock.sharding import Layout

TOKENS = jnp.array([1, 100, 7, 42, 7, 0, 63, 5], jnp.int32)


@pytest.fixture(scope="module")
def on_one_device() -> np.ndarray:
    return logits_in(Layout.build())


def logits_in(layout: Layout) -> np.ndarray:
    params = init_dummy_params(CONFIG, layout)
    return np.asarray(jax.jit(functools.partial(forward, CONFIG, layout=layout))(params, TOKENS))


@pytest.mark.parametrize(
    ("mesh", "rules", "shard_of_qkv", "shard_of_head"),
    [
        ("x=2,y=2", "q_heads=x+y,kv_heads=x+y,mlp=y,vocab=x", (16, 1, 4, 4), (51, 16)),  # kv heads repeated
        ("tensor=4", "vocab=", (16, 1, 4, 4), (101, 16)),
        ("tensor=2", "", (16, 1, 6, 4), (51, 16)),
    ],
)
def test_every_layout_gives_the_logits_of_one_device(
    mesh: str, rules: str, shard_of_qkv: tuple[int, ...], shard_of_head: tuple[int, ...], on_one_device: np.ndarray
) -> None:
    layout = Layout.build(mesh, rules)
    specs = param_specs(CONFIG, layout)
    for name, shape in {"layers.0.qkv": shard_of_qkv, "head": shard_of_head}.items():
        assert layout.place(specs[name]).shard_shape(specs[name].shape) == shape
    logits = logits_in(layout)
    assert logits.shape == on_one_device.shape == (len(TOKENS), CONFIG.vocab_size)
    assert np.linalg.norm(logits - on_one_device) <= 1e-6 * np.linalg.norm(on_one_device)
    assert on_one_device.std() > 0.3


@pytest.mark.parametrize(
    ("mesh", "repeat", "kv_heads", "group", "vocab"),
    [("", 1, 2, 4, 101), ("tensor=2", 1, 2, 4, 102), ("tensor=4", 2, 4, 2, 104), ("tensor=8", 4, 8, 1, 104)],
)
def test_kv_heads_are_repeated_and_the_vocabulary_padded(
    mesh: str, repeat: int, kv_heads: int, group: int, vocab: int
) -> None:
    dims = Dims.of(CONFIG, Layout.build(mesh))
    assert (dims.kv_repeat, dims.kv_heads, dims.group, dims.vocab) == (repeat, kv_heads, group, vocab)


def test_query_heads_that_do_not_divide_name_the_numbers_that_do() -> None:
    with pytest.raises(
        ValueError, match=r"^q_heads of size 8 \(kv_heads 2\) does not divide over 3 shards; .* 1, 2, 4, 8$"
    ):
        Dims.of(CONFIG, Layout.build("tensor=3"))
    six_over_three = dataclasses.replace(CONFIG, num_heads=6, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"does not divide over 4 shards; numbers of shards that do: 1, 2, 3, 6$"):
        Dims.of(six_over_three, Layout.build("tensor=4"))


def test_query_heads_of_one_kv_head_may_be_split_further() -> None:
    """Two kv heads over x, the four query heads of each over y: every device holds one kv head."""
    layout = Layout.build("x=2,y=2", "q_heads=x+y,kv_heads=x")
    dims = Dims.of(CONFIG, layout)
    assert (dims.kv_repeat, dims.kv_heads, dims.group, dims.cache_heads) == (2, 4, 2, 4)
    whole = Dims.of(CONFIG, Layout.build("x=2", "q_heads=x,kv_heads="))
    assert (whole.kv_repeat, whole.kv_heads) == (2, 4), "without a rule each device holds all that there are"


def test_attention_by_sequences_repeats_no_kv_head() -> None:
    dims = Dims.of(CONFIG, Layout.build("x=4", "q_heads=x,batch=x,tokens="))
    assert (dims.kv_heads, dims.cache_heads) == (4, 2)


def test_annotations_are_checked_under_pytest() -> None:
    """The import hook of the top conftest: what an annotation says of dtypes and axes holds in every test."""
    params = init_dummy_params(CONFIG, Layout.build())
    with pytest.raises(jaxtyping.TypeCheckError, match="token_ids"):
        forward(CONFIG, params, TOKENS.astype(jnp.float32))
    with pytest.raises(jaxtyping.TypeCheckError, match="token_ids"):
        forward(CONFIG, params, TOKENS[None])
