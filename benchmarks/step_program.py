"""Milliseconds of the compiled decode step alone, without scheduler and host, by who reduces and multiplies and by
options of XLA's.

    python benchmarks/step_program.py --mesh tensor=2
    python benchmarks/step_program.py --products xla mosaic --xla "" xla_gpu_enable_split_k_autotuning=false
    python benchmarks/step_program.py --products mosaic --add-norm xla mosaic --profile
    python benchmarks/step_program.py --model smollm2-135m --mesh tensor=3 --batch-sizes 1 --all-reduce xla reference

Dummy weights; every sequence stays at position --context - 1. The first steps generate, to compare their tokens with
those of the first variant: equal sums in another order may round differently, so that tokens may part. --profile shows
where each variant's time goes, in microseconds from the end of what ran before. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from devices import require_gpu
from offline import report

from paddock.checkpoints import load
from paddock.model import reduction_axes
from paddock.model.shapes import SHAPES
from paddock.serving.bucket import Bucket
from paddock.serving.mailboxes import Mailboxes
from paddock.serving.platform import make_cpu_devices
from paddock.serving.programs import Programs
from paddock.serving.step_parts import Part, part_of_instruction, parts_of, parts_table
from paddock.serving.step_planning import plan_steps
from paddock.serving.step_products import MAILBOXES
from paddock.serving.step_trace import StepTrace
from paddock.sharding import Layout, MeshConfig

PAGE_SIZE, GENERATED, PROFILED = 64, 12, 12


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--mesh", default="")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 32, 256])
    parser.add_argument("--context", type=int, default=201)
    parser.add_argument("--all-reduce", nargs="+", help="default: xla, and mosaic over several devices")
    parser.add_argument("--products", nargs="+", default=["auto"])
    parser.add_argument("--add-norm", nargs="+", default=["xla"])
    parser.add_argument("--xla", nargs="+", default=[""], metavar="NAME=VALUE,..", help="sets of XLA options")
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--profile", action="store_true", help="a table of a step's parts for each row")
    args = parser.parse_args(argv)
    mesh, model = MeshConfig.parse(args.mesh), SHAPES[args.model]
    reductions = args.all_reduce or (["xla", "mosaic"] if mesh.num_devices > 1 else ["xla"])
    make_cpu_devices(mesh.num_devices)
    if "mosaic" in {*reductions, *args.products, *args.add_norm}:
        require_gpu("mosaic")
    layout = Layout.build(args.mesh)
    dtype = "float32" if layout.mesh.devices.flat[0].platform == "cpu" else model.dtype
    slots = max(args.batch_sizes)
    sizes: dict[str, Any] = {"page_size": PAGE_SIZE, "max_num_seqs": slots, "max_num_batched_tokens": 8 * slots}
    params, rows = load(Path(), model, layout, dtype, "dummy", seed=0), []
    for reduction, products, norm in itertools.product(reductions, args.products, args.add_norm):
        entries = {"all_reduce": reduction, "products": products, "add_norm": norm}
        plan, buckets = plan_steps(model, layout, dtype=dtype, max_model_len=args.context, **entries, **sizes)
        programs = Programs(plan, buckets, slots * plan.pages_per_seq + 1)
        boxes = Mailboxes.open(layout.mesh, reduction_axes(layout)) if plan.has_mailboxes else None
        given = {**params, MAILBOXES: boxes.table} if boxes else params
        for xla, count in itertools.product(args.xla, args.batch_sizes):
            step = Step(programs, given, count, args.context, xla_options(xla))
            tokens, taken = step.generate(), step.seconds(args.repetitions)
            if args.profile:
                print(f"\n{entries}, xla {xla!r}, B {count}\n{parts_table(step.parts())}", flush=True)
            first = next((row["tokens"] for row in rows if row["B"] == count), tokens)
            equal = float(np.mean(tokens == first))
            rows.append({**entries, "xla": xla, "B": count, "step_ms": taken * 1e3, "equal": equal, "tokens": tokens})
            del step  # and its cache, before the next one's
    for row in rows:
        del row["tokens"]
    report({"benchmark": "step_program", "model": args.model, "mesh": args.mesh, "context": args.context}, rows)


def xla_options(text: str) -> dict[str, Any]:
    """From "name=value,name=value". Raises ValueError for a part that is not so."""
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--xla: {part!r} is not of the form name=value")
        options[name] = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
    return options


class Step:
    """The compiled step of so many sequences with `context` tokens each. Raises ValueError for a number that no step
    has."""

    def __init__(self, programs: Programs, params: Any, count: int, context: int, options: dict[str, Any]):
        self._plan, self._params, self._count, self._last = programs.plan, params, count, context - 1
        bucket = Bucket(count, 0, 0, self._plan.branches)
        if bucket not in programs.packings:
            sizes = sorted({one.decodes for one in programs.packings if not one.chunks})
            raise ValueError(f"--batch-sizes: no step has {count} rows here, but {', '.join(map(str, sizes))}")
        self._packing, self._compiled = programs.packings[bucket], programs.compile_step(bucket, options)
        self._cache, state = programs.compile_allocate()()
        slots, each = self._plan.num_slots, self._plan.pages_per_seq
        pages = np.arange(1, slots * each + 1, dtype=np.int32).reshape(slots, each)
        self._state = state._replace(page_table=self._plan.layout.put(pages))

    def _packed(self, position: int) -> jax.Array:
        host = self._packing.empty.copy()
        views = self._packing.views(host)
        views["decode_slot"][:] = views["row_ints"][0] = np.arange(self._count)
        views["decode_position"][:] = position
        return self._plan.layout.put(host)

    def _run(self, packed: jax.Array) -> jax.Array:
        self._cache, self._state, output = self._compiled(self._params, self._cache, self._state, packed)
        return output.sampled.tokens

    def generate(self) -> np.ndarray:
        """The tokens of the first steps [GENERATED B]."""
        return np.stack([np.asarray(self._run(self._packed(position))) for position in range(GENERATED)])

    def seconds(self, repetitions: int) -> float:
        """A step's, the best of three series."""
        last, best = self._packed(self._last), float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(repetitions):
                tokens = self._run(last)
            tokens.block_until_ready()
            best = min(best, time.perf_counter() - start)
        return best / repetitions

    def parts(self) -> list[Part]:
        """Where the time goes, in a profile of some steps."""
        last = self._packed(self._last)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(PROFILED):
                    tokens = self._run(last)
                tokens.block_until_ready()
            return parts_of(StepTrace.read(Path(folder)), part_of_instruction(self._compiled.as_text() or ""), {})


if __name__ == "__main__":
    main()
