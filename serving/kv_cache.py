"""The page pools on the devices. Their axis order is decided here and in the attention kernels' contract alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from paddock.model import Dims
from paddock.sharding import ArraySpec, Layout


class KVCache(NamedTuple):
    """Keys and values of every layer: each pool is [P, K, p, h], so that one (page, head) tile is contiguous."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    def append(
        self, layer: int, k: jax.Array, v: jax.Array, page: Int[Array, " T"], offset: Int[Array, " T"]
    ) -> KVCache:
        """With k and v [T K h] written at (page, offset) of `layer`; in place once the cache is donated."""
        new_k = self.k[layer].at[page, :, offset].set(k.astype(self.k[layer].dtype))
        new_v = self.v[layer].at[page, :, offset].set(v.astype(self.v[layer].dtype))
        return KVCache(_replace(self.k, layer, new_k), _replace(self.v, layer, new_v))


def _replace(pools: tuple[jax.Array, ...], layer: int, pool: jax.Array) -> tuple[jax.Array, ...]:
    return (*pools[:layer], pool, *pools[layer + 1 :])


def cache_spec(dims: Dims, num_pages: int, page_size: int, dtype: Any) -> ArraySpec:
    """One layer's pool of keys, or of values."""
    shape = (num_pages, dims.kv_heads, page_size, dims.config.head_dim)
    return ArraySpec(shape, jnp.dtype(dtype), ("pages", "kv_heads", None, "head_dim"))


def page_bytes(dims: Dims, layout: Layout, page_size: int, dtype: Any) -> int:
    """Bytes per device of one page: keys and values of all layers."""
    return 2 * dims.config.num_layers * layout.bytes_per_device(cache_spec(dims, 1, page_size, dtype))


def abstract_cache(spec: ArraySpec, num_layers: int, layout: Layout) -> KVCache:
    pools: Any = (layout.abstract(spec),) * num_layers  # shapes where arrays will be
    return KVCache(pools, pools)
