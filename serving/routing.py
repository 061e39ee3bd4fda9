"""Which replica a request goes to. Plain Python and stateless: the same prompt and loads give the same replica."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
from collections.abc import Sequence

import numpy as np

# Prompts that agree in so many tokens share a home: a conversation's turns, the users of one system prompt.
PREFIX_TOKENS = 256
# While fewer sequences run, a decode step reads mostly weights, and one more costs it hardly anything.
SMALL_BATCH = 16
# A home may hold so many times the mean before its prompts go elsewhere: "consistent hashing with bounded loads"
# (Mirrokni, Thorup and Zadimoghaddam 2016, arXiv 1608.01350), where 1.25 is the usual choice.
IMBALANCE = 1.25
# Beyond this share of pages in use a new prompt waits for pages, or takes them from a running sequence.
FULL_CACHE = 0.9


@dataclasses.dataclass(frozen=True)
class ReplicaLoad:
    """What one replica has to do now.

    num_seqs: sequences it was given and has not ended, those that still wait included; num_slots: how many may run at
    once; cache_usage: share of its pages in use, 0 to 1; stalled: its steps make no progress.
    """

    num_seqs: int
    num_slots: int
    cache_usage: float = 0.0
    stalled: bool = False

    @property
    def is_full(self) -> bool:
        """A newcomer would wait."""
        return self.stalled or self.num_seqs >= self.num_slots or self.cache_usage >= FULL_CACHE


def home_of(prompt_token_ids: Sequence[int], num_replicas: int) -> int:
    """The replica whose cache may know this prompt: a hash of its first tokens, the same in every process and run."""
    prefix = np.asarray(prompt_token_ids[:PREFIX_TOKENS], "<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(prefix, digest_size=8).digest(), "little") % num_replicas


def route(prompt_token_ids: Sequence[int], loads: Sequence[ReplicaLoad | None]) -> int | None:
    """The index of the replica to take; None in `loads` is a dead one, and the answer if there is no other.

    The prompt's home, unless it is dead or overloaded: full, or with both SMALL_BATCH sequences and IMBALANCE times the
    mean of the living. Then the one with the fewest sequences among those that are not full (among all, if all are),
    the lowest index at a tie. A home that is dead changes no other prompt's home.
    """
    alive = [(index, load) for index, load in enumerate(loads) if load is not None]
    if len(alive) < 2:
        return alive[0][0] if alive else None
    home = home_of(prompt_token_ids, len(loads))
    mean = statistics.fmean(load.num_seqs for _, load in alive)
    if (load := loads[home]) is not None and not _is_overloaded(load, mean):
        return home
    return min(alive, key=lambda entry: (entry[1].is_full, entry[1].num_seqs, entry[0]))[0]


def _is_overloaded(load: ReplicaLoad, mean: float) -> bool:
    return load.is_full or load.num_seqs >= max(SMALL_BATCH, IMBALANCE * mean)
