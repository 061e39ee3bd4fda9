"""Every program of an engine, described by shapes and compiled before anything is allocated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import Exported, export
from jax.sharding import NamedSharding

from paddock.model import reduction_axes, slot_specs

from .bucket import Bucket, BucketTable
from .compiler import Job
from .kv_cache import KVCache, abstract_cache, cache_spec
from .mailboxes import abstract_table
from .sampler import Sampled
from .step import bind, edit_bias, resample, score_rows, step
from .step_input import PackedLayout
from .step_plan import StepOutput, StepPlan, StepState
from .step_products import MAILBOXES, is_chained

# From so many rows on XLA's products come from cuBLAS alone. Fewer rows stream weights faster through its Triton
# kernels (H100, a layer of the 8B shape: 166 against 180 us at 1 row, 175 and 174 at 32, 239 against 229 at 256), each
# of which takes some seconds to compile; docs/numbers.md.
CUBLAS_ROWS = 32
# XLA compiles each fusion in two ways and keeps the one that it measures to be faster: half of all compiling or more,
# for steps that take as long without (H100, 8B shape, ms: 5.96 with and 6.04 without at 32 rows, 7.91 and 7.93 at 256,
# 8.42 and 8.39 for a chunk of 256), and whose kernels, and with them roundings, may differ from start to start.
GPU_OPTIONS: Mapping[str, Any] = {"xla_gpu_experimental_enable_fusion_autotuner": False}
# A graph starts when all of it has been updated, kernels without one as soon as the first is launched; and those of a
# chunk run for longer than launching the next ones takes. 1.3 ms less to the first token after 128 (H100). In a graph
# no kernel of ours starts while the one before it ends.
NO_GRAPH_OPTIONS: Mapping[str, Any] = {"xla_gpu_enable_command_buffer": ""}
# Rows per call of the head for prompt_logprobs, and bias entries per call of `edit_bias`.
SCORE_ROWS = 32
BIAS_ENTRIES = 512


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of an engine with `num_pages` pages per partition: nothing here is on a device."""

    plan: StepPlan
    buckets: BucketTable
    num_pages: int
    # Of what outlives a step (see `_sampled`): a memory kind of JAX.
    results_in: str = "pinned_host"

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

    def lower(self, bucket: Bucket, exported: Exported | None = None) -> jax.stages.Lowered:
        """The step of one bucket, traced from shapes alone, or taken as it was `exported` by another process."""
        fn = self._step(bucket) if exported is None else _called(exported)
        hidden: Any = self._hidden(bucket)
        logits: Any = None if bucket.full else self._logits
        outputs = StepOutput(self._sampled(full=bucket.full), hidden, logits)
        jitted = jax.jit(fn, donate_argnums=(1, 2), out_shardings=(*self._kept, outputs))
        with self._precision:
            return jitted.lower(*self._arguments(bucket))

    def export(self, bucket: Bucket, platform: str) -> Exported:
        """The step of one bucket as a program can call it that has devices of `platform`; this one need not."""
        with self._precision:
            return export(jax.jit(self._step(bucket)), platforms=[platform])(*self._arguments(bucket))

    def _step(self, bucket: Bucket) -> Callable[..., Any]:
        return bind(step, self.plan, self.packings[bucket])

    def _arguments(self, bucket: Bucket) -> tuple[Any, ...]:
        return self.params, self.cache, self.state, self._ints(*self.packed_shape(bucket))

    def jobs(self) -> dict[Any, Job]:
        """All of them: "edit_bias", "score" and "allocate", ("resample", bucket) where a step has the least of the
        sampler, and the steps by bucket. First what is lowered soon, which is compiled while the rest is lowered."""
        small = {"edit_bias": self._lower_bias, "score": self._lower_score, "allocate": self._lower_allocate}
        jobs: dict[Any, Job] = {name: Job(lower, self._options) for name, lower in small.items()}
        for bucket in self.packings:
            if not bucket.full:
                jobs["resample", bucket] = Job(functools.partial(self._lower_resample, bucket), self._options)
        return jobs | {bucket: self.job(bucket) for bucket in self.packings}

    def job(self, bucket: Bucket) -> Job:
        """The step of one bucket, with XLA's options for it."""
        options = dict(self._options)
        if options and bucket.decodes + bucket.chunk_tokens >= CUBLAS_ROWS:
            options["xla_gpu_enable_triton_gemm"] = False
        if options and (bucket.chunk_tokens or is_chained(self.plan, bucket.decodes)):
            options |= NO_GRAPH_OPTIONS
        return Job(functools.partial(self.lower, bucket), options, exportable=True)

    def compile_allocate(self) -> jax.stages.Compiled:
        """What makes an empty cache and state."""
        return self._lower_allocate().compile()

    def compile_step(self, bucket: Bucket, options: Mapping[str, Any] | None = None) -> jax.stages.Compiled:
        """The step of one bucket alone, with `options` of XLA's beside those that it has anyway."""
        job = self.job(bucket)
        return job.lower().compile({**job.options, **(options or {})})

    def facts(self) -> str:
        """Everything that the programs depend on, but for JAX, the machine and our source: what a cache is asked by."""
        mesh = self.plan.layout.mesh
        plan = {f.name: getattr(self.plan, f.name) for f in dataclasses.fields(self.plan) if f.name != "layout"}
        return repr((plan, dict(mesh.shape), self.plan.layout.rules, self.buckets, self.num_pages, self.results_in))

    @property
    def _options(self) -> Mapping[str, Any]:
        return GPU_OPTIONS if self.plan.layout.mesh.devices.flat[0].platform == "gpu" else {}

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

    def _sampled(self, *, full: bool) -> Sampled:
        """In the host's memory, for these alone outlive their step: were they on the device, XLA's allocator would find
        other holes at every step, and a command buffer (CUDA graph) is written anew wherever an address in it moved."""
        placed: Any = self._everywhere.with_memory_kind(self.results_in)
        return Sampled(*[placed] * len(Sampled._fields)) if full else Sampled(placed)

    @property
    def _logits(self) -> NamedSharding:
        return self.plan.layout.sharding((None, "vocab"))

    def _hidden(self, bucket: Bucket) -> NamedSharding | None:
        """Chunk rows stay whole on each device, and at their own stage."""
        if not bucket.chunk_tokens:
            return None
        return self.plan.layout.sharding(("layers",)) if self.plan.stages.count > 1 else self._everywhere

    def _ints(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._everywhere)

    def _lower_resample(self, bucket: Bucket) -> jax.stages.Lowered:
        shape = (bucket.rows, self.plan.dims.vocab)
        logits = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self._logits)
        fn = bind(resample, self.plan, self.packings[bucket])
        jitted = jax.jit(fn, donate_argnums=0, out_shardings=(self._kept[1], self._sampled(full=True)))
        with self._precision:
            return jitted.lower(self.state, self._ints(*self.packed_shape(bucket)), logits)

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
        jitted = jax.jit(bind(score_rows, plan), out_shardings=self._sampled(full=True))
        with self._precision:
            return jitted.lower(self.params, hidden, self._ints(SCORE_ROWS), self._ints(SCORE_ROWS))

    def _lower_allocate(self) -> jax.stages.Lowered:
        def zeros() -> tuple[KVCache, StepState]:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (self.cache, self.state))

        return jax.jit(zeros, out_shardings=self._kept).lower()


def _called(exported: Exported) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return exported.call(*arguments)

    call.__name__ = step.__name__  # by which profiles know a step
    return call
