"""Hugging Face folders into sharded arrays, and back."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from paddock.checkpoints import load_params, save_safetensors
from paddock.checkpoints.names import order_of, param_parts
from paddock.checkpoints.safetensors_folder import SafetensorsFolder
from paddock.model import Dims, LlamaConfig, param_specs
from paddock.sharding import Layout

# (mesh, rules, kv_repeat, padded vocabulary)
LAYOUTS = {
    "one": ("", "", 1, 101),
    "tensor2": ("tensor=2", "", 1, 102),
    "repeated": ("tensor=4", "", 2, 104),
    "all_repeated": ("tensor=8", "", 4, 104),
    "two_axes": ("x=2,y=3", "q_heads=x,kv_heads=x,mlp=x,vocab=x,embed=y", 1, 102),
    "head_dim": ("x=2", "q_heads=,kv_heads=,head_dim=x,mlp=,vocab=", 1, 101),
    "replicated": ("x=2,y=2", "q_heads=x,kv_heads=x,mlp=y,vocab=", 1, 101),
}


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_holds_the_same_weights(case, files, config, tensors, make_folder, expected):
    mesh, rules, kv_repeat, vocab = LAYOUTS[case]
    layout = Layout.build(mesh, rules)
    params = load_params(make_folder(config, tensors, files=files), config, layout)
    specs, want = param_specs(config, layout), expected(kv_repeat, vocab)
    assert list(params) == list(specs)
    assert params.keys() == want.keys()
    for name, array in params.items():
        assert array.sharding == layout.place(specs[name])
        np.testing.assert_array_equal(array, want[name], err_msg=name)
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, want[name][shard.index], err_msg=name)


FLOATS = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", FLOATS, ids=lambda dtype: np.dtype(dtype).name)
def test_any_float_dtype_is_cast(stored, target, config, tensors, make_folder):
    tensors = {name: value.astype(stored) for name, value in tensors.items()}
    params = load_params(make_folder(config, tensors), config, Layout.build(), target)
    assert {array.dtype for array in params.values()} == {np.dtype(target)}
    np.testing.assert_array_equal(params["embed"], tensors["model.embed_tokens.weight"].astype(target))
    assert len(np.unique(params["embed"])) > 20


def test_the_dtype_defaults_to_the_configs(tensors, config, make_folder):
    config = dataclasses.replace(config, dtype="bfloat16")
    params = load_params(make_folder(config, tensors), config, Layout.build())
    assert {array.dtype.name for array in params.values()} == {"bfloat16"}


def test_a_value_that_overflows_a_narrower_dtype_is_an_error(config, tensors, make_folder):
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 2] = 1e6
    folder = make_folder(config, tensors)
    assert np.asarray(load_params(folder, config, Layout.build(), "bfloat16")["layers.1.qkv"]).max() > 9e5
    with pytest.raises(
        ValueError, match=r"model.safetensors: tensor 'model.layers.1.self_attn.k_proj.weight'.*float16"
    ):
        load_params(folder, config, Layout.build(), "float16")


def test_each_shard_reads_its_own_part_and_nothing_else(config, tensors, folder):
    layout = Layout.build("tensor=2")
    source, parts, specs = SafetensorsFolder(folder), param_parts(Dims.of(config, layout)), param_specs(config, layout)
    for name, spec in specs.items():
        read_before = source.bytes_read
        indices = layout.place(spec).addressable_devices_indices_map(spec.shape)
        first = tuple(
            slice(*s.indices(n)[:2]) for s, n in zip(indices[layout.mesh.devices[0]], spec.shape, strict=True)
        )
        order = order_of(name, len(first))
        stored = tuple(first[order.index(axis)] for axis in range(len(order)))
        piece = source.read(parts[name], stored, np.dtype(np.float32))
        is_split = name.endswith(("qkv", "out", "qkv_bias", "gate_up", "gate_up_bias", "down", "embed", "head"))
        assert piece.size == np.prod(spec.shape) / (2 if is_split else 1)
        assert source.bytes_read - read_before == piece.nbytes


@pytest.mark.parametrize(("mesh", "extra"), [("", 0), ("tensor=2", 0), ("tensor=4", 1), ("tensor=8", 3)])
def test_a_load_reads_every_byte_once_but_repeated_kv_heads(mesh, extra, config, tensors, folder, monkeypatch):
    sources = []

    class Recorded(SafetensorsFolder):
        def __init__(self, path: Path):
            super().__init__(path)
            sources.append(self)

    monkeypatch.setattr("paddock.checkpoints.safetensors_folder.SafetensorsFolder", Recorded)
    load_params(folder, config, Layout.build(mesh))
    kv_bytes = sum(value.nbytes for name, value in tensors.items() if "k_proj" in name or "v_proj" in name)
    assert sources[0].bytes_read == sum(value.nbytes for value in tensors.values()) + extra * kv_bytes


@pytest.mark.parametrize("mesh", ["", "tensor=2"])
def test_the_host_holds_one_shard_at_a_time(mesh, config, make_folder, monkeypatch):
    config = dataclasses.replace(config, embed_dim=256, mlp_dim=1024, num_layers=4, attention_bias=False)
    folder, layout = make_folder(config), Layout.build(mesh)
    # The CPU device adopts the host's buffer; a copy made by XLA keeps the two apart, as on an accelerator.
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda host, device: jnp.copy(put(host, device)).block_until_ready())
    load_params(folder, config, layout)  # whatever is imported or cached on the first call
    tracemalloc.start()
    params = load_params(folder, config, layout)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(array.addressable_shards[0].data.nbytes for array in params.values())
    total = sum(array.nbytes for array in params.values())
    # Twice: JAX lets go of a buffer a little after its copy is done. And what Python and other threads need meanwhile.
    assert peak < 2 * largest + 600_000 < total / 2


def test_nothing_is_put_on_a_device_before_every_header_is_checked(config, tensors, make_folder, monkeypatch):
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("a device array was made"))
    tensors["model.layers.1.mlp.down_proj.bias"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError, match=r"down_proj.bias' has shape \[7\]; config.json asks for \[24\]"):
        load_params(make_folder(config, tensors, files=2), config, Layout.build())


def test_known_extras_are_skipped(tied, make_folder, tensors):
    plain = {name: value for name, value in tensors.items() if not name.endswith("bias")}
    extras = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(3, np.float32),
        "model.rotary_emb.inv_freq": np.zeros(3, np.int64),
    }
    assert "lm_head.weight" in plain
    params = load_params(make_folder(tied, plain | extras), tied, Layout.build("tensor=2"))
    assert list(params) == list(param_specs(tied))


def _drop(tensors, name):
    del tensors[name]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: _drop(t, "lm_head.weight"), r"model: tensor 'lm_head.weight' of shape \[101, 24\] missing"),
        (
            lambda t: [_drop(t, f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1)],
            r"'model.layers.0.mlp.up_proj.weight' of shape \[40, 24\] and 1 more tensors missing",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros(3, np.float32)}),
            r"model.safetensors: tensor 'model.layers.2.mlp.up_proj.weight' of shape \[3\] is not part of the model",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": np.zeros((24, 101), np.float32)}),
            r"model.safetensors: tensor 'model.embed_tokens.weight' has shape \[24, 101\]; .* \[101, 24\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(24, np.int32)}),
            r"model.safetensors: tensor 'model.norm.weight' has dtype I32; dtypes that load: F64",
        ),
    ],
    ids=["missing", "several_missing", "extra", "misshapen", "integers"],
)
def test_tensors_that_do_not_fit_are_named(change, says, config, tensors, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=says):
        load_params(folder, config, Layout.build())


def _header(path: Path, change) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda p: p.write_bytes(p.read_bytes()[:-40]),
            r"model.safetensors is truncated: tensor '[\w.]+' ends at byte",
        ),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), r"model.safetensors is truncated: its 100 bytes"),
        (lambda p: p.write_bytes(b""), r"model.safetensors is truncated: its 0 bytes"),
        (
            lambda p: p.write_bytes(b"\x08" + b"\0" * 7 + b"{not json" * 3),
            r"model.safetensors is not a safetensors file",
        ),
        (lambda p: p.write_bytes(b"\x02" + b"\0" * 7 + b"[]"), r"header is not a JSON object"),
        (
            lambda p: _header(p, lambda h: h["model.norm.weight"].pop("dtype")),
            r"tensor 'model.norm.weight' has a header",
        ),
        (
            lambda p: _header(p, lambda h: h["model.norm.weight"].update(data_offsets=[8, 16])),
            r"tensor 'model.norm.weight' of shape \[24\] and dtype F32 has 8 bytes",
        ),
        (
            lambda p: _header(p, lambda h: h["model.norm.weight"].update(data_offsets=[-96, 0])),
            r"tensor 'model.norm.weight' has a header entry",
        ),
    ],
    ids=["data_cut", "header_cut", "empty", "not_json", "not_an_object", "no_dtype", "wrong_size", "negative"],
)
def test_damaged_files_are_named(damage, says, config, folder):
    damage(folder / "model.safetensors")
    with pytest.raises(ValueError, match=says):
        load_params(folder, config, Layout.build())


def _index(path: Path, change) -> None:
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
            "names model-00002-of-00002.safetensors, which is",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "model.safetensors.index.json is not JSON"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json is not a JSON object"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "weight_map is not an object"),
        (
            lambda f: (f / "model.safetensors.index.json").unlink(),
            "neither model.safetensors nor .*model-00001-of-00002",
        ),
        (
            lambda f: _index(f / "model.safetensors.index.json", lambda m: m.clear()),
            "weight_map is empty",
        ),
        (
            lambda f: _index(f / "model.safetensors.index.json", lambda m: m.update({"a": "../model.safetensors"})),
            "weight_map is not an object from tensor names to file names",
        ),
        (
            lambda f: _index(
                f / "model.safetensors.index.json", lambda m: m.update({"ghost": "model-00001-of-00002.safetensors"})
            ),
            "model-00001-of-00002.safetensors lacks tensor 'ghost'",
        ),
        (
            lambda f: safetensors.numpy.save_file(
                {"lm_head.weight": np.zeros((101, 24), np.float32), "model.norm.weight": np.zeros(24, np.float32)},
                f / "model-00001-of-00002.safetensors",
            ),
            "tensor '[a-z_.]+' is both in .*00001-of-00002.safetensors and in .*00002-of-00002.safetensors",
        ),
    ],
    ids=["file_gone", "not_json", "not_object", "no_map", "no_index", "empty_map", "elsewhere", "ghost", "twice"],
)
def test_damaged_indexes_are_named(damage, says, config, tensors, make_folder):
    folder = make_folder(config, tensors, files=2)
    damage(folder)
    with pytest.raises(ValueError, match=says):
        load_params(folder, config, Layout.build())


@pytest.mark.parametrize("mesh", ["", "tensor=8"])
def test_saving_gives_the_tensors_back(mesh, config, tensors, folder, tmp_path):
    params = load_params(folder, config, Layout.build(mesh))
    save_safetensors(tmp_path / "saved", config, params)
    saved = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)
    assert LlamaConfig.from_file(tmp_path / "saved" / "config.json") == config


def test_saving_in_another_dtype_says_so_in_the_config(config, tensors, folder, tmp_path):
    save_safetensors(tmp_path / "saved", config, load_params(folder, config, Layout.build()), "bfloat16")
    saved = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    norm = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(saved["model.norm.weight"], norm)
    assert LlamaConfig.from_file(tmp_path / "saved" / "config.json").dtype == "bfloat16"


@pytest.mark.parametrize("case", ["biases", "bfloat16", "llama3_tied", "mqa_tied", "sharded", "head_dim"])
def test_folders_that_transformers_wrote_survive_a_round_trip(case, golden, tmp_path):
    config = LlamaConfig.from_file(golden / case / "config.json")
    params = load_params(golden / case, config, Layout.build())
    save_safetensors(tmp_path, config, params)
    saved = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    written: dict[str, np.ndarray] = {}
    for file in (golden / case).glob("*.safetensors"):
        written |= safetensors.numpy.load_file(file)
    assert saved.keys() == written.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(saved[name], value, err_msg=name)


def test_a_long_load_shows_its_bytes(folder, config, capsys, monkeypatch):
    from tqdm import tqdm

    # No bar in the first second by design: take that second away.
    monkeypatch.setattr("paddock.checkpoints.safetensors_folder.tqdm", lambda **given: tqdm(**given | {"delay": 0}))
    params = load_params(folder, config, Layout.build(), progress=True)
    shown = capsys.readouterr().err
    assert "loading: 100%" in shown
    assert f"{sum(array.nbytes for array in params.values()) / 1e3:.1f}k" in shown
    load_params(folder, config, Layout.build())
    assert not capsys.readouterr().err
