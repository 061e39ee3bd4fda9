"""Every program of an engine, described by shapes and compiled before anything is allocated."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from tqdm import tqdm

from paddock.model import reduction_axes, slot_specs

from .bucket import Bucket, BucketTable
from .kv_cache import KVCache, abstract_cache, cache_spec
from .mailboxes import abstract_table
from .reductions import MAILBOXES
from .sampler import Sampled
from .step import bind, edit_bias, score_rows, step
from .step_input import PackedLayout
from .step_plan import StepOutput, StepPlan, StepState

# From so many rows on XLA's products come from cuBLAS alone. Fewer rows stream weights faster through its Triton
# kernels (H100, a layer of the 8B shape: 166 against 180 us at 1 row, 175 and 174 at 32, 239 against 229 at 256), each
# of which takes some seconds to compile; docs/numbers.md.
CUBLAS_ROWS = 32
# Rows per call of the head for prompt_logprobs, and bias entries per call of `edit_bias`.
SCORE_ROWS = 32
BIAS_ENTRIES = 512


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of an engine with `num_pages` pages per partition: nothing here is on a device."""

    plan: StepPlan
    buckets: BucketTable
    num_pages: int

    @functools.cached_property
    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        specs = slot_specs(self.plan.config, self.plan.layout, self.plan.dtype)
        params = {name: self.plan.layout.abstract(spec) for name, spec in specs.items()}
        if self.plan.has_mailboxes:
            params[MAILBOXES] = abstract_table(self.plan.layout.mesh, reduction_axes(self.plan.layout))
        return params

    @functools.cached_property
    def cache(self) -> KVCache:
        plan = self.plan
        spec = cache_spec(plan.dims, self.num_pages * plan.num_partitions, plan.page_size, plan.dtype)
        return abstract_cache(spec, plan.stages, plan.layout)

    @functools.cached_property
    def state(self) -> StepState:
        return self.plan.abstract_state()

    @functools.cached_property
    def packings(self) -> dict[Bucket, PackedLayout]:
        return {b: PackedLayout(b, self.plan.page_size, self.plan.num_slots) for b in self.buckets.all()}

    def packed_shape(self, bucket: Bucket) -> tuple[int, ...]:
        """[X], or [stages, X]."""
        stages = self.plan.stages.count
        size = self.packings[bucket].size
        return (size,) if stages == 1 else (stages, size)

    def lower(self, bucket: Bucket) -> jax.stages.Lowered:
        """The step of one bucket, traced from shapes alone."""
        fn = bind(step, self.plan, self.packings[bucket])
        sampled: Any = [self._everywhere] * len(Sampled._fields)
        hidden: Any = self._hidden(bucket)
        outputs = StepOutput(Sampled(*sampled), hidden)
        jitted = jax.jit(fn, donate_argnums=(1, 2), out_shardings=(*self._kept, outputs))
        with self._precision:
            return jitted.lower(self.params, self.cache, self.state, self._ints(*self.packed_shape(bucket)))

    def compile(self, *, progress: bool = False) -> dict[Any, jax.stages.Compiled]:
        """All of them, in parallel threads: the steps by bucket, "edit_bias", "score" and "allocate"."""
        jobs: dict[Any, Callable[[], jax.stages.Lowered]] = {
            bucket: functools.partial(self.lower, bucket) for bucket in self.packings
        }
        jobs |= {"edit_bias": self._lower_bias, "score": self._lower_score, "allocate": self._lower_allocate}
        with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            futures = {pool.submit(self._compile, key, job): key for key, job in jobs.items()}
            done = concurrent.futures.as_completed(futures)
            bar = tqdm(done, total=len(futures), desc="Compiling steps", unit="step", disable=not progress)
            return {futures[future]: future.result() for future in bar}

    def compile_step(self, bucket: Bucket) -> jax.stages.Compiled:
        """The step of one bucket alone."""
        return self._compile(bucket, functools.partial(self.lower, bucket))

    def compile_allocate(self) -> jax.stages.Compiled:
        """What makes an empty cache and state."""
        return self._compile("allocate", self._lower_allocate)

    def _compile(self, key: Any, lower: Callable[[], jax.stages.Lowered]) -> jax.stages.Compiled:
        return lower().compile(self._options(key))

    def _options(self, key: Any) -> dict[str, Any]:
        """XLA's options for one of the programs."""
        on_gpu = self.plan.layout.mesh.devices.flat[0].platform == "gpu"
        if on_gpu and isinstance(key, Bucket) and key.decodes + key.chunk_tokens >= CUBLAS_ROWS:
            return {"xla_gpu_enable_triton_gemm": False}
        return {}

    @property
    def _precision(self) -> Any:
        # Without this float32 products may run in TF32 on a GPU, and tokens would depend on the card.
        return jax.default_matmul_precision("highest" if self.plan.dtype == "float32" else None)

    @property
    def _everywhere(self) -> NamedSharding:
        return self.plan.layout.sharding()

    @property
    def _kept(self) -> tuple[Any, Any]:
        return jax.tree.map(lambda x: x.sharding, (self.cache, self.state))

    def _hidden(self, bucket: Bucket) -> NamedSharding | None:
        """Chunk rows stay whole on each device, and at their own stage."""
        if not bucket.chunk_tokens:
            return None
        return self.plan.layout.sharding(("layers",)) if self.plan.stages.count > 1 else self._everywhere

    def _ints(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._everywhere)

    def _lower_bias(self) -> jax.stages.Lowered:
        jitted = jax.jit(edit_bias, donate_argnums=0, out_shardings=self._kept[1])
        entries = self._ints(BIAS_ENTRIES), self._ints(BIAS_ENTRIES, dtype=jnp.float32)
        return jitted.lower(self.state, self._ints(), self._ints(), *entries)

    def _lower_score(self) -> jax.stages.Lowered:
        plan, largest = self.plan, self.buckets.all()[0]
        shape: tuple[int, ...] = (plan.max_chunk_tokens, plan.config.embed_dim)
        if plan.stages.count > 1:
            shape = (plan.stages.count, *shape)
        hidden = jax.ShapeDtypeStruct(shape, jnp.dtype(plan.dtype), sharding=self._hidden(largest))
        jitted = jax.jit(bind(score_rows, plan), out_shardings=self._everywhere)
        with self._precision:
            return jitted.lower(self.params, hidden, self._ints(SCORE_ROWS), self._ints(SCORE_ROWS))

    def _lower_allocate(self) -> jax.stages.Lowered:
        def zeros() -> tuple[KVCache, StepState]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (self.cache, self.state))

        return jax.jit(zeros, out_shardings=self._kept).lower()
