"""What the documentation quotes of commands that only count is what they say today."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from paddock.model.shapes import SHAPES
from paddock.serving.cli import main
from paddock.serving.footprint import SLACK, Footprint, refuse_too_large
from paddock.sharding import PRESETS
from paddock.sharding.memory import GIB, PlannedLayout

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = re.findall(r"```\n\$ paddock (plan .*?)\n(.*?)```", (DOCS / "planning.md").read_text(), re.DOTALL)
ESTIMATED = {
    "one device": ("", ""),
    "tensor=8": ("tensor=8", PRESETS["sequence-parallel"].rules),
    "pipe=2,tensor=2": ("pipe=2,tensor=2", ""),
    "x=2,y=4": ("x=2,y=4", PRESETS["pope-x-weight-gathered"].rules),
    "x=8": ("x=8", PRESETS["pope-xyz-weight-gathered"].rules),
}


def words_of(page: str) -> str:
    return " ".join((DOCS / page).read_text().split())


@pytest.mark.parametrize(("command", "output"), EXAMPLES)
def test_plans(command: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(command))
    printed = capsys.readouterr()
    assert (printed.out + printed.err).strip() == output.strip()


def test_there_are_plans() -> None:
    assert len(EXAMPLES) == 2


def test_a_refusal() -> None:
    footprint = Footprint(SHAPES["llama-3.1-70b"], "bfloat16", 64, 64, 2048, 8192, SLACK)
    with pytest.raises(ValueError, match="does not fit") as refused:
        refuse_too_large(footprint, PlannedLayout.of("tensor=1"), 8192, 70 * GIB)
    assert f"paddock: {refused.value} " in words_of("sharding.md")


@pytest.mark.parametrize("name", ESTIMATED)
def test_estimates_of_a_step(name: str) -> None:
    shape = dataclasses.replace(SHAPES["llama-3.1-8b"], num_layers=2)
    held = Footprint(shape, "bfloat16", 64, 64, 512, 8192).of(PlannedLayout.of(*ESTIMATED[name]), 1)
    (told,) = re.findall(rf"{name}[^/;]*?[0-9,]+ / ([0-9,]+)[,.] ", words_of("sharding.md"))
    assert int(told.replace(",", "")) == round(held.temp / 2**20)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    preset = PRESETS[name]
    axes, source = ", ".join(f"`{axis}`" for axis in preset.axes), " ".join(preset.source.split())
    assert f"| `{name}` | {axes} | `{preset.rules}` | {source} |" in words_of("sharding.md")
