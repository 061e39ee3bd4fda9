"""The Mosaic GPU prefill kernel in the CPU interpreter, on tiny shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import dense_attention, make_case, random_queries, relative_error

from paddock.pallas_kernels.prefill_mosaic import prefill_mosaic

SCALE = 0.125


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "rows", "chunks"),
    [
        # (q_start, q_len, kv_len): rows out of order, gaps, a prefix, an unused chunk; two heads of a group at a time
        (4, 1, 64, 64, 150, [(80, 70, 333), (0, 0, 5), (3, 9, 9)]),
    ],
)
def test_equals_dense_attention_in_a_poisoned_pool(
    heads: int, kv_heads: int, head_dim: int, page_size: int, rows: int, chunks: list[tuple[int, int, int]]
) -> None:
    lengths = [total for _, _, total in chunks]
    slots = -(-max(lengths) // page_size) + 1
    case = make_case(
        lengths, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, slots=slots, dtype=jnp.bfloat16
    )
    q = random_queries(rows, heads, head_dim, jnp.bfloat16)
    start, length, total = jnp.int32(chunks).T
    out = prefill_mosaic(
        q, case.k_pages, case.v_pages, case.page_table, start, length, total, scale=SCALE, interpret=True
    )
    wanted = np.zeros(q.shape)
    for sequence, (first, count, seen) in enumerate(chunks):
        for i in range(count):
            keys = case.keys[sequence][: seen - count + i + 1]
            values = case.values[sequence][: seen - count + i + 1]
            wanted[first + i] = dense_attention(q[first + i], keys, values, SCALE)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, wanted) <= 1e-2
    outside = np.ones(rows, bool)
    for first, count, _ in chunks:
        outside[first : first + count] = False
    assert not np.asarray(out, np.float32)[outside].any()
