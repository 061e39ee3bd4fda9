"""Real processes: one engine over two of them gives one process's tokens, and none outlives the other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines import TokenComparison, tiny_llm
from leader_program import mixed_batch
from test_broadcast import free_port

PROGRAM = Path(__file__).parent / "leader_program.py"
PADDOCK = [sys.executable, "-c", "import sys; from paddock.serving.cli import main; sys.exit(main())"]
START_SECONDS = 240
END_SECONDS = 30
# Few programs to compile, and so few pages that sequences preempt each other.
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 48,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 8,
    "block_size": 4,
    "kv_cache_memory_bytes": 2**20,
    "compile_cache_dir": str(Path(__file__).parents[2] / "build" / "test-compile-cache"),
}


class Program:
    """A process with its output in a file; it is killed at the end whatever happens."""

    def __init__(self, command: list[str], log: Path):
        self.log = log
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)

    def wait(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None

    def wait_for(self, text: str) -> None:
        """Until the program prints `text`."""
        deadline = time.monotonic() + START_SECONDS
        pause = threading.Event()
        while text not in self.text:
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            pause.wait(0.1)

    @property
    def text(self) -> str:
        return self.log.read_text()


@contextlib.contextmanager
def programs(folder: Path, leader: list[str], options: dict[str, Any]) -> Iterator[tuple[Program, Program]]:
    """Process 0 runs `leader` with its options as the last argument or flags; process 1 follows."""
    started: list[Program] = []
    try:
        for index in (1, 0):
            mine = {**options, "process_id": index}
            if index == 0 and leader[-1] == str(PROGRAM):
                command = [*leader, json.dumps(mine)]
            else:
                command = [*(leader if index == 0 else [*PADDOCK, "serve"]), *flags(mine)]
            started.append(Program(command, folder / f"process{index}.log"))
        yield started[1], started[0]
    finally:
        for program in started:
            program.process.kill()
            program.process.wait()


def flags(options: dict[str, Any]) -> list[str]:
    texts = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        texts += [flag] if value is True else [flag, str(value)]
    return texts


def together(**options: Any) -> dict[str, Any]:
    where = {"coordinator_address": f"127.0.0.1:{free_port()}", "broadcast_port": free_port(), "num_processes": 2}
    return {**OPTIONS, **where, **options}


def test_two_processes_give_the_tokens_of_one(golden: Path, tmp_path: Path) -> None:
    """Joins, aborts, preemption and seeds that nobody gave; then both end in good order."""
    with tiny_llm(golden / "gqa", **OPTIONS) as llm:
        want = mixed_batch(llm)
    # A page takes 256 bytes on each: of two layers' K and V 4 tokens of one KV head of 4 float32.
    options = together(model=str(golden / "gqa"), mesh="tensor=2", kv_cache_memory_bytes=14 * 256)
    with programs(tmp_path, [sys.executable, str(PROGRAM)], options) as (leader, follower):
        assert leader.wait(START_SECONDS) == 0, leader.text + follower.text
        assert follower.wait(END_SECONDS) == 0, follower.text
    got = json.loads(leader.text.splitlines()[-1])
    assert got["preemptions"] > 0
    comparison = TokenComparison()
    for tokens, reference, margins in zip(got["tokens"], want["tokens"], want["margins"], strict=True):
        comparison.add(tokens, reference, margins)
    comparison.check()


def complete(port: int) -> str:
    """A long completion, or what the server says instead of one."""
    body = {"prompt": [1, 2, 3], "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()


def test_a_process_that_hangs_ends_the_server(golden: Path, tmp_path: Path) -> None:
    """It is stopped, not killed: no connection breaks, and process 0 waits in a step for its share."""
    port = free_port()
    options = together(model=str(golden / "gqa"), mesh="pipe=2", load_format="dummy", heartbeat_timeout_seconds=3)
    command = [*PADDOCK, "serve", "--port", str(port)]
    with programs(tmp_path, command, options) as (leader, follower):
        leader.wait_for("Paddock serves")
        assert '"finish_reason":"length"' in complete(port)
        follower.process.send_signal(signal.SIGSTOP)
        assert "process 1 has gone" in complete(port)
        assert leader.wait(END_SECONDS) != 0
        assert "process 1 has gone" in leader.text
        follower.process.send_signal(signal.SIGCONT)
        assert follower.wait(END_SECONDS) != 0
        assert "process 0 has gone" in follower.text


def test_a_killed_server_ends_the_other_process(golden: Path, tmp_path: Path) -> None:
    """Already while it compiles; that it does so later, too, is seen above."""
    options = together(model=str(golden / "gqa"), mesh="tensor=2", load_format="dummy")
    with programs(tmp_path, [*PADDOCK, "serve", "--port", "0"], options) as (leader, follower):
        follower.wait_for("load: ")
        leader.process.kill()
        assert follower.wait(END_SECONDS) != 0
        assert "process 0 has gone" in follower.text
