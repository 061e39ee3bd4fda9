"""Merging the parts of paged decode attention inside a Mosaic GPU kernel, by the block whose part came last."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from .inline import SCALAR, WARPGROUP, convergent, dialect, i64, mosaic, offset_of, scalar_of

QUAD = 4  # query heads of a thread: what it loads of a part, and of its log-sum-exps, is 16 bytes each
# Parts on their way at a time, each in 8 registers of a thread: with more, two blocks would not fit a multiprocessor.
# With 4, one sequence of 32,768 tokens, whose kv heads have 33 parts each, took 65.7 us instead of 60.2 (H100).
TOGETHER = 8
ZERO, NOTHING = "0f00000000", "0fff800000"  # as PTX writes 0 and -inf


def merge_inline(parts: Any, lse: Any, out: Any, owner: jax.Array, others: jax.Array, pair: jax.Array) -> None:
    """What `merge_parts` does, by one warpgroup, into row `pair` of out [B, K, G, h], counted over B and K together.

    parts [workers, 2, h, rows] and lse [workers, 2, rows] in float32, where `merge_parts` says, in global memory.
    Written in PTX: each thread keeps as many loads on their way as it has registers for, and Mosaic has no layouts to
    infer, which takes it longer than the whole rest of a kernel.
    """
    head_dim, rows = parts.shape[2:]
    group, dtype = out.shape[2], "bf16" if out.dtype == jnp.bfloat16 else "f16"

    @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 3, *(SCALAR,) * 3))
    def merge(_: Any, parts: Any, lse: Any, out: Any, owner: Any, others: Any, pair: Any) -> None:
        mgpu, llvm = mosaic(), dialect("llvm")
        start = offset_of(mgpu.utils.memref_ptr(out), scalar_of(pair), group * head_dim * 2)
        mgpu.utils.inline_ptx(
            _ptx(head_dim, rows, group, dtype),
            llvm.ptrtoint(i64(), mgpu.utils.memref_ptr(parts)),
            llvm.ptrtoint(i64(), mgpu.utils.memref_ptr(lse)),
            start,
            scalar_of(owner),
            scalar_of(others),
            result_types=(),
            has_side_effects=True,
            **convergent(),
        )

    merge(parts, lse, out, owner, others, pair)


def _ptx(head_dim: int, rows: int, group: int, dtype: str) -> str:
    """The loop over quads of heads, in which a thread has one dimension of head_dim, and in it that over parts.

    $0: parts, $1: lse, $2: where the output [G, h] begins, $3: owner, $4: others.
    """
    lanes, quads = range(QUAD), -(-group // QUAD)
    row_bytes, part_bytes = rows * 4, head_dim * rows * 4

    def load(target: str, address: str, missing: str) -> str:
        fill = " ".join(f"mov.f32 {target}{i}, {missing};" for i in lanes)
        quad = ", ".join(f"{target}{i}" for i in lanes)
        return f"{fill} @there ld.relaxed.gpu.global.v4.f32 {{{quad}}}, [{address}];"

    loads, peaks, sums = [], [], []
    for j in range(TOGETHER):
        # The owner's part lies in its slot 1, those of the workers after it in their slot 0.
        place = f"add.u32 row, part, {j}; setp.le.u32 there, row, $4; setp.eq.u32 first, row, 0;"
        place += " add.u32 row, row, $3; shl.b32 row, row, 1; @first add.u32 row, row, 1;"
        for target, base, size, missing in (("v", "values", part_bytes, ZERO), ("e", "exps", row_bytes, NOTHING)):
            place += f" mad.wide.u32 from, row, {size}, {base}; {load(f'{target}{j}_', 'from', missing)}"
        loads.append(place)
        peaks += [f"max.f32 n{i}, n{i}, e{j}_{i};" for i in lanes]
        sums += [f"sub.f32 e{j}_{i}, e{j}_{i}, n{i}; ex2.approx.f32 e{j}_{i}, e{j}_{i};" for i in lanes]
        sums += [f"add.f32 m{i}, m{i}, e{j}_{i}; fma.rn.f32 t{i}, v{j}_{i}, e{j}_{i}, t{i};" for i in lanes]
    floats = [f"{name}{i}" for name in "tmpnd" for i in lanes]
    floats += [f"{name}{j}_{i}" for name in "ve" for j in range(TOGETHER) for i in lanes]
    return " ".join(
        [
            "{ .reg .pred there, first; .reg .b16 half; .reg .b32 quad, dim, part, row, head;",
            f".reg .b64 from, values, exps, to, wide; .reg .f32 {', '.join(floats)};",
            f"mov.u32 dim, %tid.x; div.u32 quad, dim, {head_dim}; rem.u32 dim, dim, {head_dim}; cvt.u64.u32 wide, dim;",
            f"quads: setp.ge.u32 there, quad, {quads}; @there bra end;",
            f"mad.wide.u32 exps, quad, {QUAD * 4}, $1; mad.wide.u32 values, quad, {QUAD * 4}, $0;",
            f"mad.lo.u64 values, wide, {row_bytes}, values; mov.u32 part, 0;",
            *(f"mov.f32 t{i}, {ZERO}; mov.f32 m{i}, {ZERO}; mov.f32 p{i}, {NOTHING};" for i in lanes),
            "parts:",
            *loads,
            *(f"mov.f32 n{i}, p{i};" for i in lanes),
            *peaks,
            *(f"sub.f32 d{i}, p{i}, n{i}; ex2.approx.f32 d{i}, d{i}; mov.f32 p{i}, n{i};" for i in lanes),
            *(f"mul.f32 t{i}, t{i}, d{i}; mul.f32 m{i}, m{i}, d{i};" for i in lanes),
            *sums,
            f"add.u32 part, part, {TOGETHER}; setp.le.u32 there, part, $4; @there bra parts;",
            f"shl.b32 head, quad, 2; mad.wide.u32 to, head, {head_dim * 2}, $2; mad.lo.u64 to, wide, 2, to;",
            *(
                f"setp.lt.u32 there, head, {group}; div.approx.f32 t{i}, t{i}, m{i}; cvt.rn.{dtype}.f32 half, t{i}; "
                f"@there st.global.b16 [to + {i * head_dim * 2}], half; add.u32 head, head, 1;"
                for i in lanes
            ),
            f"add.u32 quad, quad, {WARPGROUP // head_dim}; bra quads;",
            "end: }",
        ]
    )
