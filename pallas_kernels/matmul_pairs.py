"""Taking a wgmma accumulator's columns apart in pairs, in registers: a thread holds both columns of each pair."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

# wgmma's accumulator layout with each thread's two neighbouring columns made one.
_TILES = ((64, 4), (16, 4), (8, 4), (1,))


def split_pairs(sums: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Even and odd columns of float32 sums [M, N], each [M, N/2]; in the interpreter there are no registers to name."""
    if interpret:
        return sums[:, 0::2], sums[:, 1::2]
    layout = plgpu.Layout.TILED(plgpu.Tiling(_TILES), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1)
    half = plgpu.ShapeDtypeStruct((sums.shape[0], sums.shape[1] // 2), jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=(half, half))
    def split(_: Any, array: Any) -> Any:
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import vector

        target = layout.to_mgpu()

        def column(place: int) -> Any:
            registers = np.empty(target.registers_shape(half.shape), dtype=object)
            for index, pair in np.ndenumerate(array.registers):
                one = vector.extract(pair, dynamic_position=[], static_position=[place])
                registers[index] = vector.broadcast(ir.VectorType.get((1,), one.type), one)
            return mgpu.FragmentedArray(_registers=registers, _layout=target, _is_signed=None)

        return column(0), column(1)

    return split(sums)
