"""An engine's compiled steps run over and over on a made-up input: what the devices take, without the host's part."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paddock.checkpoints import init_dummy_params
from paddock.model import LlamaConfig, stack_stages
from paddock.sharding import Layout

from .bucket import Bucket, BucketTable
from .compiler import Compiler, Job
from .engine_config import EngineConfig
from .executor import Executor
from .footprint import MAX_CHUNKS
from .programs import Programs
from .step_input import INTS
from .step_planning import plan_steps

SECONDS = 0.1  # of steps that are timed together
ROUNDS = 5  # of which the quickest counts: what else the machine does only adds
PAGE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Steps to be compiled: decoding `rows` and `chunks` of so many tokens, both ascending, over pages for `tokens`
    tokens at once and sequences of `context` tokens at most."""

    rows: tuple[int, ...]
    chunks: tuple[int, ...]
    context: int
    tokens: int


class LoneSteps(BucketTable):
    """Decoding alone and prompts alone."""

    def all(self) -> list[Bucket]:
        return [bucket for bucket in super().all() if not bucket.decodes or not bucket.chunk_tokens]


class StepsAlone(Compiler):
    """Makes an engine's steps, and not what only some requests ask for."""

    def run(self, jobs: Mapping[Any, Job]) -> dict[Any, jax.stages.Compiled]:
        return super().run({key: job for key, job in jobs.items() if isinstance(key, Bucket) or key == "allocate"})


class StepReplay:
    """The steps of `model` in `layout` with random weights, keys and values, and pages in random order.

    A step leaves the positions as they were, so that every run of it reads the same bytes. `close` frees the devices.
    """

    def __init__(self, model: LlamaConfig, layout: Layout, dtype: str, sizes: Sizes):
        stages = layout.num_shards("layers")
        slots = sizes.rows[-1] * stages
        self.sizes = sizes
        self.plan, _ = plan_steps(
            model,
            layout,
            dtype=dtype,
            page_size=PAGE_SIZE,
            max_num_seqs=slots,
            max_num_batched_tokens=max(sizes.chunks[-1], slots),
            max_model_len=sizes.context,
            num_logprobs=min(EngineConfig.max_logprobs, model.vocab_size),
            add_norm=EngineConfig.add_norm,
            all_reduce=EngineConfig.all_reduce,
            products=EngineConfig.products,
        )
        table = LoneSteps(sizes.rows, sizes.chunks, min(MAX_CHUNKS, slots), self.plan.branches)
        # One more for each sequence's last, which may be begun, and the scratch page.
        self.programs = Programs(self.plan, table, stages * sizes.tokens // PAGE_SIZE + slots + 1)
        params = stack_stages(model, layout, init_dummy_params(model, layout, dtype))
        self.executor = Executor(self.programs, params, StepsAlone())
        for pool in jax.tree.leaves(self.executor.cache):
            pool.delete()
        keys = iter(range(len(jax.tree.leaves(self.programs.cache))))
        self.executor.cache = jax.tree.map(lambda x: _noise(x)(next(keys)), self.programs.cache)

    def decode(self, rows: int, context: int) -> float:
        """Seconds of a step in which `rows` sequences of `context` tokens get one more; of a tick, over stages, in
        each of which so many are. Raises ValueError for sizes that were not asked for."""
        bucket = self._bucket(lambda bucket: bucket.decodes == rows and context <= self.sizes.context)
        views = [self._empty(bucket) for _ in range(self.plan.stages.count)]
        for stage, (_, parts) in enumerate(views):
            slots = np.arange(rows) + stage * rows
            parts["decode_slot"][:], parts["decode_position"][:] = slots, context - 1
            parts["row_ints"][INTS.index("slot")], parts["row_ints"][INTS.index("position")] = slots, context
        self._give_pages(rows * len(views), context)
        return self._seconds(bucket, [packed for packed, _ in views])

    def chunk(self, tokens: int, start: int) -> float:
        """Seconds of a step with the tokens `start` to `start + tokens` of one prompt, over stages of one in each."""
        end = start + tokens
        bucket = self._bucket(lambda bucket: bucket.chunk_tokens == tokens and end <= self.sizes.context)
        views = [self._empty(bucket) for _ in range(self.plan.stages.count)]
        ids = np.random.default_rng(0).integers(self.plan.config.vocab_size, size=tokens)
        for slot, (_, parts) in enumerate(views):
            parts["token_ids"][:], parts["token_slot"][:] = ids, slot
            parts["token_position"][:] = start + np.arange(tokens)
            for name, value in (("slot", slot), ("length", tokens), ("kv_len", end)):
                parts[f"chunk_{name}"][0] = value
            parts["row_ints"][INTS.index("slot"), 0], parts["row_ints"][INTS.index("position"), 0] = slot, end
        self._give_pages(len(views), end)
        return self._seconds(bucket, [packed for packed, _ in views])

    def close(self) -> None:
        self.executor.release()

    def _bucket(self, wanted: Callable[[Bucket], bool]) -> Bucket:
        found = next((bucket for bucket in self.programs.buckets.all() if wanted(bucket)), None)
        if found is None:
            raise ValueError(f"no such step was asked for: {self.sizes}")
        return found

    def _empty(self, bucket: Bucket) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        packing = self.programs.packings[bucket]
        packed = packing.empty.copy()
        return packed, packing.views(packed)

    def _give_pages(self, sequences: int, tokens: int) -> None:
        """Pages of their own, in random order, to the first slots."""
        each = -(-tokens // PAGE_SIZE)
        if sequences * each >= self.programs.num_pages:
            raise ValueError(f"{sequences} sequences of {tokens} tokens need more pages than {self.programs.num_pages}")
        described = self.programs.state.page_table
        pages = np.random.default_rng(0).permutation(self.programs.num_pages - 1)[: sequences * each] + 1
        table = np.zeros(described.shape, np.int32)
        table[:sequences, :each] = pages.reshape(sequences, each)
        page_table = jax.device_put(table, described.sharding)
        self.executor.state = self.executor.state._replace(page_table=page_table)

    def _seconds(self, bucket: Bucket, packed: list[np.ndarray]) -> float:
        executor, run = self.executor, self.executor.compiled[bucket]
        given = self.plan.layout.put(np.stack(packed) if len(packed) > 1 else packed[0])
        # Collectives of overlapping steps wait for each other for ever on CPU devices.
        one_by_one = self.plan.layout.mesh.devices.flat[0].platform == "cpu"

        def timed(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                executor.cache, executor.state, output = run(executor.params, executor.cache, executor.state, given)
                if one_by_one:
                    jax.block_until_ready(output)
            jax.block_until_ready(output)
            return (time.perf_counter() - start) / count

        timed(2)
        count = max(3, int(SECONDS / timed(3)))
        return min(timed(count) for _ in range(ROUNDS))


@functools.cache
def _noise(described: jax.ShapeDtypeStruct) -> Any:
    """Makes an array like `described` from a number; zeros would run faster, since they take less power."""

    def make(seed: jax.Array) -> jax.Array:
        bits = jax.random.bits(jax.random.key(seed), described.shape, jnp.uint8)
        return ((bits.astype(jnp.float32) - 127.5) / 128).astype(described.dtype)

    return jax.jit(make, out_shardings=described.sharding)


def timed_steps(replay: StepReplay, points: Iterable[tuple[str, int, int]]) -> dict[tuple[str, int, int], float]:
    """Seconds by point: ("decode", rows, context) or ("chunk", tokens, start)."""
    kinds = {"decode": replay.decode, "chunk": replay.chunk}
    return {point: kinds[point[0]](*point[1:]) for point in points}
