"""A front without a model: it echoes the prompt, token by token, when a test lets it.

Tokens are bytes; id 256 is BOS and 257 the end. Without `pace` outputs come as fast as they are asked for; with it each
token needs a permit from `release`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

from paddock.serving.compiler import CompileReport
from paddock.serving.errors import EngineBusy, EngineDead, RequestFailed
from paddock.serving.metrics import Metrics, MetricsPage
from paddock.serving.outputs import CompletionOutput, Logprob, RequestOutput, RequestTimes, TokenLogprobs
from paddock.serving.sampling_params import SamplingParams

BOS, EOS, VOCAB = 256, 257, 258
DEADLINE = 20.0


class ByteTokenizer:
    """One token a byte."""

    vocab_size = VOCAB
    special_ids = frozenset({BOS, EOS})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        try:
            return [BOS] * add_special_tokens + list(text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"text holds a lone surrogate at character {error.start}") from None

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        if any(not 0 <= token < VOCAB for token in ids):
            raise ValueError("token id outside the vocabulary")
        return b"".join(self.id_to_bytes(t) for t in ids if t < BOS or not skip_special_tokens).decode(errors="replace")

    def id_to_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < BOS else {BOS: b"<s>", EOS: b"</s>"}[token]

    def id_to_piece(self, token: int) -> str:
        return self.id_to_bytes(token).decode("latin-1")


class PlainTemplate:
    """role:content lines."""

    def render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        if messages[0]["role"] == "assistant":
            raise ValueError("a conversation starts with the user")
        lines = [f"{message['role']}:{message['content']}" for message in messages]
        return "\n".join(lines + ["assistant:"] * add_generation_prompt)


class FakeStream:
    """Echoes the prompt without BOS, round and round; `get` may be called by one thread."""

    def __init__(
        self,
        engine: FakeEngine,
        prompt: str | None,
        ids: list[int],
        params: SamplingParams,
        kind: str,
        request_id: str | None,
    ) -> None:
        self.engine, self.prompt, self.prompt_token_ids, self.params, self.kind = engine, prompt, ids, params, kind
        self.request_id = request_id or f"fake-{len(engine.streams)}"
        self.source = [token for token in ids if token < BOS] or [ord(".")]
        self.limit = params.max_tokens or engine.max_model_len - len(ids)
        self.made = 0
        self.ready = 0
        self.aborted = threading.Event()
        self.finished = False
        self.on_event: Callable[[FakeStream], None] = lambda stream: None
        self._lock = threading.Condition()
        self._kept: list[CompletionOutput] | None = None

    def allow(self, count: int) -> None:
        with self._lock:
            self.ready += count
            self._lock.notify_all()
        self.on_event(self)

    def abort(self) -> None:
        if not self.finished:
            self.aborted.set()
        with self._lock:
            self._lock.notify_all()
        self.on_event(self)

    def get(self, timeout: float | None = None) -> RequestOutput | None:
        while True:
            with self._lock:
                if not self._lock.wait_for(lambda: self.ready > 0 or self.aborted.is_set(), timeout):
                    return None
                self.ready -= 1
            output = self._next()
            self.finished = output.finished
            self.on_event(self)
            if self.kind == "delta" or output.finished:
                return output

    def __iter__(self) -> Iterator[RequestOutput]:
        while not self.finished:
            output = self.get(DEADLINE)
            assert output is not None
            yield output

    def _next(self) -> RequestOutput:
        if self.engine.fail_after is not None and self.made >= self.engine.fail_after:
            raise RequestFailed("the step that held this request failed: planted")
        outputs = [self._aborted(i) if self.aborted.is_set() else self._token(i) for i in range(self.params.n)]
        self.made += 1
        if self.kind == "final":
            outputs = self._kept = self._joined(outputs)
        prompt_logprobs = None
        if self.params.prompt_logprobs is not None and (self.made == 1 or self.kind == "final"):
            candidates = [self._candidates(token, self.params.prompt_logprobs) for token in self.prompt_token_ids[1:]]
            prompt_logprobs = [None, *candidates]
        finished = all(output.finished for output in outputs)
        times = RequestTimes(time.monotonic())
        return RequestOutput(
            self.request_id, self.prompt, self.prompt_token_ids, outputs, finished, times, prompt_logprobs
        )

    def _aborted(self, index: int) -> CompletionOutput:
        return CompletionOutput(index, finish_reason="abort")

    def _token(self, index: int) -> CompletionOutput:
        token = self.source[(self.made + index) % len(self.source)]
        output = CompletionOutput(index, chr(token) if token < 128 else "?", [token])
        if self.params.logprobs is not None:
            output.logprobs = [self._candidates(token, self.params.logprobs)]
        if output.text in (self.params.stop or ()):
            output.text, output.finish_reason, output.stop_reason = "", "stop", output.text
        elif self.made + 1 >= self.limit:
            output.finish_reason = "length"
        return output

    def _candidates(self, token: int, count: int) -> TokenLogprobs:
        """`token` has rank 2; ids 0, 1, ... are the others."""
        ranked = [1, *range(3, count + 1)][:count]
        others = {i: Logprob(-0.25 * rank, rank, chr(i)) for i, rank in enumerate(ranked) if rank != 2}
        return others | {token: Logprob(-0.5, 2, self.engine.tokenizer.id_to_piece(token))}

    def _joined(self, new: list[CompletionOutput]) -> list[CompletionOutput]:
        if self._kept is None:
            return new
        for old, output in zip(self._kept, new, strict=True):
            output.text, output.token_ids = old.text + output.text, old.token_ids + output.token_ids
            output.logprobs = (old.logprobs or []) + output.logprobs if output.logprobs is not None else None
        return new


class FakeEngine:
    """The interface of Front, for tests of what is built on it."""

    def __init__(self, *, pace: bool = False, max_model_len: int = 256) -> None:
        self.model_name, self.created, self.max_model_len, self.vocab_size = "demo", 1_700_000_000, max_model_len, VOCAB
        self.tokenizer, self.chat_template = ByteTokenizer(), PlainTemplate()
        self.default_params = SamplingParams()
        self.metrics = MetricsPage([Metrics("demo")])
        self.pace = pace
        self.streams: list[FakeStream] = []
        self.submitted = threading.Condition()
        self.fail_after: int | None = None
        self.busy = False
        self.problem: str | None = None
        self.is_dead = False
        self.hangs = False
        self.shutdown_graces: list[float] = []
        self.startup_seconds = {"load": 0.5, "compile": 1.5}
        self.bytes_per_device = {"weights": 2**29, "kv_cache": 2**30}
        self.compiling = CompileReport(num_found=3, num_lowered=2, num_compiled=1)

    def submit(
        self,
        prompt: str | list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        output_kind: Literal["delta", "final"] = "delta",
        on_event: Callable[[FakeStream], None] | None = None,
    ) -> FakeStream:
        ids = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        if any(not 0 <= token < VOCAB for token in ids):
            raise ValueError(f"prompt_token_ids holds an id outside 0 to {VOCAB - 1}")
        if len(ids) >= self.max_model_len:
            raise ValueError(f"prompt has {len(ids)} tokens, but only {self.max_model_len} fit")
        if params.max_tokens is not None and len(ids) + params.max_tokens > self.max_model_len:
            raise ValueError(f"max_tokens {params.max_tokens} goes beyond the context of {self.max_model_len}")
        if self.is_dead:
            raise EngineDead("the device is lost")
        if self.busy or self.shutdown_graces:
            raise EngineBusy("the queue is full")
        stream = FakeStream(self, prompt if isinstance(prompt, str) else None, ids, params, output_kind, request_id)
        if on_event is not None:
            stream.on_event = on_event
        with self.submitted:
            self.streams.append(stream)
            self.submitted.notify_all()
        if not self.pace:
            stream.allow(10_000)
        return stream

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def wait_for_streams(self, count: int) -> list[FakeStream]:
        with self.submitted:
            assert self.submitted.wait_for(lambda: len(self.streams) >= count, DEADLINE), len(self.streams)
            return self.streams[:count]

    def health(self) -> str | None:
        return self.problem

    def load(self) -> dict[str, int]:
        return {"running": sum(not stream.finished for stream in self.streams), "waiting": 0}

    def shutdown(self, grace_seconds: float = 0.0) -> bool:
        """False: a step hangs, and so do the streams."""
        self.shutdown_graces.append(grace_seconds)
        if self.hangs:
            return False
        for stream in self.streams:
            stream.abort()
        return True
