"""Paged caches full of poison, and dense attention in numpy float64 to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass
class PagedCase:
    """Pools and page tables of some sequences, and the same tokens without pages."""

    k_pages: jax.Array  # [P, K, p, h]: NaN wherever no live token lies
    v_pages: jax.Array
    page_table: jax.Array  # [B, N]: owned pages in random order, then nonsense
    keys: list[np.ndarray]  # per sequence [S, K, h] float64
    values: list[np.ndarray]
    k_scale: jax.Array | None = None  # [P, K]: NaN for pages that nobody owns
    v_scale: jax.Array | None = None


def make_case(
    lengths: list[int],
    *,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    slots: int,
    dtype: Any = jnp.float32,
    seed: int = 0,
) -> PagedCase:
    """Sequences of the given lengths in a pool where page 0, unowned pages and the ends of last pages hold NaN."""
    random = np.random.default_rng(seed)
    owned = [-(-length // page_size) for length in lengths]
    pages = sum(owned) + 4
    free = list(1 + random.permutation(pages - 1))
    pools = np.full((2, pages, kv_heads, page_size, head_dim), np.nan, np.float32)
    table = random.choice([-1, 0, pages, 2**30], size=(len(lengths), slots)).astype(np.int32)
    dense: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for sequence, length in enumerate(lengths):
        mine = [free.pop() for _ in range(owned[sequence])]
        table[sequence, : len(mine)] = mine
        for kind in range(2):
            tokens = np.asarray(jnp.asarray(random.standard_normal((length, kv_heads, head_dim)), dtype), np.float32)
            for position, token in enumerate(tokens):
                pools[kind, mine[position // page_size], :, position % page_size] = token
            dense[kind].append(tokens.astype(np.float64))
    return PagedCase(jnp.asarray(pools[0], dtype), jnp.asarray(pools[1], dtype), jnp.asarray(table), *dense)


def quantized_case(lengths: list[int], *, dtype: Any, **shape: Any) -> PagedCase:
    """`make_case` in int8 (where poison is 127) or float8_e4m3fn, with a scale for every page and kv head."""
    case = make_case(lengths, **shape)

    def quantized(pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        largest = jnp.nanmax(jnp.abs(pool), axis=(2, 3))
        scale = largest / (127 if dtype == jnp.int8 else 448)
        values = pool / scale[:, :, None, None]
        return (jnp.nan_to_num(jnp.round(values), nan=127) if dtype == jnp.int8 else values).astype(dtype), scale

    (case.k_pages, case.k_scale), (case.v_pages, case.v_scale) = quantized(case.k_pages), quantized(case.v_pages)
    return case


def random_queries(rows: int, heads: int, head_dim: int, dtype: Any = jnp.float32, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, heads, head_dim)), dtype)


def dense_attention(query: Any, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Attention of one token's query [H, h] to keys and values [S, K, h], S > 0, in float64: [H, h]."""
    query = np.asarray(query, np.float64)
    group = query.shape[0] // keys.shape[1]
    result = np.zeros_like(query)
    for head in range(query.shape[0]):
        scores = scale * keys[:, head // group] @ query[head]
        weights = np.exp(scores - scores.max())
        result[head] = weights / weights.sum() @ values[:, head // group]
    return result


def dense_decode(q: jax.Array, case: PagedCase, lengths: list[int], scale: float) -> np.ndarray:
    """What decode attention must give for `lengths` (at most those of the case): [B, H, h] float64."""
    result = np.zeros(q.shape)
    for row, length in enumerate(lengths):
        if length:
            result[row] = dense_attention(q[row], case.keys[row][:length], case.values[row][:length], scale)
    return result


def relative_error(got: Any, wanted: np.ndarray) -> float:
    """||got - wanted|| / ||wanted||; NaN if anything in `got` is."""
    return float(np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted))


@dataclass
class NewTokens:
    """A new token for each sequence of a case, whose place in the pools holds NaN, and what attention must see."""

    qkv: jax.Array  # [B, K, G+2, h]
    cos: jax.Array  # [B, h/2] float32
    sin: jax.Array
    rotated: jax.Array  # [B, K, G+2, h]: what must be attended with and kept; values as they are


def with_new_tokens(case: PagedCase, lengths: list[int], heads: int, dtype: Any = jnp.float32) -> NewTokens:
    """Make the last token of every sequence a new one: taken out of the pools, and into `keys` and `values` rotated."""
    random, (kv_heads, page_size, head_dim) = np.random.default_rng(4), case.k_pages.shape[1:]
    shape = (len(lengths), kv_heads, heads // kv_heads + 2, head_dim)
    qkv = jnp.asarray(random.standard_normal(shape), dtype)
    angles = random.uniform(0, 6, (len(lengths), head_dim // 2)).astype(np.float32)
    values = np.asarray(qkv, np.float64)
    first, second = np.split(values, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated[:, :, -1] = values[:, :, -1]
    rotated = np.asarray(jnp.asarray(rotated, dtype), np.float64)
    for row, length in enumerate(lengths):
        if length:
            page, offset = case.page_table[row, (length - 1) // page_size], (length - 1) % page_size
            case.k_pages = case.k_pages.at[page, :, offset].set(jnp.nan)
            case.v_pages = case.v_pages.at[page, :, offset].set(jnp.nan)
            case.keys[row][-1], case.values[row][-1] = rotated[row, :, -2], rotated[row, :, -1]
    return NewTokens(qkv, jnp.cos(angles), jnp.sin(angles), jnp.asarray(rotated, dtype))


def pools_with(case: PagedCase, lengths: list[int], new: NewTokens) -> list[np.ndarray]:
    """The pools with every new token in its place, and nothing else touched."""
    pools = [np.asarray(pool, np.float32).copy() for pool in (case.k_pages, case.v_pages)]
    page_size = pools[0].shape[2]
    for row, length in enumerate(lengths):
        if length:
            page, offset = int(case.page_table[row, (length - 1) // page_size]), (length - 1) % page_size
            for kind, pool in enumerate(pools):
                pool[page, :, offset] = np.asarray(new.rotated[row, :, kind - 2], np.float32)
    return pools
