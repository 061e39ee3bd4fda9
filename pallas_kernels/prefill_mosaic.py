"""Paged prefill attention as one persistent Pallas kernel for NVIDIA Hopper (Mosaic GPU)."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from .checks import check_prefill
from .compat import mosaic_mode

ROWS = 64  # of q that a warpgroup multiplies at a time
BLOCK = 128  # tokens a step
CTAS = 132  # SMs of an H100 or H200 (SXM); more or fewer only cost time
PRODUCER = 2  # index of the warpgroup that loads
DTYPES = (jnp.bfloat16, jnp.float16)
HEAD_DIMS = (64, 128)


def check_prefill_mosaic(dtype: Any, head_dim: int, page_size: int) -> None:
    """Raise ValueError naming what `prefill_mosaic` cannot run on."""
    if dtype not in DTYPES:
        raise ValueError(f"prefill_mosaic needs bfloat16 or float16: got {jnp.dtype(dtype).name}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"prefill_mosaic needs head_dim 64 or 128: got {head_dim}")
    if page_size not in (16, 32) and (page_size % 64 or not page_size):
        raise ValueError(f"prefill_mosaic needs a page size of 16, 32 or a multiple of 64: got {page_size}")


@functools.partial(jax.jit, static_argnames=("scale", "interpret", "stages", "pair", "ping", "regs", "part", "lazy", "sums"))
def prefill_mosaic(
    q: Float[Array, "T H h"],
    k_pages: Float[Array, "P K p h"],
    v_pages: Float[Array, "P K p h"],
    page_table: Int[Array, "C N"],
    q_start: Int[Array, " C"],
    q_len: Int[Array, " C"],
    kv_len: Int[Array, " C"],
    *,
    scale: float,
    interpret: bool = False,
    stages: int | None = None,
    pair: bool | None = None,
    ping: int = 0,
    part: int = 0,
    lazy: int = 0,
    sums: int = 0,
    regs: tuple[int, int] = (232, 40),
) -> Float[Array, "T H h"]:
    check_prefill(q, k_pages, v_pages, page_table, q_start, q_len, kv_len)
    rows, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1:3]
    if k_pages.dtype != q.dtype:
        raise ValueError(f"prefill_mosaic needs q and pages of one dtype: got {q.dtype} and {k_pages.dtype}")
    check_prefill_mosaic(q.dtype, head_dim, page_size)
    mode = mosaic_mode(interpret)
    group = heads // kv_heads
    if pair is None:
        pair = group % 2 == 0
    if stages is None:
        stages = 2 if head_dim == 128 else 4
    tile = ROWS if pair else 2 * ROWS
    items, count = work_items(q_start, q_len, kv_len, rows, tile)
    tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    smem = functools.partial(plgpu.SMEM, dtype=q.dtype, transforms=tiles)
    pieces = BLOCK // piece_of(page_size)
    scratch = dict(
        q_smem=rows_of_any_start((2, head_dim // 64, ROWS, 64), q.dtype, interpret),
        k_smem=smem((stages, BLOCK, head_dim)),
        v_smem=smem((stages, BLOCK, head_dim)),
        o_smem=rows_of_any_start((2, head_dim // 64, ROWS, 64), q.dtype, interpret),
        q_ready=plgpu.Barrier(num_arrivals=head_dim // 64, num_barriers=2),
        q_free=plgpu.Barrier(num_arrivals=2),
        k_ready=plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        v_ready=plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=2),
    )
    if not part:
        scratch |= dict(rows_smem=plgpu.SMEM((2, ROWS, head_dim), q.dtype))
    if interpret:
        scratch |= dict(
            s_acc=plgpu.SMEM((2, ROWS, BLOCK), jnp.float32), o_acc=plgpu.SMEM((2, ROWS, head_dim), jnp.float32)
        )
    return plgpu.kernel(
        functools.partial(_attend, scale=scale * math.log2(math.e), pair=pair, ping=ping, regs=regs, part=part, lazy=lazy, sums=sums, interpret=interpret),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=scratch,
        grid=(2 if interpret else CTAS,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=mode,
    )(q, k_pages, v_pages, page_table, items, count)


def rows_of_any_start(shape: tuple[int, ...], dtype: Any, interpret: bool) -> Any:
    swizzle = plgpu.SwizzleTransform(128)
    copied = plgpu.SMEM(shape, dtype, transforms=() if interpret else (swizzle,))
    if interpret:
        return copied
    return plgpu.RefUnion(copied, plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), swizzle)))


def piece_of(page_size: int) -> int:
    """Tokens of one copy."""
    return BLOCK if page_size % BLOCK == 0 else min(page_size, 64)


def work_items(q_start: Array, q_len: Array, kv_len: Array, rows: int, tile: int) -> tuple[Array, Array]:
    """int32[5, M] items, heaviest first, and their count [1]: (chunk, first row, rows, tokens its last row sees, kv_len).

    Rows of no chunk are items that see 0 tokens.
    """
    chunks = q_len.shape[0]
    q_start = jnp.where(q_len > 0, q_start, rows)
    ends = jnp.where(q_len > 0, q_start + q_len, rows)
    ends0 = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    after = jnp.where(q_start[None, :] >= ends0[:, None], q_start[None, :], rows).min(1)
    start = jnp.concatenate([q_start, ends0])
    length = jnp.concatenate([q_len, after - ends0])
    total = jnp.concatenate([kv_len, jnp.zeros_like(ends0)])
    segments = 2 * chunks + 1
    blocks = -(-length // tile)
    last = jnp.cumsum(blocks)
    item = jnp.arange(rows // tile + segments, dtype=jnp.int32)
    owner = jnp.minimum((item[:, None] >= last[None, :]).sum(1, dtype=jnp.int32), segments - 1)
    first = (item - (last - blocks)[owner]) * tile
    height = jnp.minimum(tile, length[owner] - first)
    tokens = jnp.where(owner < chunks, total[owner] - length[owner] + first + height, 0)
    tokens = jnp.where(item < last[-1], tokens, -1)
    fields = jnp.stack([jnp.minimum(owner, chunks - 1), start[owner] + first, height, tokens, total[owner]])
    order = jnp.argsort(-tokens, stable=True)
    return fields[:, order], last[-1:]


def rescale(total: Any, decay: Any) -> Any:
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm, scf, arith, vector

    wgmma = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(wgmma, wgmma.reduce(1)), return_type=plgpu.ShapeDtypeStruct(total.shape, total.dtype, layout=wgmma)
    )
    def scaled(ctx: Any, total: Any, decay: Any) -> Any:
        factors = []
        for register in decay.registers.flat:
            if isinstance(register.type, ir.VectorType):
                register = vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))
            factors.append(register)
        i32 = ir.IntegerType.get_signless(32)
        changed = llvm.inline_asm(
            i32,
            factors,
            "{ .reg .pred p, q, r; setp.neu.f32 p, $1, 0f3F800000; setp.neu.or.f32 q, $2, 0f3F800000, p; "
            "vote.sync.any.pred r, q, 0xffffffff; selp.b32 $0, 1, 0, r; }",
            "=r,f,f",
            has_side_effects=True,
        )
        any_changed = arith.cmpi(arith.CmpIPredicate.ne, changed, arith.constant(i32, 0))
        types = [register.type for register in total.registers.flat]
        choice = scf.IfOp(any_changed, types, has_else=True)
        with ir.InsertionPoint(choice.then_block):
            product = total * decay.broadcast_in_dim(total.shape, (0,), total.layout)
            scf.yield_(list(product.registers.flat))
        with ir.InsertionPoint(choice.else_block):
            scf.yield_(list(total.registers.flat))
        import numpy as np

        registers = np.empty(total.registers.shape, object)
        registers.flat[:] = list(choice.results)
        return mgpu.FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)

    return scaled(total, decay)


def _attend(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    table_ref: Any,
    items_ref: Any,
    count_ref: Any,
    out_ref: Any,
    *,
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    o_smem: Any,
    q_ready: Any,
    q_free: Any,
    k_ready: Any,
    v_ready: Any,
    k_free: Any,
    v_free: Any,
    turn: Any,
    rows_smem: Any = None,
    s_acc: Any = None,
    o_acc: Any = None,
    scale: float,
    pair: bool,
    ping: int,
    regs: tuple[int, int],
    part: int,
    lazy: int,
    sums: int,
    interpret: bool,
) -> None:
    q_copied, q_tiled = (q_smem, q_smem) if interpret else q_smem
    o_copied, o_tiled = (o_smem, o_smem) if interpret else o_smem
    dtype = k_smem.dtype
    cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
    ctas = lax.axis_size("cta")
    heads, head_dim = q_ref.shape[1:]
    kv_heads, page_size = k_ref.shape[1:3]
    group = heads // kv_heads
    stages = k_smem.shape[0]
    piece = piece_of(page_size)
    pieces = BLOCK // piece
    per_page = page_size // piece
    halves = head_dim // 64
    wide = 2 if pair else 1
    head_tiles = heads // wide
    total = count_ref[0] * head_tiles
    rounds = lax.div(total, ctas)
    position = jnp.where(lax.rem(rounds, 2) == 0, cta, ctas - 1 - cta)
    mine = rounds + (position < total - rounds * ctas).astype(jnp.int32)

    def item(turn_: Any) -> Any:
        index = turn_ * ctas + jnp.where(lax.rem(turn_, 2) == 0, cta, ctas - 1 - cta)
        index = jnp.minimum(index, total - 1)
        block = lax.div(index, head_tiles)
        head = lax.rem(index, head_tiles) * wide
        return (head, *(items_ref[i, block] for i in range(5)))

    def slot_of(step: Any) -> Any:
        return lax.rem(step, stages)

    @pl.when(wg == PRODUCER)
    def _load() -> None:
        plgpu.set_max_registers(regs[1], action="decrease")

        def pages_of(chunk: Any, tokens: Any, block: Any) -> Any:
            last = lax.div(tokens - 1, piece)
            entries = []
            for i in range(pieces):
                wanted = jnp.maximum(jnp.minimum(block * pieces + i, last), 0)
                entries.append(table_ref[chunk, lax.div(wanted, per_page)])
                entries.append(lax.rem(wanted, per_page) * piece)
            return tuple(entries)

        def load_item(t: Any, carry: Any) -> Any:
            step, fields = carry
            head, chunk, row, _, tokens, _ = fields
            following = item(t + 1)
            kv_head = lax.div(head, group)
            steps = pl.cdiv(tokens, BLOCK)

            def fetch(pool: Any, target: Any, ready: Any, entries: Any) -> None:
                for i in range(pieces):
                    source = pool.at[entries[2 * i], kv_head, pl.ds(entries[2 * i + 1], piece)]
                    plgpu.copy_gmem_to_smem(source, target.at[pl.ds(i * piece, piece)], ready)

            def load_block(j: Any, entries: Any) -> Any:
                upcoming = pages_of(chunk, tokens, j + 1)
                slot = slot_of(step + j)
                used = step + j >= stages

                @pl.when(used)
                def _wait_k() -> None:
                    plgpu.barrier_wait(k_free.at[slot])

                fetch(k_ref, k_smem.at[slot], k_ready.at[slot], entries)

                @pl.when(j == 0)
                def _load_q() -> None:
                    @pl.when(step > 0)
                    def _wait_q() -> None:
                        plgpu.barrier_wait(q_free)

                    for w in range(2):
                        source = q_ref.at[pl.ds(row + (0 if pair else w * ROWS), ROWS), head + (w if pair else 0)]
                        for c in range(halves):
                            plgpu.copy_gmem_to_smem(
                                source.at[:, pl.ds(c * 64, 64)], q_copied.at[w, c], q_ready.at[w]
                            )

                @pl.when(used)
                def _wait_v() -> None:
                    plgpu.barrier_wait(v_free.at[slot])

                fetch(v_ref, v_smem.at[slot], v_ready.at[slot], entries)
                return upcoming

            lax.fori_loop(0, steps, load_block, pages_of(chunk, tokens, 0))
            return step + steps, following

        step, _ = lax.fori_loop(0, mine, load_item, (jnp.int32(0), item(jnp.int32(0))))
        # A barrier must not end with completions that nobody saw.
        for i in range(stages):

            @pl.when(step > i)
            def _drain(i: int = i) -> None:
                plgpu.barrier_wait(k_free.at[slot_of(step - 1 - i)])
                plgpu.barrier_wait(v_free.at[slot_of(step - 1 - i)])

        pl.when(step > 0)(lambda: plgpu.barrier_wait(q_free))

    @pl.when(wg < PRODUCER)
    def _compute() -> None:
        plgpu.set_max_registers(regs[0], action="increase")
        def pass_turn(to: Any) -> None:
            if ping < 3:
                plgpu.barrier_arrive(turn.at[to])
            else:
                named("arrive", to)

        def take_turn(of: Any) -> None:
            if ping < 3:
                plgpu.barrier_wait(turn.at[of])
            else:
                named("sync", of)

        def named(what: str, which: Any) -> None:
            from jaxlib.mlir import ir
            from jaxlib.mlir.dialects import llvm

            for number in range(2):

                @pl.when(which == number)
                def _go(number: int = number) -> None:
                    @plgpu.inline_mgpu()
                    def emit(ctx: Any) -> None:
                        void = ir.Type.parse("!llvm.void")
                        llvm.inline_asm(void, [], f"bar.{what} {8 + number}, 256;", "", has_side_effects=True)

                    emit()

        if ping:
            pl.when(wg == 1)(lambda: pass_turn(jnp.int32(0)))

        def scoped(body: Any, kind: Any, shape: Any) -> Any:
            if interpret:
                kind[...] = jnp.zeros(shape, jnp.float32)
                return body(kind)
            return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))

        def multiply(acc: Any, a: Any, b: Any, transposed: bool = False) -> None:
            if interpret:
                left = a if isinstance(a, jax.Array) else a[...]
                right = b[...].T if transposed else b[...]
                acc[...] += jnp.dot(left.astype(jnp.float32), right.astype(jnp.float32))
            else:
                plgpu.wgmma(acc, a, b.transpose((1, 0)) if transposed else b)

        def multiply_keys(acc: Any, slot: Any) -> None:
            for c in range(halves):
                multiply(acc, q_tiled.at[wg, c], k_smem.at[slot, :, pl.ds(c * 64, 64)], transposed=True)

        def read(acc: Any, in_flight: int) -> Any:
            if interpret:
                return acc[...]
            return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=in_flight))

        scores_acc = s_acc.at[wg] if interpret else None
        total_acc = o_acc.at[wg] if interpret else None

        def attend_item(t: Any, carry: Any) -> Any:
            step, fields = carry
            head, _, row, height, tokens, limit = fields
            following = item(t + 1)
            steps = pl.cdiv(tokens, BLOCK)
            offset = 0 if pair else wg * ROWS
            own = tokens - height + offset  # position of the first row

            def softmax(scores: Any, block: Any, masked: bool, peak: Any, mass: Any) -> Any:
                if masked:
                    rows_ = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
                    cols = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
                    scores = jnp.where(cols - rows_ <= own - block * BLOCK, scores, -jnp.inf)
                new_peak = scores.max(axis=1) * scale
                if peak is not None:
                    if lazy:
                        new_peak = jnp.where(new_peak > peak + 8.0, new_peak, peak)
                    else:
                        new_peak = jnp.maximum(peak, new_peak)
                weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_peak, scores.shape, [0]))
                if sums:
                    added = functools.reduce(
                        lambda a, b: a + b, (weights[:, c : c + 8] for c in range(0, BLOCK, 8))
                    )
                else:
                    added = weights.sum(axis=1)
                if peak is None:
                    return weights, new_peak, added, None
                decay = jnp.exp2(peak - new_peak)
                spread = lax.broadcast_in_dim(decay, added.shape, [0]) if sums else decay
                return weights, new_peak, mass * spread + added, decay

            def store(result: Any) -> None:
                count = height - offset
                target = pl.ds(row + offset, ROWS)
                out_head = head + (wg if pair else 0)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                def fill() -> None:
                    for c in range(halves):
                        o_tiled[wg, c] = result[:, c * 64 : (c + 1) * 64]
                    plgpu.commit_smem()

                @pl.when(count >= ROWS)
                def _whole() -> None:
                    fill()
                    for c in range(halves):
                        plgpu.copy_smem_to_gmem(
                            o_copied.at[wg, c], out_ref.at[target, out_head, pl.ds(c * 64, 64)]
                        )

                @pl.when(count < ROWS)
                def _part() -> None:
                    if part:
                        fill()
                    else:
                        rows_smem[wg] = result
                        plgpu.commit_smem()

                    def copy_row(r: Any, _: Any) -> Any:
                        to = row + offset + r
                        if part:
                            for c in range(halves):
                                plgpu.copy_smem_to_gmem(
                                    o_copied.at[wg, c, pl.ds(r, 1)],
                                    out_ref.at[pl.ds(to, 1), out_head, pl.ds(c * 64, 64)],
                                )
                        else:
                            plgpu.copy_smem_to_gmem(rows_smem.at[wg, r], out_ref.at[to, out_head])
                        return _

                    lax.fori_loop(0, jnp.maximum(count, 0), copy_row, None)

            @pl.when(steps > 0)
            def _attend_tokens() -> None:
                def run(total: Any) -> Any:
                    slot = slot_of(step)
                    plgpu.barrier_wait(q_ready.at[wg])
                    plgpu.barrier_wait(k_ready.at[slot])

                    def first(acc: Any) -> Any:
                        multiply_keys(acc, slot)
                        return read(acc, 0)

                    scores = scoped(first, scores_acc, (ROWS, BLOCK))
                    plgpu.barrier_arrive(k_free.at[slot])
                    pl.when(steps == 1)(lambda: plgpu.barrier_arrive(q_free))
                    weights, peak, mass, _ = softmax(scores, 0, True, None, None)

                    def await_keys(j: Any, maybe_last: bool) -> None:
                        def wait() -> None:
                            plgpu.barrier_wait(k_ready.at[slot_of(step + j)])

                        if maybe_last:
                            pl.when(j < steps)(wait)
                        else:
                            wait()

                    await_keys(1, maybe_last=True)

                    def attend(j: Any, carry: Any, masked: bool) -> Any:
                        peak, mass, weights = carry
                        slot, previous = slot_of(step + j), slot_of(step + j - 1)
                        if ping:
                            take_turn(wg)

                        def issue(acc: Any) -> Any:
                            multiply_keys(acc, slot)
                            if ping in (2, 4):
                                pass_turn(1 - wg)
                            plgpu.barrier_wait(v_ready.at[previous])
                            multiply(total, weights, v_smem.at[previous])
                            if ping in (1, 3):
                                pass_turn(1 - wg)
                            return read(acc, 1)

                        scores = scoped(issue, scores_acc, (ROWS, BLOCK))
                        plgpu.barrier_arrive(k_free.at[slot])
                        if masked:
                            pl.when(j == steps - 1)(lambda: plgpu.barrier_arrive(q_free))
                        weights, peak, mass, decay = softmax(scores, j, masked, peak, mass)
                        weights, peak, mass, decay = lax.optimization_barrier((weights, peak, mass, decay))
                        await_keys(j + 1, maybe_last=masked)
                        so_far = read(total, 0)
                        plgpu.barrier_arrive(v_free.at[previous])
                        if lazy == 1 and not interpret:
                            total[...] = rescale(so_far, decay)
                        else:
                            total[...] = so_far * lax.broadcast_in_dim(decay, so_far.shape, [0])
                        return peak, mass, weights.astype(dtype)

                    full = jnp.clip(lax.div(own + 1, BLOCK), 1, jnp.maximum(steps - 1, 1))
                    state = (peak, mass, weights.astype(dtype))
                    state = lax.fori_loop(1, full, functools.partial(attend, masked=False), state)
                    _, mass, weights = lax.fori_loop(full, steps, functools.partial(attend, masked=True), state)

                    slot = slot_of(step + steps - 1)
                    plgpu.barrier_wait(v_ready.at[slot])
                    left = limit - (steps - 1) * BLOCK

                    @pl.when(left < BLOCK)
                    def _drop_values_past_the_end() -> None:
                        for half in range(BLOCK // ROWS):
                            part = v_smem.at[slot, pl.ds(half * ROWS, ROWS)]
                            values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                            index = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
                            part[...] = jnp.where(index < left - half * ROWS, values, jnp.zeros_like(values))
                        plgpu.commit_smem()

                    multiply(total, weights, v_smem.at[slot])
                    result = read(total, 0)
                    plgpu.barrier_arrive(v_free.at[slot])
                    return result, mass.sum(axis=1) if sums else mass

                result, mass = scoped(run, total_acc, (ROWS, head_dim))
                result = (result * lax.broadcast_in_dim(1 / mass, result.shape, [0])).astype(dtype)
                store(result)

            @pl.when(steps == 0)
            def _no_tokens() -> None:
                store(plgpu.layout_cast(jnp.zeros((ROWS, head_dim), dtype), plgpu.Layout.WGMMA))

            return step + steps, following

        lax.fori_loop(0, mine, attend_item, (jnp.int32(0), item(jnp.int32(0))))
        if ping:
            pl.when(wg == 0)(lambda: take_turn(jnp.int32(0)))
        plgpu.wait_smem_to_gmem(0)
