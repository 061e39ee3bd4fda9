"""The layers of one step: all on the spot, or one tick of a pipeline over stages.

In a pipeline each tick every stage works on its own group of sequences: the one that entered s ticks ago is at stage s.
Its rows then move on by a collective permute, so that with as many groups in flight as stages none idles (Huang et al.
2019, GPipe, arXiv 1811.06965; Llama Team 2024, section 6.1). All stages run one program: the layers' arrays differ.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from paddock.model import LayerStack

from .kv_cache import KVCache
from .paged_attention import PagedAttention
from .step_input import PackedLayout, StepInput
from .step_plan import StepPlan
from .step_products import COMPILER, is_chained, products_of

Params = dict[str, jax.Array]
LAYERS = "layers."
# Of a chain from which on attention asks for what comes next (docs/numbers.md: fewer lose by it).
PREFETCHED_ROWS = 8


def run_layers(
    plan: StepPlan,
    packing: PackedLayout,
    params: Params,
    cache: KVCache,
    page_table: Int[Array, "S N"],
    between_stages: jax.Array | None,
    packed: jax.Array,
    x: Float[Array, "T D"],
) -> tuple[KVCache, jax.Array | None, Float[Array, "R D"], jax.Array]:
    """Take the entering rows `x` through the layers, or one stage further.

    Returns the cache, the rows between stages, the rows that sample [R D], and for `finish_rows` those of all U chunk
    tokens [U D] of the group that comes out (over stages [stages U D], of which the last is that group's).
    """
    layers = {name: value for name, value in params.items() if name.startswith(LAYERS)}
    if between_stages is None:
        inputs = packing.unpack(packed)
        attend = PagedAttention(plan, cache, inputs, page_table, _following(plan, layers, x.shape[0]))
        stack = LayerStack(plan.config, layers, plan.layout, products_of(plan, params, x.shape[0]))
        late = plan.finishes_read_rows and packing.bucket.chunk_tokens > 0
        x = stack(x, attend.position, attend, last_mlp=not late)
        rows = _sampling_rows(plan, inputs, x)
        if late:
            # One MLP of few rows is not worth kernels of ours, which take a second of every such program to compile.
            rows = LayerStack(plan.config, layers, plan.layout).finish(rows)
        return attend.cache, None, rows, _chunk_rows(plan, inputs, x)

    axes = plan.layout.rules.layers
    count = plan.stages.count
    decodes, tokens = (n // plan.num_partitions for n in (packing.bucket.decodes, packing.bucket.chunk_tokens))
    first_token = plan.max_decodes // plan.num_partitions

    def tick(
        stage: jax.Array,
        layers: Params,
        cache: KVCache,
        between: jax.Array,
        packed: jax.Array,
        page_table: jax.Array,
        x: jax.Array,
    ) -> tuple[KVCache, jax.Array, jax.Array, jax.Array]:
        inputs = packing.unpack(packed[0])
        attend = PagedAttention(plan, jax.tree.map(lambda pool: pool[0], cache), inputs, page_table)
        come = jnp.concatenate([between[0, :, :decodes], between[0, :, first_token : first_token + tokens]], axis=1)
        x = jnp.where(stage[0] == 0, x, come.reshape(x.shape))
        own = {name: value[0] for name, value in layers.items()}
        x = LayerStack(plan.config, own, plan.layout, products_of(plan, params, x.shape[0]))(x, attend.position, attend)
        with jax.named_scope("stages"):
            rows = _sampling_rows(plan, inputs, x)
            rows = jax.lax.psum(jnp.where(stage[0] == count - 1, rows, 0), axes)
            moved = jax.lax.ppermute(x, axes, [(s, s + 1) for s in range(count - 1)]).reshape(come.shape)
        between = between[0].at[:, :decodes].set(moved[:, :decodes])
        between = between.at[:, first_token : first_token + tokens].set(moved[:, decodes:])
        cache = jax.tree.map(lambda pool: pool[None], attend.cache)
        return cache, between[None], rows, _chunk_rows(plan, inputs, x)[None]

    staged, whole = PartitionSpec(axes), PartitionSpec()
    mapped = plan.layout.shard_map(
        tick, (staged, staged, staged, staged, staged, whole, whole), (staged, staged, whole, staged), over=axes
    )
    return mapped(jnp.arange(count), layers, cache, between_stages, packed, page_table, x)


def finish_rows(plan: StepPlan, params: Params, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
    """Rows of those that `run_layers` returned of chunks, after all layers."""
    if not plan.finishes_read_rows:
        return x
    layers = {name: value for name, value in params.items() if name.startswith(LAYERS)}
    return LayerStack(plan.config, layers, plan.layout).finish(x)


def _following(plan: StepPlan, layers: Params, num_rows: int) -> list[jax.Array]:
    """Each layer's weight after attention [H*h, D], where a device multiplies by just what it holds of it; in chains of
    the fewest rows most multiprocessors have nothing to attend, and fetch it for the product itself."""
    if plan.layout.mesh.size > 1 and plan.all_reduce == COMPILER:
        return []
    if is_chained(plan, num_rows) and num_rows < PREFETCHED_ROWS:
        return []
    weights = [layers[f"{LAYERS}{i}.out"] for i in range(plan.config.num_layers)]
    return [weight.reshape(-1, weight.shape[-1]) for weight in weights]


def _sampling_rows(plan: StepPlan, inputs: StepInput, x: Float[Array, "T D"]) -> Float[Array, "R D"]:
    """The decoding rows, then the last row of each chunk."""
    count = plan.num_partitions
    decodes = inputs.decode_slot.shape[0] // count
    shares = x.reshape(count, -1, x.shape[-1])
    rows = shares[:, :decodes].reshape(-1, x.shape[-1])
    if not inputs.chunk_slot.shape[0]:
        return rows
    last = decodes + jnp.maximum(inputs.chunk_start + inputs.chunk_length - 1, 0)
    lasts = jnp.take_along_axis(shares, last.reshape(count, -1, 1), axis=1)
    return jnp.concatenate([rows, lasts.reshape(-1, x.shape[-1])])


def _chunk_rows(plan: StepPlan, inputs: StepInput, x: Float[Array, "T D"]) -> Float[Array, "U D"]:
    """The rows of the U chunk tokens."""
    count = plan.num_partitions
    decodes = inputs.decode_slot.shape[0] // count
    return x.reshape(count, -1, x.shape[-1])[:, decodes:].reshape(-1, x.shape[-1])
