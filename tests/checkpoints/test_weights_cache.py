"""Converted weights kept for the next start: the same arrays, never of another checkpoint, made again when damaged."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest

from paddock.checkpoints import WeightsCache, load
from paddock.checkpoints.safetensors_folder import SafetensorsFolder
from paddock.sharding import Layout


@pytest.fixture
def conversions(monkeypatch):
    """The folders that tensors were read from."""
    seen = []
    read = SafetensorsFolder.__init__

    def noting(self, folder):
        seen.append(folder)
        read(self, folder)

    monkeypatch.setattr(SafetensorsFolder, "__init__", noting)
    return seen


def assert_same(one, other):
    assert list(one) == list(other)
    for name, array in one.items():
        assert array.sharding == other[name].sharding
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_the_second_load_reads_no_tensor_and_gives_the_same(config, folder, tmp_path, conversions):
    cache = WeightsCache(tmp_path / "cache")
    for mesh in ("", "tensor=4"):  # four shards repeat kv heads, which the cache does not
        layout = Layout.build(mesh)
        plain = load(folder, config, layout, "float32")
        count = len(conversions)
        assert_same(load(folder, config, layout, "float32", cache=cache), plain)
        assert len(conversions) == count + (mesh == "")
    load(folder, config, Layout.build(), "bfloat16", cache=cache)
    assert len(conversions) == count + 1, "another dtype is another entry"
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_changed_checkpoint_is_not_served_from_the_cache(config, folder, tensors, make_folder, tmp_path):
    cache = WeightsCache(tmp_path / "cache")
    layout = Layout.build()
    load(folder, config, layout, "float32", cache=cache)
    file = folder / "model.safetensors"
    before = file.stat()
    changed = make_folder(config, {name: value + 1 for name, value in tensors.items()})
    (changed / "model.safetensors").replace(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert file.stat().st_size == before.st_size
    assert_same(load(folder, config, layout, "float32", cache=cache), load(folder, config, layout, "float32"))


def test_a_damaged_entry_is_made_again(config, folder, tmp_path, conversions, caplog):
    """Its metadata: damaged arrays leave Orbax's coroutines behind, and are read in a process apart in test_orbax."""
    cache = WeightsCache(tmp_path / "cache")
    layout = Layout.build()
    plain = load(folder, config, layout, "float32", cache=cache)
    (entry,) = (tmp_path / "cache").iterdir()
    damaged = entry / "params" / "_METADATA"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with caplog.at_level(logging.WARNING, logger="paddock"):
        assert_same(load(folder, config, layout, "float32", cache=cache), plain)
    assert "converted weights are made again" in caplog.text
    count = len(conversions)
    assert_same(load(folder, config, layout, "float32", cache=cache), plain)
    assert len(conversions) == count


def test_a_cache_that_cannot_be_written_is_no_error(config, folder, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING, logger="paddock"):
        load(folder, config, Layout.build(), "float32", cache=WeightsCache(tmp_path / "cache"))
    assert "are not kept in" in caplog.text
