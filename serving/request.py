"""One request as its owner sees it: a stream of outputs."""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from .detokenizer import Detokenizer
from .errors import RequestFailed
from .outputs import CompletionOutput, RequestOutput, RequestTimes, TokenLogprobs
from .sampling_params import SamplingParams
from .sequence import Sequence as Seq
from .stop import StopChecker
from .tokenizer import Tokenizer

OutputKind = Literal["delta", "final"]


@dataclasses.dataclass(frozen=True)
class Request:
    """What somebody asks for: `prompt` is text or token ids."""

    prompt: str | list[int]
    params: SamplingParams
    request_id: str | None = None


@dataclasses.dataclass(slots=True)  # not frozen, which takes three times as long to make
class TokenEvent:
    """The engine's word to a request: new tokens of its output `index`, and how that output ended if it did.

    `logprobs` are those of the only token.
    """

    index: int
    token_ids: Sequence[int] = ()
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    # Set when the step that held the request raised.
    error: str | None = None
    prompt_logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()


class _Output:
    """One of the request's `n` outputs, in the making."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer | None, prompt_ids: list[int]):
        self.value = CompletionOutput(index)
        self.detokenizer = (
            Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens, prompt_ids=prompt_ids)
            if tokenizer is not None and params.detokenize
            else None
        )
        self.stop = StopChecker(params.stop or (), include_stop_str_in_output=params.include_stop_str_in_output)
        self.num_tokens = 0
        self.done = False


class RequestStream:
    """What `Front.submit` returns for a Request. The consumer's thread detokenizes and looks for stop strings.

    "delta" outputs hold what is new since the one before; the one "final" output holds everything.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        times: RequestTimes,
        abort: Callable[[RequestStream, list[int], str], None],
        output_kind: OutputKind = "delta",
        patient: bool = False,
        on_event: Callable[[RequestStream], None] | None = None,
    ):
        self.request_id, self.prompt, self.prompt_token_ids = request_id, prompt, prompt_token_ids
        self.params, self.times, self.output_kind, self.patient = params, times, output_kind, patient
        self.sequences: list[Seq] = []  # the engine thread's
        self._tokenizer, self._abort, self._on_event = tokenizer, abort, on_event
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        # Nobody waits for a token that neither is shown nor may end the output by the text it completes.
        self.wants_each_token = output_kind == "delta" or bool(params.stop) or params.logprobs is not None
        self._outputs = [_Output(i, params, tokenizer, prompt_token_ids) for i in range(params.n)]
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = [None] * len(prompt_token_ids)
        self._delivered_prompt = self._has_news = False

    def put(self, event: TokenEvent) -> None:
        """The engine thread's side. Wakes the consumer."""
        self._events.put(event)
        if self._on_event is not None:
            self._on_event(self)

    def get(self, timeout: float | None = None) -> RequestOutput | None:
        """The next output, None after `timeout` seconds without one. Raises RequestFailed if its step raised.

        After the output with `finished` set there is nothing more to get.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                event = self._events.get(timeout=left) if left != 0 else self._events.get_nowait()
            except queue.Empty:
                return None
            self._take(event)
            # Everything that has piled up goes out as one output; prompt scores wait for the first token.
            if self._events.empty() and (self.finished or (self.output_kind == "delta" and self._has_news)):
                return self._snapshot()

    def __iter__(self) -> Iterator[RequestOutput]:
        while not self.finished:
            output = self.get()
            if output is not None:
                yield output

    def abort(self) -> None:
        """End what still runs; its pages are free within two steps. Harmless when all is over."""
        self._abort(self, [output.value.index for output in self._outputs if not output.done], "abort")

    @property
    def finished(self) -> bool:
        return all(output.done for output in self._outputs)

    def _take(self, event: TokenEvent) -> None:
        if event.error is not None:
            raise RequestFailed(f"the step that held this request failed: {event.error}")
        for position, candidates in event.prompt_logprobs:
            if self._prompt_logprobs is not None:
                self._prompt_logprobs[position] = self._with_text(candidates)
        output = self._outputs[event.index]
        if output.done:
            return  # tokens that were on their way when a stop string ended it
        value = output.value
        self._has_news |= bool(event.token_ids) or event.finish_reason is not None
        for place, token in enumerate(event.token_ids, 1):
            is_stop = event.finish_reason == "stop" and place == len(event.token_ids)
            self._add_token(output, token, event.logprobs, is_stop=is_stop)
        if event.finish_reason is not None and output.detokenizer is not None:
            self._add_text(output, output.detokenizer.finish())
        if output.stop.matched is not None:
            value.finish_reason, value.stop_reason = "stop", output.stop.matched
            output.done = True
            self._abort(self, [value.index], "stop")
        elif event.finish_reason is not None:
            value.text += output.stop.finish()
            value.finish_reason, value.stop_reason = event.finish_reason, event.stop_reason
            output.done = True

    def _add_token(self, output: _Output, token: int, logprobs: TokenLogprobs | None, *, is_stop: bool) -> None:
        value = output.value
        value.token_ids.append(token)
        output.num_tokens += 1
        if logprobs is not None:
            value.logprobs = value.logprobs or []
            value.logprobs.append(self._with_text(logprobs))
            value.cumulative_logprob = (value.cumulative_logprob or 0.0) + logprobs[token].logprob
        # A token that ends the output is not part of its text, unless it is asked for as a stop string would be.
        if output.detokenizer is None or (is_stop and not self.params.include_stop_str_in_output):
            return
        known = self._tokenizer is not None and token < self._tokenizer.vocab_size
        self._add_text(output, output.detokenizer.add([token] if known else []))

    def _add_text(self, output: _Output, text: str) -> None:
        output.value.text += output.stop.add(text, check=output.num_tokens > self.params.min_tokens)

    def _with_text(self, candidates: TokenLogprobs) -> TokenLogprobs:
        tokenizer = self._tokenizer
        if tokenizer is None:
            return candidates

        def text(token: int) -> str:
            # A model's vocabulary may be padded beyond its tokenizer's.
            return tokenizer.id_to_bytes(token).decode("utf-8", "replace") if token < tokenizer.vocab_size else ""

        return {token: dataclasses.replace(entry, decoded_token=text(token)) for token, entry in candidates.items()}

    def _snapshot(self) -> RequestOutput:
        prompt_logprobs = self._prompt_logprobs
        if self.output_kind == "delta":
            prompt_logprobs = None if self._delivered_prompt else prompt_logprobs
            self._delivered_prompt, self._has_news = True, False
        values = [output.value for output in self._outputs]
        if self.output_kind == "delta":
            for output in self._outputs:
                old = output.value
                output.value = CompletionOutput(
                    old.index,
                    cumulative_logprob=old.cumulative_logprob,
                    finish_reason=old.finish_reason,
                    stop_reason=old.stop_reason,
                )
        return RequestOutput(
            self.request_id, self.prompt, self.prompt_token_ids, values, self.finished, self.times, prompt_logprobs
        )
