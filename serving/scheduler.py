"""What runs in the next step. Plain Python, no JAX, and deterministic: the same calls give the same schedule."""

from __future__ import annotations

import bisect
import dataclasses
from collections import deque

from .page_pool import PagePool
from .sequence import Sequence, SequenceStatus


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a prompt (or of a preempted sequence's tokens): positions start .. start+length-1."""

    seq: Sequence
    start: int
    length: int
    samples: bool

    @property
    def is_first(self) -> bool:
        return self.start == 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One step: a token for each decoding sequence, and chunks of others."""

    decodes: tuple[Sequence, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_chunk_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + self.num_chunk_tokens

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)


class Scheduler:
    """First come first served, decodes before prompts, prompts in chunks, preemption by recompute.

    Every step has a budget of `max_num_batched_tokens`. A decoding sequence that finds no free page takes those of
    the latest arrival, which goes back to the head of the queue and is computed again later.
    """

    def __init__(self, pool: PagePool, *, max_num_seqs: int, max_num_batched_tokens: int, max_chunks: int):
        self.pool = pool
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_chunks = max_chunks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival, that is of seq_id
        self.num_preemptions = 0
        self.num_slots = max_num_seqs
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def schedule(self) -> Schedule:
        """Choose the next step and take its pages and slots; counters move on as if it had run."""
        budget = self.max_num_batched_tokens
        decodes: list[Sequence] = []
        for seq in list(self.running):
            if seq.status is not SequenceStatus.RUNNING or not seq.is_decoding or seq.is_complete:
                continue
            if budget == 0 or not self._grow_or_preempt(seq):
                continue
            decodes.append(seq)
            budget -= 1
        # What was appended stays valid: a victim is never earlier in `running` than the sequence that preempts it.
        chunks: list[Chunk] = []
        for seq in self.running:
            if not seq.is_decoding and not seq.is_complete and budget and len(chunks) < self.max_chunks:
                budget -= self._append_chunk(chunks, seq, budget)
        while self.waiting and budget and len(chunks) < self.max_chunks and self._free_slots:
            seq = self.waiting[0]
            # A preempted sequence's newest token may still be on the device: it must be known to be recomputed.
            if seq.in_flight or not self.pool.can_take(self.pool.pages_for(seq.num_tokens)):
                break
            self.waiting.popleft()
            self._admit(seq)
            budget -= self._append_chunk(chunks, seq, budget)
        for seq in decodes:
            seq.num_computed += 1
            seq.in_flight += 1
        for chunk in chunks:
            chunk.seq.num_computed += chunk.length
            chunk.seq.in_flight += chunk.samples
            chunk.seq.has_sampled = chunk.samples
        return Schedule(tuple(decodes), tuple(chunks))

    def finish(self, seq: Sequence, reason: str, stop_reason: int | None = None) -> None:
        """Release everything `seq` holds, whatever it was doing. Its steps in flight write to pages that only later
        steps can be given, and steps run in order."""
        if seq.status is SequenceStatus.FINISHED:
            return
        if seq.status is SequenceStatus.RUNNING:
            self._release(seq)
        else:
            self.waiting.remove(seq)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason

    def preempt_all(self) -> None:
        """Send everything that runs back to the queue, in order: its cache is lost."""
        for seq in reversed(list(self.running)):
            self._preempt(seq)

    def check_idle(self) -> None:
        """Raises RuntimeError if pages or slots leaked; to be called when nothing runs."""
        self.pool.check_whole()
        if len(set(self._free_slots)) != self.num_slots:
            raise RuntimeError(f"{self.num_slots - len(set(self._free_slots))} slots leaked")

    def _append_chunk(self, chunks: list[Chunk], seq: Sequence, budget: int) -> int:
        left = seq.num_tokens - seq.num_computed
        length = min(left, budget)
        chunks.append(Chunk(seq, seq.num_computed, length, samples=length == left))
        return length

    def _admit(self, seq: Sequence) -> None:
        seq.slot = self._free_slots.pop()
        seq.pages = self.pool.take(self.pool.pages_for(seq.num_tokens))
        seq.status = SequenceStatus.RUNNING
        bisect.insort(self.running, seq, key=lambda other: other.seq_id)

    def _grow_or_preempt(self, seq: Sequence) -> bool:
        """Make room for the token at position `num_computed`; False when `seq` itself had to give way."""
        while len(seq.pages) < self.pool.pages_for(seq.num_computed + 1):
            if self.pool.can_take(1):
                seq.pages += self.pool.take(1)
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._release(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_computed, seq.has_sampled = 0, False
        self.num_preemptions += 1
        # Victims are the latest to run, yet earlier than everything that waits: the queue stays in order of arrival.
        self.waiting.appendleft(seq)

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.pool.free(reversed(seq.pages))
        self._free_slots.append(seq.slot)
        seq.pages, seq.slot = [], -1
