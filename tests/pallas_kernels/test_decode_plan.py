"""The division of decode attention over thread blocks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from paddock.pallas_kernels.decode_plan import TILE_TOKENS, sharers, work_plan


def tiles_in(plan: np.ndarray, lengths: list[int], kv_heads: int) -> list[tuple[int, int, int]]:
    """Every (sequence, kv head, tile) of all shares in turn."""
    found = []
    for sequence, head, tile, count, _, _ in plan.tolist():
        for _ in range(count):
            found.append((sequence, head, tile))
            tile += 1
            if tile == max(1, -(-lengths[sequence] // TILE_TOKENS)):
                sequence, head, tile = sequence + (head + 1) // kv_heads, (head + 1) % kv_heads, 0
    return found


@pytest.mark.parametrize("workers", [1, 7, 264])
@pytest.mark.parametrize(("lengths", "kv_heads"), [([0, 1, 64, 65, 0, 1000], 2), ([0], 1), ([131072], 8), ([3] * 9, 3)])
def test_every_tile_is_done_once_in_order_and_shares_are_equal(lengths: list[int], kv_heads: int, workers: int) -> None:
    plan = np.asarray(work_plan(jnp.int32(lengths), kv_heads, workers, workers))
    assert plan.shape == (workers + 1, 6)
    assert not plan[-1].any()
    assert not plan[:, 5].any()
    tiles = [max(1, -(-length // TILE_TOKENS)) for length in lengths]  # an empty sequence's output is cleared by a tile
    every = [(b, k, t) for b, count in enumerate(tiles) for k in range(kv_heads) for t in range(count)]
    assert tiles_in(plan, lengths, kv_heads) == every
    assert plan[:, 3].max() == -(-len(every) // workers)
    assert plan[:-1, 4].tolist() == [
        lengths[sequence] if count else 0 for sequence, _, _, count, _, _ in plan[:-1].tolist()
    ]


@pytest.mark.parametrize("workers", [2, 7, 100])
@pytest.mark.parametrize(("lengths", "kv_heads"), [([0, 1, 64, 65, 0, 1000], 2), ([9000], 1), ([700] * 3, 3)])
def test_sharers_are_counted_alike_by_all_of_them(lengths: list[int], kv_heads: int, workers: int) -> None:
    plan = np.asarray(work_plan(jnp.int32(lengths), kv_heads, workers, workers))
    pieces: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # (worker, first tile, tiles) by (sequence, head)
    for worker, row in enumerate(plan.tolist()):
        for sequence, head, tile in tiles_in(np.asarray([row]), lengths, kv_heads):
            found = pieces.setdefault((sequence, head), [])
            if found and found[-1][0] == worker:
                found[-1] = (worker, found[-1][1], found[-1][2] + 1)
            else:
                found.append((worker, tile, 1))
    assert len(pieces) == len(lengths) * kv_heads
    share = int(plan[0, 3])
    for (sequence, _), found in pieces.items():
        tiles = max(1, -(-lengths[sequence] // TILE_TOKENS))
        assert sum(count for _, _, count in found) == tiles
        for worker, first, count in found if len(found) > 1 else ():
            owner, others = sharers(*(jnp.int32(x) for x in (worker, first, count, tiles, share)))
            assert (int(owner), int(others)) == (found[0][0], len(found) - 1)
