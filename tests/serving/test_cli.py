"""The `paddock` program: flags, commands over a fake engine, benchmarks and their JSON."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import io
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import DEADLINE, FakeEngine

from paddock.checkpoints import detect_format
from paddock.serving import cli_engine, wsgi
from paddock.serving.bench_workload import Job, parse_lengths, poisson_arrivals, read_trace
from paddock.serving.cli import build_parser, main
from paddock.serving.cli_flags import engine_config
from paddock.serving.engine_config import EngineConfig
from paddock.serving.server import create_app
from paddock.serving.wsgi import HttpServer, bind

LATENCIES = [f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "e2el")]
THROUGHPUTS = ["request_throughput", "output_throughput", "total_token_throughput"]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """What every command gets instead of a real engine; `engine.configs` is what they asked for."""
    engine = FakeEngine()
    engine.configs = []

    def start(config: EngineConfig) -> FakeEngine:
        engine.configs.append(config)
        return engine

    monkeypatch.setattr(cli_engine, "start_engine", start)
    return engine


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with HttpServer(create_app(engine, max_concurrent_requests=8), bind("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.port}"


def last_json(capsys: Any) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# --- flags ---

VALUES = {"int": "3", "float": "0.5", "str": "some", "Mapping": '{"num_hidden_layers": 2}'}


@pytest.mark.parametrize("field", dataclasses.fields(EngineConfig), ids=lambda field: field.name)
def test_every_engine_option_has_a_flag(field):
    flag = "--" + field.name.replace("_", "-")
    kind = field.type.removesuffix(" | None")
    value = field.metadata.get("choices", (VALUES.get(kind),))[-1]
    words = [flag] if kind == "bool" else [flag, value]
    wanted = {"bool": lambda _: True, "int": int, "float": float, "str": str, "Mapping": json.loads}[kind](value)
    args = build_parser().parse_args(["serve", *words])
    assert engine_config(args) == dataclasses.replace(EngineConfig(), **{field.name: wanted})


def test_short_and_negative_flags():
    args = build_parser().parse_args(["generate", "x", "-tp", "2", "--no-skip-tokenizer-init"])
    assert engine_config(args) == EngineConfig(tensor_parallel_size=2)


@pytest.mark.parametrize(("text", "message"), [("[1]", "'[1]' is no JSON object"), ("{", "'{' is not JSON")])
def test_overrides_that_are_no_object_are_refused(capsys: Any, text: str, message: str) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--hf-overrides", text])
    assert message in capsys.readouterr().err


def all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from all_parsers(child)


def test_numbers_that_may_be_left_open_take_auto(capsys):
    parser = build_parser()
    assert engine_config(parser.parse_args(["serve", "--max-model-len", "auto"])).max_model_len is None
    assert engine_config(parser.parse_args(["serve", "--max-model-len", "77"])).max_model_len == 77
    with pytest.raises(SystemExit):
        parser.parse_args(["serve", "--max-model-len", "many"])
    assert "'many' is neither a number nor 'auto'" in capsys.readouterr().err


def test_help_of_every_command_shows_help_texts_and_defaults():
    parsers = {parser.prog: parser.format_help() for parser in all_parsers(build_parser())}
    assert set(parsers) == {
        f"paddock{name}"
        for name in (
            *("", " serve", " generate", " chat", " sweep", " plan", " convert", " collect-env"),
            *(" bench", " bench throughput", " bench latency", " bench serve", " bench startup"),
        )
    }
    text = " ".join(parsers["paddock serve"].split())
    assert "tokens per KV cache page (default: 64)" in text
    assert "10% of RAM" in text
    assert "None" not in text


def test_help_starts_no_jax():
    code = (
        "import sys\nfrom paddock.serving.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(sorted({'jax', 'flask', 'numpy', 'pydantic'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "collect-env" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "one", "--model", "two"], "named twice"),
        (["serve", "--block-size", "0"], "block_size must be at least 1"),
        (["serve", "--shutdown-grace", "-1"], "--shutdown-grace"),
        (["serve", "--max-concurrent-requests", "0"], "--max-concurrent-requests"),
        (["serve", "--host", "no such host"], "cannot listen on no such host:8000"),
        (["generate", "x", "--temperature", "-1"], "temperature must be"),
        (["bench", "throughput", "--input-len", "9:3"], "--input-len"),
        (["bench", "throughput", "--num-prompts", "0"], "num_prompts"),
        (["bench", "throughput", "--workload", "W4"], "tokens"),
        (["bench", "latency", "--num-iters", "0"], "--num-iters"),
        (["bench", "serve", "--base-url", "ftp://x"], "--base-url"),
        (["bench", "serve", "--base-url", "http://127.0.0.1:1"], "does not answer"),
        (["convert", "/no/such/folder", "out"], "/no/such/folder"),
    ],
)
def test_user_errors_are_one_sentence_and_exit_code_2(engine, capsys, words, message):
    assert main(words) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("paddock: ")]
    assert message in line
    assert "Traceback" not in captured.err


def test_a_failed_step_is_exit_code_1(engine, capsys):
    engine.fail_after = 1
    assert main(["generate", "abc"]) == 1
    assert "planted" in capsys.readouterr().err


def test_errors_can_be_traced(engine, monkeypatch):
    monkeypatch.setenv("PADDOCK_TRACEBACK", "1")
    with pytest.raises(ValueError, match="block_size"):
        main(["generate", "x", "--block-size", "0"])


# --- generate, chat, serve ---


def test_generate_prints_what_the_engine_makes(engine, capsys):
    assert main(["generate", "abc", "--max-tokens", "5", "--temperature", "0", "--top-k", "3", "--ignore-eos"]) == 0
    assert capsys.readouterr().out == "abcab\n"
    params = engine.streams[0].params
    assert (params.temperature, params.top_k, params.ignore_eos, params.max_tokens) == (0.0, 3, True, 5)
    assert engine.shutdown_graces == [0.0]


def test_generate_uses_the_models_defaults_and_stays_in_the_context(engine, capsys):
    engine.default_params = dataclasses.replace(engine.default_params, temperature=0.3)
    engine.max_model_len = 20
    assert main(["generate", "abc"]) == 0
    assert engine.streams[0].params.temperature == 0.3
    assert engine.streams[0].params.max_tokens == 16


def test_generate_reads_standard_input(engine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("xyz"))
    assert main(["generate", "-", "--max-tokens", "3"]) == 0
    assert capsys.readouterr().out == "xyz\n"


def test_chat_keeps_history_until_reset(engine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nmore\n/reset\nnew\n/exit\nnever\n"))
    assert main(["chat", "--max-tokens", "2", "--system", "be brief"]) == 0
    prompts = [engine.tokenizer.decode(stream.prompt_token_ids) for stream in engine.streams]
    assert prompts == [
        "system:be brief\nuser:hi\nassistant:",
        "system:be brief\nuser:hi\nassistant:sy\nuser:more\nassistant:",
        "system:be brief\nuser:new\nassistant:",
    ]
    assert capsys.readouterr().out == "sy\nsy\nsy\n"


def test_chat_goes_on_after_a_message_that_does_not_fit(engine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 300 + "\nhi\n"))
    assert main(["chat", "--max-tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "us\n"
    assert "/reset" in captured.err


def test_chat_needs_a_template(engine, capsys):
    engine.chat_template = None
    assert main(["chat"]) == 2
    assert "chat template" in capsys.readouterr().err


def test_serve_serves_until_a_signal(engine, capsys, monkeypatch):
    ports: queue.SimpleQueue[int] = queue.SimpleQueue()
    statuses: list[int] = []

    def recording_bind(host: str, port: int) -> socket.socket:
        sock = bind(host, port)
        ports.put(sock.getsockname()[1])
        return sock

    def visit() -> None:
        port = ports.get(timeout=DEADLINE)
        try:
            statuses.append(wait_for_status(port, {"Authorization": "Bearer secret"}))
            statuses.append(wait_for_status(port, {}))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(wsgi, "bind", recording_bind)
    monkeypatch.setenv("PADDOCK_API_KEY", "secret")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=visit)
    try:
        thread.start()
        words = ["serve", "folder", "--port", "0", "--max-concurrent-requests", "4", "--shutdown-grace", "3"]
        assert main(words) == 0
    finally:
        thread.join(DEADLINE)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert statuses == [200, 401]
    assert engine.configs == [EngineConfig(model="folder")]
    assert engine.shutdown_graces == [3.0]
    assert "Paddock serves demo on http://127.0.0.1:" in capsys.readouterr().out


def test_serve_ends_with_a_device_that_hangs():
    code = """if True:
        import atexit, os, signal, threading
        from fake_engine import FakeEngine
        from paddock.serving import cli_engine, wsgi
        from paddock.serving.cli import main
        engine = FakeEngine()
        engine.hangs = True
        cli_engine.start_engine = lambda config: engine
        atexit.register(threading.Event().wait)  # as JAX waits for its device
        url_host = wsgi._url_host
        wsgi._url_host = lambda host: os.kill(os.getpid(), signal.SIGTERM) or url_host(host)
        main(["serve", "--port", "0"])
    """
    done = run_python(code)
    assert done.returncode == 1, done.stderr
    assert "a step hangs" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_start_wherever_it_is(number: signal.Signals, code: int):
    """In a destructor, where an exception would be lost."""
    done = run_python(f"""if True:
        import os, time
        from paddock.serving import cli_engine
        from paddock.serving.cli import main
        class Temporary:
            def __del__(self):
                os.kill(os.getpid(), {number:d})
        def start_engine(config):
            Temporary()
            time.sleep(60)
        cli_engine.start_engine = start_engine
        main(["serve", "--port", "0"])
    """)
    assert done.returncode == code, done.stderr


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(Path(__file__).parent)])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environ)


def wait_for_status(port: int, headers: dict[str, str]) -> int:
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
            with contextlib.closing(connection):
                connection.request("GET", "/v1/models", headers=headers)
                return connection.getresponse().status
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


# --- bench ---


def test_bench_throughput(engine, capsys):
    words = ["--num-prompts", "6", "--input-len", "3:9", "--output-len", "4", "--concurrency", "2", "--seed", "1"]
    assert main(["bench", "throughput", *words]) == 0
    result = last_json(capsys)
    assert set(result) >= {*LATENCIES, *THROUGHPUTS, "device"}
    measured = engine.streams[1:]  # the first is the warm-up
    assert result["completed"] == len(measured) == 6
    assert result["total_output_tokens"] == 24
    assert result["total_input_tokens"] == sum(len(stream.prompt_token_ids) for stream in measured)
    assert all(3 <= len(stream.prompt_token_ids) <= 9 for stream in measured)
    assert all(stream.params.ignore_eos and stream.params.max_tokens == 4 for stream in measured)
    assert result["output_throughput"] == pytest.approx(24 / result["duration"], rel=1e-4)


def test_bench_throughput_presets_run_every_batch(engine, capsys):
    engine.max_model_len = 10_000
    assert main(["bench", "throughput", "--workload", "W2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(line["num_prompts"], line["total_input_tokens"], line["total_output_tokens"]) for line in lines] == [
        (32, 32 * 128, 32 * 128), (256, 256 * 128, 256 * 128),
    ]  # fmt: skip


def test_a_preset_takes_another_number_of_requests(engine, capsys):
    engine.max_model_len = 10_000
    assert main(["bench", "throughput", "--workload", "W3", "--num-prompts", "3"]) == 0
    result = last_json(capsys)
    assert (result["workload"], result["num_prompts"], result["completed"]) == ("W3", 3, 3)


def test_bench_latency(engine, capsys):
    words = ["--batch-size", "3", "--input-len", "4", "--output-len", "5", "--num-iters", "2"]
    assert main(["bench", "latency", *words]) == 0
    result = last_json(capsys)
    assert set(result) >= {*LATENCIES, "mean_itl_ms", "p99_itl_ms", "mean_batch_ms", "p99_batch_ms"}
    assert result["completed"] == 6
    assert len(engine.streams) == 9


@pytest.mark.parametrize(
    ("length", "held", "message"), [(15, "a", "outputs of 16 tokens"), (16, "a.xplane.pb", "holds a profile")]
)
def test_bench_latency_refuses_a_profile_before_the_engine_starts(engine, capsys, tmp_path, length, held, message):
    (tmp_path / held).touch()
    assert main(["bench", "latency", "--profile", str(tmp_path), "--output-len", str(length)]) == 2
    assert message in capsys.readouterr().err
    assert not engine.configs


def test_bench_startup(engine, capsys):
    assert main(["bench", "startup"]) == 0
    result = last_json(capsys)
    assert (result["load_s"], result["compile_s"]) == (0.5, 1.5)
    assert set(result) >= {"process_s", "import_s", "ready_s", "lower_s", "xla_thread_s", "first_token_s"}
    assert [result[f"programs_{how}"] for how in ("found", "lowered", "compiled")] == [3, 2, 1]
    assert result["device_gib"] == 1.5
    assert 0.01 < result["host_gib"] < 1000


def test_bench_serve(engine, url, capsys):
    words = ["--num-prompts", "5", "--input-len", "7", "--output-len", "6", "--request-rate", "1000"]
    assert main(["bench", "serve", "--base-url", url, *words]) == 0
    result = last_json(capsys)
    assert set(result) >= {*LATENCIES, *THROUGHPUTS, "mean_itl_ms", "std_itl_ms"}
    assert (result["completed"], result["failed"], result["left_out"]) == (5, 0, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (35, 30)
    assert result["mean_e2el_ms"] >= result["mean_ttft_ms"] > 0


def test_bench_serve_replays_a_trace(engine, url, capsys, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,3,2\n2023-11-16 18:15:47.6805900,5,4\n2023-11-16 18:15:47.6805900,500,4\n"
    )
    assert main(["bench", "serve", "--base-url", url, "--trace", str(trace), "--speed", "100"]) == 0
    result = last_json(capsys)
    assert (result["completed"], result["left_out"], result["total_input_tokens"]) == (2, 1, 8)
    assert [stream.params.max_tokens for stream in engine.streams] == [2, 4]


def test_bench_serve_counts_failures(engine, url, capsys):
    engine.fail_after = 1
    assert main(["bench", "serve", "--base-url", url, "--num-prompts", "2"]) == 2
    assert "2 requests failed; the first: the step" in capsys.readouterr().err


def test_lengths_and_arrivals():
    assert parse_lengths("5", "x") == (5, 5)
    assert parse_lengths("2:9", "x") == (2, 9)
    jobs = [Job(1, 1)] * 2000
    assert {job.arrival for job in poisson_arrivals(jobs, float("inf"), 0)} == {0.0}
    arrivals = [job.arrival for job in poisson_arrivals(jobs, 10.0, 0)]
    assert arrivals == sorted(arrivals)
    assert arrivals == [job.arrival for job in poisson_arrivals(jobs, 10.0, 0)]
    assert arrivals[-1] == pytest.approx(200, rel=0.1)
    with pytest.raises(ValueError, match="request-rate"):
        poisson_arrivals(jobs, 0.0, 0)


def test_trace_times_and_errors(tmp_path):
    trace = tmp_path / "trace.csv"
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.0000000,3,2\n"
    trace.write_text(head + "2023-11-16 18:15:50.5000000,4,1\n")
    assert read_trace(trace, 2.0) == [Job(3, 2, 0.0), Job(4, 1, 2.25)]
    assert read_trace(trace, 1.0, limit=1) == [Job(3, 2)]
    trace.write_text(head + "2023-11-16 18:15:50.5,many,1\n")
    with pytest.raises(ValueError, match=r"trace\.csv, line 3"):
        read_trace(trace, 1.0)
    with pytest.raises(ValueError, match="cannot read"):
        read_trace(tmp_path / "none.csv", 1.0)


# --- the rest ---


def test_collect_env(capsys, monkeypatch):
    monkeypatch.setenv("JAX_TRACEBACK_FILTERING", "off")
    monkeypatch.setenv("HF_TOKEN", "do not print me")
    assert main(["collect-env"]) == 0
    text = capsys.readouterr().out
    for name in ("python", "jax", "device", "memory", "JAX_TRACEBACK_FILTERING"):
        assert any(line.startswith(name + " ") for line in text.splitlines()), name
    assert "do not print me" not in text


def test_convert_writes_orbax(capsys, tmp_path, golden: Path):
    source = min(folder for folder in golden.iterdir() if (folder / "config.json").is_file())
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert detect_format(tmp_path / "out") == "orbax"
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
