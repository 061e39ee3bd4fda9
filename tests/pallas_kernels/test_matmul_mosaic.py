"""Matrix products: the reference, the choice of tiles, and the Mosaic GPU kernel in the CPU interpreter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from matmul_cases import exact, operands, relative_error

from paddock.pallas_kernels.matmul_mosaic import check_matmul_mosaic, matmul_mosaic
from paddock.pallas_kernels.matmul_reference import matmul_reference
from paddock.pallas_kernels.matmul_tables import MATMUL
from paddock.pallas_kernels.matmul_tiling import SMS, Tiling, choose_tiling, microseconds

# One rounding to bfloat16 gives 1.7e-3.
TOLERANCE = 3e-3


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("epilogue", ["none", "swiglu"])
def test_the_reference_equals_numpy(transposed: bool, epilogue: str) -> None:
    x, w = operands(5, 48, 24, transposed=transposed, dtype=jnp.float32)
    residual = operands(5, 12 if epilogue == "swiglu" else 24, 1, dtype=jnp.float32)[0]
    out = matmul_reference(x, w, transposed=transposed, epilogue=epilogue, residual=residual)
    assert relative_error(out, exact(x, w, transposed, epilogue, residual)) <= 1e-6


@pytest.mark.parametrize(
    ("m", "k", "n", "transposed", "epilogue", "tiling"),
    [
        (3, 256, 256, False, "none", Tiling(64, 128, 1, 3)),  # more steps than stages; two tiles
        (8, 256, 448, False, "swiglu", Tiling(64, 224, 1, 2)),  # the narrower swizzle; pairs of columns
        (5, 512, 128, True, "none", Tiling(64, 128, 2, 2)),  # [out, in]; parts of K
        (9, 128, 128, False, "swiglu", Tiling(64, 64, 2, 3)),  # parts, then pairs
        (100, 128, 128, False, "none", Tiling(128, 128, 1, 2)),  # two warpgroups
        (130, 128, 128, False, "none", Tiling(128, 128, 1, 2, pair=True)),  # a cluster that shares its weights
    ],
)
def test_the_kernel_equals_numpy(m: int, k: int, n: int, transposed: bool, epilogue: str, tiling: Tiling) -> None:
    x, w = operands(m, k, n, transposed=transposed)
    residual = operands(m, n // 2 if epilogue == "swiglu" else n, 1)[0]
    arguments: dict[str, Any] = {"transposed": transposed, "epilogue": epilogue, "tiling": tiling, "interpret": True}
    out = matmul_mosaic(x, w, **arguments)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, exact(x, w, transposed, epilogue, None)) <= TOLERANCE
    added = matmul_mosaic(x, w, residual=residual, **arguments)
    assert relative_error(added, exact(x, w, transposed, epilogue, residual)) <= TOLERANCE


def test_a_tile_after_another_starts_from_nothing() -> None:
    # One worker takes all of them only on a GPU with one multiprocessor; the interpreter's has more workers than tiles.
    x, w = operands(8, 64, 64 * (SMS + 3))
    out = matmul_mosaic(x, w, tiling=Tiling(64, 64, 1, 2), interpret=True)
    assert relative_error(out, exact(x, w, False, "none", None)) <= TOLERANCE


def test_float32_comes_out_unrounded() -> None:
    x, w = operands(4, 128, 128)
    out = matmul_mosaic(x, w, out_dtype=jnp.float32, tiling=Tiling(64, 128, 1, 2), interpret=True)
    assert out.dtype == jnp.float32
    assert relative_error(out, exact(x, w, False, "none", None)) <= 1e-6


@pytest.mark.parametrize(
    ("dtype", "m", "k", "n", "named"),
    [
        (jnp.float32, 8, 128, 128, "float32"),
        (jnp.bfloat16, 257, 128, 128, "1 to 256 rows: got 257"),
        (jnp.bfloat16, 8, 96, 128, "rows to be a multiple of 64: got 96"),
        (jnp.bfloat16, 8, 128, 96 + 16, "columns to be a multiple of 64: got 112"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(dtype: Any, m: int, k: int, n: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_matmul_mosaic(dtype, m, k, n)
    with pytest.raises(ValueError, match=named):
        matmul_mosaic(jnp.zeros((m, k), dtype), jnp.zeros((k, n), dtype), interpret=True)


@pytest.mark.parametrize("name", sorted(MATMUL))
def test_arguments_that_do_not_fit_are_refused(name: str) -> None:
    multiply, x, w = MATMUL[name], jnp.zeros((8, 128), jnp.bfloat16), jnp.zeros((128, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"x has 128 columns, but w 64 rows \(transposed\)"):
        multiply(x, w, transposed=True)
    with pytest.raises(ValueError, match="one dtype: got bfloat16 and float32"):
        multiply(x, w.astype(jnp.float32))
    with pytest.raises(ValueError, match="epilogue must be one of none, swiglu: got 'gelu'"):
        multiply(x, w, epilogue="gelu")
    with pytest.raises(ValueError, match=r"residual must be bfloat16\(8, 32\): got bfloat16\(8, 64\)"):
        multiply(x, w, epilogue="swiglu", residual=jnp.zeros((8, 64), jnp.bfloat16))


def test_refused_where_there_is_no_gpu() -> None:
    x, w = operands(8, 128, 128)
    # From our check on JAX 0.10, from JAX's lowering for the CPU on later versions.
    with (
        pytest.raises(ValueError, match=r"JAX 0\.11 or newer|interpret mode"),
        jax.default_device(jax.devices("cpu")[0]),
    ):
        matmul_mosaic(x, w)


@pytest.mark.parametrize("m", [1, 8, 64, 65, 128, 192, 193, 256])
@pytest.mark.parametrize(
    ("k", "n"), [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (2048, 3072), (3072, 5120), (576, 960)]
)
def test_tiles_cover_the_product_and_fit(m: int, k: int, n: int) -> None:
    tiling = choose_tiling(m, k, n)
    assert tiling.rows * (2 if tiling.pair else 1) >= m
    assert n % tiling.columns == 0
    assert k % (64 * tiling.split) == 0
    assert tiling.stages * 128 * (tiling.rows + tiling.columns) <= 227 * 1024
    # No choice is far from memory's pace unless arithmetic is: 256 rows take about as long as reading does.
    if k * n >= 2**24:
        assert microseconds(tiling, m, k, n) <= 2.2 * 2 * k * n / 3.0e6


def test_few_columns_are_split_and_many_are_not() -> None:
    assert choose_tiling(8, 14336, 4096).split > 1
    assert choose_tiling(8, 4096, 28672).split == 1
