"""The Mosaic GPU prefill kernel in the CPU interpreter, on tiny shapes, and the list of its work."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paged_cases import dense_attention, make_case, random_queries, relative_error

from paddock.pallas_kernels.prefill_mosaic import prefill_mosaic
from paddock.pallas_kernels.prefill_mosaic_items import work_items

SCALE = 0.125
# (q_start, q_len, kv_len). Chunks out of order, at odd rows, with gaps between them; an unused one; one row after a
# full page; one that ends with a block; a prefix of several blocks.
CHUNKS = [(80, 70, 333), (0, 0, 5), (3, 9, 9), (20, 1, 65), (22, 40, 128)]


def rows_of_no_chunk(rows: int, chunks: list[tuple[int, int, int]]) -> np.ndarray:
    outside = np.ones(rows, bool)
    for first, count, _ in chunks:
        outside[first : first + count] = False
    return outside


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize(("rows", "chunks"), [(603, CHUNKS), (1000, [(1, 999, 2000)]), (64, [(0, 64, 64)]), (7, [])])
def test_work_items_cover_every_row_once_and_the_heavy_ones_come_first(
    rows: int, chunks: list[tuple[int, int, int]], tile: int
) -> None:
    chunks = [*chunks, (0, 0, 0)]
    items, counts = jax.jit(work_items, static_argnums=(3, 4))(*jnp.int32(chunks).T, rows, tile)
    live, count = (int(x) for x in counts)
    covered = np.full(rows, -1)
    for number, (chunk, first, height, tokens, kv_len) in enumerate(np.asarray(items).T[:count]):
        assert 0 < height <= tile
        assert (tokens > 0) == (number < live)
        assert (covered[first : first + height] == -1).all()
        if tokens:
            start, length, total = chunks[chunk]
            assert kv_len == total
            assert start <= first
            assert first + height <= start + length
            assert tokens == total - length + first - start + height
        covered[first : first + height] = chunk if tokens else -2
    wanted = np.full(rows, -2)
    for chunk, (first, length, _) in enumerate(chunks):
        wanted[first : first + length] = chunk
    np.testing.assert_array_equal(covered, wanted)
    seen = np.asarray(items)[3, :count]
    np.testing.assert_array_equal(seen, np.sort(seen)[::-1])


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10's interpreter hangs where warpgroups synchronize")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "dtype", "loudness"),
    [
        (4, 1, 64, 64, jnp.bfloat16, 1),  # two heads of a group at a time; a page a copy
        (3, 1, 64, 16, jnp.bfloat16, 1),  # groups that do not pair: 128 rows of a head at a time; small pages
        (2, 1, 128, 192, jnp.float16, 1),  # part of a page a copy
        (2, 1, 64, 64, jnp.bfloat16, 30),  # maxima that outgrow what the kernel tolerates before it rescales
    ],
)
def test_equals_dense_attention_in_a_poisoned_pool(
    heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: Any, loudness: int
) -> None:
    rows, lengths = 155, [total for _, _, total in CHUNKS]
    slots = -(-max(lengths) // page_size) + 1
    case = make_case(lengths, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, slots=slots, dtype=dtype)
    q = loudness * random_queries(rows, heads, head_dim, dtype)
    start, length, total = jnp.int32(CHUNKS).T
    out = prefill_mosaic(
        q, case.k_pages, case.v_pages, case.page_table, start, length, total, scale=SCALE, interpret=True
    )
    wanted = np.zeros(q.shape)
    for sequence, (first, count, seen) in enumerate(CHUNKS):
        for i in range(count):
            keys = case.keys[sequence][: seen - count + i + 1]
            values = case.values[sequence][: seen - count + i + 1]
            wanted[first + i] = dense_attention(q[first + i], keys, values, SCALE)
    assert out.dtype == dtype
    assert relative_error(out, wanted) <= 1e-2
    assert not np.asarray(out, np.float32)[rows_of_no_chunk(rows, CHUNKS)].any()


@pytest.mark.parametrize(
    ("dtype", "pages_dtype", "head_dim", "page_size", "named"),
    [
        (jnp.float32, jnp.float32, 64, 16, "float32"),
        (jnp.bfloat16, jnp.float16, 64, 16, "q and pages of one dtype: got bfloat16 and float16"),
        (jnp.bfloat16, jnp.bfloat16, 80, 16, "head_dim 64 or 128: got 80"),
        (jnp.bfloat16, jnp.bfloat16, 64, 8, "page size .* got 8"),
        (jnp.bfloat16, jnp.bfloat16, 64, 48, "page size .* got 48"),
        (jnp.bfloat16, jnp.bfloat16, 64, 96, "page size .* got 96"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(
    dtype: Any, pages_dtype: Any, head_dim: int, page_size: int, named: str
) -> None:
    pages, chunks = jnp.zeros((3, 2, page_size, head_dim), pages_dtype), jnp.zeros(2, jnp.int32)
    q, table = jnp.zeros((9, 4, head_dim), dtype), jnp.zeros((2, 2), jnp.int32)
    with pytest.raises(ValueError, match=named):
        prefill_mosaic(q, pages, pages, table, chunks, chunks, chunks, scale=SCALE, interpret=True)


def test_refused_where_there_is_no_gpu() -> None:
    pages, chunks = jnp.zeros((3, 2, 16, 64), jnp.bfloat16), jnp.zeros(2, jnp.int32)
    q, table = jnp.zeros((9, 4, 64), jnp.bfloat16), jnp.zeros((2, 2), jnp.int32)
    # From our check on JAX 0.10, from JAX's lowering for the CPU on later versions.
    with (
        pytest.raises(ValueError, match=r"JAX 0\.11 or newer|interpret mode"),
        jax.default_device(jax.devices("cpu")[0]),
    ):
        prefill_mosaic(q, pages, pages, table, chunks, chunks, chunks, scale=SCALE)
