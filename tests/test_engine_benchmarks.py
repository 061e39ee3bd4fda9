"""The benchmarks of engine and products, on small models: they run on any machine, and say what they measured."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from paddock.serving.bench_workload import Job
from paddock.serving.page_pool import PagePool
from paddock.serving.scheduler import Scheduler

SMALL = ["--model", "", "--load-format", "auto", "--max-model-len", "128", "--max-num-seqs", "2", "--reps", "1"]
TOKENS = ["--max-num-batched-tokens", "32"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a benchmark's `main` and gives the JSON of its last line."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))

    def run_one(name: str, *flags: str) -> dict[str, Any]:
        importlib.import_module(name).main([*SMALL, *TOKENS, *flags])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run_one


def test_step(run: Any) -> None:
    result = run("step", "--mesh", "tensor=2", "--batch-sizes", "1", "2", "--input-len", "8", "--output-len", "64")
    assert result["benchmark"] == "step"
    assert "cpu" in result["device"]
    assert [row["B"] for row in result["rows"]] == [1, 2]
    for row in result["rows"]:
        assert row["step_ms"] > 0
        assert row["decode_tok_s"] == pytest.approx(row["B"] / row["step_ms"] * 1e3)
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["step_ms"])
        # Half of the 20 MiB of float32 weights, and of 6 KiB a token in the cache: norms are whole on each device.
        read = row["floor_ms"] * result["copy_gb_s"] * 1e6
        assert read == pytest.approx(10 * 2**20 + row["B"] * (8 + 64 // 2) * 3 * 2**10, rel=2e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reps", "0"], "--reps must be at least 1, got 0"),
        (["--mesh", "tensor=3"], "q_heads of size 8 (kv_heads 4) does not divide over 3 shards"),
    ],
)
def test_bad_flags_are_one_line(run: Any, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    step = importlib.import_module("step")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("offline").as_program(lambda: step.main([*SMALL, *flags]))
    assert ended.value.code == 2
    assert f": {message}" in capsys.readouterr().err.splitlines()[-1]


def test_a_batch_must_run_all_together(run: Any) -> None:
    scheduler = Scheduler([PagePool(8, 4)], max_num_seqs=4, max_num_batched_tokens=16, max_chunks=4)
    replica = SimpleNamespace(engine=SimpleNamespace(scheduler=scheduler))
    llm = SimpleNamespace(engine=SimpleNamespace(replicas=[replica, replica]))
    check_seats = importlib.import_module("offline").check_seats
    check_seats(llm, 4, Job(8, 4))
    with pytest.raises(ValueError, match=r"^5 sequences of 12 tokens do not run all together: .* room for 4$"):
        check_seats(llm, 5, Job(8, 4))


def test_throughput(run: Any) -> None:
    result = run("throughput", "--num-prompts", "3", "--input-len", "4:9", "--output-len", "5")
    (row,) = result["rows"]
    assert (row["requests"], row["output_tokens"]) == (3, 15)
    assert row["output_tok_s"] == pytest.approx(15 / row["seconds"])


def test_prefill(run: Any) -> None:
    result = run("prefill", "--input-len", "8", "48")
    assert [row["prompt"] for row in result["rows"]] == [8, 48]
    assert result["rows"][1]["floor_ms"] > result["rows"][0]["floor_ms"] > 0


def test_options_of_xla_are_told_apart(run: Any) -> None:
    options = importlib.import_module("step_program").xla_options
    assert options("") == {}
    assert options("a=true,b=false,c=3,d=x") == {"a": True, "b": False, "c": 3, "d": "x"}
    with pytest.raises(ValueError, match="'b' is not of the form name=value"):
        options("a=1,b")


def test_host(run: Any) -> None:
    (row,) = run("host", "--batch-sizes", "2", "--input-len", "4", "--output-len", "100")["rows"]
    assert row["idle"] is None  # no GPU in the profile
    assert 0 < row["python_us"] < row["python_us"] + row["launch_us"] <= 1.1e3 * row["step_ms"]


def test_matmul(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    matmul = importlib.import_module("matmul")
    monkeypatch.setattr(matmul, "COLD_BYTES", 1)
    flags = ["--implementations", "reference", "--products", "qkv", "gate_up", "--rows", "2", "--repetitions", "1"]
    matmul.main(["--model", "smollm2-135m", *flags])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["product"] for row in rows] == ["qkv", "gate_up"]
    for row, size in zip(rows, (576 * 960 * 2, 576 * 3072 * 2), strict=True):
        assert row["xla_gb_s"] == pytest.approx(size / row["xla_us"] / 1e3)


def test_all_reduce(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--implementations", "reference", "--kib", "1", "--width", "64", "--calls", "1", "--repetitions", "1"]
    importlib.import_module("all_reduce").main(flags)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["devices"] == len(jax.devices())
    assert result["rows"][0]["reference_bus_gb_s"] > 0


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("attention", "", "attention.py needs a GPU, but JAX runs on cpu here"),
        ("attention_prefill", "", "attention_prefill.py needs a GPU, but JAX runs on cpu here"),
        ("matmul", "", "--implementations mosaic needs a GPU, but JAX runs on cpu here"),
        ("all_reduce", "", "--implementations mosaic needs a GPU, but JAX runs on cpu here"),
        ("all_reduce", "--implementations reference", "an all-reduce needs two devices or more, but there is one"),
        ("step_program", "--mesh tensor=2", "mosaic needs a GPU, but JAX runs on cpu here"),
        ("plan_check", "--seconds -1", "none of 18 points was measured"),
    ],
)
def test_what_cannot_be_measured_here_is_one_line(
    run: Any, monkeypatch: pytest.MonkeyPatch, name: str, flags: str, message: str
) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")  # as some of them do, for good
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *backend: one)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(flags.split())
    assert ended.value.code == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attention", "--cases must be of the form BxS,.. as in 64x2048,1x32768: got 'foo'"),
        ("attention_prefill", "--cases: 'foo' is not of the form N, N@S or K*N@S, as in 16*256@2048"),
    ],
)
def test_cases_of_attention_are_checked(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(["--cases", "foo"])
    assert capsys.readouterr().err.splitlines()[-1].endswith(f": error: {message}")


def test_cpu_devices_are_made_where_nobody_says_how_many() -> None:
    code = (
        "import jax; from paddock.serving.platform import make_cpu_devices; make_cpu_devices(3);"
        "print(len(jax.devices('cpu')))"
    )
    without = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in without}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]
