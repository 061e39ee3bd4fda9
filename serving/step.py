"""The one program of the engine: embed, layers over the paged cache, head, sampling, state update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paddock.model import Llama

from .bucket import Bucket
from .kv_cache import KVCache
from .paged_attention import join_rows
from .pipeline import Params, finish_rows, run_layers
from .sampler import Sampled, SamplerState, When, compiled_flags, sample, score
from .sharded_sampling import on_own_rows
from .step_input import PackedLayout, Rows, StepInput
from .step_plan import StepOutput, StepPlan, StepState


def step(
    plan: StepPlan, packing: PackedLayout, params: Params, cache: KVCache, state: StepState, packed: jax.Array
) -> tuple[KVCache, StepState, StepOutput]:
    """Run one bucket. `cache` and `state` are donated.

    `packed` is [X], or [stages, X]: row s holds the group at stage s, so that the first enters now and the last comes
    out and is sampled.
    """
    staged = plan.stages.count > 1
    entering = plan.layout.whole(packing.unpack(packed[0] if staged else packed))
    leaving = plan.layout.whole(packing.unpack(packed[-1])) if staged else entering
    model = Llama(plan.config, params, plan.layout)
    slots, indices, pages = entering.page_updates.T
    page_table = state.page_table.at[slots, indices].set(pages, mode="drop")
    last_token = state.last_token[jnp.minimum(entering.decode_slot, plan.num_slots - 1)]
    x = model.embed(join_rows(last_token, entering.token_ids, plan.num_partitions))
    cache, between_stages, rows, chunk_hidden = run_layers(
        plan, packing, params, cache, page_table, state.between_stages, packed, x
    )
    logits = model.logits(rows)
    sampler, sampled = _sample(plan, packing.bucket, leaving, state.sampler, logits)
    last_token = state.last_token.at[leaving.rows.slot].set(sampled.tokens, mode="drop")
    new_state = StepState(last_token, page_table, sampler, between_stages)
    kept = None if packing.bucket.full else logits
    return cache, new_state, StepOutput(sampled, _pad_chunks(plan, packing, chunk_hidden), kept)


def resample(
    plan: StepPlan, packing: PackedLayout, state: StepState, packed: jax.Array, logits: Float[Array, "R V"]
) -> tuple[StepState, Sampled]:
    """The sampler with all that it can, over the logits of a step that had the least of it. `state` is donated.

    On a GPU this takes the place of a second executable of each bucket, layers and all.
    """
    leaving = plan.layout.whole(packing.unpack(packed[-1] if plan.stages.count > 1 else packed))
    sampler, sampled = _sample(plan, dataclasses.replace(packing.bucket, full=True), leaving, state.sampler, logits)
    last_token = state.last_token.at[leaving.rows.slot].set(sampled.tokens, mode="drop")
    return state._replace(last_token=last_token, sampler=sampler), sampled


def _sample(
    plan: StepPlan, bucket: Bucket, leaving: StepInput, state: SamplerState, logits: Float[Array, "R V"]
) -> tuple[SamplerState, Sampled]:
    with jax.named_scope("sample"):
        sampler = _count_prompts(plan, leaving, state) if bucket.full else state
        flags = compiled_flags(leaving.flags, full=bucket.full, branches=plan.branches)

        # Flags that are compiled in must not become arrays on the way.
        traced = flags if plan.branches else {}

        def draw(logits: jax.Array, rows: Rows, shared: tuple[SamplerState, dict[str, When]]) -> Sampled:
            state, traced = shared
            return sample(logits, rows, state, {**flags, **traced}, plan.num_logprobs)

        sampled = plan.layout.whole(on_own_rows(plan.layout, draw, logits, leaving.rows, (sampler, traced)))
        if bucket.full:
            counts = sampler.counts.at[leaving.rows.slot, sampled.tokens].add(1, mode="drop")
            sampler = sampler._replace(counts=counts)
    return sampler, sampled


def _pad_chunks(plan: StepPlan, packing: PackedLayout, hidden: jax.Array) -> jax.Array | None:
    """Chunk rows [..., T, D] with each partition's share as in the largest bucket: one shape for `score_rows`."""
    if not packing.bucket.chunk_tokens:
        return None
    missing = (plan.max_chunk_tokens - packing.bucket.chunk_tokens) // plan.num_partitions
    *stages, _, embed = hidden.shape
    shares = hidden.reshape(*stages, plan.num_partitions, -1, embed)
    padded = jnp.pad(shares, [(0, 0)] * (len(stages) + 1) + [(0, missing), (0, 0)])
    return padded.reshape(*stages, plan.max_chunk_tokens, embed)


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
    hidden: jax.Array,
    rows: Int[Array, " N"],
    targets: Int[Array, " N"],
) -> Sampled:
    """Log-probabilities of `targets` after rows of `StepOutput.hidden`: the head by N rows, for prompt_logprobs."""
    hidden = hidden[-1] if plan.stages.count > 1 else hidden
    model = Llama(plan.config, params, plan.layout)
    finished = finish_rows(plan, params, hidden[rows])

    def score_targets(logits: jax.Array, targets: jax.Array, _: None) -> Sampled:
        return score(logits, targets, plan.num_logprobs)

    return on_own_rows(plan.layout, score_targets, model.logits(finished), targets, None)


def bind(fn: Callable[..., Any], *static: object) -> Callable[..., Any]:
    """`fn` with its static arguments bound, under its own name in profiles."""
    return functools.wraps(fn)(functools.partial(fn, *static))
