"""The hot loops, each beside its plain reference. Start at `attention_tables`."""

from __future__ import annotations

from .all_reduce_mosaic import check_all_reduce_mosaic
from .all_reduce_tables import ALL_REDUCE, ALL_REDUCE_ADD_NORM
from .attention_tables import DECODE_ATTENTION, KV_APPEND, PREFILL_ATTENTION
from .compat import mosaic_mode
from .decode_mosaic import check_mosaic
from .mailbox import MailboxShape
from .prefill_mosaic import check_prefill_mosaic

__all__ = [
    "ALL_REDUCE",
    "ALL_REDUCE_ADD_NORM",
    "DECODE_ATTENTION",
    "KV_APPEND",
    "PREFILL_ATTENTION",
    "MailboxShape",
    "check_all_reduce_mosaic",
    "check_mosaic",
    "check_prefill_mosaic",
    "mosaic_mode",
]
