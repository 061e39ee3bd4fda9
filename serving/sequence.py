"""One sequence of tokens on its way through the engine."""

from __future__ import annotations

import dataclasses
import enum
import functools

from .decoding import Decoding
from .landing import Landing
from .sampling_params import SamplingParams


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it; `n` of them make a request.

    Counters are in tokens. `num_computed` runs ahead of what the host has read: a sampled token that is still on the
    device counts as `in_flight`, and a step over it may already have been sent. While it decodes, `decoding` counts;
    `landing`, if there is one, may have tokens that are not among `given_token_ids` yet.
    """

    seq_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int
    stop_token_ids: frozenset[int]
    status: SequenceStatus = SequenceStatus.WAITING
    given_token_ids: list[int] = dataclasses.field(default_factory=list)
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
    def output_token_ids(self) -> list[int]:
        """All that were read."""
        if self.landing is not None:
            self.landing.give(self)
        return self.given_token_ids

    @property
    def in_flight(self) -> int:
        if self.status is not SequenceStatus.RUNNING:
            return self.left_in_flight
        # A token is sampled as soon as all known ones are computed.
        return max(0, self.num_computed + 1 - self.num_prompt - len(self.output_token_ids))

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
        return self.num_prompt + len(self.output_token_ids) + self.in_flight

    @property
    def num_generated(self) -> int:
        return len(self.output_token_ids) + self.in_flight

    @property
    def is_complete(self) -> bool:
        """Nothing more may be sampled, whatever the tokens in flight turn out to be."""
        return self.num_generated >= self.max_tokens

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Known tokens at positions start..stop-1."""
        if stop <= self.num_prompt:
            return self.prompt_token_ids[start:stop]
        return (self.prompt_token_ids + self.output_token_ids)[start:stop]
