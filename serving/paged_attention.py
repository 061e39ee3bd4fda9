"""The model's attention over the paged cache, on each device's own heads and sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from paddock.pallas_kernels import DECODE_ATTENTION, PREFILL_ATTENTION

from .kv_cache import KVCache, append
from .page_pool import SCRATCH_PAGE
from .step_input import StepInput
from .step_plan import StepPlan


class PagedAttention:
    """The model's `attend` for one step: appends to the pages, then attends through them.

    Rows come as `join_rows` makes them: an equal share for each partition, its decoding rows before its chunks' tokens.
    Kernels know no mesh: each device's call sees its own heads, its own partition's rows and pages, and no other.
    """

    def __init__(self, plan: StepPlan, cache: KVCache, inputs: StepInput, page_table: Int[Array, "S N"]):
        self.plan, self.cache = plan, cache
        count, nobody = plan.num_partitions, plan.num_slots
        slot = join_rows(inputs.decode_slot, inputs.token_slot, count)
        self.position = join_rows(inputs.decode_position, inputs.token_position, count)
        is_token = slot < nobody
        page = page_table[jnp.minimum(slot, nobody - 1), self.position // plan.page_size]
        offset = jnp.where(is_token, self.position % plan.page_size, 0)
        self.writes = (jnp.where(is_token, page, SCRATCH_PAGE), offset)
        kv_len = jnp.where(inputs.decode_slot < nobody, inputs.decode_position + 1, 0)
        self.decodes = (page_table[jnp.minimum(inputs.decode_slot, nobody - 1)], kv_len)
        chunk_table = page_table[jnp.minimum(inputs.chunk_slot, nobody - 1)]
        self.chunks = (chunk_table, inputs.chunk_start, inputs.chunk_length, inputs.chunk_kv_len)

    def __call__(
        self, layer: int, q: Float[Array, "T K G h"], k: Float[Array, "T K h"], v: Float[Array, "T K h"]
    ) -> Float[Array, "T K G h"]:
        layout, dims, shape = self.plan.layout, self.plan.dims, q.shape
        if dims.cache_heads != dims.kv_heads:  # split by sequences, not by heads: no kv head is repeated
            q = q.reshape(q.shape[0], dims.cache_heads, -1, q.shape[-1])
            k, v = (x[:, :: dims.kv_heads // dims.cache_heads] for x in (k, v))
        # The compiler goes on splitting head_dim, if a rule does: jnp kernels are then partitioned like any other code.
        rows = layout.rules.spec(("batch", "q_heads"), yields=True)
        taken = layout.rules.batch + layout.rules.q_heads
        rest = [axis for axis in layout.rules.head_dim if axis not in taken]
        over = [axis for axis in layout.mesh.axis_names if axis not in rest]
        batch = PartitionSpec(rows[0])
        tables = jax.tree.map(lambda _: batch, (self.writes, self.decodes, self.chunks))
        pools = (self.cache.k[layer], self.cache.v[layer])
        fn = self._local
        if layout.mesh.size > 1 and over:
            fn = layout.shard_map(fn, (rows, rows, rows, rows, rows, tables), (rows, rows, rows), over=over)
        out, k_pool, v_pool = fn(q, k, v, *pools, (self.writes, self.decodes, self.chunks))
        self.cache = KVCache(_replace(self.cache.k, layer, k_pool), _replace(self.cache.v, layer, v_pool))
        return out.reshape(shape)

    def _local(
        self, q: jax.Array, k: jax.Array, v: jax.Array, k_pool: jax.Array, v_pool: jax.Array, tables: tuple
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        writes, decodes, chunks = tables
        with jax.named_scope("append"):
            k_pool, v_pool = append(k_pool, k, *writes), append(v_pool, v, *writes)
        flat, scale = q.reshape(q.shape[0], -1, q.shape[-1]), self.plan.config.head_dim**-0.5
        num_decodes = decodes[1].shape[0]
        parts = []
        if self.plan.deterministic and num_decodes:
            return self._all_as_chunks(flat, k_pool, v_pool, decodes, chunks).reshape(q.shape), k_pool, v_pool
        with jax.named_scope("attend"):
            if num_decodes:
                decode = DECODE_ATTENTION[self.plan.decode_attention]
                parts.append(decode(flat[:num_decodes], k_pool, v_pool, *decodes, scale=scale))
            if flat.shape[0] > num_decodes:
                prefill = PREFILL_ATTENTION[self.plan.prefill_attention]
                parts.append(prefill(flat[num_decodes:], k_pool, v_pool, *chunks, scale=scale))
        out = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
        return out.reshape(q.shape), k_pool, v_pool

    def _all_as_chunks(
        self, q: jax.Array, k_pool: jax.Array, v_pool: jax.Array, decodes: tuple, chunks: tuple
    ) -> jax.Array:
        """Decoding rows as chunks of one token, so that a token's attention is the same in either way."""
        table, kv_len = decodes
        num_decodes = kv_len.shape[0]
        ones = (table, jnp.arange(num_decodes, dtype=jnp.int32), jnp.minimum(kv_len, 1), kv_len)
        chunks = (chunks[0], chunks[1] + num_decodes, *chunks[2:])
        both = [jnp.concatenate(pair) for pair in zip(ones, chunks, strict=True)]
        prefill = PREFILL_ATTENTION[self.plan.prefill_attention]
        return prefill(q, k_pool, v_pool, *both, scale=self.plan.config.head_dim**-0.5)


def join_rows(decodes: Array, tokens: Array, num_partitions: int) -> Array:
    """[B ...] and [T ...] as [B+T ...], each partition's rows together."""
    parts = [x.reshape(num_partitions, -1, *x.shape[1:]) for x in (decodes, tokens) if x.shape[0]]
    joined = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    return joined.reshape(-1, *decodes.shape[1:])


def _replace(pools: tuple[jax.Array, ...], layer: int, pool: jax.Array) -> tuple[jax.Array, ...]:
    return (*pools[:layer], pool, *pools[layer + 1 :])
