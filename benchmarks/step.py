"""Milliseconds of a decode step through the engine: W1 (one stream) and W2 (32 and 256 sequences).

    python benchmarks/step.py
    python benchmarks/step.py --model "" --load-format auto --max-model-len 512 --batch-sizes 1 4    (bundled model)

A step is what the tokens after the first take: (time for N tokens - time for 1 token) / (N - 1), medians of --reps
repetitions. The floor beside it is the bytes that a step must read (all matrices, the cache at half of the output) at
the copy bandwidth measured in the same run. The last line is JSON.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from typing import Any

from offline import Row, as_program, check_seats, copy_bandwidth, make_parser, open_llm, report, step_bytes, timed_batch

from paddock.serving import LLM
from paddock.serving.bench_workload import PRESETS, Workload


def measure(llm: LLM, workload: Workload, reps: int, draw: random.Random) -> Row:
    """One row of the table; the floor is still in bytes."""
    jobs = workload.jobs(seed=0)
    firsts = [dataclasses.replace(job, output_len=1) for job in jobs]
    new_tokens = jobs[0].output_len
    timed_batch(llm, jobs, draw)
    first = statistics.median(timed_batch(llm, firsts, draw) for _ in range(reps))
    total = statistics.median(timed_batch(llm, jobs, draw) for _ in range(reps))
    step = (total - first) / (new_tokens - 1)
    return {
        "B": len(jobs),
        "prompt": jobs[0].input_len,
        "new": new_tokens,
        "first_token_ms": first * 1e3,
        "step_ms": step * 1e3,
        "decode_tok_s": len(jobs) / step,
        "e2e_tok_s": len(jobs) * new_tokens / total,
        "floor_bytes": step_bytes(llm, len(jobs), jobs[0].input_len + new_tokens // 2),
    }


def workloads(batch_sizes: list[int] | None, input_len: int, output_len: int | None) -> list[Workload]:
    """W1 and W2, or equal requests in batches of these sizes. Raises ValueError for lengths too short to time."""
    if output_len is not None and output_len < 2:
        raise ValueError(f"--output-len must be at least 2, got {output_len}")
    if batch_sizes is None and output_len is None:
        return [*PRESETS["W1"], *PRESETS["W2"]]
    length = (output_len or 128,) * 2
    return [Workload(size, (input_len, input_len), length) for size in batch_sizes or (1, 32, 256)]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="other batches than those of W1 and W2")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int)
    args = parser.parse_args(argv)
    cases = workloads(args.batch_sizes, args.input_len, args.output_len)
    draw = random.Random(0)
    with open_llm(args) as llm:
        head: dict[str, Any] = {"benchmark": "step", "model": llm.engine.model_name}
        for case in cases:
            check_seats(llm, case.num_prompts, case.jobs(seed=0)[0])
        rows = [measure(llm, case, args.reps, draw) for case in cases]
    bandwidth = copy_bandwidth()
    for row in rows:
        row["floor_ms"] = row.pop("floor_bytes") / bandwidth * 1e3
        row["of_floor"] = row["floor_ms"] / row["step_ms"]
    report({**head, "copy_gb_s": bandwidth / 1e9}, rows)


if __name__ == "__main__":
    as_program(main)
