"""A plan's bytes by proof: the real steps compiled by XLA's GPU compiler for accelerators that are not there."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from paddock.model import LlamaConfig, RopeConfig
from paddock.sharding import Total

from .engine_config import GPU_TOKENS

WHEELS = ("12", "13")  # majors of CUDA that JAX's plugin comes for
# The 405B shape takes two minutes on two cores.
TIMEOUT_SECONDS = 900.0


@dataclasses.dataclass(frozen=True)
class ProvedStep:
    """One compiled step, in bytes on each device: `arguments` are weights, cache, state and the packed input;
    `aliases` the part of `outputs` that takes the place of arguments. `seconds`: tracing and compiling."""

    bucket: str
    arguments: int
    aliases: int
    outputs: int
    temp: int
    collectives: tuple[Total, ...]
    seconds: float

    @property
    def total(self) -> int:
        """The most that is held while the step runs."""
        return self.arguments + self.outputs - self.aliases + self.temp


@dataclasses.dataclass(frozen=True)
class Proof:
    """The largest step that decodes alone and the largest of prompts alone, under "decode" and "prefill".

    `weights`, `kv_cache` and `state` are the bytes per device of the arrays that the steps were compiled for.
    """

    target: str
    mesh: str
    rules: str
    jax: str
    decode_attention: str
    prefill_attention: str
    num_pages: int
    weights: int
    kv_cache: int
    state: int
    steps: dict[str, ProvedStep]

    @property
    def temp(self) -> int:
        return max(step.temp for step in self.steps.values())

    @property
    def total(self) -> int:
        return max(step.total for step in self.steps.values())


def prove(
    config: LlamaConfig,
    mesh: str,
    rules: str,
    target: str,
    *,
    dtype: str = "auto",
    page_size: int = 64,
    num_pages: int,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = GPU_TOKENS,
    max_model_len: int,
    timeout: float = TIMEOUT_SECONDS,
) -> Proof:
    """Compile decode and prefill for accelerator `target` in a process of its own: JAX there sees no device at all.

    `num_pages` are those of each partition. Raises ValueError for an accelerator without a target description, missing
    wheels, or a layout or size that cannot be had, and RuntimeError when the compiler fails or takes longer than
    `timeout` seconds.
    """
    job = {
        "config": dataclasses.asdict(config),
        "mesh": mesh,
        "rules": rules,
        "target": target,
        "description": target_description(target),
        "dtype": config.dtype if dtype == "auto" else dtype,
        "page_size": page_size,
        "num_pages": num_pages,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
    }
    require_wheels()
    return read_proof(_run(job, timeout))


def targets() -> list[str]:
    """The accelerators that there is a description of."""
    return sorted(file.name.removesuffix(".txtpb") for file in _folder().iterdir() if file.name.endswith(".txtpb"))


def target_description(target: str) -> str:
    """The text of XLA's GpuTargetConfigProto. Raises ValueError for an accelerator without one."""
    if target not in targets():
        raise ValueError(
            f"accelerator {target!r} has no target description to compile for; there are {', '.join(targets())}"
        )
    return _folder().joinpath(f"{target}.txtpb").read_text()


def require_wheels() -> None:
    """Raises ValueError unless JAX's CUDA plugin, which holds the GPU compiler, is installed."""
    if not any(_importable(f"jax_plugins.xla_cuda{n}") and _importable(f"jax_cuda{n}_plugin") for n in WHEELS):
        raise ValueError(
            "proving a plan needs XLA's GPU compiler, the wheels jax-cuda13-pjrt and jax-cuda13-plugin (or cuda12) of "
            "this JAX's version: pip install 'paddock[plan]'"
        )


def read_config(raw: dict[str, Any]) -> LlamaConfig:
    """The config from what JSON keeps of `dataclasses.asdict`."""
    return LlamaConfig(**raw | {"rope": RopeConfig(**raw["rope"]), "eos_token_ids": tuple(raw["eos_token_ids"])})


def read_proof(raw: dict[str, Any]) -> Proof:
    """The proof from what JSON keeps of `dataclasses.asdict`."""
    steps = {
        name: ProvedStep(**step | {"collectives": tuple(Total(**total) for total in step["collectives"])})
        for name, step in raw["steps"].items()
    }
    return Proof(**raw | {"steps": steps})


def _run(job: dict[str, Any], timeout: float) -> dict[str, Any]:
    # A compile for described devices is for reading, not for JAX's cache of programs to be run.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-P", "-m", "paddock.serving.plan_prove_worker"]
    try:
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, env=env, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"compiling for {job['target']} took longer than {timeout:g} seconds") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"compiling for {job['target']} failed: {lines[-1] if lines else done.returncode}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["proof"]


def _folder() -> Traversable:
    return resources.files("paddock.serving").joinpath("targets")


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False
