"""Everything that was left "auto", decided once and logged, before anything large is allocated."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import psutil

from paddock.checkpoints import GenerationConfig, resolve_model
from paddock.model import Dims, LlamaConfig, param_specs
from paddock.model.shapes import SHAPES
from paddock.pallas_kernels import DECODE_ATTENTION, PREFILL_ATTENTION, check_mosaic, mosaic_mode
from paddock.sharding import Layout

from .bucket import BucketTable
from .engine_config import EngineConfig
from .kv_cache import page_bytes
from .sampling_params import SamplingParams
from .step import StepPlan

logger = logging.getLogger("paddock")

MAX_CHUNKS = 16
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


def resolve(config: EngineConfig) -> Resolved:
    """Raises ValueError naming the option that cannot be had."""
    folder, model, generation = _model(config)
    try:
        default_params = SamplingParams(**generation.sampling_defaults())
    except ValueError as error:
        raise ValueError(f"generation_config.json of {config.model or 'the bundled model'}: {error}") from error
    layout = Layout.build(config.mesh_text, config.rules)
    _refuse_unbuilt(layout)
    on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
    dtype = config.dtype if config.dtype != "auto" else ("float32" if on_cpu else model.dtype)
    budget = config.max_num_batched_tokens or (512 if on_cpu else 2048)
    max_num_seqs = config.max_num_seqs or min(32 if on_cpu else 256, budget)
    if max_num_seqs > budget:
        raise ValueError(
            f"max_num_batched_tokens {budget} is less than max_num_seqs {max_num_seqs}: each running sequence needs a "
            "token in every step"
        )
    for spec in param_specs(model, layout, dtype).values():
        layout.place(spec)

    if config.max_model_len and config.max_model_len > model.context_length:
        raise ValueError(
            f"max_model_len {config.max_model_len} is more than the {model.context_length} tokens of the model"
        )
    longest = config.max_model_len or model.context_length
    dims = Dims.of(model, layout)
    per_page = page_bytes(dims, layout, config.block_size, dtype)
    num_bytes = config.kv_cache_memory_bytes or _cache_bytes(model, layout, dtype, max_num_seqs, budget, on_cpu)
    pages_per_seq = -(-longest // config.block_size)
    # One page is scratch; more than every slot at full length could never be used.
    num_pages = min(num_bytes // per_page, max_num_seqs * pages_per_seq + 1)
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
    decode, prefill = config.decode_attention, config.prefill_attention
    if decode == "auto":
        decode = _fastest_decode(layout.mesh.devices.flat[0], dtype, dims, config.block_size)
    if prefill == "auto":
        prefill = "blocked"
    plan = StepPlan(
        config=model,
        layout=layout,
        page_size=config.block_size,
        num_slots=max_num_seqs,
        pages_per_seq=-(-max_model_len // config.block_size),
        max_chunk_tokens=budget,
        num_logprobs=min(config.max_logprobs, model.vocab_size),
        decode_attention=_known("decode_attention", decode, DECODE_ATTENTION),
        prefill_attention=_known("prefill_attention", prefill, PREFILL_ATTENTION),
        branches=on_cpu,
    )
    buckets = BucketTable.of(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_chunks=min(MAX_CHUNKS, max_num_seqs),
        on_cpu=on_cpu,
    )
    logger.info(
        "%s on %s, %s, %s decode; %d pages of %d tokens (%.2f GiB per device); %d sequences of %d, %d tokens a step",
        config.model or "the bundled model",
        dict(layout.mesh.shape),
        dtype,
        decode,
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


def _refuse_unbuilt(layout: Layout) -> None:
    for axis in ("batch", "layers", "pages", "head_dim", "embed"):
        if layout.num_shards(axis) > 1:
            raise ValueError(f"rules: splitting {axis} is not supported; q_heads, kv_heads, mlp and vocab can be split")


def _cache_bytes(model: LlamaConfig, layout: Layout, dtype: str, max_num_seqs: int, budget: int, on_cpu: bool) -> int:
    """Bytes per device for pages: on CPU a stated share of RAM, else what weights and steps leave."""
    if on_cpu:
        return min(int(psutil.virtual_memory().total * CPU_CACHE_SHARE), CPU_CACHE_LIMIT)
    stats = layout.mesh.devices.flat[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ValueError("this device does not tell its memory; give kv_cache_memory_bytes")
    weights = sum(layout.bytes_per_device(spec) for spec in param_specs(model, layout, dtype).values())
    free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    left = free - weights - _step_bytes(model, max_num_seqs, budget, dtype)
    if left <= 0:
        raise ValueError(
            f"the weights take {weights / GIB:.1f} GiB per device and {free / GIB:.1f} GiB are free: nothing is left "
            "for the KV cache; use more devices"
        )
    return left


def _step_bytes(model: LlamaConfig, slots: int, budget: int, dtype: str) -> int:
    """An upper estimate of what a step needs besides weights and pages: activations, logits, sampler state."""
    activations = budget * (4 * model.embed_dim + 4 * model.mlp_dim) * jnp.dtype(dtype).itemsize
    logits = 8 * (slots + MAX_CHUNKS) * model.vocab_size * 4
    state = 9 * slots * model.vocab_size
    return activations + logits + state + GIB


def _fastest_decode(device: Any, dtype: str, dims: Dims, page_size: int) -> str:
    """The Mosaic kernel where it can run (8B, H100, 32 sequences: 8.2 against 20.9 ms a token), else `blocked`."""
    if getattr(device, "compute_capability", "") != "9.0":
        return "blocked"
    try:
        mosaic_mode(False)
        check_mosaic(jnp.dtype(dtype), dims.config.head_dim, page_size, dims.group)
    except ValueError as error:
        logger.info("decode_attention is blocked: %s", error)
        return "blocked"
    return "mosaic"


def _known(option: str, name: str, table: dict) -> str:
    if name not in table:
        raise ValueError(f"{option} {name!r} is unknown; there are {', '.join(sorted(table))}")
    return name
