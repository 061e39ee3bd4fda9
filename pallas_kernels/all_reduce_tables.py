"""The all-reduces by name, one table for each signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .all_reduce_mosaic import all_reduce_add_norm_mosaic, all_reduce_mosaic
from .all_reduce_reference import all_reduce_add_norm_reference, all_reduce_reference

# (partial, *, axis_name, mailbox) -> sum; the contract is all_reduce_reference's docstring.
# An implementation that cannot run on its arguments raises ValueError: nothing falls back.
ALL_REDUCE: dict[str, Callable[..., Any]] = {
    "reference": all_reduce_reference,
    "mosaic": all_reduce_mosaic,
}

# (parts, residual, scale, *, eps, axis_name, mailbox) -> (total, normed); all_reduce_add_norm_reference's docstring.
ALL_REDUCE_ADD_NORM: dict[str, Callable[..., Any]] = {
    "reference": all_reduce_add_norm_reference,
    "mosaic": all_reduce_add_norm_mosaic,
}
