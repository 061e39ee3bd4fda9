"""Random weights, made on the devices that hold them."""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from paddock.model import Dims, LlamaConfig, param_specs, placements
from paddock.sharding import Layout

from .canonical import expand


def init_dummy_params(config: LlamaConfig, layout: Layout, dtype: Any = None, seed: int = 0) -> dict[str, jax.Array]:
    """The arrays of `param_specs(config, layout, dtype)` with random values that depend on `seed` alone, each where
    `placements` puts it; without those that no device of this process holds.

    Matrices have a deviation of fan_in**-1/2 (those that feed the residual stream less, by the number of them), so that
    activations and logits stay near 1 at any size; norms lie within 0.1 of 1. Each shard is computed where it lives,
    from a hash of its elements' canonical positions: the model is the same in every layout.
    """
    canonical, dims = param_specs(config, None, dtype), Dims.of(config, layout)
    params = {}
    places = placements(config, layout, dtype)
    for name, spec in param_specs(config, layout, dtype).items():
        if not places[name].addressable_devices:
            continue
        mean, width = _distribution(config, name)
        # zlib's, because Python's own hash of a string changes from process to process.
        salt = jnp.uint32(zlib.crc32(f"{seed}/{name}".encode()))
        kind = "norm" if name.endswith("norm") else name.rpartition(".")[2]
        make = _maker(kind, canonical[name].shape, jnp.dtype(spec.dtype), dims, places[name])
        params[name] = make(salt, jnp.float32(mean), jnp.float32(width))
    return params


def _distribution(config: LlamaConfig, name: str) -> tuple[float, float]:
    """Mean and half width of the uniform distribution of array `name`."""
    kind = name.rpartition(".")[2]
    if kind in ("norm", "attention_norm", "mlp_norm"):
        return 1.0, 0.1
    if kind.endswith("_bias"):
        return 0.0, 0.1
    fan_in = {"out": config.num_heads * config.head_dim, "down": config.mlp_dim}.get(kind, config.embed_dim)
    residuals = 2 * config.num_layers if kind in ("out", "down") else 1
    return 0.0, math.sqrt(3 / (fan_in * residuals))  # a uniform distribution on [-w, w] has variance w*w/3


@functools.lru_cache(maxsize=64)
def _maker(kind: str, shape: tuple[int, ...], dtype: Any, dims: Dims, sharding: jax.sharding.NamedSharding) -> Any:
    """One compiled function for all arrays that differ in their values only: every layer's `qkv`, say."""

    def make(salt: jax.Array, mean: jax.Array, width: jax.Array) -> jax.Array:
        return expand(kind, (mean + width * _uniform(shape, salt)).astype(dtype), dims)

    return jax.jit(make, out_shardings=sharding)


def _uniform(shape: tuple[int, ...], salt: jax.Array) -> jax.Array:
    """Numbers in [-1, 1), each from its position and `salt` by the integer mixer lowbias32 (C. Wellons, 2018).

    jax.random would be better noise, and take longer to compile and to run.
    """
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    bits = position * jnp.uint32(0x9E3779B1) ^ salt
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    bits ^= bits >> 16
    return (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1.0
