"""The matrix products of a decode step: ours (Mosaic GPU) beside XLA's choice and torch's (cuBLAS), if torch is there.

    python benchmarks/matmul.py
    python benchmarks/matmul.py --model smollm2-135m --rows 1 --implementations reference    (on a CPU)

Microseconds and GB/s of weight bytes. Every timing runs over copies of the weights that together are larger than any
cache, in one program; the floor is the weights at the copy bandwidth measured in the same run. `gate_up` has its silu
in it but in torch's. The head is not here: XLA's is the fastest at every size. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too

import jax
import jax.numpy as jnp
from devices import require_gpu
from offline import copy_bandwidth, report

from paddock.model import Dims, LlamaConfig
from paddock.model.shapes import SHAPES
from paddock.pallas_kernels.matmul_tables import MATMUL

COLD_BYTES = 2**28  # several times an H100's 50 MB of L2


def products(config: LlamaConfig) -> dict[str, tuple[tuple[int, int], dict[str, Any]]]:
    """Each product's weight shape and arguments."""
    dims = Dims.of(config)
    heads, h, D, F = dims.kv_heads * dims.group, config.head_dim, config.embed_dim, config.mlp_dim
    return {
        "qkv": ((D, (heads + 2 * dims.kv_heads) * h), {}),
        "out": ((heads * h, D), {}),
        "gate_up": ((D, 2 * F), {"epilogue": "swiglu"}),
        "down": ((F, D), {}),
    }


def seconds(run: Callable[[], Any], wait: Callable[[Any], Any], repetitions: int) -> float:
    """The best of five series of `repetitions` calls, a call."""
    wait(run())
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repetitions):
            out = run()
        wait(out)
        best = min(best, time.perf_counter() - start)
    return best / repetitions


def time_jax(name: str, rows: int, weights: list[jax.Array], arguments: dict[str, Any], repetitions: int) -> float:
    """Seconds of one product. Raises ValueError where the implementation cannot run."""
    depth = weights[0].shape[0]
    inputs = [jax.random.normal(jax.random.key(i), (rows, depth), weights[0].dtype) for i in range(len(weights))]
    program = jax.jit(lambda xs, ws: [MATMUL[name](x, w, **arguments) for x, w in zip(xs, ws, strict=True)])
    return seconds(lambda: program(inputs, weights), jax.block_until_ready, repetitions) / len(weights)


def time_torch(rows: int, shape: tuple[int, int], copies: int, repetitions: int) -> float:
    """Seconds of the product alone (no silu), with its weights as they lie here; in a CUDA graph."""
    import torch

    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    x = torch.randn(rows, shape[0], device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    x @ weights[0]  # cuBLAS must have started before a capture
    with torch.cuda.graph(graph):
        outputs = [x @ w for w in weights]
    return seconds(graph.replay, lambda _: torch.cuda.synchronize(), repetitions) / len(outputs)


def has_torch() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 192, 256])
    parser.add_argument("--products", nargs="+", help="some of qkv, out, gate_up, down")
    parser.add_argument("--implementations", nargs="+", choices=sorted(MATMUL), default=["mosaic", "reference"])
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args(argv)
    table = products(SHAPES[args.model])
    unknown = sorted(set(args.products or ()) - set(table))
    if unknown:
        parser.error(f"--products must be some of {', '.join(table)}: got {unknown[0]}")
    if "mosaic" in args.implementations:
        require_gpu("--implementations mosaic")
    bandwidth, with_torch, rows = copy_bandwidth(), has_torch(), []
    for name in args.products or table:
        shape, arguments = table[name]
        size = 2 * shape[0] * shape[1]
        copies = max(2, -(-COLD_BYTES // size))
        weights = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(copies)]
        for count in args.rows:
            row: dict[str, Any] = {"product": name, "rows": count, "floor_us": size / bandwidth * 1e6}
            for implementation in args.implementations:
                taken = time_jax(implementation, count, weights, arguments, args.repetitions)
                label = "xla" if implementation == "reference" else implementation
                row |= {f"{label}_us": taken * 1e6, f"{label}_gb_s": size / taken / 1e9}
            if with_torch:
                taken = time_torch(count, shape, copies, args.repetitions)
                row |= {"torch_us": taken * 1e6, "torch_gb_s": size / taken / 1e9}
            rows.append(row)
    report({"benchmark": "matmul", "model": args.model, "copy_gb_s": bandwidth / 1e9}, rows)


if __name__ == "__main__":
    main()
