"""The engine's thread, and what other threads may ask of it."""

from __future__ import annotations

import dataclasses
import functools
import logging
import queue
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax

from .build import build
from .engine import Engine, StepResult
from .engine_config import EngineConfig
from .errors import EngineBusy, EngineDead
from .metrics import Metrics
from .outputs import RequestTimes, TokenLogprobs
from .request import OutputKind, RequestStream, TokenEvent, event_of
from .sampling_params import SamplingParams
from .sequence import Sequence, SequenceStatus

logger = logging.getLogger("paddock")

# A step that takes longer than this is taken for a hang.
STALL_SECONDS = 120.0
# How long `shutdown` waits for the step that runs.
JOIN_SECONDS = 15.0
# Characters a token beyond which a prompt is measured before it is tokenized.
LONG_TEXT = 16


@dataclasses.dataclass
class _Member:
    """Whose sequence it is: output `index` of `stream`; when its last token came (monotonic seconds)."""

    stream: RequestStream
    index: int
    last_token: float | None = None


class EngineLoop:
    """Loads a model, compiles its steps, and runs them in a thread of its own until `shutdown`.

    Raises ValueError, CheckpointError among them, when the model or an option cannot be had.
    """

    def __init__(self, config: EngineConfig, *, progress: bool = False):
        built = build(config, progress=progress)
        self._start(built.engine, built.executor.release)
        self.config = config
        self.startup_seconds = built.startup_seconds
        self.model_name = config.served_model_name or config.model or "paddock-demo"
        self.created = int(time.time())
        self.tokenizer, self.chat_template = built.tokenizer, built.chat_template
        self.default_params = built.resolved.default_params
        self.max_model_len = built.resolved.max_model_len
        self.vocab_size = built.resolved.model.vocab_size
        self.metrics = Metrics(self.model_name)
        self.metrics.on_compile(built.executor.num_compilations)
        jax.monitoring.register_event_duration_secs_listener(self._note_compile)
        for kind, num_bytes in built.executor.bytes_per_device().items():
            self.metrics.set_memory(kind, num_bytes)
        self.metrics.set_cache_config(
            block_size=built.resolved.page_size,
            num_gpu_blocks=built.resolved.num_pages - 1,
            cache_dtype=built.resolved.dtype,
        )
        self.executor = built.executor
        self._thread.start()

    def _start(self, engine: Engine, release: Callable[[], None]) -> None:
        self.engine, self._release = engine, release
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._members: dict[Sequence, _Member] = {}
        # Sequences left of each request, from `submit` on.
        self._unfinished: dict[RequestStream, int] = {}
        self._accepting, self._stopping = True, False
        self._dead: str | None = None
        self._beat = time.monotonic()
        self._num_preemptions = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="paddock-engine", daemon=True)

    # --- other threads ---

    def submit(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        output_kind: OutputKind = "delta",
        on_event: Callable[[RequestStream], None] | None = None,
    ) -> RequestStream:
        """Queue a request. A string is tokenized here, in the caller's thread.

        `on_event` is called in the engine's thread whenever there is something to `get`. Raises ValueError naming the
        bad argument, EngineBusy when the queue is full or the engine is shutting down, EngineDead.
        """
        token_ids = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this engine has none")
        self.engine.check(token_ids, params)
        stream = RequestStream(
            request_id=request_id or f"req-{uuid.uuid4().hex}",
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            params=params,
            tokenizer=self.tokenizer,
            times=RequestTimes(arrival=time.monotonic()),
            abort=self._abort,
            output_kind=output_kind,
            on_event=on_event,
        )
        with self._lock:
            if self._dead is not None:
                raise EngineDead(self._dead)
            if not self._accepting:
                raise EngineBusy("the engine is shutting down")
            limit = self.config.max_num_queued_reqs
            if limit is not None and sum(other.times.scheduled is None for other in list(self._unfinished)) >= limit:
                self.metrics.on_rejected()
                raise EngineBusy(f"{limit} requests are waiting already; try again later")
            self._unfinished[stream] = params.n
            self._inbox.put(lambda: self._admit(stream))
        return stream

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises ValueError without a tokenizer, and for a text that is too long whatever its tokens turn out to be."""
        if self.tokenizer is None:
            raise ValueError("prompt is a string, but this engine has no tokenizer: give prompt_token_ids")
        # Tokenizing megabytes would hold up everybody; the vocabulary is only looked at for texts that are suspect.
        if len(text) > LONG_TEXT * self.max_model_len and len(text) > self._longest_token * self.max_model_len:
            raise ValueError(
                f"prompt has {len(text)} characters, more than fit the context of {self.max_model_len} tokens"
            )
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def health(self) -> str | None:
        """None while steps make progress or there is nothing to do; else what is wrong."""
        if self._dead is not None:
            return self._dead
        if not self._thread.is_alive():
            return "the engine's thread has ended"
        waited = time.monotonic() - self._beat
        if self._unfinished and waited > STALL_SECONDS:
            return f"no step has finished for {waited:.0f} s"
        return None

    @property
    def is_dead(self) -> bool:
        """The engine's thread has given up: nothing will run in this process any more."""
        return self._dead is not None

    def load(self) -> dict[str, int]:
        scheduler = self.engine.scheduler
        return {"running": len(scheduler.running), "waiting": len(scheduler.waiting)}

    def shutdown(self, grace_seconds: float = 0.0) -> bool:
        """Refuse new requests, let those there are finish for `grace_seconds`, abort the rest, free the devices.

        False: the engine's thread hangs in a step and was left behind.
        """
        with self._lock:
            self._accepting = False
        deadline = time.monotonic() + grace_seconds
        while self._unfinished and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        with self._lock:
            already, self._stopping = self._stopping, True
        if not already:
            self._inbox.put(None)
        self._thread.join(timeout=JOIN_SECONDS)
        return not self._thread.is_alive()

    @functools.cached_property
    def _longest_token(self) -> int:
        """Most characters that one token can stand for."""
        assert self.tokenizer is not None
        return max(len(self.tokenizer.id_to_bytes(token)) for token in range(self.tokenizer.vocab_size))

    def _abort(self, stream: RequestStream, indices: list[int], reason: str) -> None:
        self._inbox.put(lambda: self._abort_now(stream, indices, reason))

    def _note_compile(self, event: str, *_: object, **__: object) -> None:
        if event.endswith("backend_compile_duration"):
            self.metrics.on_compile()

    # --- the engine's thread ---

    def _run(self) -> None:
        try:
            while self._drain():
                self._beat = time.monotonic()
                result = self.engine.step()
                self._deliver(result, time.monotonic() - self._beat)
        except BaseException as error:
            logger.critical("the engine stopped: %s", error, exc_info=error)
            self._die(f"the engine stopped: {error}")
        else:
            self._die("the engine is shut down", reason="abort")
        finally:
            jax.monitoring.unregister_event_duration_listener(self._note_compile)
            self.engine.close()
            self._release()

    def _drain(self) -> bool:
        """Take in what other threads asked for, waiting for it when there is nothing to run; False: stop."""
        while True:
            try:
                command = self._inbox.get(block=self.engine.is_idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            self._beat = time.monotonic()
            command()
            if self.engine.is_idle:
                self._report_load()

    def _admit(self, stream: RequestStream) -> None:
        stream.sequences = self.engine.add(stream.prompt_token_ids, stream.params)
        for index, seq in enumerate(stream.sequences):
            self._members[seq] = _Member(stream, index)

    def _abort_now(self, stream: RequestStream, indices: list[int], reason: str) -> None:
        for index in indices:
            seq = stream.sequences[index]
            if seq.status is not SequenceStatus.FINISHED:
                self.engine.abort([seq])
                stream.put(TokenEvent(index, None, finish_reason="abort"))
                self._forget(seq, reason)

    def _deliver(self, result: StepResult, seconds: float) -> None:
        now = time.monotonic()
        scores: dict[Sequence, list[tuple[int, TokenLogprobs]]] = defaultdict(list)
        for seq, position, candidates in result.prompt_logprobs:
            scores[seq].append((position, candidates))
        for chunk in result.schedule.chunks:
            member = self._members.get(chunk.seq)
            if member is not None and member.stream.times.scheduled is None:
                member.stream.times.scheduled = now - seconds
        for sampled in result.tokens:
            seq = sampled.seq
            member = self._members[seq]
            event = event_of(sampled, member.index)
            if seq in scores:
                event = dataclasses.replace(event, prompt_logprobs=tuple(scores.pop(seq)))
            self._note_token(member, seq, now)
            member.stream.put(event)
            if seq.status is SequenceStatus.FINISHED:
                self._forget(seq, seq.finish_reason or "stop")
        for seq, entries in scores.items():
            member = self._members[seq]
            member.stream.put(TokenEvent(member.index, None, prompt_logprobs=tuple(entries)))
        for seq in result.failed:
            if (failed := self._members.get(seq)) is None:
                continue
            failed.stream.put(TokenEvent(failed.index, None, error=result.error))
            others = [other for other in failed.stream.sequences if other.status is not SequenceStatus.FINISHED]
            self.engine.abort(others)
            for lost in (seq, *others):
                self._forget(lost, "error")
        self._report_step(result, seconds)

    def _note_token(self, member: _Member, seq: Sequence, now: float) -> None:
        times = member.stream.times
        if times.first_token is None:
            times.first_token = now
            self.metrics.on_first_token(now - times.arrival)
            self.metrics.on_prompt(seq.num_prompt)
        self.metrics.on_tokens(1, None if member.last_token is None else now - member.last_token)
        times.last_token = member.last_token = now

    def _forget(self, seq: Sequence, reason: str) -> None:
        member = self._members.pop(seq, None)
        if member is None:
            return
        stream = member.stream
        self._unfinished[stream] -= 1
        if not self._unfinished[stream]:
            del self._unfinished[stream]
            generated = sum(len(other.output_token_ids) for other in stream.sequences)
            self.metrics.on_finish(stream.times, time.monotonic(), seq.num_prompt, generated, reason)

    def _report_step(self, result: StepResult, seconds: float) -> None:
        scheduler = self.engine.scheduler
        if result.bucket is not None:
            self.metrics.on_step(
                bucket=result.bucket,
                seconds=seconds,
                num_tokens=result.num_tokens,
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                kv_usage=scheduler.pool.usage,
                preemptions=scheduler.num_preemptions - self._num_preemptions,
            )
            self._num_preemptions = scheduler.num_preemptions
        if self.engine.is_idle:
            self._report_load()

    def _report_load(self) -> None:
        scheduler = self.engine.scheduler
        self.metrics.set_load(len(scheduler.running), len(scheduler.waiting), scheduler.pool.usage)

    def _die(self, message: str, reason: str = "error") -> None:
        """End every stream, those still in the inbox included; later ones are refused."""
        with self._lock:
            self._accepting, self._dead = False, message
        while not self._inbox.empty():
            command = self._inbox.get()
            if command is not None:
                command()
        for seq, member in list(self._members.items()):
            self.engine.abort([seq])
            event: dict[str, Any] = {"finish_reason": "abort"} if reason == "abort" else {"error": message}
            member.stream.put(TokenEvent(member.index, None, **event))
            self._forget(seq, reason)
