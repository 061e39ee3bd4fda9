"""A product, its addition to the residual, and the norm of that for the next product: the end of half a layer."""

from __future__ import annotations

import functools

import jax
from jaxtyping import Array, Float

from .add_norm_mosaic import add_norm_mosaic, check_add_norm_mosaic
from .add_norm_reference import add_norm_reference, check_add_norm
from .matmul_mosaic import multiply
from .matmul_reference import check_matmul, matmul_reference
from .matmul_tiling import Tiling


def matmul_add_norm_reference(
    x: Float[Array, "M _"], w: Float[Array, "_ D"], residual: Array, scale: Array, *, eps: float
) -> tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """(residual + x times w, the root-mean-square norm of that times `scale`), each [M, D] in x's dtype: see
    `add_norm_reference`. Raises ValueError where the arguments do not fit together."""
    check_matmul(x, w, "none", residual)
    check_add_norm(residual[None], residual, scale)
    return add_norm_reference(matmul_reference(x, w)[None], residual, scale, eps=eps)


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

    Raises ValueError for what `matmul_mosaic` or `add_norm_mosaic` cannot run on.
    """
    check_matmul(x, w, "none", residual)
    check_add_norm(residual[None], residual, scale)
    check_add_norm_mosaic(w.shape[1])
    parts = multiply(x, w, summed=True, tiling=tiling, interpret=interpret)
    return add_norm_mosaic(parts, residual, scale, eps=eps, interpret=interpret)
