"""Predicted times of steps: bytes, operations and messages over the speeds of a profile or of a datasheet.

The roofline of Williams, Waterman and Patterson (2009) with four roofs: memory, matrix unit, links and host.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from paddock.model import LlamaConfig, Stages, param_specs
from paddock.model.stages import PREFIX
from paddock.sharding import ArraySpec, Layout, MeshConfig
from paddock.sharding.accelerators import Accelerator

from .speed_profile import SpeedProfile

PRODUCTS = ("qkv", "out", "gate_up", "down")
# Bytes of a weight in the matrix products, by what they are quantized to; sums and scales stay as they are.
QUANTIZED = {"int8": 1, "fp8": 1}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Bytes and multiplications on a device: `layers` of all its layer slots, `head` of its piece of the head, `total`
    of everything that it holds. Multiplications are for one row."""

    layers: int
    head: int
    total: int
    layer_products: int
    head_products: int

    @classmethod
    def of(cls, model: LlamaConfig, layout: Layout, dtype: str, quantization: str | None) -> Weights:
        """Raises ValueError naming an axis that does not divide."""
        slots = Stages.of(model, layout).num_slots
        layers = head = total = layer_products = head_products = 0
        for name, spec in param_specs(dataclasses.replace(model, num_layers=1), layout, dtype).items():
            count = _elements(layout, spec)
            size = count * spec.dtype.itemsize
            base = name.removeprefix(f"{PREFIX}0.")
            if base in PRODUCTS and quantization:
                size = count * QUANTIZED[quantization] + 4 * count // _contracted(base, spec)
            if name.startswith(PREFIX):
                layers += slots * size
                layer_products += slots * count * (base in PRODUCTS)
            elif name == ("embed" if model.tie_embeddings else "head"):
                head, head_products = size, count
                total += size
            else:
                total += size
        return cls(layers, head, total + layers, layer_products, head_products)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """A step's time by what spends it; memory and matrix unit overlap within a product, the host with all of them."""

    memory: float = 0.0
    matrix: float = 0.0
    links: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return max(self.memory + self.matrix + self.links, self.host)

    @property
    def bound(self) -> str:
        parts = {"memory": self.memory, "matrix": self.matrix, "links": self.links}
        return "host" if self.host > sum(parts.values()) else max(parts, key=lambda name: parts[name])


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Times of one replica's steps in a layout; `mesh` is the whole one, since it says who shares an island.

    What is sent where weights are split along embed or head_dim, or sequences over devices, is not modelled: such a
    layout raises ValueError.
    """

    model: LlamaConfig
    layout: Layout
    mesh: MeshConfig
    weights: Weights
    kv_bytes: float
    dtype: str
    accelerator: Accelerator
    profile: SpeedProfile

    def __post_init__(self) -> None:
        rules = self.layout.rules
        for name in ("embed", "batch", "head_dim"):
            if self.layout.num_shards(name) > 1:
                raise ValueError(f"times are not predicted for layouts that split {name}")
        if self.layout.size_of(rules.tokens) > 1 and rules.tokens not in (rules.q_heads, rules.mlp):
            raise ValueError("times are not predicted for layouts that split tokens otherwise than heads or mlp")

    @functools.cached_property
    def stages(self) -> Stages:
        return Stages.of(self.model, self.layout)

    @property
    def measured(self) -> bool:
        """Whether no figure comes from a datasheet."""
        rules = self.layout.rules
        split = {axes for axes in (rules.q_heads, rules.mlp, rules.vocab) if self.layout.size_of(axes) > 1}
        sizes = {_group(self.mesh, axes, self.accelerator.island) for axes in split}
        known = all(islands == 1 and size in self.profile.all_reduce for size, islands in sizes)
        return self.profile.knows_steps and self.dtype in self.profile.matrix and known and self.stages.count == 1

    def decode(self, batch: int, context: float) -> Seconds:
        """One more token for each of `batch` sequences of `context` tokens.

        Over P stages that takes P ticks, in each of which every stage works on another group of batch / P sequences.
        """
        ticks = self.stages.count
        rows = -(-batch // ticks)
        memory, matrix = self._products(rows)
        attention = rows * context * self.kv_bytes / (self.profile.decode_attention or self._bandwidth)
        tick = Seconds(
            memory + attention + self._rest(rows),
            matrix,
            self._links(rows, rows),
            self.profile.host.at(rows) if self.profile.host else 0.0,
        )
        return Seconds(*(ticks * part for part in dataclasses.astuple(tick)))

    def prefill(self, tokens: int, chunk: int) -> Seconds:
        """A prompt alone, in chunks of at most `chunk` tokens that follow each other through the stages."""
        stages, chunks = self.stages, -(-tokens // chunk)
        rows = tokens / chunks
        memory, matrix = self._products(rows, head_rows=1)
        heads = self.model.num_heads // self.layout.num_shards("q_heads")
        # Scores and weighted values: 4 h operations for each pair of a token and one that it sees.
        pairs = tokens * (tokens + 1) / 2 / chunks
        attention = 4 * self.model.head_dim * heads * pairs * stages.num_slots / self._attention_rate(tokens)
        steps = chunks + stages.count - 1
        host = self.profile.host.at(1) if self.profile.host else 0.0
        parts = (memory + self._rest(rows), matrix + attention, self._links(rows, 1), host)
        return Seconds(*(steps * part for part in parts))

    @property
    def _bandwidth(self) -> float:
        return self.accelerator.memory_bandwidth

    def _products(self, rows: float, head_rows: float | None = None) -> tuple[float, float]:
        """Seconds of the layers' products and the head's, each under memory or matrix unit, whichever takes longer."""
        memory = matrix = 0.0
        bandwidth = self.profile.weights.at(rows) if self.profile.weights else self._bandwidth
        rate = self.profile.matrix.get(self.dtype) or self.accelerator.matrix_rate(self.dtype)
        head_rows = rows if head_rows is None else head_rows
        parts = (
            (self.weights.layers, self.weights.layer_products, rows),
            (self.weights.head, self.weights.head_products, head_rows),
        )
        for num_bytes, products, count in parts:
            read, multiply = num_bytes / bandwidth, 2 * products * count / rate
            memory += read if read >= multiply else 0.0
            matrix += multiply if multiply > read else 0.0
        return memory, matrix

    def _rest(self, rows: float) -> float:
        """What was measured of a layer beside products and attention; memory's, since small kernels wait for it."""
        return self.stages.num_slots * self.profile.layer.at(rows) if self.profile.layer else 0.0

    def _attention_rate(self, tokens: int) -> float:
        measured = self.profile.prefill_attention
        return measured.at(tokens) if measured else self.accelerator.matrix_rate(self.dtype)

    def _links(self, rows: float, head_rows: float) -> float:
        """Two reductions of the residual stream a layer, one of embeddings, the logits' way, and on to the next stage.

        Sequence parallelism sends a reduction's bytes in two parts, which take as long.
        """
        rules = self.layout.rules
        row = self.model.embed_dim * jnp.dtype(self.dtype).itemsize
        seconds = sum(self._all_reduce(rows * row, axes) for axes in (rules.q_heads, rules.mlp))
        seconds *= self.stages.num_slots
        seconds += self._all_reduce(rows * row, rules.vocab)
        if (shards := self.layout.num_shards("vocab")) > 1:
            across = _group(self.mesh, rules.vocab, self.accelerator.island)[1] > 1
            logits = head_rows * self.model.vocab_size * 4 / shards
            seconds += self.accelerator.send_seconds(logits * (shards - 1) / shards, across=across)
        if self.stages.count > 1:
            across = _hop_leaves(self.mesh, rules.layers, self.accelerator.island)
            seconds += self.accelerator.send_seconds(rows * row, across=across)
        return seconds

    def _all_reduce(self, num_bytes: float, axes: tuple[str, ...]) -> float:
        size, islands = _group(self.mesh, axes, self.accelerator.island)
        if size == 1:
            return 0.0
        if islands == 1 and size in self.profile.all_reduce:
            return self.profile.all_reduce[size].at(num_bytes)
        return self.accelerator.all_reduce_seconds(num_bytes, size, islands)


def kv_bytes_per_token(model: LlamaConfig, dtype: str) -> int:
    """Keys and values of all layers, without what a layout repeats."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(dtype).itemsize


def _elements(layout: Layout, spec: ArraySpec) -> int:
    shards = layout.shards(spec)
    if any(size % n for size, n in zip(spec.shape, shards, strict=True)):
        layout.place(spec)  # says which
    return math.prod(spec.shape) // math.prod(shards)


def _contracted(name: str, spec: ArraySpec) -> int:
    """Over how many inputs a product sums: each of its outputs has a scale."""
    return math.prod(spec.shape[:-1]) if name == "out" else spec.shape[0]


def _grid(mesh: MeshConfig, axes: tuple[str, ...], island: int) -> Iterator[tuple[int, ...]]:
    """For each group of devices that `axes` distinguish, in which islands they are; devices fill islands in order."""
    names = list(mesh.sizes)
    ids = np.arange(mesh.num_devices).reshape(tuple(mesh.sizes.values())) // island
    ids = np.moveaxis(ids, [names.index(axis) for axis in axes], range(len(axes)))
    return map(tuple, ids.reshape(math.prod(mesh.sizes[axis] for axis in axes), -1).T.tolist())


@functools.lru_cache(maxsize=4096)
def _group(mesh: MeshConfig, axes: tuple[str, ...], island: int) -> tuple[int, int]:
    """How many devices `axes` join, and over how many islands the widest such group lies."""
    axes = tuple(axis for axis in axes if axis in mesh.sizes)
    if not axes:
        return 1, 1
    groups = list(_grid(mesh, axes, island))
    return len(groups[0]), max(len(set(group)) for group in groups)


@functools.lru_cache(maxsize=4096)
def _hop_leaves(mesh: MeshConfig, axes: tuple[str, ...], island: int) -> bool:
    """Whether some stage's next one, the first after the last, is in another island."""
    return any(a != b for group in _grid(mesh, axes, island) for a, b in zip(group, group[1:] + group[:1], strict=True))
