"""What the benchmarks of the whole engine share: their flags, timed batches, floors, and the report.

Weights are random and prompts fresh at every repetition, so that nothing is remembered; every run checks that it got
exactly the tokens that it asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

from paddock.serving import LLM, SamplingParams
from paddock.serving.bench_offline import fixed_length
from paddock.serving.bench_workload import Job, random_prompt
from paddock.serving.cli_flags import add_engine_flags, engine_config

Row = dict[str, Any]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Every flag of the engine; by default an 8B shape with random weights and no tokenizer."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_flags(parser)
    parser.set_defaults(
        model="llama-3.1-8b", load_format="dummy", skip_tokenizer_init=True, max_model_len=8192, max_num_seqs=256
    )
    parser.add_argument("--reps", type=int, default=3, help="timed repetitions, of which the median counts")
    return parser


@contextlib.contextmanager
def open_llm(args: argparse.Namespace) -> Iterator[LLM]:
    """Raises ValueError naming the flag that has a bad value."""
    if args.reps < 1:
        raise ValueError(f"--reps must be at least 1, got {args.reps}")
    with LLM(progress=True, **dataclasses.asdict(engine_config(args))) as llm:
        yield llm


def timed_batch(llm: LLM, jobs: Sequence[Job], draw: random.Random) -> float:
    """Seconds for all jobs, given to the engine at once."""
    prompts = [{"prompt_token_ids": random_prompt(job, llm.engine.vocab_size, draw)} for job in jobs]
    params: list[SamplingParams] = [fixed_length(job) for job in jobs]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    if counts != [job.output_len for job in jobs]:
        raise RuntimeError(f"asked for {[job.output_len for job in jobs][:5]}... tokens, got {counts[:5]}...")
    return seconds


def step_bytes(llm: LLM, batch: int, context: int) -> int:
    """Bytes that a decode step must read: every matrix once, and the keys and values of `context` tokens a sequence.

    Of the embedding a step reads `batch` rows, unless it is the head as well.
    """
    executor = llm.engine.replicas[0].executor
    config = executor.plan.config
    skipped = {"embed"} if "head" in executor.params else set()
    weights = sum(value.nbytes for name, value in executor.params.items() if name not in skipped)
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return weights + batch * context * per_token * executor.params["embed"].dtype.itemsize


def prefill_flops(llm: LLM, tokens: int) -> float:
    """Operations of one prompt with one token out: matrices over all tokens, causal attention, the head for one row."""
    executor = llm.engine.replicas[0].executor
    config = executor.plan.config
    layers = sum(value.size for name, value in executor.params.items() if name.startswith("layers.") and value.ndim > 1)
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * tokens * tokens
    return 2.0 * layers * tokens + attention + 2 * config.vocab_size * config.embed_dim


def copy_bandwidth() -> float:
    """Bytes a second, read and written together, of copies one after the other; call it when the engine is closed."""
    import jax
    import jax.numpy as jnp

    size = 2**26 if jax.default_backend() == "cpu" else 2**28
    source = jnp.zeros(size, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * source.nbytes / _best(lambda: copy(source))


def product_rate() -> float:
    """Operations a second of large bfloat16 products (float32 on CPU), one after the other."""
    import jax
    import jax.numpy as jnp

    size, dtype = (1024, jnp.float32) if jax.default_backend() == "cpu" else (8192, jnp.bfloat16)
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)  # zeros would run faster: they take less power
    multiply = jax.jit(jnp.matmul)
    return 2 * size**3 / _best(lambda: multiply(a, a))


def _best(run: Any, series: int = 5, calls: int = 4) -> float:
    """Seconds of a call in the best series; calls of a series follow each other on the device, so that the time the
    host takes to send one, 0.1 to 0.4 ms, does not count."""
    run().block_until_ready()
    times = []
    for _ in range(series):
        start = time.perf_counter()
        for _ in range(calls):
            out = run()
        out.block_until_ready()
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def report(head: Row, rows: Sequence[Row]) -> None:
    """A table of the rows, then one JSON line with everything."""
    from paddock.serving.collect_env import describe_devices

    columns = list(dict.fromkeys(name for row in rows for name in row))
    texts = [[_text(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(len(name), *(len(text[i]) for text in texts)) for i, name in enumerate(columns)]
    head = {**head, "device": describe_devices()}
    print("\n" + ", ".join(f"{name} {_text(value)}" for name, value in head.items()))
    for line in [columns, *texts]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(json.dumps({**head, "rows": list(rows)}), flush=True)


def _text(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)
