"""What stands between two products of a layer: the sum of parts and residual, and the norm for the next product."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from .compat import mosaic_mode

LANES = 128  # threads of a warpgroup: a row is spread over them evenly


def add_norm_reference(
    parts: Float[Array, "S R _"], residual: Float[Array, "M D"], scale: Float[Array, " _"], *, eps: float
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """(residual + sum of parts, the root-mean-square norm of that times `scale`), both in the residual's dtype.

    Rows of `parts` past the residual's are padding. Sums and statistics are float32; the norm is that of the rounded
    sum, as if the two were apart (RMSNorm: Zhang & Sennrich 2019). Raises ValueError where the arguments do not fit
    together.
    """
    check_add_norm(parts, residual, scale)
    total = (residual.astype(jnp.float32) + parts[:, : residual.shape[0]].astype(jnp.float32).sum(0)).astype(
        residual.dtype
    )
    wide = total.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, wide.astype(residual.dtype) * scale[None]


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))  # traced once, not once a layer
def add_norm_mosaic(
    parts: Float[Array, "S R _"],
    residual: Float[Array, "M D"],
    scale: Float[Array, " _"],
    *,
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """As `add_norm_reference`, in one kernel with a warpgroup for each row, where XLA has two.

    `interpret` runs it on the CPU, for tests. Raises ValueError for a D that is no multiple of 128, a residual and a
    scale of different dtypes, JAX older than 0.11 (but for `interpret`); and, from JAX's lowering, where there is no
    NVIDIA GPU.
    """
    check_add_norm(parts, residual, scale)
    num_parts, (rows, width) = parts.shape[0], residual.shape
    if width % LANES:
        raise ValueError(f"add_norm_mosaic needs rows of a multiple of {LANES}: got {width}")
    if residual.dtype != scale.dtype:
        raise ValueError(
            f"add_norm_mosaic needs residual and scale of one dtype: got {residual.dtype} and {scale.dtype}"
        )

    def kernel(parts_ref: Any, residual_ref: Any, scale_ref: Any, total_ref: Any, normed_ref: Any) -> None:
        row = lax.axis_index("row")
        total = residual_ref[row].astype(jnp.float32)
        for part in range(num_parts):
            total = total + parts_ref[part, row].astype(jnp.float32)
        rounded = total.astype(residual.dtype)
        total_ref[row] = rounded
        wide = rounded.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.sum(wide * wide) / width + eps)
        normed_ref[row] = wide.astype(residual.dtype) * scale_ref[...]

    shaped = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    return plgpu.kernel(
        kernel,
        out_type=(shaped, shaped),
        grid=(rows,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=mosaic_mode(interpret),
    )(parts, residual, scale)


def check_add_norm(parts: Array, residual: Array, scale: Array) -> None:
    """Raise ValueError unless the arguments of an addition with norm fit together."""
    if parts.ndim != 3 or parts.shape[1] < residual.shape[0] or parts.shape[2:] != residual.shape[1:]:
        raise ValueError(
            f"parts must have 3 axes (parts, at least {residual.shape[0]} rows, {residual.shape[-1]} columns): "
            f"got shape {parts.shape}"
        )
    if scale.shape != residual.shape[1:]:
        raise ValueError(f"scale must have shape {residual.shape[1:]}: got {scale.shape}")
