"""Answers over real request streams: aborted scores, vocabularies larger than their tokenizer's, the last character."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import FakeEngine

from paddock.serving.answer import _whole
from paddock.serving.api_errors import ApiError
from paddock.serving.bodies import ChatBody, CompletionBody
from paddock.serving.outputs import Logprob, RequestTimes
from paddock.serving.protocol import parse
from paddock.serving.request import RequestStream, TokenEvent
from paddock.serving.responses import ChatBuilder, CompletionBuilder
from paddock.serving.sampling_params import SamplingParams
from paddock.serving.tokenizer import Tokenizer

PADDING = 280


class Bytes(Tokenizer):
    """A token for each byte, and no more than that."""

    vocab_size, special_ids, strips_leading_space = 256, frozenset(), False

    def id_to_bytes(self, token: int) -> bytes:
        return bytes([token])  # ValueError for others

    _encode = _id_to_bytes = _id_to_piece = _find = None


def stream_of(prompt: list[int], params: SamplingParams, *events: TokenEvent) -> RequestStream:
    stream = RequestStream("r", None, prompt, params, Bytes(), RequestTimes(0.0), lambda *_: None, "final")
    for event in events:
        stream.put(event)
    return stream


def answer(kind: Any, builder: Any, ids: list[int], *events: TokenEvent, **body: Any) -> dict[str, Any]:
    """The one choice of the whole answer."""
    engine = FakeEngine()
    engine.tokenizer = Bytes()
    parsed = parse(kind, json.dumps(body).encode())
    params = parsed.params(SamplingParams())
    stream = stream_of(ids, params, *events)
    return _whole(builder(engine, params, parsed), iter([(0, stream.get(0))]))["choices"][0]


@pytest.mark.parametrize("logprobs", [1, None])
def test_a_scoring_request_that_is_aborted_has_no_scores(logprobs: int | None) -> None:
    prompt, abort = [65, 66, 67], TokenEvent(0, (), None, "abort")
    with pytest.raises(ApiError, match="aborted"):
        answer(
            CompletionBody, CompletionBuilder, prompt, abort, prompt=prompt, echo=True, max_tokens=0, logprobs=logprobs
        )


def test_candidates_from_the_padding_have_no_text() -> None:
    candidates = {66: Logprob(-0.1, 1), PADDING: Logprob(-3.0, 2)}
    messages = [{"role": "user", "content": "x"}]
    event = TokenEvent(0, [66], candidates, "length")
    choice = answer(ChatBody, ChatBuilder, [65], event, messages=messages, logprobs=True, top_logprobs=2)
    (token,) = choice["logprobs"]["content"]
    assert [(top["token"], top["bytes"]) for top in token["top_logprobs"]] == [("B", [66]), ("", [])]


@pytest.mark.parametrize("logprobs", [None, 1])
def test_an_echoed_prompt_may_hold_padding(logprobs: int | None) -> None:
    prompt, events = [PADDING, 65, 65, 65, 67], []
    if logprobs:
        scores = tuple((place, {prompt[place]: Logprob(-1.0, 1)}) for place in range(1, 5))
        events.append(TokenEvent(0, prompt_logprobs=scores))
    events.append(TokenEvent(0, [66], {66: Logprob(-0.1, 1)} if logprobs else None, "length"))
    body = {"prompt": prompt, "echo": True, "max_tokens": 1, "logprobs": logprobs}
    choice = answer(CompletionBody, CompletionBuilder, prompt, *events, **body)
    assert choice["text"] == "AAACB"
    if logprobs:
        assert choice["logprobs"]["tokens"] == ["", "A", "A", "A", "C", "B"]


@pytest.mark.parametrize(("min_tokens", "text", "reason"), [(0, "A", "stop"), (2, "A\ufffd", "length")])
def test_a_stop_string_may_be_the_character_that_never_ended(min_tokens: int, text: str, reason: str) -> None:
    params = SamplingParams(max_tokens=2, stop=["\ufffd"], min_tokens=min_tokens)
    output = stream_of([1], params, TokenEvent(0, [65]), TokenEvent(0, [0xF0], None, "length")).get(0).outputs[0]
    assert (output.text, output.finish_reason) == (text, reason)
