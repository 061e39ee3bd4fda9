"""What every product kernel is launched with: its rings in shared memory, its barriers, its grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from .compat import mosaic_mode
from .matmul_tiling import DEPTH, SMS, Tiling


def rings(tiling: Tiling, num_columns: int, dtype: Any, interpret: bool) -> dict[str, Any]:
    """The scratch that `walk` takes, but for `out_smem`, in which tiles leave."""
    bands = tiling.bands(num_columns)
    empty: dict[str, Any] = {"num_arrivals": tiling.warpgroups, "num_barriers": tiling.stages}
    return dict(
        x_smem=tile((tiling.stages, tiling.rows, DEPTH), dtype),
        w_smem=together([tile((tiling.stages, DEPTH, columns), dtype) for _, columns, _ in bands], interpret),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
        empty=plgpu.ClusterBarrier(collective_axes=("half",), **empty) if tiling.pair else plgpu.Barrier(**empty),
        stored=plgpu.Barrier(num_arrivals=tiling.warpgroups),
    )


def launch(tiling: Tiling, num_rows: int, num_columns: int, interpret: bool) -> dict[str, Any]:
    """The arguments of `plgpu.kernel` that say how many blocks and threads there are, and how they are compiled."""
    units = max(tiles for _, _, tiles in tiling.bands(num_columns)) * tiling.split * tiling.row_tiles(num_rows)
    names = (("half",) if tiling.pair else ()) + (("share",) if tiling.share > 1 else ())
    sizes = ((2,) if tiling.pair else ()) + ((tiling.share,) if tiling.share > 1 else ())
    return dict(
        grid=(min(units, SMS // tiling.cluster),),
        grid_names=("worker",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=mosaic_mode(interpret),
        **({"cluster": sizes, "cluster_names": names} if names else {}),
    )


def together(refs: Sequence[Any], interpret: bool) -> Any:
    """Memory that several things lie in, one after the other in time. The interpreter knows no such memory."""
    return tuple(refs) if interpret else plgpu.RefUnion(*refs)


def tile(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the widest swizzle that divides its rows: 128 bytes, or 64 for half a tile of 64 columns."""
    width = math.gcd(128 // jnp.dtype(dtype).itemsize, shape[-1])
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width * jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
