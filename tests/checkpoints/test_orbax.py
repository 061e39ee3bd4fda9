"""Orbax folders: written by any mesh, read by any mesh, complete as model folders."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from paddock.checkpoints import convert, init_dummy_params, load_orbax, load_params, save_orbax
from paddock.checkpoints.orbax_folder import PARAMS, _spread
from paddock.model import LlamaConfig, param_specs
from paddock.sharding import Layout


@pytest.fixture
def orbax(folder, tmp_path):
    convert(folder, tmp_path / "orbax")
    return tmp_path / "orbax"


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ("", ""),
        ("tensor=2", ""),
        ("tensor=4", ""),
        ("tensor=8", ""),
        ("x=2,y=3", "q_heads=x,kv_heads=x,mlp=x,vocab=x,embed=y"),
    ],
    ids=["one", "tensor2", "repeated", "all_repeated", "two_axes"],
)
def test_orbax_loads_into_any_mesh(mesh, rules, config, folder, orbax):
    layout = Layout.build(mesh, rules)
    want, got = load_params(folder, config, layout), load_orbax(orbax, config, layout)
    assert list(got) == list(want)
    for name, array in want.items():
        assert got[name].sharding == array.sharding
        assert got[name].sharding.shard_shape(array.shape) == array.sharding.shard_shape(array.shape)
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_a_repeated_and_padded_mesh_writes_what_one_device_writes(config, folder, orbax, tmp_path):
    save_orbax(tmp_path / "again", config, load_params(folder, config, Layout.build("tensor=8")))
    one, eight = (load_orbax(path, config, Layout.build()) for path in (orbax, tmp_path / "again"))
    for name, array in one.items():
        np.testing.assert_array_equal(eight[name], array, err_msg=name)
    assert LlamaConfig.from_file(tmp_path / "again" / "config.json") == config


def test_arrays_to_be_changed_arrive_split_over_all_devices(config):
    layout = Layout.build("tensor=8")
    embed = _spread((config.vocab_size, config.embed_dim), np.float32, layout.sharding())
    assert embed.sharding.shard_shape(embed.shape) == (101, 3)
    odd = _spread((101, 23), np.float32, layout.sharding())
    assert odd.sharding.is_fully_replicated


def test_large_arrays_are_stored_in_chunks(config, tmp_path, monkeypatch):
    monkeypatch.setattr("paddock.checkpoints.orbax_folder._CHUNK_BYTES", 2000)
    save_orbax(tmp_path / "orbax", config, init_dummy_params(config, Layout.build()))
    described = (tmp_path / "orbax" / PARAMS / "array_metadatas" / "process_0").read_text()
    chunks = {
        entry["array_metadata"]["param_name"]: entry["array_metadata"]
        for entry in json.loads(described)["array_metadatas"]
    }
    embed = chunks["embed"]
    assert np.prod(embed["chunk_shape"]) * 4 <= 2000 < np.prod(embed["write_shape"]) * 4


def test_the_folder_is_a_complete_model(config, folder, tmp_path):
    companions = {
        "generation_config.json": '{"temperature": 0.6}',
        "tokenizer_config.json": "{}",
        "tokenizer.model": "pieces",
        "chat_template.jinja": "{{ messages }}",
        "LICENSE": "free",
    }
    for name, text in companions.items():
        (folder / name).write_text(text)
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "training.log").write_text("long")
    convert(folder, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*companions, "config.json", PARAMS}
    assert {name: (tmp_path / "out" / name).read_text() for name in companions} == companions


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_converting_to_another_dtype_says_so_in_the_config(spelling, config, folder, tmp_path):
    raw = json.loads((folder / "config.json").read_text())
    raw = {k: v for k, v in raw.items() if not k.endswith("dtype")} | {spelling: "float32", "kept": "as it was"}
    (folder / "config.json").write_text(json.dumps(raw))
    convert(folder, tmp_path / "out", "bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == raw | {spelling: "bfloat16"}
    half = LlamaConfig.from_file(tmp_path / "out" / "config.json")
    params = load_orbax(tmp_path / "out", half, Layout.build("tensor=2"))
    want = load_params(folder, half, Layout.build("tensor=2"))
    assert {array.dtype.name for array in params.values()} == {"bfloat16"}
    for name, array in want.items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)


def test_loading_casts(config, folder, orbax):
    params = load_orbax(orbax, config, Layout.build("tensor=4"), "bfloat16")
    for name, array in load_params(folder, config, Layout.build("tensor=4"), "bfloat16").items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)


def test_a_value_that_overflows_a_narrower_dtype_is_an_error(config, tmp_path):
    params = init_dummy_params(config, Layout.build())
    params["layers.1.down"] = params["layers.1.down"].at[0, 0].set(1e6)
    save_orbax(tmp_path / "orbax", config, params)
    with pytest.raises(ValueError, match=r"array 'layers.1.down' has values that float16 cannot hold"):
        load_orbax(tmp_path / "orbax", config, Layout.build(), "float16")


def test_a_folder_that_holds_anything_is_refused(config, folder, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="used exists and is not an empty folder"):
        convert(folder, tmp_path / "used")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match=r"notes.txt exists and is not an empty folder"):
        convert(folder, tmp_path / "used" / "notes.txt")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tie_embeddings": True}, "array 'head' is not part of the model"),
        ({"num_layers": 3}, r"array 'layers.2.attention_norm' of shape \[24\] is missing"),
        ({"mlp_dim": 48}, r"array 'layers.\d.gate_up' has shape \[24, 40, 2\]; config.json asks for \[24, 48, 2\]"),
    ],
    ids=["extra", "missing", "misshapen"],
)
def test_arrays_that_do_not_fit_are_named(changes, says, config, orbax):
    before = len(jax.live_arrays())
    with pytest.raises(ValueError, match=f"orbax.params: {says}"):
        load_orbax(orbax, dataclasses.replace(config, **changes), Layout.build("tensor=2"))
    assert len(jax.live_arrays()) == before


def test_integers_are_refused(config, tmp_path):
    params = init_dummy_params(config, Layout.build())
    params["norm"] = params["norm"].astype("int32")
    save_orbax(tmp_path / "orbax", config, params)
    with pytest.raises(ValueError, match="array 'norm' has dtype int32"):
        load_orbax(tmp_path / "orbax", config, Layout.build())


def test_damaged_arrays_are_named(orbax):
    """In a process of its own: Orbax's coroutines and threads go on complaining when the failure is long over."""
    code = """if True:
        import sys, pathlib
        from paddock.checkpoints import load_orbax
        from paddock.model import LlamaConfig
        from paddock.sharding import Layout
        folder = pathlib.Path(sys.argv[1])
        files = sorted((folder / sys.argv[2]).rglob("d/*"), key=lambda file: -file.stat().st_size)
        for damaged in (files[:1], files[1:]):
            for file in damaged:
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            try:
                load_orbax(folder, LlamaConfig.from_file(folder / "config.json"), Layout.build())
            except ValueError as error:
                print(str(error).replace(chr(10), " "))
        """
    command = [sys.executable, "-c", code, str(orbax), PARAMS]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    first, second = run.stdout.splitlines()
    assert re.search(r"orbax.params: array '[\w.]+' cannot be read: \w+", first)
    assert re.search(r"orbax.params: .* cannot be read: \w+", second)


def test_damaged_metadata_are_named(config, orbax):
    (orbax / PARAMS / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match=r"orbax.params: the metadata cannot be read"):
        load_orbax(orbax, config, Layout.build())
    shutil.rmtree(orbax / PARAMS)
    with pytest.raises(ValueError, match=r"orbax.params is not an Orbax checkpoint"):
        load_orbax(orbax, config, Layout.build())


def test_canonical_names_and_shapes_are_what_is_stored(config, orbax):
    stored = json.loads((orbax / PARAMS / "array_metadatas" / "process_0").read_text())["array_metadatas"]
    shapes = {e["array_metadata"]["param_name"]: tuple(e["array_metadata"]["write_shape"]) for e in stored}
    assert shapes == {name: spec.shape for name, spec in param_specs(config).items()}
