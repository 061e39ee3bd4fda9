"""The model's attention over the paged cache, on each device's own heads and sequences."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from paddock.pallas_kernels import DECODE_APPEND, DECODE_ATTENTION, PREFILL_ATTENTION, ROTATE_APPEND

from .kv_cache import KVCache
from .page_pool import SCRATCH_PAGE
from .step_input import StepInput
from .step_plan import StepPlan


class PagedAttention:
    """The model's `attend` for one step: rotates, appends to the pages, then attends through them.

    Rows come as `join_rows` makes them: an equal share for each partition, its decoding rows before its chunks' tokens.
    Kernels know no mesh: each device's call sees its own heads, its own partition's rows and pages, and no other.
    `following`: of each layer the weight [H*h, D] that its output is multiplied by, where kernels may prefetch it.
    """

    def __init__(
        self,
        plan: StepPlan,
        cache: KVCache,
        inputs: StepInput,
        page_table: Int[Array, "S N"],
        following: Sequence[jax.Array] = (),
    ):
        self.plan, self.cache, self.following = plan, cache, following
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
        self, layer: int, qkv: Float[Array, "T K G2 h"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
    ) -> Float[Array, "T K G h"]:
        layout, dims = self.plan.layout, self.plan.dims
        tokens, kv_heads, vectors, head_dim = qkv.shape
        if dims.cache_heads != dims.kv_heads:  # split by sequences, not by heads: no kv head is repeated
            q = qkv[:, :, :-2].reshape(tokens, dims.cache_heads, -1, head_dim)
            qkv = jnp.concatenate([q, qkv[:, :: dims.kv_heads // dims.cache_heads, -2:]], axis=2)
        # The compiler goes on splitting head_dim, if a rule does: jnp kernels are then partitioned like any other code.
        rows = layout.rules.spec(("batch", "q_heads"), yields=True)
        taken = layout.rules.batch + layout.rules.q_heads
        rest = [axis for axis in layout.rules.head_dim if axis not in taken]
        over = [axis for axis in layout.mesh.axis_names if axis not in rest]
        batch = PartitionSpec(rows[0])
        tables = (self.writes, self.decodes, self.chunks)
        pools = (self.cache.k[layer], self.cache.v[layer])
        ahead = self.following[layer] if self.following else None
        fn = self._local
        if layout.mesh.size > 1 and over:
            specs = (rows, batch, batch, rows, rows, jax.tree.map(lambda _: batch, tables), PartitionSpec(rows[1]))
            fn = layout.shard_map(fn, specs, (rows, rows, rows), over=over)
        out, k_pool, v_pool = fn(qkv, cos, sin, *pools, tables, ahead)
        self.cache = KVCache(_replace(self.cache.k, layer, k_pool), _replace(self.cache.v, layer, v_pool))
        return out.reshape(tokens, kv_heads, vectors - 2, head_dim)

    def _local(
        self,
        qkv: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        k_pool: jax.Array,
        v_pool: jax.Array,
        tables: tuple[Any, Any, Any],
        ahead: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        writes, decodes, chunks = tables
        plan, scale = self.plan, self.plan.config.head_dim**-0.5
        num_decodes = decodes[1].shape[0]
        # What the Mosaic decode kernel runs on, those that append do too.
        kernels = "mosaic" if plan.decode_attention == "mosaic" else "reference"
        if kernels == "mosaic" and num_decodes == qkv.shape[0] and not plan.deterministic:
            with jax.named_scope("attend"):
                return DECODE_APPEND[kernels](qkv, cos, sin, k_pool, v_pool, *decodes, scale=scale, ahead=ahead)
        with jax.named_scope("append"):
            q, k_pool, v_pool = ROTATE_APPEND[kernels](qkv, cos, sin, k_pool, v_pool, *writes)
        with jax.named_scope("attend"):
            out = self._attend(q.reshape(q.shape[0], -1, q.shape[-1]), k_pool, v_pool, decodes, chunks)
        return out.reshape(q.shape), k_pool, v_pool

    def _attend(self, q: jax.Array, k_pool: jax.Array, v_pool: jax.Array, decodes: Any, chunks: Any) -> jax.Array:
        """q [T H h] through pages that hold the step's own keys and values already."""
        plan, num_decodes = self.plan, decodes[1].shape[0]
        attend = functools.partial(self._attend_chunks, k_pool=k_pool, v_pool=v_pool)
        if plan.deterministic:
            return attend(q, _with_decodes(decodes, chunks))
        if not num_decodes:
            return attend(q, chunks)
        decode = DECODE_ATTENTION[plan.decode_attention]
        out = decode(q[:num_decodes], k_pool, v_pool, *decodes, scale=plan.config.head_dim**-0.5)
        if num_decodes == q.shape[0]:
            return out
        if plan.prefill_attention == "mosaic":
            # Rows of no chunk cost it nothing: a few are filled in, where else all the others would be copied twice.
            return attend(q, _shifted(chunks, num_decodes)).at[:num_decodes].set(out)
        return jnp.concatenate([out, attend(q[num_decodes:], chunks)])

    def _attend_chunks(self, q: jax.Array, chunks: tuple, *, k_pool: jax.Array, v_pool: jax.Array) -> jax.Array:
        prefill = PREFILL_ATTENTION[self.plan.prefill_attention]
        return prefill(q, k_pool, v_pool, *chunks, scale=self.plan.config.head_dim**-0.5)


def _with_decodes(decodes: tuple, chunks: tuple) -> tuple[jax.Array, ...]:
    """Decoding rows as chunks of one token before the others, so that a token's attention is the same in either way."""
    table, kv_len = decodes
    num_decodes = kv_len.shape[0]
    if not num_decodes:
        return chunks
    ones = (table, jnp.arange(num_decodes, dtype=jnp.int32), jnp.minimum(kv_len, 1), kv_len)
    return tuple(jnp.concatenate(pair) for pair in zip(ones, _shifted(chunks, num_decodes), strict=True))


def _shifted(chunks: tuple, rows: int) -> tuple[jax.Array, ...]:
    """The chunks with so many rows before them."""
    table, start, *lengths = chunks
    return table, start + rows, *lengths


def join_rows(decodes: Array, tokens: Array, num_partitions: int) -> Array:
    """[B ...] and [T ...] as [B+T ...], each partition's rows together."""
    parts = [x.reshape(num_partitions, -1, *x.shape[1:]) for x in (decodes, tokens) if x.shape[0]]
    joined = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    return joined.reshape(-1, *decodes.shape[1:])


def _replace(pools: tuple[jax.Array, ...], layer: int, pool: jax.Array) -> tuple[jax.Array, ...]:
    return (*pools[:layer], pool, *pools[layer + 1 :])
