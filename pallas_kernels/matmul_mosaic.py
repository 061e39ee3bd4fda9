"""Matrix products for decoding on Hopper: a few rows times a large matrix, as fast as the matrix can be read.

A thread block per multiprocessor walks over tiles of the result. One warpgroup keeps a ring of tiles of `w` and `x` in
flight (TMA), the others multiply (wgmma), 64 rows each, in float32. Where a matrix has too few columns for all
multiprocessors, its rows are split as well, and a second step adds the parts in a fixed order.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from .compat import mosaic_mode
from .matmul_pairs import split_pairs
from .matmul_reference import check_matmul, finish
from .matmul_tiling import DEPTH, ROWS, SMS, Tiling, choose_tiling

DTYPES = (jnp.bfloat16, jnp.float16)


def check_matmul_mosaic(dtype: Any, m: int, k: int, n: int, epilogue: str = "none") -> None:
    """Raise ValueError naming what `matmul_mosaic` cannot run on: x [m, k], w [k, n]."""
    if dtype not in DTYPES:
        raise ValueError(f"matmul_mosaic needs bfloat16 or float16: got {jnp.dtype(dtype).name}")
    choose_tiling(m, k, n, swiglu=epilogue == "swiglu")


@functools.partial(
    jax.jit, static_argnames=("transposed", "epilogue", "out_dtype", "tiling", "interpret")
)  # traced once, not once a layer
def matmul_mosaic(
    x: Float[Array, "M K"],
    w: Float[Array, "a b"],
    *,
    transposed: bool = False,
    epilogue: str = "none",
    residual: Float[Array, "M N"] | None = None,
    out_dtype: Any = None,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """As `matmul_reference`. Rows are independent of each other and their sums' order depends on the tiling alone.

    `tiling` overrides the choice; `interpret` runs the kernel on the CPU, for tests. Raises ValueError where the kernel
    cannot run: a dtype other than bfloat16 or float16, more than 256 rows, a K or N that is no multiple of 64, JAX
    older than 0.11 (but for `interpret`); and, from JAX's lowering, a platform that is no NVIDIA GPU.
    Splitting K so that few columns keep every multiprocessor busy is Stream-K's concern (arXiv 2301.03598).
    """
    check_matmul(x, w, transposed, epilogue, residual, out_dtype)
    rows, (depth, columns) = x.shape[0], w.shape[::-1] if transposed else w.shape
    check_matmul_mosaic(x.dtype, rows, depth, columns, epilogue)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    tiling = tiling or choose_tiling(rows, depth, columns, swiglu=epilogue == "swiglu")
    parts = _multiply(x, w, tiling, transposed, epilogue, out_dtype, interpret)[..., :rows, :]
    if tiling.split > 1:
        return finish(parts.sum(0), epilogue, residual, out_dtype)
    return parts[0] if residual is None else residual + parts[0]


def _multiply(
    x: Array, w: Array, tiling: Tiling, transposed: bool, epilogue: str, out_dtype: Any, interpret: bool
) -> Array:
    """[split, rows, N]: float32 parts without the epilogue, or the one part with it, in `out_dtype`."""
    swiglu = epilogue == "swiglu" and tiling.split == 1
    dtype = jnp.dtype(jnp.float32) if tiling.split > 1 else out_dtype
    columns = w.shape[0 if transposed else 1]
    blocks = 2 if tiling.pair else 1
    # Rows that are not copied stay undefined; they only ever reach rows of the result that nobody reads.
    copied = -(-x.shape[0] // 8) * 8 if tiling.rows == ROWS else tiling.rows
    x = jnp.pad(x, ((0, copied * blocks - x.shape[0]), (0, 0)))
    out_columns = tiling.columns // 2 if swiglu else tiling.columns
    direct = copied >= ROWS and dtype == jnp.float32  # `_store` needs no buffer then
    piece = next(size for size in (64, 32, 16) if out_columns % size == 0 and size * dtype.itemsize <= 128)
    pair: dict[str, Any] = {"cluster": (2,), "cluster_names": ("half",)} if tiling.pair else {}
    empty: Any = plgpu.Barrier(num_arrivals=tiling.warpgroups, num_barriers=tiling.stages)
    if tiling.pair:
        empty = plgpu.ClusterBarrier(
            collective_axes=("half",), num_arrivals=tiling.warpgroups, num_barriers=tiling.stages
        )
    w_tile = (tiling.columns, DEPTH) if transposed else (DEPTH, tiling.columns)
    # One swizzle for both operands: what divides a row of either tile.
    width = DEPTH if transposed or tiling.columns % DEPTH == 0 else DEPTH // 2
    operand = functools.partial(_tile, dtype=x.dtype, width=width)
    units = columns // tiling.columns * tiling.split
    return plgpu.kernel(
        functools.partial(
            _walk, tiling=tiling, units=units, transposed=transposed, swiglu=swiglu, copied=copied, interpret=interpret
        ),
        out_type=jax.ShapeDtypeStruct((tiling.split, copied * blocks, columns // (2 if swiglu else 1)), dtype),
        scratch_types=dict(
            x_smem=operand((tiling.stages, tiling.rows, DEPTH)),
            w_smem=operand((tiling.stages, *w_tile)),
            out_smem=_tile(
                (tiling.warpgroups, *((8, piece) if direct else (ROWS, out_columns))), dtype=dtype, width=piece
            ),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
            empty=empty,
        ),
        grid=(min(units, SMS // blocks),),
        grid_names=("worker",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=mosaic_mode(interpret),
        **pair,
    )(x, w)


def _tile(shape: tuple[int, ...], *, dtype: Any, width: int) -> Any:
    swizzle = width * jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(swizzle)))


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
    tiling: Tiling,
    units: int,
    transposed: bool,
    swiglu: bool,
    copied: int,
    interpret: bool,
) -> None:
    """Kernel body. x_ref [rows, K]; w_ref [K, N] or [N, K]; out_ref [split, rows, N or N/2]."""
    warpgroup, worker, workers = lax.axis_index("warpgroup"), lax.axis_index("worker"), lax.axis_size("worker")
    first_row = lax.axis_index("half") * tiling.rows if tiling.pair else 0
    across = w_ref.shape[0 if transposed else 1] // tiling.columns
    steps = x_ref.shape[1] // DEPTH // tiling.split
    mine = lax.div(units - worker + workers - 1, workers)
    total = mine * steps

    def tile_of(unit: Any) -> tuple[Any, Any]:
        """(column of tiles, part of K) of this worker's next tile: neighbours read neighbouring columns."""
        place = worker + unit * workers
        return lax.rem(place, across), lax.div(place, across)

    @pl.when(warpgroup == tiling.warpgroups)
    def _load() -> None:
        @pl.loop(0, mine)
        def _tile_by_tile(unit: Any) -> None:
            column, part = tile_of(unit)

            @pl.loop(0, steps)
            def _step_by_step(step: Any) -> None:
                done = unit * steps + step
                slot = lax.rem(done, tiling.stages)
                pl.when(done >= tiling.stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                depth = pl.ds((part * steps + step) * DEPTH, DEPTH)
                columns = pl.ds(column * tiling.columns, tiling.columns)
                source = w_ref.at[columns, depth] if transposed else w_ref.at[depth, columns]
                both = {"collective_axes": "half"} if tiling.pair else {}
                plgpu.copy_gmem_to_smem(source, w_smem.at[slot], full.at[slot], **both)
                rows = x_ref.at[pl.ds(first_row, copied), depth]
                plgpu.copy_gmem_to_smem(rows, x_smem.at[slot, pl.ds(0, copied)], full.at[slot])

    @pl.when(warpgroup < tiling.warpgroups)
    def _multiply_and_store() -> None:
        def release(done: Any) -> None:
            # Only to a load that is still to come: the last ones wait for nobody.
            slot = lax.rem(done, tiling.stages)
            pl.when(done + tiling.stages < total)(lambda: plgpu.barrier_arrive(empty.at[slot]))

        @pl.loop(0, mine)
        def _tile_by_tile(unit: Any) -> None:
            column, part = tile_of(unit)

            def multiply(sums: Any) -> Any:
                @pl.loop(0, steps)
                def _step_by_step(step: Any) -> None:
                    done = unit * steps + step
                    slot = lax.rem(done, tiling.stages)
                    plgpu.barrier_wait(full.at[slot])
                    rows = x_smem.at[slot, pl.ds(warpgroup * ROWS, ROWS)]
                    weights = w_smem.at[slot].transpose((1, 0)) if transposed else w_smem.at[slot]
                    plgpu.wgmma(sums, rows, weights)
                    plgpu.wgmma_wait(1)
                    pl.when(step > 0)(lambda: release(done - 1))

                return sums[...]

            sums = pl.run_scoped(multiply, plgpu.ACC((ROWS, tiling.columns), jnp.float32))
            release(unit * steps + steps - 1)
            if swiglu:
                gate, up = split_pairs(sums, interpret=interpret)
                sums = gate / (1 + jnp.exp(-gate)) * up
            _store(sums, out_ref.at[part], out_smem.at[warpgroup], first_row + warpgroup * ROWS, column, copied)

        plgpu.wait_smem_to_gmem(0)


def _store(sums: Any, out_ref: Any, buffer: Any, row: Any, column: Any, copied: int) -> None:
    """Rows `row` on and tile `column` of the result: float32 straight from registers, half of it through `buffer`."""
    rows, width = min(ROWS, copied), sums.shape[1]
    target = out_ref.at[pl.ds(row, rows), pl.ds(column * width, width)]
    if rows == ROWS and out_ref.dtype == jnp.float32:
        target[...] = sums  # four lanes fill a sector of 32 bytes, and nothing waits
        return
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    buffer[...] = sums.astype(buffer.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, rows)], target)
