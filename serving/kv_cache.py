"""The page pools on the devices. Their axis order is decided here and in the attention kernels' contract alone."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from paddock.model import Dims, LlamaConfig, Stages
from paddock.sharding import ArraySpec, Layout


class KVCache(NamedTuple):
    """Keys and values by layer slot: each pool is [P, K, p, h], so that one (page, head) tile is contiguous; over
    pipeline stages [stages, P, K, p, h]."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def cache_spec(dims: Dims, num_pages: int, page_size: int, dtype: Any) -> ArraySpec:
    """One layer's pool of keys, or of values; `num_pages` of all partitions together."""
    shape = (num_pages, dims.cache_heads, page_size, dims.config.head_dim)
    return ArraySpec(shape, jnp.dtype(dtype), ("pages", "q_heads", None, "head_dim"), yields=True)


def page_bytes(dims: Dims, layout: Layout, page_size: int, dtype: Any) -> int:
    """Bytes per device of one page of its partition: keys and values of all layer slots."""
    num_slots = Stages.of(dims.config, layout).num_slots
    spec = cache_spec(dims, layout.num_shards("pages"), page_size, dtype)
    return 2 * num_slots * layout.bytes_per_device(spec)


def kv_bytes_per_token(model: LlamaConfig, dtype: str) -> int:
    """Keys and values of all layers, without what a layout repeats."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(dtype).itemsize


def abstract_cache(spec: ArraySpec, stages: Stages, layout: Layout) -> KVCache:
    if stages.count > 1:
        spec = dataclasses.replace(spec, shape=(stages.count, *spec.shape), axes=("layers", *spec.axes))
    pools: Any = (layout.abstract(spec),) * stages.num_slots  # shapes where arrays will be
    return KVCache(pools, pools)
