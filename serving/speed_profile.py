"""What an accelerator was measured to do, from a TOML file: shipped in `profiles/`, or the user's own."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Curve:
    """Measured points (x ascending, y), joined by straight lines; constant before the first and, unless `extends`,
    after the last."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    extends: bool = False

    def __post_init__(self) -> None:
        if not self.x or len(self.x) != len(self.y) or list(self.x) != sorted(set(self.x)):
            raise ValueError(f"points must ascend, as many as there are values: {list(self.x)}, {list(self.y)}")

    def at(self, x: float) -> float:
        if x <= self.x[0] or len(self.x) == 1:
            return self.y[0]
        if x >= self.x[-1] and not self.extends:
            return self.y[-1]
        i = min(bisect.bisect(self.x, x), len(self.x) - 1)
        share = (x - self.x[i - 1]) / (self.x[i] - self.x[i - 1])
        return self.y[i - 1] + share * (self.y[i] - self.y[i - 1])


@dataclasses.dataclass(frozen=True)
class SpeedProfile:
    """Measured speeds of one accelerator; None or absent is not measured. Bytes/s, operations/s, seconds.

    `weights`: bytes/s of the products by rows; `matrix`: operations/s by dtype where arithmetic bounds them; `layer`:
    seconds of all else in a layer by rows; `host`: seconds that the host takes for a step by rows; `all_reduce`: by
    devices of an island, seconds by bytes.
    """

    accelerator: str
    weights: Curve | None = None
    matrix: Mapping[str, float] = dataclasses.field(default_factory=dict)
    prefill_attention: Curve | None = None
    decode_attention: float | None = None
    layer: Curve | None = None
    host: Curve | None = None
    all_reduce: Mapping[int, Curve] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, text: str, source: str) -> SpeedProfile:
        """Raises ValueError naming `source` and what is wrong in it."""
        try:
            raw = tomllib.loads(text)
            if unknown := sorted(set(raw) - {field.name for field in dataclasses.fields(cls)}):
                raise ValueError(f"unknown key {unknown[0]!r}")
            return cls(
                accelerator=raw["accelerator"],
                weights=_curve(raw.get("weights"), "rows", "bytes_per_second"),
                matrix=raw.get("matrix", {}),
                prefill_attention=_curve(raw.get("prefill_attention"), "tokens", "per_second"),
                decode_attention=raw.get("decode_attention", {}).get("bytes_per_second"),
                layer=_curve(raw.get("layer"), "rows", "seconds", extends=True),
                host=_curve(raw.get("host"), "rows", "seconds"),
                all_reduce={
                    row["devices"]: Curve(tuple(row["bytes"]), tuple(row["seconds"]), extends=True)
                    for row in raw.get("all_reduce", [])
                },
            )
        except KeyError as error:
            raise ValueError(f"speed profile {source}: {error} is missing") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"speed profile {source}: {error}") from None

    @property
    def knows_steps(self) -> bool:
        """Whether steps of a device alone need no figure of a datasheet."""
        parts = (self.weights, self.prefill_attention, self.decode_attention, self.layer, self.host)
        return None not in parts


def read_profile(path: Path) -> SpeedProfile:
    """A user's file. Raises ValueError or OSError naming it."""
    return SpeedProfile.read(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def shipped_profile(accelerator: str) -> SpeedProfile:
    """What was measured on this accelerator; for most, nothing."""
    file = resources.files(__package__).joinpath("profiles", f"{accelerator}.toml")
    if not file.is_file():
        return SpeedProfile(accelerator)
    return SpeedProfile.read(file.read_text(encoding="utf-8"), file.name)


def _curve(table: Mapping[str, Any] | None, x: str, y: str, *, extends: bool = False) -> Curve | None:
    return None if table is None else Curve(tuple(table[x]), tuple(table[y]), extends)
