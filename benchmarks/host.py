"""What a decode step costs on the host, and how long the GPU waits for it.

    python benchmarks/host.py
    python benchmarks/host.py --model "" --load-format auto --max-model-len 512 --batch-sizes 2    (bundled model)

`python_us` is the CPU time of the engine's thread a step but for `launch_us`, which it spends inside the compiled call,
in XLA (waiting for the device takes none); both are read in that thread, between the tokens of one sequence. On a CPU
parts of the model run in that call too. `idle` is the share of a profile's middle in which no kernel ran on the first
GPU, with command buffers as without a profiler (`paddock bench latency --profile` says more; none on CPU). The last
line is JSON.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from offline import Row, as_program, make_parser, open_llm, report

from paddock.serving import LLM
from paddock.serving.bench_offline import fixed_length
from paddock.serving.bench_profile import record_as_usual
from paddock.serving.bench_workload import Job, random_prompt
from paddock.serving.step_trace import StepTrace

# Tokens at both ends that do not count: some sequences are still in prefill, or have ended. Requests come one by one,
# so that a batch may begin, and end, over a dozen steps.
EDGE = 32


class Launches:
    """CPU seconds that the calling thread has spent in compiled calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.thread_time()
            result = fn(*arguments)
            self.seconds += time.thread_time() - start
            return result

        return call


@contextlib.contextmanager
def launches_of(llm: LLM) -> Iterator[Launches]:
    """Counts all calls of the engine's programs meanwhile."""
    compiled = llm.engine.replicas[0].executor.compiled
    launches, programs = Launches(), dict(compiled)
    compiled.update((key, launches.timed(program)) for key, program in programs.items())
    try:
        yield launches
    finally:
        compiled.update(programs)


class Marks:
    """Times of one sequence's tokens, taken in the engine's thread."""

    def __init__(self, launches: Launches):
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.launch: list[float] = []
        self._launches = launches

    def __call__(self, _: Any) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.thread_time())
        self.launch.append(self._launches.seconds)

    def per_step(self, times: list[float]) -> float:
        """Seconds a token over the middle of the sequence: several tokens that come at once count as one step each."""
        middle = times[EDGE : len(times) - EDGE]
        return (middle[-1] - middle[0]) / (len(middle) - 1)


def run(llm: LLM, jobs: list[Job], draw: random.Random, launches: Launches) -> Marks:
    """One batch; the marks are those of its last sequence."""
    marks = Marks(launches)
    streams = []
    for job in jobs:
        prompt = random_prompt(job, llm.engine.vocab_size, draw)
        on_event = marks if job is jobs[-1] else None
        kind = "delta" if on_event else "final"  # a "final" output brings one event, at its end
        streams.append(llm.engine.submit(prompt, fixed_length(job), output_kind=kind, on_event=on_event))
    for stream in streams:
        for _ in stream:
            pass
    return marks


def idle_share(llm: LLM, jobs: list[Job], draw: random.Random) -> float | None:
    """Share of decode in which the first GPU runs nothing; None without one."""
    if jax.default_backend() != "gpu":
        return None
    prompts = [random_prompt(job, llm.engine.vocab_size, draw) for job in jobs]
    with tempfile.TemporaryDirectory() as folder:
        record_as_usual(llm.engine, jobs, prompts, Path(folder))
        return StepTrace.read(Path(folder)).idle_share()


def measure(llm: LLM, batch: int, input_len: int, output_len: int, reps: int, draw: random.Random) -> Row:
    # Objects of their own: the last one is told from the others by identity.
    jobs = [Job(input_len, output_len) for _ in range(batch)]
    with launches_of(llm) as launches:
        run(llm, jobs, draw, launches)
        marks = [run(llm, jobs, draw, launches) for _ in range(reps)]
    launch = [mark.per_step(mark.launch) for mark in marks]
    python = [mark.per_step(mark.cpu) - inside for mark, inside in zip(marks, launch, strict=True)]
    return {
        "B": batch,
        "step_ms": statistics.median(mark.per_step(mark.wall) for mark in marks) * 1e3,
        "python_us": statistics.median(python) * 1e6,
        "launch_us": statistics.median(launch) * 1e6,
    }


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=384)
    args = parser.parse_args(argv)
    if args.output_len < 3 * EDGE:
        parser.error(f"--output-len must be at least {3 * EDGE}, got {args.output_len}")
    draw = random.Random(0)
    with open_llm(args) as llm:
        head = {"benchmark": "host", "model": llm.engine.model_name}
        rows = [measure(llm, batch, args.input_len, args.output_len, args.reps, draw) for batch in args.batch_sizes]
        report(head, rows)  # a profile with command buffers has been seen to kill its process (CUPTI)
        for row in rows:
            row["idle"] = idle_share(llm, [Job(args.input_len, args.output_len)] * row["B"], draw)
    report(head, rows)


if __name__ == "__main__":
    as_program(main)
