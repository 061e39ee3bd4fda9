"""Paged prefill attention on one GPU: TFLOP/s, and the share of a large matrix product's rate that is.

    python benchmarks/attention_prefill.py [--cases 4096,2048@16384] [--page-size 64] [--rivals blocked,fa3]

A case is the chunks of one call joined by "+": N tokens, or N@S for the last N of S tokens, and "16*" repeats. Beside
ours: `blocked` (plain jnp), and FlashAttention-3 as vLLM calls it where it can be called here; why not is printed.
Operations are those of the causal attention alone. Several calls run in one program, each on page tables that depend on
the output of the one before (a small kernel between them), with random pages; the time of a call is what a longer
program takes more than a shorter one. Ours includes no work list but the first: a program computes it once. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Room for torch, where FlashAttention-3 is measured in the same process.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")

import jax
import jax.numpy as jnp
import numpy as np
from devices import require_gpu

PREFIXES = "+".join(f"256@{256 + 2048 * i // 15}" for i in range(16))
CASES = f"4096,16384,{PREFIXES},2048@16384"
CALLS = (1, 5)  # in the short and in the long program
ROUNDS = 15  # the median counts
PRODUCT = 8192  # rows and columns of the matrices whose product gives the ceiling


@dataclass(frozen=True)
class Case:
    """Chunks of one call, (tokens, tokens of the sequence so far) each, and the shape of the attention."""

    chunks: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int

    @property
    def name(self) -> str:
        first, last = ("{}@{}".format(*chunk) for chunk in (self.chunks[0], self.chunks[-1]))
        return first if len(self.chunks) == 1 else f"{len(self.chunks)} chunks, {first} to {last}"

    @property
    def flops(self) -> float:
        """Of the two products: row i of a chunk sees kv_len - q_len + i + 1 tokens."""
        pairs = sum(length * total - length * (length - 1) // 2 for length, total in self.chunks)
        return 4.0 * self.heads * self.head_dim * pairs

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def table(self) -> np.ndarray:
        """int32 [C, N]: pages in random order, each of one chunk only; -1 past a chunk's last."""
        counts = [-(-total // self.page_size) for _, total in self.chunks]
        pages = np.random.default_rng(0).permutation(sum(counts))
        table = np.full((len(counts), max(counts)), -1, np.int32)
        for row, count, end in zip(table, counts, np.cumsum(counts), strict=True):
            row[:count] = pages[end - count : end]
        return table


def parse_case(text: str, shape: dict[str, int]) -> Case:
    """The case written as N, N@S, parts joined by +, each after an optional K*. Raises ValueError."""
    chunks: list[tuple[int, int]] = []
    for part in text.split("+"):
        found = re.fullmatch(r"(?:(\d+)\*)?(\d+)(?:@(\d+))?", part)
        if found is None:
            raise ValueError(f"{part!r} is not of the form N, N@S or K*N@S, as in 16*256@2048")
        repeat, length, total = found.groups()
        chunks += [(int(length), int(total or length))] * int(repeat or 1)
    if any(not 0 < length <= total for length, total in chunks):
        raise ValueError(f"a chunk N@S needs 0 < N <= S: got {text!r}")
    return Case(tuple(chunks), **shape)


def median_seconds(run: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Of ROUNDS runs, each waited for; two more to warm up."""
    times = []
    for _ in range(ROUNDS + 2):
        start = time.perf_counter()
        wait(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def seconds_per_call(make: Callable[[int], Callable[[], Any]], wait: Callable[[Any], Any]) -> float:
    """Of a call inside the programs that make(number of calls) returns."""
    short, long = (median_seconds(make(calls), wait) for calls in CALLS)
    return (long - short) / (CALLS[1] - CALLS[0])


def product_rate() -> float:
    """TFLOP/s of a large bfloat16 matrix product."""
    a = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT), jnp.bfloat16)

    def make(calls: int) -> Callable[[], Any]:
        def chain(x: Any) -> Any:
            for _ in range(4 * calls):
                x = (x @ a) * jnp.bfloat16(PRODUCT**-0.5)
            return x

        compiled = jax.jit(chain).lower(a).compile()
        return lambda: compiled(a)

    return 4 * 2 * PRODUCT**3 / seconds_per_call(make, jax.block_until_ready) / 1e12


def ours(case: Case, name: str) -> float:
    """Seconds a call of PREFILL_ATTENTION[name]."""
    from paddock.pallas_kernels import PREFILL_ATTENTION

    lengths, totals = np.array(case.chunks, np.int32).T
    table = case.table()
    fill = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    pool = (int(table.max()) + 1, case.kv_heads, case.page_size, case.head_dim)
    keys = jax.random.split(jax.random.key(0), 3)
    q = fill(keys[0], (int(lengths.sum()), case.heads, case.head_dim))
    starts = np.cumsum(lengths) - lengths
    arrays = q, fill(keys[1], pool), fill(keys[2], pool), *map(jnp.int32, (table, starts, lengths, totals))

    def make(calls: int) -> Callable[[], Any]:
        def program(q: Any, k: Any, v: Any, table: Any, *chunks: Any) -> Any:
            for _ in range(calls):
                out = PREFILL_ATTENTION[name](q, k, v, table, *chunks, scale=case.scale)
                table = table + (out[0, 0, 0] > 1e30).astype(jnp.int32)
            return table

        compiled = jax.jit(program).lower(*arrays).compile()
        return lambda: compiled(*arrays)

    return seconds_per_call(make, jax.block_until_ready)


def fa3(case: Case) -> float:
    """Seconds a call of FlashAttention-3 as vLLM calls it, in a CUDA graph; its pool is [P, p, K, h]."""
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    on_gpu: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
    lengths, totals = np.array(case.chunks, np.int32).T
    table = np.maximum(case.table(), 0)
    pool = (int(table.max()) + 1, case.page_size, case.kv_heads, case.head_dim)
    k_pages, v_pages = (torch.randn(pool, **on_gpu) for _ in range(2))
    q = torch.randn(int(lengths.sum()), case.heads, case.head_dim, **on_gpu)
    ends = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).cuda()
    kv_len, pages = torch.from_numpy(totals.copy()).cuda(), torch.from_numpy(table).cuda()

    def make(calls: int) -> Callable[[], Any]:
        def attend() -> None:
            for _ in range(calls):
                flash_attn_varlen_func(
                    q, k_pages, v_pages, max_seqlen_q=int(lengths.max()), cu_seqlens_q=ends,
                    max_seqlen_k=int(totals.max()), seqused_k=kv_len, causal=True, block_table=pages, fa_version=3,
                )  # fmt: skip

        attend()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attend()
        return graph.replay

    return seconds_per_call(make, lambda _: torch.cuda.synchronize())


def measurements(cases: list[Case], rivals: list[str], rate: float) -> Iterator[dict[str, Any]]:
    for case in cases:
        for name in ("mosaic", *rivals):
            row: dict[str, Any] = {"case": case.name, "name": name}
            try:
                seconds = fa3(case) if name == "fa3" else ours(case, name)
            except Exception as error:
                if name == "mosaic":
                    raise
                yield row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:100]}
                continue
            reached = case.flops / seconds / 1e12
            floor = case.flops / rate / 1e6
            speed = {"tflop_s": reached, "of_product": reached / rate}
            yield row | {"microseconds": seconds * 1e6, "floor": floor, **speed}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="comma-separated (default: %(default)s)")
    for name, value in (("heads", 32), ("kv-heads", 8), ("head-dim", 128), ("page-size", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rivals", default="blocked,fa3", help="comma-separated, or empty (default: %(default)s)")
    args = parser.parse_args(argv)
    shape = {name: getattr(args, name) for name in ("heads", "kv_heads", "head_dim", "page_size")}
    try:
        cases = [parse_case(text, shape) for text in args.cases.split(",")]
    except ValueError as error:
        parser.error(f"--cases: {error}")
    require_gpu("attention_prefill.py")
    device = jax.devices()[0].device_kind
    rate = product_rate()
    print(f"{device}, JAX {jax.__version__}; product of two {PRODUCT} x {PRODUCT}: {rate:.0f} TFLOP/s")
    print(f"{'case':34} {'name':8} {'us':>9} {'floor us':>9} {'TFLOP/s':>8} {'of product':>10}")
    rows = []
    for row in measurements(cases, [name for name in args.rivals.split(",") if name], rate):
        rows.append(row)
        numbers = "{microseconds:9.1f} {floor:9.1f} {tflop_s:8.1f} {of_product:10.1%}" if "floor" in row else "{error}"
        print("{case:34} {name:8} ".format(**row) + numbers.format(**row), flush=True)
    print(json.dumps({"benchmark": "attention_prefill", "device": device, "product_tflop_s": rate, "rows": rows}))


if __name__ == "__main__":
    main()
