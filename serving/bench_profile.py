"""`paddock bench latency --profile`: a trace for XProf or Perfetto, and a table of a decode step's parts."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench_workload import Job, random_prompt

if TYPE_CHECKING:
    from .bucket import Bucket
    from .front import Front

# XLA runs op by op while it is profiled, unless told otherwise: that says which kernel is whose, but not when the GPU
# waits. So a second profile has the step compiled to run as it does when nobody looks.
AS_USUAL = {"xla_enable_command_buffers_during_profiling": True}
NUM_GAPS = 5


def check(jobs: Sequence[Job], folder: Path) -> None:
    """Raises ValueError, before there is an engine, when `folder` holds a profile or the jobs are too short for one."""
    from .step_trace import shortest_output

    if any(folder.rglob("*.xplane.pb")):
        raise ValueError(f"--profile: {folder} holds a profile already")
    shortest_output(jobs)


def profile(engine: Front, jobs: Sequence[Job], seed: int, folder: Path) -> dict[str, Any]:
    """Profiles decode steps of `jobs`, all running together, prints the table and returns what goes into the JSON.

    Writes to `folder`/parts and on a GPU `folder`/idle. What `check` and `decode_bucket` refuse cannot be profiled.
    """
    from .step_parts import part_floors, part_of_instruction, parts_of, parts_table
    from .step_trace import SETTLE, STEPS, StepTrace, record

    draw = random.Random(seed)
    prompts = [random_prompt(job, engine.vocab_size, draw) for job in jobs]
    executor = engine.replicas[0].executor
    bucket = decode_bucket(engine, len(jobs))
    record(engine, jobs, prompts, folder / "parts")
    trace = StepTrace.read(folder / "parts")
    if not trace.kernels:
        raise RuntimeError(f"{folder} holds no kernels: the profiler could not see this device")
    context = sum(job.input_len for job in jobs) / len(jobs) + SETTLE + STEPS / 2
    floors = part_floors(executor, len(jobs), context)
    parts = parts_of(trace, part_of_instruction(executor.compiled[bucket].as_text() or ""), floors)
    where = "kernels of the first GPU" if trace.on_gpu else "instructions on the CPU, all threads together; no floors"
    print(f"\nA decode step of {len(jobs)} sequences, bucket {bucket}, {trace.num_steps} steps: {where}")
    print(parts_table(parts))
    result: dict[str, Any] = {
        "bucket": str(bucket),
        "profiled_steps": trace.num_steps,
        "parts_us": {part.name: part.seconds * 1e6 for part in parts},
        "floors_us": {name: seconds * 1e6 for name, seconds in floors.items()},
    }
    if not trace.on_gpu:
        return result
    record_as_usual(engine, jobs, prompts, folder / "idle")
    trace = StepTrace.read(folder / "idle")
    result["gpu_idle"] = trace.idle_share()
    gaps = trace.gaps(NUM_GAPS)
    print(f"GPU idle {100 * trace.idle_share():.1f}%, command buffers on. Longest gaps:")
    for seconds, before, after in gaps:
        print(f"  {seconds * 1e6:8.1f} us between {before} and {after}")
    return {**result, "gaps_us": [[seconds * 1e6, before, after] for seconds, before, after in gaps]}


def record_as_usual(engine: Front, jobs: Sequence[Job], prompts: Sequence[list[int]], folder: Path) -> None:
    """`record`, with command buffers.

    The step's program has its results on the device meanwhile: a CUDA graph that copies into the host's memory failed
    under the profiler in all three tries (CUDA_ERROR_LAUNCH_FAILED, JAX 0.11.2, H100), others in one of some thirty.
    """
    from .step_trace import record

    executor, bucket = engine.replicas[0].executor, decode_bucket(engine, len(jobs))
    usual, on_device = executor.compiled[bucket], dataclasses.replace(executor.programs, results_in="device")
    executor.compiled[bucket] = on_device.compile_step(bucket, AS_USUAL)
    try:
        record(engine, jobs, prompts, folder)
    finally:
        executor.compiled[bucket] = usual


def decode_bucket(engine: Front, batch: int) -> Bucket:
    """What `batch` sequences decode in, all in one replica. Raises ValueError for several replicas or stages, or more
    sequences than run at once."""
    executor = engine.replicas[0].executor
    if len(engine.replicas) > 1 or executor.plan.stages.count > 1:
        raise ValueError("--profile: one replica without pipeline stages, so that there is one step to look at")
    if batch > executor.plan.num_slots:
        raise ValueError(f"--profile: {batch} sequences do not run at once, max_num_seqs is {executor.plan.num_slots}")
    if executor.buckets.single:
        return executor.buckets.all()[0]
    return next(bucket for bucket in reversed(executor.buckets.all()) if not bucket.chunks and bucket.decodes >= batch)
