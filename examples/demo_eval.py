"""Measures of a Llama on plain text, by the model's cache-free `forward`: bits per byte, and samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from paddock.model import LlamaConfig, forward


def windows(token_ids: Sequence[int], context: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut a text into overlapping windows [W, context]: inputs, targets, and which targets count.

    Every token but the first is a counted target exactly once, and all beyond the first window have at least
    `context - stride` tokens before them.
    """
    ids = np.asarray(token_ids, np.int32)
    starts = range(0, max(len(ids) - 1 - context + stride, 1), stride)
    inputs = np.zeros((len(starts), context), np.int32)
    targets, counted = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
    for row, start in enumerate(starts):
        part = ids[start : start + context + 1]
        size = len(part) - 1
        inputs[row, :size], targets[row, :size] = part[:-1], part[1:]
        counted[row, (context - stride if row else 0) : size] = True
    return inputs, targets, counted


@functools.partial(jax.jit, static_argnums=0)
def total_bits(
    config: LlamaConfig,
    params: Mapping[str, Array],
    inputs: Int[Array, "W T"],
    targets: Int[Array, "W T"],
    counted: Bool[Array, "W T"],
) -> Float[Array, ""]:
    """-log2 of the probability of the counted targets."""

    def window(arrays: tuple[Array, Array, Array]) -> Array:
        logits = forward(config, params, arrays[0])
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, arrays[1]), where=arrays[2])

    return jnp.sum(jax.lax.map(window, (inputs, targets, counted), batch_size=8)) / math.log(2)


def bits_per_byte(
    config: LlamaConfig, params: Mapping[str, Array], token_ids: Sequence[int], num_bytes: int, *, context: int = 0
) -> float:
    """Bits per UTF-8 byte of a text of `num_bytes`, whose tokens `token_ids` start with <s>.

    Windows of `context` tokens (default: the config's maximum) step by half of it.
    """
    context = context or config.max_position
    parts = [jnp.asarray(part) for part in windows(token_ids, context, context // 2)]
    return float(total_bits(config, params, *parts)) / num_bytes


@functools.partial(jax.jit, static_argnums=0)
def _next_logits(config: LlamaConfig, params: Mapping[str, Array], buffer: Array, length: Array) -> Array:
    return forward(config, params, buffer)[length - 1]


def sample(
    config: LlamaConfig,
    params: Mapping[str, Array],
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """Tokens drawn after the prompt by recomputing all of it at each step, up to an end token (left out)."""
    buffer = jnp.zeros(len(prompt_ids) + max_tokens, jnp.int32).at[: len(prompt_ids)].set(jnp.asarray(prompt_ids))
    drawn: list[int] = []
    for step, key in enumerate(jax.random.split(jax.random.key(seed), max_tokens)):
        logits = _next_logits(config, params, buffer, jnp.int32(len(prompt_ids) + step))
        token = int(jax.random.categorical(key, logits / temperature))
        if token in config.eos_token_ids:
            break
        drawn.append(token)
        buffer = buffer.at[len(prompt_ids) + step].set(token)
    return drawn
