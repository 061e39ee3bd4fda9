"""The Mosaic GPU matrix product, compiled, on a real GPU."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from matmul_cases import exact, operands, relative_error

from paddock.pallas_kernels.matmul_tables import MATMUL

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("m", [1, 7, 64, 65, 130, 192, 256])
@pytest.mark.parametrize(
    ("k", "n", "transposed", "epilogue", "dtype"),
    [
        (4096, 6144, False, "none", jnp.bfloat16),
        (4096, 28672, False, "swiglu", jnp.bfloat16),
        (14336, 4096, False, "none", jnp.bfloat16),
        (2048, 32064, True, "none", jnp.float32),
        (576, 960, False, "none", jnp.bfloat16),
    ],
)
def test_equals_numpy(m: int, k: int, n: int, transposed: bool, epilogue: str, dtype: type) -> None:
    x, w = operands(m, k, n, transposed=transposed)
    residual = None
    if epilogue == "none" and dtype == jnp.bfloat16:
        residual = operands(m, n, 1)[0]
    arguments = {"transposed": transposed, "epilogue": epilogue, "residual": residual, "out_dtype": dtype}
    out = MATMUL["mosaic"](x, w, **arguments)
    assert out.dtype == dtype
    wanted = exact(x, w, transposed, epilogue, residual)
    assert relative_error(out, wanted) <= (3e-3 if dtype == jnp.bfloat16 else 1e-5)
    # The order of sums is fixed: the same again, bit for bit.
    assert (MATMUL["mosaic"](x, w, **arguments) == out).all()
