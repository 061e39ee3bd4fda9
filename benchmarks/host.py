"""What a decode step costs on the host, and how long the GPU waits for it.

    python benchmarks/host.py
    python benchmarks/host.py --model "" --load-format auto --max-model-len 512 --batch-sizes 2    (bundled model)

`host_us` is the CPU time of the engine's thread a step (Python, dispatch and delivery; waiting for the device takes
none), read in that thread between the tokens of one sequence; on a CPU small parts of the model run in that thread too.
`idle` is the share of a profile's middle in which no kernel ran on the first GPU (jax.profiler; none on CPU). The last
line is JSON.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from offline import Row, make_parser, open_llm, report

from paddock.serving import LLM
from paddock.serving.bench_offline import fixed_length
from paddock.serving.bench_workload import Job, random_prompt

# Tokens at both ends that do not count: some sequences are still in prefill, or have ended.
EDGE = 8
# Share of a profile that is cut off at each end, where the profiler itself starts and stops.
MARGIN = 0.2


class Marks:
    """Times of one sequence's tokens, taken in the engine's thread."""

    def __init__(self, expected: int):
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._expected = expected
        self.settled, self.ending = threading.Event(), threading.Event()

    def __call__(self, _: Any) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.thread_time())
        if len(self.wall) == EDGE:
            self.settled.set()
        if len(self.wall) >= self._expected * 3 // 4:
            self.ending.set()

    def per_step(self, times: list[float]) -> float:
        """Seconds a token over the middle of the sequence: several tokens that come at once count as one step each."""
        middle = times[EDGE : len(times) - EDGE]
        return (middle[-1] - middle[0]) / (len(middle) - 1)


def run(llm: LLM, jobs: list[Job], draw: random.Random, trace: Path | None = None) -> Marks:
    """One batch; the marks are those of its last sequence. With `trace`, the middle goes into a profile there."""
    marks = Marks(jobs[-1].output_len)
    streams = []
    for job in jobs:
        prompt = random_prompt(job, llm.engine.vocab_size, draw)
        on_event = marks if job is jobs[-1] else None
        kind = "delta" if on_event else "final"  # a "final" output brings one event, at its end
        streams.append(llm.engine.submit(prompt, fixed_length(job), output_kind=kind, on_event=on_event))
    if trace is not None:
        marks.settled.wait()
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        options.host_tracer_level = 1
        jax.profiler.start_trace(trace, profiler_options=options)
        marks.ending.wait()
        jax.profiler.stop_trace()
    for stream in streams:
        for _ in stream:
            pass
    return marks


def covered(spans: Iterable[tuple[float, float]], start: float, end: float) -> float:
    """Length of the union of `spans` within [start, end]."""
    total, reached = 0.0, start
    for low, high in sorted(spans):
        low, high = max(low, reached), min(high, end)
        if high > low:
            total, reached = total + high - low, high
    return total


def idle_share(trace: Path) -> float | None:
    """Share of the profile's middle in which the first GPU ran nothing; None without a GPU in it."""
    (file,) = trace.rglob("*.xplane.pb")
    plane = jax.profiler.ProfileData.from_file(str(file)).find_plane_with_name("/device:GPU:0")
    if plane is None:
        return None
    spans = [
        (event.start_ns, event.start_ns + event.duration_ns)
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    first, last = min(low for low, _ in spans), max(high for _, high in spans)
    start, end = first + MARGIN * (last - first), last - MARGIN * (last - first)
    return 1 - covered(spans, start, end) / (end - start)


def measure(llm: LLM, batch: int, input_len: int, output_len: int, reps: int, draw: random.Random) -> Row:
    # Objects of their own: the last one is told from the others by identity.
    jobs = [Job(input_len, output_len) for _ in range(batch)]
    run(llm, jobs, draw)
    marks = [run(llm, jobs, draw) for _ in range(reps)]
    with tempfile.TemporaryDirectory() as folder:
        run(llm, jobs, draw, Path(folder))
        idle = idle_share(Path(folder))
    return {
        "B": batch,
        "step_ms": statistics.median(mark.per_step(mark.wall) for mark in marks) * 1e3,
        "host_us": statistics.median(mark.per_step(mark.cpu) for mark in marks) * 1e6,
        "idle": idle,
    }


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=384)
    args = parser.parse_args(argv)
    if args.output_len < 4 * EDGE:
        parser.error(f"--output-len must be at least {4 * EDGE}, got {args.output_len}")
    draw = random.Random(0)
    with open_llm(args) as llm:
        head = {"benchmark": "host", "model": llm.engine.model_name}
        rows = [measure(llm, batch, args.input_len, args.output_len, args.reps, draw) for batch in args.batch_sizes]
    report(head, rows)


if __name__ == "__main__":
    main()
