"""One real sweep on virtual CPU devices, from the command line to the page, and the run after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paddock.serving.cli import main

# Three processes that each start JAX and compile.
pytestmark = pytest.mark.timeout(600)
CACHE = str(Path(__file__).parents[2] / "build" / "test-compile-cache")


@pytest.fixture(scope="module")
def flags(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("sweep")
    return [
        *("sweep", "--model", str(golden / "gqa"), "--devices", "4", "--out", str(folder), "--timeout", "240"),
        *("--meshes", "tensor=3", "pipe=2,tensor=2", "--batch-sizes", "2", "--input-lens", "12", "--output-len", "6"),
        *("--max-num-batched-tokens", "16", "--block-size", "4", "--compile-cache-dir", CACHE),
    ]


@pytest.fixture(scope="module")
def rows(flags: list[str]) -> dict[str, dict[str, Any]]:
    assert main(flags) == 0
    lines = (Path(flags[flags.index("--out") + 1]) / "rows.jsonl").read_text().splitlines()
    return {row["label"]: row for row in map(json.loads, lines)}


def test_one_row_for_each_layout(rows: dict[str, dict[str, Any]]):
    assert {label: row["status"] for label, row in rows.items()} == {
        "one device": "ok",
        "tensor=3": "refused",
        "pipe=2,tensor=2": "ok",
    }
    assert "does not divide over 3 shards; numbers of shards that do: 1, 2, 4, 8" in rows["tensor=3"]["error"]


def test_what_is_measured(rows: dict[str, dict[str, Any]]):
    split, single = rows["pipe=2,tensor=2"], rows["one device"]
    assert split["tokens_equal"] is True
    assert single["tokens_equal"] is None
    assert [len(tokens) for tokens in split["tokens"]] == [6, 6]
    for row in (split, single):
        assert (row["slots"], row["decode_rows"]) == (2, 2)
        assert 0 < row["decode_seconds"] < 60
        assert row["decode_tokens_per_second"] == pytest.approx(2 / row["decode_seconds"])
        assert row["prefill_tokens_per_second"] == pytest.approx(2 * 12 / row["prefill_seconds"])
        assert row["roofline"] is None  # n/a on a CPU
    assert split["num_devices"] == 4
    # Half the layers and half the heads; norms are whole at each stage.
    assert split["bytes_per_device"]["weights"] < 0.3 * single["bytes_per_device"]["weights"]
    kinds = {total["kind"] for total in split["collectives"]["decode"]}
    assert {"all-reduce", "collective-permute"} <= kinds
    assert single["collectives"] == {"prefill": [], "decode": []}
    assert {entry["name"] for entry in split["slices"]} >= {"embed", "layers.0.qkv", "head", "pages"}


def test_the_second_run_starts_no_process(
    flags: list[str],
    rows: dict[str, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    folder = Path(flags[flags.index("--out") + 1])
    before = (folder / "rows.jsonl").read_bytes()
    (folder / "report.html").unlink()
    monkeypatch.setattr("paddock.serving.sweep.subprocess.Popen", None)
    assert main(flags) == 0
    assert (folder / "rows.jsonl").read_bytes() == before
    table = capsys.readouterr().out
    for label, row in rows.items():
        assert any(line.startswith(label) and row["status"] in line for line in table.splitlines())
    assert '"label": "pipe=2,tensor=2"' in (folder / "report.html").read_text()
