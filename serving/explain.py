"""A layout said in full: logical axis -> mesh axis -> shapes -> bytes per device -> collectives. No step is run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from paddock.model import slot_specs
from paddock.sharding import ArraySpec, Layout, MeshConfig, Total, read_collectives, summarize
from paddock.sharding.memory import DeviceBytes, show_bytes

from .bucket import Bucket
from .kv_cache import cache_spec
from .programs import Programs
from .text_table import text_table


@dataclasses.dataclass(frozen=True)
class ArrayKind:
    """`count` equal arrays: how one is split, and the bytes of all on each device. `kind` as in DeviceBytes."""

    kind: str
    name: str
    count: int
    spec: ArraySpec
    shards: tuple[int, ...]
    num_bytes: int

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(size // shards for size, shards in zip(self.spec.shape, self.shards, strict=True))

    @property
    def axes(self) -> str:
        return " ".join(axis or "-" for axis in self.spec.axes)


def step_buckets(programs: Programs) -> dict[str, Bucket]:
    """The largest step that decodes alone and the largest of prompts alone; both are the one step that there is where
    an engine is deterministic."""
    table = programs.buckets
    if table.single:
        return dict.fromkeys(("decode", "prefill"), table.all()[0])
    return {
        "decode": Bucket(table.decodes[-1], 0, 0, table.full),
        "prefill": Bucket(0, table.chunk_tokens[-1], table.max_chunks, table.full),
    }


def array_kinds(programs: Programs) -> list[ArrayKind]:
    """Weights by name with layers taken together, the page pools, and what else persists."""
    plan, layout = programs.plan, programs.plan.layout
    groups: dict[tuple[str, str], list[ArraySpec]] = {}
    for name, spec in slot_specs(plan.config, layout, plan.dtype).items():
        groups.setdefault(("weights", re.sub(r"^layers\.\d+\.", "layers.*.", name)), []).append(spec)
    groups["kv_cache", "pages"] = [page_spec(programs)] * 2 * plan.stages.num_slots
    for name, spec in _state(plan.state_specs()):
        groups["state", name] = [spec]
    return [
        ArrayKind(kind, name, len(specs), specs[0], layout.shards(specs[0]), sum(map(layout.bytes_per_device, specs)))
        for (kind, name), specs in groups.items()
    ]


def device_bytes(kinds: list[ArrayKind], temp: int = 0) -> DeviceBytes:
    totals = {kind: sum(k.num_bytes for k in kinds if k.kind == kind) for kind in ("weights", "kv_cache", "state")}
    return DeviceBytes(**totals, temp=temp)


def page_spec(programs: Programs) -> ArraySpec:
    """One layer slot's pool of keys, or of values."""
    plan = programs.plan
    spec = cache_spec(plan.dims, programs.num_pages * plan.num_partitions, plan.page_size, plan.dtype)
    if plan.stages.count == 1:
        return spec
    return dataclasses.replace(spec, shape=(plan.stages.count, *spec.shape), axes=("layers", *spec.axes))


def step_collectives(compiled: jax.stages.Compiled) -> list[Total]:
    return summarize(read_collectives(compiled.as_text() or ""), by_part=True)


def temp_bytes(compiled: jax.stages.Compiled) -> int:
    """What a step allocates on each device while it runs, as the compiler planned it."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("this backend does not tell what memory a program needs")
    return analysis.temp_size_in_bytes


def slices(programs: Programs) -> list[dict[str, Any]]:
    """Which device holds which slice of the weights, a page pool and the state, each layer's like the first one's, as
    plain values: for each device [start, stop] of every dimension."""
    plan, layout = programs.plan, programs.plan.layout
    weights = slot_specs(plan.config, layout, plan.dtype)
    specs = {name: spec for name, spec in weights.items() if not re.match(r"layers\.(?!0\.)", name)}
    specs |= {"pages": page_spec(programs), **dict(_state(plan.state_specs()))}
    return [_slices(name, spec, layout) for name, spec in specs.items()]


def _slices(name: str, spec: ArraySpec, layout: Layout) -> dict[str, Any]:
    held: Mapping[Any, tuple[slice, ...]] = layout.place(spec).devices_indices_map(spec.shape)
    return {
        "name": name,
        "axes": [axis or "" for axis in spec.axes],
        "shape": list(spec.shape),
        "shards": list(layout.shards(spec)),
        "devices": {
            str(device.id): [list(part.indices(size)[:2]) for part, size in zip(index, spec.shape, strict=True)]
            for device, index in held.items()
        },
    }


def explain(mesh: MeshConfig, programs: Programs, compiled: Mapping[Bucket, jax.stages.Compiled]) -> str:
    """The whole text. `mesh` is all of it, `programs` are those of one replica, and `compiled` holds the steps to read
    collectives from."""
    kinds = array_kinds(programs)
    temp = max(map(temp_bytes, compiled.values()))
    parts = [
        _title(mesh, programs),
        text_table(("logical axis", "mesh axes", "shards"), _axes(programs.plan.layout)),
        text_table(
            ("kind", "array", "count", "axes", "shape", "on each device", "bytes per device"),
            [
                (k.kind, k.name, k.count, k.axes, list(k.spec.shape), list(k.local_shape), show_bytes(k.num_bytes))
                for k in kinds
            ],
        ),
        f"On each device: {device_bytes(kinds, temp)}"
        + (" (XLA's CPU compiler asks for far more temp than a GPU's)" if _on_cpu(programs.plan.layout) else ""),
    ]
    return "\n\n".join([*parts, *(_collectives(bucket, program) for bucket, program in compiled.items())])


def _title(mesh: MeshConfig, programs: Programs) -> str:
    plan, replicas = programs.plan, mesh.num_replicas
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.axes)
    of_one = f" in {replicas} replicas; what follows is of one" if replicas > 1 else ""
    stages = f", {plan.stages.count} stages of {plan.stages.num_slots} layers" if plan.stages.count > 1 else ""
    where = f"mesh {sizes} ({mesh.num_devices} devices{of_one})" if mesh.num_devices > 1 else "one device"
    return f"{where}, {plan.config.num_layers} layers{stages}, {plan.dtype}"


def _axes(layout: Layout) -> Iterator[tuple[str, str, int]]:
    for field in dataclasses.fields(layout.rules):
        mesh_axes = getattr(layout.rules, field.name)
        yield field.name, "+".join(mesh_axes) or "(whole)", layout.size_of(mesh_axes)


def _collectives(bucket: Bucket, compiled: jax.stages.Compiled) -> str:
    totals, name = step_collectives(compiled), _step_name(bucket)
    if not totals:
        return f"{name}: no collectives"
    rows = [
        ((t.part or "(other)") + (" (in a loop)" if t.in_loop else ""), t.kind, t.count, t.group_size, *_sizes(t))
        for t in totals
    ]
    count, sent = sum(t.count for t in totals), sum(t.sent_bytes for t in totals)
    head = ("part", "collective", "count", "devices", "bytes", "sent by each")
    return f"{name}: {count} collectives, each device sends {show_bytes(sent)}\n" + text_table(head, rows)


def _step_name(bucket: Bucket) -> str:
    prompts = f"{bucket.chunk_tokens} tokens in at most {bucket.chunks} prompts"
    if not bucket.chunk_tokens:
        return f"decode step of {bucket.decodes} sequences"
    return f"step of {bucket.decodes} sequences and {prompts}" if bucket.decodes else f"prefill step of {prompts}"


def _sizes(total: Total) -> tuple[str, str]:
    return show_bytes(total.num_bytes), show_bytes(total.sent_bytes)


def _on_cpu(layout: Layout) -> bool:
    return layout.mesh.devices.flat[0].platform == "cpu"


def _state(state: Any, prefix: str = "") -> Iterator[tuple[str, ArraySpec]]:
    for name, value in state._asdict().items():
        if isinstance(value, ArraySpec):
            yield prefix + name, value
        elif value is not None:
            yield from _state(value, f"{name}.")
