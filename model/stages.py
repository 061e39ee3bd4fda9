"""Layers over pipeline stages: which stage holds which, and the arrays that all stages hold alike.

Stage s of P holds layers s*J to s*J + J-1, with J = ceil(L / P). Layer *slot* j is then one array [P, ...] of which
each stage holds its own layer. Where P does not divide L the last slots are zeros: such a layer adds nothing to the
residual stream, because its output projections are zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from paddock.sharding import ArraySpec, Layout

from .config import LlamaConfig
from .params import param_specs

PREFIX = "layers."


@dataclasses.dataclass(frozen=True)
class Stages:
    """The stages of a model in a layout; one stage without a split of the layers."""

    num_layers: int
    count: int

    @classmethod
    def of(cls, config: LlamaConfig, layout: Layout) -> Stages:
        """Raises ValueError when there are more stages than layers."""
        count = layout.num_shards("layers")
        if count > config.num_layers:
            raise ValueError(
                f"layers of size {config.num_layers} does not divide over {'+'.join(layout.rules.layers)} ({count} "
                f"stages); at most {config.num_layers} stages can hold a layer each"
            )
        return cls(config.num_layers, count)

    @property
    def num_slots(self) -> int:
        """Layers per stage J, the padding of the last ones included."""
        return -(-self.num_layers // self.count)

    def layer(self, stage: int, slot: int) -> int | None:
        """The layer in a stage's slot, None where there is none left."""
        index = stage * self.num_slots + slot
        return index if index < self.num_layers else None


def placements(config: LlamaConfig, layout: Layout, dtype: Any = None) -> dict[str, NamedSharding]:
    """Where each array of `param_specs` is loaded to: a layer's to its own stage, the others to the whole mesh."""
    stages = Stages.of(config, layout)
    homes = [layout.stage(s) for s in range(stages.count)] if stages.count > 1 else [layout]
    found = {}
    for name, spec in param_specs(config, layout, dtype).items():
        is_layer = name.startswith(PREFIX)
        home = homes[int(name.split(".")[1]) // stages.num_slots] if is_layer else layout
        found[name] = home.place(spec)
    return found


def slot_specs(config: LlamaConfig, layout: Layout, dtype: Any = None) -> dict[str, ArraySpec]:
    """The arrays that a step takes: those of `param_specs`, with layers stacked into slots over several stages."""
    specs, stages = param_specs(config, layout, dtype), Stages.of(config, layout)
    if stages.count == 1:
        return specs
    found = {name: spec for name, spec in specs.items() if not name.startswith(PREFIX)}
    for name, spec in specs.items():
        if name.startswith(PREFIX) and int(name.split(".")[1]) < stages.num_slots:
            found[name] = ArraySpec((stages.count, *spec.shape), spec.dtype, ("layers", *spec.axes))
    return found


def stack_stages(config: LlamaConfig, layout: Layout, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Layers loaded by `placements` as the arrays of `slot_specs`; each device's piece stays where it is.

    `params` may lack arrays that no device of this process holds.
    """
    stages = Stages.of(config, layout)
    if stages.count == 1:
        return dict(params)
    homes = [layout.stage(s) for s in range(stages.count)]
    dtype = next(iter(params.values())).dtype
    layer_specs = param_specs(config, layout, dtype)
    stacked = {}
    for name, spec in slot_specs(config, layout, dtype).items():
        if not name.startswith(PREFIX):
            stacked[name] = params[name]
            continue
        _, slot, kind = name.split(".")
        pieces = []
        for stage, home in enumerate(homes):
            layer = stages.layer(stage, int(slot))
            if layer is not None:
                source = params.get(f"{PREFIX}{layer}.{kind}")
                shards = [] if source is None else source.addressable_shards
                pieces += [_lift(shard.data) for shard in shards]
            else:
                place = home.place(layer_specs[name])
                shape = (1, *place.shard_shape(layer_specs[name].shape))
                pieces += [jax.device_put(np.zeros(shape, spec.dtype), d) for d in place.addressable_devices]
        stacked[name] = jax.make_array_from_single_device_arrays(spec.shape, layout.place(spec), pieces)
    return stacked


@jax.jit
def _lift(piece: jax.Array) -> jax.Array:
    return jnp.expand_dims(piece, 0)
