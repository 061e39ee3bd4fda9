"""Matrix products on Hopper: a few rows times a large matrix as fast as the matrix can be read, many with an epilogue
that XLA's products do not have.

A thread block per multiprocessor walks over tiles of the result. One warpgroup keeps a ring of tiles of `w` and `x` in
flight (TMA), the others multiply (wgmma), 64 rows each, in float32. Where a matrix has too few columns for all
multiprocessors, its rows are split as well, and what comes next adds the parts in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from .compat import bound
from .matmul_endings import Stored
from .matmul_kernel import walk
from .matmul_launch import launch, rings, tile, together
from .matmul_reference import check_matmul, finish
from .matmul_tiling import PIECES, ROWS, Tiling, check_tiling, choose_tiling, padded
from .scaled_rows import ScaledRows, rows_of

DTYPES = (jnp.bfloat16, jnp.float16)


def check_matmul_mosaic(dtype: Any, m: int, k: int, n: int) -> None:
    """Raise ValueError naming what `matmul_mosaic` cannot run on: x [m, k], w [k, n]."""
    if dtype not in DTYPES:
        raise ValueError(f"matmul_mosaic needs bfloat16 or float16: got {jnp.dtype(dtype).name}")
    choose_tiling(m, k, n)


# Traced once, not once a layer.
@functools.partial(jax.jit, static_argnames=("epilogue", "w_constant", "tiling", "interpret"))
def matmul_mosaic(
    x: Float[Array, "M _"] | ScaledRows,
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
        return finish(parts.sum(0), epilogue, residual, w.dtype)
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
    x: Float[Array, "M _"] | ScaledRows,
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
    check_matmul_mosaic(w.dtype, num_rows, depth, num_columns)
    tiling = tiling or choose_tiling(num_rows, depth, num_columns, swiglu=swiglu, summed=summed)
    check_tiling(tiling, num_rows, depth, num_columns)
    if tiling.share > 1:
        raise ValueError(f"{tiling} is shared by blocks, as matmul_add_mosaic's may be")
    swiglu = swiglu and tiling.split == 1
    dtype = jnp.dtype(jnp.float32) if tiling.split > 1 else w.dtype
    rows = tiling.rows * tiling.blocks * tiling.row_tiles(num_rows)
    if tiling.rows == ROWS and not interpret:
        # A copy ends at the array's last row; the rows after it are zeros. (The interpreter wants all of them, and
        # copies of more than 64 rows that end early took 1.6 times as long: H100, 192 rows.)
        rows = num_rows if num_rows < 8 else padded(num_rows)
    copied = min(tiling.rows, padded(rows))
    direct = tiling.split > 1 and rows % ROWS == 0
    sector = (8, 32) if direct else None
    widths = [columns // (2 if swiglu else 1) for _, columns, _ in tiling.bands(num_columns)]
    ending: dict[str, Any] = {"swiglu": swiglu, "copied": copied, "direct": direct, "interpret": interpret}
    common = {"tiling": tiling, "early": w_constant, "copied": copied, "interpret": interpret}
    body: Callable[..., None] = multiply
    squares: tuple[jax.Array, ...] = ()
    if isinstance(x, ScaledRows):
        if (
            tiling.rows * tiling.blocks > x.squares.shape[0]
            or tiling.row_tiles(num_rows) > 1
            or x.squares.shape[1] % PIECES
        ):
            raise ValueError(f"matmul_mosaic takes ScaledRows of matmul_add_mosaic: got squares {x.squares.shape}")
        body, squares, ending["eps"] = multiply_scaled, (x.squares,), x.eps
    return plgpu.kernel(
        bound(body, ending=ending, **common),
        out_type=jax.ShapeDtypeStruct((tiling.split, rows, num_columns // (2 if swiglu else 1)), dtype),
        scratch_types=dict(
            rings(tiling, num_columns, w.dtype, interpret),
            out_smem=together(
                [tile((tiling.warpgroups, *(sector or (ROWS, width))), dtype) for width in widths], interpret
            ),
        ),
        **launch(tiling, num_rows, num_columns, interpret),
    )(jnp.pad(rows_of(x), ((0, rows - num_rows), (0, 0))), w, *squares)


def multiply(x_ref: Any, w_ref: Any, out_ref: Any, *, ending: dict[str, Any], **rest: Any) -> None:
    """Kernel body. x_ref [rows, K]; w_ref [K, N]; out_ref [split, rows, N or N/2]."""
    walk(x_ref, w_ref, Stored(out_ref, **ending), **rest)


def multiply_scaled(
    x_ref: Any, w_ref: Any, squares_ref: Any, out_ref: Any, *, ending: dict[str, Any], **rest: Any
) -> None:
    """Kernel body of a product of `ScaledRows`. squares_ref [R, P]; the others as of `multiply`."""
    walk(x_ref, w_ref, Stored(out_ref, squares_ref=squares_ref, depth=x_ref.shape[1], **ending), **rest)
