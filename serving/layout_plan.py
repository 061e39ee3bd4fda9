"""What a plan says: the demand, and what becomes of it in each layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from paddock.sharding import MeshConfig
from paddock.sharding.accelerators import Accelerator
from paddock.sharding.memory import DeviceBytes

from .engine_config import GPU_TOKENS
from .plan_prove import Proof
from .weights import QUANTIZED

KV_DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "fp8_e4m3": "float8_e4m3fn", "int8": "int8"}
# Whose figure of the card's memory counts, and what lies in the share that may be used.
MEMORY = ("driver", "datasheet")


@dataclasses.dataclass(frozen=True)
class Demand:
    """What the engine is to hold and to serve. `memory`: `driver` counts as the engine does, with steps and libraries
    inside the used share of what the driver gives; `datasheet` as the back of an envelope does, with weights and pages
    alone inside it and the steps in the rest. `max_num_seqs` and `max_num_batched_tokens` are of each replica, as in
    the engine, whose replicas are engines of their own. Raises ValueError naming the field."""

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
            check_count(name, getattr(self, name))
        if self.max_model_len is not None:
            check_count("max_model_len", self.max_model_len)
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
        share = self.utilization
        if share is not None and not (isinstance(share, int | float) and 0 < share <= 1):
            raise ValueError(f"utilization must be a number in (0, 1], got {share!r}")

    @property
    def length(self) -> int:
        """Tokens of a sequence at its end."""
        return self.input_len + self.output_len

    @property
    def longest(self) -> int:
        """Tokens of a sequence that the cache must hold: less, and not one of those asked for is served."""
        return self.max_model_len or self.length

    def sequences(self, tokens: int) -> int:
        """How many `tokens` KV tokens hold, in whole pages, at their end."""
        return tokens // (-(-self.length // self.block_size) * self.block_size)

    def batch_sizes(self, held: int) -> list[int]:
        """Of a replica whose cache holds `held` sequences: powers of two, and the most that run at once."""
        most = min(held, self.max_num_seqs)
        return sorted({*(2**i for i in range(most.bit_length())), most})


@dataclasses.dataclass(frozen=True)
class DecodePoint:
    """`seconds` until each of `batch` sequences of all replicas together has one more token; `bound`: memory, matrix,
    links or host."""

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

    `source` of the times: `measured` when every figure was measured on that accelerator, else `datasheet`, with the
    parts that have such figures where others were measured; empty without times. Where they are not predicted of a
    layout that fits, `untimed` says why.
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
            "mesh": mesh_text(self.mesh),
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
            "source": self.source or None,
            "untimed": self.untimed or None,
            "rules": self.rules,
            "sequences": self.sequences,
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
            if layout.prefill_seconds is None or (ttft is not None and layout.prefill_seconds > ttft):
                continue
            points = [point for point in layout.decode if itl is None or point.seconds <= itl]
            if points:
                found.append((layout, max(points, key=lambda point: point.tokens_per_second)))
        return sorted(found, key=lambda pair: pair[0].num_devices / pair[1].tokens_per_second)

    def to_json(self, *, ttft: float | None = None, itl: float | None = None) -> dict[str, Any]:
        """One JSON object, with who keeps to these seconds, cheapest first; a layout `meets` them or does not, and is
        not asked without any."""
        met = {layout.mesh: point.batch for layout, point in self.meeting(ttft=ttft, itl=itl)}
        asked = ttft is not None or itl is not None
        return {
            "model": self.model,
            "accelerator": self.accelerator.name,
            "count": self.count,
            "layouts": [layout.to_json() | {"meets": layout.mesh in met if asked else None} for layout in self.layouts],
            "objectives": {
                "ttft_seconds": ttft,
                "itl_seconds": itl,
                "cheapest": [{"mesh": mesh_text(mesh), "batch": batch} for mesh, batch in met.items()],
            },
        }


def check_count(name: str, value: object) -> None:
    """Raises ValueError naming what is no whole number from 1 on."""
    if not isinstance(value, int):
        raise ValueError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def mesh_text(mesh: MeshConfig) -> str:
    """In the flag's spelling, in which one device is empty."""
    return str(mesh) if mesh.axes else ""
