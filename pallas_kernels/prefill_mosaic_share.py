"""Which items a thread block of the prefill kernel works on, and the sizes that its warpgroups agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # of q that a warpgroup multiplies at a time
BLOCK = 128  # tokens a step
COLUMNS = 64  # of head_dim in one swizzled copy
TILED = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(128))  # how products find 16-bit numbers in SMEM
PRODUCER = 2  # the warpgroup that loads; 0 and 1 multiply


def piece_of(page_size: int) -> int:
    """Tokens of one copy of keys or values: never across a page."""
    return BLOCK if page_size % BLOCK == 0 else min(page_size, 64)


@dataclass(frozen=True)
class Share:
    """A thread block's items: of the list of `work_items`, times the heads, every so many, back and forth."""

    items: Any  # int32 [5, M] and [2], in GMEM
    counts: Any
    heads: int
    head_dim: int
    pair: bool  # an item is ROWS rows of two heads, and not twice as many rows of one

    @property
    def tall(self) -> int:
        """Tiles of ROWS rows of an item below each other, one a warpgroup."""
        return 1 if self.pair else 2

    @property
    def wide(self) -> int:
        """Heads of an item, one a warpgroup."""
        return 2 if self.pair else 1

    @property
    def columns(self) -> list[Any]:
        """The slices of head_dim that copies take."""
        return [pl.ds(start, COLUMNS) for start in range(0, self.head_dim, COLUMNS)]

    @property
    def total(self) -> Any:
        """Items of all thread blocks that see tokens."""
        return self.counts[0] * (self.heads // self.wide)

    @property
    def total_with_gaps(self) -> Any:
        """Items of all thread blocks."""
        return self.counts[1] * (self.heads // self.wide)

    def index(self, turn: Any) -> Any:
        """The number in the list of what this thread block does at its turn."""
        block, blocks = lax.axis_index("block"), lax.axis_size("block")
        return turn * blocks + jnp.where(lax.rem(turn, 2) == 0, block, blocks - 1 - block)

    def turns(self, total: Any) -> Any:
        """How many of the first `total` items are this thread block's."""
        rounds = lax.div(total, lax.axis_size("block"))
        return rounds + (self.index(rounds) < total).astype(jnp.int32)

    def item(self, turn: Any, total: Any) -> tuple[Any, ...]:
        """(head, chunk, first row, rows, tokens, kv_len); from the total on, those of the last before it."""
        index = jnp.minimum(self.index(turn), total - 1)
        tiles = self.heads // self.wide
        number = lax.div(index, tiles)
        return lax.rem(index, tiles) * self.wide, *(self.items[field, number] for field in range(5))
