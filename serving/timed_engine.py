"""Whole engines timed from within: their own scheduler, packing and steps, without the server's threads around them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax

from paddock.model import LlamaConfig
from paddock.sharding import MeshConfig

from .bucket import Bucket
from .build import Built, build
from .engine_config import EngineConfig
from .footprint import MAX_CHUNKS
from .platform import prepare
from .sampling_params import SamplingParams
from .schedule import Schedule
from .sequence import Sequence
from .step_replay import LoneSteps, StepsAlone

WARM_STEPS = 4
REPEATS = 3  # of a prompt, of which the median counts
T = TypeVar("T")


class FewSteps(LoneSteps):
    """Decoding alone, prompts alone, and one step for both, which only the way to full batches takes."""

    def all(self) -> list[Bucket]:
        return sorted([*super().all(), self.both], reverse=True)

    def choose(self, schedules: Iterable[Schedule]) -> Bucket:
        bucket = super().choose(schedules)
        return self.both if bucket.decodes and bucket.chunk_tokens else bucket

    @property
    def both(self) -> Bucket:
        return Bucket(self.decodes[-1], self.chunk_tokens[-1], self.max_chunks, self.full)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """`seconds` until each sequence had one more token, at a mean of `context` tokens before it."""

    seconds: float
    context: float


class TimedEngine:
    """`model` with random weights over the devices of `mesh`, one engine for each replica of it, compiled for batches
    of exactly `batches` sequences and prompts of exactly `prompts` tokens. `close` frees the devices.

    Raises ValueError as an engine's start does.
    """

    def __init__(
        self, model: LlamaConfig, mesh: str = "", *, batches: tuple[int, ...], prompts: tuple[int, ...], **options: Any
    ):
        parsed = MeshConfig.parse(mesh)
        self.replicas, self.stages = parsed.num_replicas, parsed.sizes.get("pipe", 1)
        each = self.replicas * self.stages
        if any(batch % each for batch in batches):
            raise ValueError(f"batches {batches} do not divide over {self.replicas} replicas and {self.stages} stages")
        most = batches[-1] // self.replicas
        if most >= prompts[-1]:
            raise ValueError(f"batches of {most} sequences leave no room in steps of {prompts[-1]} tokens")
        options = {"max_num_seqs": most, "max_num_batched_tokens": prompts[-1]} | options
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(model.to_hf_dict()))
            config = EngineConfig(model=folder, load_format="dummy", skip_tokenizer_init=True, mesh=mesh, **options)
            prepare(config)  # before anything asks for a device
            # As in an engine's own table: on CPU the step has all branches of the sampler.
            rows, full = tuple(batch // each for batch in batches), jax.default_backend() == "cpu"
            self.engines: list[Built] = []
            for replica in range(self.replicas):
                table = FewSteps(rows, prompts, min(MAX_CHUNKS, most), full)
                self.engines.append(build(config, replica=replica, buckets=table, make=StepsAlone))
        self._draw = random.Random(0)

    def decode(self, batch: int, context: int, steps: int = 32) -> Decoded:
        """`batch` equal sequences, timed over `steps` steps around `context` tokens once all of them decode."""
        found = self._on_all(lambda built: self._decode(built, batch // self.replicas, context, steps))
        return Decoded(statistics.mean(one.seconds for one in found), statistics.mean(one.context for one in found))

    def prefill(self, tokens: int) -> float:
        """Seconds from a prompt's arrival at an idle engine to its first token."""
        times = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            self._add(self.engines[0], 1, tokens, 1)
            while not self.engines[0].engine.is_idle:
                _checked(self.engines[0])
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def close(self) -> None:
        for built in self.engines:
            built.engine.close()
            built.executor.release()

    def _decode(self, built: Built, batch: int, context: int, steps: int) -> Decoded:
        engine, stages = built.engine, self.stages
        turns = stages * (steps + WARM_STEPS)
        prompt = max(context - steps // 2, 1)
        # While the last prompts are on their way the first ones decode.
        by_tokens = -(-batch * prompt // built.resolved.plan.max_chunk_tokens)
        on_the_way = max(by_tokens, -(-batch // built.resolved.buckets.max_chunks)) + stages
        sequences = self._add(built, batch, prompt, on_the_way + turns // stages + 2 * stages)
        while engine.scheduler.waiting or any(seq.num_computed < prompt for seq in sequences):
            _checked(built)
        for _ in range(stages * WARM_STEPS):
            _checked(built)
        before = statistics.mean(seq.num_computed for seq in sequences)
        start = time.perf_counter()
        for _ in range(stages * steps):
            _checked(built, rows=batch // stages)
        seconds = (time.perf_counter() - start) / steps
        after = statistics.mean(seq.num_computed for seq in sequences)
        engine.abort([seq for seq in sequences if seq.finish_reason is None])
        while not engine.is_idle:
            engine.step()
        return Decoded(seconds, (before + after) / 2)

    def _add(self, built: Built, count: int, prompt: int, new: int) -> list[Sequence]:
        vocab = built.resolved.model.vocab_size
        params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
        prompts = [[self._draw.randrange(vocab) for _ in range(prompt)] for _ in range(count)]
        for token_ids in prompts:
            built.engine.check(token_ids, params)
        return [built.engine.add(token_ids, params)[0] for token_ids in prompts]

    def _on_all(self, run: Callable[[Built], T]) -> list[T]:
        if len(self.engines) == 1:
            return [run(self.engines[0])]
        with concurrent.futures.ThreadPoolExecutor(len(self.engines)) as pool:
            return list(pool.map(run, self.engines))


def _checked(built: Built, rows: int | None = None) -> None:
    """A step that did not fail and, where `rows` is given, had so many decoding ones and no chunk."""
    result = built.engine.step()
    if result.error:
        raise RuntimeError(result.error)
    schedule = result.schedule
    if rows is not None and (len(schedule.decodes) != rows or schedule.chunks):
        raise RuntimeError(f"a timed step had {len(schedule.decodes)} decoding rows and {len(schedule.chunks)} chunks")
