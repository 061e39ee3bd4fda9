"""What every executable of an engine has in common, and the state that they hand on."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from paddock.model import Dims, LlamaConfig, Stages
from paddock.sharding import ArraySpec, Layout

from .sampler import Sampled, SamplerState


class StepState(NamedTuple):
    """What lives on the device from step to step: per slot the newest token [S], the page table [S N] and the sampler's
    state; and between pipeline stages the rows on their way [stages, partitions, R, D], decoding rows first."""

    last_token: jax.Array
    page_table: jax.Array
    sampler: SamplerState
    between_stages: jax.Array | None


class StepOutput(NamedTuple):
    """What comes back: the sampled rows; for prompt_logprobs the chunks' hidden states [max chunk tokens, D] that
    `pipeline.finish_rows` takes (over stages [stages, max chunk tokens, D], the last of which counts); and where the
    sampler's slow half is a program of its own (`resample`) the logits [R V] for it."""

    sampled: Sampled
    hidden: jax.Array | None
    logits: jax.Array | None


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What every executable of an engine has in common; `plan_steps` makes it.

    `max_decodes` is the most decoding rows of a step.
    `add_norm`, `all_reduce`, `products`: see `step_products`.
    `deterministic`: decoding rows attend as chunks of one token do, since a preempted sequence's tokens come back so.
    """

    config: LlamaConfig
    layout: Layout
    dtype: str
    page_size: int
    num_slots: int
    max_decodes: int
    pages_per_seq: int
    max_chunk_tokens: int
    num_logprobs: int
    decode_attention: str
    prefill_attention: str
    branches: bool
    add_norm: str = "xla"
    all_reduce: str = "xla"
    products: str = "xla"
    deterministic: bool = False

    @property
    def dims(self) -> Dims:
        return Dims.of(self.config, self.layout)

    @property
    def stages(self) -> Stages:
        return Stages.of(self.config, self.layout)

    @property
    def num_partitions(self) -> int:
        """Pieces that the rule `batch` cuts the engine's sequences into."""
        return self.layout.num_shards("batch")

    @property
    def has_mailboxes(self) -> bool:
        """Whether devices write into each other's memory; steps then take the table of its addresses."""
        return self.all_reduce == "mosaic"

    @property
    def finishes_read_rows(self) -> bool:
        return finishes_read_rows(self.stages, self.layout)

    def state_specs(self) -> StepState:
        """The state as `ArraySpec`s."""

        def whole(*shape: int, dtype: Any = jnp.int32) -> Any:
            return ArraySpec(shape, jnp.dtype(dtype), (None,) * len(shape))

        slots, vocab = self.num_slots, self.dims.vocab
        sampler = SamplerState(
            whole(slots, vocab), whole(slots, vocab, dtype=bool), whole(slots, vocab, dtype="float32")
        )
        between: Any = None
        if self.stages.count > 1:
            rows = (self.max_decodes + self.max_chunk_tokens) // self.num_partitions
            shape = (self.stages.count, self.num_partitions, rows, self.config.embed_dim)
            between = ArraySpec(shape, jnp.dtype(self.dtype), ("layers", "batch", None, "embed"), yields=True)
        return StepState(whole(slots), whole(slots, self.pages_per_seq), sampler, between)

    def abstract_state(self) -> StepState:
        is_spec = lambda x: isinstance(x, ArraySpec)
        return jax.tree.map(self.layout.abstract, self.state_specs(), is_leaf=is_spec)


def finishes_read_rows(stages: Stages, layout: Layout) -> bool:
    """Whether the last MLP runs for the rows that are sampled or scored, and not for the rest of a prompt: 2% of a
    prompt's products. Not with pipeline stages, whose rows all move on, nor where rows are split over devices."""
    return stages.count == 1 and layout.num_shards("tokens") == 1
