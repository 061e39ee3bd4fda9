"""`paddock bench startup`: how long it takes from the program's start to the first token.

process_s is Python's own start, import_s JAX and ours; resolve_s, load_s and compile_s are the engine's phases, ready_s
all until then; first_token_s is the warm-up, one request. Of compile_s, lower_s is the one thread that traces and
lowers, or waits for processes that do; read_thread_s and xla_thread_s (reading programs from the cache; XLA's compiler
or JAX's own cache) are sums over threads that work beside it. Then how many programs were found ready, had to be
lowered, were lowered by other processes, and had to be compiled. host_gib is the most memory that this process had,
those that lower beside it not counted; device_gib what a device holds by what was allocated, and device_in_use_gib what
the fullest one's allocator says (not on CPU).
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from typing import Any

import psutil

from .bench_report import report
from .cli_flags import engine_config

# What the operating system counts a process's largest memory in, bytes.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def run(args: argparse.Namespace) -> int:
    """One start, this process's own: run it twice to see what the cache of compiled programs gives."""
    config = engine_config(args)
    started = psutil.Process().create_time()
    result: dict[str, Any] = {"process_s": time.time() - started}

    begin = time.perf_counter()
    import jax

    from . import front  # noqa: F401

    result["import_s"] = time.perf_counter() - begin

    from .bench_offline import warm_up
    from .bench_workload import Job
    from .cli_engine import running_engine
    from .collect_env import GIB, describe_devices

    with running_engine(config) as engine:
        result |= {f"{phase}_s": seconds for phase, seconds in engine.startup_seconds.items()}
        result["ready_s"] = time.time() - started
        compiling = engine.compiling
        result |= {
            "lower_s": compiling.lower_seconds,
            "read_thread_s": compiling.read_seconds,
            "xla_thread_s": compiling.compile_seconds,
            "programs_found": compiling.num_found,
            "programs_lowered": compiling.num_lowered,
            "programs_exported": compiling.num_exported,
            "programs_compiled": compiling.num_compiled,
        }
        begin = time.perf_counter()
        warm_up(engine, Job(8, 1))
        result["first_token_s"] = time.perf_counter() - begin
        used = [stats["bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
        result |= {
            "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / GIB,
            "device_gib": sum(engine.bytes_per_device.values()) / GIB,
            **({"device_in_use_gib": max(used) / GIB} if used else {}),
        }
        head = {"benchmark": "startup", "model": engine.model_name, "device": describe_devices()}
        report(f"Startup of {engine.model_name}", {**head, **result})
    return 0
