"""The body of the product kernel: one warpgroup of a thread block keeps tiles coming, the others multiply."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .early_launch import await_kernel_before, launch_kernel_after
from .matmul_pairs import split_pairs
from .matmul_tiling import DEPTH, ROWS, TOGETHER, Tiling


def walk(
    x_ref: Any,
    w_ref: Any,
    out_ref: Any,
    *,
    x_smem: Any,
    w_smem: Any,
    out_smem: Any,
    full: Any,
    empty: Any,
    stored: Any,
    tiling: Tiling,
    swiglu: bool,
    early: bool,
    copied: int,
    direct: bool,
    interpret: bool,
) -> None:
    """Kernel body. x_ref [rows, K]; w_ref [K, N]; out_ref [split, rows, N or N/2]."""
    launch_kernel_after(interpret)
    warpgroup, worker, workers = lax.axis_index("warpgroup"), lax.axis_index("worker"), lax.axis_size("worker")
    half = lax.axis_index("half") * tiling.rows if tiling.pair else worker * 0
    steps = x_ref.shape[1] // DEPTH // tiling.split
    height, down = tiling.rows * tiling.blocks, tiling.row_tiles(x_ref.shape[0])
    group = max(1, min(down, TOGETHER // (height * x_ref.shape[1] * x_ref.dtype.itemsize)))
    rings = zip(tiling.bands(w_ref.shape[1]), w_smem, out_smem, strict=True)
    bands = [_Band(*band, ring, buffers, 0, 0) for band, ring, buffers in rings]
    total = worker * 0
    for band in bands:
        band.before, units = total, band.tiles * tiling.split * down
        band.mine = lax.div(units - worker + workers - 1, workers)
        total = total + band.mine * steps
    # Steps whose weights do not wait for whoever makes the rows.
    ahead = jnp.minimum(bands[0].mine, 1) * min(steps, tiling.stages) if early else 0

    def tile_of(band: _Band, unit: Any) -> tuple[Any, Any, Any]:
        """(first row, column of tiles, part of K) of this worker's next tile: neighbours read the same columns of w, or
        neighbouring ones, and rows that stay in L2 until a group of them is through."""
        place = worker + unit * workers
        if down == 1:
            return half, lax.rem(place, band.tiles), lax.div(place, band.tiles)
        first = lax.div(place, band.tiles * group) * group
        inside, rows = lax.rem(place, band.tiles * group), jnp.minimum(down - first, group)
        return half + (first + lax.rem(inside, rows)) * height, lax.div(inside, rows), 0

    def copy_weights(band: _Band, unit: Any, step: Any) -> None:
        _, column, part = tile_of(band, unit)
        slot, depth = lax.rem(band.before + unit * steps + step, tiling.stages), (part * steps + step) * DEPTH
        source = w_ref.at[pl.ds(depth, DEPTH), pl.ds(band.first + column * band.columns, band.columns)]
        both: dict[str, Any] = {"collective_axes": "half"} if tiling.pair else {}
        plgpu.copy_gmem_to_smem(source, band.ring.at[slot], full.at[slot], **both)

    def load_band(band: _Band) -> None:
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

    def multiply_band(band: _Band) -> None:
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
            if swiglu:
                gate, up = split_pairs(sums, interpret=interpret)
                sums = gate / (1 + jnp.exp(-gate)) * up
            row, width = row + warpgroup * ROWS, sums.shape[1]
            place = pl.ds(band.first * width // band.columns + column * width, width)
            target = out_ref.at[part, pl.ds(row, min(ROWS, copied)), place]
            if direct:
                target[...] = sums  # straight from registers: four lanes fill a sector of 32 bytes, and nothing waits
                return
            buffer = band.buffers.at[warpgroup]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            buffer[...] = sums.astype(buffer.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, min(ROWS, copied))], target)

    @pl.when(warpgroup == tiling.warpgroups)
    def _load() -> None:
        pl.loop(0, ahead)(lambda step: copy_weights(bands[0], worker * 0, step))
        await_kernel_before(interpret)
        for band in bands:
            load_band(band)

    @pl.when(warpgroup < tiling.warpgroups)
    def _multiply_and_store() -> None:
        for band in bands:
            multiply_band(band)
            if band is not bands[-1]:  # the next one's buffers lie across those of this one's warpgroups
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(stored)
                plgpu.barrier_wait(stored)
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass
class _Band:
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
