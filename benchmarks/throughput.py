"""Offline throughput through the engine: W3, 1,000 requests of mixed lengths that are all there from the start.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --model "" --load-format auto --max-model-len 512 --num-prompts 8 --input-len 8:32

The floor assumes that every decode step is as full as it can be, reads all matrices and its own cache once, at the
copy bandwidth, and that every prompt runs at the rate of a large product, both of one device and measured in the same
run; each device has its share of either, and communication takes no time. The last line is JSON.
"""

from __future__ import annotations

import random
import statistics

from offline import (
    as_program,
    cache_bytes,
    copy_bandwidth,
    make_parser,
    open_llm,
    prefill_flops,
    product_rate,
    report,
    timed_batch,
    weight_bytes,
)

from paddock.serving.bench_workload import PRESETS, Job, Workload, parse_lengths


def main(argv: list[str] | None = None) -> None:
    (preset,) = PRESETS["W3"]
    parser = make_parser(__doc__)
    parser.set_defaults(reps=1)
    parser.add_argument("--num-prompts", type=int, default=preset.num_prompts)
    parser.add_argument("--input-len", default="{}:{}".format(*preset.input_len), metavar="N or LOW:HIGH")
    parser.add_argument("--output-len", default="{}:{}".format(*preset.output_len), metavar="N or LOW:HIGH")
    args = parser.parse_args(argv)
    lengths = parse_lengths(args.input_len, "--input-len"), parse_lengths(args.output_len, "--output-len")
    jobs = Workload(args.num_prompts, *lengths).jobs(seed=0)
    draw = random.Random(0)
    with open_llm(args) as llm:
        timed_batch(llm, [Job(job.input_len, min(job.output_len, 4)) for job in jobs[:64]], draw)
        seconds = statistics.median(timed_batch(llm, jobs, draw) for _ in range(args.reps))
        replicas = len(llm.engine.replicas)
        seats = min(llm.engine.replicas[0].executor.plan.num_slots * replicas, len(jobs))
        head = {"benchmark": "throughput", "model": llm.engine.model_name}
        weights = weight_bytes(llm, seats)
        cached = cache_bytes(llm, sum(job.output_len * (job.input_len + job.output_len // 2) for job in jobs))
        flops = sum(prefill_flops(llm, job.input_len) for job in jobs) / replicas
    inputs, outputs = sum(job.input_len for job in jobs), sum(job.output_len for job in jobs)
    steps = max(-(-outputs // seats), max(job.output_len for job in jobs))
    bandwidth, rate = copy_bandwidth(), product_rate()
    floor = (steps * weights + cached) / bandwidth + flops / rate
    row = {
        "requests": len(jobs),
        "input_tokens": inputs,
        "output_tokens": outputs,
        "seconds": seconds,
        "requests_s": len(jobs) / seconds,
        "output_tok_s": outputs / seconds,
        "total_tok_s": (inputs + outputs) / seconds,
        "floor_s": floor,
        "of_floor": floor / seconds,
    }
    report({**head, "copy_gb_s": bandwidth / 1e9, "product_tflop_s": rate / 1e12}, [row])


if __name__ == "__main__":
    as_program(main)
