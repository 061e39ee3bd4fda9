"""A plan as one HTML page that needs nothing else: tables, throughput against latency, bytes against the card."""

from __future__ import annotations

import dataclasses
import html
from pathlib import Path
from typing import Any

from .layout_plan import LayoutPlan, Plan
from .plan_report import plan_report
from .sweep_figures import memory_figure, speed_figure

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem }}
pre {{ overflow-x: auto; background: #f4f4f4; padding: 1rem }}
</style></head>
<body><h1>{title}</h1><p>{subtitle}</p>
<pre>{report}</pre>
{figures}
</body></html>
"""


def write_html(plan: Plan, path: Path, *, ttft: float | None = None, itl: float | None = None) -> None:
    """With the layouts that keep to `ttft` and `itl` seconds. Raises OSError where it cannot be written."""
    speed = speed_figure([row for layout in plan.layouts for row in _decode_rows(plan, layout)])
    speed.update_layout(title="Predicted throughput against latency (decode)")
    memory = memory_figure([_row(layout) for layout in plan.layouts])
    memory.add_hline(plan.memory_bytes / 2**20, line_dash="dash", annotation_text=f"memory of {plan.accelerator.name}")
    page = _PAGE.format(
        title=html.escape(f"{plan.model} on {plan.count} x {plan.accelerator.name}"),
        subtitle=html.escape(f"Predicted, not run. Figures of the card: {plan.accelerator.source}."),
        report=html.escape(plan_report(plan, ttft=ttft, itl=itl)),
        figures=speed.to_html(full_html=False, include_plotlyjs=True)
        + memory.to_html(full_html=False, include_plotlyjs=False),
    )
    path.write_text(page, encoding="utf-8")


def _row(layout: LayoutPlan) -> dict[str, Any]:
    """As the figures of a sweep have them."""
    return {
        "status": "ok",
        "label": f"{layout.mesh} ({layout.source})" if layout.source else str(layout.mesh),
        "num_devices": layout.num_devices,
        "bytes_per_device": dataclasses.asdict(layout.bytes_per_device),
    }


def _decode_rows(plan: Plan, layout: LayoutPlan) -> list[dict[str, Any]]:
    return [
        _row(layout)
        | {
            "decode_seconds": point.seconds,
            "decode_tokens_per_second": point.tokens_per_second,
            "batch_size": point.batch,
            "input_len": plan.demand.input_len,
        }
        for point in layout.decode
    ]
