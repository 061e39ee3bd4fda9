"""`paddock bench latency`: equal requests that start together, and how long their steps take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import bench_profile
from .bench_offline import run_jobs
from .bench_report import Timing, report, spread, summary
from .bench_workload import Workload, parse_lengths
from .cli_engine import running_engine
from .cli_flags import engine_config
from .collect_env import describe_devices

if TYPE_CHECKING:
    from .front import Front


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for lengths that the model does not take, and for what cannot be profiled."""
    lengths = parse_lengths(args.input_len, "--input-len"), parse_lengths(args.output_len, "--output-len")
    workload = Workload(args.batch_size, *lengths)
    if args.num_iters < 1 or args.num_iters_warmup < 0:
        raise ValueError("--num-iters must be at least 1 and --num-iters-warmup at least 0")
    jobs, folder = workload.jobs(args.seed), Path(args.profile) if args.profile else None
    if folder is not None:
        bench_profile.check(jobs, folder)
    with running_engine(engine_config(args)) as engine:
        if folder is not None:
            bench_profile.decode_bucket(engine, len(jobs))  # refuses what has no one step to look at
        result = measure(engine, workload, args.num_iters, args.num_iters_warmup, args.seed)
        if folder is not None:
            result |= bench_profile.profile(engine, jobs, args.seed, folder)
        head = {"benchmark": "latency", "model": engine.model_name, "device": describe_devices()}
        report(f"Latency of {engine.model_name}", {**head, **result})
    return 0


def measure(engine: Front, workload: Workload, iterations: int, warm_up: int, seed: int) -> dict[str, Any]:
    """The requests' latencies over all iterations; `batch` is the time of a whole batch, `itl` that of a step."""
    jobs = workload.jobs(seed)
    timings: list[Timing] = []
    batches: list[float] = []
    for iteration in range(warm_up + iterations):
        found, seconds = run_jobs(engine, jobs, seed + iteration, watch=True)
        if iteration >= warm_up:
            timings += found
            batches.append(seconds)
    result = summary(timings, sum(batches))
    return {"batch_size": workload.num_prompts, "iterations": iterations, **result, **spread("batch", batches)}
