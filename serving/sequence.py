"""One sequence of tokens on its way through the engine."""

from __future__ import annotations

import array
import dataclasses
import enum
import functools
from typing import TYPE_CHECKING

from .decoding import Decoding
from .landing import Landing
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    Tokens = array.array[int]
else:
    Tokens = array.array  # which takes no argument at run time before Python 3.12


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it; `n` of them make a request.

    Counters are in tokens. `num_computed` runs ahead of what the host has read: a sampled token that is still on the
    device counts as `in_flight`, and a step over it may already have been sent. While it decodes, `decoding` counts;
    `landing`, if there is one, may have tokens that are not in `given` yet.
    """

    seq_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    status: SequenceStatus = SequenceStatus.WAITING
    # As C integers, copied in blocks: the objects that Python makes of them are the consumer's thread's to make.
    given: Tokens = dataclasses.field(default_factory=lambda: array.array("i"))
    landing: Landing | None = None
    slot: int = -1
    # How often it was given a slot: what was sent under an earlier one is stale.
    num_admissions: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    decoding: Decoding | None = None
    computed_before: int = 0
    # What was in flight when it stopped running, and has not come since.
    left_in_flight: int = 0
    # Which of the engine's partitions holds its slot and pages.
    partition: int = 0
    finish_reason: str | None = None
    stop_reason: int | None = None
    # Prompt positions whose log-probabilities were already handed out; survives preemption.
    num_prompt_scored: int = 0
    # Nobody minds when its tokens come, as long as all come soon.
    patient: bool = False

    @property
    def num_computed(self) -> int:
        return self.computed_before if self.decoding is None else self.decoding.num_computed(self)

    @num_computed.setter
    def num_computed(self, count: int) -> None:
        self.computed_before = count

    @property
    def tokens_read(self) -> Tokens:
        """Sampled tokens that the host knows; it grows, and is not to be kept."""
        if self.landing is not None:
            self.landing.give(self)
        return self.given

    @property
    def output_token_ids(self) -> list[int]:
        """The same as a list of its own."""
        return self.tokens_read.tolist()

    @property
    def in_flight(self) -> int:
        if self.status is not SequenceStatus.RUNNING:
            return self.left_in_flight
        # A token is sampled as soon as all known ones are computed.
        return max(0, self.num_computed + 1 - self.num_prompt - len(self.tokens_read))

    @functools.cached_property
    def last_computed(self) -> int:
        """Tokens over which it may be computed: the last one that it may sample needs no step of its own."""
        return len(self.prompt_token_ids) + self.max_tokens - 1

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, those still on the device included."""
        return self.num_prompt + len(self.tokens_read) + self.in_flight

    @property
    def num_generated(self) -> int:
        return len(self.tokens_read) + self.in_flight

    @property
    def is_complete(self) -> bool:
        """Nothing more may be sampled, whatever the tokens in flight turn out to be."""
        return self.num_generated >= self.max_tokens

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Known tokens at positions start..stop-1."""
        if stop <= self.num_prompt:
            return self.prompt_token_ids[start:stop]
        return (self.prompt_token_ids + self.output_token_ids)[start:stop]
