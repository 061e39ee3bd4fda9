"""Everything in the kernels that depends on the JAX version (0.10.2 up to 0.12), and nothing else."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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


def load(ref: Any, layout: Any) -> Any:
    """The array in `ref`, in registers of that layout."""
    if _PUBLIC_INTERPRETER is None:  # the interpreter of 0.10 knows no layouts
        return ref[...]
    read: Any = plgpu.load  # 0.10 wants one more argument
    return read(ref, layout=layout, optimized=False)


def placed(value: Any, layout: Any) -> Any:
    """`value`, which has no layout yet, in registers of that layout."""
    return value if _PUBLIC_INTERPRETER is None else plgpu.layout_cast(value, layout)


def load_transposed(ref: Any, layout: Any) -> Any:
    """The transpose of the matrix in `ref`, in registers of that layout."""
    if _PUBLIC_INTERPRETER is None:  # the interpreter of 0.10 knows no transposed refs
        return ref[...].T
    return load(ref.transpose((1, 0)), layout)


def store_transposed(ref: Any, value: Any) -> None:
    """Write the transpose of a matrix to `ref`."""
    if _PUBLIC_INTERPRETER is None:
        ref[...] = value.T
    else:
        ref.transpose((1, 0))[...] = value


def product(a: Any, b: Any, *, a_transposed: bool = False, b_transposed: bool = False) -> Any:
    """a [M, k] @ b [k, N] in float32, refs of one warpgroup; transposed: the ref holds [k, M] or [N, k]."""
    if _PUBLIC_INTERPRETER is None:
        a, b = (ref[...].T if flip else ref[...] for ref, flip in ((a, a_transposed), (b, b_transposed)))
        return jnp.dot(a, b, preferred_element_type=jnp.float32)
    a, b = (ref.transpose((1, 0)) if flip else ref for ref, flip in ((a, a_transposed), (b, b_transposed)))

    def multiply(accumulator: Any) -> Any:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def bound(body: Callable[..., None], **settings: Any) -> Callable[..., None]:
    """`body` with `settings`, under its own name, by which profiles call a kernel."""
    return functools.update_wrapper(functools.partial(body, **settings), body)


def kernel(body: Callable[..., None], *, out_type: Any = (), scratch_types: Any = (), **settings: Any) -> Any:
    """`plgpu.kernel` of `body`, some of whose operands may be refs (`jax.new_ref`): those are written in place."""
    if _PUBLIC_INTERPRETER is not None:
        return plgpu.kernel(body, out_type=out_type, scratch_types=scratch_types, **settings)
    # That of 0.10 takes no refs. Only the interpreter gets here, so that new outputs may cost something.
    how = {name: settings.pop(name) for name in ("compiler_params", "interpret") if name in settings}
    scratch = ((), scratch_types) if isinstance(scratch_types, dict) else (scratch_types, {})

    def call(*operands: Any) -> tuple[jax.Array, ...]:
        refs = [x if hasattr(jax.typeof(x), "inner_aval") else jax.new_ref(x) for x in operands]
        outs = [jax.new_ref(jnp.full(out.shape, jnp.nan, out.dtype)) for out in out_type]

        @pl.core_map(plgpu.Mesh(**settings), **how)
        def run() -> None:
            names = settings.get("thread_name", ())
            pl.run_scoped(functools.partial(body, *refs, *outs), *scratch[0], collective_axes=names, **scratch[1])

        return tuple(map(jax.freeze, outs))

    return call
