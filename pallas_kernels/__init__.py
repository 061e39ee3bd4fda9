"""The hot loops, each beside its plain reference. Start at `attention_tables`."""

from __future__ import annotations

from .attention_tables import DECODE_APPEND, DECODE_ATTENTION, KV_APPEND, PREFILL_ATTENTION, ROTATE_APPEND
from .compat import mosaic_mode
from .decode_mosaic import check_mosaic
from .prefill_mosaic import check_prefill_mosaic
from .rotation import apply_rope, split_rotated

__all__ = [
    "DECODE_APPEND",
    "DECODE_ATTENTION",
    "KV_APPEND",
    "PREFILL_ATTENTION",
    "ROTATE_APPEND",
    "apply_rope",
    "check_mosaic",
    "check_prefill_mosaic",
    "mosaic_mode",
    "split_rotated",
]
