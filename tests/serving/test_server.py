"""The HTTP API over a fake engine: what is accepted, refused and answered."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import flask.testing
import pytest
from fake_engine import BOS, FakeEngine

from paddock.serving.bodies import CompletionBody
from paddock.serving.outputs import CompletionOutput, RequestOutput, RequestTimes
from paddock.serving.responses import CompletionBuilder
from paddock.serving.server import create_app


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> flask.testing.FlaskClient:
    return create_app(engine).test_client()


def complete(client: Any, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"prompt": "abc", **body})
    assert response.status_code == 200, response.json
    return response.json


def chat(client: Any, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], **body})
    assert response.status_code == 200, response.json
    return response.json


def events(client: Any, path: str, **body: Any) -> list[dict[str, Any]]:
    """Payloads of a stream, checked to end with [DONE]."""
    response = client.post(path, json={"stream": True, **body})
    assert response.status_code == 200, response.json
    assert response.mimetype == "text/event-stream"
    *blocks, last = response.text.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert set(response.json) == {"error"}
    assert set(response.json["error"]) == {"message", "type", "param", "code"}
    return response.json["error"]


# --- completions ---


def test_completion_body(client):
    body = complete(client, max_tokens=5)
    assert body["object"] == "text_completion"
    assert body["model"] == "demo"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {"index": 0, "text": "abcab", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}


def test_completion_of_several_prompts_and_n_orders_choices(client):
    body = complete(client, prompt=["ab", "xy"], n=2, max_tokens=2)
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "ab"), (1, "ba"), (2, "xy"), (3, "yx")]
    assert body["usage"]["prompt_tokens"] == 6
    assert body["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(("prompt", "texts"), [([97, 98], ["ab"]), ([[97], [98, 99]], ["aa", "bc"])])
def test_completion_of_token_ids(client, engine, prompt, texts):
    body = complete(client, prompt=prompt, max_tokens=2)
    assert [choice["text"] for choice in body["choices"]] == texts
    assert BOS not in engine.streams[0].prompt_token_ids


def test_completion_stop_string_is_reported(client):
    choice = complete(client, stop="c", max_tokens=9)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", "c")


def test_sampling_fields_reach_the_engine_over_the_models_defaults(client, engine):
    engine.default_params = type(engine.default_params)(temperature=0.6, top_p=0.9)
    sent = {
        "top_p": 0.5, "top_k": 7, "min_p": 0.1, "seed": 3, "presence_penalty": 1, "frequency_penalty": 0.5,
        "repetition_penalty": 1.1, "stop": ["x"], "stop_token_ids": [5], "include_stop_str_in_output": True,
        "ignore_eos": True, "max_tokens": 9, "min_tokens": 2, "skip_special_tokens": False, "n": 2,
    }  # fmt: skip
    complete(client, **sent, logit_bias={"97": -1}, user="someone")
    params = engine.streams[0].params
    assert params.temperature == 0.6
    assert params.logit_bias == {97: -1.0}
    for name, value in sent.items():
        got = getattr(params, name)
        assert (list(got) if isinstance(value, list) else got) == value, name


def test_null_fields_count_as_not_given(client, engine):
    complete(client, temperature=None, stop=None, logprobs=None, tools=None, suffix=None)
    assert engine.streams[0].params == engine.default_params


def test_legacy_logprobs(client):
    logprobs = complete(client, max_tokens=2, logprobs=1)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b"]
    assert logprobs["token_logprobs"] == [-0.5, -0.5]
    assert logprobs["text_offset"] == [0, 1]
    # The most likely one, and the token itself though it ranks second.
    assert logprobs["top_logprobs"] == [{"\0": -0.25, "a": -0.5}, {"\0": -0.25, "b": -0.5}]


def test_echo_puts_the_prompt_first(client):
    choice = complete(client, echo=True, max_tokens=2, logprobs=0)["choices"][0]
    assert choice["text"] == "abcab"
    assert choice["logprobs"]["tokens"] == ["<s>", "a", "b", "c", "a", "b"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"a": -0.5}]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2, 3, 4]
    assert "prompt_logprobs" not in choice


def test_echo_with_no_new_token_scores_the_prompt(client):
    body = complete(client, echo=True, max_tokens=0, logprobs=1)
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["tokens"] == ["<s>", "a", "b", "c"]
    assert body["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_and_token_ids(client):
    choice = complete(client, max_tokens=1, prompt_logprobs=0, return_token_ids=True)["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1] == {"97": {"logprob": -0.5, "rank": 2, "decoded_token": "a"}}
    assert choice["token_ids"] == [97]
    assert choice["prompt_token_ids"] == [BOS, 97, 98, 99]


def test_completion_stream(client):
    chunks = events(client, "/v1/completions", prompt="abc", max_tokens=3, stream_options={"include_usage": True})
    *deltas, usage = chunks
    assert [chunk["choices"][0]["text"] for chunk in deltas] == ["a", "b", "c"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in deltas] == [None, None, "length"]
    assert all(chunk["usage"] is None for chunk in deltas)
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_streams_join_to_the_whole_answer(client, n):
    body = {"prompt": ["ab", "xyz"], "n": n, "max_tokens": 4, "echo": True, "logprobs": 1}
    whole = complete(client, **body)["choices"]
    texts = [""] * len(whole)
    tokens: list[list[str]] = [[] for _ in whole]
    offsets: list[list[int]] = [[] for _ in whole]
    for chunk in events(client, "/v1/completions", **body):
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += choice["logprobs"]["tokens"]
        offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    assert texts == [choice["text"] for choice in whole]
    assert tokens == [choice["logprobs"]["tokens"] for choice in whole]
    assert offsets == [choice["logprobs"]["text_offset"] for choice in whole]


# --- chat ---


def test_chat_body(client, engine):
    body = chat(client, max_tokens=3)
    assert body["object"] == "chat.completion"
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "use"}
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert engine.streams[0].prompt_token_ids == engine.tokenizer.encode("user:hi\nassistant:")


def test_chat_goes_to_the_end_of_the_context_by_default(client, engine):
    body = chat(client)
    assert body["usage"]["total_tokens"] == engine.max_model_len


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_chat_takes_both_names_of_the_limit(client, name):
    assert chat(client, **{name: 2})["usage"]["completion_tokens"] == 2


def test_chat_messages_may_come_back_from_a_response(client, engine):
    answer = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []}
    parts = [{"type": "text", "text": "y"}]
    messages = [{"role": "developer", "content": "be brief"}, answer, {"role": "user", "content": parts}]
    chat(client, messages=messages, max_tokens=1)
    text = engine.tokenizer.decode(engine.streams[0].prompt_token_ids)
    assert text.startswith("system:be brief\nassistant:x\nuser:")


def test_chat_logprobs(client):
    (entry,) = chat(client, max_tokens=1, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("u", -0.5, [117])
    assert [top["token"] for top in entry["top_logprobs"]] == ["\0", "u"]
    (entry,) = chat(client, max_tokens=1, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert entry["top_logprobs"] == []


def test_chat_stream_names_the_role_once_for_each_choice(client):
    chunks = events(
        client, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], n=2, max_tokens=2, logprobs=True
    )
    deltas = [(chunk["choices"][0]["index"], chunk["choices"][0]["delta"]) for chunk in chunks]
    assert [(index, delta.get("role")) for index, delta in deltas] == [
        (0, "assistant"), (1, "assistant"), (0, None), (1, None),
    ]  # fmt: skip
    assert "".join(delta["content"] for index, delta in deltas if index == 0) == "us"
    assert all(len(chunk["choices"][0]["logprobs"]["content"]) == 1 for chunk in chunks)
    assert "usage" not in chunks[0]


# --- the other routes ---


def test_models(client, engine):
    (card,) = client.get("/v1/models").json["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("demo", "model", 256)
    assert client.get("/v1/models/demo").json == card
    assert error_of(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    engine.model_name = "/data/llama"
    assert client.get("/v1/models/%2Fdata%2Fllama", follow_redirects=True).json["id"] == "/data/llama"


def test_tokenize_and_detokenize(client):
    body = client.post("/tokenize", json={"prompt": "ab", "return_token_strs": True}).json
    assert body == {"count": 3, "max_model_len": 256, "tokens": [BOS, 97, 98], "token_strs": ["<s>", "a", "b"]}
    assert client.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False}).json["tokens"] == [97, 98]
    assert client.post("/detokenize", json={"tokens": [97, 98]}).json == {"prompt": "ab"}
    messages = [{"role": "user", "content": "x"}]
    assert client.post("/tokenize", json={"messages": messages}).json["count"] == len("user:x\nassistant:") + 1
    assert error_of(client.post("/detokenize", json={"tokens": [999]}), 400)["param"] == "tokens"
    assert error_of(client.post("/tokenize", json={}), 400)["param"] == "prompt"


def test_status_routes(client, engine):
    assert client.get("/health").status_code == client.get("/ping").status_code == 200
    assert client.get("/load").json == {"server_load": 0, "running": 0, "waiting": 0}
    assert set(client.get("/version").json) == {"version"}
    engine.metrics.engines[0].on_prompt(3)
    metrics = client.get("/metrics")
    assert metrics.mimetype == "text/plain"
    assert 'vllm:prompt_tokens_total{engine="0",model_name="demo"} 3.0' in metrics.text
    engine.problem = "no step for 120 s"
    assert error_of(client.get("/health"), 503)["message"] == "no step for 120 s"


# --- what is refused ---


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e999}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": 9, "prompt": ["a"] * 114}, "n"),
        ({"request_id": 3}, "request_id"),
        ({"request_id": "x" * 300}, "request_id"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop": [str(i) for i in range(1000)]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"logit_bias": {"5": float("nan")}}, "logit_bias"),
        ({"logprobs": True}, "logprobs"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "a" * 300}, "prompt"),
        ({"prompt": ["a"] * 2000}, "prompt"),
        ({"prompt": [5, 999]}, "prompt_token_ids"),
        ({"prompt": [-1]}, "prompt_token_ids"),
        ({"prompt": None}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"no_such_field": 1}, "no_such_field"),
    ],
)
def test_bad_completion_requests_name_the_field(client, engine, body, param):
    error = error_of(client.post("/v1/completions", data=json.dumps({"prompt": "abc", **body})), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0] in error["message"]
    assert all(stream.aborted.is_set() for stream in engine.streams)
    assert complete(client, max_tokens=1)["choices"][0]["text"] == "a"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"echo": True}, "echo"),
        ({"prompt": "abc"}, "prompt"),
    ],
)
def test_bad_chat_requests_name_the_field(client, body, param):
    messages = [{"role": "user", "content": "hi"}]
    error = error_of(client.post("/v1/chat/completions", json={"messages": messages, **body}), 400)
    assert error["param"] == param


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"",
        b"[1]",
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_bad_json_is_refused(client, path, data):
    error_of(client.post(path, data=data, content_type="application/json"), 400)


CHAT = {"messages": [{"role": "user", "content": "a TEXT"}]}
TEXT_ROUTES = [("/v1/completions", {"prompt": "a TEXT"}), ("/v1/chat/completions", CHAT), ("/tokenize", CHAT)]


@pytest.mark.parametrize("change", ["raw surrogate", "escaped surrogate", "UTF-16", "UTF-32", "Latin-1"])
@pytest.mark.parametrize(("path", "body"), TEXT_ROUTES, ids=[path for path, _ in TEXT_ROUTES])
def test_text_that_is_not_utf8_is_refused(client, engine, path, body, change):
    data = json.dumps(body).encode()
    bad = {
        "raw surrogate": data.replace(b"TEXT", b"\xed\xa0\x80"),
        "escaped surrogate": data.replace(b"TEXT", b"\\ud800"),
        "UTF-16": data.decode().encode("utf-16"),
        "UTF-32": data.decode().encode("utf-32-le"),
        "Latin-1": data.replace(b"TEXT", b"\xe9"),
    }[change]
    error_of(client.post(path, data=bad, content_type="application/json"), 400)
    assert not engine.streams
    good = data.replace(b"TEXT", b"\\ud83d\\ude00 \xf0\x9f\x98\x80")
    assert client.post(path, data=good, content_type="application/json").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [*TEXT_ROUTES, ("/v1/completions", {"prompt": "a", "add_special_tokens": False}), ("/tokenize", {"prompt": "a"})],
)
def test_text_that_the_tokenizer_refuses_is_a_400(client, engine, monkeypatch, path, body):
    def encode(text: str, *, add_special_tokens: bool = True) -> list[int]:
        raise ValueError("text is not to my taste")

    monkeypatch.setattr(engine.tokenizer, "encode", encode)
    assert "not to my taste" in error_of(client.post(path, json=body), 400)["message"]


def test_request_id_ends_the_responses_id_and_reaches_the_engine(client, engine):
    assert complete(client, prompt=["a", "b"], max_tokens=1, request_id="mine")["id"] == "cmpl-mine"
    assert [stream.request_id for stream in engine.streams] == ["cmpl-mine-0", "cmpl-mine-1"]
    assert chat(client, max_tokens=1, request_id="mine")["id"] == "chatcmpl-mine"
    assert complete(client, max_tokens=1)["id"] != complete(client, max_tokens=1)["id"]


def test_neutral_values_of_unsupported_fields_are_accepted(client):
    chat(client, max_tokens=1, tools=[], response_format={"type": "text"}, tool_choice="none")
    complete(client, max_tokens=1, best_of=1, suffix="")


def test_unknown_model_route_method_and_media_type(client):
    error = error_of(client.post("/v1/completions", json={"prompt": "a", "model": "other"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    error_of(client.get("/nothing"), 404)
    response = client.get("/v1/completions")
    error_of(response, 405)
    assert "POST" in response.headers["Allow"]
    error_of(client.post("/v1/completions", data={"prompt": "a"}), 415)


def test_body_limit(engine):
    client = create_app(engine, max_body_bytes=1000).test_client()
    assert "1000" in error_of(client.post("/v1/completions", json={"prompt": "a" * 2000}), 413)["message"]


def test_api_key(engine):
    client = create_app(engine, api_key="secret").test_client()
    not_ascii = "Bearer sécret".encode().decode("latin-1")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": not_ascii}):
        error = error_of(client.post("/v1/completions", json={"prompt": "a"}, headers=headers), 401)
        assert error["code"] == "invalid_api_key"
    good = {"Authorization": "Bearer secret"}
    assert client.post("/v1/completions", json={"prompt": "a"}, headers=good).status_code == 200
    assert error_of(client.post("/tokenize", json={"prompt": "a"}), 401)
    assert client.get("/health").status_code == client.get("/metrics").status_code == 200


def test_server_without_tokenizer_takes_token_ids_only(engine):
    engine.tokenizer = engine.chat_template = None
    client = create_app(engine).test_client()
    assert error_of(client.post("/tokenize", json={"prompt": "a"}), 400)["param"] == "prompt"
    messages = [{"role": "user", "content": "hi"}]
    assert error_of(client.post("/v1/chat/completions", json={"messages": messages}), 400)["param"] == "messages"
    body = complete(client, prompt=[1, 2], max_tokens=2, return_token_ids=True)
    assert body["choices"][0]["token_ids"] == [1, 2]


# --- what the engine cannot do ---


def test_a_failed_step_is_a_500_that_says_so(client, engine):
    engine.fail_after = 0
    for stream in (False, True):
        error = error_of(client.post("/v1/completions", json={"prompt": "abc", "stream": stream}), 500)
        assert "planted" in error["message"]
        assert error["type"] == "server_error"
    engine.fail_after = None
    assert complete(client, max_tokens=1)


def test_a_step_that_fails_in_a_stream_is_an_error_event(client, engine):
    engine.fail_after = 2
    *chunks, last = events(client, "/v1/completions", prompt="abc")
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b"]
    assert "planted" in last["error"]["message"]


def test_one_failed_prompt_aborts_the_others(client, engine):
    engine.fail_after = 1
    error_of(client.post("/v1/completions", json={"prompt": ["abc", "xyz"], "max_tokens": 9}), 500)
    assert engine.streams[1].aborted.is_set()


def test_busy_and_dead_engines(client, engine):
    engine.busy = True
    response = client.post("/v1/completions", json={"prompt": "a"})
    assert error_of(response, 503)["code"] == "engine_busy"
    assert int(response.headers["Retry-After"]) >= 1
    engine.is_dead = True
    response = client.post("/v1/completions", json={"prompt": "a"})
    assert error_of(response, 503)["code"] == "engine_dead"
    assert "Retry-After" not in response.headers


def test_an_internal_error_keeps_openais_body(client, engine):
    engine.metrics = None
    assert "AttributeError" in error_of(client.get("/metrics"), 500)["message"]


@pytest.mark.parametrize("num_read", [0, 1])
def test_a_stream_that_nobody_reads_to_its_end_is_aborted(engine, num_read):
    engine.pace = True
    client = create_app(engine).test_client()
    app = client.application
    environ = flask.testing.EnvironBuilder(
        app, "/v1/completions", method="POST", json={"prompt": "abc", "stream": True}
    ).get_environ()
    original = engine.submit

    def submit(*args, **kwargs):
        stream = original(*args, **kwargs)
        stream.allow(1)
        return stream

    engine.submit = submit
    body = app(environ, lambda status, headers, exc_info=None: None)
    for _ in range(num_read):
        assert b'"text":"a"' in next(iter(body))
    assert app.extensions["paddock"].active == 1
    body.close()
    assert engine.streams[0].aborted.is_set()
    assert app.extensions["paddock"].active == 0


def test_an_output_that_has_ended_is_not_sent_again(engine):
    body = CompletionBody(prompt="a", n=2)
    builder = CompletionBuilder(engine, body.params(engine.default_params), body)

    def chunk(*outputs: CompletionOutput) -> list[tuple[int, str]]:
        output = RequestOutput("id", "a", [97], list(outputs), False, RequestTimes(0.0))
        return [(choice["index"], choice["text"]) for choice in builder.choices(0, output, streaming=True)]

    ended = CompletionOutput(0, finish_reason="stop")
    assert chunk(dataclasses.replace(ended, text="x", token_ids=[5]), CompletionOutput(1)) == [(0, "x")]
    assert chunk(ended, CompletionOutput(1, "y", [6])) == [(1, "y")]
    assert builder.usage()["completion_tokens"] == 2


def test_requests_beyond_the_limit_and_while_draining_are_refused(engine):
    app = create_app(engine, max_concurrent_requests=1)
    client = app.test_client()
    admission = app.extensions["paddock"]
    admission.enter()
    assert "1 requests" in error_of(client.post("/v1/completions", json={"prompt": "a"}), 503)["message"]
    admission.leave()
    assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    admission.drain()
    response = client.post("/v1/completions", json={"prompt": "a"})
    assert "shutting down" in error_of(response, 503)["message"]
    assert error_of(client.get("/health"), 503)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_completion_tokens": 5000}, "max_completion_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "messages"),
    ],
)
def test_what_the_engine_refuses_of_a_chat_is_named_as_its_body_does(client: Any, body: dict, param: str) -> None:
    asked = {"messages": [{"role": "user", "content": "hi"}], **body}
    assert error_of(client.post("/v1/chat/completions", json=asked), 400)["param"] == param
