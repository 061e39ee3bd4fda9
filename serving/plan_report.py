"""A plan as text for people."""

from __future__ import annotations

from paddock.sharding.memory import show_bytes

from .layout_plan import DecodePoint, LayoutPlan, Plan
from .text_table import text_table


def plan_report(plan: Plan, *, ttft: float | None = None, itl: float | None = None) -> str:
    """Bytes and predicted times of every layout, and those that keep to `ttft` and `itl` seconds, cheapest first.

    Beside every predicted time stands whether measured figures or a datasheet's are behind it.
    """
    card, demand = plan.accelerator, plan.demand
    by_driver = demand.memory == "driver" and card.driver_bytes is not None
    head = (
        f"{plan.model} on {plan.count} x {card.name}: {show_bytes(plan.memory_bytes)} each "
        f"({'driver' if by_driver else 'datasheet'}), {demand.utilization or card.usable:.0%} used; "
        f"{show_bytes(plan.layouts[0].kv_bytes_per_token)} of KV cache a token; prompts of {demand.input_len:,}, "
        f"outputs of {demand.output_len:,} tokens"
    )
    parts = [head, _bytes_table(plan)]
    if any(layout.decode for layout in plan.layouts):
        parts.append(_times_table(plan))
    reasons = {layout.untimed for layout in plan.layouts if layout.untimed}
    for reason in sorted(reasons):
        meshes = "; ".join(str(layout.mesh) for layout in plan.layouts if layout.untimed == reason)
        parts.append(f"no times for {meshes}: {reason}")
    if ttft is not None or itl is not None:
        parts.append(_objectives(plan, ttft, itl))
    return "\n\n".join(parts)


def _bytes_table(plan: Plan) -> str:
    rows = []
    for layout in plan.layouts:
        held = layout.bytes_per_device
        cells = [show_bytes(n) for n in (held.weights, held.kv_cache, held.temp + held.state, held.total)]
        rows.append([str(layout.mesh), layout.fits, *cells, f"{layout.kv_tokens:,}", layout.sequences, layout.reason])
    heads = ("mesh", "fits", "weights", "KV cache", "temp", "total", "KV tokens", "sequences", "why")
    return text_table(heads, rows)


def _times_table(plan: Plan) -> str:
    rows = [
        [str(layout.mesh), _ms(layout.prefill_seconds), *_cells(point), layout.source]
        for layout in plan.layouts
        for point in layout.decode
    ]
    return text_table(("mesh", "prefill ms", "batch", "step ms", "tokens/s", "bound by", "figures"), rows)


def _objectives(plan: Plan, ttft: float | None, itl: float | None) -> str:
    limits = [f"{name} <= {value * 1000:g} ms" for name, value in (("TTFT", ttft), ("ITL", itl)) if value is not None]
    found = plan.meeting(ttft=ttft, itl=itl)
    if not found:
        return f"No layout meets {' and '.join(limits)}"
    rows = [
        [str(layout.mesh), layout.num_devices, _ms(layout.prefill_seconds), *_cells(point), layout.source]
        for layout, point in found
    ]
    heads = ("mesh", "devices", "prefill ms", "batch", "step ms", "tokens/s", "bound by", "figures")
    return f"Meet {' and '.join(limits)}, cheapest first:\n" + text_table(heads, rows)


def _cells(point: DecodePoint) -> list[object]:
    return [point.batch, _ms(point.seconds), f"{point.tokens_per_second:,.0f}", point.bound]


def _ms(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds * 1000:.4g}"


def unfit_sentence(plan: Plan, smallest: str) -> str:
    """Why nothing fits, by the layout that comes nearest."""

    def nearness(layout: LayoutPlan) -> tuple[int, int]:
        return layout.kv_tokens // layout.mesh.num_replicas, layout.available - layout.bytes_per_device.total

    nearest = max(plan.layouts, key=nearness)
    return (
        f"{plan.model} does not fit {plan.count} x {plan.accelerator.name} in any layout tried; mesh {nearest.mesh}: "
        f"{nearest.reason}. {smallest}"
    )
