"""Sampling over logits whose vocabulary is split: each device samples whole rows of its own."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from paddock.sharding import Layout

from .sampler import Sampled


def on_own_rows(
    layout: Layout,
    fn: Callable[..., Sampled],
    logits: Float[Array, "R V"],
    by_row: object,
    shared: object,
) -> Sampled:
    """`fn(logits, by_row, shared)`, each device on an equal share of the rows, which are padded to divide.

    `by_row` is a tree of arrays [R ...], `shared` one of arrays that are whole everywhere. Two collectives, whatever
    `fn` iterates: an all-to-all that turns a slice of every row into whole rows, and an all-gather of what was sampled.
    """
    axes, count = layout.rules.vocab, layout.num_shards("vocab")
    if count == 1:
        return fn(logits, by_row, shared)
    num_rows = logits.shape[0]
    logits, by_row = jax.tree.map(lambda x: _pad(x, -num_rows % count), (logits, by_row))

    def local(logits: jax.Array, by_row: object, shared: object) -> jax.Array:
        logits = jax.lax.all_to_all(logits, axes, split_axis=0, concat_axis=1, tiled=True)
        return jax.lax.all_gather(_to_words(fn(logits, by_row, shared)), axes, tiled=True)

    rows, whole = PartitionSpec(axes), PartitionSpec()
    specs = (PartitionSpec(None, axes), jax.tree.map(lambda _: rows, by_row), jax.tree.map(lambda _: whole, shared))
    words = layout.shard_map(local, specs, whole)(logits, by_row, shared)
    return _from_words(words[:num_rows])


def _pad(x: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(x, [(0, rows)] + [(0, 0)] * (x.ndim - 1))


def _to_words(sampled: Sampled) -> jax.Array:
    """All fields that there are side by side as int32 [R 1] or [R 3+2M], so that they travel together."""
    columns = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in jax.tree.leaves(sampled)]
    return jnp.concatenate([x.reshape(x.shape[0], -1) for x in columns], axis=1)


def _from_words(words: jax.Array) -> Sampled:
    if words.shape[1] == 1:
        return Sampled(words[:, 0])
    floats = jax.lax.bitcast_convert_type(words, jnp.float32)
    count = (words.shape[1] - 3) // 2
    return Sampled(words[:, 0], floats[:, 1], words[:, 2], floats[:, 3 : 3 + count], words[:, 3 + count :])
