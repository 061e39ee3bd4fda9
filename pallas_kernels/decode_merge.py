"""How the shares of paged decode attention become one output: float32 parts, weighted by their log-sum-exp."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .compat import load, placed, store_transposed
from .decode_plan import tiles_of
from .early_launch import await_kernel_before, launch_kernel_after

LAYOUT = plgpu.Layout.WGMMA
LOADED = 8192  # float32 values on their way at a time: 64 registers of each thread


def along_rows(vector: Any, matrix: Any) -> Any:
    """`vector` [n], of a value for every column, as a matrix like `matrix` [m, n]."""
    return lax.broadcast_in_dim(vector, matrix.shape, [1])


def store_output(total: Any, out_smem: Any, out_ref: Any) -> None:
    """Send total [h, rows] to out_ref [G, h], G <= rows, by way of out_smem [rows, h]; returns before it is there."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was sent before has left out_smem
    store_transposed(out_smem, total.astype(out_smem.dtype))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, out_ref.shape[0])], out_ref)


def merge_parts(
    parts_ref: Any, lse_ref: Any, owner: Any, others: Any, out_ref: Any, out_smem: Any, columns: Any
) -> None:
    """Merge what worker `owner` and the `others` after it found in one (sequence, kv head) into out_ref [G, c], which
    are the c `columns` of head_dim.

    parts_ref [workers, 2, h, rows], lse_ref [workers, 2, rows]: what a worker went on with lies in its slot 0, what it
    began and left to the next workers in its slot 1. out_smem [rows, c].
    """

    def part(i: Any) -> tuple[Any, Any]:
        source = owner + i, jnp.where(i > 0, 0, 1)
        return load(parts_ref.at[(*source, columns)], LAYOUT), load(lse_ref.at[source], LAYOUT.reduce(0))

    total, peak = part(0)
    together = max(1, LOADED // total.size)

    def add(step: Any, carry: Any) -> Any:
        total, peak, mass = carry
        found = []
        for i in range(together):
            index = 1 + step * together + i
            values, lse = part(jnp.minimum(index, others))
            found.append((values, lse + jnp.where(index <= others, 0.0, -jnp.inf)))
        new_peak = functools.reduce(jnp.maximum, [lse for _, lse in found], peak)
        decay = jnp.exp2(peak - new_peak)
        total, mass = total * along_rows(decay, total), mass * decay
        for values, lse in found:
            weight = jnp.exp2(lse - new_peak)
            total, mass = total + values * along_rows(weight, values), mass + weight
        return total, new_peak, mass

    start = total, peak, placed(jnp.ones(peak.shape, jnp.float32), LAYOUT.reduce(0))
    total, _, mass = lax.fori_loop(0, lax.div(others + together - 1, together), add, start)
    store_output(total / along_rows(mass, total), out_smem, out_ref)


def merge_share(
    parts_ref: Any, lse_ref: Any, plan_ref: Any, len_ref: Any, out_ref: Any, *, out_smem: Any, interpret: bool
) -> None:
    """Kernel body: where a worker's share ends inside a (sequence, kv head), `merge_parts`. out_ref [B, K, G, h];
    out_smem [rows, h or a part of it]."""
    launch_kernel_after(interpret)
    await_kernel_before(interpret)
    worker = lax.axis_index("worker")
    columns = pl.ds(lax.axis_index("columns") * out_smem.shape[1], out_smem.shape[1])
    share = plan_ref[worker, 3]
    sequence, head, taken = (plan_ref[worker + 1, i] for i in range(3))

    @pl.when(jnp.logical_and(taken > 0, taken <= share))
    def _merge() -> None:
        others = lax.div(tiles_of(len_ref[sequence]) - taken + share - 1, share)
        target = out_ref.at[sequence, head, :, columns]
        merge_parts(parts_ref, lse_ref, worker, others, target, out_smem, columns)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
