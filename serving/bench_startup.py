"""`paddock bench startup`: how long it takes from the program's start to the first token."""

from __future__ import annotations

import argparse
import time
from typing import Any

import psutil

from .bench_report import report
from .cli_flags import engine_config


def run(args: argparse.Namespace) -> int:
    """One start, this process's own: run it twice to see what the cache of compiled programs gives."""
    config = engine_config(args)
    started = psutil.Process().create_time()
    result: dict[str, Any] = {"process_s": time.time() - started}

    begin = time.perf_counter()
    import jax  # noqa: F401

    from . import front  # noqa: F401

    result["import_s"] = time.perf_counter() - begin

    from .bench_offline import warm_up
    from .bench_workload import Job
    from .cli_engine import running_engine
    from .collect_env import describe_devices

    with running_engine(config) as engine:
        result |= {f"{phase}_s": seconds for phase, seconds in engine.startup_seconds.items()}
        result["ready_s"] = time.time() - started
        begin = time.perf_counter()
        warm_up(engine, Job(8, 1))
        result["first_token_s"] = time.perf_counter() - begin
        head = {"benchmark": "startup", "model": engine.model_name, "device": describe_devices()}
        report(f"Startup of {engine.model_name}", {**head, **result})
    return 0
