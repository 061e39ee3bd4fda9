"""A sweep's processes and its file of rows, with small scripts in the place of engines."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from paddock.serving import sweep
from paddock.serving.cli import main
from paddock.serving.engine_config import EngineConfig
from paddock.serving.sweep import Results, Runner, run_sweep
from paddock.serving.sweep_plan import Case, Sweep, SweepLayout

# Answers as its layout's name says, and counts its starts in a file beside it.
SCRIPT = """
import json, os, signal, sys
job = json.loads(sys.stdin.readline())
name = job["layout"]["name"]
with open(__file__ + ".starts", "a") as file:
    file.write((name or "single") + chr(10))
for case in job["cases"]:
    if name == "hangs":
        from paddock.serving.lifeline import end_with_parent
        end_with_parent()
        print(os.getpid(), file=sys.stderr, flush=True)
        signal.pause()
    if name == "dies" and case["batch_size"] == 2:
        print("no room for the cache", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "exits":
        sys.exit("it went wrong")
    if name == "refused":
        row = {"status": "refused", "error": "no such axis"}
    else:
        row = {"status": "ok", "error": None, "tokens": [[1, 2], [3, 4 if name == "differs" else 5]]}
    print(json.dumps({**case, **row}), flush=True)
"""


# `paddock sweep` with the script in the place of its worker.
PROGRAM = """
import functools, sys
from paddock.serving import sweep
from paddock.serving.cli import main
sweep.Runner = functools.partial(sweep.Runner, worker=(sys.executable, sys.argv[1]))
sys.exit(main(["sweep", *sys.argv[2:]]))
"""
MESHES = ["--meshes", "tensor=2"]


def wait_until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(SCRIPT)
    return path


def starts(script: Path) -> list[str]:
    return Path(f"{script}.starts").read_text().split()


def run(script: Path, *names: str, timeout: float = 60.0, **options: Any) -> list[dict[str, Any]]:
    named = [SweepLayout(mesh=f"tensor={size}", name=name) for size, name in enumerate(names, start=2)]
    sweep = Sweep(EngineConfig(), (SweepLayout(), *named), (Case(1, 8, 2), Case(2, 8, 2)))
    runner = Runner(script.parent / "logs", timeout, (sys.executable, str(script)))
    return run_sweep(sweep, Results(script.parent / "out" / "rows.jsonl"), runner, progress=False, **options)


def test_a_process_that_ends_badly_is_a_row(script: Path):
    rows = run(script, "dies", "exits", "refused", "works")
    assert [(row["label"], row["batch_size"], row["status"]) for row in rows] == [
        ("one device", 1, "ok"),
        ("one device", 2, "ok"),
        ("dies", 1, "ok"),
        ("dies", 2, "crashed"),
        ("exits", 1, "crashed"),
        ("exits", 2, "crashed"),
        ("refused", 1, "refused"),
        ("refused", 2, "refused"),
        ("works", 1, "ok"),
        ("works", 2, "ok"),
    ]
    assert rows[3]["error"] == "killed by signal 9, as Linux does when memory runs out: no room for the cache"
    assert rows[4]["error"] == "exited with code 1: it went wrong"
    assert rows[6]["error"] == "no such axis"


def test_a_time_out_is_a_row(script: Path):
    assert run(script, timeout=60)[0]["status"] == "ok"
    rows = run(script, "hangs", timeout=0.5)
    assert [row["status"] for row in rows] == ["ok", "ok", "timeout", "timeout"]
    assert rows[2]["error"] == "not done after 0.5 s"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_ends_with_the_sweep(script: Path, number: signal.Signals):
    """By the sweep's hand where it can, and of itself where the sweep is gone without a word."""
    script.write_text(SCRIPT.replace('name == "hangs"', "True"))
    folder = script.parent / "out"
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(script), "--out", str(folder), *MESHES]) as program:
        log = folder / "logs" / "one_device.log"
        wait_until(lambda: log.exists() and log.read_text().strip())
        worker = psutil.Process(int(log.read_text()))
        program.send_signal(number)
        assert program.wait(timeout=60) == (128 + number if number == signal.SIGTERM else -number)
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def test_a_sweep_without_a_result_fails(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    script.write_text(SCRIPT.replace('name == "refused"', "True"))
    monkeypatch.setattr(sweep, "Runner", functools.partial(Runner, worker=(sys.executable, str(script))))
    assert main(["sweep", "--out", str(script.parent / "out"), *MESHES]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "paddock: nothing ran: none of 2 rows is ok"


def test_tokens_are_compared_with_the_single_device(script: Path):
    rows = run(script, "works", "differs", "refused")
    assert [row["tokens_equal"] for row in rows[::2]] == [None, True, False, None]
    assert [row["sequences_equal"] for row in rows[::2]] == [None, 2, 1, None]


def test_without_a_single_device_nothing_is_compared(script: Path):
    script.write_text(SCRIPT.replace('name == "exits"', 'name in ("exits", "")'))
    rows = run(script, "works")
    assert [row["status"] for row in rows] == ["crashed", "crashed", "ok", "ok"]
    assert rows[2]["tokens_equal"] is None


def test_a_second_run_goes_on_where_the_first_ended(script: Path):
    first = run(script, "works", "dies")
    assert run(script, "works", "dies", "refused")[:6] == first
    assert starts(script) == ["single", "works", "dies", "refused"]


def test_rows_of_before_have_the_names_of_now(script: Path):
    run(script, "works")
    rows = run(script, "refused")  # the same mesh, which is not run again
    assert [(row["label"], row["name"], row["status"]) for row in rows[2:]] == [("refused", "refused", "ok")] * 2


def test_rows_of_before_are_compared_with_a_single_device_that_ran_later(script: Path):
    script.write_text(SCRIPT.replace('name == "exits"', 'name in ("exits", "")'))
    assert [row["tokens_equal"] for row in run(script, "works", "differs")] == [None] * 6
    script.write_text(SCRIPT)
    rows = run(script, "works", "differs", retry=True)
    assert [row["tokens_equal"] for row in rows[::2]] == [None, True, False]
    assert starts(script) == ["single", "works", "differs", "single"]


def test_what_failed_is_run_again_on_demand(script: Path):
    run(script, "works", "dies")
    script.write_text(SCRIPT.replace('name == "dies"', 'name == "nobody"'))
    rows = run(script, "works", "dies", retry=True)
    assert [row["status"] for row in rows] == ["ok"] * 6
    assert starts(script) == ["single", "works", "dies", "dies"]
    # The file keeps the failure; what was written last counts.
    assert Results(script.parent / "out" / "rows.jsonl").rows[rows[-1]["key"]]["status"] == "ok"


def test_half_a_row_at_the_end_is_forgotten(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    whole = json.dumps({"key": "a", "status": "ok"}) + "\n"
    path.write_text(whole + '{"key": "b", "sta')
    results = Results(path)
    assert list(results.rows) == ["a"]
    results.add({"key": "c"})
    assert list(Results(path).rows) == ["a", "c"]


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a"}\n[1]\n')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: not a row of a sweep"):
        Results(path)
