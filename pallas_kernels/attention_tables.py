"""The attention implementations by name: one table for decode, one for prefill, one signature each."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array

from .decode_blocked import decode_blocked
from .decode_mosaic import decode_mosaic
from .decode_reference import decode_reference
from .prefill_blocked import prefill_blocked
from .prefill_reference import prefill_reference

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
}
