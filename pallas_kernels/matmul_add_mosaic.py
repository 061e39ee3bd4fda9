"""The product that ends a block on Hopper: it adds to the residual stream, and makes what the norm after that takes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from .compat import bound
from .matmul_endings import Added
from .matmul_kernel import walk
from .matmul_launch import launch, rings, tile
from .matmul_reference import check_matmul_add
from .matmul_tiling import ROWS, Tiling, check_ending, choose_ending, padded, square_rows
from .scaled_rows import ScaledRows


def check_matmul_add_mosaic(dtype: Any, m: int, k: int, n: int) -> None:
    """Raise ValueError naming what `matmul_add_mosaic` cannot run on: x [m, k], w [k, n]."""
    if dtype != jnp.bfloat16:
        raise ValueError(f"matmul_add_mosaic needs bfloat16: got {jnp.dtype(dtype).name}")
    choose_ending(m, k, n)


# Traced once, not once a layer.
@functools.partial(jax.jit, static_argnames=("eps", "w_constant", "tiling", "interpret"))
def matmul_add_mosaic(
    x: Float[Array, "M _"],
    w: Float[Array, "_ N"],
    residual: Float[Array, "M N"],
    scale: Float[Array, " N"],
    *,
    eps: float,
    w_constant: bool = False,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "M N"], ScaledRows]:
    """As `matmul_add_reference`, in one kernel; for 256 rows at most.

    `tiling` overrides the choice; `interpret` runs the kernel on the CPU, for tests. Raises ValueError as
    `matmul_mosaic` does, for more rows, and for a dtype other than bfloat16: rows before their division may be larger
    than float16 holds.
    """
    check_matmul_add(x, w, residual, scale)
    check_matmul_add_mosaic(x.dtype, x.shape[0], *w.shape)
    (num_rows, depth), num_columns = x.shape, w.shape[1]
    tiling = tiling or choose_ending(num_rows, depth, num_columns)
    check_ending(tiling, num_rows, depth, num_columns)
    rows = num_rows if num_rows < 8 else padded(num_rows)
    if interpret:
        rows = tiling.rows * tiling.blocks
    copied, width = min(tiling.rows, padded(rows)), tiling.columns // tiling.share
    line, float32 = tile((tiling.rows, width), x.dtype), jnp.dtype(jnp.float32)
    shared: dict[str, Any] = {}
    if tiling.share > 1:
        shared["parts"] = tile((tiling.share, tiling.warpgroups, ROWS, width), float32)
        shared["arrived"] = plgpu.Barrier(num_arrivals=tiling.share, num_barriers=tiling.warpgroups)
    common = {"tiling": tiling, "early": w_constant, "copied": copied, "interpret": interpret}
    padding = ((0, rows - num_rows), (0, 0))
    total, scaled, squares = plgpu.kernel(
        bound(multiply_add, **common),
        out_type=(
            jax.ShapeDtypeStruct((rows, num_columns), x.dtype),
            jax.ShapeDtypeStruct((rows, num_columns), x.dtype),
            jax.ShapeDtypeStruct((square_rows(num_rows), num_columns // width), float32),
        ),
        scratch_types=dict(
            rings(tiling, num_columns, x.dtype, interpret),
            lines=line,
            scaled=line,
            came=plgpu.Barrier(),
            **shared,
        ),
        **launch(tiling, num_rows, num_columns, interpret),
    )(jnp.pad(x, padding), w, jnp.pad(residual, padding), scale)
    return total[:num_rows], ScaledRows(scaled[:num_rows], squares, eps)


def multiply_add(
    x_ref: Any,
    w_ref: Any,
    residual_ref: Any,
    scale_ref: Any,
    total_ref: Any,
    scaled_ref: Any,
    squares_ref: Any,
    *,
    lines: Any,
    scaled: Any,
    came: Any,
    parts: Any = None,
    arrived: Any = None,
    **rest: Any,
) -> None:
    """Kernel body. x_ref [rows, K]; w_ref [K, N]; residual_ref, total_ref and scaled_ref [rows, N]; scale_ref [N];
    squares_ref [R, P]."""
    refs = residual_ref, scale_ref, total_ref, scaled_ref, squares_ref
    ending = Added(*refs, lines, came, scaled, parts, arrived, rest["tiling"].share, rest["copied"])
    walk(x_ref, w_ref, ending, out_smem=(None,), **rest)
