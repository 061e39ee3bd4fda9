"""Who computes what in an engine's steps, chosen where it was left "auto", and the shapes that steps come in."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from paddock.model import Dims, LlamaConfig, Stages
from paddock.pallas_kernels import DECODE_ATTENTION, PREFILL_ATTENTION, check_mosaic, check_prefill_mosaic
from paddock.sharding import Layout

from .bucket import BucketTable
from .footprint import MAX_CHUNKS
from .step_plan import StepPlan
from .step_products import check_add_norm, check_hopper, choose_all_reduce, choose_products

logger = logging.getLogger("paddock")

# Attention in plain JAX, which the compiler can partition along head_dim.
SPLITTABLE = {"blocked", "reference"}


def plan_steps(
    model: LlamaConfig,
    layout: Layout,
    *,
    dtype: str,
    page_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    num_logprobs: int = 0,
    decode_attention: str = "auto",
    prefill_attention: str = "auto",
    add_norm: str = "xla",
    all_reduce: str = "xla",
    products: str = "auto",
    deterministic: bool = False,
) -> tuple[StepPlan, BucketTable]:
    """What steps have in common, and the shapes they come in. The layout's devices need not be there: described ones do
    (`jax.experimental.topologies`). Raises ValueError naming a size or an attention that cannot be had."""
    device = layout.mesh.devices.flat[0]
    on_cpu, partitions = device.platform == "cpu", layout.num_shards("batch")
    dims, stages = Dims.of(model, layout), Stages.of(model, layout)
    multiple = math.lcm(partitions, layout.num_shards("tokens"))
    check_step_size(max_num_batched_tokens, max_num_seqs, multiple)
    decode, prefill = decode_attention, prefill_attention
    splits_head_dim, kind = layout.num_shards("head_dim") > 1, jnp.dtype(dtype)
    if decode == "auto":
        group = model.num_heads // dims.cache_heads
        check = lambda: check_mosaic(kind, model.head_dim, page_size, group)
        decode = "blocked" if splits_head_dim else _fastest("decode_attention", device, check)
    if prefill == "auto":
        check = lambda: check_prefill_mosaic(kind, model.head_dim, page_size)
        plain = splits_head_dim or deterministic
        prefill = "blocked" if plain else _fastest("prefill_attention", device, check)
    if deterministic and (decode_attention != "auto" or prefill not in SPLITTABLE):
        raise ValueError(
            f"deterministic decodes by the prefill attention, which must be {' or '.join(sorted(SPLITTABLE))}: got "
            f"decode_attention {decode_attention!r}, prefill_attention {prefill_attention!r}"
        )
    if splits_head_dim and not {decode, prefill} <= SPLITTABLE:
        raise ValueError(
            f"rules: head_dim is split over {'+'.join(layout.rules.head_dim)}, which {decode} decode and {prefill} "
            f"prefill attention cannot be; {', '.join(sorted(SPLITTABLE))} can"
        )
    products = choose_products(products, model, layout, kind)
    plan = StepPlan(
        config=model,
        layout=layout,
        dtype=dtype,
        page_size=page_size,
        num_slots=max_num_seqs,
        max_decodes=-(-max_num_seqs // (stages.count * multiple)) * multiple,
        pages_per_seq=-(-max_model_len // page_size),
        max_chunk_tokens=max_num_batched_tokens,
        num_logprobs=num_logprobs,
        decode_attention=_known("decode_attention", decode, DECODE_ATTENTION),
        prefill_attention=_known("prefill_attention", prefill, PREFILL_ATTENTION),
        branches=on_cpu and not deterministic,
        add_norm=check_add_norm(add_norm, products, model, layout, kind),
        all_reduce=choose_all_reduce(all_reduce, layout, model.embed_dim, kind),
        products=products,
        deterministic=deterministic,
    )
    buckets = BucketTable.of(
        max_decodes=plan.max_decodes,
        max_num_batched_tokens=max_num_batched_tokens,
        max_chunks=min(MAX_CHUNKS, max_num_seqs),
        on_cpu=on_cpu,
        multiple=multiple,
        num_partitions=partitions,
        single=deterministic,
    )
    return plan, buckets


def check_step_size(budget: int, max_num_seqs: int, multiple: int) -> None:
    """Raise ValueError naming a size that does not divide into `multiple` pieces."""
    for name, value in (("max_num_batched_tokens", budget), ("max_num_seqs", max_num_seqs)):
        if value % multiple:
            low = value // multiple * multiple
            raise ValueError(
                f"{name} {value} does not divide into the {multiple} pieces that the rules for batch and tokens cut "
                f"rows into; the nearest that do are {f'{low} or ' if low else ''}{low + multiple}"
            )


def _fastest(option: str, device: Any, check: Callable[[], None]) -> str:
    """The Mosaic kernel where `check` and the device let it run, else `blocked`; docs/numbers.md has both."""
    try:
        check_hopper(device)
        check()
    except ValueError as error:
        logger.info("%s is blocked: %s", option, error)
        return "blocked"
    return "mosaic"


def _known(option: str, name: str, table: dict) -> str:
    if name not in table:
        raise ValueError(f"{option} {name!r} is unknown; there are {', '.join(sorted(table))}")
    return name
