"""Whose the engine's sequences are, and when their tokens came."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as ListOf

from .engine import StepResult
from .metrics import Metrics
from .request import RequestStream, TokenEvent
from .sequence import Sequence


@dataclasses.dataclass
class Member:
    """Whose sequence it is: output `index` of `stream`; how many of its tokens were told there, and when the last came
    (monotonic seconds; of those that took one in the last step `Members` knows it)."""

    stream: RequestStream
    index: int
    num_told: int = 0
    last_token: float | None = None

    def event(
        self, seq: Sequence, finish_reason: str | None = None, stop_reason: int | None = None, error: str | None = None
    ) -> TokenEvent:
        """All that is new of `seq`, and how it ended if it did."""
        new = seq.tokens_read[self.num_told :]
        self.num_told += len(new)
        self.stream.times.last_token = self.last_token
        return TokenEvent(self.index, new, None, finish_reason, stop_reason, error)


@dataclasses.dataclass
class _Pace:
    """The sequences that took a token in the last step, when that was, and those that hear of each. While they stay
    the same ones, as they mostly do, a step need not look at every member."""

    seqs: ListOf[Sequence] = ()
    time: float = 0.0
    listening: tuple[tuple[Sequence, Member], ...] = ()


class Members(dict[Sequence, Member]):
    """Those of all sequences that have not ended."""

    def __init__(self) -> None:
        super().__init__()
        self._pace = _Pace()

    def join(self, stream: RequestStream) -> None:
        """All sequences of `stream`, which has them already."""
        self.update((seq, Member(stream, index)) for index, seq in enumerate(stream.sequences))

    def note_tokens(self, result: StepResult, now: float, metrics: Metrics) -> list[tuple[Sequence, Member]]:
        """Before anybody hears of the tokens: who has the last one may look at the metrics at once.

        Returns those that must hear of theirs now.
        """
        advanced, pace = result.advanced, self._pace
        if advanced is pace.seqs:
            if advanced:
                metrics.on_tokens(len(advanced), {now - pace.time: len(advanced)})
            pace.time = now
        else:
            self._pace = pace = self._change_pace(advanced, now, metrics)
        hearing = [*pace.listening]
        if result.ended:
            hearing += [(seq, self[seq]) for seq in result.ended if not self[seq].stream.wants_each_token]
        for _, member in hearing:
            member.last_token = now
        return hearing

    def _change_pace(self, advanced: ListOf[Sequence], now: float, metrics: Metrics) -> _Pace:
        """Others took a token than in the step before."""
        self.settle()
        since: dict[float, int] = {}
        listening = []
        for seq in advanced:
            member = self[seq]
            last = member.last_token
            if last is None:
                _note_first(member, seq, now, metrics)
            else:
                since[last] = since.get(last, 0) + 1
            if member.stream.wants_each_token:
                listening.append((seq, member))
        metrics.on_tokens(len(advanced), {now - last: count for last, count in since.items()})
        return _Pace(advanced, now, tuple(listening))

    def settle(self) -> None:
        """Give every member its own time of the last token: before events that no step brings."""
        for seq in self._pace.seqs:
            if (member := self.get(seq)) is not None:
                member.last_token = self._pace.time
        self._pace = _Pace()


def _note_first(member: Member, seq: Sequence, now: float, metrics: Metrics) -> None:
    times = member.stream.times
    if times.first_token is None:
        times.first_token = now
        metrics.on_first_token(now - times.arrival)
        metrics.on_prompt(seq.num_prompt)
