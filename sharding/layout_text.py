"""What the user wrote of a layout - flags, a preset's name, a TOML file - as a mesh and rules."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .mesh import MeshConfig
from .presets import PRESETS


@dataclasses.dataclass(frozen=True)
class LayoutText:
    """A mesh and rules in the flags' spelling. An empty mesh with a preset means all devices there are."""

    mesh: str = ""
    rules: str = ""
    preset: str = ""

    @classmethod
    def read(cls, mesh: str = "", rules: str = "", layout: str = "") -> LayoutText:
        """`layout` is the name of a preset or a TOML file; `mesh` and `rules` replace, and add to, what it says.

        Such a file holds ``mesh`` and ``rules``, each a string in the flags' spelling or a table (``[mesh]`` with
        sizes, ``[rules]`` with an axis or a list of axes each), and perhaps ``preset``. Raises ValueError naming the
        file and the key, or listing the presets.
        """
        text = cls()
        if layout in PRESETS:
            text = cls(preset=layout)
        elif layout.endswith(".toml"):
            text = cls._from_file(Path(layout))
        elif layout:
            raise ValueError(f"layout {layout!r} is neither a .toml file nor one of {', '.join(PRESETS)}")
        base = _override(PRESETS[text.preset].rules if text.preset else "", text.rules)
        text = cls(mesh or text.mesh, _override(base, rules), text.preset)
        if text.preset and text.mesh:
            PRESETS[text.preset].check(MeshConfig.parse(text.mesh))
        return text

    def mesh_config(self, num_devices: int) -> MeshConfig:
        if self.preset and not self.mesh:
            return PRESETS[self.preset].mesh_for(num_devices)
        return MeshConfig.parse(self.mesh)

    @classmethod
    def _from_file(cls, path: Path) -> LayoutText:
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"layout file {path}: {error}") from error
        fields = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(raw) - set(fields)):
            raise ValueError(f"layout file {path}: unknown key {unknown[0]!r}; there are {', '.join(fields)}")
        text = cls(**{key: _flag(path, key, value) for key, value in raw.items()})
        if text.preset and text.preset not in PRESETS:
            raise ValueError(f"layout file {path}: preset {text.preset!r} is not one of {', '.join(PRESETS)}")
        return text


def _flag(path: Path, key: str, value: Any) -> str:
    """A string or a table as the flag's text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"layout file {path}: {key} must be a string or a table, not {value!r}")
    return ",".join(f"{name}={'+'.join(map(str, v)) if isinstance(v, list) else v}" for name, v in value.items())


def _override(base: str, changes: str) -> str:
    """The rules of `base` with those that `changes` names replaced."""
    named = {part.partition("=")[0].strip() for part in changes.split(",")}
    kept = [part for part in base.split(",") if part.partition("=")[0].strip() not in named]
    return ",".join(filter(None, [*kept, changes]))
