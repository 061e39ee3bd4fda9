"""What runs in the next step. Plain Python, no JAX, and deterministic: the same calls give the same schedule."""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque
from collections.abc import Sequence as Many

import numpy as np

from .chunk_budget import chunk_budget
from .landing import Landing
from .page_pool import PagePool
from .partition import Partition
from .schedule import NO_PAGES, Chunk, Schedule
from .sequence import Sequence, SequenceStatus

# Steps in a row that have no room for who could decode: some seconds of an 8B on an H100.
MOST_ALONE = 32


class Scheduler:
    """First come first served, decodes before prompts, prompts in chunks, preemption by recompute.

    A step takes up to `max_num_batched_tokens` prompt tokens, and beside them one for each decoding sequence: it is
    compiled for both together, so prompts are not cut because something decodes. A decoding sequence that finds no
    free page takes those of the latest arrival of its partition, which goes back to the head of the queue and is
    computed again later. Slots, budget and chunks are divided equally over the partitions, one for each of `pools`.

    With `num_stages` pipeline stages a schedule is one tick: its sequences come out `num_stages` ticks later, and only
    then may be scheduled again. Taking at most an equal share of the decoding sequences each tick keeps `num_stages`
    groups of the same size in flight, and prompts are cut so that there is a chunk for every stage.

    Sequences that are patient, if no others decode, wait while there are prompts for whole steps: then more of them
    decode together, in steps that take little longer for it, and end together. For MOST_ALONE steps in a row at most.

    `chunk_sizes` are the numbers of prompt tokens that steps are compiled for, ascending. Prompts are cut to them
    rather than padded: 600 tokens in a step compiled for 4,096 would take as long as 4,096.
    """

    def __init__(
        self,
        pools: Many[PagePool],
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_chunks: int,
        num_stages: int = 1,
        chunk_sizes: Many[int] = (),
    ):
        count = len(pools)
        self.partitions = [Partition(i, pool, max_num_seqs // count) for i, pool in enumerate(pools)]
        self.max_num_batched_tokens = max_num_batched_tokens // count
        self.max_chunks = max(1, max_chunks // count)
        self.num_stages = num_stages
        self.num_groups = num_stages  # that decoding sequences are split into; a benchmark may want one
        self.chunk_sizes = [size // count for size in chunk_sizes]
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0
        self._tick = 0
        self._num_alone = 0
        # Who took the last tokens, and once they have taken two, all of them as one.
        self._landed: Many[Sequence] = ()
        self._landing: Landing | None = None

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    @property
    def running(self) -> list[Sequence]:
        """All admitted sequences in order of arrival."""
        return list(heapq.merge(*(part.running for part in self.partitions), key=lambda seq: seq.seq_id))

    @property
    def num_running(self) -> int:
        return sum([len(part.running) for part in self.partitions])

    @property
    def usage(self) -> float:
        """Share of usable pages in use, 0 to 1."""
        return sum([part.pool.usage for part in self.partitions]) / len(self.partitions)

    @property
    def load(self) -> tuple[int, int, float]:
        """Sequences running and waiting, and the usage; any thread may ask."""
        return self.num_running, len(self.waiting), self.usage

    def seats(self, num_tokens: int) -> int:
        """Sequences that grow to `num_tokens` and may run together without one giving way."""
        return sum(min(p.num_slots, p.pool.num_usable // p.pool.pages_for(num_tokens)) for p in self.partitions)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not any([part.running for part in self.partitions])

    def schedule(self) -> Schedule:
        """Choose the next step and take its pages and slots; counters move on as if it had run."""
        self._tick += 1
        # What fits the partitions together may fit none of them: then somebody has to decode to make room.
        if self.waiting and self._prompts_go_first() and (alone := self._take_prompts([False] * len(self.partitions))):
            self._num_alone += 1
            return Schedule((), alone)
        self._num_alone = 0
        shares = [self._decode(part) for part in self.partitions]
        chunks: tuple[Chunk, ...] = ()
        if self.waiting or any([part.prefilling for part in self.partitions]):
            chunks = self._take_prompts([bool(share.decodes) for share in shares])
        if len(shares) == 1:
            return dataclasses.replace(shares[0], chunks=chunks) if chunks else shares[0]
        decodes = tuple(seq for share in shares for seq in share.decodes)
        rows = np.concatenate([share.decode_rows for share in shares], axis=1)
        return Schedule(decodes, chunks, rows, entered=np.concatenate([share.entered for share in shares]))

    def _prompts_go_first(self) -> bool:
        """Of those that wait, some at least. Not over stages, where groups that decode keep the others busy."""
        if self.num_stages > 1 or self._num_alone == MOST_ALONE:
            return False
        if not all([part.decoding.is_patient for part in self.partitions]):
            return False
        return all(left >= self.max_num_batched_tokens for left, _ in self._prompts())

    def _take_prompts(self, beside: list[bool]) -> tuple[Chunk, ...]:
        """Chunks of prompts; `beside` says of each partition whether it has decoding rows in the step, too."""
        budgets = [
            chunk_budget(
                left,
                whole,
                most=self.max_num_batched_tokens,
                sizes=self.chunk_sizes,
                num_stages=self.num_stages,
                beside=decodes,
            )
            for (left, whole), decodes in zip(self._prompts(), beside, strict=True)
        ]
        # What was appended stays valid: a victim is never earlier in `running` than the sequence that preempts it.
        chunks: list[list[Chunk]] = [[] for _ in self.partitions]
        for part, mine in zip(self.partitions, chunks, strict=True):
            for seq in part.prefilling:
                if budgets[part.index] and len(mine) < self.max_chunks:
                    budgets[part.index] -= self._append_chunk(mine, seq, budgets[part.index])
        while self.waiting:
            seq = self.waiting[0]
            room = [p for p in self.partitions if budgets[p.index] and len(chunks[p.index]) < self.max_chunks]
            room = [part for part in room if part.can_admit(seq)]
            # A preempted sequence's newest token may still be on the device: it must be known to be recomputed.
            if seq.in_flight or not room:
                break
            self.waiting.popleft()
            part = max(room, key=lambda part: (part.pool.num_free, -part.index))
            part.admit(seq)
            budgets[part.index] -= self._append_chunk(chunks[part.index], seq, budgets[part.index])
        for chunk in (chunk for mine in chunks for chunk in mine):
            seq = chunk.seq
            seq.num_computed += chunk.length
            if chunk.samples:
                self.partitions[seq.partition].start_decoding(seq, self._tick + self.num_stages)
        return tuple(chunk for mine in chunks for chunk in mine)

    def land(self, seqs: Many[Sequence], tokens: Many[int] | np.ndarray) -> tuple[Many[Sequence], list[Sequence]]:
        """A sampled token of each was read: `tokens` [B]. Returns the sequences that took theirs (`seqs` itself where
        all did), for one that has ended meanwhile has no use for it, and those among them for which it is the last."""
        read = np.asarray(tokens)
        if self._landing is not None and self._landing.seqs is seqs and self._landing.take(read):
            return seqs, []
        self._dissolve()
        ended, last = self._land_each(seqs, read.tolist())
        if seqs and seqs is self._landed and not last and all(seq.status is SequenceStatus.RUNNING for seq in seqs):
            self._landing = Landing(seqs)
        self._landed = seqs
        return [seq for seq in seqs if seq not in ended] if ended else seqs, last

    def _land_each(self, seqs: Many[Sequence], tokens: Many[int]) -> tuple[list[Sequence], list[Sequence]]:
        """Those that had ended, and those that took their last token."""
        running, ended, last = SequenceStatus.RUNNING, [], []
        for seq, token in zip(seqs, tokens, strict=True):
            if seq.status is not running and self._land_late(seq):
                ended.append(seq)
                continue
            output = seq.given
            output.append(token)
            if token in seq.stop_token_ids or len(output) >= seq.max_tokens:
                last.append(seq)
        return ended, last

    def _land_late(self, seq: Sequence) -> bool:
        """Whether a sequence that stopped running before its token came has ended."""
        seq.left_in_flight -= 1
        if not seq.left_in_flight and seq.slot >= 0:
            self.partitions[seq.partition].release_slot(seq)
        return seq.status is SequenceStatus.FINISHED

    def finish(self, seq: Sequence, reason: str, stop_reason: int | None = None) -> None:
        """Release everything `seq` holds, whatever it was doing. Its steps in flight write to pages that only later
        steps can be given, and steps run in order, at every pipeline stage."""
        if seq.status is SequenceStatus.FINISHED:
            return
        if seq.status is SequenceStatus.RUNNING:
            self._release(seq)
        else:
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason

    def restart(self) -> None:
        """Send everything that runs back to the queue, in order: the cache and the tokens in flight are lost."""
        for seq in reversed(self.running):
            self._preempt(seq)
        for seq in self.waiting:
            seq.left_in_flight, seq.slot = 0, -1
        for part in self.partitions:
            part.reset_slots()

    def check_idle(self) -> None:
        """Raises RuntimeError if pages or slots leaked; to be called when nothing runs."""
        for part in self.partitions:
            part.check_whole()

    def _decode(self, part: Partition) -> Schedule:
        """The decoding sequences that take part in this tick, with room for their next token: see `advance`."""
        decoding, entered = part.decoding, NO_PAGES
        # Those of fewer groups than stages enter in the same ticks of each round, or prompts that ended in different
        # ticks would stay as many groups.
        enters = self._tick % self.num_stages < self.num_groups
        due = decoding.due(self._tick, -(-len(decoding) // self.num_groups) if enters else 0)
        short = decoding.short(due)
        if len(short):
            while not part.pool.can_take(len(short)):
                # Who gives way is the last, perhaps one of these: the indices of the others stay.
                self._preempt(part.running[-1])
                short = short[short < len(decoding)]
            entered = decoding.enter(short, part.pool.take(len(short)), part.pool.page_size)
        decodes, rows, moved = decoding.advance(due, self._tick + self.num_stages)
        return Schedule(decodes, (), rows, moved, entered)

    def _prompts(self) -> list[tuple[int, int]]:
        """Prompt tokens that each partition could take now, and the whole of the prompts that they belong to: of those
        that run, and an equal share of those that there are slots, pages and chunks for."""
        slots, pages = (sum(counts) for counts in zip(*self._room(), strict=True))
        waiting = 0
        for seq in self.waiting:
            slots, pages = slots - 1, pages - self.partitions[0].pool.pages_for(seq.num_tokens)
            if seq.in_flight or slots < 0 or pages < 0:
                break
            waiting += seq.num_tokens
        share = -(-waiting // len(self.partitions))
        found = []
        for part in self.partitions:
            whole = sum(seq.num_tokens for seq in part.prefilling)
            done = sum(seq.num_computed for seq in part.prefilling)
            found.append((whole - done + share, whole + share))
        return found

    def _room(self) -> list[tuple[int, int]]:
        """Sequences and pages that each partition could take in one step."""
        return [
            (max(0, min(len(part.free_slots), self.max_chunks - len(part.prefilling))), part.pool.num_free)
            for part in self.partitions
        ]

    def _append_chunk(self, chunks: list[Chunk], seq: Sequence, budget: int) -> int:
        left = seq.num_tokens - seq.num_computed
        length = min(left, budget)
        chunks.append(Chunk(seq, seq.num_computed, length, length == left, seq.num_admissions))
        return length

    def _release(self, seq: Sequence) -> None:
        if seq.landing is not None:
            self._dissolve()
        self.partitions[seq.partition].release(seq)

    def _dissolve(self) -> None:
        if self._landing is not None:
            self._landing.dissolve()
            self._landing = None

    def _preempt(self, seq: Sequence) -> None:
        self._release(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_computed = 0
        self.num_preemptions += 1
        # Victims are the latest to run, yet earlier than everything that waits: the queue stays in order of arrival.
        index = next((i for i, other in enumerate(self.waiting) if other.seq_id > seq.seq_id), len(self.waiting))
        self.waiting.insert(index, seq)
