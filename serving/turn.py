"""Turns: what an engine is told between steps. The same turns give the same steps, in whatever process."""

from __future__ import annotations

import array
import dataclasses
import zlib
from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from typing import Any

from .engine import Engine, StepResult
from .errors import OutOfStep
from .sampling_params import SamplingParams
from .sequence import Sequence


@dataclasses.dataclass(frozen=True)
class Admission:
    """A request that joins: `params.n` sequences of one prompt; `patient`: see Sequence."""

    prompt_token_ids: ListOf[int]
    params: SamplingParams
    patient: bool = False


@dataclasses.dataclass(frozen=True)
class Turn:
    """Everything the engine is told before step `step`: requests that join, then ids of sequences that end.

    `digest` is the sender's of the step before.
    """

    step: int
    admitted: tuple[Admission, ...] = ()
    aborted: tuple[int, ...] = ()
    digest: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain values that JSON can hold."""
        admitted = [[list(a.prompt_token_ids), dataclasses.asdict(a.params), a.patient] for a in self.admitted]
        return {"step": self.step, "admitted": admitted, "aborted": self.aborted, "digest": self.digest}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Turn:
        admitted = tuple(
            Admission(ids, SamplingParams(**params), patient) for ids, params, patient in values["admitted"]
        )
        return cls(values["step"], admitted, tuple(values["aborted"]), values["digest"])


class Lockstep:
    """An engine moved by turns alone. Its sequences are known by `seq_id`, which counts them in order of admission.

    alone: no other process does the same steps, so nothing needs to be compared.
    """

    def __init__(self, engine: Engine, *, alone: bool = False):
        self.engine, self._alone = engine, alone
        self.step = self.digest = self.num_sequences = 0
        self._alive: dict[int, Sequence] = {}

    def take(self, turn: Turn) -> list[list[Sequence]]:
        """The sequences of each request that joins. Raises OutOfStep if the sender has not done the same steps."""
        if (turn.step, turn.digest) != (self.step, self.digest):
            raise OutOfStep(
                f"the schedules of the processes differ: after step {turn.step} process 0 had {turn.digest:08x}, this "
                f"process has {self.digest:08x} after step {self.step}"
            )
        joined = [self.engine.add(list(a.prompt_token_ids), a.params, patient=a.patient) for a in turn.admitted]
        for seq in (seq for sequences in joined for seq in sequences):
            self._alive[seq.seq_id] = seq
            self.num_sequences += 1
        self.abort(turn.aborted)
        return joined

    def abort(self, seq_ids: Iterable[int]) -> None:
        # One that is gone ended by itself while the wish to end it was on its way.
        self.engine.abort([self._alive.pop(seq_id) for seq_id in seq_ids if seq_id in self._alive])

    def run(self) -> StepResult:
        result = self.engine.step()
        for seq in (*result.ended, *result.failed):
            self._alive.pop(seq.seq_id, None)
        self.step += 1
        if not self._alone:
            self.digest = digest_of(result, self.digest)
        return result


def digest_of(result: StepResult, before: int = 0) -> int:
    """A checksum of what was scheduled, in which order and pages, and of the tokens that were read; 32 bits.

    Not Python's `hash`, which other versions of Python compute otherwise.
    """
    words = array.array("q")
    words.extend(result.schedule.decode_rows.ravel().tolist())
    for seq in result.schedule.decodes:
        words.extend((seq.seq_id, seq.pages[-1] if seq.pages else -1))
    for chunk in result.schedule.chunks:
        words.extend((chunk.seq.seq_id, chunk.start, chunk.length, chunk.samples))
        words.extend(chunk.seq.pages)
    for seq in result.advanced:
        words.extend((seq.seq_id, seq.tokens_read[-1]))
    return zlib.crc32(words.tobytes(), before)
