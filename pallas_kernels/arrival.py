"""Thread blocks that count each other inside a Mosaic GPU kernel, so that the last of them can finish their work."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from .inline import SCALAR, convergent, i32, mosaic, offset_of, scalar_of

# A named barrier that Mosaic, which counts warpgroups from 1, leaves alone.
BARRIER = 14


def arrive(counters: Any, row: jax.Array, others: jax.Array) -> jax.Array:
    """Called by the first warpgroup of a block when its part is written: 1 if `others` blocks have called before, whose
    parts it then sees, else 0.

    Counts in the last column of `row` of counters [N, C] int32, which must be 0 and is made 0 again by the last one, as
    stream-K's semaphores are (arXiv 2301.03598). Nobody waits for anybody.
    """
    columns = counters.shape[1]
    one = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR), return_type=one)
    def count(_: Any, table: Any, place: Any, others: Any) -> Any:
        mgpu = mosaic()
        # All threads' writes come before the first thread's addition, and all threads' reads after it.
        last = mgpu.utils.inline_ptx(
            "{ .reg .pred first, last; .reg .b32 thread, before; "
            f"fence.acq_rel.gpu; barrier.cta.sync.aligned {BARRIER}, 128; "
            "mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0; mov.u32 before, 0xffffffff; "
            "@first atom.acq_rel.gpu.global.add.u32 before, [$1], 1; "
            "setp.eq.u32 last, before, $2; @last st.relaxed.gpu.global.u32 [$1], 0; "
            f"barrier.cta.red.or.aligned.pred last, {BARRIER}, 128, last; "
            "fence.acq_rel.gpu; selp.b32 $0, 1, 0, last; }",
            offset_of(mgpu.utils.memref_ptr(table), scalar_of(place), 4),
            scalar_of(others),
            result_types=i32(),
            has_side_effects=True,
            **convergent(),
        )
        return mgpu.FragmentedArray.splat(last, (), is_signed=True)

    return count(counters, row * columns + columns - 1, others)
