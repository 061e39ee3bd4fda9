"""All-reduces over all devices, in a chain of them within one program: microseconds and bus bandwidth by size.

    python benchmarks/all_reduce.py
    python benchmarks/all_reduce.py --implementations reference
    python benchmarks/all_reduce.py --implementations reference --kib 8 64 --calls 4    (on CPU)

Rows are of a model's width (--width), in bfloat16. `norm` is the all-reduce with residual addition and norm after it:
one kernel, or XLA's collective (NCCL; with XLA_FLAGS=--xla_gpu_experimental_use_collective_kernels=ALL_REDUCE its own) and what XLA makes of the rest. Bus bandwidth is 2 (n - 1) / n times the message over
the time: what each link must carry in the best algorithm. Before timing, ours is compared with a sum of the gathered
rows, bit by bit, on every device and in every one of --checks rounds of new data. The last line is JSON.
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
from jax.sharding import AxisType, Mesh, PartitionSpec
from offline import report

from paddock.pallas_kernels.all_reduce_tables import ALL_REDUCE, ALL_REDUCE_ADD_NORM
from paddock.serving.mailboxes import Mailboxes

AXIS = "tensor"
MIB = 1024


def programs(mesh: Mesh, name: str, calls: int, width: int) -> dict[str, Callable[..., Any]]:
    """Chains of `calls` reductions (or of reductions, additions and norms) of rows that each device has for itself."""
    needs_mailbox = name == "mosaic"

    def reduce_rows(x: jax.Array, mailbox: jax.Array) -> jax.Array:
        for _ in range(calls):
            x = ALL_REDUCE[name](x, axis_name=AXIS, mailbox=mailbox[0] if needs_mailbox else None)
        return x

    def reduce_norm(x: jax.Array, mailbox: jax.Array) -> jax.Array:
        residual, scale = x, jnp.ones(width, x.dtype)
        for _ in range(calls):
            box = mailbox[0] if needs_mailbox else None
            residual, x = ALL_REDUCE_ADD_NORM[name](x, residual, scale, eps=1e-5, axis_name=AXIS, mailbox=box)
        return x

    def mapped(fn: Callable[..., Any]) -> Callable[..., Any]:
        specs = PartitionSpec(AXIS), PartitionSpec(AXIS)
        return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False))

    return {"sum": mapped(reduce_rows), "norm": mapped(reduce_norm)}


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


def check(mesh: Mesh, name: str, rows: int, width: int, mailbox: jax.Array, rounds: int, two_shot: bool | None) -> int:
    """Rounds of new random data, each in calls of three sizes, in which any device's sums differ from those of the
    gathered rows in any bit."""
    reduce = functools.partial(ALL_REDUCE[name], **({"two_shot": two_shot} if name == "mosaic" else {}))

    def run(seed: jax.Array, mailbox: jax.Array) -> jax.Array:
        rank = jax.lax.axis_index(AXIS)

        def once(i: jax.Array, wrong: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed[0]), i), rank)
            x = jax.random.normal(key, (rows, width), jnp.bfloat16)
            differs = jnp.zeros((), bool)
            for count in (rows, 1, max(1, rows // 2)):
                out = reduce(x[:count], axis_name=AXIS, mailbox=mailbox[0])
                parts = jax.lax.all_gather(x[:count], AXIS).astype(jnp.float32)
                wanted = functools.reduce(jnp.add, list(parts)).astype(x.dtype)
                bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
                differs |= jnp.any(bits(out) != bits(wanted))
            return wrong + differs

        return jax.lax.fori_loop(0, rounds, once, jnp.zeros((), jnp.int32))[None]

    specs = PartitionSpec(), PartitionSpec(AXIS)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False)
    return int(np.sum(np.asarray(jax.jit(mapped)(np.asarray([rows], np.int32), mailbox))))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kib", type=int, nargs="+", default=[8, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 65536])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--calls", type=int, default=64, help="reductions in one program, as in 32 layers")
    parser.add_argument("--implementations", nargs="+", choices=sorted(ALL_REDUCE), default=["mosaic", "reference"])
    parser.add_argument("--checks", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args(argv)
    mesh = Mesh(np.array(jax.devices()), (AXIS,), axis_types=(AxisType.Auto,))
    boxes = Mailboxes.open(mesh, [AXIS]) if set(args.implementations) != {"reference"} else None
    mailbox: Any = boxes.table if boxes else jnp.zeros((mesh.size, mesh.size + 2, 2), jnp.int32)
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(AXIS))
    table = []
    for kib in args.kib:
        count = max(1, kib * 1024 // (2 * args.width))
        row: dict[str, Any] = {"kib": kib, "rows": count}
        x = jax.device_put(jnp.full((mesh.size * count, args.width), 2.0**-args.calls, jnp.bfloat16), sharding)
        for name in args.implementations:
            try:
                if name == "mosaic":
                    row["wrong"] = check(mesh, name, count, args.width, mailbox, args.checks, None)
                for kind, program in programs(mesh, name, args.calls, args.width).items():
                    run = functools.partial(program, x, mailbox)
                    taken = seconds(run, max(1, args.repetitions if kib <= 2048 else 1)) / args.calls
                    row[f"{name}_{kind}_us"] = taken * 1e6
                    if kind == "sum":
                        row[f"{name}_bus_gb_s"] = 2 * (mesh.size - 1) / mesh.size * kib * 1024 / taken / 1e9
            except ValueError as error:
                row[f"{name}_refused"] = str(error)
        print(row, flush=True)
        table.append(row)
    columns = list(dict.fromkeys(key for row in table for key in row))
    report({"benchmark": "all_reduce", "devices": mesh.size}, [{key: row.get(key) for key in columns} for row in table])


if __name__ == "__main__":
    main()
