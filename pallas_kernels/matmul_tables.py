"""The matrix products and what follows them by name, one table for each signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .add_norm_mosaic import add_norm_mosaic
from .add_norm_reference import add_norm_reference
from .matmul_add_mosaic import matmul_add_mosaic
from .matmul_mosaic import matmul_mosaic, matmul_parts_mosaic
from .matmul_reference import matmul_add_reference, matmul_parts_reference, matmul_reference

# (x, w, *, epilogue, residual, w_constant) -> out; the contract is matmul_reference's docstring.
# An implementation that cannot run on its arguments raises ValueError: nothing falls back.
MATMUL: dict[str, Callable[..., Any]] = {
    "reference": matmul_reference,
    "mosaic": matmul_mosaic,
}

# (x, w, *, w_constant) -> parts; matmul_parts_reference's docstring.
MATMUL_PARTS: dict[str, Callable[..., Any]] = {
    "reference": matmul_parts_reference,
    "mosaic": matmul_parts_mosaic,
}

# (x, w, residual, scale, *, eps, w_constant) -> (total, ScaledRows); matmul_add_reference's docstring.
MATMUL_ADD: dict[str, Callable[..., Any]] = {
    "reference": matmul_add_reference,
    "mosaic": matmul_add_mosaic,
}

# (parts, residual, scale, *, eps) -> (total, normed); add_norm_reference's docstring.
ADD_NORM: dict[str, Callable[..., Any]] = {
    "reference": add_norm_reference,
    "mosaic": add_norm_mosaic,
}
