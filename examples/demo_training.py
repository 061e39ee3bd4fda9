"""Training of the demonstration model: regularised forward pass, batches drawn on the device, early stopping."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from demo_data import BOS, Streams
from demo_eval import total_bits, windows
from jaxtyping import Array, Float, Int

from paddock.model import LayerStack, Llama, LlamaConfig, param_specs
from paddock.pallas_kernels import split_rotated
from paddock.sharding import Layout

CHUNK = 50  # steps in one call, so that the host costs nothing
Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every choice of the optimisation; a model's architecture is its LlamaConfig."""

    steps: int = 2500
    minutes: float = 3.0  # of each run; a run that reaches it stops where it is
    batch_size: int = 16  # sequences of the longest context; shorter contexts get more, for as many tokens
    contexts: tuple[int, ...] = (256, 1024)  # of CHUNK steps each, in turn
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.3
    dropout: float = 0.2  # of what each layer adds to the residual, and of the last hidden state
    attention_dropout: float = 0.1
    embed_dropout: float = 0.1
    sampled_until: float = 0.7  # share of the steps that see subword-sampled variants too
    ema: float = 0.995
    compute_dtype: str = "bfloat16"
    seed: int = 0

    def optimizer(self) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, min(self.warmup, self.steps // 10), self.steps, 0.02 * self.learning_rate
        )
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(
                schedule,
                b2=0.99,
                weight_decay=self.weight_decay,
                mask=lambda params: jax.tree.map(lambda value: value.ndim > 1, params),
            ),
        )


def init_params(config: LlamaConfig, key: jax.Array) -> Params:
    """Float32 normal weights, 1/sqrt(fan-in) wide; what ends in the residual is narrower by its 2L additions."""
    params = {}
    for name, spec in param_specs(config, dtype=jnp.float32).items():
        kind = name.rpartition(".")[2]
        key, own = jax.random.split(key)
        if len(spec.shape) == 1:
            params[name] = jnp.ones(spec.shape)
            continue
        fan_in = math.prod(spec.shape[1:]) if kind == "out" else spec.shape[-1]
        scale = {"embed": 0.02, "head": 0.02}.get(kind, fan_in**-0.5)
        scale *= (2 * config.num_layers) ** -0.5 if kind in ("out", "down") else 1
        params[name] = scale * jax.random.normal(own, spec.shape)
    return params


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Dropout (Srivastava et al. 2014), its rate rounded to 1/256: one random byte per value is cheap."""
    cut = round(rate * 256)
    if not cut:
        return x
    keep = jax.random.bits(key, x.shape, jnp.uint8) >= cut
    return jnp.where(keep, x * (256 / (256 - cut)), 0).astype(x.dtype)


def training_logits(
    config: LlamaConfig, params: Mapping[str, jax.Array], token_ids: Int[Array, " T"], key: jax.Array, recipe: Recipe
) -> Float[Array, "T V"]:
    """`paddock.model.forward` with dropout around the model's own modules; the same to the bit at rates of 0."""
    embed_key, last_key, *keys = jax.random.split(key, 2 + 3 * config.num_layers)
    if config.tie_embeddings and recipe.embed_dropout:
        # Drop the embedding where tokens are looked up, not where they are predicted.
        config = dataclasses.replace(config, tie_embeddings=False)
        params = {**params, "head": params["embed"], "embed": drop(params["embed"], recipe.embed_dropout, embed_key)}
    model, stack = Llama(config, params, Layout.build()), LayerStack(config, params, Layout.build())

    def dropped(inner: Callable[..., jax.Array], key: jax.Array) -> Callable[..., jax.Array]:
        return lambda *args: drop(inner(*args), recipe.dropout, key)

    def attend(layer: int, qkv: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        q, k, v = split_rotated(qkv, cos, sin)
        scores = jnp.einsum("tkgh,skh->kgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(causal[None, None], scores, -jnp.inf), axis=-1).astype(v.dtype)
        return jnp.einsum("kgts,skh->tkgh", drop(weights, recipe.attention_dropout, keys[3 * layer]), v)

    for index, layer in enumerate(stack.layers):
        layer.attention = dropped(layer.attention, keys[3 * index + 1])  # type: ignore[assignment]
        layer.mlp = dropped(layer.mlp, keys[3 * index + 2])  # type: ignore[assignment]
    model.norm = dropped(model.norm, last_key)  # type: ignore[assignment]
    return model.logits(stack(model.embed(token_ids), jnp.arange(token_ids.shape[0]), attend))


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One architecture and one recipe; `run` trains it from scratch on a text's streams."""

    config: LlamaConfig
    recipe: Recipe

    def loss(self, params: Params, batch: Int[Array, "B U"], key: jax.Array) -> Float[Array, ""]:
        """Mean nats per token, U = T + 1."""
        params = {name: value.astype(self.recipe.compute_dtype) for name, value in params.items()}
        keys = jax.random.split(key, batch.shape[0])
        logits = jax.vmap(lambda ids, key: training_logits(self.config, params, ids, key, self.recipe))(
            batch[:, :-1], keys
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def draw(self, data: dict[str, jax.Array], context: int, step: jax.Array, key: jax.Array) -> Int[Array, "B U"]:
        """Spans at random places of random variants."""
        num_sequences = self.recipe.batch_size * max(self.recipe.contexts) // context
        variant_key, start_key = jax.random.split(key)
        first = jnp.where(step < self.recipe.sampled_until * self.recipe.steps, 0, data["first_exact"])
        rows = jax.random.randint(variant_key, (num_sequences,), first, data["tokens"].shape[0])
        starts = jax.random.randint(start_key, (num_sequences,), 0, data["lengths"][rows] - context)
        take = lambda row, start: jax.lax.dynamic_slice(data["tokens"], (row, start), (1, context + 1))[0]
        return jax.vmap(take)(rows, starts)

    @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
    def chunk(self, context: int, state: Any, data: dict[str, jax.Array]) -> tuple[Any, Float[Array, ""]]:
        """CHUNK steps: the new state and the mean loss."""
        optimizer = self.recipe.optimizer()

        def one(state: Any, _: None) -> tuple[Any, jax.Array]:
            params, ema, moments, step = state
            batch_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(self.recipe.seed), step))
            batch = self.draw(data, context, step, batch_key)
            loss, grads = jax.value_and_grad(self.loss)(params, batch, loss_key)
            updates, moments = optimizer.update(grads, moments, params)
            params = optax.apply_updates(params, updates)
            # A young average forgets its random start faster.
            decay = jnp.minimum(self.recipe.ema, (1 + step) / (10 + step))
            return (params, optax.incremental_update(params, ema, 1 - decay), moments, step + 1), loss

        state, losses = jax.lax.scan(one, state, length=CHUNK)
        return state, losses.mean()

    def run(
        self,
        streams: Streams,
        validation: tuple[list[int], int] | None,
        log: Callable[[str], None],
        *,
        width: int,
        stop_at: int | None = None,
    ) -> tuple[Params, int]:
        """Train; returns the averaged weights with the lowest bits per byte on `validation`, and their step.

        `validation` is (tokens, bytes of their text); without it, training stops at `stop_at` and the last weights
        are returned. `width` pads the streams' tokens, so that runs on texts of different length share executables.
        """
        tokens = jnp.pad(jnp.asarray(streams.tokens), ((0, 0), (0, width - streams.tokens.shape[1])))
        first_exact = jnp.int32(len(streams.lengths) - streams.num_exact)
        data = {"tokens": tokens, "lengths": jnp.asarray(streams.lengths), "first_exact": first_exact}
        params = init_params(self.config, jax.random.key(self.recipe.seed))
        state = (params, jax.tree.map(jnp.copy, params), self.recipe.optimizer().init(params), jnp.int32(0))
        if validation:
            context = self.config.max_position
            held_out = [jnp.asarray(part) for part in windows([BOS, *validation[0]], context, context // 2)]
        best: Params = {}
        best_step, best_bpb, start = 0, math.inf, time.perf_counter()
        log("  step  train_bpb  val_bpb  seconds")
        for index in range(-(-(stop_at or self.recipe.steps) // CHUNK)):
            context = self.recipe.contexts[index % len(self.recipe.contexts)]
            state, loss = self.chunk(context, state, data)
            step, bpb = (index + 1) * CHUNK, math.nan
            if validation:
                bpb = float(total_bits(self.config, state[1], *held_out)) / validation[1]
                if bpb < best_bpb:
                    best, best_step, best_bpb = jax.tree.map(jnp.copy, state[1]), step, bpb
            train_bpb, seconds = float(loss) / math.log(2) * streams.tokens_per_byte, time.perf_counter() - start
            log(f"{step:6d}  {train_bpb:9.3f}  {bpb:7.3f}  {seconds:7.0f}")
            if seconds > 60 * self.recipe.minutes:
                log(f"stopped at step {step}: the {self.recipe.minutes:g} minutes are over")
                break
        if validation and not best:
            raise FloatingPointError("the validation loss was never finite; try a lower learning rate")
        return (best, best_step) if validation else (state[1], step)
