"""The device side of the engine: weights, cache, state, and the executables that run steps over them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from paddock.model import Dims

from .bucket import Bucket, BucketTable
from .kv_cache import abstract_cache, cache_spec
from .outputs import Logprob, TokenLogprobs
from .scheduler import Schedule
from .sequence import Sequence
from .step import Params, StepOutput, StepPlan, bind, edit_bias, score_rows, step
from .step_input import PackedLayout, needs_full, pack

# Rows per call of the head for prompt_logprobs, and bias entries per call of `edit_bias`.
SCORE_ROWS = 32
BIAS_ENTRIES = 512


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """One sequence's new token, with log-probabilities if it asked for them."""

    seq: Sequence
    token_id: int
    logprobs: TokenLogprobs | None


@dataclasses.dataclass
class StepFuture:
    """A step on its way: `read` waits for it."""

    rows: list[tuple[int, Sequence]]
    bucket: Bucket
    num_tokens: int
    output: StepOutput
    # (sequence, prompt position of each row, scored rows)
    prompt_scores: list[tuple[Sequence, list[int], Any]]

    def read(self) -> list[SampledToken]:
        """The sampled tokens, in the order of the schedule. Raises what the device raised."""
        sampled = self.output.sampled
        tokens = np.asarray(sampled.tokens)
        wants = any(seq.params.logprobs is not None for _, seq in self.rows)
        host = [np.asarray(part) for part in sampled] if wants else None
        result = []
        for row, seq in self.rows:
            count = seq.params.logprobs
            logprobs = None if count is None or host is None else _token_logprobs(host, row, count)
            result.append(SampledToken(seq, int(tokens[row]), logprobs))
        return result

    def read_prompt_logprobs(self) -> Iterable[tuple[Sequence, int, TokenLogprobs]]:
        """(sequence, prompt position, candidates) of every prompt token this step scored."""
        for seq, positions, scored in self.prompt_scores:
            host = [np.asarray(part) for part in scored]
            for row, position in enumerate(positions):
                yield seq, position, _token_logprobs(host, row, seq.params.prompt_logprobs or 0)


def _token_logprobs(host: list[np.ndarray], row: int, count: int) -> TokenLogprobs:
    tokens, logprob, rank, top_logprobs, top_ids = host
    found = {int(tokens[row]): Logprob(float(logprob[row]), int(rank[row]))}
    for place in range(count):
        found.setdefault(int(top_ids[row, place]), Logprob(float(top_logprobs[row, place]), place + 1))
    return found


class Executor:
    """Owns everything on the devices. All calls come from one thread: steps run in the order they are sent."""

    def __init__(self, plan: StepPlan, buckets: BucketTable, params: Params, num_pages: int, *, progress: bool = False):
        self.plan, self.buckets, self.params = plan, buckets, params
        dims = Dims.of(plan.config, plan.layout)
        self._packings = {b: PackedLayout(b, plan.page_size, plan.num_slots) for b in buckets.all()}
        dtype = params["embed"].dtype
        self._abstract = (
            abstract_cache(cache_spec(dims, num_pages, plan.page_size, dtype), plan.config.num_layers, plan.layout),
            plan.abstract_state(dims.vocab),
        )
        self._everywhere = plan.layout.sharding()
        self._executables = self._compile(progress)
        self.cache, self.state = self._executables["allocate"]()

    def _compile(self, progress: bool) -> dict[Any, jax.stages.Compiled]:
        """Every executable there will ever be, in parallel threads."""
        abstract_params = {name: _shaped(value) for name, value in self.params.items()}
        cache, state = self._abstract
        out = self._everywhere
        kept = jax.tree.map(lambda x: x.sharding, (cache, state))

        def packed_shape(bucket: Bucket) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self._packings[bucket].size,), jnp.int32, sharding=out)

        def compile_step(bucket: Bucket) -> jax.stages.Compiled:
            fn = bind(step, self.plan, self._packings[bucket])
            jitted = jax.jit(fn, donate_argnums=(1, 2), out_shardings=(*kept, out))
            return jitted.lower(abstract_params, cache, state, packed_shape(bucket)).compile()

        def ints(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=out)

        def compile_bias() -> jax.stages.Compiled:
            jitted = jax.jit(edit_bias, donate_argnums=0, out_shardings=kept[1])
            entries = ints(BIAS_ENTRIES), ints(BIAS_ENTRIES, dtype=jnp.float32)
            return jitted.lower(state, ints(), ints(), *entries).compile()

        def compile_score() -> jax.stages.Compiled:
            hidden = ints(self.plan.max_chunk_tokens, self.plan.config.embed_dim, dtype=self.params["embed"].dtype)
            jitted = jax.jit(bind(score_rows, self.plan), out_shardings=out)
            return jitted.lower(abstract_params, hidden, ints(SCORE_ROWS), ints(SCORE_ROWS)).compile()

        def compile_allocate() -> jax.stages.Compiled:
            zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._abstract)
            return jax.jit(zeros, out_shardings=kept).lower().compile()

        jobs: dict[Any, Callable[[], jax.stages.Compiled]] = {
            bucket: functools.partial(compile_step, bucket) for bucket in self._packings
        }
        jobs |= {"edit_bias": compile_bias, "score": compile_score, "allocate": compile_allocate}
        # Without this float32 products may run in TF32 on a GPU, and tokens would depend on the card.
        precision = "highest" if self.params["embed"].dtype == jnp.float32 else None

        def run(job: Callable[[], jax.stages.Compiled]) -> jax.stages.Compiled:
            with jax.default_matmul_precision(precision):
                return job()

        with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            futures = {pool.submit(run, job): key for key, job in jobs.items()}
            done = concurrent.futures.as_completed(futures)
            bar = tqdm(done, total=len(futures), desc="Compiling steps", unit="step", disable=not progress)
            return {futures[future]: future.result() for future in bar}

    @property
    def num_compilations(self) -> int:
        return len(self._executables)

    def bytes_per_device(self) -> dict[str, int]:
        """Bytes on the first device, by kind."""
        kinds = {"weights": self.params, "kv_cache": self.cache, "state": self.state}
        return {kind: sum(_local_bytes(x) for x in jax.tree.leaves(tree)) for kind, tree in kinds.items()}

    def reset(self) -> None:
        """Fresh cache and state, after a step that raised may have eaten the donated ones."""
        # The old ones go first: there is no room for two caches.
        _delete((self.cache, self.state))
        self.cache, self.state = self._executables["allocate"]()

    def dispatch(self, schedule: Schedule) -> StepFuture:
        """Send one step; returns before it has run."""
        members = [*schedule.decodes, *(chunk.seq for chunk in schedule.chunks)]
        full = any(needs_full(seq.params) for seq in members)
        bucket = self.buckets.choose(schedule, full=full)
        packed = jax.device_put(pack(self._packings[bucket], schedule), self._everywhere)
        self.cache, self.state, output = self._executables[bucket](self.params, self.cache, self.state, packed)
        output.sampled.tokens.copy_to_host_async()
        rows = [(row, seq) for row, seq in enumerate(schedule.decodes)]
        rows += [(bucket.decodes + i, chunk.seq) for i, chunk in enumerate(schedule.chunks) if chunk.samples]
        return StepFuture(rows, bucket, schedule.num_tokens, output, list(self._score_prompts(schedule, output)))

    def edit_bias(self, slot: int, bias: dict[int, float], *, clear: bool) -> None:
        """Change a slot's logit bias from the next step on."""
        entries = list(bias.items())
        for start in range(0, max(len(entries), 1), BIAS_ENTRIES):
            part = entries[start : start + BIAS_ENTRIES]
            ids = np.full(BIAS_ENTRIES, np.iinfo(np.int32).max, np.int32)
            values = np.zeros(BIAS_ENTRIES, np.float32)
            ids[: len(part)] = [token for token, _ in part]
            values[: len(part)] = [value for _, value in part]
            arguments = (np.int32(slot), np.int32(clear and start == 0), ids, values)
            placed = jax.device_put(arguments, self._everywhere)
            self.state = self._executables["edit_bias"](self.state, *placed)

    def _score_prompts(self, schedule: Schedule, output: StepOutput) -> Iterable[tuple[Sequence, list[int], Any]]:
        offset = 0
        for chunk in schedule.chunks:
            seq = chunk.seq
            if seq.params.prompt_logprobs is not None:
                # Row i of the chunk predicts position start+i+1; what a preempted sequence was told is not told again.
                first = max(chunk.start + 1, seq.num_prompt_scored + 1)
                last = min(chunk.start + chunk.length, seq.num_prompt - 1)
                for start in range(first, last + 1, SCORE_ROWS):
                    positions = list(range(start, min(start + SCORE_ROWS, last + 1)))
                    rows = np.zeros((2, SCORE_ROWS), np.int32)
                    rows[0, : len(positions)] = [offset + p - chunk.start - 1 for p in positions]
                    rows[1, : len(positions)] = [seq.prompt_token_ids[p] for p in positions]
                    placed = jax.device_put((rows[0], rows[1]), self._everywhere)
                    yield seq, positions, self._executables["score"](self.params, output.hidden, *placed)
            offset += chunk.length

    def release(self) -> None:
        """Give the device memory back."""
        _delete((self.params, self.cache, self.state))
        self._executables.clear()


def _shaped(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _delete(tree: Any) -> None:
    for array in jax.tree.leaves(tree):
        if not array.is_deleted():
            array.delete()


def _local_bytes(x: jax.Array) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
