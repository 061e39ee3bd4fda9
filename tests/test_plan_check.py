"""benchmarks/plan_check.py on a small model: one row a point, kept, never repeated, and never one that was fitted."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from paddock.model.shapes import SHAPES
from paddock.serving.calibrate import CPU, point_name
from paddock.serving.speed_profile import shipped_profile


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    monkeypatch.setitem(SHAPES, "tiny", CPU.narrow)
    return importlib.import_module("plan_check")


def arguments(**changed: Any) -> argparse.Namespace:
    cache = Path(__file__).parent.parent / "build" / "test-compile-cache"
    usual = {"accelerator": "h100-80gb", "profile": None, "results": None, "seconds": None}
    return argparse.Namespace(**usual | {"compile_cache_dir": str(cache)} | changed)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_rows_are_measured_once(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(results=str(tmp_path / "rows.jsonl"))
    case = check.Case("tiny", 1, "", ((1, 40), (2, 40)), (32,))
    check.run([case], given, kv_cache_memory_bytes=2**22)
    first = last_line(capsys)
    in_bytes, *times = first["rows"]
    # CPU devices do not tell their memory, which is a row that says so.
    assert in_bytes["failed"] == "RuntimeError: these devices do not tell their memory"
    assert [(row["kind"], row["count"]) for row in times] == [("decode", 1), ("decode", 2), ("prefill", 32)]
    for row in times:
        assert row["failed"] == ""
        assert row["measured"] > 0
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    assert (first["points"], first["failed"]) == ({"bytes": 0, "times": 3}, 1)
    errors = sorted(abs(row["error"]) for row in times)
    assert (first["median_error"]["times"], first["largest_error"]["times"]) == (errors[1], errors[2])

    def no_engine(*args: Any, **options: Any) -> None:
        raise RuntimeError("not again")

    monkeypatch.setattr(check, "TimedEngine", no_engine)
    check.run([case], given)
    second = last_line(capsys)
    assert second["rows"][1:] == times
    assert second["rows"][0]["failed"] == "RuntimeError: not again"


def test_what_was_fitted_is_no_test(check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = point_name(dataclasses.replace(CPU.narrow, num_layers=1), "", ("decode", 2, 40))
    profile = tmp_path / "fitted.toml"
    profile.write_text(dataclasses.replace(shipped_profile("h100-80gb"), fitted=(name,)).to_toml())
    check.run([check.Case("tiny", 1, "", ((2, 40),), (32,))], arguments(profile=str(profile)))
    assert {row["failed"] for row in last_line(capsys)["rows"]} == {
        f"ValueError: the profile was fitted to {name}, which can be no test of it"
    }


def test_cases_that_would_start_too_late_say_so(check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    check.run([check.Case("tiny", 1, "", ((2, 40),), (32,))], arguments(seconds=-1.0))
    assert {row["failed"] for row in last_line(capsys)["rows"]} == {"out of time"}


def test_there_are_enough_points_of_both_shapes(check: Any) -> None:
    """And every case can be had: it fits, and its batches divide."""
    from paddock.serving.planner import plan

    for devices, cases in check.CASES.items():
        assert sum(len(case.decode) + len(case.prefill) for case in cases) >= check.ENOUGH
        assert {case.shape for case in cases} == {"llama-3.1-8b", "llama-3.1-70b"}
        for case in cases:
            most = max(batch * (context + 128) for batch, context in case.decode)
            sizes = {"max_num_seqs": case.batches[-1], "max_num_batched_tokens": case.chunks[-1]}
            (layout,) = plan(case.model, "h100-80gb", devices, mesh=case.mesh or "tensor=1", **sizes).layouts
            assert layout.kv_tokens >= most, case.name
            assert layout.decode, layout.untimed
