"""Plots of made-up rows: what is on the Pareto front, which device holds what, and that the page carries it all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from paddock.serving.sweep_figures import memory_figure, pareto, slice_figure, speed_figure, traffic_figure
from paddock.serving.sweep_html import write_html
from paddock.serving.sweep_report import shortcoming, sweep_table

TOTAL = {"kind": "all-reduce", "part": "layers/mlp", "in_loop": False, "group_size": 2, "num_bytes": 1024}


def entry(name: str, axes: list[str], shape: list[int], shards: list[int], starts: list[list[int]]) -> dict[str, Any]:
    """`starts`: where each device's piece begins."""
    sizes = [size // count for size, count in zip(shape, shards, strict=True)]
    pieces = [[[a, a + n] for a, n in zip(start, sizes, strict=True)] for start in starts]
    return {
        "name": name,
        "axes": axes,
        "shape": shape,
        "shards": shards,
        "devices": {str(device): piece for device, piece in enumerate(pieces)},
    }


def row(label: str, ms: float, rate: float, **fields: Any) -> dict[str, Any]:
    return {
        "label": label,
        "model": "tiny",
        "status": "ok",
        "error": None,
        "device": "cpu",
        "platform": "cpu",
        "dtype": "float32",
        "num_devices": 4,
        "batch_size": 2,
        "input_len": 8,
        "bytes_per_device": {"weights": 2**20, "kv_cache": 2**19, "state": 0, "temp": 2**21},
        "collectives": {"prefill": [], "decode": [{**TOTAL, "count": 4, "sent_bytes": 4096}]},
        "prefill_seconds": 0.25,
        "decode_seconds": ms / 1000,
        "decode_rows": 2,
        "decode_tokens_per_second": rate,
        "roofline": None,
        "tokens_equal": True,
        "tokens": [[123454321]],
        "slices": [entry("head", ["vocab", "embed"], [8, 6], [2, 1], [[0, 0], [4, 0]])],
        **fields,
    }


FAILED = {
    "label": "x=</script>",
    "model": "tiny",
    "status": "refused",
    "error": "mesh x",
    "batch_size": 2,
    "input_len": 8,
    "tokens_equal": None,
}


def test_pareto_front():
    points = [(1.0, 100.0), (2.0, 300.0), (2.0, 250.0), (3.0, 200.0), (4.0, 900.0), (0.5, 50.0)]
    rows = [row(f"r{i}", ms, rate) for i, (ms, rate) in enumerate(points)]
    assert [found["label"] for found in pareto(rows)] == ["r5", "r0", "r1", "r4"]
    front, *layouts = speed_figure([*rows, FAILED]).data
    assert list(front.x) == [0.5, 1.0, 2.0, 4.0]
    assert [trace.name for trace in layouts] == [f"r{i}" for i in range(6)]


def test_memory_is_stacked_by_kind():
    larger = row("a", 1, 1, bytes_per_device={"weights": 2**20, "kv_cache": 2**22, "state": 0, "temp": 0})
    figure = memory_figure([row("a", 1, 1), larger, row("b", 1, 1), FAILED])
    assert figure.layout.barmode == "stack"
    assert {bar.name: list(bar.y) for bar in figure.data} == {
        "weights": [1, 1],
        "KV cache": [4, 0.5],
        "state": [0, 0],
        "temp": [0, 2],
    }


def test_traffic_by_kind_of_collective():
    (bar,) = traffic_figure([row("a", 1, 1), FAILED]).data
    assert (bar.name, list(bar.y), list(bar.customdata)) == ("all-reduce", [4], [4])


def test_pieces_of_an_array_that_two_axes_split():
    """Four devices: rows in two halves, columns in two."""
    picture = entry("qkv", ["embed", "q_heads", ""], [8, 4, 3], [2, 2, 1], [[0, 0, 0], [0, 2, 0], [4, 0, 0], [4, 2, 0]])
    (heat,) = slice_figure(picture).data
    assert [list(line) for line in heat.text] == [["device 0", "device 1"], ["device 2", "device 3"]]
    assert (list(heat.y), list(heat.x)) == (["embed 0:4", "embed 4:8"], ["q_heads 0:2", "q_heads 2:4"])


def test_pieces_that_several_devices_hold():
    picture = entry("down", ["mlp", "embed"], [8, 4], [2, 1], [[0, 0], [4, 0], [0, 0], [4, 0]])
    (heat,) = slice_figure(picture).data
    assert [list(line) for line in heat.text] == [["device 0, 2", "device 1, 3"]]
    whole = entry("norm", ["embed"], [8], [1], [[0], [0]])
    assert [list(line) for line in slice_figure(whole).data[0].text] == [["device 0, 1"]]


def test_table():
    lines = sweep_table(
        [row("a", 2.5, 800.0, roofline=0.75), row("b", 2, 1, tokens_equal=False, sequences_equal=1), FAILED]
    ).splitlines()
    assert lines[2].split()[:5] == ["a", "4", "2", "8", "ok"]
    assert lines[2].split()[-5:] == ["250", "2.5", "800", "75%", "yes"]
    assert lines[3].split()[-4:] == ["n/a", "1", "of", "2"]
    assert lines[-1] == "x=</script>: refused: mesh x"


def test_the_table_tells_a_batch_that_is_padded():
    even, padded = sweep_table([row("a", 2, 1), row("b", 2, 1, decode_rows=8)]).splitlines()[2:]
    assert even.split()[:5] == ["a", "4", "2", "8", "ok"]
    assert padded.split()[:7] == ["b", "4", "2", "(8", "rows)", "8", "ok"]


def test_a_sweep_without_a_result_or_with_other_tokens_falls_short():
    assert shortcoming([row("a", 1, 1), FAILED]) == ""
    assert shortcoming([FAILED, FAILED]) == "nothing ran: none of 2 rows is ok"
    others = [row(label, 1, 1, tokens_equal=False) for label in ("b", "b", "c")]
    assert shortcoming([row("a", 1, 1), *others, FAILED]) == "tokens differ from the single device's: b, c"


def test_page_holds_all_it_needs(tmp_path: Path):
    page = tmp_path / "report.html"
    write_html([row("a", 1, 100), row("b", 2, 50), FAILED], page)
    text = page.read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", text)
    parts = {name: json.loads(found) for name, found in re.findall(r'json" id="(\w+)">(.*?)</script>', text)}
    assert [found["label"] for found in parts["rows"]] == ["a", "b", "x=</script>"]
    assert "123454321" not in text  # the tokens are in rows.jsonl
    assert parts["figures"]["slices"]["b"]["head"]["data"][0]["text"] == [["device 0", "device 1"]]
    assert [trace["name"] for trace in parts["figures"]["speed"]["data"]] == ["Pareto front", "a", "b"]
    assert "x=&lt;/script&gt;" in text
