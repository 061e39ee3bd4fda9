"""Numbers of a benchmark: a table for people, then one JSON line for machines. Names as vLLM's benchmarks have them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass
class Timing:
    """One finished request; all in seconds. `gaps` are the times between its outputs, empty if nobody watched."""

    input_len: int
    output_len: int
    first_token: float
    total: float
    gaps: Sequence[float] = ()

    @property
    def per_token(self) -> float | None:
        """Mean time of a token after the first."""
        return (self.total - self.first_token) / (self.output_len - 1) if self.output_len > 1 else None


def summary(timings: Sequence[Timing], duration: float) -> dict[str, Any]:
    """Throughputs over `duration` seconds, and the latencies of the requests. Raises ValueError if there are none."""
    if not timings:
        raise ValueError("no request finished, so there is nothing to report")
    inputs, outputs = sum(t.input_len for t in timings), sum(t.output_len for t in timings)
    result: dict[str, Any] = {
        "completed": len(timings),
        "duration": duration,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(timings) / duration,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
    }
    result |= spread("ttft", [t.first_token for t in timings])
    result |= spread("tpot", [t.per_token for t in timings if t.per_token is not None])
    result |= spread("itl", [gap for t in timings for gap in t.gaps])
    return result | spread("e2el", [t.total for t in timings])


def spread(name: str, seconds: Iterable[float]) -> dict[str, float]:
    """Mean, median, standard deviation and 99th percentile in milliseconds; nothing for no values."""
    values = np.array(list(seconds)) * 1000
    if not len(values):
        return {}
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        f"p99_{name}_ms": float(np.percentile(values, 99)),
    }


def report(title: str, result: dict[str, Any]) -> None:
    """Print the table and, as the last line, the JSON."""
    width = max(map(len, result))
    print(f"\n{title}")
    for name, value in result.items():
        print(f"  {name:{width}}  {value:,.2f}" if isinstance(value, float) else f"  {name:{width}}  {value}")
    rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in result.items()}
    print(json.dumps(rounded), flush=True)
