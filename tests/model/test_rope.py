from __future__ import annotations

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paddock.model.rope import apply_rope, cos_sin, rope_frequencies
from paddock.model.rope_config import RopeConfig

GOLDEN = pathlib.Path(__file__).parent / "golden"
KINDS = json.loads((GOLDEN / "rope.json").read_text())
HEAD_DIM, MAX_POSITION = 128, 4096  # those of rope.npz
DYNAMIC = RopeConfig("dynamic", 10000.0, factor=4.0, original_max_position=16)


def golden(kind: str) -> tuple[RopeConfig, dict[str, np.ndarray]]:
    rope = RopeConfig.from_dict({"rope_parameters": KINDS[kind]}, default_theta=0.0, max_position=MAX_POSITION)
    arrays = np.load(GOLDEN / "rope.npz")
    names = ("frequencies", "cos", "sin")
    return rope, {"positions": arrays["positions"], **{name: arrays[f"{kind}.{name}"] for name in names}}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dynamic"])
def test_equals_transformers_up_to_position_131071(kind):
    rope, expected = golden(kind)
    frequencies, _ = rope_frequencies(rope, HEAD_DIM)
    # To the bit: one unit in the last place here is 0.008 radians there.
    np.testing.assert_array_equal(frequencies, expected["frequencies"])
    cos, sin = jax.jit(lambda positions: cos_sin(rope, HEAD_DIM, positions))(jnp.asarray(expected["positions"]))
    assert expected["positions"].max() == 131071
    np.testing.assert_allclose(cos, expected["cos"], rtol=0, atol=3e-7)
    np.testing.assert_allclose(sin, expected["sin"], rtol=0, atol=3e-7)


def test_dynamic_frequencies_of_a_length_equal_those_of_transformers():
    rope, expected = golden("dynamic")
    length = int(expected["positions"].max()) + 1
    cos, sin = cos_sin(rope, HEAD_DIM, jnp.array([1]), length=length)
    # At position 1 the angle is the frequency.
    np.testing.assert_allclose(np.arctan2(sin, cos)[0], expected["frequencies"], rtol=1e-6)
    assert expected["frequencies"][-1] < rope_frequencies(rope, HEAD_DIM)[0][-1] / 32


def test_dynamic_is_plain_up_to_the_original_context():
    plain = RopeConfig("default", DYNAMIC.theta)
    for length in (None, 3, 16):
        for ours, theirs in zip(
            cos_sin(DYNAMIC, 8, jnp.arange(16), length=length), cos_sin(plain, 8, jnp.arange(16)), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_dynamic_without_a_length_uses_each_tokens_own():
    positions = jnp.arange(10, 40)
    cos, _ = cos_sin(DYNAMIC, 8, positions)
    for row in (0, 5, 6, 29):
        alone, _ = cos_sin(DYNAMIC, 8, positions[row][None], length=int(positions[row]) + 1)
        np.testing.assert_allclose(cos[row], alone[0], rtol=0, atol=2e-6)
    chunks = [cos_sin(DYNAMIC, 8, chunk)[0] for chunk in (positions[:7], positions[7:9], positions[9:])]
    np.testing.assert_array_equal(jnp.concatenate(chunks), cos)
    longer, _ = cos_sin(DYNAMIC, 8, positions, length=40)
    assert float(jnp.abs(longer - cos).max()) > 0.01


def test_dynamic_length_may_be_traced():
    traced = jax.jit(lambda length: cos_sin(DYNAMIC, 8, jnp.arange(40), length=length))(jnp.int32(40))
    np.testing.assert_allclose(traced, cos_sin(DYNAMIC, 8, jnp.arange(40), length=40), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 0.1 * math.log(8) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 1.4, "mscale_all_dim": 0.6}, (0.14 * math.log(8) + 1) / (0.06 * math.log(8) + 1)),
        ({"mscale": 1.4}, 0.1 * math.log(8) + 1),  # as in transformers: it takes both
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_attention_scale(fields, scale):
    yarn = {"factor": 8.0, "original_max_position": 64, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    rope = RopeConfig("yarn", 10000.0, **yarn | fields)
    assert rope_frequencies(rope, 16)[1] == pytest.approx(scale)
    cos, sin = cos_sin(rope, 16, jnp.arange(5))
    np.testing.assert_allclose(cos**2 + sin**2, np.full((5, 8), scale**2), rtol=1e-6)


def test_apply_turns_the_pairs_of_the_two_halves():
    x = jnp.arange(1.0, 9.0).reshape(1, 2, 4)
    quarter = apply_rope(x, jnp.zeros((1, 2)), jnp.ones((1, 2)))
    np.testing.assert_array_equal(quarter, [[[-3, -4, 1, 2], [-7, -8, 5, 6]]])


def test_scores_depend_on_the_distance_alone():
    rope = RopeConfig("default", 10000.0)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 3, 16))

    def score(q_position: int, k_position: int) -> jax.Array:
        turned = [apply_rope(x, *cos_sin(rope, 16, jnp.array([p]))) for x, p in ((q, q_position), (k, k_position))]
        return jnp.sum(turned[0] * turned[1], axis=-1)

    np.testing.assert_allclose(score(9, 4), score(105, 100), atol=1e-4)
    assert float(jnp.abs(score(9, 4) - score(9, 5)).max()) > 1e-2


def test_bfloat16_is_turned_in_float32():
    x = jax.random.normal(jax.random.key(1), (30, 2, 16)).astype(jnp.bfloat16)
    cos, sin = cos_sin(RopeConfig("default", 10000.0), 16, jnp.arange(30))
    turned = apply_rope(x, cos, sin)
    assert turned.dtype == jnp.bfloat16
    exact = apply_rope(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))


def test_a_config_made_by_hand_is_checked():
    with pytest.raises(ValueError, match="rope_type 'longrope' is not supported"):
        RopeConfig("longrope", 10000.0)
    with pytest.raises(ValueError, match="factor is missing, which rope_type 'linear' needs"):
        RopeConfig("linear", 10000.0)


def test_cached_frequencies_cannot_be_changed():
    frequencies, _ = rope_frequencies(RopeConfig("default", 10000.0), 16)
    with pytest.raises(ValueError, match="read-only"):
        frequencies[0] = 2
