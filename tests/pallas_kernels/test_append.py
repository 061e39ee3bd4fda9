"""Writing keys and values to their pages, in plain jnp."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paddock.pallas_kernels.append_reference import append_reference
from paddock.pallas_kernels.checks import check_append

Arrays = tuple[jax.Array, ...]


def arguments(
    tokens: int, pages: int, dtype: Any, kv_heads: int = 2, page_size: int = 16, head_dim: int = 64
) -> Arrays:
    """Two pools, rows of keys and of values in float32, and a different place for each row."""
    random, page_size = np.random.default_rng(0), 16
    pool, rows = (pages, kv_heads, page_size, head_dim), (tokens, kv_heads, head_dim)
    pools = tuple(jnp.asarray(random.standard_normal(pool), dtype) for _ in range(2))
    new = tuple(jnp.asarray(random.standard_normal(rows), jnp.float32) for _ in range(2))
    places = random.permutation(pages * page_size)[:tokens].astype(np.int32)
    return *pools, *new, jnp.asarray(places // page_size), jnp.asarray(places % page_size)


def expected(pool: jax.Array, rows: jax.Array, page: jax.Array, offset: jax.Array) -> np.ndarray:
    result = np.asarray(pool, np.float32).copy()
    for row, p, o in zip(np.asarray(rows.astype(pool.dtype), np.float32), page.tolist(), offset.tolist(), strict=True):
        result[p, :, o] = row
    return result


def test_rows_are_written_and_nothing_else() -> None:
    k_pages, v_pages, k, v, page, offset = arguments(3, 4, jnp.bfloat16)
    k_after, v_after = append_reference(k_pages, v_pages, k, v, page, offset)
    assert k_after.dtype == v_after.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(k_after, np.float32), expected(k_pages, k, page, offset))
    np.testing.assert_array_equal(np.asarray(v_after, np.float32), expected(v_pages, v, page, offset))


def test_arguments_that_do_not_fit_are_refused() -> None:
    k_pages, v_pages, k, v, page, offset = arguments(3, 4, jnp.bfloat16)
    with pytest.raises(ValueError, match="k_pages and v_pages must be alike"):
        check_append(k_pages, v_pages[1:], k, v, page, offset)
    with pytest.raises(ValueError, match=r"rows of \(2, 64\)"):
        check_append(k_pages, v_pages, k[:, :1], v[:, :1], page, offset)
    with pytest.raises(ValueError, match=r"offset must be int32\(3,\)"):
        check_append(k_pages, v_pages, k, v, page, offset[:2])
