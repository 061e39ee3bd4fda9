"""Bytes per device of real steps, compiled for accelerators that are not there: python benchmarks/plan_prove.py.

    python benchmarks/plan_prove.py [--case llama-3.1-70b h100-80gb tensor=8] [--num-pages 2048] [--max-num-seqs 64]

Needs the wheels of the extra `plan`. `wall` is from nothing to the answer, imports and both compiles with it. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

from paddock.model.shapes import SHAPES
from paddock.serving.plan_prove import prove

CASES = [
    ("llama-3.1-8b", "h100-80gb", ""),
    ("llama-3.1-70b", "h100-80gb", "tensor=8"),
    ("llama-3.1-405b", "h200", "tensor=8"),
    ("llama-3.1-405b", "h100-80gb", "pipe=2,tensor=8"),
]
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=3, action="append", metavar=("MODEL", "ACCELERATOR", "MESH"))
    parser.add_argument("--rules", default="")
    parser.add_argument("--num-pages", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, default=8192)
    args = parser.parse_args()
    sizes = {"num_pages": args.num_pages, "max_num_seqs": args.max_num_seqs, "max_model_len": args.max_model_len}
    rows = []
    for model, accelerator, mesh in args.case or CASES:
        start = time.perf_counter()
        proof = prove(SHAPES[model], mesh, args.rules, accelerator, **sizes)
        wall = time.perf_counter() - start
        rows.append({"model": model, "wall": wall, **dataclasses.asdict(proof)})
        print(f"{model} on {accelerator}, {mesh or 'one device'}: weights {proof.weights / GIB:.2f} GiB, {wall:.0f} s")
        for name, step in proof.steps.items():
            parts = {part: getattr(step, part) / GIB for part in ("arguments", "aliases", "outputs", "temp", "total")}
            sent = sum(total.sent_bytes for total in step.collectives) / GIB
            text = ", ".join(f"{part} {size:.3f}" for part, size in parts.items())
            print(f"  {name} {step.bucket}: {text}, sent {sent:.3f} GiB; {step.seconds:.0f} s", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
