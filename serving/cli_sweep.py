"""`paddock sweep`: many layouts, each in a process of its own; `--explain`: one layout, without running it."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from .sweep_plan import Sweep


def run(args: argparse.Namespace) -> int:
    """Raises ValueError naming the flag, the key of the file, or (with --explain) what is wrong with the layout, and
    RuntimeError when no layout ran or some gave other tokens."""
    sweep = Sweep.from_args(args)
    if not 0 < args.timeout <= threading.TIMEOUT_MAX:
        raise ValueError(f"--timeout must be more than 0 s and no more than a timer takes, got {args.timeout}")
    if args.explain:
        print(_explain(sweep))
        return 0
    from .sweep import Results, Runner, run_sweep
    from .sweep_html import write_html
    from .sweep_report import shortcoming, sweep_table

    folder = Path(args.out)
    results = Results(folder / "rows.jsonl")
    with _unwound_by_sigterm():
        rows = run_sweep(sweep, results, Runner(folder / "logs", args.timeout), retry=args.retry_failed)
    write_html(rows, folder / "report.html")
    print(sweep_table(rows))
    print(f"\n{results.path}\n{folder / 'report.html'}", file=sys.stderr)
    if text := shortcoming(rows):
        raise RuntimeError(text)
    return 0


@contextlib.contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the program as an exception does, and so the process of the layout that runs."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _explain(sweep: Sweep) -> str:
    """Of the one layout that was asked for, in whatever spelling; of the single device where none was."""
    import jax

    from .explain import explain, step_buckets
    from .resolve import resolve
    from .sweep_worker import fit

    layout, *others = sweep.layouts[1:] or sweep.layouts
    if others:
        labels = ", ".join(layout.label for layout in sweep.layouts[1:])
        raise ValueError(f"--explain takes one layout at a time, but there are {len(others) + 1}: {labels}")
    config = fit(sweep.config, layout, list(sweep.cases), sweep.num_cpu_devices)
    programs = resolve(config, must_fit=False).programs
    compiled = {bucket: programs.lower(bucket).compile() for bucket in step_buckets(programs).values()}
    return explain(config.layout_text.mesh_config(jax.device_count()), programs, compiled)
