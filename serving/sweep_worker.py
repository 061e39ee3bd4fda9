"""The process of one layout in a sweep: `python -m paddock.serving.sweep_worker` reads a job, one line, from standard
input, which must stay open, and writes a row for each case to standard output."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax

from paddock.sharding import MeshConfig
from paddock.sharding.memory import PlannedLayout

from .build import Built, build
from .engine_config import CPU_TOKENS, GPU_TOKENS, EngineConfig
from .explain import array_kinds, device_bytes, slices, step_collectives, temp_bytes
from .lifeline import end_with_parent
from .platform import prepare
from .resolve import Resolved
from .sweep_measure import check, copy_bandwidth, decode_bytes, headroom, measure
from .sweep_plan import Case, SweepLayout

OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")


class Refused(ValueError):
    """The engine was not built: the layout, the sizes or the model cannot be had."""


def main() -> int:
    # Libraries print; rows have a channel of their own.
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)

        def emit(row: dict[str, Any]) -> None:
            channel.write(json.dumps(row) + "\n")
            channel.flush()

        job = json.loads(sys.stdin.readline())
        end_with_parent()
        cases = [Case(**case) for case in job["cases"]]
        run_layout(EngineConfig(**job["config"]), SweepLayout(**job["layout"]), cases, job["num_cpu_devices"], emit)
    return 0


def run_layout(
    config: EngineConfig,
    layout: SweepLayout,
    cases: list[Case],
    num_cpu_devices: int | None,
    emit: Callable[[dict[str, Any]], None],
) -> None:
    """Emit one row for each case: status "ok" with what was measured, or another with the error."""
    left = list(cases)
    try:
        try:
            config = fit(config, layout, cases, num_cpu_devices)
            bandwidth = copy_bandwidth(jax.devices()[0])
            replicas = [build(config, replica=i) for i in range(_num_replicas(config))]
        except ValueError as error:
            raise Refused(str(error)) from error
        head = _about(replicas)
        while left:
            emit({**dataclasses.asdict(left[0]), **head, **_run(replicas, left[0], bandwidth)})
            left.pop(0)
    except Exception as error:
        # Not lost: the rows say it and the log where; the process is for this layout alone and has nothing left to do.
        traceback.print_exc()
        name = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
        row = {"status": status_of(error), "error": f"{name}{error}"}
        for case in left:
            emit({**dataclasses.asdict(case), **row})


def fit(config: EngineConfig, layout: SweepLayout, cases: list[Case], num_cpu_devices: int | None) -> EngineConfig:
    """`config` for `layout`, large enough for every case and no larger where the user left it open; JAX is prepared.

    Raises ValueError naming what is wrong with the layout.
    """
    config = layout.apply(config)
    text = config.layout_text
    if num_cpu_devices is not None:
        needed = MeshConfig.parse(text.mesh).num_devices
        if num_cpu_devices < needed:
            raise ValueError(f"--devices {num_cpu_devices} is fewer than the {needed} that the mesh {text.mesh} needs")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    prepare(config)
    mesh = text.mesh_config(jax.device_count())
    mesh.check_count(jax.devices())
    planned = PlannedLayout.of(mesh, text.rules)
    multiple = math.lcm(planned.num_shards("batch"), planned.num_shards("tokens"))
    # Of a replica, among which prompts are dealt out.
    batch = -(-max(case.batch_size for case in cases) // (multiple * mesh.num_replicas)) * multiple
    slots = config.max_num_seqs or batch
    usual = CPU_TOKENS if jax.default_backend() == "cpu" else GPU_TOKENS
    budget = config.max_num_batched_tokens or -(-max(usual, 2 * slots) // multiple) * multiple
    longest = max(c.input_len + c.output_len + headroom(c, budget, planned.num_shards("layers")) for c in cases)
    return dataclasses.replace(
        config,
        max_num_seqs=slots,
        max_num_batched_tokens=budget,
        max_model_len=config.max_model_len or longest,
        skip_tokenizer_init=True,
    )


def status_of(error: Exception) -> str:
    """One of refused (the layout or the sizes cannot be had), out-of-memory, and failed: whatever else went wrong."""
    if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
        return "out-of-memory"
    return "refused" if isinstance(error, Refused) else "failed"


def _num_replicas(config: EngineConfig) -> int:
    return config.layout_text.mesh_config(jax.device_count()).num_replicas


def _about(replicas: list[Built]) -> dict[str, Any]:
    """What is the same for every case."""
    resolved: Resolved = replicas[0].resolved
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "num_devices": resolved.plan.layout.mesh.size * len(replicas),
        "slots": resolved.plan.num_slots * len(replicas),
        "dtype": resolved.dtype,
        "resolved_mesh": {name: int(size) for name, size in resolved.plan.layout.mesh.shape.items()},
        "resolved_rules": str(resolved.plan.layout.rules),
        "startup_seconds": replicas[0].startup_seconds,
        "slices": replica_slices(replicas),
    }


def replica_slices(replicas: list[Built]) -> list[dict[str, Any]]:
    """Those of the first replica, with the devices of the others, which hold the same of their own arrays."""
    found, *others = [slices(built.resolved.programs) for built in replicas]
    for other in others:
        for entry, same in zip(found, other, strict=True):
            entry["devices"] |= same["devices"]
    return found


def _run(replicas: list[Built], case: Case, bandwidth: float | None) -> dict[str, Any]:
    try:
        check(replicas, case)
    except ValueError as error:  # of this case alone: smaller ones may do
        return {"status": "refused", "error": str(error)}
    found = measure(replicas, case)
    built = replicas[0]
    buckets = {str(bucket): bucket for bucket in built.executor.compiled}
    steps = {"prefill": buckets[found.prefill_bucket], "decode": buckets[found.decode_bucket]}
    programs = {name: built.executor.compiled[bucket] for name, bucket in steps.items()}
    at_once = built.resolved.plan.stages.count * len(replicas)
    temp = max(map(temp_bytes, programs.values()))
    ideal = None if bandwidth is None else decode_bytes(built, case, len(replicas)) / bandwidth
    return {
        "status": "ok",
        "error": None,
        "bytes_per_device": dataclasses.asdict(device_bytes(array_kinds(built.resolved.programs), temp)),
        "collectives": {
            name: [dataclasses.asdict(total) for total in step_collectives(program)]
            for name, program in programs.items()
        },
        "prefill_seconds": found.prefill_seconds,
        "prefill_tokens_per_second": case.batch_size * case.input_len / found.prefill_seconds,
        "decode_seconds": found.decode_seconds,
        "decode_rows": steps["decode"].decodes * at_once if found.decode_seconds else None,
        "decode_tokens_per_second": case.batch_size / found.decode_seconds if found.decode_seconds else None,
        "copy_bytes_per_second": bandwidth,
        "roofline": ideal / found.decode_seconds if ideal and found.decode_seconds else None,
        "tokens": found.tokens,
    }


if __name__ == "__main__":
    sys.exit(main())
