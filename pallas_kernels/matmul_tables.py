"""The matrix products by name, with one signature."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array

from .matmul_mosaic import matmul_mosaic
from .matmul_reference import matmul_reference

# (x, w, *, transposed, epilogue, residual, out_dtype) -> out; the contract is matmul_reference's docstring.
# An implementation that cannot run on its arguments raises ValueError: nothing falls back.
MATMUL: dict[str, Callable[..., Array]] = {
    "reference": matmul_reference,
    "mosaic": matmul_mosaic,
}
