"""`paddock plan`: which layouts of a model fit and how fast; `paddock serve --plan-only`: the one asked for."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .engine_config import GPU_TOKENS, EngineConfig

if TYPE_CHECKING:
    from paddock.sharding import MeshConfig
    from paddock.sharding.memory import DeviceBytes

    from .layout_plan import Plan

LARGEST_MESH = 1024


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="model folder, config.json, or a shape's name (llama-3.1-70b)"
    )
    card = parser.add_argument_group("accelerators")
    card.add_argument("--accelerator", metavar="NAME", help="as h100-80gb, mi300x or tpu-v5e")
    card.add_argument("--count", type=int, default=1, metavar="N", help="how many (default: %(default)s)")
    card.add_argument(
        "--memory",
        default="driver",
        choices=("driver", "datasheet"),
        help="driver: what the card gives a program, steps inside the used share; datasheet: the round figure, "
        "weights and pages alone inside it (default: %(default)s)",
    )
    card.add_argument(
        "--gpu-memory-utilization", dest="utilization", type=float, metavar="X", help="share to use (default: 0.9)"
    )
    card.add_argument("--profile", metavar="FILE", help="TOML of measured speeds instead of the shipped ones")
    card.add_argument(
        "--calibrate",
        action="store_true",
        help="measure the devices of this machine and write --profile (default: their name.toml); what is in it stays",
    )
    layout = parser.add_argument_group("layout", "by default every sensible one is tried")
    layout.add_argument("--mesh", default="", metavar="MESH", help="as in 'pipe=2,tensor=8'")
    layout.add_argument("--rules", default="", metavar="RULES", help="sharding rules over the defaults")
    layout.add_argument("--layout", default="", metavar="LAYOUT", help="a preset or a .toml file")
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="(default: the model's)"
    )
    engine.add_argument("--quantization", choices=("int8", "fp8"), help="of the layers' weights (default: none)")
    engine.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "fp8_e4m3", "int8"),
        help="of keys and values (default: --dtype)",
    )
    engine.add_argument(
        "--max-num-seqs", type=int, default=256, metavar="N", help="at once on each replica (default: %(default)s)"
    )
    engine.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=GPU_TOKENS,
        metavar="N",
        help="prompt tokens in a replica's step (default: %(default)s)",
    )
    engine.add_argument(
        "--max-model-len", type=int, metavar="N", help="that the cache must hold (default: input and output)"
    )
    engine.add_argument("--block-size", type=int, default=64, metavar="N", help="of a page (default: %(default)s)")
    load = parser.add_argument_group("load and objectives")
    load.add_argument("--input-len", type=int, default=1024, metavar="N", help="of a prompt (default: %(default)s)")
    load.add_argument("--output-len", type=int, default=128, metavar="N", help="after it (default: %(default)s)")
    load.add_argument("--ttft", type=float, metavar="MS", help="longest time to the first token")
    load.add_argument("--itl", type=float, metavar="MS", help="longest time between tokens")
    parser.add_argument(
        "--prove", action="store_true", help="compile the steps for that card, with none here (pip: paddock[plan])"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", metavar="FILE", help="write a page with plots as well")


def run(args: argparse.Namespace) -> int:
    """Raises ValueError naming the flag or the figure that is wrong, and when nothing fits."""
    if args.calibrate:
        return _calibrate(args)
    for name, value in (("MODEL", args.model), ("--accelerator", args.accelerator)):
        if value is None:
            raise ValueError(f"{name} is missing: what is to be planned?")
    from .layout_plan import Demand
    from .plan_html import write_html
    from .plan_proof import proof_report, proved
    from .plan_report import plan_report, unfit_sentence
    from .planner import plan, read_model
    from .speed_profile import read_profile

    for name in ("ttft", "itl"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"--{name} must be more than 0 ms, got {getattr(args, name)}")
    demand = Demand(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Demand)})
    found = plan(
        args.model,
        args.accelerator,
        args.count,
        mesh=args.mesh,
        rules=args.rules,
        layout=args.layout,
        demand=demand,
        profile=read_profile(Path(args.profile)) if args.profile else None,
    )
    if args.prove:
        found = proved(found, read_model(args.model)[1], lambda line: print(line, file=sys.stderr))
    if not any(layout.fits for layout in found.layouts):
        raise ValueError(unfit_sentence(found, _smallest(found)))
    limits = {name: None if getattr(args, name) is None else getattr(args, name) / 1000 for name in ("ttft", "itl")}
    if args.html:
        write_html(found, Path(args.html), **limits)
    if args.json:
        print(json.dumps(found.to_json(**limits)))
    else:
        print(plan_report(found, **limits))
        if args.prove:
            print("\n" + proof_report(found))
    if args.html:
        print(args.html, file=sys.stderr)
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    """Raises ValueError for a model or an accelerator: those of this machine are measured, by models of its choice."""
    for name, value in (("MODEL", args.model), ("--accelerator", args.accelerator)):
        if value is not None:
            raise ValueError(f"--calibrate measures this machine, whatever the model: leave out {name}")
    from .calibrate import accelerator_here, calibrate
    from .platform import prepare

    prepare(EngineConfig())
    path = Path(args.profile or f"{accelerator_here().replace(' ', '-')}.toml")
    calibrate(path, lambda line: print(line, file=sys.stderr, flush=True))
    print(path)
    return 0


def _smallest(found: Plan) -> str:
    """The smallest meshes of this card on which the model fits, as a sentence."""
    from paddock.sharding.memory import DeviceBytes, smallest_meshes

    from .planner import plan_layout, read_model
    from .speed_profile import shipped_profile

    _, model = read_model(found.model)
    profile = shipped_profile(found.accelerator.name)

    def need(mesh: MeshConfig) -> DeviceBytes:
        layout = plan_layout(model, found.accelerator, found.memory_bytes, found.demand, profile, mesh)
        if mesh.num_devices > LARGEST_MESH or not layout.fits:
            raise ValueError("too large")
        return DeviceBytes()

    meshes = smallest_meshes(
        need,
        lambda _: 0,
        tensor=[n for n in range(1, model.num_heads + 1) if model.num_heads % n == 0],
        pipe=range(1, model.num_layers + 1),
    )
    names = "; ".join(f"{mesh}" for mesh, _ in meshes)
    return f"The smallest meshes on which it fits: {names}" if names else "No mesh makes it fit"


def present(config: EngineConfig) -> str:
    """The plan of the layout that `config` asks for on the devices that are there, as the engine would choose it.

    Raises ValueError as the engine's start does, for a layout that does not fit too.
    """
    import jax

    from paddock.sharding.accelerators import accelerators
    from paddock.sharding.memory import show_bytes

    from .footprint import SLACK, Footprint
    from .layout_plan import Demand
    from .plan_report import plan_report
    from .planner import plan
    from .platform import prepare
    from .resolve import resolve

    prepare(config)
    resolved = resolve(config)
    device, step = jax.devices()[0], resolved.plan
    mesh = config.layout_text.mesh_config(jax.device_count())
    sizes = (resolved.page_size, step.num_slots, step.max_chunk_tokens, resolved.max_model_len)
    footprint = Footprint(resolved.model, resolved.dtype, *sizes, slack=0 if device.platform == "cpu" else SLACK)
    held: DeviceBytes = footprint.of(step.layout, resolved.num_pages)
    pages = resolved.num_pages - 1  # one is scratch
    partitions = step.num_partitions * mesh.num_replicas
    tokens, sequences = (partitions * n for n in (pages * resolved.page_size, pages // step.pages_per_seq))
    lines = [
        f"{config.model or 'the bundled model'} on {mesh} of {jax.device_count()} x {device.device_kind}, "
        f"{resolved.dtype}: fits",
        f"each device: {held}",
        f"{resolved.num_pages} pages of {resolved.page_size} tokens, "
        f"{show_bytes(held.kv_cache // resolved.num_pages)} each; {tokens:,} KV tokens, "
        f"{sequences} sequences of {resolved.max_model_len:,}",
    ]
    card = next((card for card in accelerators().values() if card.device_kind == device.device_kind), None)
    if card is None:
        return "\n".join([*lines, f"no times: {device.device_kind} is not in the table of accelerators"])
    demand = Demand(
        dtype=resolved.dtype,
        max_num_seqs=step.num_slots,
        max_num_batched_tokens=step.max_chunk_tokens,
        block_size=resolved.page_size,
        input_len=max(1, min(1024, resolved.max_model_len // 2)),
        output_len=max(1, min(128, resolved.max_model_len // 2)),
        utilization=config.gpu_memory_utilization,
    )
    text = config.layout_text
    asked = plan(
        resolved.model,
        card,
        mesh.num_devices,
        mesh=str(mesh) if mesh.axes else "tensor=1",
        rules=text.rules,
        demand=demand,
    )
    return "\n".join([*lines, "", plan_report(asked)])
