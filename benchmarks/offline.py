"""What the benchmarks of the whole engine share: their flags, timed batches, floors, and the report.

Weights are random and prompts fresh at every repetition, so that nothing is remembered; every run checks that it got
exactly the tokens that it asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from paddock.serving import LLM, SamplingParams
from paddock.serving.bench_offline import fixed_length
from paddock.serving.bench_workload import Job, random_prompt
from paddock.serving.cli import DEBUG_VARIABLE
from paddock.serving.cli_flags import add_engine_flags, engine_config
from paddock.serving.kv_cache import page_bytes

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


def as_program(main: Callable[[], None]) -> None:
    """As `paddock` runs its commands: what cannot be had is one line and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(2)


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


def check_seats(llm: LLM, count: int, job: Job) -> None:
    """Raises ValueError where so many of `job` do not run all together: steps of fewer would be measured."""
    replicas = [replica.engine.scheduler for replica in llm.engine.replicas]
    seats = len(replicas) * min(one.seats(job.input_len + job.output_len) for one in replicas)
    if count > seats:
        raise ValueError(
            f"{count} sequences of {job.input_len + job.output_len} tokens do not run all together: the KV cache and "
            f"max_num_seqs have room for {seats}"
        )


def step_bytes(llm: LLM, batch: int, context: int) -> int:
    """Bytes that a device must read while each sequence of a batch gets a token, after `context` others."""
    return weight_bytes(llm, batch) + cache_bytes(llm, batch * context)


def weight_bytes(llm: LLM, batch: int) -> int:
    """Every matrix that a device holds, once for each group in its pipeline.

    Of the embedding a step reads `batch` rows, unless it is the head as well.
    """
    executor = llm.engine.replicas[0].executor
    skipped = {"embed"} if "head" in executor.params else set()
    read = [value for name, value in executor.params.items() if name not in skipped]
    groups = min(executor.plan.stages.count, -(-batch // len(llm.engine.replicas)))
    return groups * sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in read)


def cache_bytes(llm: LLM, tokens: int) -> int:
    """A device's share of the keys and values of `tokens`, which lie spread over the replicas and their partitions."""
    plan = llm.engine.replicas[0].executor.plan
    page = page_bytes(plan.dims, plan.layout, plan.page_size, plan.dtype)
    return tokens * page // (plan.page_size * plan.num_partitions * len(llm.engine.replicas))


def prefill_flops(llm: LLM, tokens: int) -> float:
    """Operations of each device of a replica for one prompt with one token out: matrices over all tokens, causal
    attention, the head for one row."""
    executor = llm.engine.replicas[0].executor
    config = executor.plan.config
    layers = sum(value.size for name, value in executor.params.items() if name.startswith("layers.") and value.ndim > 1)
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * tokens * tokens
    whole = 2.0 * layers * tokens + attention + 2 * config.vocab_size * config.embed_dim
    return whole / executor.plan.layout.mesh.size


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
