"""Which model fits which accelerators, in which layout, how fast: by arithmetic, with no device.

`plan` is the public entry; a layout takes a few milliseconds, so that a notebook may sweep thousands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from paddock.model import Dims, LlamaConfig
from paddock.model.shapes import SHAPES
from paddock.sharding import LayoutText, MeshConfig
from paddock.sharding.accelerators import Accelerator, accelerator
from paddock.sharding.memory import DeviceBytes, PlannedLayout, show_bytes

from .engine_config import GPU_TOKENS
from .footprint import SLACK, Footprint
from .kv_cache import page_bytes
from .plan_prove import Proof
from .roofline import QUANTIZED, StepTimes, Weights, kv_bytes_per_token
from .speed_profile import SpeedProfile, shipped_profile

KV_DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "fp8_e4m3": "float8_e4m3fn", "int8": "int8"}
# Whose figure of the card's memory counts, and what lies in the share that may be used.
MEMORY = ("driver", "datasheet")


@dataclasses.dataclass(frozen=True)
class Demand:
    """What the engine is to hold and to serve. `memory`: `driver` counts as the engine does, with steps and libraries
    inside the used share of what the driver gives; `datasheet` as the back of an envelope does, with weights and pages
    alone inside it and the steps in the rest. Raises ValueError naming the field."""

    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = GPU_TOKENS
    max_model_len: int | None = None
    block_size: int = 64
    input_len: int = 1024
    output_len: int = 128
    memory: str = "driver"
    utilization: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "input_len", "output_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        choices: dict[str, Sequence[Any]] = {
            "dtype": ("auto", "float32", "bfloat16", "float16"),
            "quantization": (None, *QUANTIZED),
            "kv_cache_dtype": ("auto", *KV_DTYPES),
            "memory": MEMORY,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")
        if self.max_model_len is not None and self.max_model_len < self.length:
            raise ValueError(
                f"max_model_len {self.max_model_len} is less than input_len + output_len, {self.length} tokens"
            )
        if self.utilization is not None and not 0 < self.utilization <= 1:
            raise ValueError(f"utilization must be in (0, 1], got {self.utilization}")

    @property
    def length(self) -> int:
        """Tokens of a sequence at its end."""
        return self.input_len + self.output_len

    @property
    def batch_sizes(self) -> list[int]:
        """Powers of two up to `max_num_seqs`, and that."""
        return sorted({*(2**i for i in range(self.max_num_seqs.bit_length())), self.max_num_seqs})


@dataclasses.dataclass(frozen=True)
class DecodePoint:
    """`seconds` until each of `batch` sequences has one more token; `bound`: memory, matrix, links or host."""

    batch: int
    seconds: float
    bound: str

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds


@dataclasses.dataclass(frozen=True)
class LayoutPlan:
    """One layout. Bytes are of a device, tokens and sequences of all replicas together; those of compiled steps where
    there is a `proof`.

    `source` of the times: `measured` when every figure was measured on that accelerator, else `datasheet`. Where times
    are not predicted, `untimed` says why.
    """

    mesh: MeshConfig
    rules: str
    fits: bool
    reason: str
    bytes_per_device: DeviceBytes
    available: int
    kv_bytes_per_token: int
    kv_tokens: int
    sequences: int
    prefill_seconds: float | None
    decode: tuple[DecodePoint, ...]
    source: str
    untimed: str = ""
    proof: Proof | None = None

    @property
    def num_devices(self) -> int:
        return self.mesh.num_devices

    def to_json(self) -> dict[str, Any]:
        held = self.bytes_per_device
        return {
            "mesh": str(self.mesh) if self.mesh.axes else "",
            "fits": self.fits,
            "reason": self.reason,
            "bytes_per_device": {
                "weights": held.weights,
                "kv_cache": held.kv_cache,
                "temp": held.temp + held.state,
                "total": held.total,
            },
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_tokens": self.kv_tokens,
            "prefill_seconds": self.prefill_seconds,
            "decode": [dataclasses.asdict(point) for point in self.decode],
            **({"proof": dataclasses.asdict(self.proof)} if self.proof else {}),
        }


@dataclasses.dataclass(frozen=True)
class Plan:
    model: str
    accelerator: Accelerator
    count: int
    demand: Demand
    memory_bytes: int
    layouts: tuple[LayoutPlan, ...]

    def meeting(self, *, ttft: float | None = None, itl: float | None = None) -> list[tuple[LayoutPlan, DecodePoint]]:
        """Layouts that keep to these seconds, each at the batch that makes its tokens cheapest; cheapest first, by
        device-seconds a token."""
        found = []
        for layout in self.layouts:
            if not layout.fits or layout.prefill_seconds is None or (ttft and layout.prefill_seconds > ttft):
                continue
            points = [point for point in layout.decode if not itl or point.seconds <= itl]
            if points:
                found.append((layout, max(points, key=lambda point: point.tokens_per_second)))
        return sorted(found, key=lambda pair: pair[0].num_devices / pair[1].tokens_per_second)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "accelerator": self.accelerator.name,
            "count": self.count,
            "layouts": [layout.to_json() for layout in self.layouts],
        }


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

    Without `mesh` and `layout` every split of `count` over replicas, stages and tensor parallelism is planned, with
    `rules`. `fields` are those of `Demand`; `profile` replaces the shipped one. Raises ValueError (OSError for files)
    naming what is wrong, for a layout that was asked for and does not divide too.
    """
    card = accelerator_name if isinstance(accelerator_name, Accelerator) else accelerator(accelerator_name)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    name, config = read_model(model)
    demand = dataclasses.replace(demand or Demand(), **fields)
    memory = card.memory_bytes if demand.memory == "driver" else card.datasheet_bytes
    profile = profile or shipped_profile(card.name)
    if profile.accelerator != card.name:
        raise ValueError(f"the speed profile is of {profile.accelerator}, not of {card.name}")
    if demand.max_model_len and demand.max_model_len > config.context_length:
        raise ValueError(
            f"max_model_len {demand.max_model_len} is more than the {config.context_length} tokens of {name}"
        )
    if mesh or layout:
        text = LayoutText.read(mesh, rules, layout)
        asked = text.mesh_config(count)
        if asked.num_devices > count:
            raise ValueError(f"mesh {asked} needs {asked.num_devices} devices, but count is {count}")
        found = [plan_layout(config, card, memory, demand, profile, asked, text.rules)]
    else:
        found = []
        for candidate in sensible_meshes(config, count):
            try:
                found.append(plan_layout(config, card, memory, demand, profile, candidate, rules))
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
    least = max(demand.max_model_len or 0, demand.block_size)
    sequences = tokens // (-(-demand.length // demand.block_size) * demand.block_size)
    fits = tokens >= least
    held = dataclasses.replace(fixed, kv_cache=max(left // per_page, 0) * per_page)
    prefill: float | None = None
    points: tuple[DecodePoint, ...] = ()
    source, untimed = "datasheet", ""
    if fits:
        try:
            times = StepTimes(config, layout, mesh, weights, per_page / demand.block_size, dtype, card, profile)
            prefill = times.prefill(demand.input_len, demand.max_num_batched_tokens).total
            points = _decode_points(times, demand, sequences * partitions, mesh.num_replicas)
            source = "measured" if times.measured else "datasheet"
        except ValueError as error:  # a figure that nobody knows, messages that are not modelled: bytes still hold
            untimed = str(error)
    return LayoutPlan(
        mesh=mesh,
        rules=rules,
        fits=fits,
        reason=_reason(fits, fixed, memory, share, left, tokens * partitions, sequences * partitions, least, demand),
        bytes_per_device=held,
        available=available,
        kv_bytes_per_token=kv_bytes_per_token(config, kv_dtype),
        kv_tokens=tokens * partitions,
        sequences=sequences * partitions,
        prefill_seconds=prefill,
        decode=points,
        source=source,
        untimed=untimed,
    )


def _decode_points(times: StepTimes, demand: Demand, sequences: int, replicas: int) -> tuple[DecodePoint, ...]:
    """At half of the output, for every batch that is held at once, split equally over the replicas."""
    context = demand.input_len + demand.output_len / 2
    points = []
    for batch in demand.batch_sizes:
        if replicas <= batch <= sequences:
            step = times.decode(-(-batch // replicas), context)
            points.append(DecodePoint(batch, step.total, step.bound))
    return tuple(points)


def _reason(
    fits: bool,
    fixed: DeviceBytes,
    memory: int,
    share: float,
    left: int,
    tokens: int,
    sequences: int,
    least: int,
    demand: Demand,
) -> str:
    room = f"{share:.0%} of {show_bytes(memory)}"
    if left <= 0:
        return f"{fixed} without any page, more than {room}"
    if not fits:
        return f"{tokens:,} KV tokens are left in {room}, fewer than the {least:,} that are needed"
    if sequences < demand.max_num_seqs:
        return f"only {tokens:,} KV tokens are left: {sequences} sequences of {demand.length:,} at once"
    return f"{tokens:,} KV tokens are left"


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]
