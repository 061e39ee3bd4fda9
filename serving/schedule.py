"""One step: who decodes, and which pieces of prompts run beside."""

from __future__ import annotations

import dataclasses

import numpy as np

from .sequence import Sequence, SequenceStatus

NO_ROWS = np.empty((2, 0), np.int32)
NO_PAGES = np.empty((0, 3), np.int32)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a prompt (or of a preempted sequence's tokens): positions start .. start+length-1."""

    seq: Sequence
    start: int
    length: int
    samples: bool
    admission: int

    @property
    def is_stale(self) -> bool:
        """Nobody wants it any more: its sequence has ended, or its slot, or is computed again in other pages. One that
        gave way and keeps its slot will get a token from what is on its way between stages, perhaps its last."""
        seq = self.seq
        return seq.slot < 0 or seq.num_admissions != self.admission or seq.status is SequenceStatus.FINISHED

    @property
    def is_first(self) -> bool:
        return self.start == 0


@dataclasses.dataclass(eq=False, slots=True)  # not frozen, which takes three times as long to make
class Schedule:
    """One step: a token for each decoding sequence, and chunks of others; both partition by partition.

    While the same sequences of one partition decode, `decodes` is the same object.
    """

    decodes: tuple[Sequence, ...]
    chunks: tuple[Chunk, ...]
    # Slot and position [2 B] of each of `decodes`, `moved` steps ago.
    first_rows: np.ndarray = dataclasses.field(default_factory=lambda: NO_ROWS)
    moved: int = 0
    # Pages that decodes write the first token of: slot, index in the page table, page [U 3].
    entered: np.ndarray = dataclasses.field(default_factory=lambda: NO_PAGES)

    @property
    def decode_rows(self) -> np.ndarray:
        """Slot and position [2 B] of each of `decodes`."""
        return self.first_rows + np.array([[0], [self.moved]], np.int32)

    @property
    def num_chunk_tokens(self) -> int:
        return sum([chunk.length for chunk in self.chunks])

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + self.num_chunk_tokens

    @property
    def sampling(self) -> tuple[Sequence, ...]:
        """The sequences that this step samples a token for, in order."""
        return self.decodes + tuple([chunk.seq for chunk in self.chunks if chunk.samples])

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)
