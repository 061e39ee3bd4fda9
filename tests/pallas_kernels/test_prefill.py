"""Prefill attention in jnp against dense float64: ragged chunks with cached prefixes, in any order."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import PagedCase, dense_attention, make_case, random_queries, relative_error

from paddock.pallas_kernels import PREFILL_ATTENTION
from paddock.pallas_kernels.checks import check_prefill

IMPLEMENTATIONS = ["reference", "blocked"]
HEADS, KV_HEADS, HEAD_DIM, PAGE, SLOTS, ROWS = 6, 2, 8, 16, 16, 224
SCALE = 0.3
# (q_start, q_len, kv_len) of each chunk. Rows out of order, gaps between them, one chunk of three blocks of rows that
# ends with the last row, one token after a full page, a chunk that fills a page, two unused ones (q_len 0).
CHUNKS = [(70, 17, 50), (0, 0, 0), (92, 132, 132), (20, 1, PAGE + 1), (0, 16, 16), (5, 0, 30), (22, 40, 200)]


def run(name: str, q: Any, case: PagedCase, chunks: list[tuple[int, int, int]], owner: list[int]) -> Any:
    """Chunk i of the call belongs to sequence owner[i] of the case."""
    start, length, total = jnp.int32(chunks).T
    table = case.page_table[jnp.int32(owner)]
    return PREFILL_ATTENTION[name](q, case.k_pages, case.v_pages, table, start, length, total, scale=SCALE)


def dense_prefill(q: Any, case: PagedCase, chunks: list[tuple[int, int, int]]) -> np.ndarray:
    result = np.zeros(q.shape)
    for sequence, (start, length, total) in enumerate(chunks):
        for i in range(length):
            seen = total - length + i + 1
            keys, values = case.keys[sequence][:seen], case.values[sequence][:seen]
            result[start + i] = dense_attention(q[start + i], keys, values, SCALE)
    return result


def case_of(chunks: list[tuple[int, int, int]], dtype: Any = jnp.float32) -> PagedCase:
    lengths = [total for _, _, total in chunks]
    return make_case(lengths, kv_heads=KV_HEADS, head_dim=HEAD_DIM, page_size=PAGE, slots=SLOTS, dtype=dtype)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_equals_dense_attention_for_ragged_chunks(name: str, dtype: Any, limit: float) -> None:
    case, q = case_of(CHUNKS, dtype), random_queries(ROWS, HEADS, HEAD_DIM, dtype)
    out = run(name, q, case, CHUNKS, list(range(len(CHUNKS))))
    assert out.dtype == dtype
    assert relative_error(out, dense_prefill(q, case, CHUNKS)) <= limit
    outside = np.ones(ROWS, bool)
    for start, length, _ in CHUNKS:
        outside[start : start + length] = False
    assert outside.sum() == ROWS - 206
    assert not np.asarray(out, np.float32)[outside].any()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_order_of_chunks_does_not_matter(name: str) -> None:
    case, q = case_of(CHUNKS), random_queries(ROWS, HEADS, HEAD_DIM)
    order = [5, 3, 6, 0, 2, 4, 1]
    out = run(name, q, case, [CHUNKS[i] for i in order], order)
    assert relative_error(out, dense_prefill(q, case, CHUNKS)) <= 1e-6


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_splitting_a_prompt_into_chunks_does_not_matter(name: str) -> None:
    case, q = case_of([(0, 200, 200)]), random_queries(ROWS, HEADS, HEAD_DIM)
    unused = [(0, 0, 0)] * 7
    # The rows of a later chunk may lie before those of an earlier one: positions come from the lengths alone.
    split = [(100, 37, 37), (0, 1, 38), (137, 63, 101), (1, 99, 200)]
    whole = np.asarray(run(name, q[:ROWS], case, ([(0, 200, 200), *unused])[:7], [0] * 7))
    order = np.r_[100:137, 0, 137:200, 1:100]
    shuffled = np.zeros((ROWS, HEADS, HEAD_DIM), np.float32)
    shuffled[order] = np.asarray(q)[:200]
    parts = np.asarray(run(name, jnp.asarray(shuffled), case, (split + unused)[:7], [0] * 7))
    assert relative_error(parts[order], whole[:200].astype(np.float64)) <= 1e-6
    assert relative_error(whole, dense_prefill(q, case, [(0, 200, 200)])) <= 1e-6


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_chunk_at_all_gives_zeros(name: str) -> None:
    case, q = case_of(CHUNKS), random_queries(ROWS, HEADS, HEAD_DIM)
    assert not np.asarray(run(name, q, case, [(0, 0, 0)] * 7, [0] * 7)).any()


@pytest.mark.parametrize("page_size", [5, 128])
def test_blocked_takes_any_page_size(page_size: int) -> None:
    case = make_case([150], kv_heads=1, head_dim=HEAD_DIM, page_size=page_size, slots=-(-150 // page_size))
    q = random_queries(70, 3, HEAD_DIM)
    chunks = [(0, 70, 150)]
    assert relative_error(run("blocked", q, case, chunks, [0]), dense_prefill(q, case, chunks)) <= 1e-6


@pytest.mark.parametrize("field", ["q_start", "q_len", "kv_len"])
def test_arguments_that_do_not_fit_are_refused(field: str) -> None:
    pages = jnp.zeros((5, 2, 16, 8))
    lengths = {name: jnp.zeros(2, jnp.int32) for name in ("q_start", "q_len", "kv_len")}
    arguments: dict[str, Any] = {
        "q": jnp.zeros((9, 4, 8)),
        "k_pages": pages,
        "v_pages": pages,
        "page_table": jnp.zeros((2, 3), jnp.int32),
        **lengths,
    }
    check_prefill(**arguments)
    with pytest.raises(ValueError, match=f"{field} must be int32\\[2\\]"):
        check_prefill(**arguments | {field: jnp.zeros(3, jnp.int32)})
    with pytest.raises(ValueError, match=f"{field} must be int32\\[2\\]"):
        check_prefill(**arguments | {field: jnp.zeros(2)})


@pytest.mark.parametrize("name", list(PREFILL_ATTENTION))
def test_every_implementation_checks_its_arguments(name: str) -> None:
    pages, chunk = jnp.zeros((5, 2, 16, 8)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="5 query heads"):
        PREFILL_ATTENTION[name](
            jnp.zeros((9, 5, 8)), pages, pages, jnp.zeros((2, 3), jnp.int32), chunk, chunk, chunk, scale=SCALE
        )
