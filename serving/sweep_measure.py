"""Times and tokens of one batch through an engine, and how near a decode step is to what memory allows."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence as ListOf

import jax
import jax.numpy as jnp
import numpy as np

from .build import Built
from .engine import StepResult
from .footprint import MAX_CHUNKS
from .kv_cache import page_bytes
from .sampling_params import SamplingParams
from .sequence import Sequence
from .sweep_plan import Case

COPY_BYTES = 2**29


@dataclasses.dataclass(frozen=True)
class Measured:
    """`prefill_seconds`: from the arrival of all prompts to the first token of the last, nothing else running.
    `decode_seconds`: median time in which each running sequence gets a token; None when only one was asked for.
    `tokens`: of every sequence. The buckets are those that most steps ran in, as text."""

    prefill_seconds: float
    decode_seconds: float | None
    tokens: list[list[int]]
    prefill_bucket: str
    decode_bucket: str


def headroom(case: Case, max_num_batched_tokens: int, num_stages: int) -> int:
    """Tokens that the first sequences may be ahead by when the last of the batch starts: decodes go before prompts."""
    by_tokens = -(-case.batch_size * case.input_len // max_num_batched_tokens)
    steps = max(by_tokens, -(-case.batch_size // MAX_CHUNKS))
    return steps + 2 * num_stages + 4


def prompts_of(case: Case, vocab_size: int) -> list[list[int]]:
    """The same for every layout."""
    draw = np.random.default_rng([case.batch_size, case.input_len])
    return draw.integers(0, vocab_size, (case.batch_size, case.input_len)).tolist()


def check(replicas: ListOf[Built], case: Case) -> None:
    """Raises ValueError for lengths that the engine does not take, and for a batch that cannot run all together: what
    would be measured are steps of fewer sequences."""
    longest = case.output_len + _spare(replicas[0], case)
    for built in replicas:
        built.engine.check([0] * case.input_len, _params(longest))
    seats = len(replicas) * min(built.engine.scheduler.seats(case.input_len + longest) for built in replicas)
    if case.batch_size > seats:
        resolved = replicas[0].resolved
        raise ValueError(
            f"a batch of {case.batch_size} does not run all together: there is room for {seats} sequences of "
            f"{case.input_len + longest} tokens, with max_num_seqs {resolved.plan.num_slots} and a KV cache of "
            f"{(resolved.num_pages - 1) * resolved.plan.num_partitions * resolved.page_size} tokens"
            f"{' on each replica' if len(replicas) > 1 else ''}"
        )


def measure(replicas: ListOf[Built], case: Case) -> Measured:
    """Run `case`, for which `check` has nothing to say, with its prompts dealt over the replicas. Raises RuntimeError
    when a step fails."""
    built = replicas[0]
    prompts = prompts_of(case, built.resolved.model.vocab_size)
    _prefill(replicas, prompts[: len(replicas)])  # whatever happens once happens here
    prefill_seconds, prefill_bucket = _prefill(replicas, prompts)
    tokens, decode_seconds, decode_bucket = _decode(replicas, prompts, case.output_len, _spare(built, case))
    return Measured(prefill_seconds, decode_seconds, tokens, prefill_bucket, decode_bucket)


def _spare(built: Built, case: Case) -> int:
    plan = built.resolved.plan
    return headroom(case, plan.max_chunk_tokens, plan.stages.count)


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def _add(replicas: ListOf[Built], prompts: list[list[int]], max_tokens: int) -> list[Sequence]:
    sequences = []
    for prompt, built in zip(prompts, itertools.cycle(replicas), strict=False):
        sequences += built.engine.add(prompt, _params(max_tokens))
    return sequences


def _turn(replicas: ListOf[Built]) -> list[StepResult]:
    results = [built.engine.step() for built in replicas if not built.engine.is_idle]
    for result in results:
        if result.error:
            raise RuntimeError(result.error)
    return results


def _prefill(replicas: ListOf[Built], prompts: list[list[int]]) -> tuple[float, str]:
    buckets: collections.Counter[str] = collections.Counter()
    start = time.perf_counter()
    _add(replicas, prompts, 1)
    while not all(built.engine.is_idle for built in replicas):
        buckets.update(result.bucket for result in _turn(replicas) if result.bucket)
    return time.perf_counter() - start, _commonest(buckets)


def _decode(
    replicas: ListOf[Built], prompts: list[list[int]], count: int, spare: int
) -> tuple[list[list[int]], float | None, str]:
    sequences = _add(replicas, prompts, count + spare)
    times: dict[int, list[float]] = {id(seq): [] for seq in sequences}
    buckets: collections.Counter[str] = collections.Counter()
    while min(map(len, times.values())) < count:
        results = _turn(replicas)
        now = time.perf_counter()
        for seq in (seq for result in results for seq in result.advanced):
            times[id(seq)].append(now)
        buckets.update(result.bucket for result in results if result.bucket and result.advanced)
    for index, built in enumerate(replicas):
        built.engine.abort(sequences[index :: len(replicas)])
        while not built.engine.is_idle:
            built.engine.step()
    # Only what lies after the last prompt's first token is decoding alone.
    start = max(mine[0] for mine in times.values())
    gaps = [b - a for mine in times.values() for a, b in itertools.pairwise(mine) if a >= start]
    tokens = [list(seq.output_token_ids[:count]) for seq in sequences]
    return tokens, statistics.median(gaps) if gaps else None, _commonest(buckets)


def _commonest(buckets: collections.Counter[str]) -> str:
    return buckets.most_common(1)[0][0]


def copy_bandwidth(device: jax.Device) -> float | None:
    """Bytes per second that `device` reads and writes in a plain copy, as measured now; None on a CPU, whose virtual
    devices share one memory."""
    if device.platform == "cpu":
        return None
    x = jax.device_put(jnp.zeros(COPY_BYTES // 4, jnp.float32), device)
    add = jax.jit(lambda x: x + 1)
    add(x).block_until_ready()
    best = min(_seconds(add, x) for _ in range(5))
    return 2 * COPY_BYTES / best


def _seconds(fn: jax.stages.Wrapped, x: jax.Array, repeats: int = 10) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        out = fn(x)
    out.block_until_ready()
    return (time.perf_counter() - start) / repeats


def decode_bytes(built: Built, case: Case, num_replicas: int) -> int:
    """Bytes that a device must read while each sequence of `case` gets a token: its weights, once for every group in
    its pipeline, and the pages of its sequences at their mean length."""
    plan, params = built.resolved.plan, built.executor.params
    # Of the embedding only the rows of the tokens are read, unless it is the head too.
    read = [x for name, x in params.items() if name != "embed" or plan.config.tie_embeddings]
    weights = sum(map(_local_bytes, read))
    page = page_bytes(plan.dims, plan.layout, plan.page_size, plan.dtype)
    sequences = case.batch_size / (plan.num_partitions * num_replicas)
    groups = min(plan.stages.count, -(-case.batch_size // num_replicas))
    cached = sequences * (case.input_len + case.output_len / 2) * page / plan.page_size
    return int(groups * weights + cached)


def _local_bytes(x: jax.Array) -> int:
    return int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
