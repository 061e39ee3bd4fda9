"""What becomes of a product's sums, in registers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .compat import load
from .early_launch import await_kernel_before
from .matmul_kernel import Tile
from .matmul_pairs import split_pairs
from .matmul_tiling import ROWS

COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # of a value for each column of an accumulator


@dataclasses.dataclass(frozen=True)
class Stored:
    """They are written, as they are or SwiGLU of them, to out_ref [split, rows, N or N/2].

    Rows of `ScaledRows` of `depth` columns, whose squares are in squares_ref [R, P], are divided before that.
    """

    out_ref: Any
    swiglu: bool
    copied: int
    direct: bool
    interpret: bool
    squares_ref: Any = None
    depth: int = 0
    eps: float = 0.0

    def load(self, row: Any, column: Any) -> None: ...

    def begin(self, row: Any) -> jax.Array | None:
        if self.squares_ref is None:
            return None
        await_kernel_before(self.interpret)  # while the first rows are on their way
        squares = jnp.sum(load(self.squares_ref.at[pl.ds(row, ROWS)], plgpu.Layout.WGMMA), axis=1)
        return lax.rsqrt(squares / self.depth + self.eps)

    def leave(self, sums: jax.Array, tile: Tile, begun: jax.Array | None) -> None:
        band = tile.band
        if begun is not None:
            sums = sums * lax.broadcast_in_dim(begun, sums.shape, (0,))
        if self.swiglu:
            gate, up = split_pairs(sums, interpret=self.interpret)
            sums = gate / (1 + jnp.exp(-gate)) * up
        width = sums.shape[1]
        place = pl.ds(band.first * width // band.columns + tile.column * width, width)
        target = self.out_ref.at[tile.part, pl.ds(tile.row, min(ROWS, self.copied)), place]
        if self.direct:
            target[...] = sums  # straight from registers: four lanes fill a sector of 32 bytes, and nothing waits
            return
        buffer = band.buffers.at[tile.warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffer[...] = sums.astype(buffer.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, min(ROWS, self.copied))], target)


@dataclasses.dataclass(frozen=True)
class Added:
    """They are added to the residual stream, and what the norm after that takes is made: see `matmul_add_mosaic`.

    A worker has one tile. Where blocks of a cluster `share` its depth each finishes as many of its columns, and gets
    the others' sums of those into its own memory.
    """

    residual_ref: Any
    scale_ref: Any
    total_ref: Any
    scaled_ref: Any
    squares_ref: Any
    lines: Any  # [rows, width]: the residual stream, then the total
    came: Any
    scaled: Any
    parts: Any  # [share, warpgroups, 64, width]
    arrived: Any
    share: int
    copied: int

    def load(self, row: Any, column: Any) -> None:
        lines = self.lines.at[pl.ds(0, self.copied)]
        plgpu.copy_gmem_to_smem(self.residual_ref.at[pl.ds(row, self.copied), self._place(column)], lines, self.came)

    def begin(self, row: Any) -> None: ...

    def leave(self, sums: jax.Array, tile: Tile, begun: jax.Array | None) -> None:
        width, warpgroup = self._width, tile.warpgroup
        if self.share > 1:
            member, arrived = lax.axis_index("share"), self.arrived.at[warpgroup]
            for other in range(self.share):
                theirs, mine = sums[:, other * width : (other + 1) * width], self.parts.at[member, warpgroup]
                plgpu.async_store_smem(theirs, mine, arrived, cluster_idx=jnp.int32(other), cluster_dim="share")
            plgpu.barrier_wait(arrived)
            sums = self.parts[0, warpgroup]
            for other in range(1, self.share):
                sums = sums + self.parts[other, warpgroup]
        place, copied = self._place(tile.column), min(ROWS, self.copied)
        plgpu.barrier_wait(self.came)
        lines, scaled = self.lines.at[pl.ds(warpgroup * ROWS, ROWS)], self.scaled.at[pl.ds(warpgroup * ROWS, ROWS)]
        total = (lines[...].astype(jnp.float32) + sums).astype(lines.dtype)
        wide = total.astype(jnp.float32)
        scale = load(self.scale_ref.at[place], COLUMNS).astype(jnp.float32)
        lines[...] = total
        scaled[...] = (wide * lax.broadcast_in_dim(scale, wide.shape, (1,))).astype(scaled.dtype)
        plgpu.commit_smem()
        for buffer, target in ((lines, self.total_ref), (scaled, self.scaled_ref)):
            plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, copied)], target.at[pl.ds(tile.row, copied), place])
        self.squares_ref[pl.ds(tile.row, ROWS), self._index(tile.column)] = jnp.sum(wide * wide, axis=1)

    @property
    def _width(self) -> int:
        return self.lines.shape[1]

    def _index(self, column: Any) -> Any:
        return column * self.share + lax.axis_index("share") if self.share > 1 else column

    def _place(self, column: Any) -> Any:
        return pl.ds(self._index(column) * self._width, self._width)
