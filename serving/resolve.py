"""Everything that was left "auto", decided once and logged, before anything large is allocated."""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from pathlib import Path

import jax
import psutil

from paddock.checkpoints import GenerationConfig, resolve_model
from paddock.model import Dims, LlamaConfig, slot_specs
from paddock.model.shapes import SHAPES
from paddock.sharding import Layout
from paddock.sharding.memory import show_bytes

from .bucket import BucketTable
from .engine_config import CPU_TOKENS, GPU_TOKENS, EngineConfig
from .footprint import SLACK, Footprint, free_bytes, refuse_too_large
from .kv_cache import page_bytes
from .programs import Programs
from .sampling_params import SamplingParams
from .step_plan import StepPlan
from .step_planning import check_step_size, plan_steps

logger = logging.getLogger("paddock")

CPU_CACHE_SHARE, CPU_CACHE_LIMIT = 0.10, 4 * 2**30
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Resolved:
    """An engine about to be built. `folder` is None for a named shape with dummy weights."""

    folder: Path | None
    model: LlamaConfig
    generation: GenerationConfig
    default_params: SamplingParams
    dtype: str
    plan: StepPlan
    buckets: BucketTable
    num_pages: int
    max_model_len: int

    @property
    def page_size(self) -> int:
        return self.plan.page_size

    @property
    def programs(self) -> Programs:
        return Programs(self.plan, self.buckets, self.num_pages)


def resolve(config: EngineConfig, *, replica: int = 0, must_fit: bool = True) -> Resolved:
    """For one of the mesh's replicas. Raises ValueError naming the option that cannot be had, and for a layout that
    needs more memory than there is, if it `must_fit`: what is only described may be larger."""
    folder, model, generation = _model(config)
    if config.hf_overrides:
        model = model.overridden(config.hf_overrides)
    try:
        default_params = SamplingParams(**generation.sampling_defaults())
    except ValueError as error:
        raise ValueError(f"generation_config.json of {config.model or 'the bundled model'}: {error}") from error
    text = config.layout_text
    layout = Layout.build(text.mesh_config(jax.device_count()), text.rules, replica=replica)
    on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
    dtype = config.dtype if config.dtype != "auto" else ("float32" if on_cpu else model.dtype)
    partitions = layout.num_shards("batch")
    multiple = math.lcm(partitions, layout.num_shards("tokens"))
    budget, max_num_seqs = _step_size(config, on_cpu, multiple)
    for spec in slot_specs(model, layout, dtype).values():
        layout.place(spec)

    if config.max_model_len and config.max_model_len > model.context_length:
        raise ValueError(
            f"max_model_len {config.max_model_len} is more than the {model.context_length} tokens of the model"
        )
    longest = config.max_model_len or model.context_length
    dims = Dims.of(model, layout)
    per_page = page_bytes(dims, layout, config.block_size, dtype)
    footprint = Footprint(model, dtype, config.block_size, max_num_seqs, budget, longest, 0 if on_cpu else SLACK)
    num_bytes = config.kv_cache_memory_bytes or sys.maxsize
    if must_fit:
        num_bytes = _cache_bytes(config, footprint, layout, text.mesh_config(jax.device_count()).num_devices)
    pages_per_seq = -(-longest // config.block_size)
    # One page is scratch; more than every slot at full length could never be used.
    num_pages = min(num_bytes // per_page, max_num_seqs // partitions * pages_per_seq + 1)
    holds = max(num_pages - 1, 0) * config.block_size
    if holds < min(longest, 2) or (config.max_model_len and holds < config.max_model_len):
        raise ValueError(
            f"the KV cache of {num_bytes / GIB:.3g} GiB per device holds {holds} tokens, fewer than max_model_len "
            f"{longest}; raise kv_cache_memory_bytes (a page of {config.block_size} tokens takes {per_page} bytes) "
            "or lower max_model_len"
        )
    max_model_len = min(longest, holds)
    if max_model_len < longest:
        logger.info("max_model_len is %d, what the KV cache holds, instead of the model's %d", max_model_len, longest)
    plan, buckets = plan_steps(
        model,
        layout,
        dtype=dtype,
        page_size=config.block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        num_logprobs=min(config.max_logprobs, model.vocab_size),
        decode_attention=config.decode_attention,
        prefill_attention=config.prefill_attention,
        add_norm=config.add_norm,
        all_reduce=config.all_reduce,
        products=config.products,
        deterministic=config.deterministic,
    )
    logger.info(
        "%s on %s, %s, %s decode, addition and norm by %s, products by %s, %s all-reduces; %d pages of %d tokens (%.2f "
        "GiB per device); %d sequences of %d, %d tokens a step",
        config.model or "the bundled model",
        dict(layout.mesh.shape),
        dtype,
        plan.decode_attention,
        plan.add_norm,
        plan.products,
        plan.all_reduce,
        num_pages,
        config.block_size,
        num_pages * per_page / GIB,
        max_num_seqs,
        max_model_len,
        budget,
    )
    return Resolved(folder, model, generation, default_params, dtype, plan, buckets, num_pages, max_model_len)


def _model(config: EngineConfig) -> tuple[Path | None, LlamaConfig, GenerationConfig]:
    if config.load_format == "dummy" and config.model in SHAPES:
        model = SHAPES[config.model]
        return None, model, GenerationConfig(model.eos_token_ids)
    folder = resolve_model(config.model, revision=config.revision)
    model = LlamaConfig.from_file(folder / "config.json")
    return folder, model, GenerationConfig.from_folder(folder, model)


def _step_size(config: EngineConfig, on_cpu: bool, multiple: int) -> tuple[int, int]:
    """Tokens of a step and sequences at once, each a multiple of the pieces that the layout cuts rows into."""
    budget = config.max_num_batched_tokens or (CPU_TOKENS if on_cpu else GPU_TOKENS) // multiple * multiple or multiple
    max_num_seqs = config.max_num_seqs or min(32 if on_cpu else 256, budget) // multiple * multiple or multiple
    check_step_size(budget, max_num_seqs, multiple)
    return budget, max_num_seqs


def _cache_bytes(config: EngineConfig, footprint: Footprint, layout: Layout, num_devices: int) -> int:
    """Bytes per device for pages: what was asked for; else on CPU a stated share of RAM, on others what weights and
    steps leave. Raises ValueError when the model or the cache does not fit."""
    asked = config.kv_cache_memory_bytes
    available = free_bytes(layout, num_devices)
    if available is None:
        if asked is None:
            raise ValueError("this device does not tell its memory; give kv_cache_memory_bytes")
        return asked
    on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
    shared = available * num_devices if on_cpu else None
    refuse_too_large(footprint, layout, config.max_model_len or footprint.page_size, available, shared=shared)
    left = available - footprint.of(layout, 0).total
    if asked is not None:
        if asked > left:
            raise ValueError(
                f"kv_cache_memory_bytes is {show_bytes(asked)}, but weights and steps leave {show_bytes(left)} of the "
                f"{show_bytes(available)} free on each device"
            )
        return asked
    if on_cpu:
        return min(int(psutil.virtual_memory().total * CPU_CACHE_SHARE) // num_devices, CPU_CACHE_LIMIT, left)
    return left
