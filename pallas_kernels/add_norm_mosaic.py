"""Addition to the residual stream and norm as one Pallas kernel for NVIDIA GPUs (Mosaic GPU)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from .add_norm_reference import check_add_norm
from .compat import bound, mosaic_mode
from .early_launch import await_kernel_before, launch_kernel_after
from .prefetch import prefetch_vector

LANES = 128  # threads of a warpgroup: a row is spread over them evenly
MAX_COLUMNS = 16384  # of a row that fits the registers of a warpgroup
# Thread blocks if that makes their rows no more than these. With 64 blocks a step of 256 rows took 0.6% longer (H100).
BLOCKS, MOST_ROWS = 132, 4


def check_add_norm_mosaic(columns: int) -> None:
    """Raise ValueError naming what `add_norm_mosaic` cannot run on."""
    if columns % LANES or columns > MAX_COLUMNS:
        raise ValueError(f"add_norm_mosaic needs a multiple of {LANES} columns, {MAX_COLUMNS} at most: got {columns}")


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))  # traced once, not once a layer
def add_norm_mosaic(
    parts: Float[Array, "S R D"],
    residual: Float[Array, "M D"],
    scale: Float[Array, " D"],
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """As `add_norm_reference`, a thread block a row or a few, all read once: XLA makes three kernels of it.

    `interpret` runs the kernel on the CPU, for tests. Raises ValueError for a D that is no multiple of 128 or more than
    16384, and on JAX older than 0.11 (but for `interpret`); and, from JAX's lowering, on a platform that is no NVIDIA
    GPU.
    """
    check_add_norm(parts, residual, scale)
    check_add_norm_mosaic(residual.shape[1])
    shaped = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    rows = min(-(-residual.shape[0] // BLOCKS), max(1, MOST_ROWS * 4096 // residual.shape[1]))
    total, normed = plgpu.kernel(
        bound(_add_norm_rows, rows=rows, eps=eps, interpret=interpret),
        out_type=(shaped, shaped),
        grid=(-(-residual.shape[0] // rows),),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=mosaic_mode(interpret),
    )(parts, residual, scale)
    return total, normed


def _add_norm_rows(
    parts: Any, residual: Any, scale: Any, total_ref: Any, normed_ref: Any, *, rows: int, eps: float, interpret: bool
) -> None:
    """Kernel body, `rows` rows, by one warpgroup: Mosaic sums over several in the same memory. parts [S, R, D];
    residual, total_ref, normed_ref [M, D]; scale [D]."""
    launch_kernel_after(interpret)
    last, totals = residual.shape[0] - 1, []
    # The last block may do the last row again. All are read before any is written, so that memory is waited for once.
    places = [jnp.minimum(lax.axis_index("block") * rows + i, last) for i in range(rows)]
    if not interpret:
        # Since these were last used, as many weights have been read as push them out of the cache, and the product that
        # comes next will have asked the memory for its own before this kernel may read.
        for vector in (scale, *(residual.at[row] for row in places)):
            prefetch_vector(vector)
    await_kernel_before(interpret)
    for row in places:
        total = residual[row].astype(jnp.float32)
        for part in range(parts.shape[0]):
            total = total + parts[part, row].astype(jnp.float32)
        totals.append(total.astype(total_ref.dtype))
    weight = scale[...]
    for row, total in zip(places, totals, strict=True):
        total_ref[row] = total
        wide = total.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.sum(wide * wide) / wide.shape[0] + eps)
        normed_ref[row] = wide.astype(normed_ref.dtype) * weight
