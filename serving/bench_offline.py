"""Requests through an engine in this process, a thread for each that runs at once."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .bench_report import Timing
from .bench_workload import Job, random_prompt
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .front import Front


def fixed_length(job: Job) -> SamplingParams:
    """Greedy, exactly the job's output, no text."""
    return SamplingParams(temperature=0.0, max_tokens=job.output_len, ignore_eos=True, detokenize=False)


def run_jobs(
    engine: Front, jobs: Sequence[Job], seed: int, *, concurrency: int | None = None, watch: bool = False
) -> tuple[list[Timing], float]:
    """Timings of all jobs and the seconds that they took together; at most `concurrency` at once.

    watch: look at every output as it comes, for the gaps between them; costs a thread switch for each.
    Raises ValueError for lengths that the engine does not take.
    """
    draw = random.Random(seed)
    prompts = [random_prompt(job, engine.vocab_size, draw) for job in jobs]

    def one(job: Job, prompt: list[int]) -> Timing:
        submitted = time.monotonic()
        stream = engine.submit(prompt, fixed_length(job), output_kind="delta" if watch else "final")
        times, count = [], 0
        for output in stream:
            times.append(time.monotonic())
            count += len(output.outputs[0].token_ids)
            if output.outputs[0].finish_reason == "abort":
                raise RuntimeError("the engine ended during the benchmark")
        # The engine's own clock: the thread that reads may be late.
        started = output.times.arrival
        first, last = output.times.first_token or times[0], output.times.last_token or times[-1]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return Timing(job.input_len, count, first - started, last - min(started, submitted), gaps)

    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(concurrency or len(jobs)) as pool:
        timings = list(pool.map(one, jobs, prompts))
    return timings, time.monotonic() - start


def warm_up(engine: Front, job: Job) -> None:
    """One short request, so that nothing is done for the first time while the clock runs."""
    run_jobs(engine, [dataclasses.replace(job, output_len=min(job.output_len, 4))], seed=1)
