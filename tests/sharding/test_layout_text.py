"""Layouts by name and from files, in the spelling of the flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from paddock.sharding import PRESETS, Layout, LayoutText


def test_flags_alone() -> None:
    assert LayoutText.read("tensor=2", "vocab=") == LayoutText("tensor=2", "vocab=")
    assert LayoutText.read("data=2,tensor=2").mesh_config(8).num_replicas == 2


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_on_all_devices_and_names_its_source(name: str) -> None:
    text = LayoutText.read(layout=name)
    mesh = text.mesh_config(8)
    layout = Layout.build(mesh, text.rules)
    assert layout.mesh.size == mesh.num_devices == 8
    assert "arXiv" in PRESETS[name].source or "Pope et al. 2022" in PRESETS[name].source


def test_the_mesh_of_a_preset_is_even() -> None:
    meshes = {n: str(PRESETS["pope-2d-weight-stationary"].mesh_for(n)) for n in (1, 4, 6, 8)}
    assert meshes == {1: "x=1,y=1", 4: "x=2,y=2", 6: "x=2,y=3", 8: "x=2,y=4"}


def test_rules_replace_those_of_the_preset() -> None:
    text = LayoutText.read("tensor=4", "vocab=", "sequence-parallel")
    assert text == LayoutText("tensor=4", "q_heads=tensor,mlp=tensor,tokens=tensor,vocab=", "sequence-parallel")


def test_a_file_in_both_spellings(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('mesh = "pipe=2,tensor=2"\nrules = "vocab=pipe+tensor"\n')
    (tmp_path / "b.toml").write_text('[mesh]\npipe = 2\ntensor = 2\n[rules]\nvocab = ["pipe", "tensor"]\n')
    read = [LayoutText.read(layout=str(tmp_path / name)) for name in ("a.toml", "b.toml")]
    assert read[0] == read[1] == LayoutText("pipe=2,tensor=2", "vocab=pipe+tensor")
    assert LayoutText.read("tensor=4", "", str(tmp_path / "a.toml")).mesh == "tensor=4"


def test_a_file_changes_the_rules_of_its_preset(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('preset = "llama3"\nmesh = "pipe=2,tensor=2"\nrules = "vocab=tensor"\n')
    text = LayoutText.read(layout=str(tmp_path / "x.toml"))
    assert text.rules == "layers=pipe,q_heads=tensor,mlp=tensor,vocab=tensor"
    assert LayoutText.read(rules="vocab=", layout=str(tmp_path / "x.toml")).rules.endswith(",vocab=")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mesh = 3", r"layout file .*x\.toml: mesh must be a string or a table, not 3"),
        ("devices = 4", r"layout file .*x\.toml: unknown key 'devices'; there are mesh, rules, preset"),
        ("mesh = ", r"layout file .*x\.toml: "),
        ('preset = "pope"', r"layout file .*x\.toml: preset 'pope' is not one of tensor, "),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.toml").write_text(content)
    with pytest.raises(ValueError, match=message):
        LayoutText.read(layout=str(tmp_path / "x.toml"))


def test_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(ValueError, match=r"^layout 'megatron' is neither a \.toml file nor one of tensor, "):
        LayoutText.read(layout="megatron")
    with pytest.raises(ValueError, match=r"^layout llama3 is for mesh axes pipe, tensor, but the mesh is x=4$"):
        LayoutText.read("x=4", layout="llama3")
