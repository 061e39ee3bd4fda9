"""What the prefill kernel does with matrices: on the tensor cores, or in jnp for the interpreter, which has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .inline import SCALAR, WARPGROUP, dialect, i32, mlir, mosaic, scalar_of
from .prefill_mosaic_share import COLUMNS, TILED


class TensorCores:
    """Accumulators in the registers of a warpgroup, and asynchronous products that add to them."""

    def scoped(self, body: Callable[[Any], Any], shape: tuple[int, int], stand_in: Any) -> Any:
        """body(accumulator), of zeros."""
        return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))

    def resumed(self, body: Callable[..., Any], state: tuple[Any, ...], stand_in: Any) -> Any:
        """body(accumulator, *state), which returns a state of the same shapes: the accumulator starts as the last of
        them. A loop that carries values and no accumulator is half as much for Mosaic to compile."""

        def run(refs: Any) -> None:
            accumulator, *held = refs
            for ref, value in zip(held, body(accumulator, *(ref[...] for ref in held)), strict=True):
                ref[...] = value

        return pl.run_state(run)((plgpu.ACC.init(state[-1]), *state))[1:]

    def multiply(self, accumulator: Any, a: Any, b: Any) -> None:
        """accumulator [M, N] += a [M, k] @ b [k, N]; a is a ref or a value."""
        plgpu.wgmma(accumulator, a, b)

    def multiply_transposed(self, accumulator: Any, a: Any, b: Any) -> None:
        """accumulator [M, N] += a [M, k] @ b [N, k] transposed."""
        plgpu.wgmma(accumulator, a, b.transpose((1, 0)))

    def read(self, accumulator: Any, in_flight: int) -> Any:
        """Its value once all products but the last `in_flight` are done."""
        # The barrier keeps the compiler from moving uses of the value in front of the wait.
        return lax.optimization_barrier(plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight))

    def zeros(self, shape: tuple[int, int], dtype: Any) -> Any:
        """Zeros where an accumulator of that shape would hold them."""
        return plgpu.layout_cast(jnp.zeros(shape, dtype), plgpu.Layout.WGMMA)

    def iota(self, shape: tuple[int, int], axis: int) -> Any:
        """Each element's index on the axis, int32."""
        # Of the one axis alone and then spread, which takes no instruction: an index a register takes six.
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        index = plgpu.broadcasted_iota(jnp.int32, shape[axis : axis + 1], 0, layout=layout)
        return lax.broadcast_in_dim(index, shape, [axis])

    def clear(self, values: Any, slot: Any, first: Any) -> None:
        """Zeros in rows `first` and later of values [slots, ..., N, h] at a slot, 16-bit numbers in SMEM, TILED.

        Tiles of 8 rows of 128 bytes follow each other, and swizzling moves nothing out of its row: zeros need not know
        more. In Mosaic's own words, which load, choose and store, this was a sixth of the kernel.
        """
        rows, columns = math.prod(values.shape[1:-1]), values.shape[-1]

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TILED), SCALAR, SCALAR))
        def fill(_: Any, values: Any, slot: Any, first: Any) -> None:
            mgpu, arith, llvm = mosaic(), dialect("arith"), dialect("llvm")
            start = llvm.ptrtoint(i32(), mgpu.utils.memref_ptr(values))
            size = mgpu.c(rows * columns * 2, i32())
            thread = arith.remui(mgpu.utils.thread_idx(), mgpu.c(WARPGROUP, i32()))
            mgpu.utils.inline_ptx(
                _clear_ptx(rows, columns),
                arith.addi(start, arith.muli(scalar_of(slot), size)),
                scalar_of(first),
                thread,
                result_types=(),
                has_side_effects=True,
            )

        fill(values, slot, first)

    def rescale(self, total: Any, decay: Any) -> Any:
        """Rows of total [M, N] times decay [M]; a warp whose factors are all 1 skips the multiplications."""
        ir, (arith, llvm, scf, vector) = mlir(), map(dialect, ("arith", "llvm", "scf", "vector"))
        layout = plgpu.Layout.WGMMA
        result = plgpu.ShapeDtypeStruct(total.shape, total.dtype, layout=layout)

        @plgpu.inline_mgpu(arg_types=(layout, layout.reduce(1)), return_type=result)
        def scaled(_: Any, total: Any, decay: Any) -> Any:
            first = ir.DenseI64ArrayAttr.get([0])
            factors = [vector.extract(x, dynamic_position=[], static_position=first) for x in decay.registers.flat]
            changed = llvm.inline_asm(
                i32(),
                factors,
                "{ .reg .pred p, q; setp.neu.f32 p, $1, 0f3F800000; setp.neu.or.f32 q, $2, 0f3F800000, p; "
                "vote.sync.any.pred p, q, 0xffffffff; selp.b32 $0, 1, 0, p; }",
                "=r,f,f",
                has_side_effects=True,
            )
            condition = arith.cmpi(arith.CmpIPredicate.ne, changed, arith.constant(i32(), 0))
            choice = scf.IfOp(condition, [x.type for x in total.registers.flat], has_else=True)
            with ir.InsertionPoint(choice.then_block):
                product = total * decay.broadcast_in_dim(total.shape, (0,), total.layout)
                scf.yield_(list(product.registers.flat))
            with ir.InsertionPoint(choice.else_block):
                scf.yield_(list(total.registers.flat))
            registers = np.empty(total.registers.shape, object)
            registers.flat[:] = list(choice.results)
            return mosaic().FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)

        return scaled(total, decay)


class Interpreted:
    """The same for the interpreter, which multiplies no values: accumulators are stand-ins in SMEM."""

    def scoped(self, body: Callable[[Any], Any], shape: tuple[int, int], stand_in: Any) -> Any:
        stand_in[...] = jnp.zeros(shape, jnp.float32)
        return body(stand_in)

    def resumed(self, body: Callable[..., Any], state: tuple[Any, ...], stand_in: Any) -> Any:
        stand_in[...] = state[-1]
        return body(stand_in, *state)

    def multiply(self, accumulator: Any, a: Any, b: Any) -> None:
        left = a if isinstance(a, jax.Array) else a[...]
        accumulator[...] += jnp.dot(left.astype(jnp.float32), b[...].astype(jnp.float32))

    def multiply_transposed(self, accumulator: Any, a: Any, b: Any) -> None:
        accumulator[...] += jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32).T)

    def read(self, accumulator: Any, in_flight: int) -> Any:
        return accumulator[...]

    def zeros(self, shape: tuple[int, int], dtype: Any) -> Any:
        return jnp.zeros(shape, dtype)

    def iota(self, shape: tuple[int, int], axis: int) -> Any:
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def clear(self, values: Any, slot: Any, first: Any) -> None:
        kept = values[slot]
        row = lax.broadcasted_iota(jnp.int32, kept.shape, kept.ndim - 2)
        values[slot] = jnp.where(row < first, kept, jnp.zeros_like(kept))

    def rescale(self, total: Any, decay: Any) -> Any:
        return total * lax.broadcast_in_dim(decay, total.shape, [0])


def _clear_ptx(rows: int, columns: int) -> str:
    """Zeros from row $1 on, by a warpgroup of which this is thread $2: 16 bytes a thread and store, one after the other
    from the address $0 on, so that no two want the same bank."""
    tiles = columns // COLUMNS  # beside each other
    store_bytes, row_bytes = WARPGROUP * 16, COLUMNS * 2
    stores = []
    for i in range(rows * columns * 2 // store_bytes):
        stores.append(f"setp.ge.s32 past, row, $1; @past st.shared.v4.b32 [to + {i * store_bytes}], {{0, 0, 0, 0}};")
        stores.append(f"add.u32 row, row, {store_bytes // (row_bytes * tiles)};")
    return " ".join(
        [
            "{ .reg .pred past; .reg .b32 row, to; shl.b32 to, $2, 4; add.u32 to, to, $0;",
            f"shr.b32 row, $2, 3; {'and.b32 row, row, 7;' if tiles == 2 else ''}",  # its row in the first tiles
            *stores,
            "}",
        ]
    )
