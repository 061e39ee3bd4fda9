"""A matrix product with the epilogues of a Llama layer, written to be read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# What a product's columns go through; swiglu takes them in pairs: even gates, odd ups.
EPILOGUES = ("none", "swiglu")


def matmul_reference(
    x: Float[Array, "M K"],
    w: Float[Array, "a b"],
    *,
    transposed: bool = False,
    epilogue: str = "none",
    residual: Float[Array, "M N"] | None = None,
    out_dtype: Any = None,
) -> Float[Array, "M N"]:
    """x times `w` [K, N] (`transposed`: [N, K]), summed in float32; `out_dtype` defaults to x's.

    epilogue "swiglu" gives silu(even columns) * odd columns, half as many. `residual`, of the shape and dtype of what
    comes out, is added last. Raises ValueError where the arguments do not fit together.
    """
    check_matmul(x, w, transposed, epilogue, residual, out_dtype)
    product = jnp.einsum("mk,nk->mn" if transposed else "mk,kn->mn", x, w, preferred_element_type=jnp.float32)
    return finish(product, epilogue, residual, out_dtype or x.dtype)


def finish(product: Float[Array, "M N"], epilogue: str, residual: Array | None, out_dtype: Any) -> Float[Array, "M F"]:
    """The epilogue of a float32 product."""
    if epilogue == "swiglu":
        pairs = product.reshape(product.shape[0], -1, 2)
        product = jax.nn.silu(pairs[..., 0]) * pairs[..., 1]
    out = product.astype(out_dtype)
    return out if residual is None else residual + out


def check_matmul(x: Array, w: Array, transposed: bool, epilogue: str, residual: Array | None, out_dtype: Any) -> None:
    """Raise ValueError unless the arguments of a product fit together."""
    if x.ndim != 2 or w.ndim != 2:
        raise ValueError(f"x and w must have 2 axes each: got shapes {x.shape} and {w.shape}")
    if x.dtype != w.dtype:
        raise ValueError(f"x and w must have one dtype: got {x.dtype} and {w.dtype}")
    depth, columns = w.shape[::-1] if transposed else w.shape
    if x.shape[1] != depth:
        raise ValueError(f"x has {x.shape[1]} columns, but w {depth} rows{' (transposed)' if transposed else ''}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue must be one of {', '.join(EPILOGUES)}: got {epilogue!r}")
    if epilogue == "swiglu" and columns % 2:
        raise ValueError(f"swiglu takes pairs of columns, but w has {columns}")
    if residual is not None:
        shape = (x.shape[0], columns // 2 if epilogue == "swiglu" else columns)
        dtype = jnp.dtype(out_dtype or x.dtype)
        if residual.shape != shape or residual.dtype != dtype:
            raise ValueError(f"residual must be {dtype}{shape}: got {residual.dtype}{residual.shape}")
