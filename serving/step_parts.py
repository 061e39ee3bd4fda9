"""Where a decode step's time goes, part by part, each beside the least that it could take."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax

from paddock.sharding.accelerators import Accelerator, accelerators
from paddock.sharding.collectives import KINDS

from .executor import Executor
from .kv_cache import kv_bytes_per_token
from .step_trace import StepTrace
from .text_table import text_table
from .weights import PRODUCTS

# Scopes of model and step, in the order in which a layer runs; the innermost counts.
PARTS = ("embed", "norm", "qkv", "rope", "append", "attend", "out", "gate_up", "down", "stages", "head", "sample")
COLLECTIVES, RESIDUAL, OTHER, UNATTRIBUTED = "collectives", "residual", "other", "unattributed"
# The compiler's by what they are, for they bear the scope of what they sum; ours by the function that launches them.
_COLLECTIVE = re.compile(rf"\b(?:{'|'.join(KINDS)})(?:-start|-done)?\(|\bjit\(all_reduce")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"calls=%?([\w.-]+)")
_OPERAND = re.compile(r"\((?:[^()%]*)%([\w.-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Kernels of ours carry their own name, whichever instruction they are launched for.
_MOSAIC = re.compile(r"([\w.-]+)/mpmd_map$")


@dataclasses.dataclass(frozen=True)
class Part:
    """`kernels` and `seconds` a step; `floor` in seconds is None where nothing but activations is read."""

    name: str
    kernels: float
    seconds: float
    share: float
    floor: float | None

    @property
    def row(self) -> tuple[Any, ...]:
        floor = None if self.floor is None else self.floor * 1e6
        of_floor = None if not floor or not self.seconds else f"{100 * floor / (self.seconds * 1e6):.0f}%"
        return self.name, round(self.kernels, 1), self.seconds * 1e6, f"{100 * self.share:.1f}%", floor, of_floor


def part_of_instruction(hlo_text: str) -> dict[str, str]:
    """The part of each instruction of a compiled step, by its scopes, and of our kernels by their names. An instruction
    without scopes is where most of what it calls is, or else what it works on. Collectives are a part of their own, in
    which devices wait for each other."""
    parts: dict[str, str] = {}
    inside: dict[str, Counter[str]] = {}
    computation = ""
    for line in hlo_text.splitlines():
        if start := _COMPUTATION.match(line):
            computation = start[1]
        if not (found := _INSTRUCTION.match(line)):
            continue
        name, text = found[1], found[2]
        part = _known_part(text, parts, inside)
        if part is None:
            continue
        parts[name] = part
        inside.setdefault(computation, Counter())[part] += 1
        if (scopes := _OP_NAME.search(text)) and (ours := _MOSAIC.search(scopes[1])):
            parts[f"{ours[1]}_mosaic_gpu_kernel"] = part
    return parts


def _known_part(text: str, parts: Mapping[str, str], inside: Mapping[str, Counter[str]]) -> str | None:
    if _COLLECTIVE.search(text):
        return COLLECTIVES
    if scopes := _OP_NAME.search(text):
        return _part(scopes[1])
    if (called := _CALLED.search(text)) and called[1] in inside:
        return inside[called[1]].most_common(1)[0][0]
    operand = _OPERAND.search(text)
    return parts.get(operand[1]) if operand else None


def _part(op_name: str) -> str:
    scopes = op_name.split("/")
    if inner := next((scope for scope in reversed(scopes) if scope in PARTS), None):
        return inner
    return RESIDUAL if any(re.fullmatch(r"layer\d+", scope) for scope in scopes) else OTHER


def parts_of(trace: StepTrace, parts: Mapping[str, str], floors: Mapping[str, float]) -> list[Part]:
    """Kernels are told apart by the instruction that they were launched for. Those in a CUDA graph carry none: a name
    that other kernels of the trace have shares its time out as theirs, any other may be an instruction's own."""
    by_name = {name.replace(".", "_").replace("-", "_"): part for name, part in parts.items()}
    seen: dict[str, dict[str, list[float]]] = {}
    unnamed: dict[str, list[float]] = {}
    for kernel in trace.kernels:
        part = parts.get(kernel.op)
        where = unnamed if part is None else seen.setdefault(kernel.name, {})
        _add(where, kernel.name if part is None else part, 1, kernel.busy_ns * 1e-9)
    counts: dict[str, list[float]] = {}
    for shares in seen.values():
        for part, (number, seconds) in shares.items():
            _add(counts, part, number, seconds)
    for name, (number, seconds) in unnamed.items():
        shares = seen.get(name) or {by_name.get(name, UNATTRIBUTED): [1, 1.0]}
        whole = [sum(share) for share in zip(*shares.values(), strict=True)]
        for part, share in shares.items():
            _add(counts, part, number * share[0] / whole[0], seconds * share[1] / (whole[1] or 1))
    total, steps = sum(seconds for _, seconds in counts.values()), trace.num_steps
    order = [*PARTS, COLLECTIVES, RESIDUAL, OTHER, UNATTRIBUTED]
    return [
        Part(name, counts[name][0] / steps, counts[name][1] / steps, counts[name][1] / total, floors.get(name))
        for name in order
        if name in counts
    ]


def _add(counts: dict[str, list[float]], name: str, number: float, seconds: float) -> None:
    one = counts.setdefault(name, [0, 0.0])
    one[0] += number
    one[1] += seconds


def part_floors(executor: Executor, rows: int, context: float) -> dict[str, float]:
    """Seconds of each part that reads weights or cache: bytes over bandwidth or operations over rate of the device's
    entry in the accelerator table, whichever is more. Empty for a device that is not there."""
    plan = executor.plan
    card = _card(plan.layout.mesh.devices.flat[0])
    if card is None:
        return {}
    sizes: dict[str, list[float]] = {}
    head = "head" if "head" in executor.params else "embed"
    for name, array in executor.params.items():
        kind = "head" if name == head else name.rpartition(".")[2]
        if kind in PRODUCTS or kind == "head":
            count = math.prod(array.sharding.shard_shape(array.shape))
            one = sizes.setdefault(kind, [0.0, 0.0])
            one[0] += count * array.dtype.itemsize
            one[1] += 2 * rows * count
    cached = kv_bytes_per_token(plan.config, plan.dtype) / plan.layout.num_shards("q_heads")
    rate = card.matrix_rates.get(plan.dtype, math.inf)
    floors = {kind: max(size / card.memory_bandwidth, flops / rate) for kind, (size, flops) in sizes.items()}
    return floors | {"attend": rows * context * cached / card.memory_bandwidth}


def _card(device: jax.Device) -> Accelerator | None:
    return next((card for card in accelerators().values() if card.device_kind == device.device_kind), None)


def parts_table(parts: list[Part]) -> str:
    return text_table(("part", "kernels", "us a step", "share", "floor us", "of floor"), [part.row for part in parts])
