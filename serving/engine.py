"""The step loop's body: schedule, send, read the step before, commit."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from typing import Protocol, runtime_checkable

from .errors import EngineDead
from .executor import StepFuture
from .outputs import TokenLogprobs
from .sampling_params import SamplingParams
from .schedule import Schedule
from .scheduler import Scheduler
from .sequence import Sequence, SequenceStatus

logger = logging.getLogger("paddock")


@runtime_checkable
class StepRunner(Protocol):
    """What the engine asks of the device side (`Executor`; tests bring their own)."""

    @property
    def in_flight(self) -> bool: ...
    def dispatch(self, schedule: Schedule) -> StepFuture | None: ...
    def edit_bias(self, slot: int, bias: dict[int, float], *, clear: bool) -> None: ...
    def reset(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Limits:
    """What requests are checked against."""

    vocab_size: int
    max_model_len: int
    max_logprobs: int
    eos_token_ids: frozenset[int]
    seed: int


@dataclasses.dataclass
class StepResult:
    """What one turn of the loop brought: sequences with a token more (and its log-probabilities, if they asked), those
    of them that ended with it, prompt scores, and sequences whose step raised."""

    schedule: Schedule
    advanced: ListOf[Sequence] = ()
    logprobs: dict[Sequence, TokenLogprobs] = dataclasses.field(default_factory=dict)
    ended: list[Sequence] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[tuple[Sequence, int, TokenLogprobs]] = dataclasses.field(default_factory=list)
    failed: list[Sequence] = dataclasses.field(default_factory=list)
    error: str = ""
    # Bucket and tokens of the step that was read, None when none was.
    bucket: str | None = None
    num_tokens: int = 0


class Engine:
    """Sequences in, tokens out, one step a call. Not thread-safe: one thread owns it.

    Step N+1 is sent before the tokens of step N are read, so the device never waits for the host; a sequence that
    ends by a stop token has then one token computed in vain, which is dropped here.
    """

    def __init__(self, runner: StepRunner, scheduler: Scheduler, limits: Limits):
        self.runner, self.scheduler, self.limits = runner, scheduler, limits
        self._ids = itertools.count()
        self._pending: StepFuture | None = None
        # Whose slot's bias row keeps the stop tokens from being sampled, until min_tokens are there.
        # In order, which a set of objects has not: several processes edit the same rows one after the other.
        self._stops_banned: dict[Sequence, None] = {}

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raises ValueError naming the argument if this request can never run."""
        limits, num_prompt = self.limits, len(prompt_token_ids)
        if not num_prompt:
            raise ValueError("prompt is empty: there must be at least one token")
        if num_prompt >= limits.max_model_len:
            raise ValueError(
                f"prompt has {num_prompt} tokens, but prompt and output together may have {limits.max_model_len}"
            )
        if params.max_tokens is not None and num_prompt + params.max_tokens > limits.max_model_len:
            raise ValueError(
                f"max_tokens {params.max_tokens} with a prompt of {num_prompt} tokens goes beyond the context of "
                f"{limits.max_model_len} tokens"
            )
        bad = next((t for t in prompt_token_ids if not isinstance(t, int) or not 0 <= t < limits.vocab_size), None)
        if bad is not None:
            raise ValueError(f"prompt_token_ids holds {bad!r}, but token ids are 0 to {limits.vocab_size - 1}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > limits.max_logprobs:
                raise ValueError(f"{name} {getattr(params, name)} is more than max_logprobs {limits.max_logprobs}")
        for name in ("stop_token_ids", "logit_bias"):
            bad = next((t for t in getattr(params, name) or () if not 0 <= t < limits.vocab_size), None)
            if bad is not None:
                raise ValueError(f"{name} names token {bad}, but token ids are 0 to {limits.vocab_size - 1}")

    def add(self, prompt_token_ids: list[int], params: SamplingParams, *, patient: bool = False) -> list[Sequence]:
        """Queue the `n` sequences of a request that `check` let pass."""
        room = self.limits.max_model_len - len(prompt_token_ids)
        stops = frozenset(params.stop_token_ids or ())
        sequences = []
        for index in range(params.n):
            seq_id = next(self._ids)
            # Without a seed of its own a request draws one from its place in the queue: no clock, no hidden state.
            seed = params.seed + index if params.seed is not None else hash((self.limits.seed, seq_id))
            seq = Sequence(
                seq_id=seq_id,
                prompt_token_ids=prompt_token_ids,
                params=params,
                seed=seed & (2**64 - 1),
                max_tokens=min(params.max_tokens or room, room),
                stop_token_ids=stops if params.ignore_eos else stops | self.limits.eos_token_ids,
                num_prompt_scored=0 if index == 0 else len(prompt_token_ids),
                patient=patient,
            )
            self.scheduler.add(seq)
            sequences.append(seq)
        return sequences

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """End sequences now; their pages are free for the next step. Finished ones are left alone."""
        for seq in sequences:
            self.scheduler.finish(seq, "abort")

    @property
    def is_idle(self) -> bool:
        return self._pending is None and self.scheduler.is_idle and not self.runner.in_flight

    def close(self) -> None:
        """Let go of the step on its way."""
        self._pending = None

    def step(self) -> StepResult:
        """One turn. Raises EngineDead when the device cannot be brought back after a failure."""
        schedule = self.scheduler.schedule()
        result = StepResult(schedule)
        before, self._pending = self._pending, None
        raised = False
        try:
            if schedule or self.runner.in_flight:
                if schedule.chunks or self._stops_banned:
                    self._sync_bias(schedule)
                self._pending = self.runner.dispatch(schedule)
        except Exception as error:
            raised = True
            self._fail(result, _members(schedule), error)
        if before is not None:
            try:
                self._commit(result, before)
            except Exception as error:
                raised, sent = True, [] if self._pending is None else _members(schedule)
                self._pending = None
                self._fail(result, [*before.seqs, *sent], error)
        if raised:
            self._recover()
        elif self.is_idle:
            self.scheduler.check_idle()
        return result

    def _commit(self, result: StepResult, future: StepFuture) -> None:
        tokens, result.logprobs = future.read()
        result.bucket, result.num_tokens = str(future.bucket), future.num_tokens
        if scores := future.read_prompt_logprobs():
            for seq, position, _ in scores:
                seq.num_prompt_scored = max(seq.num_prompt_scored, position)
            result.prompt_logprobs = [entry for entry in scores if entry[0].status is not SequenceStatus.FINISHED]
        result.advanced, result.ended = self.scheduler.land(future.seqs, tokens)
        for seq in result.ended:
            token = seq.tokens_read[-1]
            if token in seq.stop_token_ids:
                is_eos = token in self.limits.eos_token_ids and not seq.params.ignore_eos
                self.scheduler.finish(seq, "stop", None if is_eos else token)
            else:
                self.scheduler.finish(seq, "length")

    def _sync_bias(self, schedule: Schedule) -> None:
        """Bring the bias rows of this step's slots in line: logit_bias, and stop tokens banned up to min_tokens."""
        for chunk in schedule.chunks:
            seq = chunk.seq
            if chunk.is_first and (seq.params.logit_bias or seq.params.min_tokens):
                bias = dict(seq.params.logit_bias or {})
                self._stops_banned.pop(seq, None)
                if seq.num_generated - chunk.samples < seq.params.min_tokens:
                    bias |= dict.fromkeys(seq.stop_token_ids, -math.inf)
                    self._stops_banned[seq] = None
                self.runner.edit_bias(seq.slot, bias, clear=True)
        for seq in list(self._stops_banned):
            if seq.status is not SequenceStatus.RUNNING:
                del self._stops_banned[seq]  # its next first chunk, if there is one, sets its new slot's row
            elif seq.num_generated > seq.params.min_tokens:
                del self._stops_banned[seq]
                bias = {token: (seq.params.logit_bias or {}).get(token, 0.0) for token in seq.stop_token_ids}
                self.runner.edit_bias(seq.slot, bias, clear=False)

    def _fail(self, result: StepResult, sequences: Iterable[Sequence], error: Exception) -> None:
        logger.error("a step raised", exc_info=error)
        result.error = result.error or f"{type(error).__name__}: {error}"
        for seq in sequences:
            if seq.status is not SequenceStatus.FINISHED:
                self.scheduler.finish(seq, "error")
                result.failed.append(seq)

    def _recover(self) -> None:
        """A step that raised may have taken the donated cache with it: everything else that runs is recomputed."""
        self.scheduler.restart()
        try:
            self.runner.reset()
        except Exception as error:
            raise EngineDead(f"the device did not come back after a failed step: {error}") from error


def _members(schedule: Schedule) -> list[Sequence]:
    return [*schedule.decodes, *(chunk.seq for chunk in schedule.chunks)]
