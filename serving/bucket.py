"""The static shapes that steps are compiled for."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable

from .schedule import Schedule


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
    """Room for `decodes` decoding rows and `chunk_tokens` prompt tokens in at most `chunks` chunks.

    `full`: the sampler has filters, penalties, bias and log-probabilities compiled in (see sampler.py); without, a
    batch that needs them is sampled again by a second program (`step.resample`).
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
        return self._name

    @functools.cached_property
    def _name(self) -> str:
        return f"{self.decodes}+{self.chunk_tokens}" + ("f" if self.full else "")


@dataclasses.dataclass(frozen=True)
class BucketTable:
    """The buckets of an engine: few, since each is an executable.

    Decoding alone has rows of many sizes, powers of two and three quarters of the largest, on a GPU below 32 just 2 and
    8, for up to there a step takes as long as reading the weights does, and a norm of one row is two kernels of XLA's
    where one of several rows is one; beside chunks there are none or the most there can be, because a chunk's products
    dwarf those of padded rows. All sizes are multiples of `num_partitions`, each of which has an equal share of the
    rows, and of what else the layout splits rows into.
    `full`: their steps have all of the sampler. `single`: only the largest, so that every step runs the same program.
    """

    decodes: tuple[int, ...]
    chunk_tokens: tuple[int, ...]
    max_chunks: int
    full: bool
    num_partitions: int = 1
    single: bool = False

    @classmethod
    def of(
        cls,
        *,
        max_decodes: int,
        max_num_batched_tokens: int,
        max_chunks: int,
        on_cpu: bool,
        multiple: int = 1,
        num_partitions: int = 1,
        single: bool = False,
    ) -> BucketTable:
        """`max_decodes` and `max_num_batched_tokens` must be multiples of `multiple`."""
        decodes, tokens = max_decodes // multiple, max_num_batched_tokens // multiple
        # A GPU's step takes as long for 64 tokens as for 256, the time of reading the weights.
        fewest = min(-(-(64 if on_cpu else 256) // multiple), tokens)
        sizes = {*_ladder(1, decodes, 2), max(1, decodes * 3 // 4)} - (set() if on_cpu else {1, 4, 16}) | {decodes}
        return cls(
            decodes=tuple(n * multiple for n in sorted(sizes)),
            chunk_tokens=tuple(n * multiple for n in _ladder(fewest, tokens, 4)),
            max_chunks=max(1, max_chunks // num_partitions) * num_partitions,
            # Branches are cheap on CPU: all of them are in the step.
            full=on_cpu or single,
            num_partitions=num_partitions,
            single=single,
        )

    def all(self) -> list[Bucket]:
        """Every bucket, by its tokens, most first: the longest compiles start first."""
        if self.single:
            return [Bucket(self.decodes[-1], self.chunk_tokens[-1], self.max_chunks, self.full)]
        shapes = [(decodes, 0, 0) for decodes in self.decodes]
        shapes += [(decodes, t, self.max_chunks) for decodes in (0, self.decodes[-1]) for t in self.chunk_tokens]
        buckets = (Bucket(*shape, self.full) for shape in shapes)
        return sorted(buckets, key=lambda bucket: (bucket.decodes + bucket.chunk_tokens, bucket), reverse=True)

    def choose(self, schedules: Iterable[Schedule]) -> Bucket:
        """The smallest bucket that holds each of `schedules`, which are all in the pipeline at once."""
        if self.single:
            return self.all()[0]
        decodes = tokens = 0
        for schedule in schedules:
            if self.num_partitions == 1:
                decodes, tokens = max(decodes, len(schedule.decodes)), max(tokens, schedule.num_chunk_tokens)
                continue
            decodes = max(decodes, self._most(Counter(seq.partition for seq in schedule.decodes)))
            lengths: Counter[int] = Counter()
            for chunk in schedule.chunks:
                lengths[chunk.seq.partition] += chunk.length
            tokens = max(tokens, self._most(lengths))
        if not tokens:
            return Bucket(_at_least(self.decodes, decodes), 0, 0, self.full)
        most = self.decodes[-1] if decodes else 0
        return Bucket(most, _at_least(self.chunk_tokens, tokens), self.max_chunks, self.full)

    def _most(self, counts: Counter[int]) -> int:
        """Rows that are needed when every partition has as many as the fullest."""
        return self.num_partitions * max(counts.values(), default=0)


def _ladder(low: int, high: int, factor: int) -> tuple[int, ...]:
    """low, low*factor, ... and `high` itself."""
    sizes = []
    while low < high:
        sizes.append(low)
        low *= factor
    return (*sizes, high)


def _at_least(sizes: tuple[int, ...], count: int) -> int:
    return sizes[bisect.bisect_left(sizes, count)]
