"""What an accelerator was measured to do, from a TOML file: shipped in `profiles/`, or the user's own."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

# What a profile's curves are called in its file: what they go by, and what they tell.
CURVES = {
    "weights": ("rows", "bytes_per_second"),
    "decode_attention": ("rows", "bytes_per_second"),
    "prefill_attention": ("tokens", "per_second"),
    "layer": ("rows", "seconds"),
    "head": ("rows", "bytes_per_second"),
    "step": ("rows", "seconds"),
    "host": ("rows", "seconds"),
}
EXTENDING = ("layer",)
# And its numbers, each with whether it may be 0.
NUMBERS = {"copy": False, "host_layer": True}
MATRIX = ("rows", "operations_per_second")
LINKS = {"all_reduce": ("bytes", "seconds"), "vocab": ("rows", "seconds"), "hop": ("bytes", "seconds")}


@dataclasses.dataclass(frozen=True)
class Curve:
    """Measured points (x ascending, y), joined by straight lines; constant before the first and after the last, where a
    curve that `extends` goes on rising, but never falls: what noise leaves would be less than nothing soon."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    extends: bool = False

    def __post_init__(self) -> None:
        if not self.x or len(self.x) != len(self.y) or list(self.x) != sorted(set(self.x)):
            raise ValueError(f"points must ascend, as many as there are values: {list(self.x)}, {list(self.y)}")

    def at(self, x: float) -> float:
        if x <= self.x[0] or len(self.x) == 1:
            return self.y[0]
        if x >= self.x[-1] and not (self.extends and self.y[-1] > self.y[-2]):
            return self.y[-1]
        i = min(bisect.bisect(self.x, x), len(self.x) - 1)
        share = (x - self.x[i - 1]) / (self.x[i] - self.x[i - 1])
        return self.y[i - 1] + share * (self.y[i] - self.y[i - 1])


@dataclasses.dataclass(frozen=True)
class SpeedProfile:
    """Measured speeds of one accelerator; None or absent is not measured. Bytes/s, operations/s, seconds.

    `copy`: of a large copy, read and written; `weights`, `head`: bytes/s of the layers' products and of the head by
    rows; `matrix`: operations/s by dtype and rows where arithmetic bounds the products; `decode_attention`: bytes/s by
    rows; `prefill_attention`: operations/s by tokens; `layer`: seconds of all else in a layer by rows; `step`: of all
    else in a step by rows that sample. `host`: seconds that the host takes for a step by rows, and `host_layer` for
    each layer of it.

    Between the devices of an island, by their number: `all_reduce`, seconds by bytes; `vocab`, what a step sends once
    where the vocabulary is split, seconds by rows; `hop`, what ends a tick of a pipeline, seconds by bytes of a stage.
    `fitted`: the steps that all this was fitted to.
    """

    accelerator: str
    copy: float | None = None
    weights: Curve | None = None
    matrix: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    prefill_attention: Curve | None = None
    decode_attention: Curve | None = None
    layer: Curve | None = None
    head: Curve | None = None
    step: Curve | None = None
    host: Curve | None = None
    host_layer: float = 0.0
    all_reduce: Mapping[int, Curve] = dataclasses.field(default_factory=dict)
    vocab: Mapping[int, Curve] = dataclasses.field(default_factory=dict)
    hop: Mapping[int, Curve] = dataclasses.field(default_factory=dict)
    fitted: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str, source: str) -> SpeedProfile:
        """Raises ValueError naming `source`, the key and the value that is wrong."""
        try:
            return cls._of(tomllib.loads(text))
        except KeyError as error:
            raise ValueError(f"speed profile {source}: {error} is missing") from None
        except ValueError as error:
            raise ValueError(f"speed profile {source}: {error}") from None

    @classmethod
    def _of(cls, raw: dict[str, Any]) -> SpeedProfile:
        if unknown := sorted(set(raw) - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(f"unknown key {unknown[0]!r}")
        _check("accelerator", raw["accelerator"], str, "text")
        _check("fitted", raw.get("fitted", []), list, "an array")
        fields: dict[str, Any] = {"fitted": tuple(raw.get("fitted", []))}
        fields |= {name: _number(name, raw[name], zero=zero) for name, zero in NUMBERS.items() if name in raw}
        for name, columns in CURVES.items():
            if name in raw:
                fields[name] = _curve(name, raw[name], columns, extends=name in EXTENDING)
        for name, columns in LINKS.items():
            fields[name] = {}
            for row in _check(name, raw.get(name, []), list, "an array of tables"):
                curve = _curve(name, row, columns, extends=True)
                fields[name][_check(f"{name}.devices", _got(name, row, "devices"), int, "a whole number")] = curve
        matrix = _check("matrix", raw.get("matrix", {}), Mapping, "a table")
        fields["matrix"] = {dtype: _curve(f"matrix.{dtype}", table, MATRIX) for dtype, table in matrix.items()}
        return cls(raw["accelerator"], **fields)

    def to_toml(self) -> str:
        """The text that `read` takes."""
        lines = [f'accelerator = "{self.accelerator}"']
        lines += [f"{name} = {getattr(self, name)!r}" for name in NUMBERS if getattr(self, name)]
        if self.fitted:
            lines += ["fitted = [", *(f'    "{point}",' for point in self.fitted), "]"]
        for name, columns in CURVES.items():
            if (curve := getattr(self, name)) is not None:
                lines += ["", f"[{name}]", *_columns(curve, *columns)]
        for dtype, curve in self.matrix.items():
            lines += ["", f"[matrix.{dtype}]", *_columns(curve, *MATRIX)]
        for name, columns in LINKS.items():
            for devices, curve in sorted(getattr(self, name).items()):
                lines += ["", f"[[{name}]]", f"devices = {devices}", *_columns(curve, *columns)]
        return "\n".join(lines) + "\n"

    def of_dtypes(self, weights: str, kv_cache: str) -> SpeedProfile:
        """What of it holds where the layers' weights and the cache are of these dtypes: products and attention were
        measured in those that `matrix` has, and tell nothing of others."""
        left: dict[str, Any] = {}
        if self.matrix and weights not in self.matrix:
            left |= {"weights": None, "head": None, "matrix": {}}
        if self.matrix and kv_cache not in self.matrix:
            left |= {"decode_attention": None, "prefill_attention": None}
        return dataclasses.replace(self, **left) if left else self


def read_profile(path: Path) -> SpeedProfile:
    """A user's file. Raises ValueError or OSError naming it."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"speed profile {path}: {error}") from None
    return SpeedProfile.read(text, str(path))


@functools.cache
def shipped_profile(accelerator: str) -> SpeedProfile:
    """What was measured on this accelerator; for most, nothing."""
    file = resources.files(__package__).joinpath("profiles", f"{accelerator}.toml")
    if not file.is_file():
        return SpeedProfile(accelerator)
    return SpeedProfile.read(file.read_text(encoding="utf-8"), file.name)


def _curve(key: str, table: Any, columns: tuple[str, str], *, extends: bool = False) -> Curve:
    _check(key, table, Mapping, f"a table of {' and '.join(columns)}")
    x, y = (_column(key, table, name) for name in columns)
    try:
        return Curve(x, y, extends)
    except ValueError as error:
        raise ValueError(f"{error} in {key}") from None


def _column(key: str, table: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = _check(f"{key}.{name}", _got(key, table, name), list, "an array")
    return tuple(_number(f"each of {key}.{name}", value, zero=name == "seconds") for value in values)


def _got(key: str, table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise ValueError(f"{key} has no {name}")
    return table[name]


def _number(key: str, value: Any, *, zero: bool) -> float:
    _check(key, value, int | float, "a number")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{key} must be a number {'of at least' if zero else 'above'} 0, got {value!r}")
    return value


def _check(key: str, value: Any, kind: Any, what: str) -> Any:
    """`value`. Raises ValueError when it is of another kind."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{key} must be {what}, got {value!r}")
    return value


def _columns(curve: Curve, x: str, y: str) -> list[str]:
    return [f"{x} = [{', '.join(f'{v:.10g}' for v in curve.x)}]", f"{y} = [{', '.join(f'{v:.5g}' for v in curve.y)}]"]
