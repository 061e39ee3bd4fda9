"""`paddock bench throughput`: a batch of requests, all there from the start."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from .bench_offline import run_jobs, warm_up
from .bench_report import report, summary
from .bench_workload import PRESETS, Workload, parse_lengths
from .cli_engine import running_engine
from .cli_flags import engine_config
from .collect_env import describe_devices

if TYPE_CHECKING:
    from .front import Front

NUM_PROMPTS = 100


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for lengths that the model does not take."""
    workloads = PRESETS[args.workload] if args.workload else (_workload(args),)
    if args.num_prompts is not None:
        workloads = tuple(dataclasses.replace(workload, num_prompts=args.num_prompts) for workload in workloads)
    with running_engine(engine_config(args)) as engine:
        for workload in workloads:
            result = measure(engine, workload, args.seed)
            head = {"benchmark": "throughput", "workload": args.workload, "model": engine.model_name}
            report(f"Throughput of {engine.model_name}", {**head, "device": describe_devices(), **result})
    return 0


def measure(engine: Front, workload: Workload, seed: int) -> dict[str, Any]:
    """Run the workload once, after a short request that is not counted."""
    jobs = workload.jobs(seed)
    warm_up(engine, jobs[0])
    timings, duration = run_jobs(engine, jobs, seed, concurrency=workload.concurrency)
    return {"num_prompts": workload.num_prompts, **summary(timings, duration)}


def _workload(args: argparse.Namespace) -> Workload:
    lengths = parse_lengths(args.input_len, "--input-len"), parse_lengths(args.output_len, "--output-len")
    return Workload(NUM_PROMPTS, *lengths, concurrency=args.concurrency)
