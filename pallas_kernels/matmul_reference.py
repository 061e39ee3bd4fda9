"""A matrix product with the epilogues of a Llama layer, written to be read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .scaled_rows import ScaledRows, divide, rows_of, scale_rows

# What a product's columns go through; swiglu takes them in pairs: even gates, odd ups.
EPILOGUES = ("none", "swiglu")


def matmul_reference(
    x: Float[Array, "M _"] | ScaledRows,
    w: Float[Array, "_ N"],
    *,
    epilogue: str = "none",
    residual: Array | None = None,
    w_constant: bool = False,
) -> Float[Array, "M _"]:
    """x [M, K] times w [K, N], summed in float32, in x's dtype.

    epilogue "swiglu" gives silu(even columns) * odd columns, half as many (Shazeer 2020). `residual`, of the shape and
    dtype of what comes out, is added last. `w_constant` promises that w is an argument of the program, so that a kernel
    may read it before the kernels before it have ended. Raises ValueError where the arguments do not fit together.
    """
    check_matmul(x, w, epilogue, residual)
    rows = rows_of(x)
    product = divide(jnp.matmul(rows, w, preferred_element_type=jnp.float32), x)
    return finish(product, epilogue, residual, rows.dtype)


def matmul_parts_reference(
    x: Float[Array, "M _"], w: Float[Array, "_ N"], *, w_constant: bool = False
) -> Float[Array, "S R N"]:
    """The product as S parts of R rows, at least M, for who adds parts up anyway (ADD_NORM, ALL_REDUCE_ADD_NORM): in
    float32 if there are several, and rows past M are undefined. Here it is whole. `w_constant`: see
    `matmul_reference`."""
    return matmul_reference(x, w)[None]


def matmul_add_reference(
    x: Float[Array, "M _"],
    w: Float[Array, "_ N"],
    residual: Float[Array, "M N"],
    scale: Float[Array, " N"],
    *,
    eps: float,
    w_constant: bool = False,
) -> tuple[Float[Array, "M N"], ScaledRows]:
    """(residual + x times w, that on its way through a norm with `scale` and `eps`), in x's dtype; sums are float32.
    `w_constant`: see `matmul_reference`."""
    check_matmul_add(x, w, residual, scale)
    product = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    total = (residual.astype(jnp.float32) + product).astype(x.dtype)
    return total, scale_rows(total, scale, eps)


def finish(
    product: Float[Array, "M N"], epilogue: str, residual: Array | None, dtype: jnp.dtype
) -> Float[Array, "M _"]:
    """The epilogue of a float32 product."""
    if epilogue == "swiglu":
        pairs = product.reshape(product.shape[0], -1, 2)
        product = jax.nn.silu(pairs[..., 0]) * pairs[..., 1]
    out = product.astype(dtype)
    return out if residual is None else residual + out


def check_matmul(x: Array | ScaledRows, w: Array, epilogue: str, residual: Array | None) -> None:
    """Raise ValueError unless the arguments of a product fit together."""
    x = rows_of(x)
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"x [M, K] and w [K, N] do not fit together: got shapes {x.shape} and {w.shape}")
    if x.dtype != w.dtype:
        raise ValueError(f"x and w must have one dtype: got {x.dtype} and {w.dtype}")
    if epilogue not in EPILOGUES:
        raise ValueError(f"epilogue must be one of {', '.join(EPILOGUES)}: got {epilogue!r}")
    columns = w.shape[1]
    if epilogue == "swiglu" and columns % 2:
        raise ValueError(f"swiglu takes pairs of columns, but w has {columns}")
    shape = (x.shape[0], columns // 2 if epilogue == "swiglu" else columns)
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
        raise ValueError(f"residual must be {x.dtype}{shape}: got {residual.dtype}{residual.shape}")


def check_matmul_add(x: Array, w: Array, residual: Array, scale: Array) -> None:
    """Raise ValueError unless the arguments of a product that ends a block fit together."""
    check_matmul(x, w, "none", residual)
    if scale.shape != w.shape[1:] or scale.dtype != x.dtype:
        raise ValueError(f"scale must be {x.dtype}{w.shape[1:]}: got {scale.dtype}{scale.shape}")
