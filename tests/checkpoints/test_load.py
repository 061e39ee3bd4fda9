"""Which format a folder is in, and one function for all of them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from paddock.checkpoints import LOAD_FORMATS, convert, detect_format, init_dummy_params, load
from paddock.sharding import Layout


def test_formats_are_detected_and_load_the_same(config, folder, make_folder, tensors, tmp_path):
    convert(folder, tmp_path / "orbax")
    sharded = make_folder(config, tensors, files=2)
    assert detect_format(folder) == detect_format(sharded) == "safetensors"
    assert detect_format(tmp_path / "orbax") == "orbax"
    layout = Layout.build("tensor=2")
    first, *others = (load(path, config, layout) for path in (folder, sharded, tmp_path / "orbax"))
    for other in others:
        assert list(other) == list(first)
        for name, array in first.items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)


def test_dummy_reads_nothing(config, tmp_path):
    layout = Layout.build()
    params = load(tmp_path / "nowhere", config, layout, "bfloat16", "dummy", seed=7)
    for name, array in init_dummy_params(config, layout, "bfloat16", 7).items():
        np.testing.assert_array_equal(params[name], array)


def test_a_named_format_is_not_guessed(config, folder, tmp_path):
    with pytest.raises(ValueError, match="is not an Orbax checkpoint"):
        load(folder, config, Layout.build(), load_format="orbax")
    convert(folder, tmp_path / "orbax")
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor .*config.json"):
        load(tmp_path / "orbax", config, Layout.build(), load_format="safetensors")
    shutil.copytree(tmp_path / "orbax" / "params", folder / "params")
    with pytest.raises(ValueError, match="holds both"):
        load(folder, config, Layout.build())
    assert load(folder, config, Layout.build(), load_format="safetensors").keys()


def test_unknown_formats_are_refused(config, folder):
    assert LOAD_FORMATS == ("auto", "safetensors", "orbax", "dummy")
    with pytest.raises(ValueError, match="load_format 'gguf' is not one of auto, safetensors, orbax, dummy"):
        load(folder, config, Layout.build(), load_format="gguf")


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no weights: .*found pytorch_model.bin"):
        detect_format(tmp_path)
    with pytest.raises(ValueError, match=r"gone holds no weights: .*no such folder"):
        detect_format(tmp_path / "gone")
