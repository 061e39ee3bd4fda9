"""Everything in the kernels that depends on the JAX version (0.10.2 up to 0.12), and nothing else."""

from __future__ import annotations

import importlib
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# JAX 0.11 made the Mosaic GPU interpreter public, and moved the transposition of refs from a function to a method.
_PUBLIC_INTERPRETER: Any = getattr(plgpu, "InterpretGPUParams", None)


def mosaic_mode(interpret: bool) -> Any:
    """The `interpret=` argument of a Mosaic GPU kernel: the CPU interpreter (unwritten memory is NaN), or the compiler.

    Raises ValueError for the compiler of JAX 0.10, which infers no layouts for our kernels.
    """
    if not interpret:
        if _PUBLIC_INTERPRETER is None:
            raise ValueError(f"Mosaic GPU kernels need JAX 0.11 or newer: got {jax.__version__}")
        return None
    if _PUBLIC_INTERPRETER is not None:
        return _PUBLIC_INTERPRETER()
    return importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams()


def wgmma_transposed(accumulator: Any, a: Any, b: Any) -> None:
    """accumulator [M, N] += a [M, k] @ b [N, k] transposed, all of them refs of one warpgroup."""
    if _PUBLIC_INTERPRETER is not None:
        plgpu.wgmma(accumulator, a, b.transpose((1, 0)))
        return

    def multiply(copy: Any) -> None:  # the interpreter of 0.10 takes no transposed operand
        copy[...] = b[...].T
        plgpu.wgmma(accumulator, a, copy)

    pl.run_scoped(multiply, plgpu.SMEM(b.shape[::-1], b.dtype))
