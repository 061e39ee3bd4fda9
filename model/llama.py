"""Llama as Flax NNX modules over flat tokens.

A batch is always a flat list of T tokens, whichever sequences they belong to: all layers but attention treat tokens
alone, and attention is a function given by the caller (`Attend`), so that the model knows no cache and no schedule.
Matrices are [in, out]; the embedding and the head are [V, D].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from paddock.pallas_kernels import split_rotated
from paddock.sharding import Layout

from .activations import Activations, Normed
from .config import LlamaConfig
from .products import Products
from .rope import cos_sin

Params = Mapping[str, jax.Array]
# (layer, qkv [T K G+2 h], cos, sin [T h/2]) -> [T K G h]; it rotates queries and keys, and sees to it that keys and
# values are kept for later steps.
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), statistics in float32."""

    def __init__(self, scale: jax.Array, eps: float):
        self.scale = nnx.Param(scale)
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...][None]


class Attention(nnx.Module):
    """Grouped-query attention with one fused product for queries, keys and values.

    `qkv` is [D, K, G+2, h]: for each kv head its G query heads, then its key, then its value, so that splitting K
    over devices keeps each group together. `out` is [K, G, h, D].
    """

    def __init__(self, params: Params, config: LlamaConfig, placed: Activations):
        self.placed = placed
        self.qkv = nnx.Param(placed.used(params["qkv"], ("embed", "q_heads", None, "head_dim")))
        self.out = nnx.Param(placed.used(params["out"], ("q_heads", None, "head_dim", "embed")))
        self.qkv_bias = nnx.Param(params["qkv_bias"]) if config.attention_bias else None
        self.out_bias = nnx.Param(params["out_bias"]) if config.attention_bias else None

    def __call__(
        self, x: Normed, cos: Array, sin: Array, attend: Callable[..., jax.Array], products: Products
    ) -> Float[Array, "T E"]:
        """The heads' rows of x [T, D], E = K*G*h, that `leaving` is still to bring back to the residual stream."""
        with jax.named_scope("qkv"):
            qkv = products.project(self.placed.entering(x, "q_heads"), self.qkv[...])
            if self.qkv_bias is not None:
                qkv = qkv + self.qkv_bias[...][None]
            # Or the compiler gathers the weight where attention has its rows split otherwise.
            qkv = self.placed.inside(qkv, "q_heads", None, "head_dim")
        mixed = attend(qkv, cos, sin)
        mixed = self.placed.inside(mixed, "q_heads", None, "head_dim")
        return mixed.reshape(mixed.shape[0], -1)

    @property
    def leaving(self) -> tuple[jax.Array, jax.Array | None]:
        """The product that ends the block: its weight [E, D] and its bias."""
        weight = self.out[...]
        return weight.reshape(-1, weight.shape[-1]), None if self.out_bias is None else self.out_bias[...]


class Mlp(nnx.Module):
    """SwiGLU (Shazeer 2020) with gate and up in one product; `gate_up` is [D, F, 2], so that splitting F keeps each
    gate with its up and [F 2] folds into one axis on every device."""

    def __init__(self, params: Params, config: LlamaConfig, placed: Activations):
        self.placed = placed
        self.gate_up = nnx.Param(placed.used(params["gate_up"], ("embed", "mlp", None)))
        self.down = nnx.Param(placed.used(params["down"], ("mlp", "embed")))
        self.gate_up_bias = nnx.Param(params["gate_up_bias"]) if config.mlp_bias else None
        self.down_bias = nnx.Param(params["down_bias"]) if config.mlp_bias else None

    def __call__(self, x: Normed, products: Products) -> Float[Array, "T F"]:
        """The hidden rows of x [T, D], that `leaving` is still to bring back to the residual stream."""
        bias = None if self.gate_up_bias is None else self.gate_up_bias[...]
        with jax.named_scope("gate_up"):
            hidden = products.swiglu(self.placed.entering(x, "mlp"), self.gate_up[...], bias)
        return self.placed.inside(hidden, "mlp")

    @property
    def leaving(self) -> tuple[jax.Array, jax.Array | None]:
        """The product that ends the block: its weight [F, D] and its bias."""
        return self.down[...], None if self.down_bias is None else self.down_bias[...]


class Layer(nnx.Module):
    def __init__(self, params: Params, config: LlamaConfig, placed: Activations):
        self.attention_norm = RMSNorm(params["attention_norm"], config.norm_eps)
        self.attention = Attention(params, config, placed)
        self.mlp_norm = RMSNorm(params["mlp_norm"], config.norm_eps)
        self.mlp = Mlp(params, config, placed)


class LayerStack(nnx.Module):
    """The layers that `params` holds, in order: all of a model, or those of one pipeline stage."""

    def __init__(self, config: LlamaConfig, params: Params, layout: Layout, products: Products | None = None):
        self.config, self.placed, self.products = config, Activations(layout), products or Products()
        count = sum(name.endswith(".qkv") for name in params)
        self.layers = nnx.List([Layer(layer_params(params, i), config, self.placed) for i in range(count)])

    def __call__(
        self,
        x: Float[Array, "T D"],
        positions: Int[Array, " T"],
        attend: Attend,
        *,
        rope_length: int | None = None,
        last_mlp: bool = True,
    ) -> Float[Array, "T D"]:
        """The residual stream after the layers. `rope_length`: see `cos_sin`.

        Without `last_mlp` the last layer's MLP is left to `finish`: nothing mixes rows from there on, so that it may
        run for those alone that somebody reads.
        """
        cos, sin = cos_sin(self.config.rope, self.config.head_dim, positions, length=rope_length)
        x = self.placed.residual(x)
        normed: Normed | None = None  # of x, where what came before made it too
        for index, layer in enumerate(self.layers):
            following = self.layers[index + 1].attention_norm if index + 1 < len(self.layers) else None
            has_mlp = last_mlp or following is not None
            with jax.named_scope(f"layer{index}"):
                with jax.named_scope("attention"):
                    normed = layer.attention_norm(x) if normed is None else normed
                    mixed = layer.attention(normed, cos, sin, lambda *qkv, i=index: attend(i, *qkv), self.products)
                    with jax.named_scope("out"):
                        norm = layer.mlp_norm if has_mlp else None
                        x, normed = self._leave(x, mixed, *layer.attention.leaving, norm)
                if has_mlp:
                    x, normed = self._mlp(layer, x, normed, following)
        return x

    def finish(self, x: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """The last MLP, for rows of a call without it."""
        with jax.named_scope(f"layer{len(self.layers) - 1}"):
            return self._mlp(self.layers[-1], self.placed.residual(x), None, None)[0]

    def _mlp(
        self, layer: Layer, x: jax.Array, normed: Normed | None, norm: RMSNorm | None
    ) -> tuple[jax.Array, Normed | None]:
        with jax.named_scope("mlp"):
            normed = layer.mlp_norm(x) if normed is None else normed
            hidden = layer.mlp(normed, self.products)
            with jax.named_scope("down"):
                return self._leave(x, hidden, *layer.mlp.leaving, norm)

    def _leave(
        self, x: jax.Array, hidden: jax.Array, weight: jax.Array, bias: jax.Array | None, norm: RMSNorm | None
    ) -> tuple[jax.Array, Normed | None]:
        then = None if norm is None else (norm.scale[...], norm.eps)
        return self.products.leave(self.placed, x, hidden, weight, bias, then)


class Llama(nnx.Module):
    """The whole model over arrays that already exist; cheap to build, so a traced function builds its own.

    Its layers are apart, in `LayerStack`: pipeline stages run them elsewhere.
    """

    def __init__(self, config: LlamaConfig, params: Params, layout: Layout):
        self.config, self.placed = config, Activations(layout)
        self.embedding = nnx.Param(params["embed"])
        self.norm = RMSNorm(params["norm"], config.norm_eps)
        self.head = None if config.tie_embeddings else nnx.Param(params["head"])

    def embed(self, token_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        with jax.named_scope("embed"):
            return self.placed.residual(self.embedding[...][token_ids])

    def logits(self, x: Float[Array, "T D"]) -> Float[Array, "T V"]:
        """Float32 logits over the padded vocabulary, whose padding is -inf, of the residual stream after all layers."""
        with jax.named_scope("head"):
            head = self.embedding if self.head is None else self.head
            logits = jnp.einsum("td,vd->tv", self.norm(x), head[...], preferred_element_type=jnp.float32)
            if logits.shape[1] == self.config.vocab_size:
                return logits
            is_token = jnp.arange(logits.shape[1]) < self.config.vocab_size
            return jnp.where(is_token[None], logits, -jnp.inf)


def layer_params(params: Params, index: int) -> dict[str, jax.Array]:
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def dense_causal_attention(_: int, qkv: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """One sequence against itself: qkv [T K G+2 h]. The reference for every cached path."""
    q, k, v = split_rotated(qkv, cos, sin)
    scores = jnp.einsum("tkgh,skh->kgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal[None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("kgts,skh->tkgh", weights.astype(v.dtype), v)


def forward(
    config: LlamaConfig,
    params: Params,
    token_ids: Int[Array, " T"],
    *,
    rope_length: int | None = None,
    layout: Layout | None = None,
) -> Float[Array, "T V"]:
    """Float32 logits of one sequence, without a cache: the plain reference.

    `rope_length` matters to dynamic RoPE alone: None rotates each token as cached decoding does, a length as a
    recompute at that length does.
    """
    layout = layout or Layout.build()
    model, layers = Llama(config, params, layout), LayerStack(config, params, layout)
    positions = jnp.arange(token_ids.shape[0])
    hidden = layers(model.embed(token_ids), positions, dense_causal_attention, rope_length=rope_length)
    return model.logits(hidden)[:, : config.vocab_size]
