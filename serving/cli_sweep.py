"""`paddock sweep`: many layouts, each in a process of its own; `--explain`: one layout, without running it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .cli_flags import engine_config
from .sweep_plan import Case, Sweep, SweepLayout


def run(args: argparse.Namespace) -> int:
    """Raises ValueError naming the flag, the key of the file, or (with --explain) what is wrong with the layout."""
    if args.explain:
        print(_explain(args))
        return 0
    from .sweep import Results, Runner, run_sweep
    from .sweep_html import write_html
    from .sweep_report import sweep_table

    sweep = Sweep.from_args(args)
    folder = Path(args.out)
    results = Results(folder / "rows.jsonl")
    rows = run_sweep(sweep, results, Runner(folder / "logs", args.timeout), retry=args.retry_failed)
    write_html(rows, folder / "report.html")
    print(sweep_table(rows))
    print(f"\n{results.path}\n{folder / 'report.html'}", file=sys.stderr)
    return 0


def _explain(args: argparse.Namespace) -> str:
    from .explain import explain, step_buckets
    from .resolve import resolve
    from .sweep_worker import fit

    config = engine_config(args)
    lengths = args.input_lens or [128]
    cases = [Case(batch, length, args.output_len or 32) for batch in args.batch_sizes or [8] for length in lengths]
    layout = SweepLayout(config.layout_text.mesh, config.rules, config.layout)
    programs = resolve(fit(config, layout, cases, args.devices), must_fit=False).programs
    compiled = {name: programs.lower(bucket).compile() for name, bucket in step_buckets(programs).items()}
    return explain(programs, compiled)
