"""The products of layers that are all on one Hopper GPU, by kernels of ours where those were measured to be faster."""

from __future__ import annotations

from typing import Any

import jax

from paddock.pallas_kernels import ADD_NORM, MATMUL, MATMUL_ADD_NORM, check_add_norm_mosaic, check_matmul_mosaic

from .activations import Activations
from .config import LlamaConfig
from .products import Norm, Products

# Numbers of rows for which our products beat XLA's (docs/numbers.md: a layer of the 8B shape takes 214 us instead of
# 239 at 256 rows on an H100; at 128 they draw, with fewer rows XLA's stream the weights a little faster).
FEWEST, MOST = 192, 256


class LocalProducts(Products):
    """For steps of `num_rows` rows. Addition and norm are one kernel for any number of them."""

    def __init__(self, num_rows: int):
        self.ours = FEWEST <= num_rows <= MOST

    def project(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        if not self.ours:
            return super().project(x, weight)
        out = MATMUL["mosaic"](x, weight.reshape(weight.shape[0], -1))
        return out.reshape(x.shape[0], *weight.shape[1:])

    def swiglu(self, x: jax.Array, gate_up: jax.Array, bias: jax.Array | None) -> jax.Array:
        if not self.ours or bias is not None:
            return super().swiglu(x, gate_up, bias)
        return MATMUL["mosaic"](x, gate_up.reshape(x.shape[1], -1), epilogue="swiglu")

    def leave(
        self,
        placed: Activations,
        x: jax.Array,
        hidden: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None,
        norm: Norm | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        if norm is None:
            return super().leave(placed, x, hidden, weight, bias, norm)
        scale, eps = norm
        if self.ours and bias is None:
            return MATMUL_ADD_NORM["mosaic"](hidden, weight, x, scale, eps=eps)
        out = hidden @ weight if bias is None else hidden @ weight + bias[None]
        return ADD_NORM["mosaic"](out[None], x, scale, eps=eps)


def check_local_products(config: LlamaConfig, dtype: Any) -> None:
    """Raise ValueError naming what `LocalProducts` cannot run on."""
    D, F = config.embed_dim, config.mlp_dim
    attended = config.num_heads * config.head_dim
    qkv = attended + 2 * config.num_kv_heads * config.head_dim
    for depth, columns in ((D, qkv), (attended, D), (D, 2 * F), (F, D)):
        check_matmul_mosaic(dtype, MOST, depth, columns)
    check_add_norm_mosaic(D)
