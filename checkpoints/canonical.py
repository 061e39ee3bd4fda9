"""Canonical arrays: those of no layout, with unrepeated kv heads and an unpadded vocabulary.

They are what Orbax folders store and what random weights are drawn as, so that neither depends on a mesh.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paddock.model import Dims, LlamaConfig


def expand(name: str, array: jax.Array, dims: Dims) -> jax.Array:
    """The canonical array `name` with the kv heads and the vocabulary of `dims`."""
    kind, group = name.rpartition(".")[2], dims.config.num_heads // dims.config.num_kv_heads
    if kind == "qkv":
        return jax.vmap(lambda row: expand("qkv_bias", row, dims))(array)
    if kind == "qkv_bias":
        queries = array[:, :group].reshape(dims.kv_heads, dims.group, -1)
        return jnp.concatenate([queries, jnp.repeat(array[:, group:], dims.kv_repeat, axis=0)], axis=1)
    if kind == "out":
        return array.reshape(dims.kv_heads, dims.group, *array.shape[2:])
    if kind in ("embed", "head"):
        return jnp.pad(array, ((0, dims.vocab - array.shape[0]), (0, 0)))
    return array


def contract(name: str, array: jax.Array, config: LlamaConfig) -> jax.Array:
    """The inverse of `expand`, whatever the layout that `array` was made for."""
    kind, heads = name.rpartition(".")[2], config.num_kv_heads
    if kind == "qkv":
        return jax.vmap(lambda row: contract("qkv_bias", row, config))(array) if array.shape[1] != heads else array
    if kind == "qkv_bias" and array.shape[0] != heads:
        queries = array[:, :-2].reshape(heads, config.num_heads // heads, -1)
        return jnp.concatenate([queries, array[:: array.shape[0] // heads, -2:]], axis=1)
    if kind == "out" and array.shape[0] != heads:
        return array.reshape(heads, -1, *array.shape[2:])
    if kind in ("embed", "head") and array.shape[0] != config.vocab_size:
        return array[: config.vocab_size]
    return array
