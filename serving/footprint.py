"""What an engine needs on each device in a given layout, and the refusal of a layout that has less."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import psutil

from paddock.model import Dims, LlamaConfig, Stages, param_specs
from paddock.model.stages import PREFIX
from paddock.sharding import ArraySpec, Layout, MeshConfig
from paddock.sharding.memory import DeviceBytes, PlannedLayout, count_bytes, show_bytes, smallest_meshes

from .kv_cache import page_bytes

# Prompts, or pieces of prompts, that a step takes at most: a large step should be full of short ones too, and each has
# a row among those that the last layer ends with, whether there is such a prompt or not.
MAX_CHUNKS = 64
# What an accelerator loses to libraries, graphs and fragments beside the arrays.
SLACK = 2**30
LARGEST_MESH = 1024


@dataclasses.dataclass(frozen=True)
class Footprint:
    """An engine that is not there yet: a model and the sizes that its memory depends on, but for the layout."""

    model: LlamaConfig
    dtype: str
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    slack: int = 0

    def of(self, layout: Layout, num_pages: int) -> DeviceBytes:
        """Bytes per device with `num_pages` pages in each partition. Raises ValueError naming an axis that does not
        divide."""
        dims, stages = Dims.of(self.model, layout), Stages.of(self.model, layout)
        itemsize = jnp.dtype(self.dtype).itemsize
        rows = (self.max_num_seqs + self.max_num_batched_tokens) // layout.num_shards("batch")
        in_flight = rows * self.model.embed_dim * itemsize
        slots, table = self.max_num_seqs, -(-self.max_model_len // self.page_size)
        return DeviceBytes(
            weights=count_bytes(layout, weight_counts(self.model, layout, self.dtype)),
            kv_cache=num_pages * page_bytes(dims, layout, self.page_size, self.dtype),
            # The sampler keeps counts, flags and biases over the vocabulary.
            state=slots * (9 * dims.vocab + 4 * table + 4) + (in_flight if stages.count > 1 else 0),
            temp=self._step_bytes(layout, dims, itemsize) + self.slack,
        )

    def least(self, layout: Layout, tokens: int) -> DeviceBytes:
        """With pages for `tokens` tokens and the scratch page."""
        return self.of(layout, -(-tokens // self.page_size) + 1)

    def _step_bytes(self, layout: Layout, dims: Dims, itemsize: int) -> int:
        """An upper estimate of what a step allocates: activations, logits, and weights that are gathered for use."""
        model, rules = self.model, layout.rules
        mlp = -(-model.mlp_dim // layout.num_shards("mlp"))
        activations = self.max_num_batched_tokens * 4 * (model.embed_dim + mlp) * itemsize
        rows, shards = self.max_num_seqs + MAX_CHUNKS, layout.num_shards("vocab")
        logits = 8 * -(-rows // shards) * dims.vocab * 4
        gathered = 0
        if set(rules.embed).intersection(rules.tokens):
            specs = [spec for spec, _ in weight_counts(model, layout, self.dtype)]
            gathered = 2 * max(layout.bytes_per_device(spec) for spec in specs) * layout.num_shards("embed")
        return activations + logits + gathered


def weight_counts(model: LlamaConfig, layout: Layout, dtype: str) -> list[tuple[ArraySpec, int]]:
    """The model's arrays on a device, each with how many it holds of it: layers are alike."""
    specs = param_specs(dataclasses.replace(model, num_layers=1), layout, dtype)
    slots = Stages.of(model, layout).num_slots
    return [(spec, slots if name.startswith(PREFIX) else 1) for name, spec in specs.items()]


def free_bytes(layout: Layout, num_devices: int) -> int | None:
    """Bytes free on each device of `layout`, None where a device does not tell. CPU devices, `num_devices` of them,
    share what RAM there is."""
    device = layout.mesh.local_devices[0]  # another process's does not tell
    if device.platform == "cpu":
        return psutil.virtual_memory().available // max(1, num_devices // jax.process_count())
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def refuse_too_large(
    footprint: Footprint, layout: Layout, tokens: int, available: int, *, shared: int | None = None
) -> None:
    """Raises ValueError when weights, step and pages for `tokens` tokens need more than `available` bytes per device,
    with the smallest layouts on which they fit. Where the devices are a CPU's, `shared` is what all have together."""
    need = footprint.least(layout, tokens)
    if need.fits(available):
        return
    model = footprint.model
    found = smallest_meshes(
        lambda mesh: footprint.least(PlannedLayout.of(mesh), tokens),
        lambda mesh: available if shared is None else shared // mesh.num_devices,
        tensor=[n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0],
        pipe=[n for n in range(1, model.num_layers + 1) if n <= LARGEST_MESH],
    )
    layouts = "; ".join(f"{mesh} ({show_bytes(needed.total)})" for mesh, needed in found)
    sizes = dict(layout.mesh.shape)
    raise ValueError(
        f"the model does not fit mesh {MeshConfig(tuple(sizes.items()))}: each device needs {need}, with pages for "
        f"{tokens} tokens, and {show_bytes(available)} are free. "
        + (f"The smallest meshes on which it fits: {layouts}" if found else "No mesh makes it fit")
    )
