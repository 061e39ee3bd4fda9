"""The sampler against plain numpy, which sorts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paddock.serving.sampler import SamplerState, compiled_flags, sample
from paddock.serving.step_input import FLAGS, FLOATS, INTS, Rows

R, V, M = 400, 300, 5
OFF = dict(
    temperature=1.0, top_p=1.0, min_p=0.0, top_k=0, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0
)


def make_rows(**values: float) -> Rows:
    values = {**OFF, "slot": 0, "position": 7, "has_bias": 0, "seed_high": 1, "seed_low": 0, **values}
    rows = {name: jnp.full(R, values[name], jnp.int32) for name in INTS}
    rows |= {name: jnp.full(R, values[name], jnp.float32) for name in FLOATS}
    return Rows(**rows)._replace(seed_low=jnp.arange(R, dtype=jnp.int32))


@pytest.fixture(scope="module")
def state() -> SamplerState:
    rng = np.random.default_rng(0)
    counts = jnp.asarray(rng.integers(0, 3, (2, V)) * (rng.random((2, V)) < 0.3), jnp.int32)
    return SamplerState(
        counts, jnp.asarray(rng.random((2, V)) < 0.2), jnp.asarray(rng.normal(size=(2, V)), jnp.float32)
    )


@pytest.fixture(scope="module")
def logits() -> jax.Array:
    """One row, many times: tokens drawn in different rows are draws from one distribution."""
    return jnp.tile(jnp.asarray(np.random.default_rng(1).normal(size=V) * 2, jnp.float32)[None], (R, 1))


@pytest.fixture(scope="module")
def run():
    compiled = jax.jit(lambda logits, rows, state: sample(logits, rows, state, dict.fromkeys(FLAGS, True), M))
    return lambda *arguments: jax.tree.map(np.asarray, compiled(*arguments))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def test_greedy_takes_the_first_of_the_most_likely(run, logits, state) -> None:
    tied = logits.at[:, 10].set(50.0).at[:, 200].set(50.0)
    assert set(run(tied, make_rows(temperature=0.0), state).tokens) == {10}


@pytest.mark.parametrize("k", [1, 2, 17, V + 5])
def test_top_k(run, logits, state, k: int) -> None:
    allowed = set(np.argsort(np.asarray(logits[0]))[::-1][:k].tolist())
    drawn = set(run(logits, make_rows(top_k=k, temperature=3.0), state).tokens.tolist())
    assert drawn <= allowed
    assert len(drawn) > min(k, 20) // 2


@pytest.mark.parametrize("p", [0.0, 0.01, 0.5, 0.9])
def test_top_p_is_the_smallest_set_that_reaches_p(run, logits, state, p: float) -> None:
    order = np.argsort(np.asarray(logits[0]))[::-1]
    mass = np.cumsum(softmax(np.asarray(logits[0]))[order])
    allowed = set(order[: int(np.searchsorted(mass, p)) + 1].tolist())
    drawn = set(run(logits, make_rows(top_p=p), state).tokens.tolist())
    assert drawn <= allowed
    assert len(drawn) >= min(len(allowed), 8) // 2


def test_top_p_counts_what_top_k_left(run, logits, state) -> None:
    order = np.argsort(np.asarray(logits[0]))[::-1][:4]
    mass = np.cumsum(softmax(np.asarray(logits[0])[order]))
    allowed = set(order[: int(np.searchsorted(mass, 0.6)) + 1].tolist())
    assert set(run(logits, make_rows(top_k=4, top_p=0.6), state).tokens.tolist()) == allowed


def test_min_p(run, logits, state) -> None:
    probabilities = softmax(np.asarray(logits[0]))
    allowed = set(np.flatnonzero(probabilities >= 0.2 * probabilities.max()).tolist())
    assert set(run(logits, make_rows(min_p=0.2), state).tokens.tolist()) <= allowed


def test_draws_follow_the_distribution(run, logits, state) -> None:
    temperature = 0.7
    want = softmax(np.asarray(logits[0]) / temperature)
    counts = np.zeros(V)
    for position in range(20):
        tokens = run(logits, make_rows(temperature=temperature, position=position), state).tokens
        counts += np.bincount(tokens, minlength=V)
    # Chi-square over tokens expected at least 5 times; its mean is their number, its deviation sqrt(2 n).
    expected = want * R * 20
    common = expected >= 5
    chi = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert abs(chi - common.sum()) < 5 * np.sqrt(2 * common.sum())


def test_penalties_and_bias(run, logits, state) -> None:
    params = dict(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.3)
    counts, prompted, bias = (np.asarray(part[1]) for part in state)
    want = np.asarray(logits[0], np.float64)
    seen = (counts > 0) | prompted
    want = np.where(seen, np.where(want > 0, want / 1.3, want * 1.3), want) - 0.25 * counts - 0.5 * (counts > 0)
    rows = make_rows(temperature=0.0, slot=1, **params)
    assert run(logits, rows, state).tokens[0] == want.argmax()
    rows = make_rows(temperature=0.0, slot=1, has_bias=1, **params)
    assert run(logits, rows, state).tokens[0] == (want + bias).argmax()


def test_logprobs_are_of_the_raw_logits(run, logits, state) -> None:
    sampled = run(logits, make_rows(temperature=2.0, top_k=50, slot=1, has_bias=1), state)
    want = np.log(softmax(np.asarray(logits[0], np.float64)))
    np.testing.assert_allclose(sampled.logprob, want[sampled.tokens], rtol=1e-5, atol=1e-5)
    order = np.argsort(want)[::-1]
    np.testing.assert_array_equal(sampled.top_ids[0], order[:M])
    np.testing.assert_allclose(sampled.top_logprobs[0], want[order[:M]], rtol=1e-5)
    assert [int(np.flatnonzero(order == t)[0]) + 1 for t in sampled.tokens[:9]] == sampled.rank[:9].tolist()


def test_the_draw_depends_on_seed_and_position_alone(run, logits, state) -> None:
    rows = make_rows(temperature=1.5)
    first = run(logits, rows, state).tokens
    flipped = Rows(*(x[::-1] for x in rows))
    np.testing.assert_array_equal(run(logits, flipped, state).tokens, first[::-1])
    assert (run(logits, rows._replace(position=rows.position + 1), state).tokens != first).any()
    assert (run(logits, rows._replace(seed_high=rows.seed_high + 1), state).tokens != first).any()


def test_greedy_and_drawn_rows_do_not_mind_each_other(run, logits, state) -> None:
    greedy, drawn = (run(logits, make_rows(temperature=t), state).tokens for t in (0.0, 1.5))
    rows = make_rows(temperature=1.5)
    every_other = jnp.arange(R) % 2 == 0
    mixed = run(logits, rows._replace(temperature=jnp.where(every_other, 0.0, 1.5)), state).tokens
    np.testing.assert_array_equal(mixed, np.where(every_other, greedy, drawn))


def test_padding_of_the_vocabulary_is_never_drawn(run, logits, state) -> None:
    padded = logits.at[:, 100:].set(-jnp.inf)
    assert run(padded, make_rows(temperature=1e6), state).tokens.max() < 100


def test_branches_give_what_the_full_sampler_gives(run, logits, state) -> None:
    """On CPU pieces hang on run-time flags: with all set nothing may differ, and unset ones must not run."""
    branching = jax.jit(lambda flags, *rest: sample(*rest, compiled_flags(flags, full=True, branches=True), M))
    rows = make_rows(temperature=0.9, top_p=0.8, has_bias=1)
    every = jax.tree.map(np.asarray, branching(jnp.ones(len(FLAGS), jnp.int32), logits, rows, state))
    for got, want in zip(every, run(logits, rows, state), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    none = branching(jnp.zeros(len(FLAGS), jnp.int32), logits, rows, state)
    assert set(np.asarray(none.tokens)) == {int(np.argmax(logits[0]))}
    assert not np.asarray(none.logprob).any()
