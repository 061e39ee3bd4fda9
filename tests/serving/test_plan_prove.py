"""`paddock plan --prove`: what needs no GPU compiler, and one real compile where its wheels are installed."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from gpu_compiler import needs_wheels

from paddock.model import LlamaConfig
from paddock.model.shapes import SHAPES
from paddock.serving import plan_prove
from paddock.serving.cli import main
from paddock.serving.explain import step_buckets
from paddock.serving.footprint import SLACK
from paddock.serving.plan_proof import proof_report, proved, with_proof
from paddock.serving.plan_prove import Proof, ProvedStep, prove, read_config, read_proof
from paddock.serving.plan_prove_worker import programs_for, prove_step
from paddock.serving.planner import plan
from paddock.sharding import Layout, Total

SIZES: dict[str, Any] = {"num_pages": 8, "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 64}


@pytest.fixture
def tiny(golden: Path) -> LlamaConfig:
    return LlamaConfig.from_file(golden / "gqa" / "config.json")


def test_described_accelerators_are_known_ones():
    known = tomllib.loads(resources.files("paddock.sharding").joinpath("accelerators.toml").read_text())
    assert plan_prove.targets() == ["h100-80gb", "h200"]
    for name in plan_prove.targets():
        (size,) = re.findall(r"device_memory_size: (\d+)", plan_prove.target_description(name))
        # The driver counts more than the sheet says; an H100's was read from a card.
        assert int(size) == known[name].get("driver_bytes", int(size))
        assert 1 < int(size) / known[name]["datasheet_bytes"] < 1.07


def test_an_accelerator_without_description_is_refused(tiny: LlamaConfig):
    with pytest.raises(ValueError, match=r"'tpu-v5e' has no target description .* h100-80gb, h200"):
        prove(tiny, "", "", "tpu-v5e", **SIZES)


def test_missing_wheels_are_told_with_the_extra(tiny: LlamaConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan_prove, "WHEELS", ("0",))
    with pytest.raises(ValueError, match=r"jax-cuda13-pjrt.*pip install 'paddock\[plan\]'"):
        prove(tiny, "", "", "h100-80gb", **SIZES)


def test_memory_of_a_cpu_program_is_not_given_as_a_gpus(tiny: LlamaConfig):
    programs = programs_for(dataclasses.asdict(tiny), Layout.build(), dtype="bfloat16", page_size=16, **SIZES)
    with pytest.raises(ValueError, match="compiled for a CPU"):
        prove_step(programs, step_buckets(programs)["decode"])


def test_sizes_that_do_not_divide_are_refused(tiny: LlamaConfig):
    layout = Layout.build("tensor=2", "batch=tensor")
    sizes = SIZES | {"max_num_seqs": 3}
    with pytest.raises(ValueError, match="max_num_seqs 3 does not divide into the 2 pieces"):
        programs_for(dataclasses.asdict(tiny), layout, dtype="bfloat16", page_size=16, **sizes)


def test_jobs_and_proofs_survive_json():
    for config in SHAPES.values():
        assert read_config(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    total = Total("all-reduce", "layers/mlp", False, 8, 80, 2**20, 2**21)
    step = ProvedStep("64+0", arguments=100, aliases=40, outputs=50, temp=7, collectives=(total,), seconds=1.5)
    larger = dataclasses.replace(step, temp=9)
    proof = Proof("h200", "tensor=8", "", "0", "mosaic", "blocked", 8, 60, 30, 10, {"decode": step, "prefill": larger})
    assert read_proof(json.loads(json.dumps(dataclasses.asdict(proof)))) == proof
    assert (step.total, proof.temp, proof.total) == (117, 9, 119)


def test_a_plan_takes_the_bytes_of_its_proof():
    found = plan("llama-3.1-70b", "h200", 8, mesh="tensor=8")
    (layout,) = found.layouts
    step = ProvedStep("256+0", arguments=110, aliases=40, outputs=50, temp=7, collectives=(), seconds=1.5)
    larger = dataclasses.replace(step, bucket="0+2048", temp=2**20)
    proof = Proof("h200", "tensor=8", "", "0", "mosaic", "blocked", 8, 60, 40, 10, {"decode": step, "prefill": larger})
    held = with_proof(layout, proof).bytes_per_device
    assert (held.weights, held.kv_cache, held.state, held.temp) == (60, 40, 10, 2**20 + 10 + SLACK)
    assert with_proof(layout, proof).fits
    assert with_proof(layout, proof).to_json()["proof"]["steps"]["prefill"]["temp"] == 2**20
    text = proof_report(dataclasses.replace(found, layouts=(with_proof(layout, proof),)))
    assert "prefill 0+2048" in text
    assert "1 MiB" in text
    too_large = dataclasses.replace(proof, steps={"decode": dataclasses.replace(step, temp=2**40)})
    refused = with_proof(layout, too_large)
    assert (refused.fits, refused.decode) == (False, ())
    assert "the compiled steps need" in refused.reason


def test_dtypes_that_no_step_has_are_not_proved():
    found = plan("llama-3.1-8b", "h100-80gb", mesh="tensor=1", quantization="int8")
    with pytest.raises(ValueError, match="no steps with quantization int8"):
        proved(found, SHAPES["llama-3.1-8b"])


def test_the_command_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(plan_prove, "WHEELS", ("0",))
    assert main(["plan", "llama-3.1-8b", "--accelerator", "h100-80gb", "--prove"]) == 2
    assert "pip install 'paddock[plan]'" in capsys.readouterr().err


def test_what_the_process_refuses_is_told_here(tiny: LlamaConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan_prove, "require_wheels", lambda: None)
    with pytest.raises(ValueError, match="'tensor' is not of the form axis=size"):
        prove(tiny, "tensor", "", "h200", **SIZES)


def test_a_process_that_fails_or_is_late_is_told_of(tiny: LlamaConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan_prove, "require_wheels", lambda: None)
    with pytest.raises(RuntimeError, match=r"compiling for h200 took longer than 0\.01 seconds"):
        prove(tiny, "", "", "h200", timeout=0.01, **SIZES)
    monkeypatch.setattr(plan_prove, "target_description", lambda target: "no description")
    with pytest.raises(RuntimeError, match=r"compiling for h200 failed: .*Error"):
        prove(tiny, "", "", "h200", **SIZES)


@needs_wheels
def test_real_steps_compile_for_two_h100s(tiny: LlamaConfig):
    proof = prove(tiny, "tensor=2", "", "h100-80gb", dtype="bfloat16", page_size=16, **SIZES)
    held = proof.weights + proof.kv_cache + proof.state
    assert list(proof.steps) == ["decode", "prefill"]
    for step in proof.steps.values():
        # Besides what persists there is the step's packed input.
        assert held < step.arguments < held + 4096
        assert proof.kv_cache < step.aliases <= proof.kv_cache + proof.state
        assert step.temp > 0
        reduced = {c.part: c.count for c in step.collectives if c.kind == "all-reduce"}
        assert reduced["layers/attention"] == reduced["layers/mlp"] == tiny.num_layers
