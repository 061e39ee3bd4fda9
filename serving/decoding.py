"""The sequences that decode, in columns: a step moves hundreds of them on, and Python need not touch each."""

from __future__ import annotations

import bisect
import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .sequence import Sequence

# Rows of the table: slot; tokens computed; tokens that the pages hold; tokens that may be computed; the first tick at
# which the next one may run.
_SLOT, _COMPUTED, _ROOM, _LAST, _READY = range(5)
_NOBODY = np.empty(0, np.int64)


class Decoding:
    """Those of a partition, at most `num_slots`, in order of arrival. `Sequence.num_computed` looks here meanwhile.

    Most ticks are of all of them: such a one is counted and no more, until the table is wanted; and while no pages run
    full and nobody completes, the table is not even looked at.
    """

    def __init__(self, num_slots: int):
        self._table = np.zeros((5, num_slots), np.int64)  # ticks outgrow 32 bits
        self._seqs: list[Sequence] = []
        self._num_eager = 0
        self._all: tuple[Sequence, ...] | None = None
        self._all_ready = 0  # the tick from which on all are
        self._quiet = 0  # for so many ticks of all no pages run full and nobody completes
        self._moved = 0  # ticks of all that are not in the table yet
        self._first: np.ndarray | None = None  # slot and position [2 B] of their tokens in the first of these

    def __len__(self) -> int:
        return len(self._seqs)

    @property
    def is_patient(self) -> bool:
        """All of them are."""
        return not self._num_eager

    @property
    def all(self) -> tuple[Sequence, ...]:
        """The same object until one joins or leaves: what follows from them alone need not be made again."""
        if self._all is None:
            self._all = tuple(self._seqs)
        return self._all

    def add(self, seq: Sequence, *, page_size: int, ready: int) -> None:
        """`seq`, whose newest token is on the device, may compute it from tick `ready` on."""
        self._catch_up()
        index, end = bisect.bisect(self._seqs, seq.seq_id, key=lambda other: other.seq_id), len(self._seqs)
        self._table[:, index + 1 : end + 1] = self._table[:, index:end]
        self._table[:, index] = seq.slot, seq.num_computed, len(seq.pages) * page_size, seq.last_computed, ready
        self._seqs.insert(index, seq)
        self._num_eager += not seq.patient
        self._all, self._all_ready, self._quiet, seq.decoding = None, max(self._all_ready, ready), 0, self

    def remove(self, seq: Sequence) -> None:
        self._drop(np.array([self._index(seq)]))

    def _drop(self, indices: np.ndarray) -> None:
        """All of them at once: those that came together mostly leave together, too."""
        self._catch_up()
        for index, computed in zip(indices.tolist(), self._table[_COMPUTED, indices].tolist(), strict=True):
            seq = self._seqs[index]
            seq.decoding, seq.num_computed = None, computed
            self._num_eager -= not seq.patient
        stays = np.ones(len(self), bool)
        stays[indices] = False
        kept = self._table[:, : len(self)][:, stays]
        self._table[:, : kept.shape[1]] = kept
        self._seqs, self._all = list(itertools.compress(self._seqs, stays)), None

    def num_computed(self, seq: Sequence) -> int:
        return int(self._table[_COMPUTED, self._index(seq)]) + self._moved

    def _index(self, seq: Sequence) -> int:
        return bisect.bisect_left(self._seqs, seq.seq_id, key=lambda other: other.seq_id)

    def due(self, tick: int, limit: int) -> np.ndarray | None:
        """Indices of the first `limit` that may run at `tick`, None for all."""
        if self._all_ready <= tick and len(self._seqs) <= limit:
            return None
        self._catch_up()
        return (self._table[_READY, : len(self)] <= tick).nonzero()[0][:limit]

    def short(self, due: np.ndarray | None) -> np.ndarray:
        """Those of `due` whose pages hold no token more."""
        if due is None and self._quiet:
            return _NOBODY
        full = self._table[_ROOM, : len(self)] - self._table[_COMPUTED, : len(self)] <= self._moved
        return full.nonzero()[0] if due is None else due[full[due]]

    def enter(self, indices: np.ndarray, pages: list[int], page_size: int) -> np.ndarray:
        """Give each of them one of `pages`; returns slot, index in the page table and page, [U 3]."""
        slots, room = self._table[_SLOT], self._table[_ROOM]
        held = room[indices]
        room[indices] = held + page_size
        for index, page in zip(indices.tolist(), pages, strict=True):
            self._seqs[index].pages.append(page)
        return np.array([slots[indices], held // page_size, pages], np.int32).T

    def advance(self, due: np.ndarray | None, ready: int) -> tuple[tuple[Sequence, ...], np.ndarray, int]:
        """Count a token more for each of `due` that is still there, whose next may run at tick `ready`; those that are
        complete leave.

        Returns the sequences, slot and position [2 B] of their tokens so many steps ago, and how many.
        """
        if due is None:
            if self._first is None:
                self._first = self._table[: _COMPUTED + 1, : len(self)].astype(np.int32)
            seqs, rows, moved = self.all, self._first, self._moved
            self._moved, self._all_ready = moved + 1, ready
            self._quiet -= 1
        else:
            which = due[due < len(self)]
            seqs, moved = tuple([self._seqs[index] for index in which.tolist()]), 0
            rows = self._table[: _COMPUTED + 1, which].astype(np.int32)
            self._table[_COMPUTED, which] += 1
            self._table[_READY, which] = ready
            if seqs:
                self._all_ready = max(self._all_ready, ready)
            self._quiet = -1
        if self._quiet < 0:
            self._look_ahead()
        return seqs, rows, moved

    def _look_ahead(self) -> None:
        """Let go of those that are complete, and find out for how long the others are quiet."""
        self._quiet = self._count_quiet()
        if self._quiet < 0:  # somebody is complete; all have room for what they have computed
            left = self._table[_LAST, : len(self)] - self._table[_COMPUTED, : len(self)]
            self._drop((left <= self._moved).nonzero()[0])
            self._quiet = self._count_quiet()

    def _count_quiet(self) -> int:
        if not self._seqs:
            return 0
        computed, room, last = self._table[_COMPUTED : _LAST + 1, : len(self)]
        return int((np.minimum(room, last - 1) - computed).min()) - self._moved

    def _catch_up(self) -> None:
        """Bring the table up to date; it is about to change, or to be looked at."""
        if self._moved:
            self._table[_COMPUTED, : len(self)] += self._moved
            self._table[_READY, : len(self)] = self._all_ready
        self._moved, self._first = 0, None
