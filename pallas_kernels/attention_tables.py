"""The attention implementations by name: tables for decode, for prefill, and for what rotates and writes the pages."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array

from .decode_blocked import decode_blocked
from .decode_mosaic import decode_append_mosaic, decode_mosaic
from .decode_reference import decode_reference
from .prefill_blocked import prefill_blocked
from .prefill_mosaic import prefill_mosaic
from .prefill_reference import prefill_reference
from .rotate_append import decode_append_reference, rotate_append_reference
from .rotate_append_mosaic import rotate_append_mosaic

# (q, k_pages, v_pages, page_table, kv_len, *, scale) -> out; the contract is decode_reference's docstring.
# An implementation that cannot run on its arguments raises ValueError: nothing falls back.
DECODE_ATTENTION: dict[str, Callable[..., Array]] = {
    "reference": decode_reference,
    "blocked": decode_blocked,
    "mosaic": decode_mosaic,
}

# (q, k_pages, v_pages, page_table, q_start, q_len, kv_len, *, scale) -> out; prefill_reference's docstring.
PREFILL_ATTENTION: dict[str, Callable[..., Array]] = {
    "reference": prefill_reference,
    "blocked": prefill_blocked,
    "mosaic": prefill_mosaic,
}

# (qkv, cos, sin, k_pages, v_pages, page, offset) -> (q, k_pages, v_pages); rotate_append_reference's docstring.
ROTATE_APPEND: dict[str, Callable[..., tuple[Array, Array, Array]]] = {
    "reference": rotate_append_reference,
    "mosaic": rotate_append_mosaic,
}

# (qkv, cos, sin, k_pages, v_pages, page_table, kv_len, *, scale) -> (out, k_pages, v_pages); decode_append_reference's.
DECODE_APPEND: dict[str, Callable[..., tuple[Array, Array, Array]]] = {
    "reference": decode_append_reference,
    "mosaic": decode_append_mosaic,
}
