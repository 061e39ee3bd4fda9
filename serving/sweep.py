"""Running a sweep: a process for each layout, a row for each case, and nothing done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .sweep_plan import Case, Sweep, SweepLayout

Row = dict[str, Any]
WORKER = (sys.executable, "-m", "paddock.serving.sweep_worker")
# Lines of a crashed process's standard error that its row quotes.
LAST_WORDS = 5


class Results:
    """Rows in a file of JSON lines: each is written as soon as it is known, and the last of a key counts."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                # The process was killed while it wrote its last row.
                path.write_text(path.read_text(encoding="utf-8").removesuffix(line), encoding="utf-8")
                break
            try:
                row = json.loads(line)
                self.rows[row["key"]] = row
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number}: not a row of a sweep ({error})") from error

    def add(self, row: Row) -> None:
        self.rows[row["key"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@dataclasses.dataclass(frozen=True)
class Runner:
    """`timeout` seconds for each layout's process; its standard error goes to a file in `logs`."""

    logs: Path
    timeout: float
    worker: Sequence[str] = WORKER

    def run(self, sweep: Sweep, layout: SweepLayout, cases: Sequence[Case]) -> Generator[tuple[Case, Row], None, None]:
        """A row for every case, whatever happens to the process, which ends when this is closed."""
        job = {
            "config": dataclasses.asdict(sweep.config),
            "layout": dataclasses.asdict(layout),
            "cases": [dataclasses.asdict(case) for case in cases],
            "num_cpu_devices": sweep.num_cpu_devices,
        }
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{re.sub(r'[^A-Za-z0-9=.+-]+', '_', layout.label)}.log"
        left = list(cases)
        late = threading.Event()
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        with log.open("w") as stderr, subprocess.Popen(self.worker, stderr=stderr, **pipes) as process:
            timer = threading.Timer(self.timeout, _end, (process, late))
            timer.start()
            try:
                for line in _answers(process, job):
                    row = json.loads(line)
                    case = Case(**{field.name: row.pop(field.name) for field in dataclasses.fields(Case)})
                    left.remove(case)
                    yield case, row
                process.wait()
            finally:
                timer.cancel()
                process.kill()
        if left:
            overdue = {"status": "timeout", "error": f"not done after {self.timeout:g} s"}
            row = overdue if late.is_set() else _death(process.returncode, log)
            yield from ((case, dict(row)) for case in left)


def _answers(process: subprocess.Popen[str], job: Row) -> Iterator[str]:
    assert process.stdin
    assert process.stdout
    try:
        # Left open: a process whose input ends has lost its parent.
        print(json.dumps(job), file=process.stdin, flush=True)
    except BrokenPipeError:
        # One that died at once reads nothing: its exit code tells.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    yield from process.stdout


def _end(process: subprocess.Popen[str], late: threading.Event) -> None:
    late.set()
    process.kill()


def _death(code: int, log: Path) -> Row:
    said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    how = f"killed by signal {-code}" + (", as Linux does when memory runs out" if code == -9 else "")
    how = how if code < 0 else f"exited with code {code}"
    return {"status": "crashed", "error": ": ".join([how, " | ".join(said[-LAST_WORDS:])]) if said else how}


def run_sweep(
    sweep: Sweep, results: Results, runner: Runner, *, retry: bool = False, progress: bool = True
) -> list[Row]:
    """The row of every layout and case, in order; those that `results` already holds are not run again, unless they
    failed and `retry` is given."""

    def is_done(layout: SweepLayout, case: Case) -> bool:
        row = results.rows.get(sweep.key(layout, case))
        return row is not None and (row["status"] == "ok" or not retry)

    wanted = {layout: [case for case in sweep.cases if not is_done(layout, case)] for layout in sweep.layouts}
    total = len(sweep.layouts) * len(sweep.cases)
    with tqdm(total=total, initial=total - sum(map(len, wanted.values())), unit="row", disable=not progress) as bar:
        for layout, cases in wanted.items():
            if not cases:
                continue
            bar.set_description(layout.label)
            with contextlib.closing(runner.run(sweep, layout, cases)) as found:
                for case, row in found:
                    reference = results.rows.get(sweep.key(sweep.layouts[0], case), {})
                    results.add({**_head(sweep, layout, case), **row, **compare(row, reference, layout)})
                    bar.update()
    return [_row(sweep, layout, case, results) for layout in sweep.layouts for case in sweep.cases]


def _row(sweep: Sweep, layout: SweepLayout, case: Case, results: Results) -> Row:
    """As this sweep calls it, and compared with what the single device gave last: a row of an earlier sweep may have
    had another name, or nothing to be compared with."""
    row, reference = (results.rows[sweep.key(of, case)] for of in (layout, sweep.layouts[0]))
    return {**row, "label": layout.label, "name": layout.name, **compare(row, reference, layout)}


def _head(sweep: Sweep, layout: SweepLayout, case: Case) -> Row:
    return {
        "key": sweep.key(layout, case),
        "label": layout.label,
        **dataclasses.asdict(layout),
        "model": sweep.config.model or "bundled",
        **dataclasses.asdict(case),
    }


def compare(row: Row, reference: Row, layout: SweepLayout) -> Row:
    """`tokens_equal`: to the single device's; None when either did not run. `sequences_equal` of the batch are so."""
    mine, theirs = row.get("tokens"), reference.get("tokens")
    if layout.is_single_device or mine is None or theirs is None:
        return {"tokens_equal": None, "sequences_equal": None}
    return {
        "tokens_equal": mine == theirs,
        "sequences_equal": sum(a == b for a, b in zip(mine, theirs, strict=True)),
    }
