"""A tiny model run through the engine in any layout, by one executable: what the layout tests compare."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from engines import TokenComparison

from paddock.checkpoints.canonical import expand
from paddock.checkpoints.dummy import init_dummy_params
from paddock.model import Dims, placements, stack_stages
from paddock.model.shapes import SHAPES
from paddock.serving.bucket import Bucket
from paddock.serving.compiler import Job
from paddock.serving.engine import Engine, Limits
from paddock.serving.engine_config import EngineConfig
from paddock.serving.executor import Executor
from paddock.serving.page_pool import PagePool
from paddock.serving.programs import Programs
from paddock.serving.resolve import Resolved, resolve
from paddock.serving.sampling_params import SamplingParams
from paddock.serving.scheduler import Scheduler
from paddock.sharding import Layout

# Three layers, so that two stages do not divide them; two kv heads, fewer than most layouts have shards.
CONFIG = dataclasses.replace(tiny_config.CONFIG, num_layers=3)
LENGTHS = (3, 21, 9, 14, 1, 30, 6, 11)
NEW_TOKENS = (12, 5, 17, 8, 20, 6, 9, 13)
NUM_SLOTS, PAGE_SIZE, STEP_TOKENS = 8, 4, 32


class StepAlone(Programs):
    """Without the programs for logit bias, prompt_logprobs and what else few requests ask for."""

    def jobs(self) -> dict[Any, Job]:
        return {key: job for key, job in super().jobs().items() if isinstance(key, Bucket) or key == "allocate"}


def resolve_tiny(monkeypatch: pytest.MonkeyPatch, **layout: Any) -> Resolved:
    """Raises ValueError where the layout does not suit the model."""
    monkeypatch.setitem(SHAPES, "tiny-layouts", CONFIG)
    options = dict(
        load_format="dummy",
        dtype="float32",
        max_num_seqs=NUM_SLOTS,
        max_num_batched_tokens=STEP_TOKENS,
        block_size=PAGE_SIZE,
        kv_cache_memory_bytes=2**20,
        skip_tokenizer_init=True,
    )
    return resolve(EngineConfig(model="tiny-layouts", **{**options, **layout}))


@functools.cache
def canonical_params() -> dict[str, np.ndarray]:
    alone = Layout.build(devices=jax.devices()[:1])
    return {name: np.asarray(x) for name, x in init_dummy_params(CONFIG, alone, "float32").items()}


def place_params(layout: Layout) -> dict[str, jax.Array]:
    """Those that load_format="dummy" makes in any layout, as tests/checkpoints/test_dummy.py sees, without compiling
    for each layout what makes them."""
    dims, places = Dims.of(CONFIG, layout), placements(CONFIG, layout, "float32")
    expanded = {name: expand(name, jnp.asarray(x), dims) for name, x in canonical_params().items()}
    placed = {name: jax.device_put(np.asarray(x), places[name]) for name, x in expanded.items()}
    return stack_stages(CONFIG, layout, placed)


def engine_of(resolved: Resolved, *, pages: int, full: bool) -> Engine:
    """An engine with `pages` usable pages, all partitions together; not `full`: with the sampler's fast half alone."""
    plan = dataclasses.replace(resolved.plan, branches=full)
    # One executable a layout: every step takes the largest bucket.
    table = dataclasses.replace(resolved.buckets, single=True, full=full)
    num_pages = pages // plan.num_partitions + 1
    executor = Executor(StepAlone(plan, table, num_pages), place_params(plan.layout))
    scheduler = Scheduler(
        [PagePool(num_pages, PAGE_SIZE) for _ in range(plan.num_partitions)],
        max_num_seqs=plan.num_slots,
        max_num_batched_tokens=plan.max_chunk_tokens,
        max_chunks=table.max_chunks,
        num_stages=plan.stages.count,
    )
    return Engine(executor, scheduler, Limits(CONFIG.vocab_size, resolved.max_model_len, 20, frozenset(), 0))


@dataclasses.dataclass
class Run:
    """The tokens of each request, how far the likeliest token was ahead of the next, and the preemptions on the way."""

    tokens: list[list[int]]
    margins: list[list[float]]
    preemptions: int


def run(resolved: Resolved, *, pages: int, full: bool = False) -> Run:
    """A mixed batch: requests join as others leave and are aborted, and with few pages some are preempted.

    Margins are known where the step is `full`, the sampler with all its pieces.
    """
    engine = engine_of(resolved, pages=pages, full=full)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in LENGTHS]
    sequences, tokens, margins = [], [], []
    where: dict[Any, int] = {}
    step = 0
    while len(sequences) < len(prompts) or not engine.is_idle:
        if step % 2 == 0 and len(sequences) < len(prompts):
            index = len(sequences)
            logprobs = 2 if full else None
            params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS[index], ignore_eos=True, logprobs=logprobs)
            sequences += engine.add(prompts[index], params)
            where[sequences[-1]] = index
            tokens.append([])
            margins.append([])
            noise = engine.add(prompts[-1 - index], SamplingParams(temperature=1.0, seed=index, max_tokens=20))
        if step % 2 == 1:
            engine.abort(noise)
        result = engine.step()
        for seq in result.advanced:
            if seq in where:
                index = where[seq]
                tokens[index].append(seq.output_token_ids[-1])
                if seq in result.logprobs:
                    first, second = sorted((c.logprob for c in result.logprobs[seq].values()), reverse=True)[:2]
                    margins[index].append(first - second)
        step += 1
        assert step < 600
    engine.scheduler.check_idle()
    engine.runner.release()  # type: ignore[attr-defined]
    return Run(tokens, margins, engine.scheduler.num_preemptions)


def assert_same(got: Run, want: Run) -> None:
    comparison = TokenComparison()
    for one, other, margins in zip(got.tokens, want.tokens, want.margins, strict=True):
        comparison.add(one, other, margins)
    comparison.check()
