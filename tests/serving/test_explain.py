"""`paddock sweep --explain`: a layout described from shapes alone, checked against an engine that is really there."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest
from engines import tiny_llm

from paddock.serving.build import Built
from paddock.serving.cli import main
from paddock.serving.engine_config import EngineConfig
from paddock.serving.explain import array_kinds, device_bytes, slices, step_buckets
from paddock.serving.resolve import resolve
from paddock.serving.sweep_worker import replica_slices

CACHE = str(Path(__file__).parents[2] / "build" / "test-compile-cache")


@pytest.mark.parametrize("mesh", ["tensor=4", "pipe=2,tensor=2"])
def test_bytes_are_those_of_the_engine(golden: Path, mesh: str):
    with tiny_llm(golden / "gqa", mesh=mesh, max_num_seqs=1, max_num_batched_tokens=8) as llm:
        executor = llm.engine.replicas[0].executor
        held = executor.bytes_per_device()
        described = dataclasses.asdict(device_bytes(array_kinds(executor.programs)))
    assert {kind: described[kind] for kind in held} == held


def test_slices_are_those_of_placed_arrays():
    config = EngineConfig(model="smollm2-135m", load_format="dummy", mesh="pipe=2,tensor=3", max_model_len=256)
    programs = resolve(config).programs
    found = {entry["name"]: entry for entry in slices(programs)}
    layer = [f"layers.0.{name}" for name in ("attention_norm", "qkv", "out", "mlp_norm", "gate_up", "down")]
    state = ["last_token", "page_table", "sampler.counts", "sampler.prompted", "sampler.bias", "between_stages"]
    assert list(found) == ["embed", "norm", *layer, "pages", *state]
    qkv = found["layers.0.qkv"]
    assert (qkv["shape"], qkv["shards"]) == ([2, 576, 3, 5, 64], [2, 1, 3, 1, 1])
    # Device 4 is the second of three at the second stage.
    assert qkv["devices"]["4"] == [[1, 2], [0, 576], [1, 2], [0, 5], [0, 64]]
    assert found["pages"]["devices"]["4"][0] == [1, 2]
    assert len(qkv["devices"]) == 6


def test_slices_tell_of_every_replica():
    config = EngineConfig(model="smollm2-135m", load_format="dummy", mesh="data=2,tensor=3", max_model_len=256)
    replicas = [Mock(spec=Built, resolved=resolve(config, replica=index)) for index in range(2)]
    (out,) = (entry for entry in replica_slices(replicas) if entry["name"] == "layers.0.out")
    assert {device: held[0] for device, held in out["devices"].items()} == {
        str(device): [device % 3, device % 3 + 1] for device in range(6)
    }


def test_a_model_too_large_for_this_machine_is_explained_without_running(capsys: pytest.CaptureFixture[str]):
    """Sixteen layers of 2 GiB in all: nothing is allocated, and each reduction of tensor parallelism is found."""
    before = len(jax.live_arrays())
    flags = ["--model", "llama-3.2-1b", "--load-format", "dummy", "--meshes", "data=2,tensor=4", "--dtype", "bfloat16"]
    flags += ["--batch-sizes", "1", "--input-lens", "16", "--max-num-batched-tokens", "16"]
    flags += ["--compile-cache-dir", CACHE]
    assert main(["sweep", "--explain", *flags]) == 0
    assert len(jax.live_arrays()) == before
    text = capsys.readouterr().out
    title = "mesh data=2, tensor=4 (8 devices in 2 replicas; what follows is of one), 16 layers, bfloat16"
    assert text.splitlines()[0] == title
    assert re.search("^decode step of 1 sequences: [0-9]+ collectives, each", text, re.MULTILINE)
    assert re.search("^prefill step of 16 tokens in at most 1 prompts: [0-9]+ collectives, each", text, re.MULTILINE)
    lines = [line.split() for line in text.splitlines()]
    assert ["vocab", "tensor", "4"] in lines
    (gate_up,) = [line for line in text.splitlines() if "gate_up" in line]
    for part in ("weights", " 16 ", "embed mlp -", "[2048, 8192, 2]", "[2048, 2048, 2]", "256 MiB"):
        assert part in gate_up
    decode = text[text.index("decode step") : text.index("prefill step")]
    reductions = [line.split() for line in decode.splitlines() if "all-reduce" in line]
    counts = {line[0]: int(line[2]) for line in reductions if line[0].startswith("layers/")}
    assert counts == {"layers/attention": 16, "layers/mlp": 16}


def test_a_deterministic_engine_has_one_step_to_explain():
    config = EngineConfig(model="smollm2-135m", load_format="dummy", max_model_len=256, deterministic=True)
    programs = resolve(config).programs
    assert set(step_buckets(programs).values()) == set(programs.packings)


def test_one_layout_is_explained_at_a_time(capsys: pytest.CaptureFixture[str]):
    assert main(["sweep", "--explain", "--meshes", "tensor=2", "pipe=2"]) == 2
    message = "paddock: --explain takes one layout at a time, but there are 2: tensor=2, pipe=2\n"
    assert capsys.readouterr().err == message
