"""New keys and values into their pages as one Pallas kernel for NVIDIA Hopper (Mosaic GPU)."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Num

from .checks import check_append
from .compat import kernel, mosaic_mode


@functools.partial(jax.jit, static_argnames=("interpret",))  # traced once, not once a layer
def append_mosaic(
    k_pages: Num[Array, "P K p h"],
    v_pages: Num[Array, "P K p h"],
    k: Float[Array, "T K h"],
    v: Float[Array, "T K h"],
    page: Int[Array, " T"],
    offset: Int[Array, " T"],
    *,
    interpret: bool = False,
) -> tuple[Num[Array, "P K p h"], Num[Array, "P K p h"]]:
    """`append_reference` with one thread block per token, which copies the token's keys and values of all heads.

    In place once the pools are donated, where XLA's two scatters take several times as long. `interpret` runs the
    kernel on the CPU, for tests. Raises ValueError for shapes that do not fit together and on JAX older than 0.11
    (but for `interpret`), and, from JAX's lowering, on a platform that is no NVIDIA GPU.
    """
    check_append(k_pages, v_pages, k, v, page, offset)
    k, v = k.astype(k_pages.dtype), v.astype(v_pages.dtype)
    pools = jax.new_ref(k_pages), jax.new_ref(v_pages)
    rows = plgpu.SMEM(k.shape[1:], k.dtype)
    kernel(
        _copy_token,
        scratch_types=(rows, rows, plgpu.Barrier(num_arrivals=2)),
        grid=(k.shape[0],),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=mosaic_mode(interpret) or False,
    )(k, v, page, offset, *pools)
    return jax.freeze(pools[0]), jax.freeze(pools[1])


def _copy_token(
    k_ref: Any,
    v_ref: Any,
    page_ref: Any,
    offset_ref: Any,
    k_pages_ref: Any,
    v_pages_ref: Any,
    k_smem: Any,
    v_smem: Any,
    ready: Any,
) -> None:
    """Kernel body: k_smem, v_smem [K, h]."""
    token = lax.axis_index("token")
    plgpu.copy_gmem_to_smem(k_ref.at[token], k_smem, ready)
    plgpu.copy_gmem_to_smem(v_ref.at[token], v_smem, ready)
    target = page_ref[token], slice(None), offset_ref[token]
    plgpu.barrier_wait(ready)
    plgpu.copy_smem_to_gmem(k_smem, k_pages_ref.at[target])
    plgpu.copy_smem_to_gmem(v_smem, v_pages_ref.at[target])
    plgpu.wait_smem_to_gmem(0)
