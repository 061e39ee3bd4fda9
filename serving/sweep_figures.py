"""The plots of a sweep: speed, memory, communication, and which device holds which slice of an array."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

Row = Mapping[str, Any]
KINDS = {"weights": "weights", "kv_cache": "KV cache", "state": "state", "temp": "temp"}


def speed_figure(rows: Sequence[Row]) -> go.Figure:
    """Tokens per second of the whole batch against the time of a token, a curve for each layout, and the Pareto front:
    the points that no other beats in both."""
    measured = [row for row in rows if row["status"] == "ok" and row["decode_seconds"]]
    figure = go.Figure()
    front = pareto(measured)
    figure.add_scatter(
        x=[_ms(row) for row in front],
        y=[row["decode_tokens_per_second"] for row in front],
        mode="lines",
        line={"dash": "dot", "color": "gray", "shape": "hv"},
        name="Pareto front",
        hoverinfo="skip",
    )
    for label, mine in _by_label(measured).items():
        figure.add_scatter(
            x=[_ms(row) for row in mine],
            y=[row["decode_tokens_per_second"] for row in mine],
            mode="markers+lines",
            name=label,
            customdata=[[row["batch_size"], row["input_len"], row["num_devices"]] for row in mine],
            hovertemplate="batch %{customdata[0]}, prompt %{customdata[1]}, %{customdata[2]} devices"
            "<br>%{x:.3g} ms per token, %{y:,.0f} tokens/s",
        )
    return _titled(figure, "Throughput against latency (decode)", "ms per token of a sequence", "tokens/s of the batch")


def pareto(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other is faster than at the same throughput or better, fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["decode_seconds"], -row["decode_tokens_per_second"])):
        if not front or row["decode_tokens_per_second"] > front[-1]["decode_tokens_per_second"]:
            front.append(row)
    return front


def memory_figure(rows: Sequence[Row]) -> go.Figure:
    """Bytes on each device by kind, stacked, of each layout's largest case."""
    largest = {
        label: max((row["bytes_per_device"] for row in mine), key=lambda held: sum(held.values()))
        for label, mine in _by_label([row for row in rows if row["status"] == "ok"]).items()
    }
    figure = go.Figure()
    for kind, name in KINDS.items():
        figure.add_bar(x=list(largest), y=[held[kind] / 2**20 for held in largest.values()], name=name)
    figure.update_layout(barmode="stack")
    return _titled(figure, "Bytes on each device", "", "MiB")


def traffic_figure(rows: Sequence[Row]) -> go.Figure:
    """Bytes that each device sends in a decode step, by kind of collective, of each layout's first case."""
    first = {label: mine[0] for label, mine in _by_label([row for row in rows if row["status"] == "ok"]).items()}
    totals = {label: row["collectives"]["decode"] for label, row in first.items()}
    figure = go.Figure()
    for kind in sorted({total["kind"] for found in totals.values() for total in found}):
        mine = {label: [total for total in found if total["kind"] == kind] for label, found in totals.items()}
        figure.add_bar(
            x=list(mine),
            y=[sum(total["sent_bytes"] for total in found) / 2**10 for found in mine.values()],
            name=kind,
            customdata=[sum(total["count"] for total in found) for found in mine.values()],
            hovertemplate="%{customdata} × %{fullData.name}, %{y:,.3g} KiB",
        )
    figure.update_layout(barmode="stack")
    return _titled(figure, "Sent by each device in a decode step", "", "KiB")


def slice_figure(entry: Row) -> go.Figure:
    """An array as a grid of its pieces, each with the devices that hold it; `entry` is one of `explain.slices`."""
    *down, across = [i for i, shards in enumerate(entry["shards"]) if shards > 1] or [0]
    holders: dict[tuple[int, ...], list[int]] = {}
    for device, index in entry["devices"].items():
        holders.setdefault(tuple(start for start, _ in index), []).append(int(device))
    columns = _pieces(entry, across)
    lines = list(itertools.product(*(_pieces(entry, i) for i in down)))
    cells = [[_holders(holders, dict([*zip(down, line, strict=True), (across, x)])) for x in columns] for line in lines]
    figure = go.Figure(
        go.Heatmap(
            z=[[min(devices) for devices in line] for line in cells],
            x=[_span(entry, across, start) for start in columns],
            y=[
                ", ".join(_span(entry, i, start) for i, start in zip(down, line, strict=True)) or "all"
                for line in lines
            ],
            text=[["device " + ", ".join(map(str, sorted(devices))) for devices in line] for line in cells],
            texttemplate="%{text}",
            hovertemplate="%{y}<br>%{x}<br>%{text}<extra></extra>",
            colorscale="Turbo",
            opacity=0.6,
            showscale=False,
            xgap=3,
            ygap=3,
        )
    )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(type="category")
    return _titled(figure, f"{entry['name']} {entry['shape']}", "", "")


def _pieces(entry: Row, dimension: int) -> list[int]:
    """Where the pieces of a dimension start."""
    size, shards = entry["shape"][dimension], entry["shards"][dimension]
    return list(range(0, size, size // shards))


def _holders(holders: Mapping[tuple[int, ...], list[int]], starts: Mapping[int, int]) -> list[int]:
    return next(d for index, d in holders.items() if all(index[i] == start for i, start in starts.items()))


def _span(entry: Row, dimension: int, start: int) -> str:
    width = entry["shape"][dimension] // entry["shards"][dimension]
    return f"{entry['axes'][dimension] or f'axis {dimension}'} {start}:{start + width}"


def _by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["label"], []).append(row)
    return groups


def _ms(row: Row) -> float:
    return row["decode_seconds"] * 1000


def _titled(figure: go.Figure, title: str, x: str, y: str) -> go.Figure:
    figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="none", height=480)
    return figure
