"""What the prefill kernel does with matrices: on the tensor cores, or in jnp for the interpreter, which has none."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def _dialect(name: str) -> Any:
    return importlib.import_module(f"jaxlib.mlir.dialects.{name}")


class TensorCores:
    """Accumulators in the registers of a warpgroup, and asynchronous products that add to them."""

    def scoped(self, body: Callable[[Any], Any], shape: tuple[int, int], stand_in: Any) -> Any:
        """body(accumulator), of zeros."""
        return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))

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
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def load(self, ref: Any) -> Any:
        """What lies in SMEM, in the registers where an accumulator of its shape would hold it."""
        load: Any = plgpu.load
        return load(ref, layout=plgpu.Layout.WGMMA)

    def rescale(self, total: Any, decay: Any) -> Any:
        """Rows of total [M, N] times decay [M]; a warp whose factors are all 1 skips the multiplications."""
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir

        arith, llvm, scf, vector = map(_dialect, ("arith", "llvm", "scf", "vector"))
        layout = plgpu.Layout.WGMMA
        result = plgpu.ShapeDtypeStruct(total.shape, total.dtype, layout=layout)

        @plgpu.inline_mgpu(arg_types=(layout, layout.reduce(1)), return_type=result)
        def scaled(_: Any, total: Any, decay: Any) -> Any:
            first = ir.DenseI64ArrayAttr.get([0])
            factors = [vector.extract(x, dynamic_position=[], static_position=first) for x in decay.registers.flat]
            integer = ir.IntegerType.get_signless(32)
            changed = llvm.inline_asm(
                integer,
                factors,
                "{ .reg .pred p, q; setp.neu.f32 p, $1, 0f3F800000; setp.neu.or.f32 q, $2, 0f3F800000, p; "
                "vote.sync.any.pred p, q, 0xffffffff; selp.b32 $0, 1, 0, p; }",
                "=r,f,f",
                has_side_effects=True,
            )
            condition = arith.cmpi(arith.CmpIPredicate.ne, changed, arith.constant(integer, 0))
            choice = scf.IfOp(condition, [x.type for x in total.registers.flat], has_else=True)
            with ir.InsertionPoint(choice.then_block):
                product = total * decay.broadcast_in_dim(total.shape, (0,), total.layout)
                scf.yield_(list(product.registers.flat))
            with ir.InsertionPoint(choice.else_block):
                scf.yield_(list(total.registers.flat))
            registers = np.empty(total.registers.shape, object)
            registers.flat[:] = list(choice.results)
            return mgpu.FragmentedArray(_registers=registers, _layout=total.layout, _is_signed=None)

        return scaled(total, decay)


class Interpreted:
    """The same for the interpreter, which multiplies no values: accumulators are stand-ins in SMEM."""

    def scoped(self, body: Callable[[Any], Any], shape: tuple[int, int], stand_in: Any) -> Any:
        stand_in[...] = jnp.zeros(shape, jnp.float32)
        return body(stand_in)

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

    def load(self, ref: Any) -> Any:
        return ref[...]

    def rescale(self, total: Any, decay: Any) -> Any:
        return total * lax.broadcast_in_dim(decay, total.shape, [0])
