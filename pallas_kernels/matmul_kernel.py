"""How a thread block walks over a product's tiles: one warpgroup keeps them coming, the others multiply."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .early_launch import await_kernel_before, launch_kernel_after
from .matmul_tiling import DEPTH, ROWS, TOGETHER, Tiling


@dataclasses.dataclass
class Band:
    """Columns of w that tiles of one width cut; a worker has `mine` of them, after `before` steps of others.

    The rings of all bands lie in the same memory, and so do the buffers for what leaves. A slot of a narrower ring ends
    before that of a wider one does, so that it is free when the wider one's slots up to there are, in whose order they
    are freed.
    """

    first: int
    columns: int
    tiles: int
    ring: Any
    buffers: Any
    before: Any
    mine: Any


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a warpgroup has multiplied: 64 rows from `row` on, tile `column` of a band, over part `part` of K."""

    band: Band
    row: Any
    column: Any
    part: Any
    warpgroup: Any


@runtime_checkable
class Ending(Protocol):
    """What becomes of the products."""

    def load(self, row: Any, column: Any) -> None:
        """Called once by the warpgroup that loads, when memory may be read: the worker's first tile is at `row`."""

    def begin(self, row: Any) -> jax.Array | None:
        """Called once by each multiplying warpgroup, whose rows begin at `row`; `leave` gets the result."""

    def leave(self, sums: jax.Array, tile: Tile, begun: jax.Array | None) -> None:
        """Called with the sums of each tile, float32 [64, columns]."""


def walk(
    x_ref: Any,
    w_ref: Any,
    ending: Ending,
    *,
    x_smem: Any,
    w_smem: Any,
    out_smem: Any,
    full: Any,
    empty: Any,
    stored: Any,
    tiling: Tiling,
    early: bool,
    copied: int,
    interpret: bool,
) -> None:
    """To be called in a kernel by all its warpgroups. x_ref [rows, K]; w_ref [K, N]."""
    launch_kernel_after(interpret)
    warpgroup, worker, workers = lax.axis_index("warpgroup"), lax.axis_index("worker"), lax.axis_size("worker")
    half = lax.axis_index("half") * tiling.rows if tiling.pair else worker * 0
    steps = x_ref.shape[1] // DEPTH // (tiling.split * tiling.share)
    height, down = tiling.rows * tiling.blocks, tiling.row_tiles(x_ref.shape[0])
    group = max(1, min(down, TOGETHER // (height * x_ref.shape[1] * x_ref.dtype.itemsize)))
    rings = zip(tiling.bands(w_ref.shape[1]), w_smem, out_smem, strict=True)
    bands = [Band(*band, ring, buffers, 0, 0) for band, ring, buffers in rings]
    total = worker * 0
    for band in bands:
        band.before, units = total, band.tiles * tiling.split * down
        band.mine = lax.div(units - worker + workers - 1, workers)
        total = total + band.mine * steps
    # Steps whose weights do not wait for whoever makes the rows.
    ahead = jnp.minimum(bands[0].mine, 1) * min(steps, tiling.stages) if early else 0

    def tile_of(band: Band, unit: Any) -> tuple[Any, Any, Any]:
        """(first row, column of tiles, part of K) of this worker's next tile: neighbours read the same columns of w, or
        neighbouring ones, and rows that stay in L2 until a group of them is through."""
        place = worker + unit * workers
        if tiling.share > 1:
            return half, place, lax.axis_index("share")
        if down == 1:
            return half, lax.rem(place, band.tiles), lax.div(place, band.tiles)
        first = lax.div(place, band.tiles * group) * group
        inside, rows = lax.rem(place, band.tiles * group), jnp.minimum(down - first, group)
        return half + (first + lax.rem(inside, rows)) * height, lax.div(inside, rows), 0

    def copy_weights(band: Band, unit: Any, step: Any) -> None:
        _, column, part = tile_of(band, unit)
        slot, depth = lax.rem(band.before + unit * steps + step, tiling.stages), (part * steps + step) * DEPTH
        source = w_ref.at[pl.ds(depth, DEPTH), pl.ds(band.first + column * band.columns, band.columns)]
        both: dict[str, Any] = {"collective_axes": "half"} if tiling.pair else {}
        plgpu.copy_gmem_to_smem(source, band.ring.at[slot], full.at[slot], **both)

    def load_band(band: Band) -> None:
        @pl.loop(0, band.mine)
        def _tile_by_tile(unit: Any) -> None:
            row, _, part = tile_of(band, unit)

            @pl.loop(0, steps)
            def _step_by_step(step: Any) -> None:
                done = band.before + unit * steps + step
                slot = lax.rem(done, tiling.stages)
                pl.when(done >= tiling.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                pl.when(done >= ahead)(lambda: copy_weights(band, unit, step))
                rows = x_ref.at[pl.ds(row, copied), pl.ds((part * steps + step) * DEPTH, DEPTH)]
                plgpu.copy_gmem_to_smem(rows, x_smem.at[slot, pl.ds(0, copied)], full.at[slot])

    def release(done: Any) -> None:
        # Only to a load that is still to come: the last ones wait for nobody.
        slot = lax.rem(done, tiling.stages)
        pl.when(done + tiling.stages < total)(lambda: plgpu.barrier_arrive(empty.at[slot]))

    def multiply_band(band: Band, begun: jax.Array | None) -> None:
        @pl.loop(0, band.mine)
        def _tile_by_tile(unit: Any) -> None:
            row, column, part = tile_of(band, unit)
            before = band.before + unit * steps

            def multiply(sums: Any) -> Any:
                @pl.loop(0, steps)
                def _step_by_step(step: Any) -> None:
                    slot = lax.rem(before + step, tiling.stages)
                    plgpu.barrier_wait(full.at[slot])
                    rows = x_smem.at[slot, pl.ds(warpgroup * ROWS, ROWS)]
                    plgpu.wgmma(sums, rows, band.ring.at[slot])
                    plgpu.wgmma_wait(1)
                    pl.when(step > 0)(lambda: release(before + step - 1))

                return sums[...]

            sums = pl.run_scoped(multiply, plgpu.ACC((ROWS, band.columns), jnp.float32))
            release(before + steps - 1)
            ending.leave(sums, Tile(band, row + warpgroup * ROWS, column, part, warpgroup), begun)

    @pl.when(warpgroup == tiling.warpgroups)
    def _load() -> None:
        pl.loop(0, ahead)(lambda step: copy_weights(bands[0], worker * 0, step))
        await_kernel_before(interpret)
        ending.load(half, worker)
        for band in bands:
            load_band(band)

    @pl.when(warpgroup < tiling.warpgroups)
    def _multiply_and_store() -> None:
        begun = ending.begin(half + warpgroup * ROWS)
        for band in bands:
            multiply_band(band, begun)
            if band is not bands[-1]:  # the next one's buffers lie across those of this one's warpgroups
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(stored)
                plgpu.barrier_wait(stored)
        plgpu.wait_smem_to_gmem(0)
