"""What ran on a device in the steps of a profile (jax.profiler, XProf's files): kernels, idle time, gaps."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from .bench_offline import fixed_length
from .bench_workload import Job

if TYPE_CHECKING:
    from .front import Front

# Tokens of a sequence before the profile begins, and steps in it: enough for medians, little enough to read.
SETTLE, STEPS = 8, 40
# Share of a profile that is cut off at each end for what is said of idle time: the profiler itself starts and stops.
MARGIN = 0.2


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One event: its own name, the HLO instruction it was launched for ("" if the trace does not say), nanoseconds.

    `busy_ns`, on a GPU, is from when all before it in its stream had ended, for until then one that was launched early
    mostly waits; on a CPU it is without what is nested in it.
    """

    name: str
    op: str
    start_ns: float
    end_ns: float
    busy_ns: float


def shortest_output(jobs: Sequence[Job]) -> int:
    """In tokens. Raises ValueError when it is too short for a profile."""
    least = min(job.output_len for job in jobs)
    if least < 2 * SETTLE:
        raise ValueError(f"a profile needs outputs of {2 * SETTLE} tokens and more, got {least}")
    return least


def record(engine: Front, jobs: Sequence[Job], prompts: Sequence[list[int]], folder: Path) -> None:
    """Run `jobs` with a profile of STEPS decode steps, fewer where the outputs end, without Python's frames, written to
    `folder`. Raises ValueError as `shortest_output` does."""
    least = shortest_output(jobs)
    settled, ending = threading.Event(), threading.Event()
    seen, until = 0, least - 2

    def count(_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == SETTLE:
            settled.set()
        if seen >= until:
            ending.set()

    streams: list[Any] = []
    for job, prompt in zip(jobs, prompts, strict=True):
        is_last = len(streams) == len(jobs) - 1  # when it decodes, all do
        last: Callable[[Any], None] | None = count if is_last else None
        kind: Any = "delta" if is_last else "final"  # a "final" output brings one event, at its end
        streams.append(engine.submit(prompt, fixed_length(job), output_kind=kind, on_event=last))
    settled.wait()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 2 if jax.default_backend() == "cpu" else 1
    options.enable_hlo_proto = False  # tens of megabytes; our table has its own way from instructions to scopes
    jax.profiler.start_trace(folder, profiler_options=options)
    until = min(seen + STEPS, until)  # it may have taken as long as that many steps to start
    ending.wait()
    jax.profiler.stop_trace()
    for stream in streams:
        for _ in stream:
            pass


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """The first GPU's kernels in a profile, in the order in which they began; on a CPU, where threads share them, its
    instructions. `on_gpu` says which."""

    kernels: tuple[Kernel, ...]
    on_gpu: bool

    @classmethod
    def read(cls, folder: Path) -> StepTrace:
        """Raises ValueError when `folder` holds no profile, or several."""
        files = sorted(folder.rglob("*.xplane.pb"))
        if len(files) != 1:
            raise ValueError(f"{folder} holds {len(files)} profiles; one was looked for")
        profile = jax.profiler.ProfileData.from_file(str(files[0]))
        plane = profile.find_plane_with_name("/device:GPU:0")
        on_gpu = plane is not None
        plane = plane or profile.find_plane_with_name("/host:CPU")
        kernels: list[Kernel] = []
        with warnings.catch_warnings():
            # jaxlib's types of a profile lack a module name, which Python 3.12 warns of at the first look.
            warnings.simplefilter("ignore", DeprecationWarning)
            for line in plane.lines if plane is not None else ():
                if not on_gpu or line.name.startswith("Stream"):
                    kernels += _of_line(line.events, on_gpu=on_gpu)
        return cls(tuple(sorted(kernels, key=lambda kernel: kernel.start_ns)), on_gpu)

    @functools.cached_property
    def num_steps(self) -> int:
        """What most kernels are launched once in: layers share theirs, the rest of a step has its own."""
        counts = Counter(kernel.name for kernel in self.kernels) if self.on_gpu else Counter(k.op for k in self.kernels)
        return min(statistics.multimode(counts.values()), default=0)

    @functools.cached_property
    def window(self) -> tuple[float, float]:
        first, last = self.kernels[0].start_ns, max(kernel.end_ns for kernel in self.kernels)
        return first + MARGIN * (last - first), last - MARGIN * (last - first)

    def idle_share(self) -> float:
        """Share of the profile's middle in which nothing ran."""
        start, end = self.window
        return 1 - covered(((k.start_ns, k.end_ns) for k in self.kernels), start, end) / (end - start)

    def gaps(self, count: int) -> list[tuple[float, str, str]]:
        """The longest in the profile's middle: seconds, the kernel before and the one after."""
        start, end = self.window
        found: list[tuple[float, str, str]] = []
        before = None
        for kernel in self.kernels:
            if start <= kernel.start_ns <= end and before is not None and kernel.start_ns > before.end_ns:
                found.append(((kernel.start_ns - before.end_ns) * 1e-9, before.name, kernel.name))
            if before is None or kernel.end_ns > before.end_ns:
                before = kernel
        return sorted(found, reverse=True)[:count]


def covered(spans: Iterable[tuple[float, float]], start: float, end: float) -> float:
    """Length of the union of `spans` within [start, end]."""
    total, reached = 0.0, start
    for low, high in sorted(spans):
        low, high = max(low, reached), min(high, end)
        if high > low:
            total, reached = total + high - low, high
    return total


def _of_line(events: Iterable[Any], *, on_gpu: bool) -> list[Kernel]:
    """One stream's or thread's; of a CPU's only what belongs to an instruction of a step."""
    found: list[tuple[str, str, float, float]] = []
    for event in events:
        stats = dict(event.stats)
        if on_gpu or ("hlo_op" in stats and str(stats.get("hlo_module", "")).startswith("jit_step")):
            found.append((event.name, str(stats.get("hlo_op", "")), event.start_ns, event.start_ns + event.duration_ns))
    found.sort(key=lambda one: (one[2], -one[3]))
    spans = [(start, end) for _, _, start, end in found]
    busy = _after_others(spans) if on_gpu else _without_nested(spans)
    return [Kernel(*one, ns) for one, ns in zip(found, busy, strict=True)]


def _after_others(spans: Sequence[tuple[float, float]]) -> list[float]:
    """Of each span what lies after the ends of all before it."""
    busy, reached = [], 0.0
    for start, end in spans:
        busy.append(max(0.0, end - max(start, reached)))
        reached = max(reached, end)
    return busy


def _without_nested(spans: Sequence[tuple[float, float]]) -> list[float]:
    """Of each span what lies in none that is nested in it."""
    nested = [0.0] * len(spans)
    open_: list[int] = []
    for index, (start, end) in enumerate(spans):
        while open_ and spans[open_[-1]][1] <= start:
            open_.pop()
        if open_:
            nested[open_[-1]] += end - start
        open_.append(index)
    return [max(0.0, end - start - inner) for (start, end), inner in zip(spans, nested, strict=True)]
