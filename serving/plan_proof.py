"""`paddock plan --prove`: a plan whose bytes are those of the compiled steps instead of estimates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from paddock.model import Dims, LlamaConfig
from paddock.sharding.memory import DeviceBytes, PlannedLayout, show_bytes

from .footprint import SLACK
from .kv_cache import page_bytes
from .layout_plan import Demand, LayoutPlan, Plan, mesh_text
from .plan_prove import Proof, prove, require_wheels, target_description
from .text_table import text_table


def proved(plan: Plan, config: LlamaConfig, note: Callable[[str], None] = lambda line: None) -> Plan:
    """`plan` with every layout that fits compiled for its accelerator; `note` is told of each before it starts.

    Raises ValueError for an accelerator that steps cannot be compiled for, missing wheels, and dtypes that the engine's
    steps do not have; RuntimeError as `prove` does.
    """
    demand, card = plan.demand, plan.accelerator.name
    for name, usual in (("quantization", None), ("kv_cache_dtype", "auto")):
        if getattr(demand, name) != usual:
            raise ValueError(f"the engine has no steps with {name} {getattr(demand, name)} yet: nothing to prove")
    target_description(card)
    require_wheels()
    layouts = []
    for layout in plan.layouts:
        if layout.fits:
            note(f"compiling for {layout.num_devices} x {card}, mesh {layout.mesh}")
            layout = with_proof(layout, _prove(config, card, demand, layout))
        layouts.append(layout)
    return dataclasses.replace(plan, layouts=tuple(layouts))


def with_proof(layout: LayoutPlan, proof: Proof) -> LayoutPlan:
    """`layout` with the bytes of the step that needs most; libraries and fragments remain an allowance."""
    worst = max(proof.steps.values(), key=lambda step: step.total)
    held = DeviceBytes(
        weights=proof.weights,
        kv_cache=proof.kv_cache,
        state=worst.arguments - proof.weights - proof.kv_cache,
        temp=worst.temp + worst.outputs - worst.aliases + SLACK,
    )
    layout = dataclasses.replace(layout, bytes_per_device=held, proof=proof)
    if held.total <= layout.available:
        return layout
    reason = f"the compiled steps need {held}, more than {show_bytes(layout.available)}"
    return dataclasses.replace(layout, fits=False, reason=reason, prefill_seconds=None, decode=(), source="")


def proof_report(plan: Plan) -> str:
    """What the compiler said, for people: bytes of each step on each device, and collectives."""
    return "\n\n".join(_layout_report(layout, layout.proof) for layout in plan.layouts if layout.proof is not None)


def _prove(config: LlamaConfig, card: str, demand: Demand, layout: LayoutPlan) -> Proof:
    split = PlannedLayout.of(layout.mesh, layout.rules)
    dtype = config.dtype if demand.dtype == "auto" else demand.dtype
    per_page = page_bytes(Dims.of(config, split), split, demand.block_size, jnp.dtype(dtype))
    return prove(
        config,
        mesh_text(layout.mesh),
        layout.rules,
        card,
        dtype=dtype,
        page_size=demand.block_size,
        num_pages=layout.bytes_per_device.kv_cache // per_page,
        max_num_seqs=demand.max_num_seqs,
        max_num_batched_tokens=demand.max_num_batched_tokens,
        max_model_len=demand.max_model_len or config.context_length,
    )


def _layout_report(layout: LayoutPlan, proof: Proof) -> str:
    head = (
        f"{layout.mesh}, compiled for {proof.target} by JAX {proof.jax} with {proof.num_pages} pages, "
        f"{proof.decode_attention} decode and {proof.prefill_attention} prefill attention; on each device:"
    )
    steps = [
        (
            f"{name} {step.bucket}",
            *(show_bytes(n) for n in (step.arguments, step.aliases, step.outputs, step.temp, step.total)),
            f"{step.seconds:.1f}",
        )
        for name, step in proof.steps.items()
    ]
    collectives = [
        (name, total.part or "(other)", total.kind, total.count, total.group_size, show_bytes(total.sent_bytes))
        for name, step in proof.steps.items()
        for total in step.collectives
    ]
    parts = [head, text_table(("step", "arguments", "aliases", "outputs", "temp", "total", "compile s"), steps)]
    if collectives:
        parts.append(text_table(("step", "part", "collective", "count", "devices", "sent by each"), collectives))
    return "\n".join(parts)
