"""What a benchmark asks for: how many tokens in, how many out, and when."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import math
import random
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Job:
    """One request: lengths in tokens, arrival in seconds after the start."""

    input_len: int
    output_len: int
    arrival: float = 0.0


@dataclasses.dataclass(frozen=True)
class Workload:
    """A number of requests with lengths drawn uniformly from ranges (both ends included)."""

    num_prompts: int
    input_len: tuple[int, int]
    output_len: tuple[int, int]
    concurrency: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_prompts", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def jobs(self, seed: int) -> list[Job]:
        draw = random.Random(seed)
        return [Job(draw.randint(*self.input_len), draw.randint(*self.output_len)) for _ in range(self.num_prompts)]


# The same from run to run, so that numbers compare: W1 one stream, W2 batches, W3 offline traffic, W4 prefill.
PRESETS: dict[str, tuple[Workload, ...]] = {
    "W1": (Workload(1, (128, 128), (256, 256)),),
    "W2": (Workload(32, (128, 128), (128, 128)), Workload(256, (128, 128), (128, 128))),
    "W3": (Workload(1000, (32, 1024), (16, 512), concurrency=256),),
    "W4": (Workload(1, (4096, 4096), (1, 1)),),
}


def parse_lengths(text: str, name: str) -> tuple[int, int]:
    """Both ends of "128" or "32:1024". Raises ValueError naming the flag `name`."""
    low, _, high = text.partition(":")
    try:
        ends = int(low), int(high or low)
    except ValueError:
        raise ValueError(f"{name} must be a number or LOW:HIGH, got {text!r}") from None
    if not 1 <= ends[0] <= ends[1]:
        raise ValueError(f"{name} must be at least 1 and go upwards, got {text!r}")
    return ends


def random_prompt(job: Job, vocab_size: int, draw: random.Random) -> list[int]:
    return [draw.randrange(vocab_size) for _ in range(job.input_len)]


def poisson_arrivals(jobs: Sequence[Job], rate: float, seed: int) -> list[Job]:
    """Arrivals at `rate` a second with exponential gaps; all at once if the rate is infinite."""
    if not rate > 0:
        raise ValueError(f"--request-rate must be above 0, got {rate}")
    draw, now, spread = random.Random(seed), 0.0, []
    for job in jobs:
        spread.append(dataclasses.replace(job, arrival=now))
        now += 0.0 if math.isinf(rate) else draw.expovariate(rate)
    return spread


def read_trace(path: Path, speed: float, limit: int | None = None) -> list[Job]:
    """The first `limit` requests of a CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens.

    `speed` 2 replays it in half the time. Raises ValueError naming the file and line.
    """
    if not 0 < speed < math.inf:
        raise ValueError(f"--speed must be above 0, got {speed}")
    jobs: list[Job] = []
    start: datetime.datetime | None = None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for row in reader:
                if limit is not None and len(jobs) >= limit:
                    break
                try:
                    time = datetime.datetime.fromisoformat(row["TIMESTAMP"])
                    start = start or time
                    lengths = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                    jobs.append(Job(*lengths, (time - start).total_seconds() / speed))
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{path}, line {reader.line_num}: not a request of a trace: {error!r}") from None
    except OSError as error:
        raise ValueError(f"cannot read the trace {path}: {error}") from error
    if not jobs:
        raise ValueError(f"the trace {path} holds no request")
    return sorted(jobs, key=lambda job: job.arrival)
