"""Tokens per second on CPU beside transformers: one stream, and 32 requests of mixed lengths that arrive at once.

    pip install torch transformers    (torch's CPU build is enough)
    python benchmarks/cpu_generate.py

A Llama of SmolLM2-135M's shape with random weights, float32, greedy. transformers runs `generate` on static batches
(left-padded, in order of arrival, every batch until its longest output) of each size in --batch-sizes, and its best
counts. Each side runs in a process of its own, one after the other, `--rounds` times in turn; the median counts.
Both generate exactly the tokens asked for. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SHAPE = "smollm2-135m"
Request = tuple[list[int], int]


def requests(count: int, vocab: int) -> list[Request]:
    """Prompts and numbers of tokens to generate: both uniform in 16..256, seed 0."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(16, 257, (count, 2))
    return [(rng.integers(0, vocab, int(prompt)).tolist(), int(output)) for prompt, output in lengths]


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_paddock(folder: Path, single: Request, many: list[Request], options: dict) -> dict[str, float]:
    from paddock.serving import LLM, SamplingParams

    def params(num_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)

    with LLM(str(folder), skip_tokenizer_init=True, max_model_len=1024, **options) as llm:

        def run(batch: list[Request]) -> None:
            prompts = [{"prompt_token_ids": prompt} for prompt, _ in batch]
            outputs = llm.generate(prompts, [params(n) for _, n in batch], use_tqdm=False)
            assert [len(o.outputs[0].token_ids) for o in outputs] == [n for _, n in batch]

        run([(single[0], 4)])
        return {"single": single[1] / timed(lambda: run([single])), "batch": total(many) / timed(lambda: run(many))}


def measure_transformers(folder: Path, single: Request, many: list[Request], sizes: list[int]) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.pad_token_id = 0

    def run(batch: list[Request]) -> None:
        width, new = max(len(prompt) for prompt, _ in batch), max(n for _, n in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        assert out.shape[1] == width + new

    def run_static(size: int) -> None:
        for start in range(0, len(many), size):
            run(many[start : start + size])

    run([(single[0], 4)])
    result = {"single": single[1] / timed(lambda: run([single]))}
    result |= {f"batch of {size}": total(many) / timed(lambda s=size: run_static(s)) for size in sizes}
    return result | {"batch": max(result[f"batch of {size}"] for size in sizes)}


def total(batch: list[Request]) -> int:
    return sum(num_tokens for _, num_tokens in batch)


def make_folder(folder: Path) -> None:
    from paddock.checkpoints import init_dummy_params, save_safetensors
    from paddock.model.shapes import SHAPES
    from paddock.sharding import Layout

    config = SHAPES[SHAPE]
    save_safetensors(folder, config, init_dummy_params(config, Layout.build(), "float32"), "float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--options", type=json.loads, default={}, help="EngineConfig fields as JSON")
    parser.add_argument("--folder", type=Path, help="model folder, made when it is empty (default: a temporary one)")
    parser.add_argument("--side", choices=["folder", "paddock", "transformers"], help="one side in this process")
    args = parser.parse_args()

    vocab = 49152
    single = requests(1, vocab)[0][0][:1] * 128, 128
    many = requests(args.num_requests, vocab)
    if args.side == "folder":
        make_folder(args.folder)
    elif args.side == "paddock":
        print(json.dumps(measure_paddock(args.folder, single, many, args.options)))
    elif args.side == "transformers":
        print(json.dumps(measure_transformers(args.folder, single, many, args.batch_sizes)))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            compare(args, args.folder or Path(temporary))


def compare(args: argparse.Namespace, folder: Path) -> None:
    def side(name: str) -> dict[str, float]:
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--side", name]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return {} if name == "folder" else json.loads(run.stdout.splitlines()[-1])

    if not (folder / "config.json").exists():
        side("folder")
    sides = ("paddock", "transformers")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name in sides:
            runs[name].append(side(name))
            print(f"round {number + 1}, {name}: {runs[name][-1]}", flush=True)
    median = {name: {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]} for name in sides}
    ratio = {key: median["paddock"][key] / median["transformers"][key] for key in ("single", "batch")}
    print(f"\n{'output tokens/s':24}{'paddock':>10}{'transformers':>14}{'ratio':>8}")
    for key, value in ratio.items():
        print(f"{key:24}{median['paddock'][key]:10.1f}{median['transformers'][key]:14.1f}{value:8.2f}")
    print(json.dumps({"device": "cpu", "cores": os.cpu_count(), **median, "ratio": ratio}))


if __name__ == "__main__":
    main()
