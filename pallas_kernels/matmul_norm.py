"""A product, its addition to the residual, and the norm of that for the next product: the end of half a layer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from .compat import mosaic_mode
from .matmul_mosaic import multiply
from .matmul_reference import check_matmul, matmul_reference
from .matmul_tiling import Tiling

LANES = 128  # threads of a warpgroup: a row is spread over them evenly


def matmul_add_norm_reference(
    x: Float[Array, "M _"], w: Float[Array, "_ D"], residual: Array, scale: Array, *, eps: float
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """(residual + x times w, the root-mean-square norm of that times `scale`), each [M, D] in x's dtype.

    Statistics are float32, of the rounded sum (RMSNorm: Zhang & Sennrich 2019). Raises ValueError where the arguments
    do not fit together.
    """
    check_add_norm(x, w, residual, scale)
    total = matmul_reference(x, w, residual=residual)
    wide = total.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, wide.astype(x.dtype) * scale[None]


@functools.partial(jax.jit, static_argnames=("eps", "tiling", "interpret"))  # traced once, not once a layer
def matmul_add_norm_mosaic(
    x: Float[Array, "M _"],
    w: Float[Array, "_ D"],
    residual: Array,
    scale: Array,
    *,
    eps: float,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """As `matmul_add_norm_reference`, in two kernels: the product, and one that adds its parts and norms the sum.

    Raises ValueError for what `matmul_mosaic` cannot run on, and for a D that is no multiple of 128.
    """
    check_add_norm(x, w, residual, scale)
    if w.shape[1] % LANES:
        raise ValueError(f"matmul_add_norm_mosaic needs w's columns to be a multiple of {LANES}: got {w.shape[1]}")
    parts = multiply(x, w, tiling=tiling, interpret=interpret)
    shaped = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    total, normed = plgpu.kernel(
        functools.partial(_add_norm_row, eps=eps),
        out_type=(shaped, shaped),
        grid=(x.shape[0],),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=mosaic_mode(interpret),
    )(parts, residual, scale)
    return total, normed


def _add_norm_row(parts: Any, residual: Any, scale: Any, total_ref: Any, normed_ref: Any, *, eps: float) -> None:
    """Kernel body, one row. parts [S, R, D]; residual, total_ref, normed_ref [M, D]; scale [D]."""
    row = lax.axis_index("row")
    total = residual[row].astype(jnp.float32)
    for part in range(parts.shape[0]):
        total = total + parts[part, row].astype(jnp.float32)
    rounded = total.astype(total_ref.dtype)
    total_ref[row] = rounded
    wide = rounded.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.sum(wide * wide) / wide.shape[0] + eps)
    normed_ref[row] = wide.astype(normed_ref.dtype) * scale[...]


def check_add_norm(x: Array, w: Array, residual: Array, scale: Array) -> None:
    """Raise ValueError unless the arguments of a product with addition and norm fit together."""
    check_matmul(x, w, "none", residual)
    if scale.shape != w.shape[1:] or scale.dtype != x.dtype:
        raise ValueError(f"scale must be {x.dtype}{w.shape[1:]}: got {scale.dtype}{scale.shape}")
