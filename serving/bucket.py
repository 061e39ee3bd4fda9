"""The static shapes that steps are compiled for."""

from __future__ import annotations

import bisect
import dataclasses

from .scheduler import Schedule


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """Room for `decodes` decoding rows and `chunk_tokens` prompt tokens in at most `chunks` chunks.

    `full`: the sampler has filters, penalties, bias and log-probabilities compiled in (see sampler.py).
    """

    decodes: int
    chunk_tokens: int
    chunks: int
    full: bool

    @property
    def rows(self) -> int:
        """Rows that sample: the decoding ones, then one per chunk."""
        return self.decodes + self.chunks

    def __str__(self) -> str:
        return f"{self.decodes}+{self.chunk_tokens}" + ("f" if self.full else "")


@dataclasses.dataclass(frozen=True)
class BucketTable:
    """The buckets of an engine: few, since each is an executable.

    Decoding alone has rows of many sizes, powers of two and three quarters of the largest; beside chunks there are none
    or the most there can be, because a chunk's products dwarf those of padded rows.
    """

    decodes: tuple[int, ...]
    chunk_tokens: tuple[int, ...]
    max_chunks: int
    variants: tuple[bool, ...]

    @classmethod
    def of(cls, *, max_num_seqs: int, max_num_batched_tokens: int, max_chunks: int, on_cpu: bool) -> BucketTable:
        # Branches are cheap on CPU: one variant with all of them in it.
        return cls(
            decodes=tuple(sorted({*_ladder(1, max_num_seqs, 2), max(1, max_num_seqs * 3 // 4)})),
            chunk_tokens=_ladder(min(64, max_num_batched_tokens), max_num_batched_tokens, 8),
            max_chunks=max_chunks,
            variants=(True,) if on_cpu else (False, True),
        )

    def all(self) -> list[Bucket]:
        """Every bucket, largest first: the longest compiles start first."""
        shapes = [(decodes, 0, 0) for decodes in self.decodes]
        shapes += [(decodes, t, self.max_chunks) for decodes in (0, self.decodes[-1]) for t in self.chunk_tokens]
        return sorted((Bucket(*shape, full) for shape in shapes for full in self.variants), reverse=True)

    def choose(self, schedule: Schedule, *, full: bool) -> Bucket:
        """The smallest bucket that holds `schedule`."""
        full = full or False not in self.variants
        if not schedule.chunks:
            return Bucket(_at_least(self.decodes, len(schedule.decodes)), 0, 0, full)
        decodes = self.decodes[-1] if schedule.decodes else 0
        return Bucket(decodes, _at_least(self.chunk_tokens, schedule.num_chunk_tokens), self.max_chunks, full)


def _ladder(low: int, high: int, factor: int) -> tuple[int, ...]:
    """low, low*factor, ... and `high` itself."""
    sizes = []
    while low < high:
        sizes.append(low)
        low *= factor
    return (*sizes, high)


def _at_least(sizes: tuple[int, ...], count: int) -> int:
    return sizes[bisect.bisect_left(sizes, count)]
