"""The one program of the engine: embed, layers over the paged cache, head, sampling, state update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from paddock.model import Llama, LlamaConfig
from paddock.pallas_kernels import DECODE_ATTENTION, PREFILL_ATTENTION
from paddock.sharding import Layout

from .kv_cache import KVCache
from .page_pool import SCRATCH_PAGE
from .sampler import Sampled, SamplerState, compiled_flags, sample, score
from .step_input import PackedLayout, StepInput

Params = dict[str, jax.Array]


class StepState(NamedTuple):
    """What lives on the device from step to step, per slot: newest token [S], page table [S N], the sampler's state."""

    last_token: jax.Array
    page_table: jax.Array
    sampler: SamplerState


class StepOutput(NamedTuple):
    """What comes back: the sampled rows, and the chunks' hidden states [max chunk tokens, D] for prompt_logprobs."""

    sampled: Sampled
    hidden: jax.Array | None


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What every executable of an engine has in common."""

    config: LlamaConfig
    layout: Layout
    page_size: int
    num_slots: int
    pages_per_seq: int
    max_chunk_tokens: int
    num_logprobs: int
    decode_attention: str
    prefill_attention: str
    branches: bool

    def abstract_state(self, vocab: int) -> StepState:
        def shaped(*shape: int, dtype: Any = jnp.int32) -> Any:  # a shape where an array will be
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self.layout.sharding())

        slots = self.num_slots
        sampler = SamplerState(
            shaped(slots, vocab), shaped(slots, vocab, dtype=jnp.bool_), shaped(slots, vocab, dtype=jnp.float32)
        )
        return StepState(shaped(slots), shaped(slots, self.pages_per_seq), sampler)


class PagedAttention:
    """The model's `attend` for one step: appends to the pages, then attends through them."""

    def __init__(self, plan: StepPlan, cache: KVCache, inputs: StepInput, page_table: Int[Array, "S N"]):
        self.plan, self.cache, self.inputs = plan, cache, inputs
        slot = jnp.concatenate([inputs.decode_slot, inputs.token_slot])
        position = jnp.concatenate([inputs.decode_position, inputs.token_position])
        is_token = slot < plan.num_slots
        page = page_table[jnp.minimum(slot, plan.num_slots - 1), position // plan.page_size]
        self.page = jnp.where(is_token, page, SCRATCH_PAGE)
        self.offset = jnp.where(is_token, position % plan.page_size, 0)
        self.position = position
        self.decode_table = page_table[jnp.minimum(inputs.decode_slot, plan.num_slots - 1)]
        self.decode_kv_len = jnp.where(inputs.decode_slot < plan.num_slots, inputs.decode_position + 1, 0)
        self.chunk_table = page_table[jnp.minimum(inputs.chunk_slot, plan.num_slots - 1)]

    def __call__(
        self, layer: int, q: Float[Array, "T K G h"], k: Float[Array, "T K h"], v: Float[Array, "T K h"]
    ) -> Float[Array, "T K G h"]:
        self.cache = self.cache.append(layer, k, v, self.page, self.offset)
        pools = (self.cache.k[layer], self.cache.v[layer])
        num_decodes = self.inputs.decode_slot.shape[0]
        parts = []
        if num_decodes:
            decode = self._on_shards(DECODE_ATTENTION[self.plan.decode_attention], 2)
            parts.append(decode(q[:num_decodes], *pools, self.decode_table, self.decode_kv_len))
        if q.shape[0] > num_decodes:
            inputs = self.inputs
            prefill = self._on_shards(PREFILL_ATTENTION[self.plan.prefill_attention], 4)
            chunks = (self.chunk_table, inputs.chunk_start, inputs.chunk_length, inputs.chunk_kv_len)
            parts.append(prefill(q[num_decodes:], *pools, *chunks))
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    def _on_shards(self, kernel: Callable[..., jax.Array], num_tables: int) -> Callable[..., jax.Array]:
        """`kernel` over each device's own heads: kernels know no mesh, and no head needs another device's."""
        layout = self.plan.layout
        heads = layout.rules.spec((None, "kv_heads", None, None))
        pool = layout.rules.spec(("pages", "kv_heads", None, "head_dim"))

        def local(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, *tables: jax.Array) -> jax.Array:
            flat = q.reshape(q.shape[0], -1, q.shape[-1])
            out = kernel(flat, k_pages, v_pages, *tables, scale=self.plan.config.head_dim**-0.5)
            return out.reshape(q.shape)

        if layout.mesh.size == 1:
            return local
        specs = (heads, pool, pool, *[PartitionSpec()] * num_tables)
        return jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=heads, check_vma=False)


def step(
    plan: StepPlan, packing: PackedLayout, params: Params, cache: KVCache, state: StepState, packed: Int[Array, " X"]
) -> tuple[KVCache, StepState, StepOutput]:
    """Run one bucket. `cache` and `state` are donated."""
    inputs = packing.unpack(packed)
    model = Llama(plan.config, params, plan.layout)
    slots, indices, pages = inputs.page_updates.T
    page_table = state.page_table.at[slots, indices].set(pages, mode="drop")
    attend = PagedAttention(plan, cache, inputs, page_table)
    last_token = state.last_token[jnp.minimum(inputs.decode_slot, plan.num_slots - 1)]
    token_ids = jnp.concatenate([last_token, inputs.token_ids])
    hidden = model(token_ids, attend.position, attend)

    num_decodes = inputs.decode_slot.shape[0]
    sampling_rows = hidden[:num_decodes]
    if inputs.chunk_slot.shape[0]:
        last = num_decodes + jnp.maximum(inputs.chunk_start + inputs.chunk_length - 1, 0)
        sampling_rows = jnp.concatenate([sampling_rows, hidden[last]])
    logits = _one_row_per_shard(plan.layout, model.logits(sampling_rows))
    with jax.named_scope("sample"):
        sampler = _count_prompts(plan, inputs, state.sampler) if packing.bucket.full else state.sampler
        flags = compiled_flags(inputs.flags, full=packing.bucket.full, branches=plan.branches)
        sampled = sample(logits, inputs.rows, sampler, flags, plan.num_logprobs)
        tokens = plan.layout.constrain(sampled.tokens, (None,))
        if packing.bucket.full:
            sampler = sampler._replace(counts=sampler.counts.at[inputs.rows.slot, tokens].add(1, mode="drop"))
    new_state = StepState(state.last_token.at[inputs.rows.slot].set(tokens, mode="drop"), page_table, sampler)
    chunk_hidden = None
    if packing.bucket.chunk_tokens:
        missing = plan.max_chunk_tokens - packing.bucket.chunk_tokens
        chunk_hidden = jnp.pad(hidden[num_decodes:], ((0, missing), (0, 0)))
    return attend.cache, new_state, StepOutput(sampled._replace(tokens=tokens), chunk_hidden)


def _one_row_per_shard(layout: Layout, logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
    """Whole rows on each device instead of a slice of every row: logits move once, whatever the sampler iterates."""
    axes = layout.rules.vocab
    shards = layout.num_shards("vocab")
    spec = PartitionSpec(axes, None) if shards > 1 and logits.shape[0] % shards == 0 else PartitionSpec()
    return jax.lax.with_sharding_constraint(logits, NamedSharding(layout.mesh, spec))


def _count_prompts(plan: StepPlan, inputs: StepInput, state: SamplerState) -> SamplerState:
    """Penalty counts with this step's chunks in them; a first chunk clears what the slot's last owner left."""
    if not inputs.chunk_slot.shape[0]:
        return state
    nobody = plan.num_slots
    cleared = jnp.where(inputs.chunk_is_first > 0, inputs.chunk_slot, nobody)
    counts = state.counts.at[cleared].set(0, mode="drop")
    counts = counts.at[inputs.token_slot, inputs.token_ids].add(inputs.token_counts, mode="drop")
    prompted = state.prompted.at[cleared].set(False, mode="drop")
    prompt_slot = jnp.where(inputs.token_counts > 0, nobody, inputs.token_slot)
    prompted = prompted.at[prompt_slot, inputs.token_ids].set(True, mode="drop")
    return state._replace(counts=counts, prompted=prompted)


def edit_bias(
    state: StepState, slot: Int[Array, ""], clear: Int[Array, ""], ids: Int[Array, " N"], values: Float[Array, " N"]
) -> StepState:
    """Set entries of a slot's bias row, after clearing it if `clear`; ids past the vocabulary are dropped."""
    row = jnp.where(clear > 0, 0.0, state.sampler.bias[slot]).at[ids].set(values, mode="drop")
    return state._replace(sampler=state.sampler._replace(bias=state.sampler.bias.at[slot].set(row)))


def score_rows(
    plan: StepPlan,
    params: Params,
    hidden: Float[Array, "T D"],
    rows: Int[Array, " N"],
    targets: Int[Array, " N"],
) -> Sampled:
    """Log-probabilities of `targets` after the chunk tokens `rows`: the head in slices of N, for prompt_logprobs."""
    model = Llama(plan.config, params, plan.layout)
    logits = _one_row_per_shard(plan.layout, model.logits(hidden[rows]))
    scored = score(logits, targets, plan.num_logprobs)
    return Sampled(*(plan.layout.constrain(part, (None,) * part.ndim) for part in scored))


def bind(fn: Callable[..., Any], *static: object) -> Callable[..., Any]:
    """`fn` with its static arguments bound, under its own name in profiles."""
    return functools.wraps(fn)(functools.partial(fn, *static))
