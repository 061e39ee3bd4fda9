"""The sequences that decode, in columns: a step moves hundreds of them on, and Python need not touch each."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .sequence import Sequence

# Rows of the table: slot; tokens computed; tokens that the pages hold; tokens that may be computed; the first tick at
# which the next one may run.
_SLOT, _COMPUTED, _ROOM, _LAST, _READY = range(5)


class Decoding:
    """Those of a partition, at most `num_slots`, in order of arrival. `Sequence.num_computed` looks here meanwhile.

    Most steps are of all of them, and no page runs full and nobody completes: such a one is counted and no more, until
    the table is wanted.
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

    def __getitem__(self, index: int) -> Sequence:
        return self._seqs[index]

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
        self._catch_up()
        index, end = self._index(seq), len(self._seqs)
        seq.decoding, seq.num_computed = None, int(self._table[_COMPUTED, index])
        self._table[:, index : end - 1] = self._table[:, index + 1 : end]
        del self._seqs[index]
        self._num_eager -= not seq.patient
        self._all = None

    def num_computed(self, seq: Sequence) -> int:
        return int(self._table[_COMPUTED, self._index(seq)]) + self._moved

    def _index(self, seq: Sequence) -> int:
        return bisect.bisect_left(self._seqs, seq.seq_id, key=lambda other: other.seq_id)

    def due(self, tick: int, limit: int) -> np.ndarray | None:
        """Indices of the first `limit` that may run at `tick`, None for all."""
        if self._all_ready <= tick and len(self) <= limit:
            return None
        self._catch_up()
        return (self._table[_READY, : len(self)] <= tick).nonzero()[0][:limit]

    def short(self, due: np.ndarray | None) -> list[int]:
        """Those of `due` whose pages hold no token more."""
        if due is None and self._quiet:
            return []
        self._catch_up()
        computed, room = self._table[_COMPUTED, : len(self)], self._table[_ROOM, : len(self)]
        full = computed >= room
        return full.nonzero()[0].tolist() if due is None else due[full[due]].tolist()

    def add_room(self, index: int, num_tokens: int) -> None:
        self._table[_ROOM, index] += num_tokens

    def advance(self, due: np.ndarray | None, ready: int) -> tuple[tuple[Sequence, ...], np.ndarray, int]:
        """Count a token more for each of `due` that is still there, whose next may run at tick `ready`; those that are
        complete leave.

        Returns the sequences, slot and position [2 B] of their tokens so many steps ago, and how many.
        """
        if due is None and self._quiet:
            if self._first is None:
                self._first = self._table[: _COMPUTED + 1, : len(self)].astype(np.int32)
            moved, self._moved = self._moved, self._moved + 1
            self._quiet, self._all_ready = self._quiet - 1, ready
            return self.all, self._first, moved
        self._catch_up()
        which: slice | np.ndarray = slice(len(self))
        seqs = self.all
        if due is not None:
            which = due[due < len(self)]
            seqs = tuple([self._seqs[index] for index in which.tolist()])
        rows = self._table[: _COMPUTED + 1, which].astype(np.int32)
        self._table[_COMPUTED, which] += 1
        self._table[_READY, which] = ready
        if seqs:
            self._all_ready = max(self._all_ready, ready)
        table = self._table[:, which]
        for index in (table[_COMPUTED] >= table[_LAST]).nonzero()[0].tolist():
            self.remove(seqs[index])
        table = self._table[:, : len(self)]
        left = np.minimum(table[_ROOM], table[_LAST] - 1) - table[_COMPUTED]
        self._quiet = max(0, int(left.min())) if len(self) else 0
        return seqs, rows, 0

    def _catch_up(self) -> None:
        """Bring the table up to date; it is about to change, or to be looked at."""
        if self._moved:
            self._table[_COMPUTED, : len(self)] += self._moved
            self._table[_READY, : len(self)] = self._all_ready
        self._moved, self._first = 0, None
