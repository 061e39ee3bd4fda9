"""One share of an engine's sequences: its slots, its pages, and who holds them.

An engine has one, or one for each piece that the rule `batch` cuts its sequences into: a sequence's rows and pages then
stay on that piece's devices, and page ids are local to it.
"""

from __future__ import annotations

import bisect

from .decoding import Decoding
from .page_pool import PagePool
from .sequence import Sequence, SequenceStatus


class Partition:
    """Slots `first_slot` .. `first_slot + num_slots - 1` and a pool of pages.

    `running` holds every admitted sequence; of these `prefilling` have tokens left that the host knows, and `decoding`
    have their newest token on the device and may sample more. All in order of arrival, that is of seq_id.
    """

    def __init__(self, index: int, pool: PagePool, num_slots: int):
        self.index, self.pool, self.num_slots = index, pool, num_slots
        self.running: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.decoding = Decoding(num_slots)
        self.free_slots = self._all_slots()

    def _all_slots(self) -> list[int]:
        first = self.index * self.num_slots
        return list(range(first + self.num_slots - 1, first - 1, -1))

    def can_admit(self, seq: Sequence) -> bool:
        return bool(self.free_slots) and self.pool.can_take(self.pool.pages_for(seq.num_tokens))

    def admit(self, seq: Sequence) -> None:
        seq.partition, seq.slot = self.index, self.free_slots.pop()
        seq.num_admissions += 1
        seq.pages = self.pool.take(self.pool.pages_for(seq.num_tokens))
        seq.status = SequenceStatus.RUNNING
        _insert(self.running, seq)
        _insert(self.prefilling, seq)

    def start_decoding(self, seq: Sequence, ready: int) -> None:
        """Its last known token is in the step; from tick `ready` on it samples more, unless that was all it may."""
        self.prefilling.remove(seq)
        if not seq.is_complete:
            self.decoding.add(seq, page_size=self.pool.page_size, ready=ready)

    def release(self, seq: Sequence) -> None:
        """Take pages back now, and the slot once nothing of the sequence is in flight: a step on its way still samples
        by the slot's state."""
        self.running.remove(seq)
        if seq.decoding is not None:
            self.decoding.remove(seq)
        elif seq in self.prefilling:
            self.prefilling.remove(seq)
        self.pool.free(reversed(seq.pages))
        seq.pages = []
        seq.left_in_flight = seq.in_flight
        if not seq.left_in_flight:
            self.release_slot(seq)

    def release_slot(self, seq: Sequence) -> None:
        self.free_slots.append(seq.slot)
        seq.slot = -1

    def reset_slots(self) -> None:
        """All slots are free, whatever was in flight: to be called when nothing runs."""
        self.free_slots = self._all_slots()

    def check_whole(self) -> None:
        """Raises RuntimeError if pages or slots leaked; to be called when nothing runs."""
        self.pool.check_whole()
        if len(set(self.free_slots)) != self.num_slots:
            raise RuntimeError(f"{self.num_slots - len(set(self.free_slots))} slots leaked")


def _insert(sequences: list[Sequence], seq: Sequence) -> None:
    bisect.insort(sequences, seq, key=lambda other: other.seq_id)
