"""Time to first token through the engine: W4, one prompt of 4,096 tokens and one new token.

    python benchmarks/prefill.py
    python benchmarks/prefill.py --model "" --load-format auto --max-model-len 512 --input-len 64 256    (bundled model)

The floor is the prompt's operations at the rate of a large product measured in the same run. The last line is JSON.
"""

from __future__ import annotations

import random
import statistics

from offline import as_program, make_parser, open_llm, prefill_flops, product_rate, report, timed_batch

from paddock.serving.bench_workload import PRESETS, Job


def main(argv: list[str] | None = None) -> None:
    (preset,) = PRESETS["W4"]
    parser = make_parser(__doc__)
    parser.set_defaults(reps=5)
    parser.add_argument("--input-len", type=int, nargs="+", default=[preset.input_len[0]], help="tokens of the prompts")
    args = parser.parse_args(argv)
    draw, rows = random.Random(0), []
    with open_llm(args) as llm:
        head = {"benchmark": "prefill", "model": llm.engine.model_name}
        for length in args.input_len:
            job = Job(length, 1)
            timed_batch(llm, [job], draw)
            times = [timed_batch(llm, [job], draw) for _ in range(args.reps)]
            median = statistics.median(times)
            row = {"prompt": length, "ttft_ms": median * 1e3, "best_ms": min(times) * 1e3}
            rows.append({**row, "prefill_tok_s": length / median, "flops": prefill_flops(llm, length)})
    rate = product_rate()
    for row in rows:
        flops = row.pop("flops")
        row["tflop_s"] = flops / row["ttft_ms"] / 1e9
        row["floor_ms"] = flops / rate * 1e3
        row["of_floor"] = row["floor_ms"] / row["ttft_ms"]
    report({**head, "product_tflop_s": rate / 1e12}, rows)


if __name__ == "__main__":
    as_program(main)
