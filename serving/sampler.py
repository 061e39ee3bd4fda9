"""From logits to tokens, inside the step: bias, penalties, filters by threshold search, a draw, log-probabilities.

Nothing here sorts the vocabulary. Every piece that a batch may not need hangs on a flag (`When`): a Python bool where
the executable was compiled without it, else a traced one and a branch. On a GPU a branch would make the host wait for
the flag, so there the flags are compiled in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from .step_input import FLAGS, Rows

When = bool | jax.Array
X = TypeVar("X", jax.Array, "Sampled")
_BLOCK = 128


class SamplerState(NamedTuple):
    """Per slot, on the device: output token counts [S V] int32, tokens of the prompt [S V] bool, bias [S V] float32."""

    counts: jax.Array
    prompted: jax.Array
    bias: jax.Array


class Sampled(NamedTuple):
    """Per row: the token [R], and unless they were compiled out its log-probability and rank [R], and the most likely
    tokens [R M] (all from the raw logits, before bias, penalties and temperature)."""

    tokens: jax.Array
    logprob: jax.Array | None = None
    rank: jax.Array | None = None
    top_logprobs: jax.Array | None = None
    top_ids: jax.Array | None = None


def compiled_flags(flags: Int[Array, " F"], *, full: bool, branches: bool) -> dict[str, When]:
    """Which pieces run: all of a full sampler's, or just what the batch needs where branches are cheap."""
    if branches:
        return {name: flags[i] > 0 for i, name in enumerate(FLAGS)}
    return {name: full or name == "random" for name in FLAGS}


def sample(
    logits: Float[Array, "R V"], rows: Rows, state: SamplerState, flags: dict[str, When], num_logprobs: int
) -> Sampled:
    """Draw one token a row. Greedy rows (temperature 0) take the first of the most likely."""
    raw = logits
    slot = jnp.minimum(rows.slot, state.counts.shape[0] - 1)
    logits = _when(flags["penalties"], lambda x: _penalize(x, rows, state.counts[slot], state.prompted[slot]), logits)
    logits = _when(flags["bias"], lambda x: jnp.where(rows.has_bias[:, None] > 0, x + state.bias[slot], x), logits)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn(_: jax.Array) -> jax.Array:
        scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
        scaled = _when(flags["filters"], lambda x: _filter(x, rows), scaled)
        return _choose(scaled, rows.temperature > 0, _uniforms(rows))

    tokens = _when(flags["random"], drawn, greedy)
    if flags["logprobs"] is False:
        return Sampled(tokens)
    num_rows = tokens.shape[0]
    nothing = Sampled(
        tokens,
        jnp.zeros(num_rows),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros((num_rows, num_logprobs)),
        jnp.zeros((num_rows, num_logprobs), jnp.int32),
    )
    return _when(flags["logprobs"], lambda _: score(raw, tokens, num_logprobs), nothing)


def score(logits: Float[Array, "R V"], tokens: Int[Array, " R"], num_logprobs: int) -> Sampled:
    """Log-probability and rank of `tokens`, and the `num_logprobs` most likely ones."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    rank = jnp.sum(logits > chosen, axis=-1, dtype=jnp.int32) + 1
    top, ids = jax.lax.top_k(logits, num_logprobs)
    return Sampled(tokens, chosen[:, 0] - log_total, rank, top - log_total[:, None], ids.astype(jnp.int32))


def _when(flag: When, fn: Callable[[X], X], x: X) -> X:
    if isinstance(flag, bool):
        return fn(x) if flag else x
    return jax.lax.cond(flag, fn, lambda x: x, x)


def _penalize(logits: jax.Array, rows: Rows, counts: Int[Array, "R V"], prompted: jax.Array) -> jax.Array:
    repeated = rows.repetition_penalty[:, None]
    seen = (counts > 0) | prompted
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repeated, logits * repeated), logits)
    return logits - rows.frequency_penalty[:, None] * counts - rows.presence_penalty[:, None] * (counts > 0)


def _filter(logits: Float[Array, "R V"], rows: Rows) -> Float[Array, "R V"]:
    """min_p, then top_k, then top_p, as vLLM orders them; what is cut becomes -inf. Ties at a threshold all stay."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    with_min_p = rows.min_p[:, None] > 0
    logits = jnp.where(with_min_p & (jnp.exp(logits - top) < rows.min_p[:, None]), -jnp.inf, logits)
    keys = _ordered_bits(logits)
    vocab = logits.shape[-1]
    k = jnp.where((rows.top_k > 0) & (rows.top_k < vocab), rows.top_k, 0).astype(jnp.float32)
    low = _threshold(keys, jnp.ones_like(logits), k)
    logits = jnp.where((k > 0)[:, None] & (keys < low[:, None]), -jnp.inf, logits)
    weights = jnp.exp(logits - top)
    # However small top_p is, the most likely token stays: its weight is 1.
    mass = jnp.maximum(rows.top_p * jnp.sum(weights, axis=-1), 1e-30)
    low = _threshold(keys, weights, mass)
    return jnp.where((rows.top_p < 1)[:, None] & (keys < low[:, None]), -jnp.inf, logits)


def _ordered_bits(x: Float[Array, "R V"]) -> UInt[Array, "R V"]:
    """Bits that compare as unsigned integers the way the floats compare."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 0, bits | jnp.uint32(1 << 31), ~bits)


def _threshold(keys: UInt[Array, "R V"], weights: Float[Array, "R V"], target: Float[Array, " R"]) -> UInt[Array, " R"]:
    """Per row the largest t with sum(weights[keys >= t]) >= target: a radix search, one bit a pass."""

    def add_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        mass = jnp.sum(jnp.where(keys >= candidate[:, None], weights, 0), axis=-1)
        return jnp.where(mass >= target, candidate, found)

    return jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(keys.shape[0], jnp.uint32))


def _uniforms(rows: Rows) -> Float[Array, " R"]:
    """One number in [0, 1) a row, from its request's seed and the token's position alone: the batch has no part."""
    data = jnp.stack([rows.seed_high, rows.seed_low], axis=-1)
    keys = jax.random.wrap_key_data(jax.lax.bitcast_convert_type(data, jnp.uint32), impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in)(keys, rows.position)
    return jax.vmap(lambda key: jax.random.uniform(key))(keys)


def _choose(logits: Float[Array, "R V"], random: Bool[Array, " R"], uniform: Float[Array, " R"]) -> Int[Array, " R"]:
    """A draw where `random`, by the inverse of the cumulative distribution; else the first of the most likely.

    In two levels: the block of 128 tokens first, then the token in it. So the vocabulary is read once.
    """
    num_rows, vocab = logits.shape
    padded = jnp.pad(logits, ((0, 0), (0, -vocab % _BLOCK)), constant_values=-jnp.inf)
    blocks = padded.reshape(num_rows, -1, _BLOCK)
    peaks, masses = _peaks_and_masses(blocks)
    peak = jnp.max(peaks, axis=-1, keepdims=True)
    ends = jnp.cumsum(masses * jnp.exp(peaks - peak), axis=-1)
    target = uniform * ends[:, -1]
    block = jnp.where(random, jnp.argmax(ends > target[:, None], axis=-1), jnp.argmax(peaks, axis=-1))
    start = jnp.where(block > 0, jnp.take_along_axis(ends, jnp.maximum(block - 1, 0)[:, None], axis=-1)[:, 0], 0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    beyond = jnp.cumsum(jnp.exp(inside - peak), axis=-1) > (target - start)[:, None]
    likeliest = jnp.argmax(inside, axis=-1)
    # Rounding can leave the target at or past the block's own sum; the block's likeliest token is then as good.
    drawn = jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), likeliest)
    return (block * _BLOCK + jnp.where(random, drawn, likeliest)).astype(jnp.int32)


def _peaks_and_masses(blocks: Float[Array, "R N b"]) -> tuple[Float[Array, "R N"], Float[Array, "R N"]]:
    """Each block's largest logit, and the sum of exp(logit - largest), in one pass (Milakov and Gimelshein 2018)."""

    def join(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # One power a pair, for that of the larger peak is 1: powers are what this costs. Where both are -inf, their
        # difference would be NaN.
        decay = jnp.exp(jnp.where(a[0] == b[0], 0.0, -jnp.abs(a[0] - b[0])))
        larger, smaller = jnp.where(a[0] >= b[0], a[1], b[1]), jnp.where(a[0] >= b[0], b[1], a[1])
        return jnp.maximum(a[0], b[0]), larger + smaller * decay

    start = jnp.float32(-jnp.inf), jnp.float32(0)
    return jax.lax.reduce((blocks, jnp.ones_like(blocks)), start, join, dimensions=(2,))
