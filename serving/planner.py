"""Which model fits which accelerators, in which layout, how fast: by arithmetic, with no device.

`plan` is the public entry; a layout takes a few milliseconds, so that a notebook may sweep thousands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from paddock.model import Dims, LlamaConfig
from paddock.model.shapes import SHAPES
from paddock.sharding import LayoutText, MeshConfig
from paddock.sharding.accelerators import Accelerator, accelerator
from paddock.sharding.memory import DeviceBytes, PlannedLayout, show_bytes

from .footprint import SLACK, Footprint
from .kv_cache import kv_bytes_per_token, page_bytes
from .layout_plan import KV_DTYPES, DecodePoint, Demand, LayoutPlan, Plan, check_count
from .roofline import StepTimes
from .speed_profile import SpeedProfile, shipped_profile
from .weights import Weights


def plan(
    model: str | Path | LlamaConfig,
    accelerator_name: str | Accelerator,
    count: int = 1,
    *,
    mesh: str = "",
    rules: str = "",
    layout: str = "",
    demand: Demand | None = None,
    profile: SpeedProfile | None = None,
    **fields: Any,
) -> Plan:
    """Plan `model` (a folder, a config.json, or a shape's name) on `count` accelerators.

    Where neither `mesh` nor `layout` names a mesh, every split of `count` over replicas, stages and tensor parallelism
    is planned, with the rules; all in the flags' spelling. `fields` are those of `Demand`; `profile` replaces the
    shipped one. Raises ValueError (OSError for files) naming what is wrong, for a layout that was asked for and does
    not divide too.
    """
    check_count("count", count)
    for argument, text in (("mesh", mesh), ("rules", rules), ("layout", layout)):
        if not isinstance(text, str):
            raise ValueError(f"{argument} must be text in the flag's spelling, as in 'tensor=4', got {text!r}")
    for argument, value, kind in (("demand", demand, Demand), ("profile", profile, SpeedProfile)):
        if not isinstance(value, kind | None):
            raise ValueError(f"{argument} must be a {kind.__name__}, got {value!r}")
    card = accelerator_name if isinstance(accelerator_name, Accelerator) else accelerator(str(accelerator_name))
    name, config = read_model(model)
    demand = dataclasses.replace(demand or Demand(), **fields)
    memory = card.memory_bytes if demand.memory == "driver" else card.datasheet_bytes
    profile = profile or shipped_profile(card.name)
    if profile.accelerator != card.name:
        raise ValueError(f"the speed profile is of {profile.accelerator}, not of {card.name}")
    if demand.longest > config.context_length:
        asked_by = "max_model_len" if demand.max_model_len else "input_len + output_len,"
        raise ValueError(f"{asked_by} {demand.longest} is more than the {config.context_length} tokens of {name}")
    read = LayoutText.read(mesh, rules, layout)
    if read.mesh or read.preset:
        asked = read.mesh_config(count)
        if asked.num_devices > count:
            raise ValueError(f"mesh {asked} needs {asked.num_devices} devices, but count is {count}")
        found = [plan_layout(config, card, memory, demand, profile, asked, read.rules)]
    else:
        # Rules that no mesh of these axes could have are no matter of what divides.
        PlannedLayout.of("pipe=1,tensor=1", read.rules)
        found = []
        for candidate in sensible_meshes(config, count):
            try:
                found.append(plan_layout(config, card, memory, demand, profile, candidate, read.rules))
            except ValueError as error:
                refused = error
        if not found:
            raise ValueError(f"no layout of {count} devices divides {name}: {refused}")
    return Plan(name, card, count, demand, memory, tuple(found))


def read_model(model: str | Path | LlamaConfig) -> tuple[str, LlamaConfig]:
    """Its name and config. Raises ValueError, naming the shapes when there is neither such a shape nor such a file."""
    if isinstance(model, LlamaConfig):
        return "model", model
    name = str(model)
    for shape in (name, f"llama-{name}"):
        if shape in SHAPES:
            return shape, SHAPES[shape]
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(f"model {name!r} is neither a folder, nor a config.json, nor one of {', '.join(SHAPES)}")
    return name, LlamaConfig.from_file(path / "config.json" if path.is_dir() else path)


def sensible_meshes(config: LlamaConfig, count: int) -> Iterator[MeshConfig]:
    """All splits of `count` devices: replicas, stages, tensor; tensor varies fastest, so that it lies in an island."""
    for tensor in _divisors(count):
        if config.num_heads % tensor:
            continue
        for pipe in _divisors(count // tensor):
            if pipe <= config.num_layers:
                sizes = (("data", count // tensor // pipe), ("pipe", pipe), ("tensor", tensor))
                yield MeshConfig(tuple((name, size) for name, size in sizes if size > 1))


def plan_layout(
    config: LlamaConfig,
    card: Accelerator,
    memory: int,
    demand: Demand,
    profile: SpeedProfile,
    mesh: MeshConfig,
    rules: str = "",
) -> LayoutPlan:
    """One layout on cards with `memory` bytes. Raises ValueError naming an axis that does not divide."""
    layout = PlannedLayout.of(mesh, rules)
    dtype = config.dtype if demand.dtype == "auto" else demand.dtype
    kv_dtype = KV_DTYPES.get(demand.kv_cache_dtype, dtype)
    weights = Weights.of(config, layout, dtype, demand.quantization)
    footprint = Footprint(
        config,
        dtype,
        demand.block_size,
        demand.max_num_seqs,
        demand.max_num_batched_tokens,
        demand.max_model_len or config.context_length,
        SLACK,
    )
    share = demand.utilization or card.usable
    fixed = dataclasses.replace(footprint.of(layout, 0), weights=weights.total)
    if demand.memory == "driver":
        available = int(memory * share)
        left = available - fixed.total
    else:
        available = memory
        left = min(int(memory * share) - fixed.weights, memory - fixed.total)
    per_page = page_bytes(Dims.of(config, layout), layout, demand.block_size, jnp.dtype(kv_dtype))
    partitions = layout.num_shards("batch") * mesh.num_replicas
    # One page of each partition is scratch.
    tokens = max(left // per_page - 1, 0) * demand.block_size
    sequences = demand.sequences(tokens) * partitions
    fits = tokens >= demand.longest
    room = f"{share:.0%} of {show_bytes(memory)}"
    held = dataclasses.replace(fixed, kv_cache=max(left // per_page, 0) * per_page)
    prefill: float | None = None
    points: tuple[DecodePoint, ...] = ()
    source = untimed = ""
    if fits:
        try:
            times = StepTimes(config, layout, mesh, weights, dtype, kv_dtype, card, profile)
            prefill = times.prefill(demand.input_len, demand.max_num_batched_tokens).total
            points = _decode_points(times, demand, sequences, mesh.num_replicas)
            source = times.source
        except ValueError as error:  # a figure that nobody knows, messages that are not modelled: bytes still hold
            untimed = str(error)
    return LayoutPlan(
        mesh=mesh,
        rules=rules,
        fits=fits,
        reason=_reason(demand, fixed, room, left, tokens, partitions, demand.max_num_seqs * mesh.num_replicas),
        bytes_per_device=held,
        available=available,
        kv_bytes_per_token=kv_bytes_per_token(config, kv_dtype),
        kv_tokens=tokens * partitions,
        sequences=sequences,
        prefill_seconds=prefill,
        decode=points,
        source=source,
        untimed=untimed,
    )


def _decode_points(times: StepTimes, demand: Demand, sequences: int, replicas: int) -> tuple[DecodePoint, ...]:
    """At half of the output, for batches up to the largest at once, equally large on each of the replicas."""
    context = demand.input_len + demand.output_len / 2
    batches = demand.batch_sizes(sequences // replicas)
    steps = zip(batches, times.decodes(batches, context), strict=True)
    return tuple(DecodePoint(batch * replicas, step.total, step.bound) for batch, step in steps)


def _reason(demand: Demand, fixed: DeviceBytes, room: str, left: int, tokens: int, partitions: int, wanted: int) -> str:
    """Of a layout that leaves `tokens` KV tokens in each of its `partitions`, for `wanted` sequences."""
    if left <= 0:
        return f"{fixed} without any page, more than {room}"
    if tokens < demand.longest:
        return f"{tokens:,} KV tokens are left to a sequence in {room}, fewer than the {demand.longest:,} that it needs"
    if (sequences := demand.sequences(tokens) * partitions) < wanted:
        return f"only {tokens * partitions:,} KV tokens are left: {sequences} sequences of {demand.length:,} at once"
    return f"{tokens * partitions:,} KV tokens are left"


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]
