"""The hot loops, each beside its plain reference. Start at `attention_tables`."""

from __future__ import annotations

from .add_norm_mosaic import check_add_norm_mosaic
from .all_reduce_mosaic import check_all_reduce_mosaic
from .all_reduce_tables import ALL_REDUCE, ALL_REDUCE_ADD_NORM
from .attention_tables import DECODE_APPEND, DECODE_ATTENTION, PREFILL_ATTENTION, ROTATE_APPEND
from .compat import mosaic_mode
from .decode_mosaic import check_mosaic
from .mailbox import MailboxShape
from .matmul_add_mosaic import check_matmul_add_mosaic
from .matmul_mosaic import check_matmul_mosaic
from .matmul_tables import ADD_NORM, MATMUL, MATMUL_ADD, MATMUL_PARTS
from .prefill_mosaic import check_prefill_mosaic
from .rotation import apply_rope, split_rotated
from .scaled_rows import ScaledRows

__all__ = [
    "ADD_NORM",
    "ALL_REDUCE",
    "ALL_REDUCE_ADD_NORM",
    "DECODE_APPEND",
    "DECODE_ATTENTION",
    "MATMUL",
    "MATMUL_ADD",
    "MATMUL_PARTS",
    "PREFILL_ATTENTION",
    "ROTATE_APPEND",
    "MailboxShape",
    "ScaledRows",
    "apply_rope",
    "check_add_norm_mosaic",
    "check_all_reduce_mosaic",
    "check_matmul_add_mosaic",
    "check_matmul_mosaic",
    "check_mosaic",
    "check_prefill_mosaic",
    "mosaic_mode",
    "split_rotated",
]
