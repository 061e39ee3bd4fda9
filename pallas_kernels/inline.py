"""What kernels need to write PTX of their own. Mosaic itself is imported late: it is not there on every platform."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import jaxlib
from jax.experimental.pallas import mosaic_gpu as plgpu

WARPGROUP = 128  # threads
SCALAR: Any = plgpu.Layout.WG_SPLAT


def mosaic() -> Any:
    return importlib.import_module("jax.experimental.mosaic.gpu")


def mlir() -> Any:
    return importlib.import_module("jaxlib.mlir.ir")


def dialect(name: str) -> Any:
    return importlib.import_module(f"jaxlib.mlir.dialects.{name}")


def i32() -> Any:
    return mlir().IntegerType.get_signless(32)


def i64() -> Any:
    return mlir().IntegerType.get_signless(64)


def convergent() -> dict[str, bool]:
    """What `inline_ptx` takes beside PTX in which threads wait for each other, where it knows of such: then no copy is
    made of it."""
    known = "convergent" in inspect.signature(mosaic().utils.inline_ptx).parameters
    return {"convergent": True} if known and jaxlib.version.__version_info__ >= (0, 11, 2) else {}


def scalar_of(array: Any) -> Any:
    """The one value of an array without axes."""
    return array.registers.item()


def offset_of(base: Any, index: Any, size: int) -> Any:
    """The 64-bit address of entry `index`, int32 and not negative, of `size` bytes each, after the address or pointer
    `base`."""
    arith, llvm = dialect("arith"), dialect("llvm")
    if base.type != i64():
        base = llvm.ptrtoint(i64(), base)
    return arith.addi(base, arith.muli(arith.extui(i64(), index), mosaic().c(size, i64())))
