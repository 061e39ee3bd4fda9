"""Matrix products on Hopper: a few rows times a large matrix as fast as the matrix can be read, many with an epilogue
that XLA's products do not have.

A thread block per multiprocessor walks over tiles of the result. One warpgroup keeps a ring of tiles of `w` and `x` in
flight (TMA), the others multiply (wgmma), 64 rows each, in float32. Where a matrix has too few columns for all
multiprocessors, its rows are split as well, and what comes next adds the parts in a fixed order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from .compat import bound, mosaic_mode
from .early_launch import await_kernel_before, launch_kernel_after
from .matmul_pairs import split_pairs
from .matmul_reference import check_matmul, finish
from .matmul_tiling import DEPTH, ROWS, SMS, TOGETHER, Tiling, check_tiling, choose_tiling, padded

DTYPES = (jnp.bfloat16, jnp.float16)


def check_matmul_mosaic(dtype: Any, m: int, k: int, n: int) -> None:
    """Raise ValueError naming what `matmul_mosaic` cannot run on: x [m, k], w [k, n]."""
    if dtype not in DTYPES:
        raise ValueError(f"matmul_mosaic needs bfloat16 or float16: got {jnp.dtype(dtype).name}")
    choose_tiling(m, k, n)


# Traced once, not once a layer.
@functools.partial(jax.jit, static_argnames=("epilogue", "w_constant", "tiling", "interpret"))
def matmul_mosaic(
    x: Float[Array, "M _"],
    w: Float[Array, "_ N"],
    *,
    epilogue: str = "none",
    residual: Array | None = None,
    w_constant: bool = False,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "M _"]:
    """As `matmul_reference`. Rows do not depend on each other; the order of sums depends on the tiling, so on M.

    `tiling` overrides the choice; `interpret` runs the kernel on the CPU, for tests. Raises ValueError where the kernel
    cannot run: a dtype other than bfloat16 or float16, a K or N that is no multiple of 64, JAX older than 0.11 (but for
    `interpret`); and, from JAX's lowering, a platform that is no NVIDIA GPU.
    """
    check_matmul(x, w, epilogue, residual)
    options: dict[str, Any] = {"w_constant": w_constant, "tiling": tiling, "interpret": interpret}
    parts = _multiply(x, w, swiglu=epilogue == "swiglu", **options)[:, : x.shape[0]]
    if parts.shape[0] > 1:  # unfinished: XLA makes one kernel of the sum and what follows
        return finish(parts.sum(0), epilogue, residual, x.dtype)
    return parts[0] if residual is None else residual + parts[0]


@functools.partial(jax.jit, static_argnames=("w_constant", "tiling", "interpret"))
def matmul_parts_mosaic(
    x: Float[Array, "M _"],
    w: Float[Array, "_ N"],
    *,
    w_constant: bool = False,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "S R N"]:
    """As `matmul_parts_reference`; see `matmul_mosaic`."""
    check_matmul(x, w, "none", None)
    return _multiply(x, w, summed=True, w_constant=w_constant, tiling=tiling, interpret=interpret)


def _multiply(
    x: Float[Array, "M _"],
    w: Float[Array, "_ N"],
    *,
    swiglu: bool = False,
    summed: bool = False,
    w_constant: bool,
    tiling: Tiling | None,
    interpret: bool,
) -> Float[Array, "S R _"]:
    """The product as S parts to be added up, float32 and without the epilogue if S > 1; rows past M are undefined.
    `summed`: see `choose_tiling`."""
    (num_rows, depth), num_columns = x.shape, w.shape[1]
    check_matmul_mosaic(x.dtype, num_rows, depth, num_columns)
    tiling = tiling or choose_tiling(num_rows, depth, num_columns, swiglu=swiglu, summed=summed)
    check_tiling(tiling, num_rows, depth, num_columns)
    swiglu = swiglu and tiling.split == 1
    dtype = jnp.dtype(jnp.float32) if tiling.split > 1 else x.dtype
    rows = tiling.rows * tiling.blocks * tiling.row_tiles(num_rows)
    if tiling.rows == ROWS and not interpret:
        # A copy ends at the array's last row; the rows after it are zeros. (The interpreter wants all of them, and
        # copies of more than 64 rows that end early took 1.6 times as long: H100, 192 rows.)
        rows = num_rows if num_rows < 8 else padded(num_rows)
    copied = min(tiling.rows, padded(rows))
    direct = tiling.split > 1 and rows % ROWS == 0
    bands = tiling.bands(num_columns)
    # The interpreter knows no memory that is used twice.
    together: Callable[[Any], Any] = tuple if interpret else lambda refs: plgpu.RefUnion(*refs)
    sector = (8, 32) if direct else None
    widths = [columns // (2 if swiglu else 1) for _, columns, _ in bands]
    units = max(tiles for _, _, tiles in bands) * tiling.split * tiling.row_tiles(num_rows)
    empty: dict[str, Any] = {"num_arrivals": tiling.warpgroups, "num_barriers": tiling.stages}
    cluster: dict[str, Any] = {"cluster": (2,), "cluster_names": ("half",)} if tiling.pair else {}
    return plgpu.kernel(
        bound(_walk, tiling=tiling, swiglu=swiglu, early=w_constant, copied=copied, direct=direct, interpret=interpret),
        out_type=jax.ShapeDtypeStruct((tiling.split, rows, num_columns // (2 if swiglu else 1)), dtype),
        scratch_types=dict(
            x_smem=_tile((tiling.stages, tiling.rows, DEPTH), x.dtype),
            w_smem=together([_tile((tiling.stages, DEPTH, columns), x.dtype) for _, columns, _ in bands]),
            out_smem=together([_tile((tiling.warpgroups, *(sector or (ROWS, width))), dtype) for width in widths]),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
            empty=plgpu.ClusterBarrier(collective_axes=("half",), **empty) if tiling.pair else plgpu.Barrier(**empty),
            stored=plgpu.Barrier(num_arrivals=tiling.warpgroups),
        ),
        grid=(min(units, SMS // tiling.blocks),),
        grid_names=("worker",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=mosaic_mode(interpret),
        **cluster,
    )(jnp.pad(x, ((0, rows - num_rows), (0, 0))), w)


def _tile(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the widest swizzle that divides its rows: 128 bytes, or 64 for half a tile of 64 columns."""
    width = math.gcd(128 // jnp.dtype(dtype).itemsize, shape[-1])
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width * jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _walk(
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
