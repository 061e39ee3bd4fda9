"""The server over real sockets: streams, clients that go away, large bodies, signals."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from fake_engine import DEADLINE, FakeEngine
from http_client import Client, get, wait_until

from paddock.serving import connection
from paddock.serving.connection import DISCONNECTED, ClientGone, Connection
from paddock.serving.server import create_app
from paddock.serving.wsgi import FLUSH_SECONDS, HttpServer, bind, serve

NUM_STREAMS = 64


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(pace=True)


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[HttpServer]:
    with HttpServer(create_app(engine, max_concurrent_requests=8), bind("127.0.0.1", 0)) as server:
        yield server
        for stream in engine.streams:
            stream.abort()


def test_a_token_is_sent_before_the_next_exists(engine, server):
    with Client(server.port) as client:
        client.post(stream=True)
        (stream,) = engine.wait_for_streams(1)
        for made, letter in enumerate("abcdef", start=1):
            stream.allow(1)
            client.read_until(f'"text":"{letter}"'.encode())
            assert stream.made == made
        assert client.read_all().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_64_open_streams_leave_health_and_metrics_quick(engine):
    app = create_app(engine, max_concurrent_requests=NUM_STREAMS)
    with HttpServer(app, bind("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server.port)) for _ in range(NUM_STREAMS)]
        for client in clients:
            client.post(stream=True)
        streams = engine.wait_for_streams(NUM_STREAMS)
        for stream in streams:
            stream.allow(1)
        for client in clients:
            client.read_until(b'"text":"a"')
        for path in ("/health", "/metrics"):
            start = time.monotonic()
            assert get(server.port, path)[0] == 200
            assert time.monotonic() - start < 1.0
        with Client(server.port) as one_more:
            one_more.post(stream=True)
            assert b"503" in one_more.read_until(b"engine_busy")
        for stream in streams:
            stream.allow(5)
        for client in clients:
            assert b'"finish_reason":"length"' in client.read_all()
        assert not any(stream.aborted.is_set() for stream in streams)


@pytest.mark.parametrize("state", ["waiting", "streaming", "not streaming"])
def test_a_client_that_leaves_aborts_its_request_at_once(engine, server, monkeypatch, state):
    monkeypatch.setattr(connection, "POLL_SECONDS", 10 * DEADLINE)  # so that only the server's word can end the wait
    client = Client(server.port)
    client.post(stream=state != "not streaming")
    (stream,) = engine.wait_for_streams(1)
    if state == "streaming":
        stream.allow(1)
        client.read_until(b'"text":"a"')
    assert not stream.aborted.is_set()
    client.sock.close()
    assert stream.aborted.wait(DEADLINE)
    wait_until(lambda: server.admission.active == 0)


def test_a_client_that_leaves_on_its_second_request_is_noticed(engine, server):
    client = Client(server.port)
    client.post()
    (first,) = engine.wait_for_streams(1)
    first.allow(6)
    client.read_until(b'"text":"abcdef"')
    client.post()
    _, second = engine.wait_for_streams(2)
    client.sock.close()
    assert second.aborted.wait(DEADLINE)
    assert not first.aborted.is_set()


def test_a_connection_without_callback_is_asked_while_waiting(engine):
    gone = threading.Event()
    waiting = Connection({DISCONNECTED: gone.is_set})
    stream = engine.submit("abc", engine.default_params, on_event=waiting.notify)
    waiting.streams.append(stream)
    stream.allow(1)
    outputs = waiting.outputs()
    assert next(outputs)[1].outputs[0].text == "a"
    gone.set()
    with pytest.raises(ClientGone):
        next(outputs)
    assert stream.aborted.is_set()


def test_a_large_body_is_refused_by_its_announced_length(engine, server):
    with Client(server.port) as client:
        client.sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 52428800\r\n\r\n")
        head, _, body = client.read_all().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413")
        assert json.loads(body)["error"]["message"] == "the body is larger than 8388608 bytes"
    assert not engine.streams


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_that_is_sent_anyway_is_not_read_whole(server, chunked):
    head = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 52428800"
    block = b"x" * 2**20
    if chunked:
        block = b"100000\r\n" + block + b"\r\n"
    sent = 0
    with Client(server.port) as client:
        client.sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(50):
                client.sock.sendall(block)
                sent += 1
        with contextlib.suppress(ConnectionError):
            client.read_all()
    assert sent < 50
    assert client.received.startswith(b"HTTP/1.1 413")
    assert get(server.port, "/health")[0] == 200


def test_what_is_not_http_gets_openais_error_body(server):
    with Client(server.port) as client:
        client.sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n")
        head, _, body = client.read_all().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert "Content-Length" in json.loads(body)["error"]["message"]


def test_closing_lets_running_responses_end(engine):
    server = HttpServer(create_app(engine, max_concurrent_requests=8), bind("127.0.0.1", 0))
    closer = threading.Thread(target=server.close, args=(DEADLINE,))
    with Client(server.port) as client:
        client.post(stream=True)
        (stream,) = engine.wait_for_streams(1)
        stream.allow(1)
        client.read_until(b'"text":"a"')
        closer.start()
        wait_until(lambda: is_refused(server.port))
        stream.allow(5)
        assert client.read_all().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    closer.join(DEADLINE)
    assert not closer.is_alive()


def is_refused(port: int) -> bool:
    with Client(port) as late:
        late.post()
        return b"shutting down" in late.read_until(b"engine_busy")


def test_a_port_in_use_is_a_value_error(server):
    with pytest.raises(ValueError, match=f"127.0.0.1:{server.port}"):
        bind("127.0.0.1", server.port)


def test_the_openai_client(engine, server):
    engine.pace = False
    messages: Any = [{"role": "user", "content": "hi"}]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["demo"]
        completion = client.completions.create(model="demo", prompt="abc", max_tokens=4, logprobs=1)
        assert completion.choices[0].text == "abca"
        assert completion.choices[0].logprobs.token_logprobs == [-0.5] * 4
        answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=3, logprobs=True)
        assert answer.choices[0].message.content == "use"
        assert [entry.token for entry in answer.choices[0].logprobs.content] == ["u", "s", "e"]
        with client.chat.completions.create(
            model="demo", messages=messages, max_tokens=3, stream=True, stream_options={"include_usage": True}
        ) as stream:
            chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices) == "use"
        assert chunks[-1].usage.completion_tokens == 3
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="demo", prompt="abc", temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as unknown:
            client.completions.create(model="other", prompt="abc")
        assert unknown.value.code == "model_not_found"
        engine.fail_after = 1
        with (
            pytest.raises(openai.APIError, match="planted"),
            client.completions.create(model="demo", prompt="abc", stream=True) as stream,
        ):
            list(stream)


def run_server(engine: FakeEngine, visit: Callable[[int], None]) -> int:
    """`serve` in this (main) thread while `visit` looks at it from another; both must end."""
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    failures: list[BaseException] = []

    def look() -> None:
        try:
            wait_until(lambda: is_listening(port))
            visit(port)
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=look)
    thread.start()
    code = serve(create_app(engine, max_concurrent_requests=8), engine, sock, grace_seconds=7.0, name="demo")
    thread.join(DEADLINE)
    assert not failures, failures
    return code


def is_listening(port: int) -> bool:
    try:
        return get(port, "/version")[0] == 200
    except ConnectionRefusedError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_server(engine, capsys, number):
    drained = threading.Event()
    end_streams = engine.shutdown

    def shutdown(grace_seconds: float) -> bool:
        assert drained.wait(DEADLINE)
        return end_streams(grace_seconds)

    engine.shutdown = shutdown

    def visit(port: int) -> None:
        with Client(port) as client:
            client.post(stream=True)
            (stream,) = engine.wait_for_streams(1)
            stream.allow(1)
            client.read_until(b'"text":"a"')
            os.kill(os.getpid(), number)
            wait_until(lambda: get(port, "/health")[0] == 503)
            with Client(port) as late:
                late.post()
                assert b"shutting down" in late.read_until(b"engine_busy")
            drained.set()
            received = client.read_all()
            assert b'"finish_reason":"abort"' in received
            assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    handler = signal.getsignal(number)
    assert run_server(engine, visit) == 0
    assert engine.shutdown_graces == [7.0]
    assert signal.getsignal(number) is handler
    assert "Paddock serves demo on http://127.0.0.1:" in capsys.readouterr().out


def test_an_aborted_answer_that_is_not_streamed_is_a_503(engine):
    def visit(port: int) -> None:
        with Client(port) as client:
            client.post()
            engine.wait_for_streams(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert client.read_until(b"aborted").startswith(b"HTTP/1.1 503")

    assert run_server(engine, visit) == 0


def test_a_second_signal_ends_the_grace_time(engine):
    first_called, hurried = threading.Event(), threading.Event()
    end_streams = engine.shutdown

    def shutdown(grace_seconds: float) -> bool:
        if grace_seconds > 0:
            first_called.set()
            assert hurried.wait(DEADLINE)
        ended = end_streams(grace_seconds)
        hurried.set()
        return ended

    engine.shutdown = shutdown

    def visit(port: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert first_called.wait(DEADLINE)
        os.kill(os.getpid(), signal.SIGINT)

    assert run_server(engine, visit) == 0
    wait_until(lambda: sorted(engine.shutdown_graces) == [0.0, 7.0])


def test_a_hung_engine_is_waited_for_once_and_is_an_error(engine):
    engine.hangs = True

    def visit(port: int) -> None:
        with Client(port) as client:
            client.post(stream=True)
            (stream,) = engine.wait_for_streams(1)
            stream.allow(1)
            client.read_until(b'"text":"a"')
            os.kill(os.getpid(), signal.SIGTERM)
            start = time.monotonic()
            assert b"[DONE]" not in client.read_all()
            assert time.monotonic() - start < FLUSH_SECONDS

    assert run_server(engine, visit) == 1
    assert engine.shutdown_graces == [7.0]


def test_a_shutdown_that_raises_is_an_error(engine, monkeypatch):
    raised = queue.SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", lambda args: raised.put(args.exc_value))

    def shutdown(grace_seconds: float) -> bool:
        raise RuntimeError("planted")

    engine.shutdown = shutdown
    assert run_server(engine, lambda port: os.kill(os.getpid(), signal.SIGTERM)) == 1
    assert str(raised.get(timeout=DEADLINE)) == "planted"


def test_a_dead_engine_ends_the_process_with_an_error(engine):
    def visit(port: int) -> None:
        engine.problem = "the device is lost"
        assert get(port, "/health")[0] == 503
        engine.is_dead = True

    assert run_server(engine, visit) == 1
    assert engine.shutdown_graces == [0.0]
