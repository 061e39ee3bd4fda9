"""The Mosaic GPU matrix products, compiled, on a real GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from matmul_cases import exact, exact_norm, operands, relative_error

from paddock.pallas_kernels.matmul_tables import ADD_NORM, MATMUL, MATMUL_ADD, MATMUL_PARTS
from paddock.pallas_kernels.matmul_tiling import Tiling

pytestmark = pytest.mark.gpu
TOLERANCE = 3e-3
EPS = 1e-5


@pytest.mark.parametrize("m", [1, 7, 64, 65, 130, 192, 256, 300, 4352])
@pytest.mark.parametrize(("k", "n", "epilogue"), [(1024, 6144, "none"), (512, 28672, "swiglu"), (576, 960, "none")])
def test_products_equal_numpy(m: int, k: int, n: int, epilogue: str) -> None:
    x, w = operands(m, k, n)
    residual = None if epilogue == "swiglu" else operands(m, n, 1)[0]
    out = MATMUL["mosaic"](x, w, epilogue=epilogue, residual=residual)
    assert relative_error(out, exact(x, w, epilogue, residual)) <= TOLERANCE
    # The order of sums is fixed: the same again, bit for bit.
    assert (MATMUL["mosaic"](x, w, epilogue=epilogue, residual=residual) == out).all()


@pytest.mark.parametrize("m", [1, 33, 100, 192, 256])
@pytest.mark.parametrize(("k", "n"), [(3584, 4096), (1024, 2048)])
def test_addition_and_norm_equal_numpy(m: int, k: int, n: int) -> None:
    x, w = operands(m, k, n)
    residual = operands(m, n, 1)[0]
    scale = jax.random.uniform(jax.random.key(3), (n,), jnp.bfloat16, 0.5, 2.0)
    total, normed = ADD_NORM["mosaic"](MATMUL_PARTS["mosaic"](x, w), residual, scale, eps=EPS)
    assert relative_error(total, exact(x, w, residual=residual)) <= TOLERANCE
    assert relative_error(normed, exact_norm(total, scale, EPS)) <= 2 * TOLERANCE


@pytest.mark.parametrize("m", [1, 33, 64, 100, 128, 192, 256])
@pytest.mark.parametrize(("k", "n"), [(3584, 4096), (1024, 2048), (512, 8192)])
def test_products_norm_on_the_way_to_the_next(m: int, k: int, n: int) -> None:
    check_norm_between(m, k, n, None)


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize(("m", "rows", "stages"), [(33, 64, 6), (100, 128, 4)])
def test_blocks_of_a_cluster_share_a_tile(m: int, rows: int, stages: int, share: int) -> None:
    check_norm_between(m, 2048, 4096, Tiling(rows, 128, 1, stages, share=share))


def check_norm_between(m: int, k: int, n: int, tiling: Tiling | None) -> None:
    """A product that adds and scales, and one that divides, against numpy and against themselves."""
    (x, w), residual, (_, after) = operands(m, k, n), operands(m, n, 1)[0], operands(m, n, 1024)
    scale = jax.random.uniform(jax.random.key(3), (n,), jnp.bfloat16, 0.5, 2.0)

    def run() -> tuple[jax.Array, list[jax.Array]]:
        total, rows = MATMUL_ADD["mosaic"](x, w, residual, scale, eps=EPS, tiling=tiling)
        return total, [MATMUL["mosaic"](rows, after, epilogue=epilogue) for epilogue in ("none", "swiglu")]

    total, outs = run()
    assert relative_error(total, exact(x, w, residual=residual)) <= TOLERANCE
    normed = exact_norm(total, scale, EPS)
    for epilogue, out in zip(("none", "swiglu"), outs, strict=True):
        assert relative_error(out, exact(normed, after, epilogue)) <= 1.5 * TOLERANCE
    for _ in range(5):  # the order of sums is fixed
        again, others = run()
        assert (again == total).all()
        assert all((other == out).all() for other, out in zip(others, outs, strict=True))
