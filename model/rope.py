"""Rotary position embeddings (Su et al. 2021) and the ways in which Llamas stretch them over longer contexts.

The two halves of a head are the two parts of its pairs, as in Hugging Face checkpoints. Angles are float32 products
of position and frequency, as in transformers: at position 131,071 another order of rounding is another rotation.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from paddock.pallas_kernels import apply_rope

from .rope_config import RopeConfig

__all__ = ["apply_rope", "cos_sin", "rope_frequencies"]


@functools.lru_cache(maxsize=64)
def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position [h/2] in float32, and the factor on cos and sin; dynamic: those of the original context.

    linear: position interpolation (Chen et al. 2023). yarn: Peng et al. 2023. llama3: Llama 3.1's bands of wavelengths.
    """
    powers = _power(rope.theta, head_dim)
    frequencies, attention_scale = np.float32(1) / powers, 1.0
    if rope.kind == "linear":
        frequencies = frequencies / np.float32(*rope.require("factor"))
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.kind == "yarn":
        frequencies, attention_scale = _yarn(rope, powers), _yarn_attention_scale(rope)
    frequencies.flags.writeable = False  # the cache gives the same array to every caller
    return frequencies, attention_scale


def cos_sin(
    rope: RopeConfig, head_dim: int, positions: Int[Array, " T"], *, length: int | Int[Array, ""] | None = None
) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """Float32 cosines and sines [T, h/2] for tokens at `positions` (in tokens, from 0).

    `length` matters to dynamic RoPE alone, whose frequencies depend on how long the sequence is. None gives each
    token those of its own position + 1: nothing already in a cache changes as the sequence grows, however it was
    cut into steps, and the result is that of decoding token by token in transformers. A length gives every token
    those of that length, which is what transformers computes when it is given a whole sequence of it at once.
    """
    frequencies, attention_scale = rope_frequencies(rope, head_dim)
    rates = jnp.asarray(frequencies)[None]
    if rope.kind == "dynamic":
        lengths = positions + 1 if length is None else jnp.full(1, length)
        rates = rates * _dynamic_slowdown(rope, head_dim, lengths)
    angles = positions.astype(jnp.float32)[:, None] * rates
    scale = jnp.float32(attention_scale)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _power(theta: float, head_dim: int) -> np.ndarray:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(theta, exponents.astype(np.float64)).astype(np.float32)


def _dynamic_slowdown(rope: RopeConfig, head_dim: int, lengths: Int[Array, " T"]) -> Float[Array, "T half"]:
    # NTK-aware scaling: theta grows with the length so that the slowest pair turns slower by length / original context
    # (times the factor) and the fastest one not at all. Exactly 1 up to the original context.
    factor, original = rope.require("factor", "original_max_position")
    longest = jnp.maximum(lengths, int(original)).astype(jnp.float32)
    stretch = (factor * longest / original - (factor - 1)) ** (head_dim / (head_dim - 2))
    return stretch[:, None] ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)[None]


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    # Short wavelengths stay, long ones (over original / low) are stretched by the factor, between them it is blended.
    factor, original, low, high = rope.require("factor", "original_max_position", "low_freq_factor", "high_freq_factor")
    turns = np.float32(original) / (np.float32(2 * math.pi) / frequencies)
    keep = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - keep) * frequencies / np.float32(factor) + keep * frequencies


def _yarn(rope: RopeConfig, powers: np.ndarray) -> np.ndarray:
    # Pairs that turn more than beta_fast times within the original context stay; under beta_slow they are stretched.
    factor, original, beta_fast, beta_slow = rope.require("factor", "original_max_position", "beta_fast", "beta_slow")
    pairs = len(powers)

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(original / (times * 2 * math.pi)) / math.log(rope.theta)

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)  # 2 * pairs: as everybody has computed it since the paper
    width = high - low if high != low else 0.001
    keep = 1 - np.clip((np.arange(pairs, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    return (1 - keep) * (1 / (np.float32(factor) * powers)) + keep * (1 / powers)


def _yarn_attention_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    log_factor = math.log(*rope.require("factor"))
    if rope.mscale is not None and rope.mscale_all_dim is not None:
        return (0.1 * rope.mscale * log_factor + 1) / (0.1 * rope.mscale_all_dim * log_factor + 1)
    return 0.1 * log_factor + 1
