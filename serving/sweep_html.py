"""A sweep as one HTML page that needs nothing else: table, plots, and a picture of every layout's arrays."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from .sweep_figures import memory_figure, slice_figure, speed_figure, traffic_figure
from .sweep_report import sweep_table

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font-family: system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem }}
pre {{ overflow-x: auto; background: #f4f4f4; padding: 1rem }}
select {{ font: inherit; margin-right: 1rem }}
</style>
<script>{library}</script></head>
<body><h1>{title}</h1><p>{devices}</p>
<pre>{table}</pre>
<div id="speed"></div><div id="memory"></div><div id="traffic"></div>
<h2>Which device holds what</h2>
<p><label>layout <select id="layout"></select></label><label>array <select id="array"></select></label></p>
<div id="slices"></div>
<script type="application/json" id="rows">{rows}</script>
<script type="application/json" id="figures">{figures}</script>
<script>
const figures = JSON.parse(document.getElementById("figures").textContent);
for (const name of ["speed", "memory", "traffic"]) Plotly.newPlot(name, figures[name].data, figures[name].layout);
const [layout, array] = ["layout", "array"].map(id => document.getElementById(id));
const fill = (select, names) => {{
  const before = select.value;
  select.replaceChildren(...names.map(name => new Option(name, name, false, name === before)));
}};
const draw = () => {{
  const arrays = figures.slices[layout.value] || {{}};
  fill(array, Object.keys(arrays));
  const figure = arrays[array.value];
  if (figure) Plotly.react("slices", figure.data, figure.layout);
}};
fill(layout, Object.keys(figures.slices));
layout.addEventListener("change", draw);
array.addEventListener("change", draw);
draw();
</script></body></html>
"""


def write_html(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The page of these rows; tokens are left out of the data that it carries."""
    pictures = {
        row["label"]: {entry["name"]: _plain(slice_figure(entry)) for entry in row["slices"]}
        for row in rows
        if row["status"] == "ok"
    }
    figures = {
        "speed": _plain(speed_figure(rows)),
        "memory": _plain(memory_figure(rows)),
        "traffic": _plain(traffic_figure(rows)),
        "slices": pictures,
    }
    devices = sorted({f"{row['device']} ({row['platform']}), {row['dtype']}" for row in rows if row["status"] == "ok"})
    slim = [{key: value for key, value in row.items() if key not in ("tokens", "slices")} for row in rows]
    page = _PAGE.format(
        title=html.escape(f"Layouts of {', '.join(dict.fromkeys(str(row['model']) for row in rows))}"),
        devices=html.escape("; ".join(devices)),
        table=html.escape(sweep_table(rows)),
        library=get_plotlyjs(),
        rows=_embedded(slim),
        figures=_embedded(figures),
    )
    path.write_text(page, encoding="utf-8")


def _plain(figure: Any) -> dict[str, Any]:
    return json.loads(figure.to_json())


def _embedded(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value).replace("</", "<\\/")
