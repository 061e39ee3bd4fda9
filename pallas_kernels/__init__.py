"""The hot loops, each beside its plain reference. Start at `attention_tables`."""

from __future__ import annotations

from .attention_tables import DECODE_ATTENTION, KV_APPEND, PREFILL_ATTENTION
from .compat import mosaic_mode
from .decode_mosaic import check_mosaic
from .prefill_mosaic import check_prefill_mosaic

__all__ = ["DECODE_ATTENTION", "KV_APPEND", "PREFILL_ATTENTION", "check_mosaic", "check_prefill_mosaic", "mosaic_mode"]
