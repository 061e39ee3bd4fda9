"""A sweep's rows as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paddock.sharding.memory import show_bytes

from .text_table import text_table

HEAD = (
    "layout",
    "devices",
    "batch",
    "prompt",
    "status",
    "weights",
    "cache",
    "temp",
    "collectives",
    "sent/step",
    "prefill ms",
    "decode ms",
    "tokens/s",
    "roofline",
    "same tokens",
)


def sweep_table(rows: Sequence[dict[str, Any]]) -> str:
    """Bytes are per device; collectives and what each device sends are those of a decode step, whose rows stand beside
    the batch where there are more of them. Errors follow below."""
    table = text_table(HEAD, [_cells(row) for row in rows])
    errors = {(row["label"], row["status"]): row["error"] for row in rows if row["status"] != "ok"}
    return "\n".join([table, *(f"\n{label}: {status}: {error}" for (label, status), error in errors.items())])


def shortcoming(rows: Sequence[dict[str, Any]]) -> str:
    """What is wrong with a sweep as a whole, in one line; empty where nothing is. A layout that cannot be had beside
    others that ran is a result."""
    if not any(row["status"] == "ok" for row in rows):
        return f"nothing ran: none of {len(rows)} rows is ok"
    others = dict.fromkeys(row["label"] for row in rows if row["tokens_equal"] is False)
    return f"tokens differ from the single device's: {', '.join(others)}" if others else ""


def decode_traffic(row: dict[str, Any]) -> tuple[int, int]:
    """Collectives of a decode step, and the bytes that each device sends in it."""
    totals = row["collectives"]["decode"]
    return sum(t["count"] for t in totals), sum(t["sent_bytes"] for t in totals)


def _cells(row: dict[str, Any]) -> list[object]:
    rows, batch = row.get("decode_rows"), row["batch_size"]
    padded = batch if rows in (None, batch) else f"{batch} ({rows} rows)"
    cells = [row["label"], row.get("num_devices"), padded, row["input_len"], row["status"]]
    if row["status"] != "ok":
        return [*cells, *[None] * (len(HEAD) - len(cells))]
    held, (count, sent) = row["bytes_per_device"], decode_traffic(row)
    decode, roofline = row["decode_seconds"], row["roofline"]
    return [
        *cells,
        *(show_bytes(held[kind]) for kind in ("weights", "kv_cache", "temp")),
        count,
        show_bytes(sent),
        row["prefill_seconds"] * 1000,
        None if decode is None else decode * 1000,
        row["decode_tokens_per_second"],
        "n/a" if roofline is None else f"{roofline:.0%}",
        f"{row['sequences_equal']} of {batch}" if row["tokens_equal"] is False else row["tokens_equal"],
    ]
