"""Decode attention in jnp against dense float64: lengths around page ends, poison everywhere else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import dense_decode, make_case, random_queries, relative_error

from paddock.pallas_kernels import DECODE_ATTENTION
from paddock.pallas_kernels.checks import check_decode

IMPLEMENTATIONS = ["reference", "blocked"]
HEADS, KV_HEADS, HEAD_DIM, PAGE, SLOTS = 6, 2, 8, 16, 64
SCALE = 0.3
# 37 work items of 64 tokens: more than one step of `blocked`, with a row that lies across two steps.
LENGTHS = [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 2, 1000, 0, 700, 300]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_equals_dense_attention_in_a_poisoned_pool(name: str, dtype: Any, limit: float) -> None:
    case = make_case(LENGTHS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, page_size=PAGE, slots=SLOTS, dtype=dtype)
    q = random_queries(len(LENGTHS), HEADS, HEAD_DIM, dtype)
    out = DECODE_ATTENTION[name](q, case.k_pages, case.v_pages, case.page_table, jnp.int32(LENGTHS), scale=SCALE)
    assert out.dtype == dtype
    assert relative_error(out, dense_decode(q, case, LENGTHS, SCALE)) <= limit
    assert not np.asarray(out, np.float32)[[0, 7]].any()  # kv_len 0


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_one_executable_serves_every_mix_of_lengths(name: str) -> None:
    case = make_case(LENGTHS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, page_size=PAGE, slots=SLOTS)
    q = random_queries(len(LENGTHS), HEADS, HEAD_DIM)
    attend = jax.jit(lambda *arguments: DECODE_ATTENTION[name](*arguments, scale=SCALE))
    arguments = (q, case.k_pages, case.v_pages, case.page_table)
    compiled = attend.lower(*arguments, jnp.int32(LENGTHS)).compile()
    for lengths in ([min(length, 20) for length in LENGTHS], [0, 1, 0, 0, 5, 0, 0, 0, 64, 65], LENGTHS):
        out = compiled(*arguments, jnp.int32(lengths))
        assert relative_error(out, dense_decode(q, case, lengths, SCALE)) <= 1e-6
    assert not np.asarray(compiled(*arguments, jnp.zeros(len(LENGTHS), jnp.int32))).any()


@pytest.mark.parametrize("page_size", [5, 64, 128])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_any_page_size(name: str, page_size: int) -> None:
    lengths = [0, page_size - 1, page_size, page_size + 1, 3 * page_size + 2]
    case = make_case(lengths, kv_heads=1, head_dim=HEAD_DIM, page_size=page_size, slots=5)
    q = random_queries(len(lengths), 4, HEAD_DIM)
    out = DECODE_ATTENTION[name](q, case.k_pages, case.v_pages, case.page_table, jnp.int32(lengths), scale=SCALE)
    assert relative_error(out, dense_decode(q, case, lengths, SCALE)) <= 1e-6


def test_blocked_keeps_its_precision_for_large_scores() -> None:
    # exp() of these scores overflows unless the running maximum is carried from block to block.
    lengths = [700, 64]
    case = make_case(lengths, kv_heads=KV_HEADS, head_dim=HEAD_DIM, page_size=PAGE, slots=44)
    q = 100 * random_queries(2, HEADS, HEAD_DIM)
    out = DECODE_ATTENTION["blocked"](q, case.k_pages, case.v_pages, case.page_table, jnp.int32(lengths), scale=SCALE)
    assert relative_error(out, dense_decode(q, case, lengths, SCALE)) <= 1e-5


def decode_arguments(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "q": jnp.zeros((3, 4, 8)),
        "k_pages": jnp.zeros((5, 2, 16, 8)),
        "v_pages": jnp.zeros((5, 2, 16, 8)),
        "page_table": jnp.zeros((3, 2), jnp.int32),
        "kv_len": jnp.zeros(3, jnp.int32),
    }
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"q": jnp.zeros((3, 32))}, "q must have 3 axes"),
        ({"q": jnp.zeros((3, 4, 16))}, "head_dim 16"),
        ({"q": jnp.zeros((3, 5, 8))}, "5 query heads"),
        ({"v_pages": jnp.zeros((5, 2, 8, 8))}, "v_pages must be alike"),
        ({"v_pages": jnp.zeros((5, 2, 16, 8), jnp.bfloat16)}, "v_pages must be alike"),
        ({"page_table": jnp.zeros((3, 2))}, "page_table must be int32"),
        ({"page_table": jnp.zeros(3, jnp.int32)}, "page_table must have 2 axes"),
        ({"page_table": jnp.zeros((2, 2), jnp.int32)}, "3 rows of q"),
        ({"kv_len": jnp.zeros(4, jnp.int32)}, "3 rows of q"),
        ({"kv_len": jnp.zeros(3)}, "3 rows of q"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Any], named: str) -> None:
    check_decode(**decode_arguments())
    with pytest.raises(ValueError, match=named):
        check_decode(**decode_arguments(**changes))


@pytest.mark.parametrize("name", list(DECODE_ATTENTION))
def test_every_implementation_checks_its_arguments(name: str) -> None:
    with pytest.raises(ValueError, match="5 query heads"):
        DECODE_ATTENTION[name](**decode_arguments(q=jnp.zeros((3, 5, 8))), scale=SCALE)
