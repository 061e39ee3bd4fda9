"""Random weights: made where they live, the same in every layout."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from paddock.checkpoints import dummy, init_dummy_params, save_safetensors
from paddock.checkpoints.safetensors_folder import load_params
from paddock.model import forward, param_specs
from paddock.sharding import Layout


@pytest.mark.parametrize("mesh", ["tensor=2", "tensor=8"])
def test_every_layout_gets_the_same_model(mesh, config, tmp_path):
    one, layout = init_dummy_params(config, Layout.build(), seed=3), Layout.build(mesh)
    save_safetensors(tmp_path, config, one)
    want, got = load_params(tmp_path, config, layout), init_dummy_params(config, layout, seed=3)
    for name, spec in param_specs(config, layout).items():
        assert got[name].sharding == layout.place(spec)
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, err_msg=name)


def test_seeds_and_arrays_differ_and_repeat(config):
    layout = Layout.build()
    first, again, other = (init_dummy_params(config, layout, seed=seed) for seed in (0, 0, 1))
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
        assert not np.array_equal(array, other[name]), name
    assert not np.array_equal(first["layers.0.qkv"], first["layers.1.qkv"])
    assert not np.array_equal(first["embed"], first["head"])
    embed = np.asarray(first["embed"])
    assert len(np.unique(embed)) > 0.99 * embed.size
    assert abs(np.corrcoef(embed[:-1].ravel(), embed[1:].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [24, 384])
def test_logits_are_near_one_at_any_size(size, dtype, config):
    config = dataclasses.replace(config, embed_dim=size, mlp_dim=2 * size, num_layers=6)
    params = init_dummy_params(config, Layout.build(), dtype)
    assert {array.dtype for array in params.values()} == {jnp.dtype(dtype)}
    logits = np.asarray(forward(config, params, jnp.arange(32)))
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std() < 3
    assert len(set(logits.argmax(axis=-1))) > 5
    assert np.abs(np.asarray(params["norm"], np.float32) - 1).max() < 0.102


def test_layers_share_their_compiled_functions(config):
    dummy._maker.cache_clear()
    init_dummy_params(dataclasses.replace(config, num_layers=5), Layout.build())
    # embed, head, norm, qkv, out, gate_up, down and four biases
    assert dummy._maker.cache_info().misses == 11
