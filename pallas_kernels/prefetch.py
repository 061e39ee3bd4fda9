"""Asking the cache for what the next kernel reads: the memory goes on working while this one waits or ends."""

from __future__ import annotations

import math
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BOX_ROWS, BOX_COLUMNS = 16, 256  # of one request, whose sides have 256 entries at most


def prefetch(weight: Any, num_bytes: int, block: Any, num_blocks: int) -> None:
    """In a kernel, by one warpgroup: thread block `block` of `num_blocks` asks the L2 cache for its share of about
    `num_bytes` of weight [E, D], and does not wait.

    Bands of rows, evenly spread and as wide as the matrix, so that whoever multiplies any of its columns finds as much
    of them there as everybody else. Columns beyond a multiple of 256, and rows beyond one of 16, are left out.
    """
    rows, columns = weight.shape
    width = min(BOX_COLUMNS, columns)
    across, bands = columns // width, rows // BOX_ROWS
    taken = min(num_bytes // (BOX_ROWS * columns * weight.dtype.itemsize), bands)
    if not taken:
        return

    @pl.loop(0, lax.div(taken * across - block + num_blocks - 1, num_blocks))
    def _request(i: Any) -> None:
        box = block + i * num_blocks
        band = lax.div(lax.div(box, across) * bands, taken)
        plgpu.async_prefetch(weight.at[pl.ds(band * BOX_ROWS, BOX_ROWS), pl.ds(lax.rem(box, across) * width, width)])


def prefetch_vector(vector: Any) -> None:
    """In a kernel, by one warpgroup: ask the L2 cache for vector [D], D a multiple of 128, and do not wait.

    Nothing is read, so that it may be asked for while somebody still writes it.
    """
    width = math.gcd(vector.shape[0], BOX_COLUMNS)
    for start in range(0, vector.shape[0], width):
        plgpu.async_prefetch(vector.at[pl.ds(start, width)])
