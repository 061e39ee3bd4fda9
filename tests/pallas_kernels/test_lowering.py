"""What lowering the Mosaic kernels costs at every start, counted: seconds depend on the machine."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxprs_in_params

from paddock.pallas_kernels.decode_mosaic import decode_append_mosaic, decode_mosaic
from paddock.pallas_kernels.prefill_mosaic import prefill_mosaic
from paddock.pallas_kernels.rotate_append_mosaic import rotate_append_mosaic

T, K, G, H = 3, 2, 2, 128  # tokens, kv heads, query heads of each, head_dim
LAYERS = 3


def kernels(jaxpr: Any) -> Iterator[tuple[Any, Any]]:
    """The jaxpr (its calls are shared where a function was traced once) and the parameters of every kernel."""
    for equation in jaxpr.eqns:
        if "compiler_params" in equation.params:
            yield jaxpr, equation.params["compiler_params"]
        else:
            for inner in jaxprs_in_params(equation.params):
                yield from kernels(inner)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


QKV = jax.ShapeDtypeStruct((T, K, G + 2, H), jnp.bfloat16)
Q = jax.ShapeDtypeStruct((T, K * G, H), jnp.bfloat16)
ANGLES = [jax.ShapeDtypeStruct((T, H // 2), jnp.float32)] * 2
POOLS = [jax.ShapeDtypeStruct((9, K, 64, H), jnp.bfloat16)] * 2


@pytest.mark.parametrize(
    ("kernel", "arguments", "given", "inferred"),
    [
        (rotate_append_mosaic, (QKV, *ANGLES, *POOLS, ints(T), ints(T)), 1, 0),
        (functools.partial(decode_mosaic, scale=1.0), (Q, *POOLS, ints(T, 3), ints(T)), 1, 1),
        (functools.partial(decode_append_mosaic, scale=1.0), (QKV, *ANGLES, *POOLS, ints(T, 3), ints(T)), 1, 1),
        (functools.partial(prefill_mosaic, scale=1.0), (Q, *POOLS, ints(2, 3), ints(2), ints(2), ints(2)), 1, 0),
    ],
)
def test_one_kernel_alone_has_its_layouts_inferred(kernel: Any, arguments: tuple, given: int, inferred: int) -> None:
    """JAX infers layouts by a search in Python, seconds for a long kernel, in each of a dozen programs again. And a
    kernel is traced once, not once a layer."""

    def layers(*arguments: Any) -> list[Any]:
        return [kernel(*arguments, interpret=True) for _ in range(LAYERS)]

    found = list(kernels(jax.make_jaxpr(layers)(*arguments).jaxpr))
    assert len(found) == LAYERS * (given + inferred)
    assert len({id(jaxpr) for jaxpr, _ in found}) <= given + inferred
    semantics = Counter(params.lowering_semantics for _, params in found)
    assert semantics[plgpu.LoweringSemantics.Lane] == LAYERS * given
    assert semantics[plgpu.LoweringSemantics.Warpgroup] == LAYERS * inferred
