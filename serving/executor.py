"""The device side of the engine: weights, cache, state, and the executables that run steps over them."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from typing import Any

import jax
import numpy as np

from paddock.model import reduction_axes

from .bucket import Bucket
from .compiler import Compiler
from .mailboxes import Mailboxes
from .outputs import Logprob, TokenLogprobs
from .pack import Group, Packer, enter_pages, growth, lay_out
from .pipeline import Params
from .programs import BIAS_ENTRIES, SCORE_ROWS, Programs
from .sampler import Sampled
from .schedule import Schedule
from .sequence import Sequence
from .step_input import PackedLayout
from .step_products import MAILBOXES


@dataclasses.dataclass
class StepFuture:
    """A step on its way: `read` waits for it. `seqs` sample a token each, at `rows` of the output."""

    seqs: ListOf[Sequence]
    rows: np.ndarray
    bucket: Bucket
    num_tokens: int
    sampled: Sampled
    # (sequence, prompt position of each row, scored rows)
    prompt_scores: list[tuple[Sequence, list[int], Any]]

    def read(self) -> tuple[np.ndarray, dict[Sequence, TokenLogprobs]]:
        """A token for each of `seqs` [B], and log-probabilities for those that asked. Raises what the device raised."""
        tokens = np.asarray(self.sampled.tokens)[self.rows]
        asking = [i for i, seq in enumerate(self.seqs) if seq.params.logprobs is not None] if self.bucket.full else []
        if not asking:
            return tokens, {}
        host, rows = [np.asarray(part) for part in self.sampled], self.rows.tolist()
        return tokens, {self.seqs[i]: _token_logprobs(host, rows[i], self.seqs[i].params.logprobs or 0) for i in asking}

    def read_prompt_logprobs(self) -> ListOf[tuple[Sequence, int, TokenLogprobs]]:
        """(sequence, prompt position, candidates) of every prompt token this step scored."""
        entries: list[tuple[Sequence, int, TokenLogprobs]] = []
        for seq, positions, scored in self.prompt_scores:
            host, count = [np.asarray(part) for part in scored], seq.params.prompt_logprobs or 0
            entries += [(seq, place, _token_logprobs(host, row, count)) for row, place in enumerate(positions)]
        return entries


def _token_logprobs(host: list[np.ndarray], row: int, count: int) -> TokenLogprobs:
    tokens, logprob, rank, top_logprobs, top_ids = host
    found = {int(tokens[row]): Logprob(float(logprob[row]), int(rank[row]))}
    for place in range(count):
        found.setdefault(int(top_ids[row, place]), Logprob(float(top_logprobs[row, place]), place + 1))
    return found


@dataclasses.dataclass
class _Step:
    """What goes up, and whose tokens come back: `leaving` comes out of the last pipeline stage, None while they fill,
    its decodes at `decode_rows` and what it samples at `rows`."""

    packing: PackedLayout
    packed: np.ndarray
    leaving: Group | None
    decode_rows: np.ndarray
    rows: np.ndarray
    # Whether there are page updates in `packed`; what the next step of the same sequences has more, once it is known.
    enters: bool = True
    growth: np.ndarray | None = None


NOTHING = Schedule((), ())


class Executor:
    """Owns everything on the devices. All calls come from one thread: steps run in the order they are sent."""

    def __init__(self, programs: Programs, params: Params, compiler: Compiler | None = None):
        self.programs, self.plan, self.buckets, self.params = programs, programs.plan, programs.buckets, params
        self.compiled = (compiler or Compiler()).run(programs.jobs())
        self._packer = Packer(self.plan.page_size, self.plan.num_slots, self.plan.num_partitions)
        # What is at each pipeline stage, the latest to enter first; without stages only what was sent last.
        self._groups: deque[Group | None] = deque([None] * self.plan.stages.count, maxlen=self.plan.stages.count)
        self._last: _Step | None = None
        self.cache, self.state = self.compiled["allocate"]()
        self._open_mailboxes()

    def _open_mailboxes(self) -> None:
        if self.plan.has_mailboxes:
            self._mailboxes = Mailboxes.open(self.plan.layout.mesh, reduction_axes(self.plan.layout))
            self.params = {**self.params, MAILBOXES: self._mailboxes.table}

    @property
    def num_compilations(self) -> int:
        return len(self.compiled)

    def bytes_per_device(self) -> dict[str, int]:
        """Bytes on the first device, by kind."""
        kinds = {"weights": self.params, "kv_cache": self.cache, "state": self.state}
        return {kind: sum(_local_bytes(x) for x in jax.tree.leaves(tree)) for kind, tree in kinds.items()}

    def reset(self) -> None:
        """Fresh cache and state, after a step that raised may have eaten the donated ones."""
        # The old ones go first: there is no room for two caches.
        _delete((self.cache, self.state))
        self._last = None
        self._groups.extend([None] * len(self._groups))
        self.cache, self.state = self.compiled["allocate"]()
        self._open_mailboxes()  # devices may have stopped in different calls

    @property
    def in_flight(self) -> bool:
        """Whether groups are still between pipeline stages: they come out as further steps are sent."""
        return any(self._groups[stage] for stage in range(len(self._groups) - 1))

    def dispatch(self, schedule: Schedule) -> StepFuture | None:
        """Send one step; returns before it has run. What is returned comes out of the last stage in this step: without
        stages `schedule` itself, with stages an earlier one, and None where the pipeline was still filling."""
        step = self._last = self._repeat(schedule) or self._pack(schedule)
        bucket, leaving, sent = step.packing.bucket, step.leaving, self.plan.layout.sent(step.packed)
        self.cache, self.state, output = self.compiled[bucket](self.params, self.cache, self.state, sent)
        if leaving is None:
            return None
        sampled = output.sampled
        if leaving.full and not bucket.full:
            self.state, sampled = self.compiled["resample", bucket](self.state, sent, output.logits)
            bucket = dataclasses.replace(bucket, full=True)
        # Logits and hidden states are large, and nobody's from here on.
        scores = [] if output.hidden is None else list(self._score_prompts(leaving, output.hidden))
        return StepFuture(leaving.sampling, step.rows, bucket, leaving.num_tokens, sampled, scores)

    def _repeat(self, schedule: Schedule) -> _Step | None:
        """The last step moved on, where the same sequences decode and nothing else happens: most steps are such, and a
        fifth of the work."""
        step = self._last
        if step is None or step.leaving is None or len(self._groups) > 1:
            return None
        before = step.leaving.schedule
        if schedule.chunks or before.chunks or schedule.decodes is not before.decodes:
            return None
        if step.growth is None:
            step.growth = growth(step.packing, step.decode_rows)
        step.packed = step.packed + step.growth  # not in place: the one before may still be on its way up
        enters = len(schedule.entered) > 0
        if step.enters or enters:
            enter_pages(step.packing, step.packed, schedule.entered)
            step.enters = enters
        return step

    def _pack(self, schedule: Schedule) -> _Step:
        self._groups.appendleft(self._packer.group(schedule) if schedule else None)
        bucket = self.buckets.choose(group.schedule for group in self._groups if group)
        packing, leaving = self.programs.packings[bucket], self._groups[-1]
        packed = np.empty(self.programs.packed_shape(bucket), np.int32)
        groups = [group or self._packer.group(NOTHING) for group in self._groups]
        for group, part in zip(groups, packed.reshape(len(groups), -1), strict=True):
            decode_rows, chunk_rows = lay_out(packing, group, self.plan.num_partitions, part)
        rows = np.concatenate([decode_rows, bucket.decodes + chunk_rows[groups[-1].samples]])
        return _Step(packing, packed, leaving, decode_rows, rows)

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
            placed = [self.plan.layout.put(np.asarray(argument)) for argument in arguments]
            self.state = self.compiled["edit_bias"](self.state, *placed)

    def _score_prompts(self, group: Group, hidden: jax.Array) -> Iterable[tuple[Sequence, list[int], Any]]:
        share = self.plan.max_chunk_tokens // self.plan.num_partitions
        for chunk, offset in zip(group.schedule.chunks, group.chunks[1].tolist(), strict=True):
            seq = chunk.seq
            if seq.params.prompt_logprobs is not None and not chunk.is_stale:
                # Row i of the chunk predicts position start+i+1; what a preempted sequence was told is not told again.
                first = max(chunk.start + 1, seq.num_prompt_scored + 1)
                last = min(chunk.start + chunk.length, seq.num_prompt - 1)
                begin = seq.partition * share + offset - chunk.start - 1
                for start in range(first, last + 1, SCORE_ROWS):
                    positions = list(range(start, min(start + SCORE_ROWS, last + 1)))
                    rows = np.zeros((2, SCORE_ROWS), np.int32)
                    rows[0, : len(positions)] = [begin + p for p in positions]
                    rows[1, : len(positions)] = [seq.prompt_token_ids[p] for p in positions]
                    placed = self.plan.layout.put(rows[0]), self.plan.layout.put(rows[1])
                    yield seq, positions, self.compiled["score"](self.params, hidden, *placed)

    def release(self) -> None:
        """Give the device memory back."""
        _delete((self.params, self.cache, self.state))
        self.compiled.clear()


def _delete(tree: Any) -> None:
    for array in jax.tree.leaves(tree):
        if not array.is_deleted():
            array.delete()


def _local_bytes(x: jax.Array) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
