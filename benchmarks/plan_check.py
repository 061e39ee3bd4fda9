"""What `paddock plan` predicts beside what the engine does: bytes per device, decode steps and prompts.

    python benchmarks/plan_check.py --profile h100-80gb.toml --results check.jsonl
    python benchmarks/plan_check.py --devices 2 --profile h100-80gb.toml --results check2.jsonl

For each case (a shape, cut to a number of layers, over a mesh) one engine is built with the steps of its points alone.
A decode point is the time until each sequence has one more token, a prompt's is from its arrival to its first token.
Steps that the profile was fitted to may not be among them. What fails is a row that says so; with --results every other
row is kept in that file, and a run that finds it there does not repeat it. The last line is JSON; the exit code is 1
where every row failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from paddock.model import LlamaConfig
from paddock.model.shapes import SHAPES
from paddock.serving.calibrate import point_name
from paddock.serving.collect_env import describe_devices
from paddock.serving.footprint import SLACK, Footprint
from paddock.serving.resolve import Resolved
from paddock.serving.roofline import StepTimes
from paddock.serving.speed_profile import read_profile, shipped_profile
from paddock.serving.text_table import text_table
from paddock.serving.timed_engine import TimedEngine
from paddock.serving.weights import Weights
from paddock.sharding import MeshConfig
from paddock.sharding.accelerators import accelerator as named_accelerator
from paddock.sharding.memory import DeviceBytes, PlannedLayout

Row = dict[str, Any]
# From 12 points on the median says something.
ENOUGH = 12


@dataclasses.dataclass(frozen=True)
class Case:
    """Decode points are (sequences, tokens of each before the step), sequences ascending."""

    shape: str
    layers: int
    mesh: str
    decode: tuple[tuple[int, int], ...]
    prefill: tuple[int, ...]

    @property
    def chunks(self) -> tuple[int, ...]:
        """What prompts are cut to: a piece for each stage."""
        stages = MeshConfig.parse(self.mesh).sizes.get("pipe", 1)
        return tuple(sorted({*self.prefill, *(tokens // stages for tokens in self.prefill)}))

    @property
    def model(self) -> LlamaConfig:
        return dataclasses.replace(SHAPES[self.shape], num_layers=self.layers)

    @property
    def batches(self) -> tuple[int, ...]:
        return tuple(sorted({batch for batch, _ in self.decode}))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, rounded up, with those that it makes on the way."""
        longest = max(self.prefill[-1] + 1, max(context for _, context in self.decode) + 512)
        return -(-longest // 256) * 256

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.layers} layers, {self.mesh or 'one device'}"

    def points(self) -> Iterator[tuple[str, int, int]]:
        yield "bytes", 0, 0
        yield from (("decode", *point) for point in self.decode)
        yield from (("prefill", tokens, 0) for tokens in self.prefill)


EIGHT_B = ((1, 128), (1, 1000), (8, 512), (32, 128), (32, 1000), (128, 512), (256, 192), (256, 1000))
PAIRS = ((2, 128), (32, 640), (256, 320))
FEW = ((2, 192), (32, 640), (128, 320))
CASES = {
    1: [
        Case("llama-3.1-8b", 32, "", EIGHT_B, (512, 2048, 4096)),
        Case("llama-3.1-70b", 24, "", ((1, 192), (32, 640), (128, 320)), (512, 2048)),
    ],
    2: [
        Case("llama-3.1-8b", 32, "tensor=2", ((1, 128), (32, 640), (256, 320)), (512, 2048)),
        Case("llama-3.1-70b", 56, "tensor=2", FEW, (512, 2048)),
        Case("llama-3.1-8b", 32, "pipe=2", PAIRS, (2048,)),
        Case("llama-3.1-70b", 56, "pipe=2", FEW, (2048,)),
        Case("llama-3.1-8b", 32, "data=2", PAIRS, (2048,)),
        Case("llama-3.1-70b", 24, "data=2", FEW, (2048,)),
    ],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    speeds = parser.add_mutually_exclusive_group()
    speeds.add_argument("--accelerator", default="h100-80gb", help="of the shipped profile (default: %(default)s)")
    speeds.add_argument("--profile", metavar="FILE", help="instead of a shipped one")
    parser.add_argument("--devices", type=int, default=1, choices=sorted(CASES), help="(default: %(default)s)")
    parser.add_argument("--results", metavar="FILE", help="JSON lines: rows are added, and not measured again")
    parser.add_argument("--seconds", type=float, help="start no case later than this")
    parser.add_argument("--compile-cache-dir", metavar="DIR")
    args = parser.parse_args(argv)
    rows = run(CASES[args.devices], args)
    if all(row["failed"] for row in rows):
        raise SystemExit(f"none of {len(rows)} points was measured")


def run(cases: list[Case], args: argparse.Namespace, **options: Any) -> list[Row]:
    start = time.perf_counter()
    rows = _read(args.results)
    for case in cases:
        left = [point for point in case.points() if (case.name, *point) not in rows]
        if not left:
            continue
        if args.seconds is not None and time.perf_counter() - start > args.seconds:
            found = [_failed(case, point, "out of time") for point in left]
        else:
            found = list(_rows(case, left, args, options))
        for row in found:
            rows[row["case"], row["kind"], row["count"], row["context"]] = row
    found = [rows[case.name, *point] for case in cases for point in case.points()]
    report(found)
    return found


def _rows(case: Case, points: list[tuple[str, int, int]], args: argparse.Namespace, options: Row) -> Iterator[Row]:
    """One row a point, whatever happens."""
    start = time.perf_counter()
    engine, failure = None, ""
    try:
        predictor = Predictor(case, args.accelerator, args.profile)
        options = {"max_model_len": case.longest, "compile_cache_dir": args.compile_cache_dir} | options
        engine = TimedEngine(case.model, case.mesh, batches=case.batches, prompts=case.chunks, **options)
        print(f"{case.name}: ready after {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    for point in points:
        row = _failed(case, point, failure)
        if engine is not None:
            try:
                row |= {"failed": "", **measure(engine, predictor, point)}
                row["error"] = row["predicted"] / row["measured"] - 1
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"
        print(json.dumps(row), file=sys.stderr, flush=True)
        if args.results and not row["failed"]:
            with Path(args.results).open("a") as file:
                file.write(json.dumps(row) + "\n")
        yield row
    if engine is not None:
        engine.close()


class Predictor:
    """The planner's figures for a case, by a profile that was not fitted to any of its points.

    Raises ValueError where it was.
    """

    def __init__(self, case: Case, accelerator: str, profile: str | None):
        self.mesh, self.layout = MeshConfig.parse(case.mesh), PlannedLayout.of(case.mesh)
        speeds = read_profile(Path(profile)) if profile else shipped_profile(accelerator)
        each = self.mesh.num_replicas * self.mesh.sizes.get("pipe", 1)
        steps = [("decode", batch // each, context) for batch, context in case.decode]
        for step in [*steps, *(("chunk", tokens, 0) for tokens in case.chunks)]:
            if (name := point_name(case.model, case.mesh, step)) in speeds.fitted:
                raise ValueError(f"the profile was fitted to {name}, which can be no test of it")
        model, dtype = case.model, case.model.dtype
        weights = Weights.of(model, self.layout, dtype, None)
        card = named_accelerator(speeds.accelerator)
        self.times = StepTimes(model, self.layout, self.mesh, weights, dtype, dtype, card, speeds)

    def held(self, resolved: Resolved) -> DeviceBytes:
        """Bytes per device of an engine with the number of pages that it chose."""
        sizes = (resolved.page_size, resolved.plan.num_slots, resolved.plan.max_chunk_tokens, resolved.max_model_len)
        return Footprint(resolved.model, resolved.dtype, *sizes, slack=SLACK).of(self.layout, resolved.num_pages)


def measure(engine: TimedEngine, predictor: Predictor, point: tuple[str, int, int]) -> Row:
    """Predicted and measured, in bytes or seconds, and what else is worth knowing of the point."""
    kind, count, context = point
    times = predictor.times
    if kind == "bytes":
        held = predictor.held(engine.engines[0].resolved)
        found = [device.memory_stats() for device in jax.devices()[: predictor.mesh.num_devices]]
        if not all(found):
            raise RuntimeError("these devices do not tell their memory")
        in_use, peak = (max(stats[f"{name}bytes_in_use"] for stats in found) for name in ("", "peak_"))
        return {"predicted": held.total - held.temp, "measured": in_use, "peak": peak, "peak_predicted": held.total}
    if kind == "prefill":
        step, measured = times.prefill(count, engine.engines[0].resolved.plan.max_chunk_tokens), engine.prefill(count)
        return {"predicted": step.total, "measured": measured, "bound": step.bound, "figures": times.source}
    done = engine.decode(count, context)
    step = times.decode(count // predictor.mesh.num_replicas, done.context)
    found = {"predicted": step.total, "measured": done.seconds, "bound": step.bound, "figures": times.source}
    return found | {"mean_context": done.context}


def _failed(case: Case, point: tuple[str, int, int], why: str) -> Row:
    return {"case": case.name, "kind": point[0], "count": point[1], "context": point[2], "failed": why}


def _read(path: str | None) -> dict[tuple[str, str, int, int], Row]:
    if path is None or not Path(path).exists():
        return {}
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {(row["case"], row["kind"], row["count"], row["context"]): row for row in rows}


def report(rows: list[Row]) -> None:
    """A table, the medians of the sizes of the errors, and everything as JSON."""
    shown = [[row["case"], row["kind"], row["count"], row["context"], *_cells(row)] for row in rows]
    heads = ("case", "what", "count", "context", "predicted", "measured", "error", "bound by", "figures")
    print(text_table(heads, shown))
    errors = {
        "bytes": [abs(row["error"]) for row in rows if not row["failed"] and row["kind"] == "bytes"],
        "times": [abs(row["error"]) for row in rows if not row["failed"] and row["kind"] != "bytes"],
    }
    medians = {what: statistics.median(found) if found else None for what, found in errors.items()}
    head = {
        "benchmark": "plan_check",
        "device": describe_devices(),
        "median_error": medians,
        "largest_error": {what: max(found, default=None) for what, found in errors.items()},
        "points": {what: len(found) for what, found in errors.items()},
        "failed": sum(bool(row["failed"]) for row in rows),
    }
    for what, found in errors.items():
        if found:
            few = f", fewer than {ENOUGH} points" if len(found) < ENOUGH and what == "times" else ""
            print(f"{what}: median error {medians[what]:.1%}, largest {max(found):.1%}, {len(found)} points{few}")
    print(json.dumps({**head, "rows": rows}), flush=True)


def _cells(row: Row) -> list[str]:
    if row["failed"]:
        return ["", "", "failed", row["failed"], ""]
    scale, unit = (2**30, "GiB") if row["kind"] == "bytes" else (1e-3, "ms")
    figures = [f"{row[name] / scale:.2f} {unit}" for name in ("predicted", "measured")]
    return [*figures, f"{row['error']:+.1%}", row.get("bound", ""), row.get("figures", "")]


if __name__ == "__main__":
    main()
