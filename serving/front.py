"""What LLM, the server and the CLI talk to: one engine for each replica of the mesh, behind one front."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence

import jax
from tqdm import tqdm

from .engine_config import EngineConfig
from .engine_loop import EngineLoop
from .errors import EngineBusy, EngineDead
from .metrics import MetricsPage
from .request import OutputKind, Request, RequestStream
from .routing import ReplicaLoad, route
from .sampling_params import SamplingParams

# Characters a token beyond which a prompt is measured before it is tokenized.
LONG_TEXT = 16


class Front:
    """Tokenizes and checks requests, draws the seeds that they lack, and gives each to a replica (see `routing`).

    A replica is an EngineLoop with weights, pages and devices of its own: one for each index of the mesh's axis `data`,
    often just one. A replica that fails ends the requests that it held and no others. Raises ValueError,
    CheckpointError among them, when the model or an option cannot be had.
    """

    def __init__(self, config: EngineConfig, *, progress: bool = False):
        self.config = config
        self.created = int(time.time())
        self.replicas, self.startup_seconds = _start(config, progress)
        self.compiling, self.bytes_per_device = self.replicas[0].compiling, self.replicas[0].executor.bytes_per_device()
        # Where another program holds some of a device's memory the replica there has fewer pages.
        self._smallest = min(self.replicas, key=lambda replica: replica.max_model_len)
        self.max_model_len, self.vocab_size = self._smallest.max_model_len, self._smallest.vocab_size
        self.model_name, self.default_params = self._smallest.model_name, self._smallest.default_params
        self.tokenizer, self.chat_template = self._smallest.tokenizer, self._smallest.chat_template
        self.metrics = MetricsPage([replica.metrics for replica in self.replicas])
        # Guards what follows, and keeps each replica's requests in the order of their numbers.
        self._lock = threading.Lock()
        self._accepting = True
        self._num_sequences = 0

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

        `on_event` is called in an engine's thread whenever there is something to `get`. Raises ValueError naming the
        bad argument, EngineBusy when `max_num_queued_reqs` requests wait in all replicas together or the engine is
        shutting down, EngineDead when there is no replica left.
        """
        request = Request(prompt, params, request_id)
        return self.submit_all([request], output_kind=output_kind, on_event=on_event)[0]

    def submit_all(
        self,
        requests: Sequence[Request],
        *,
        output_kind: OutputKind = "delta",
        patient: bool = False,
        on_event: Callable[[RequestStream], None] | None = None,
    ) -> list[RequestStream]:
        """Queue requests whose outputs are wanted together: each replica takes its own all before its next step, those
        first that may become longest.

        Long ones that start last end almost alone, in steps that take nearly as long for one sequence as for many:
        "longest processing time first" (Graham 1969). `patient`: nobody minds when their tokens come, so that they may
        wait for prompts (see Scheduler). Raises as `submit` does, and then queues none.
        """
        prompts = [self.tokenize(one.prompt) if isinstance(one.prompt, str) else list(one.prompt) for one in requests]
        for one, token_ids in zip(requests, prompts, strict=True):
            if one.params.stop and self.tokenizer is None:
                raise ValueError("stop strings need a tokenizer, and this engine has none")
            self._smallest.engine.check(token_ids, one.params)
        with self._lock:
            if not self._accepting:
                raise EngineBusy("the engine is shutting down")
            places = self._places(prompts, [one.params.n for one in requests])
            streams = []
            for one, token_ids, place in zip(requests, prompts, places, strict=True):
                stream = self.replicas[place].open(
                    token_ids,
                    self._with_seed(one.params),
                    prompt=one.prompt if isinstance(one.prompt, str) else None,
                    request_id=one.request_id,
                    output_kind=output_kind,
                    patient=patient,
                    on_event=on_event,
                )
                streams.append(stream)
                self._num_sequences += one.params.n
            self._admit(streams, places)
        return streams

    def _places(self, prompts: Sequence[list[int]], counts: Sequence[int]) -> list[int]:
        """The replica of each prompt, of which `counts` sequences are wanted. Raises EngineBusy, EngineDead."""
        limit, queued = self.config.max_num_queued_reqs, sum(one.num_queued for one in self.replicas)
        loads = [_load_of(replica) for replica in self.replicas]
        places: list[int] = []
        for token_ids, count in zip(prompts, counts, strict=True):
            index = route(token_ids, loads)
            load = None if index is None else loads[index]
            if index is None or load is None:
                raise EngineDead(self.health() or "the engine is shut down")
            if limit is not None and queued + len(places) >= limit:
                self.replicas[index].metrics.on_rejected()
                raise EngineBusy(f"{limit} requests are waiting already; try again later")
            loads[index] = dataclasses.replace(load, num_seqs=load.num_seqs + count)
            places.append(index)
        return places

    def _admit(self, streams: Sequence[RequestStream], places: Sequence[int]) -> None:
        order = sorted(range(len(streams)), key=lambda i: -(streams[i].params.max_tokens or self.max_model_len))
        admitted: list[RequestStream] = []
        try:
            for index in sorted(set(places)):
                mine = [streams[i] for i in order if places[i] == index]
                self.replicas[index].admit(mine)
                admitted += mine
        except BaseException:  # one of several replicas is gone: the others would compute for nobody
            for stream in admitted:
                stream.abort()
            raise

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
        """None while every replica makes progress or has nothing to do; else what is wrong, and with which."""
        found = [(index, replica.health()) for index, replica in enumerate(self.replicas)]
        several = len(self.replicas) > 1
        problems = [f"replica {i}: {problem}" if several else problem for i, problem in found if problem is not None]
        return "; ".join(problems) or None

    @property
    def is_dead(self) -> bool:
        """No replica is left: nothing will run in this process any more."""
        return all(replica.is_dead for replica in self.replicas)

    def load(self) -> dict[str, int]:
        """Sequences running and waiting, in all replicas together."""
        loads = [replica.load() for replica in self.replicas]
        return {name: sum(load[name] for load in loads) for name in loads[0]}

    def shutdown(self, grace_seconds: float = 0.0) -> bool:
        """Refuse new requests, let those there are finish for `grace_seconds`, abort the rest, free the devices.

        False: a replica's thread hangs in a step and was left behind.
        """
        with self._lock:
            self._accepting = False
        deadline = time.monotonic() + grace_seconds
        # One after the other, for this also runs while Python exits, when no thread can be started any more.
        ended = [replica.shutdown(max(0.0, deadline - time.monotonic())) for replica in self.replicas]
        return all(ended)

    def _with_seed(self, params: SamplingParams) -> SamplingParams:
        """Without a seed of its own a request draws one from its place in the order of requests, whichever replica it
        goes to: no clock, no hidden state."""
        if params.seed is not None or params.is_greedy:
            return params
        return dataclasses.replace(params, seed=hash((self.config.seed, self._num_sequences)) & (2**64 - 1))

    @functools.cached_property
    def _longest_token(self) -> int:
        """Most characters that one token can stand for."""
        assert self.tokenizer is not None
        return max(len(self.tokenizer.id_to_bytes(token)) for token in range(self.tokenizer.vocab_size))


def _start(config: EngineConfig, progress: bool) -> tuple[list[EngineLoop], dict[str, float]]:
    """The replicas, and how long each phase took: the first alone, so that a mistake shows at once and the checkpoint,
    and what XLA's autotuner measured, are in the caches when the others start, side by side. Compiled programs are for
    the devices that they name: each replica has its own."""
    replicas = [EngineLoop(config, progress=progress)]
    seconds = dict(replicas[0].startup_seconds)
    # Only now does JAX know how many devices there are, which a preset may leave open.
    count = config.layout_text.mesh_config(jax.device_count()).num_replicas
    if count == 1:
        return replicas, seconds
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(count - 1) as pool:
        futures = [pool.submit(EngineLoop, config, replica=index) for index in range(1, count)]
        done = concurrent.futures.as_completed(futures)
        for _ in tqdm(done, total=count - 1, desc="Starting other replicas", unit="replica", disable=not progress):
            pass
    replicas += [future.result() for future in futures if future.exception() is None]
    if len(replicas) < count:
        for replica in replicas:
            replica.shutdown()
        raise next(error for future in futures if (error := future.exception()) is not None)
    return replicas, {**seconds, "replicas": time.perf_counter() - begin}


def _load_of(replica: EngineLoop) -> ReplicaLoad | None:
    if replica.is_dead:
        return None
    usage = replica.engine.scheduler.usage
    return ReplicaLoad(replica.num_unfinished, replica.num_slots, usage, stalled=replica.health() is not None)
