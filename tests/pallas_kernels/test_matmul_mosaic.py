"""Matrix products: the references, the choice of tiles, and the Mosaic GPU kernels in the CPU interpreter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_cases import exact, exact_norm, operands, relative_error

from paddock.pallas_kernels.matmul_mosaic import check_matmul_mosaic, matmul_mosaic
from paddock.pallas_kernels.matmul_tables import ADD_NORM, MATMUL, MATMUL_ADD, MATMUL_PARTS
from paddock.pallas_kernels.matmul_tiling import (
    DEPTH,
    ROWS,
    SMEM,
    SMS,
    Tiling,
    check_tiling,
    choose_ending,
    choose_tiling,
    ending_bytes,
    microseconds,
    output_bytes,
    square_rows,
)
from paddock.pallas_kernels.scaled_rows import ScaledRows

# One rounding to bfloat16 gives 1.7e-3.
TOLERANCE = 3e-3
NEW = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10's interpreter has no cluster barriers")
EPS = 1e-5


@pytest.mark.parametrize("epilogue", ["none", "swiglu"])
def test_the_reference_equals_numpy(epilogue: str) -> None:
    x, w = operands(5, 48, 24, jnp.float32)
    residual = operands(5, 12 if epilogue == "swiglu" else 24, 1, jnp.float32)[0]
    out = MATMUL["reference"](x, w, epilogue=epilogue, residual=residual)
    assert relative_error(out, exact(x, w, epilogue, residual)) <= 1e-6


@pytest.mark.parametrize(
    ("m", "k", "n", "epilogue", "tiling"),
    [
        (3, 256, 256, "none", Tiling(64, 128, 1, 3)),  # more steps than stages; two tiles
        (8, 256, 128, "swiglu", Tiling(64, 64, 1, 3)),  # pairs of columns; the narrower swizzle on the way out
        (5, 512, 128, "none", Tiling(64, 128, 2, 3)),  # parts of K
        (9, 128, 128, "swiglu", Tiling(64, 64, 2, 3)),  # parts, then pairs
        (100, 128, 128, "none", Tiling(128, 64, 2, 3)),  # two warpgroups; parts without a buffer
        (60, 128, 64, "none", Tiling(64, 64, 2, 3)),
        pytest.param(130, 128, 128, "none", Tiling(128, 64, 1, 3, pair=True), marks=NEW),  # blocks that share weights
        (300, 128, 128, "swiglu", Tiling(64, 64, 1, 3)),  # tiles of rows, some of them not whole
        (8, 192, 320, "swiglu", Tiling(64, 128, 1, 3, narrow=(3, 64))),  # tiles of two widths
        (100, 192, 320, "none", Tiling(128, 128, 1, 3, narrow=(1, 64))),
    ],
)
def test_the_kernel_equals_numpy(m: int, k: int, n: int, epilogue: str, tiling: Tiling) -> None:
    x, w = operands(m, k, n)
    residual = operands(m, n // 2 if epilogue == "swiglu" else n, 1)[0]
    out = matmul_mosaic(x, w, epilogue=epilogue, w_constant=True, tiling=tiling, interpret=True)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, exact(x, w, epilogue)) <= TOLERANCE
    added = matmul_mosaic(x, w, epilogue=epilogue, residual=residual, tiling=tiling, interpret=True)
    assert relative_error(added, exact(x, w, epilogue, residual)) <= TOLERANCE


def test_groups_of_rows_cover_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tiles of rows in groups of two, the last of which has one."""
    monkeypatch.setattr("paddock.pallas_kernels.matmul_kernel.TOGETHER", 2 * 64 * 128 * 2)
    x, w = operands(5 * 64, 128, 192)
    out = matmul_mosaic(x, w, tiling=Tiling(64, 64, 1, 3), interpret=True)
    assert relative_error(out, exact(x, w)) <= TOLERANCE


def test_a_tile_after_another_starts_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paddock.pallas_kernels.matmul_launch.SMS", 1)
    x, w = operands(8, 192, 192)
    out = matmul_mosaic(x, w, tiling=Tiling(64, 64, 1, 3), interpret=True)
    assert relative_error(out, exact(x, w)) <= TOLERANCE


@pytest.mark.parametrize("tiling", [Tiling(64, 64, 1, 3), Tiling(64, 128, 2, 3)])
@pytest.mark.parametrize("name", ["reference", "mosaic"])
def test_addition_and_norm_equal_numpy(name: str, tiling: Tiling) -> None:
    x, w = operands(3, 256, 256)
    residual = operands(3, 256, 1)[0]
    scale = jax.random.uniform(jax.random.key(3), (256,), jnp.bfloat16, 0.5, 2.0)
    options: dict[str, Any] = {} if name == "reference" else {"interpret": True}
    parts = MATMUL_PARTS[name](x, w, **options, **({"tiling": tiling} if options else {}))
    assert parts.shape[0] == (tiling.split if options else 1)
    total, normed = ADD_NORM[name](parts, residual, scale, eps=EPS, **options)
    assert total.dtype == normed.dtype == jnp.bfloat16
    assert relative_error(total, exact(x, w, residual=residual)) <= TOLERANCE
    assert relative_error(normed, exact_norm(total, scale, EPS)) <= 2 * TOLERANCE


def test_blocks_of_several_rows_add_and_norm_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paddock.pallas_kernels.add_norm_mosaic.BLOCKS", 2)
    parts, residual = operands(5, 128, 1)[0][None], operands(5, 128, 2)[0]
    total, normed = ADD_NORM["mosaic"](parts, residual, residual[0], eps=EPS, interpret=True)
    wanted = ADD_NORM["reference"](parts, residual, residual[0], eps=EPS)
    np.testing.assert_array_equal(total, wanted[0])
    np.testing.assert_allclose(normed.astype(np.float32), wanted[1].astype(np.float32), rtol=1e-2)


@pytest.mark.parametrize("name", ["reference", "mosaic"])
def test_parts_are_added_and_normed(name: str) -> None:
    """Float32 parts with rows that do not count, onto rows that are fewer than theirs."""
    parts = jax.random.normal(jax.random.key(0), (3, 8, 256))
    residual = operands(5, 256, 1)[0]
    scale = jax.random.uniform(jax.random.key(3), (256,), jnp.bfloat16, 0.5, 2.0)
    options: dict[str, Any] = {} if name == "reference" else {"interpret": True}
    total, normed = ADD_NORM[name](parts.at[:, 5:].set(jnp.nan), residual, scale, eps=EPS, **options)
    wanted = np.asarray(parts, np.float64).sum(axis=0)[:5] + np.asarray(residual, np.float64)
    assert total.dtype == normed.dtype == jnp.bfloat16
    assert relative_error(total, wanted) <= TOLERANCE
    assert relative_error(normed, exact_norm(total, scale, EPS)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "tiling"),
    [
        ("reference", None),
        ("mosaic", Tiling(64, 64, 1, 3)),
        pytest.param("mosaic", Tiling(64, 64, 1, 3, pair=True), marks=NEW),
        ("mosaic", Tiling(128, 64, 1, 3)),
    ],
)
def test_a_product_norms_on_the_way_to_the_next(name: str, tiling: Tiling | None) -> None:
    m = 5 if tiling is None or tiling.rows * tiling.blocks == ROWS else 100
    (x, w), residual, (_, after) = operands(m, 128, 512), operands(m, 512, 1)[0], operands(m, 512, 128)
    scale = jax.random.uniform(jax.random.key(3), (512,), jnp.bfloat16, 0.5, 2.0)
    options: dict[str, Any] = {} if name == "reference" else {"interpret": True}
    ends = {"tiling": tiling} if options else {}
    total, rows = MATMUL_ADD[name](x, w, residual, scale, eps=EPS, w_constant=True, **options, **ends)
    assert total.dtype == rows.rows.dtype == jnp.bfloat16
    assert relative_error(total, exact(x, w, residual=residual)) <= TOLERANCE
    normed = exact_norm(total, scale, EPS)
    for epilogue in ("none", "swiglu"):
        out = MATMUL[name](rows, after, epilogue=epilogue, **options)
        assert out.dtype == jnp.bfloat16
        assert relative_error(out, exact(normed, after, epilogue)) <= 1.5 * TOLERANCE  # one rounding more


@pytest.mark.parametrize(
    ("dtype", "m", "n", "named"),
    [
        (jnp.float16, 8, 512, "matmul_add_mosaic needs bfloat16: got float16"),
        (jnp.bfloat16, 257, 512, "256 rows at most: got 257"),
        (jnp.bfloat16, 8, 192, r"no tiles for 8 rows and w \[128, 192\]"),
        (jnp.bfloat16, 8, 96, "columns to be a multiple of 64: got 96"),
    ],
)
def test_what_no_product_adds_and_norms_is_refused(dtype: Any, m: int, n: int, named: str) -> None:
    x, w = jnp.zeros((m, 128), dtype), jnp.zeros((128, n), dtype)
    with pytest.raises(ValueError, match=named):
        MATMUL_ADD["mosaic"](x, w, jnp.zeros((m, n), dtype), w[0], eps=EPS, interpret=True)


@pytest.mark.parametrize(
    ("m", "tiling", "message"),
    [
        (5, Tiling(64, 64, 2, 3), "does not end a block of 5 rows"),
        (5, Tiling(128, 64, 1, 3), "does not end a block of 5 rows"),
        (5, Tiling(64, 128, 1, 3), "does not end a block of 512 columns: 4 pieces"),
        (5, Tiling(64, 64, 1, 3, share=4), "does not end a block of 512 columns: 32 pieces"),
    ],
)
def test_a_tiling_that_ends_no_block_is_refused(m: int, tiling: Tiling, message: str) -> None:
    (x, w), residual = operands(m, 256, 512), operands(m, 512, 1)[0]
    with pytest.raises(ValueError, match=message):
        MATMUL_ADD["mosaic"](x, w, residual, w[0], eps=EPS, tiling=tiling, interpret=True)


@pytest.mark.parametrize("name", ["reference", "mosaic"])
def test_a_scale_of_another_dtype_is_refused(name: str) -> None:
    x, w = operands(8, 128, 512)
    with pytest.raises(ValueError, match=r"scale must be bfloat16\(512,\): got float32\(512,\)"):
        MATMUL_ADD[name](x, w, operands(8, 512, 1)[0], jnp.ones(512), eps=EPS)


def test_rows_that_another_kernel_scaled_are_refused() -> None:
    x, w = operands(8, 128, 64)
    rows = ScaledRows(x, jnp.ones((8, 1)), EPS)
    with pytest.raises(ValueError, match=r"ScaledRows of matmul_add_mosaic: got squares \(8, 1\)"):
        matmul_mosaic(rows, w, interpret=True)


@pytest.mark.parametrize(
    ("dtype", "m", "k", "n", "named"),
    [
        (jnp.float32, 8, 128, 128, "float32"),
        (jnp.bfloat16, 0, 128, 128, "1 row and more: got 0"),
        (jnp.bfloat16, 8, 96, 128, "rows to be a multiple of 64: got 96"),
        (jnp.bfloat16, 8, 128, 96, "columns to be a multiple of 64: got 96"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(dtype: Any, m: int, k: int, n: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_matmul_mosaic(dtype, m, k, n)
    with pytest.raises(ValueError, match=named):
        matmul_mosaic(jnp.zeros((m, k), dtype), jnp.zeros((k, n), dtype), interpret=True)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(64, 192, 1, 3), r"does not divide w \[128, 256\]"),
        (Tiling(64, 64, 2, 3), "splits K, and for that 100 rows must be one tile"),
        (Tiling(64, 128, 1, 3, narrow=(2, 64)), "2 steps must be a multiple of its stages"),
        (Tiling(128, 64, 1, 3, share=2), "is shared by blocks, as matmul_add_mosaic's may be"),
    ],
)
def test_a_tiling_that_does_not_fit_is_refused(tiling: Tiling, message: str) -> None:
    x, w = operands(100, 128, 256)
    with pytest.raises(ValueError, match=message):
        matmul_mosaic(x, w, tiling=tiling, interpret=True)


def test_a_norm_of_odd_width_is_refused() -> None:
    x = operands(8, 64, 64)[0]
    with pytest.raises(ValueError, match="a multiple of 128 columns, 16384 at most: got 64"):
        ADD_NORM["mosaic"](x[None], x, x[0], eps=EPS, interpret=True)


@pytest.mark.parametrize("name", ["reference", "mosaic"])
def test_arguments_that_do_not_fit_are_refused(name: str) -> None:
    multiply = MATMUL[name]
    x, w = jnp.zeros((8, 128), jnp.bfloat16), jnp.zeros((128, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"got shapes \(8, 128\) and \(64, 128\)"):
        multiply(x, w.T)
    with pytest.raises(ValueError, match="one dtype: got bfloat16 and float32"):
        multiply(x, w.astype(jnp.float32))
    with pytest.raises(ValueError, match="epilogue must be one of none, swiglu: got 'gelu'"):
        multiply(x, w, epilogue="gelu")
    with pytest.raises(ValueError, match=r"residual must be bfloat16\(8, 32\): got bfloat16\(8, 64\)"):
        multiply(x, w, epilogue="swiglu", residual=jnp.zeros((8, 64), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"got shapes \(8, 128\) and \(64, 128\)"):
        MATMUL_PARTS[name](x, w.T)


def test_refused_where_there_is_no_gpu() -> None:
    x, w = operands(8, 128, 128)
    # From our check on JAX 0.10, from JAX's lowering for the CPU on later versions.
    with (
        pytest.raises(ValueError, match=r"JAX 0\.11 or newer|interpret mode"),
        jax.default_device(jax.devices("cpu")[0]),
    ):
        matmul_mosaic(x, w)


@pytest.mark.parametrize("m", [1, 8, 64, 65, 128, 192, 193, 256, 257, 8448])
@pytest.mark.parametrize(
    ("k", "n"), [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (2048, 3072), (3072, 5120), (576, 960)]
)
def test_tiles_cover_the_product_and_fit(m: int, k: int, n: int) -> None:
    for swiglu in (False, True):
        tiling = choose_tiling(m, k, n, swiglu=swiglu)
        assert tiling.rows * tiling.blocks * tiling.row_tiles(m) >= m
        assert tiling.split == 1 or tiling.row_tiles(m) == 1
        assert sum(columns * tiles for _, columns, tiles in tiling.bands(n)) == n
        assert all(tiles > 0 for _, _, tiles in tiling.bands(n))
        assert k % (DEPTH * tiling.split) == 0
        leaving = output_bytes(m, tiling.rows, tiling.columns, parts=tiling.split > 1, swiglu=swiglu)
        assert tiling.stages * 2 * DEPTH * (tiling.rows + tiling.columns) + leaving <= SMEM
        assert tiling.split == 1 or not swiglu


@pytest.mark.parametrize("m", [1, 8, 64, 65, 128, 192, 256])
@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (14336, 4096), (2048, 2048), (8192, 3072), (28672, 8192)])
def test_blocks_that_share_a_tile_have_one_each(m: int, k: int, n: int) -> None:
    tiling = choose_ending(m, k, n)
    check_tiling(tiling, m, k, n)
    assert tiling.rows * tiling.blocks >= m
    assert tiling.rows * tiling.blocks <= square_rows(m)
    assert n // tiling.columns * tiling.cluster <= SMS
    held = tiling.stages * 2 * DEPTH * (tiling.rows + tiling.columns)
    assert held + ending_bytes(tiling.rows, tiling.columns, tiling.share) <= SMEM


def test_the_choice_is_what_measured_best() -> None:
    # H100, the 8B shape: see docs/numbers.md.
    assert choose_tiling(8, 14336, 4096).split == 2  # 64 tiles alone do not draw all of the memory's bandwidth
    assert choose_tiling(64, 4096, 4096).split == 1  # but parts would cost more than that here
    assert choose_tiling(64, 4096, 4096, summed=True).split == 2  # unless the kernel that follows adds them anyway
    assert choose_tiling(8, 4096, 28672, swiglu=True).columns == 256  # one wave of tiles
    assert choose_tiling(256, 14336, 4096) == Tiling(128, 64, 1, 8, pair=True)  # parts of 256 rows are 4 MB each
    assert choose_tiling(256, 4096, 28672, swiglu=True).stages == 4  # three do not cover a load's latency
    assert choose_tiling(256, 4096, 28672, swiglu=True).narrow == (64, 192)  # 128 multiprocessors of 132 at work


def test_the_choice_of_an_ending() -> None:
    """64 tiles alone do not draw all of the memory's bandwidth; of many rows two blocks share the weights instead."""
    for m, k in ((2, 4096), (2, 14336), (64, 14336), (128, 4096)):
        assert choose_ending(m, k, 4096).share == 2
    assert choose_ending(256, 14336, 4096) == Tiling(128, 64, 1, 8, pair=True)


def test_shallow_rings_are_slow_in_the_model() -> None:
    deep, shallow = Tiling(256, 128, 1, 4), Tiling(256, 128, 1, 3)
    assert microseconds(shallow, 256, 4096, 28672) > 1.3 * microseconds(deep, 256, 4096, 28672)
