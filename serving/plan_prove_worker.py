"""The process that compiles for described devices: `python -m paddock.serving.plan_prove_worker` reads one job from
standard input and writes {"proof": ...} or {"error": ...} to standard output."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies

from paddock.sharding import Layout, MeshConfig

from .bucket import Bucket
from .engine_config import EngineConfig
from .explain import array_kinds, device_bytes, step_buckets, step_collectives
from .plan_prove import Proof, ProvedStep, read_config
from .programs import Programs
from .step_planning import plan_steps

# Accelerators of a host. XLA takes links within one for fast.
PER_HOST = 8


def main() -> int:
    # Libraries print; the answer has a channel of its own.
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)
        answer: dict[str, Any]
        try:
            answer = {"proof": dataclasses.asdict(proof_of(**json.load(sys.stdin)))}
        except ValueError as error:
            answer = {"error": str(error)}
        json.dump(answer, channel)
    return 0


def proof_of(*, config: dict[str, Any], mesh: str, rules: str, target: str, description: str, **sizes: Any) -> Proof:
    """`sizes` are `programs_for`'s. Raises ValueError for a layout or a size that cannot be had."""
    layout = Layout.build(mesh, rules, devices=described_devices(description, MeshConfig.parse(mesh).num_devices))
    programs = programs_for(config, layout, **sizes)
    held = device_bytes(array_kinds(programs))
    return Proof(
        target=target,
        mesh=mesh,
        rules=rules,
        jax=jax.__version__,
        decode_attention=programs.plan.decode_attention,
        prefill_attention=programs.plan.prefill_attention,
        num_pages=programs.num_pages,
        weights=held.weights,
        kv_cache=held.kv_cache,
        state=held.state,
        steps={name: prove_step(programs, bucket) for name, bucket in step_buckets(programs).items()},
    )


def described_devices(description: str, count: int) -> list[jax.Device]:
    """`count` devices or more that are not there, in hosts of PER_HOST."""
    hosts = -(-count // PER_HOST)
    shape = f"1x{hosts}x{PER_HOST if hosts > 1 else count}"
    return topologies.get_topology_desc(platform="cuda", target_config=description, topology=shape).devices


def programs_for(
    config: dict[str, Any],
    layout: Layout,
    *,
    dtype: str,
    page_size: int,
    num_pages: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
) -> Programs:
    model = read_config(config)
    plan, buckets = plan_steps(
        model,
        layout,
        dtype=dtype,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        num_logprobs=min(EngineConfig.max_logprobs, model.vocab_size),
    )
    return Programs(plan, buckets, num_pages)


def prove_step(programs: Programs, bucket: Bucket) -> ProvedStep:
    """Raises ValueError on CPU devices: XLA's CPU compiler widens bfloat16, and its temp is several times a GPU's."""
    if programs.plan.layout.mesh.devices.flat[0].platform != "gpu":
        raise ValueError("memory of steps compiled for a CPU says nothing about a GPU's; the target must be one")
    start = time.perf_counter()
    compiled = programs.compile_step(bucket)
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("the compiler does not tell what memory a program needs")
    return ProvedStep(
        bucket=str(bucket),
        arguments=memory.argument_size_in_bytes,
        aliases=memory.alias_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        temp=memory.temp_size_in_bytes,
        collectives=tuple(step_collectives(compiled)),
        seconds=time.perf_counter() - start,
    )


if __name__ == "__main__":
    sys.exit(main())
