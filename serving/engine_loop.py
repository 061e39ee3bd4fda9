"""The engine's thread, and what other threads may ask of it."""

from __future__ import annotations

import gc
import logging
import threading
import time
import uuid
from collections.abc import Callable
from collections.abc import Sequence as ListOf

import jax

from .delivery import Delivery
from .engine_config import EngineConfig
from .errors import EngineBusy, EngineDead
from .inbox import Inbox, Wishes
from .metrics import Metrics
from .outputs import RequestTimes
from .peers import Peers
from .quiet_heap import HEAP
from .request import OutputKind, RequestStream, TokenEvent
from .sampling_params import SamplingParams
from .turn import Admission, Lockstep, Turn

logger = logging.getLogger("paddock")

# A step that takes longer than this is taken for a hang.
STALL_SECONDS = 120.0
# How long `shutdown` waits for the step that runs.
JOIN_SECONDS = 15.0


class EngineLoop:
    """Loads a model, compiles its steps, and runs them in a thread of its own until `shutdown`.

    With an engine in several processes this is process 0, and waits for the others to start. Raises ValueError,
    CheckpointError among them, when the model or an option cannot be had.
    """

    def __init__(self, config: EngineConfig, *, replica: int = 0, progress: bool = False):
        self._peers = Peers(config)
        built = self._peers.build(config, replica=replica, progress=progress)
        self.config, self.engine, self.executor = config, built.engine, built.executor
        self.startup_seconds, self.compiling = built.startup_seconds, built.compiling
        self.model_name = config.served_model_name or config.model or "paddock-demo"
        self.tokenizer, self.chat_template = built.tokenizer, built.chat_template
        self.default_params = built.resolved.default_params
        self.max_model_len = built.resolved.max_model_len
        self.vocab_size = built.resolved.model.vocab_size
        self.num_slots = built.resolved.plan.num_slots
        scheduler = built.engine.scheduler
        self.metrics = Metrics(self.model_name, str(replica), lambda: scheduler.load)
        self.metrics.on_compile(built.executor.num_compilations)
        for kind, num_bytes in built.executor.bytes_per_device().items():
            self.metrics.set_memory(kind, num_bytes)
        self.metrics.set_cache_config(
            block_size=built.resolved.page_size,
            num_gpu_blocks=(built.resolved.num_pages - 1) * built.resolved.plan.num_partitions,
            cache_dtype=built.resolved.dtype,
        )
        self._lockstep = Lockstep(built.engine, alone=self._peers.is_alone)
        self._delivery = Delivery(self._lockstep, self.metrics)
        self._inbox = Inbox()
        self._accepting, self._stopping = True, False
        self._dead: str | None = None
        self._beat = time.monotonic()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"paddock-engine-{replica}", daemon=True)
        jax.monitoring.register_event_duration_secs_listener(self._note_compile)
        gc.collect()
        self._thread.start()
        self._peers.watch(self._lose_peer, self.shutdown)

    # --- other threads ---

    def open(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
        output_kind: OutputKind = "delta",
        patient: bool = False,
        on_event: Callable[[RequestStream], None] | None = None,
    ) -> RequestStream:
        """A request that `Engine.check` let pass, for `admit`; `prompt` is its text, if there is one.

        `on_event` is called in the engine's thread whenever there is something to `get`.
        """
        return RequestStream(
            request_id=request_id or f"req-{uuid.uuid4().hex}",
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            params=params,
            tokenizer=self.tokenizer,
            times=RequestTimes(arrival=time.monotonic()),
            abort=self._inbox.abort,
            output_kind=output_kind,
            patient=patient,
            on_event=on_event,
        )

    def admit(self, streams: ListOf[RequestStream]) -> None:
        """Queue requests, which join in this order and in the same step. Raises EngineBusy when the engine is shutting
        down, EngineDead; then none is queued."""
        with self._lock:
            if self._dead is not None:
                raise EngineDead(self._dead)
            if not self._accepting:
                raise EngineBusy("the engine is shutting down")
            if not self._delivery.num_unfinished:
                self._beat = time.monotonic()  # it rested
            self._delivery.expect(streams)
            self._inbox.admit(streams)

    @property
    def num_unfinished(self) -> int:
        """Sequences submitted and not yet ended, those on their way to the engine's thread included."""
        return self._delivery.num_unfinished

    @property
    def num_queued(self) -> int:
        """Requests of which no step has run."""
        return sum(stream.times.scheduled is None for stream in self._delivery.streams)

    def health(self) -> str | None:
        """None while steps make progress or there is nothing to do; else what is wrong."""
        if self._dead is not None:
            return self._dead
        if not self._thread.is_alive():
            return "the engine's thread has ended"
        waited = time.monotonic() - self._beat
        if self._delivery.num_unfinished and waited > STALL_SECONDS:
            return f"no step has finished for {waited:.0f} s"
        return None

    @property
    def is_dead(self) -> bool:
        """The engine's thread has given up: nothing will run in this process any more."""
        return self._dead is not None

    def load(self) -> dict[str, int]:
        running, waiting, _ = self.engine.scheduler.load
        return {"running": running, "waiting": waiting}

    def shutdown(self, grace_seconds: float = 0.0) -> bool:
        """Refuse new requests, let those there are finish for `grace_seconds`, abort the rest, free the devices.

        False: the engine's thread hangs in a step and was left behind.
        """
        with self._lock:
            self._accepting = False
        deadline = time.monotonic() + grace_seconds
        while self._delivery.num_unfinished and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        with self._lock:
            already, self._stopping = self._stopping, True
        if not already:
            self._inbox.close()
        # A step whose other parts are gone never ends.
        self._thread.join(timeout=1.0 if self._peers.lost.is_set() else JOIN_SECONDS)
        return not self._thread.is_alive()

    def _note_compile(self, event: str, *_: object, **__: object) -> None:
        # Whatever else compiles in this process - another replica, the user's own programs - is no step of ours.
        if event.endswith("backend_compile_duration") and threading.current_thread() is self._thread:
            self.metrics.on_compile()

    # --- the engine's thread ---

    def _run(self) -> None:
        HEAP.begin()
        is_alone = self._peers.is_alone
        try:
            while (wishes := self._inbox.collect(is_idle=self.engine.is_idle)) is not None:
                self._beat = time.monotonic()
                if wishes or not is_alone:
                    self._tell(wishes)
                result = self._lockstep.run()
                self._peers.check(result)
                self._delivery.deliver(result, time.monotonic() - self._beat)
        except BaseException as error:
            logger.critical("the engine stopped: %s", error, exc_info=error)
            self._die(f"the engine stopped: {self._peers.reason(error)}")
            self._peers.fail()
        else:
            self._die("the engine is shut down", reason="abort")
            self._peers.end(self.executor)
        finally:
            jax.monitoring.unregister_event_duration_listener(self._note_compile)
            self.engine.close()
            self.executor.release()
            HEAP.end()

    def _tell(self, wishes: Wishes) -> None:
        """Tell the engine, in every process, what joins and what ends before the next step."""
        ids: dict[RequestStream, list[int]] = {}
        first = self._lockstep.num_sequences
        for stream in wishes.admitted:
            ids[stream] = list(range(first, first + stream.params.n))
            first += stream.params.n
        ending = [
            (stream, index, reason, (ids.get(stream) or [seq.seq_id for seq in stream.sequences])[index])
            for stream, indices, reason in wishes.aborted
            for index in indices
        ]
        turn = Turn(
            self._lockstep.step,
            tuple(Admission(stream.prompt_token_ids, stream.params, stream.patient) for stream in wishes.admitted),
            tuple(seq_id for *_, seq_id in ending),
            self._lockstep.digest,
        )
        self._peers.tell(turn)
        for stream, sequences in zip(wishes.admitted, self._lockstep.take(turn), strict=True):
            self._delivery.join(stream, sequences)
        if ending:
            self._delivery.abort((stream, index, reason) for stream, index, reason, _ in ending)

    def _die(self, message: str, reason: str = "error") -> None:
        """End every stream, those still in the inbox included; later ones are refused."""
        with self._lock:
            self._accepting, self._dead = False, self._dead or message
        self._delivery.end(reason, error=None if reason == "abort" else message)

    def _lose_peer(self, message: str) -> None:
        """Another process is gone: end every stream now, for this one's thread may hang in a step for ever."""
        with self._lock:
            self._accepting, self._dead = False, message
        for stream in self._delivery.streams:
            stream.put(TokenEvent(0, error=message))
