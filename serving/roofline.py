"""Predicted times of steps: bytes, operations and messages over the speeds of a profile or of a datasheet.

The roofline of Williams, Waterman and Patterson (2009) with four roofs: memory, matrix unit, links and host.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from paddock.model import Dims, LlamaConfig, Stages
from paddock.sharding import Layout, MeshConfig
from paddock.sharding.accelerators import Accelerator
from paddock.sharding.islands import hop_leaves, span

from .chunk_budget import WEIGHT_BOUND
from .kv_cache import page_bytes
from .speed_profile import Curve, SpeedProfile
from .step_plan import finishes_read_rows
from .weights import Weights

# Rows of larger steps that a smaller one could be padded to.
PADDED = tuple(2**i for i in range(1, 9))


@dataclasses.dataclass(frozen=True)
class Seconds:
    """A step's time by what spends it; memory and matrix unit overlap within a product, the host with all of them.
    `wait`: when the device waits for the host, since there is no step before that would keep it busy."""

    memory: float = 0.0
    matrix: float = 0.0
    links: float = 0.0
    host: float = 0.0
    wait: float = 0.0

    @property
    def total(self) -> float:
        return max(self.memory + self.matrix + self.links, self.host) + self.wait

    def reading(self, memory: float) -> Seconds:
        """With so many seconds of memory more."""
        return dataclasses.replace(self, memory=self.memory + memory)

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
    dtype: str
    kv_dtype: str
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

    @functools.cached_property
    def kv_bytes(self) -> int:
        """Of a token on a device."""
        return page_bytes(Dims.of(self.model, self.layout), self.layout, 1, self.kv_dtype)

    @functools.cached_property
    def speeds(self) -> SpeedProfile:
        return self.profile.of_dtypes(self.weights.dtype, self.kv_dtype)

    @property
    def source(self) -> str:
        """`measured`; `datasheet`; or, where it is mixed, which parts have figures of a datasheet: products, attention,
        links, host. No datasheet knows a host, which then takes no time."""
        rules, speeds = self.layout.rules, self.speeds
        sent = [(speeds.all_reduce, rules.q_heads), (speeds.all_reduce, rules.mlp), (speeds.vocab, rules.vocab)]
        sent.append((speeds.hop, rules.layers))
        links = [self._measured(curves, axes) for curves, axes in sent if self.layout.size_of(axes) > 1]
        parts = {
            "products": (speeds.weights, speeds.layer, speeds.matrix.get(self.dtype)),
            "attention": (speeds.decode_attention, speeds.prefill_attention),
            "links": tuple(links),
            "host": (speeds.host,),
        }
        used = [name for name, curves in parts.items() if curves]
        unmeasured = [name for name in used if None in parts[name]]
        if unmeasured == used:
            return "datasheet"
        return f"datasheet {', '.join(unmeasured)}" if unmeasured else "measured"

    def decode(self, batch: int, context: float) -> Seconds:
        """One more token for each of `batch` sequences of `context` tokens.

        Over P stages that takes P ticks, in each of which every stage works on another group of batch / P sequences.
        """
        return self.decodes([batch], context)[0]

    def decodes(self, batches: Sequence[int], context: float) -> list[Seconds]:
        """`decode` of each of `batches`, none of which takes longer than a larger one."""
        ticks = self.stages.count
        rows = [-(-batch // ticks) for batch in batches]
        # The engine could add empty rows, so that no step takes longer than a larger one, whatever the curves say: as
        # when they are of an engine that had a step of one row, which has one of two instead today.
        sizes = sorted({*rows, *PADDED})
        steps, reads = [self._step(size) for size in sizes], [self._attention(size, context) for size in sizes]
        found = []
        for first in map(sizes.index, rows):
            attention = min(reads[first:])
            tick = min((step.reading(attention) for step in steps[first:]), key=lambda seconds: seconds.total)
            found.append(Seconds(*(ticks * part for part in dataclasses.astuple(tick))))
        return found

    def tick(self, rows: int, context: float) -> Seconds:
        """Of a step, or over stages of a tick, decoding `rows` sequences of `context` tokens, by the curves alone."""
        return self._step(rows).reading(self._attention(rows, context))

    def _step(self, rows: int) -> Seconds:
        """A tick of `rows` rows that decode, without attention."""
        memory, matrix = self._products(rows)
        return Seconds(memory + self._rest(rows, rows), matrix, self._links(rows, rows), self._host(rows))

    def _attention(self, rows: int, context: float) -> float:
        measured = self.speeds.decode_attention
        return rows * context * self.kv_bytes / (measured.at(rows) if measured else self._bandwidth)

    def prefill(self, tokens: int, chunk: int) -> Seconds:
        """A prompt alone, in chunks of at most `chunk` tokens that follow each other through the stages: one for each
        stage, where that leaves more than reading the weights costs."""
        stages = self.stages
        if stages.count > 1:
            chunk = min(chunk, max(-(-tokens // stages.count), WEIGHT_BOUND))
        chunks = -(-tokens // chunk)
        tick = self.chunk(tokens / chunks, tokens * (tokens + 1) / 2 / chunks)
        steps, host = chunks + stages.count - 1, self._host(1)
        return Seconds(steps * tick.memory, steps * tick.matrix, steps * tick.links, host=(steps - 1) * host, wait=host)

    def chunk(self, rows: float, pairs: float) -> Seconds:
        """Of a step, or over stages of a tick, with `rows` tokens of a prompt that see `pairs` tokens together; without
        the host."""
        memory, matrix = self._products(rows, head_rows=1)
        heads = self.model.num_heads // self.layout.num_shards("q_heads")
        # Scores and weighted values: 4 h operations for each pair of a token and one that it sees.
        attention = 4 * self.model.head_dim * heads * pairs * self.stages.num_slots / self._attention_rate(rows)
        return Seconds(memory + self._rest(rows, 1), matrix + attention, self._links(rows, 1))

    @property
    def _bandwidth(self) -> float:
        return self.speeds.copy or self.accelerator.memory_bandwidth

    def _products(self, rows: float, head_rows: float | None = None) -> tuple[float, float]:
        """Seconds of the layers' products and the head's, each under memory or matrix unit, whichever takes longer."""
        memory = matrix = 0.0
        speeds = self.speeds
        head_rows = rows if head_rows is None else head_rows
        parts = (
            (self.weights.layers, self.weights.layer_products, rows, speeds.weights),
            (self.weights.head, self.weights.head_products, head_rows, speeds.head or speeds.weights),
        )
        late = self._late_products * (rows - head_rows)
        for (num_bytes, products, count, measured), spared in zip(parts, (late, 0.0), strict=True):
            read = num_bytes / (measured.at(count) if measured else self._bandwidth)
            # Among the rows that were measured this is the whole time of a product, whatever bounds it.
            known = measured is not None and count <= measured.x[-1]
            multiply = 0.0 if known else 2 * (products * count - spared) / self._matrix_rate(count)
            memory += read if read >= multiply else 0.0
            matrix += multiply if multiply > read else 0.0
        return memory, matrix

    @property
    def _late_products(self) -> float:
        """A row's of the last MLP, where that is for rows that are read alone."""
        late = finishes_read_rows(self.stages, self.layout)
        return 3 * self.model.embed_dim * self.model.mlp_dim / self.layout.num_shards("mlp") if late else 0.0

    def _matrix_rate(self, rows: float) -> float:
        measured = self.speeds.matrix.get(self.dtype)
        return measured.at(rows) if measured else self.accelerator.matrix_rate(self.dtype)

    def _rest(self, rows: float, head_rows: float) -> float:
        """What was measured beside products and attention; memory's, since small kernels wait for it."""
        layer, step = self.speeds.layer, self.speeds.step
        return (self.stages.num_slots * layer.at(rows) if layer else 0.0) + (step.at(head_rows) if step else 0.0)

    def _host(self, rows: float) -> float:
        """The launch of each layer's kernels with it."""
        measured = self.speeds.host
        return measured.at(rows) + self.stages.num_slots * self.speeds.host_layer if measured else 0.0

    def _attention_rate(self, tokens: float) -> float:
        measured = self.speeds.prefill_attention
        return measured.at(tokens) if measured else self.accelerator.matrix_rate(self.dtype)

    def _links(self, rows: float, head_rows: float) -> float:
        """Two reductions of the residual stream a layer, one of embeddings, the logits' way, and on to the next stage.

        Sequence parallelism sends a reduction's bytes in two parts, which take as long.
        """
        rules = self.layout.rules
        row = self.model.embed_dim * jnp.dtype(self.dtype).itemsize
        seconds = sum(self._all_reduce(rows * row, axes) for axes in (rules.q_heads, rules.mlp))
        seconds *= self.stages.num_slots
        if (shards := self.layout.num_shards("vocab")) > 1:
            seconds += self._vocab(rows * row, head_rows, shards)
        if self.stages.count > 1:
            if (hop := self._measured(self.speeds.hop, rules.layers)) is not None:
                seconds += hop.at(rows * row)
            else:
                across = hop_leaves(self.mesh, rules.layers, self.accelerator.island)
                seconds += self.accelerator.send_seconds(rows * row, across=across)
        return seconds

    def _vocab(self, num_bytes: float, head_rows: float, shards: int) -> float:
        """Once a step: a reduction of embeddings, and logits become whole rows."""
        axes = self.layout.rules.vocab
        if (measured := self._measured(self.speeds.vocab, axes)) is not None:
            return measured.at(head_rows)
        across = span(self.mesh, axes, self.accelerator.island)[1] > 1
        logits = head_rows * self.model.vocab_size * 4 / shards
        sent = self.accelerator.send_seconds(logits * (shards - 1) / shards, across=across)
        return self._all_reduce(num_bytes, axes) + sent

    def _measured(self, curves: Mapping[int, Curve], axes: tuple[str, ...]) -> Curve | None:
        """The curve of as many devices as `axes` join, where they all lie in an island."""
        size, islands = span(self.mesh, axes, self.accelerator.island)
        return curves.get(size) if islands == 1 else None

    def _all_reduce(self, num_bytes: float, axes: tuple[str, ...]) -> float:
        size, islands = span(self.mesh, axes, self.accelerator.island)
        if size == 1:
            return 0.0
        if (measured := self._measured(self.speeds.all_reduce, axes)) is not None:
            return measured.at(num_bytes)
        return self.accelerator.all_reduce_seconds(num_bytes, size, islands)
