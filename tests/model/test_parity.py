"""Logits against those that transformers computed for the same folders (make_golden.py)."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paddock.checkpoints import load_params
from paddock.model import LlamaConfig, forward
from paddock.sharding import Layout

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def logits_of(case: str, dtype: str, ids: np.ndarray, *, rope_length: int | None) -> np.ndarray:
    config = LlamaConfig.from_file(GOLDEN / case / "config.json")
    params = load_params(GOLDEN / case, config, Layout.build(), dtype=dtype)
    run = jax.jit(functools.partial(forward, config, rope_length=rope_length))
    with jax.default_matmul_precision("highest"):
        return np.asarray(run(params, jnp.asarray(ids)).astype(jnp.float32))


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_equal_those_of_transformers(case):
    expected = np.load(GOLDEN / case / "expected.npz")
    ids = expected["input_ids"]
    logits = logits_of(case, "float32", ids, rope_length=len(ids))
    assert logits.shape == expected["logits"].shape
    assert distance(logits, expected["logits"]) <= 1e-5


def test_dynamic_rope_without_a_length_equals_token_by_token_decoding():
    expected = np.load(GOLDEN / "dynamic" / "expected.npz")
    logits = logits_of("dynamic", "float32", expected["input_ids"], rope_length=None)
    assert distance(logits, expected["stepwise_logits"]) <= 1e-5
    # The two definitions really differ here, so the test above tells them apart.
    assert distance(expected["logits"], expected["stepwise_logits"]) > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_logits_are_near_the_float32_ones_of_the_same_weights(case):
    expected = np.load(GOLDEN / case / "expected.npz")
    ids = expected["input_ids"]
    # Only "bfloat16" is stored rounded; for the others the reference is our own float32, which parity holds to theirs.
    reference = expected["logits"] if case == "bfloat16" else rounded_reference(case, ids)
    assert distance(logits_of(case, "bfloat16", ids, rope_length=len(ids)), reference) <= 2e-2


def rounded_reference(case: str, ids: np.ndarray) -> np.ndarray:
    """Float32 logits [T, V] with the weights rounded to bfloat16."""
    config = LlamaConfig.from_file(GOLDEN / case / "config.json")
    rounded = load_params(GOLDEN / case, config, Layout.build(), dtype="bfloat16")
    params = {name: weight.astype(jnp.float32) for name, weight in rounded.items()}
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(functools.partial(forward, config, rope_length=len(ids)))(params, jnp.asarray(ids)))
