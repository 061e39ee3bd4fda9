"""Paged decode attention on one GPU: GB/s of keys and values read, and the share of the copy bandwidth that is.

    python benchmarks/attention.py [--cases 64x2048,1x32768] [--page-size 64] [--rivals stream,shipped,cudnn,fa3]

Beside ours, in a graph: ours without one, each kernel launched while the one before ends; the op shipped in JAX (its
best of a few tunings), cuDNN's paged attention through JAX, and FlashAttention-3 as vLLM calls it, each where it can be
called here; why one cannot is printed. Every case runs many calls in one program, each on the output of the one before,
and the calls take turns over page tables that together cover far more memory than the L2 cache holds. Ours includes its
work list, which such a program computes once.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Room for torch, where FlashAttention-3 is measured in the same process.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")

import jax
import jax.numpy as jnp
import numpy as np
from devices import require_gpu

CASES = "64x2048,256x1024,8x4096,1x32768,64x256"
CALLS = 16  # in one program
ROUNDS = 7  # the median counts
POOL_BYTES = 1 << 30  # of keys and values that the calls of a program take turns over, at least where they can


@dataclass(frozen=True)
class Case:
    """B sequences of S tokens each, and the shape of the attention."""

    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int

    @property
    def pages(self) -> int:
        """Pages of one sequence."""
        return -(-self.tokens // self.page_size)

    @property
    def bytes_read(self) -> int:
        """Keys and values of one call, bfloat16."""
        return 4 * self.batch * self.tokens * self.kv_heads * self.head_dim

    @property
    def turns(self) -> int:
        """Page tables that a program's calls take turns over."""
        return min(CALLS, -(-POOL_BYTES // self.bytes_read))

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def tables(self) -> np.ndarray:
        """int32 [turns, B, N]: every page of the pool once, in random order."""
        pages = np.random.default_rng(0).permutation(self.turns * self.batch * self.pages)
        return pages.reshape(self.turns, self.batch, self.pages).astype(np.int32)


def seconds_per_call(run: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> float:
    """Median over the rounds of the seconds that one of the `calls` inside `run` takes; two runs to warm up."""
    wait((run(), run()))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        wait([run() for _ in range(3)])
        times.append((time.perf_counter() - start) / (3 * calls))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """GB/s of a device copy, read and write counted."""
    x = jnp.zeros((1 << 30,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds_per_call(lambda: copy(x), jax.block_until_ready, 1) / 1e9


def time_chain(
    case: Case, pool_shape: tuple[int, ...], attend: Callable[..., jax.Array], options: dict[str, Any] | None = None
) -> float:
    """Seconds a call of attend(q [B, H, h], k_pages, v_pages, page_table [B, N], kv_len [B]) -> like q.

    `options` are XLA's. Each page table is an array of its own: a slice of one would be a kernel between two calls,
    that no engine has.
    """

    @jax.jit
    def program(q: Any, k_pages: Any, v_pages: Any, tables: Sequence[Any], kv_len: Any) -> Any:
        for call in range(CALLS):
            q = attend(q, k_pages, v_pages, tables[call % case.turns], kv_len)
        return q

    fill = jax.jit(lambda key: jax.random.normal(key, pool_shape, jnp.bfloat16))
    q = jnp.ones((case.batch, case.heads, case.head_dim), jnp.bfloat16)
    kv_len = jnp.full((case.batch,), case.tokens, jnp.int32)
    arguments = q, fill(jax.random.key(0)), fill(jax.random.key(1)), [*map(jnp.asarray, case.tables())], kv_len
    compiled = program.lower(*arguments).compile(options)
    return seconds_per_call(lambda: compiled(*arguments), jax.block_until_ready, CALLS)


def pool(case: Case) -> tuple[int, ...]:
    return case.turns * case.batch * case.pages, case.kv_heads, case.page_size, case.head_dim


def paddock(case: Case, options: dict[str, Any] | None = None) -> float:
    from paddock.pallas_kernels import DECODE_ATTENTION

    return time_chain(case, pool(case), lambda *args: DECODE_ATTENTION["mosaic"](*args, scale=case.scale), options)


def stream(case: Case) -> float:
    """Ours where each kernel is launched while the one before ends, instead of in a graph."""
    return paddock(case, {"xla_gpu_enable_command_buffer": ""})


def shipped(case: Case) -> float:
    """The best of a few tunings of jax.experimental.pallas.ops.gpu.paged_attention; its pool is [K, P, p, h]."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    pages, kv_heads, *rest = pool(case)

    def attend(splits: int, block: int, q: Any, *pages_table_and_length: Any) -> Any:
        scaled = q * jnp.asarray(case.scale, q.dtype)
        return paged_attention(scaled, *pages_table_and_length, k_splits=splits, pages_per_compute_block=block)

    tunings = [
        (s, b) for s, b in ((1, 2), (4, 2), (16, 1), (16, 2)) if case.pages % s == 0 and case.pages // s % b == 0
    ]
    return min(time_chain(case, (kv_heads, pages, *rest), functools.partial(attend, *tuning)) for tuning in tunings)


def cudnn(case: Case) -> float:
    """cuDNN's paged attention through JAX's private wrapper: the only way to it."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, paged_attention

    def attend(q: Any, k_pages: Any, v_pages: Any, table: Any, kv_len: Any) -> Any:
        table = table[:, None, :, None]
        q_len = jnp.ones_like(kv_len)
        out = paged_attention(
            q[:, :, None], k_pages, v_pages, q_len, kv_len, table, table,
            scale=case.scale, mask_type=MaskType.PADDING, qkv_layout="BNTH",
        )  # fmt: skip
        return out[:, :, 0]

    return time_chain(case, pool(case), attend)


def fa3(case: Case) -> float:
    """FlashAttention-3 as vLLM calls it, in a CUDA graph; its pool is [P, p, K, h]."""
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    on_gpu: dict[str, Any] = dict(device="cuda", dtype=torch.bfloat16)
    pages, kv_heads, page_size, head_dim = pool(case)
    k_pages, v_pages = (torch.randn(pages, page_size, kv_heads, head_dim, **on_gpu) for _ in range(2))
    q = torch.randn(case.batch, case.heads, case.head_dim, **on_gpu)
    tables = torch.from_numpy(case.tables()).cuda()
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda")
    kv_len = torch.full((case.batch,), case.tokens, dtype=torch.int32, device="cuda")

    def chain(q: Any) -> Any:
        for call in range(CALLS):
            q = flash_attn_varlen_func(
                q, k_pages, v_pages, max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=case.tokens, seqused_k=kv_len,
                causal=True, block_table=tables[call % case.turns], fa_version=3,
            )  # fmt: skip
        return q

    chain(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(q)
    return seconds_per_call(graph.replay, lambda _: torch.cuda.synchronize(), CALLS)


RIVALS = {"stream": stream, "shipped": shipped, "cudnn": cudnn, "fa3": fa3}


def measurements(cases: list[Case], rivals: list[str], copy: float) -> Iterator[dict[str, Any]]:
    for case in cases:
        for name in ("paddock", *rivals):
            row: dict[str, Any] = {"case": f"{case.batch}x{case.tokens}", "name": name}
            try:
                seconds = {"paddock": paddock, **RIVALS}[name](case)
            except Exception as error:
                if name == "paddock":
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
                yield row | {"error": reason}
                continue
            bandwidth = case.bytes_read / seconds / 1e9
            yield row | {"microseconds": seconds * 1e6, "gb_per_s": bandwidth, "share_of_copy": bandwidth / copy}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=CASES, help="BxS,..: sequences x tokens each")
    parser.add_argument("--rivals", default=",".join(RIVALS), help="what to measure beside ours; empty: nothing")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=64)
    options = parser.parse_args(argv)

    shape = options.heads, options.kv_heads, options.head_dim, options.page_size
    sizes = [re.fullmatch("([1-9][0-9]*)x([1-9][0-9]*)", case) for case in options.cases.split(",")]
    if not all(sizes):
        parser.error(f"--cases must be of the form BxS,.. as in 64x2048,1x32768: got {options.cases!r}")
    cases = [Case(*map(int, size.groups()), *shape) for size in sizes if size]
    require_gpu("attention.py")
    device = jax.devices()[0].device_kind
    copy = copy_bandwidth()
    print(f"{device}, JAX {jax.__version__}: copy {copy:,.0f} GB/s (read + write)")
    print(f"H={shape[0]} K={shape[1]} h={shape[2]} bfloat16, pages of {shape[3]}\n")
    print(f"{'B x S':>12} {'kernel':>8} {'us':>9} {'GB/s':>7} {'of copy':>8}")
    rows = []
    for row in measurements(cases, list(filter(None, options.rivals.split(","))), copy):
        rows.append(row)
        figures = row.get("error") or f"{row['microseconds']:9.1f} {row['gb_per_s']:7,.0f} {row['share_of_copy']:8.0%}"
        print(f"{row['case']:>12} {row['name']:>8} {figures}", flush=True)
    print(json.dumps({"device": device, "copy_gb_per_s": copy, "shape": shape, "rows": rows}))


if __name__ == "__main__":
    main()
