"""The hot loops, each beside its plain reference. Start at `attention_tables`."""

from __future__ import annotations

from .attention_tables import DECODE_ATTENTION, PREFILL_ATTENTION

__all__ = ["DECODE_ATTENTION", "PREFILL_ATTENTION"]
