"""All-reduces over all devices, in a chain of them within one program: microseconds and bus bandwidth by size.

    python benchmarks/all_reduce.py
    python benchmarks/all_reduce.py --implementations reference
    python benchmarks/all_reduce.py --implementations reference --kib 8 64 --calls 4    (on a CPU: four virtual devices)

Rows are of a model's width (--width), in bfloat16. `norm` is the all-reduce with residual addition and norm after it:
one kernel, or XLA's collective and what XLA makes of the rest. The reference is NCCL, and with
XLA_FLAGS=--xla_gpu_experimental_use_collective_kernels=ALL_REDUCE it is kernels of XLA's own, where XLA has any. Bus
bandwidth is 2 (n - 1) / n times the message over the time: what each link must carry in the best algorithm. That every
device has the same bits is what tests/pallas_kernels/test_all_reduce_gpu.py is for. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from devices import require_gpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from offline import report

from paddock.pallas_kernels import ALL_REDUCE, ALL_REDUCE_ADD_NORM, MailboxShape
from paddock.serving.mailboxes import Mailboxes
from paddock.serving.platform import make_cpu_devices

AXIS = "tensor"
CPU_DEVICES = 4


def programs(mesh: Mesh, name: str, calls: int, width: int) -> dict[str, Callable[..., Any]]:
    """Chains of `calls` reductions (or of reductions, additions and norms) of rows that each device has for itself."""

    def reduce_rows(x: jax.Array, mailboxes: jax.Array) -> jax.Array:
        for _ in range(calls):
            x = ALL_REDUCE[name](x, axis_name=AXIS, mailbox=mailboxes[0])
        return x

    def reduce_norm(x: jax.Array, mailboxes: jax.Array) -> jax.Array:
        residual, scale, box = x, jnp.ones(width, x.dtype), mailboxes[0]
        for _ in range(calls):
            residual, x = ALL_REDUCE_ADD_NORM[name](x[None], residual, scale, eps=1e-5, axis_name=AXIS, mailbox=box)
        return x

    own = PartitionSpec(AXIS)
    mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=(own, own), out_specs=own, check_vma=False)
    return {"sum": jax.jit(mapped(reduce_rows)), "norm": jax.jit(mapped(reduce_norm))}


def seconds(run: Callable[[], Any], repetitions: int) -> float:
    """The best of five series of `repetitions` calls, a call."""
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repetitions):
            out = run()
        jax.block_until_ready(out)
        best = min(best, time.perf_counter() - start)
    return best / repetitions


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kib", type=int, nargs="+", default=[8, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 65536])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--calls", type=int, default=64, help="reductions in one program, as in 32 layers")
    parser.add_argument("--implementations", nargs="+", choices=sorted(ALL_REDUCE), default=["mosaic", "reference"])
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args(argv)
    make_cpu_devices(CPU_DEVICES)
    if "mosaic" in args.implementations:
        require_gpu("--implementations mosaic")
    if len(jax.devices()) < 2:
        raise SystemExit("an all-reduce needs two devices or more, but there is one")
    mesh = Mesh(np.array(jax.devices()), (AXIS,), axis_types=(AxisType.Auto,))
    boxes, rows = Mailboxes.open(mesh, [AXIS]), []
    for kib in args.kib:
        count, num_bytes = max(1, kib * 1024 // (2 * args.width)), kib * 1024
        row: dict[str, Any] = {"kib": kib, "rows": count}
        x = jnp.full((mesh.size * count, args.width), 2.0**-args.calls, jnp.bfloat16)
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(AXIS)))
        for name in args.implementations:
            if name == "mosaic" and count > MailboxShape(mesh.size).max_rows(2 * args.width):
                continue  # the engine leaves these to XLA
            for kind, program in programs(mesh, name, args.calls, args.width).items():
                taken = seconds(functools.partial(program, x, boxes.table), args.repetitions) / args.calls
                row[f"{name}_{kind}_us"] = taken * 1e6
                if kind == "sum":
                    row[f"{name}_bus_gb_s"] = 2 * (mesh.size - 1) / mesh.size * num_bytes / taken / 1e9
        rows.append(row)
    report({"benchmark": "all_reduce", "devices": mesh.size, "width": args.width, "calls": args.calls}, rows)


if __name__ == "__main__":
    main()
