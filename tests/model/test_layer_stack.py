"""Which blocks end in a norm that a subclass of `Products` may fuse, and what `finish` is left with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_config import CONFIG

from paddock.model import LayerStack, Products, param_specs
from paddock.model.llama import dense_causal_attention
from paddock.sharding import Layout

ROWS = 5


class Watched(Products):
    """Notes for each block whether a norm follows."""

    def __init__(self) -> None:
        self.normed: list[bool] = []

    def leave(self, *arguments: Any) -> Any:
        self.normed.append(arguments[-1] is not None)
        return super().leave(*arguments)


def stack_of(products: Products) -> LayerStack:
    random = np.random.default_rng(0)
    specs = param_specs(CONFIG, Layout.build(), "float32")
    params = {name: jnp.asarray(random.normal(size=spec.shape) * 0.1, "float32") for name, spec in specs.items()}
    return LayerStack(CONFIG, params, Layout.build(), products)


@pytest.mark.parametrize("last_mlp", [True, False])
def test_a_norm_follows_every_block_but_the_last_one_that_runs(last_mlp: bool) -> None:
    watched = Watched()
    stack, x = stack_of(watched), jax.ShapeDtypeStruct((ROWS, CONFIG.embed_dim), jnp.float32)
    jax.eval_shape(lambda x: stack(x, jnp.arange(ROWS), dense_causal_attention, last_mlp=last_mlp), x)
    blocks = 2 * CONFIG.num_layers - (not last_mlp)
    assert watched.normed == [True] * (blocks - 1) + [False]


def test_finished_rows_are_those_of_the_whole() -> None:
    stack = stack_of(Products())
    x = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, CONFIG.embed_dim)), jnp.float32)
    whole = stack(x, jnp.arange(ROWS), dense_causal_attention)
    some = stack.finish(stack(x, jnp.arange(ROWS), dense_causal_attention, last_mlp=False)[2:4])
    np.testing.assert_allclose(some, whole[2:4], rtol=1e-5, atol=1e-5)
