"""What a request gives back; names and fields as in vLLM."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Logprob:
    """One candidate at one position: natural log of its probability, its rank (1 is the most likely), its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]


@dataclasses.dataclass
class CompletionOutput:
    """One of a request's `n` outputs.

    finish_reason: None while it runs, "stop" (an end-of-sequence token, a stop id or a stop string: `stop_reason` is
    that id or string, None for the model's own end), "length" or "abort".
    """

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclasses.dataclass
class RequestTimes:
    """Monotonic seconds at which things happened to a request; None: not yet."""

    arrival: float
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None


@dataclasses.dataclass
class RequestOutput:
    """A request with what it has produced: everything ("final"), or what is new ("delta")."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    times: RequestTimes
    # One entry per prompt token; the first is None: nothing precedes it.
    prompt_logprobs: list[TokenLogprobs | None] | None = None
