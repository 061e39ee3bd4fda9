"""The server over a real engine: the bundled model behind HTTP, and the program as users start it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_client import Client, get, wait_until
from prometheus_client.parser import text_string_to_metric_families

from paddock.serving import LLM, SamplingParams
from paddock.serving.front import Front
from paddock.serving.request import RequestStream
from paddock.serving.server import create_app
from paddock.serving.wsgi import HttpServer, bind

CACHE = Path(__file__).parents[2] / "build" / "test-compile-cache"
ROMEO = "ROMEO:\nBut, soft! what light"
GREEDY = {"temperature": 0, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "Who art thou?"}]
SEATS = 2
# A program's start, its compiles when the cache is cold included.
START_SECONDS = 300


@pytest.fixture(scope="module")
def engine() -> Iterator[Front]:
    options = dict(max_num_seqs=SEATS, max_num_batched_tokens=32, max_model_len=256, compile_cache_dir=str(CACHE))
    with LLM(**options) as llm:
        yield llm.engine


@pytest.fixture(scope="module")
def port(engine: Front) -> Iterator[int]:
    with HttpServer(create_app(engine, max_concurrent_requests=8), bind("127.0.0.1", 0)) as server:
        yield server.port


def post(port: int, path: str, **body: Any) -> Any:
    """The answer; of a stream, the list of its events, checked to end with [DONE]."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        text = response.read().decode()
    if not body.get("stream"):
        return json.loads(text)
    *blocks, last = text.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def complete(port: int, **body: Any) -> dict[str, Any]:
    (choice,) = post(port, "/v1/completions", **{"prompt": ROMEO, **GREEDY, **body})["choices"]
    return choice


def generate(engine: Front, max_tokens: int) -> str:
    """What Python gets for ROMEO."""
    params = SamplingParams(max_tokens=max_tokens, **GREEDY)
    (output,) = engine.submit(ROMEO, params, output_kind="final")
    return output.outputs[0].text


def test_a_completion_is_what_python_gets(engine, port):
    want = generate(engine, 24)
    assert len(want) > 24
    choice = complete(port, max_tokens=24)
    assert (choice["text"], choice["finish_reason"]) == (want, "length")


def test_several_prompts_with_seeds_do_not_depend_on_company(port):
    alone = complete(port, prompt="JULIET:\n", temperature=0.9, seed=5, max_tokens=12)["text"]
    body = {"prompt": ["KING:\n", "JULIET:\n"], "n": 2, "temperature": 0.9, "seed": 5, "max_tokens": 12}
    choices = post(port, "/v1/completions", **body, ignore_eos=True)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[2]["text"] == alone != choices[3]["text"]


def test_a_chat_stream_joins_to_the_whole_answer(port):
    body = {"messages": MESSAGES, "max_tokens": 24, **GREEDY}
    whole = post(port, "/v1/chat/completions", **body)
    *chunks, usage = post(port, "/v1/chat/completions", **body, stream=True, stream_options={"include_usage": True})
    assert len(chunks) > 1
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"] != ""
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["usage"] == whole["usage"]
    assert usage["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(engine, port, stream):
    text = generate(engine, 24)
    stop = text[11:16]  # wherever the tokens' borders are
    body = {"prompt": ROMEO, "max_tokens": 200, "stop": stop, "stream": stream, **GREEDY}
    answer = post(port, "/v1/completions", **body)
    choices = [event["choices"][0] for event in (answer if stream else [answer])]
    assert "".join(choice["text"] for choice in choices) == text[: text.index(stop)]
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", stop)
    wait_until(lambda: engine.load() == {"running": 0, "waiting": 0})


def test_logprobs_are_those_of_the_tokens(port):
    choice = complete(port, max_tokens=12, logprobs=3)
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert len(logprobs["tokens"]) == 12
    for token, logprob, top in zip(*(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert 1 <= len(top) <= 3
        assert logprob == top[token] == max(top.values()) <= 0


def test_echo_scores_a_prompt_as_it_was_generated(port):
    generated = complete(port, max_tokens=12, logprobs=0, return_token_ids=True)
    ids = generated["prompt_token_ids"] + generated["token_ids"]
    echoed = complete(port, prompt=ids, echo=True, logprobs=1, max_tokens=0)
    assert echoed["text"] == ROMEO + generated["text"]
    scores = echoed["logprobs"]["token_logprobs"]
    assert (len(scores), scores[0]) == (len(ids), None)
    assert scores[-12:] == pytest.approx(generated["logprobs"]["token_logprobs"], abs=1e-3)
    with_more = complete(port, echo=True, logprobs=0, max_tokens=12)
    assert with_more["text"] == echoed["text"]
    assert with_more["logprobs"]["token_logprobs"][1:] == pytest.approx(scores[1:], abs=1e-3)


@pytest.mark.parametrize("text", ["To be, or not to be", "  naïve \n\n 漢字 🎭", "</s>[INST]"])
def test_tokenize_and_detokenize_are_inverse(engine, port, text):
    answer = post(port, "/tokenize", prompt=text, add_special_tokens=False)
    assert answer["count"] == len(answer["tokens"])
    assert post(port, "/detokenize", tokens=answer["tokens"])["prompt"] == text
    with_bos = post(port, "/tokenize", prompt=text)["tokens"]
    assert with_bos == [engine.tokenizer.bos_token_id, *answer["tokens"]]


def read_metrics(port: int) -> dict[str, float]:
    """Each sample by its name, one finish reason's after a slash."""
    families = text_string_to_metric_families(get(port, "/metrics")[1].decode())
    samples = [sample for family in families for sample in family.samples if "le" not in sample.labels]
    return {"/".join([s.name, *filter(None, [s.labels.get("finished_reason")])]): s.value for s in samples}


def test_metrics_count_what_was_done(engine, port):
    before = read_metrics(port)
    usage = post(port, "/v1/completions", prompt=ROMEO, max_tokens=10, **GREEDY)["usage"]
    wait_until(lambda: engine.replicas[0].engine.is_idle and not engine.load()["running"])
    success = "vllm:request_success_total/length"
    wait_until(lambda: read_metrics(port).get(success, 0) == before.get(success, 0) + 1)
    after = read_metrics(port)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["vllm:prompt_tokens_total"] == usage["prompt_tokens"] > 0
    assert grown["vllm:generation_tokens_total"] == 10
    assert grown["vllm:time_to_first_token_seconds_count"] == 1
    assert grown["vllm:inter_token_latency_seconds_count"] == 9
    assert 0 < grown["vllm:time_to_first_token_seconds_sum"] < grown["vllm:e2e_request_latency_seconds_sum"] < 60
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == 0
    assert grown["paddock:step_compilations_total"] == 0 < after["paddock:step_compilations_total"]


class Turnstile:
    """Lets the engine's steps through one permit at a time, and notes at which step each request was aborted."""

    def __init__(self, engine: Front, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_steps = 0
        self.streams: list[RequestStream] = []
        self.aborted = threading.Event()
        self._permits = threading.Semaphore(0)
        step, submit = engine.replicas[0].engine.step, engine.submit

        def paced_step() -> Any:
            self._permits.acquire()
            self.num_steps += 1
            return step()

        def watched_submit(*args: Any, **kwargs: Any) -> RequestStream:
            stream = submit(*args, **kwargs)
            self.streams.append(stream)
            abort = stream.abort

            def watched_abort() -> None:
                abort()
                self.aborted.set()

            monkeypatch.setattr(stream, "abort", watched_abort)
            return stream

        monkeypatch.setattr(engine.replicas[0].engine, "step", paced_step)
        monkeypatch.setattr(engine, "submit", watched_submit)

    def let(self, count: int) -> None:
        self._permits.release(count)


@pytest.fixture
def turnstile(engine: Front, port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Turnstile]:
    wait_until(lambda: engine.replicas[0].engine.is_idle)
    turnstile = Turnstile(engine, monkeypatch)
    yield turnstile
    for stream in turnstile.streams:
        stream.abort()
    turnstile.let(10_000)
    wait_until(lambda: engine.replicas[0].engine.is_idle)


@pytest.mark.parametrize("state", ["waiting", "streaming", "not streaming"])
def test_a_client_that_leaves_frees_its_pages_within_two_steps(engine, port, turnstile, state):
    pool = engine.replicas[0].engine.scheduler.partitions[0].pool
    others = SEATS if state == "waiting" else 0  # as many as may run at once
    for _ in range(others):
        engine.submit(ROMEO, SamplingParams(max_tokens=200, **GREEDY))
    client = Client(port)
    client.post(prompt=ROMEO, max_tokens=200, stream=state != "not streaming", **GREEDY)
    wait_until(lambda: len(turnstile.streams) == others + 1)
    turnstile.let(8)
    wait_until(lambda: turnstile.num_steps == 8)
    if state == "streaming":
        client.read_until(b'"text":')
    wait_until(lambda: engine.load() == {"running": others or 1, "waiting": int(others > 0)})
    assert pool.num_free < pool.num_usable
    client.sock.close()
    assert turnstile.aborted.wait(20)
    turnstile.let(2)
    wait_until(lambda: engine.load() == {"running": others, "waiting": 0})
    assert turnstile.num_steps <= 10
    if not others:  # `load` looks while the engine's thread is about it
        wait_until(lambda: pool.num_free == pool.num_usable)
    for stream in turnstile.streams[:others]:
        stream.abort()
    turnstile.let(2)
    wait_until(lambda: engine.replicas[0].engine.is_idle and pool.num_free == pool.num_usable)


# --- the program ---


def start(*words: str, cache: Path = CACHE) -> subprocess.Popen[str]:
    """`paddock WORDS` with one CPU device, as outside of pytest."""
    environ = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    environ["XLA_FLAGS"] = " ".join(x for x in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in x)
    code = "import sys; from paddock.serving.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words, "--compile-cache-dir", str(cache)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environ, "JAX_PLATFORMS": "cpu"},
    )


@contextlib.contextmanager
def killed_at_the_end(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    with process:
        timer = threading.Timer(START_SECONDS, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


def test_paddock_serve_ends_at_once_when_it_is_still_compiling(tmp_path: Path):
    words = ["serve", "--port", "0", "--max-model-len", "256", "--lowering-processes", "1"]
    with killed_at_the_end(start(*words, cache=tmp_path / "cold")) as process:
        assert "compiles its steps" in process.stdout.readline()
        wait_until(lambda: any((tmp_path / "cold").rglob("*")))
        process.terminate()
        began = time.monotonic()
        assert process.wait(60) == 0
        assert time.monotonic() - began < 20, "and not until all is compiled"


def test_paddock_serve_ends_its_streams_after_sigterm():
    words = ["--port", "0", "--max-num-seqs", "1", "--max-num-batched-tokens", "8", "--max-model-len", "256"]
    with killed_at_the_end(start("--log-level", "warning", "serve", *words, "--shutdown-grace", "60")) as process:
        lines = iter(process.stdout.readline, "")
        ready = next((line for line in lines if line.startswith("Paddock serves")), None)
        assert ready is not None, process.stderr.read()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", ready)[1])
        assert len(complete(port, max_tokens=8)["text"]) > 8
        with Client(port) as client:
            client.post(prompt=ROMEO, max_tokens=200, stream=True, stream_options={"include_usage": True}, **GREEDY)
            client.read_until(b'"text":')
            process.send_signal(signal.SIGTERM)
            received = client.read_all()
        assert b'"finish_reason":"length"' in received
        assert b'"completion_tokens":200' in received
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "Paddock stops" in errors


def test_paddock_generate_makes_the_devices_that_the_mesh_asks_for():
    words = ["generate", "ROMEO:", "--temperature", "0", "--max-tokens", "8"]
    words += ["--max-num-seqs", "1", "--max-num-batched-tokens", "8", "--max-model-len", "64"]
    texts = []
    for size in ("1", "2"):
        with killed_at_the_end(start(*words, "-tp", size)) as process:
            text, errors = process.communicate()
            assert process.returncode == 0, errors
        texts.append(text)
    assert texts[0] == texts[1]
    assert len(texts[0].strip()) > 8
