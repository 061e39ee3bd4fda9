"""What steps bring, told to the requests that it is for, and which of those have not ended."""

from __future__ import annotations

import time
from collections.abc import Iterable
from collections.abc import Sequence as ListOf

from .engine import StepResult
from .members import Members
from .metrics import Metrics
from .outputs import TokenLogprobs
from .request import RequestStream, TokenEvent
from .sequence import Sequence, SequenceStatus
from .turn import Lockstep


class Delivery:
    """For the engine's thread, but for `expect` and what asks."""

    def __init__(self, lockstep: Lockstep, metrics: Metrics):
        self._lockstep, self._metrics = lockstep, metrics
        self._members = Members()
        # Sequences left of each request, from `expect` on.
        self._unfinished: dict[RequestStream, int] = {}
        # Each is written under the caller's lock or by one thread alone, so that their difference needs no lock.
        self._num_expected = self._num_ended = 0
        self._num_preemptions = 0

    def expect(self, streams: ListOf[RequestStream]) -> None:
        """Requests on their way to the engine's thread. Any thread, one at a time."""
        for stream in streams:
            self._unfinished[stream] = stream.params.n
            self._num_expected += stream.params.n

    @property
    def streams(self) -> list[RequestStream]:
        """Requests that have not ended."""
        return list(self._unfinished)

    @property
    def num_unfinished(self) -> int:
        """Sequences expected that have not ended."""
        return self._num_expected - self._num_ended

    def join(self, stream: RequestStream, sequences: list[Sequence]) -> None:
        """These are the request's."""
        stream.sequences = sequences
        self._members.join(stream)

    def abort(self, ending: Iterable[tuple[RequestStream, int, str]]) -> None:
        """Tell requests which of their outputs ended, and why, before what comes next."""
        self._members.settle()
        for stream, index, reason in ending:
            seq = stream.sequences[index]
            if (member := self._members.get(seq)) is not None:
                stream.put(member.event(seq, finish_reason="abort"))
                self._forget(seq, reason)

    def deliver(self, result: StepResult, seconds: float) -> None:
        """What a step of so many seconds brought."""
        now = time.monotonic()
        for chunk in result.schedule.chunks:
            member = self._members.get(chunk.seq)
            if member is not None and member.stream.times.scheduled is None:
                member.stream.times.scheduled = now - seconds
        # Before anybody hears of it: who has the last output may look at the metrics at once.
        self._report_step(result, seconds)
        hearing = self._members.note_tokens(result, now, self._metrics)
        # Scores of a prompt are told before its first token, and wait for it in the stream.
        scores: dict[Sequence, list[tuple[int, TokenLogprobs]]] = {}
        for seq, position, candidates in result.prompt_logprobs:
            scores.setdefault(seq, []).append((position, candidates))
        for seq, entries in scores.items():
            member = self._members[seq]
            member.stream.put(TokenEvent(member.index, prompt_logprobs=tuple(entries)))
        for seq, member in hearing:
            reason = seq.finish_reason
            event = member.event(seq, reason, seq.stop_reason)
            if result.logprobs:
                event.logprobs = result.logprobs.get(seq)
            if reason is not None:
                self._forget(seq, reason)
            member.stream.put(event)
        for seq in result.failed:
            self._fail(seq, result.error)

    def end(self, reason: str, error: str | None = None) -> None:
        """End every request, those that are still on their way included."""
        engine = self._lockstep.engine
        for stream in self.streams:
            if not stream.sequences:
                self.join(stream, engine.add(stream.prompt_token_ids, stream.params))
        self._members.settle()
        members = list(self._members.items())
        for seq, member in members:
            member.stream.put(member.event(seq, finish_reason=None if error else "abort", error=error))
            self._forget(seq, reason)
        # When all have been told: an engine that died in the middle of a step may not be able to.
        engine.abort(seq for seq, _ in members)

    def _fail(self, seq: Sequence, error: str) -> None:
        """End the request whose step raised."""
        if (failed := self._members.get(seq)) is None:
            return
        failed.stream.put(TokenEvent(failed.index, error=error))
        others = [other for other in failed.stream.sequences if other.status is not SequenceStatus.FINISHED]
        self._lockstep.abort(other.seq_id for other in others)
        for lost in (seq, *others):
            self._forget(lost, "error")

    def _forget(self, seq: Sequence, reason: str) -> None:
        member = self._members.pop(seq, None)
        if member is None:
            return
        stream = member.stream
        self._unfinished[stream] -= 1
        self._num_ended += 1
        if not self._unfinished[stream]:
            del self._unfinished[stream]
            generated = sum(len(other.tokens_read) for other in stream.sequences)
            self._metrics.on_finish(stream.times, time.monotonic(), seq.num_prompt, generated, reason)

    def _report_step(self, result: StepResult, seconds: float) -> None:
        preemptions = self._lockstep.engine.scheduler.num_preemptions
        if result.bucket is not None:
            self._metrics.on_step(
                bucket=result.bucket,
                seconds=seconds,
                num_tokens=result.num_tokens,
                preemptions=preemptions - self._num_preemptions,
            )
            self._num_preemptions = preemptions
