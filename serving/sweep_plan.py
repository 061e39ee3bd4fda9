"""What a sweep is asked to try: layouts, and the batches that each of them runs."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

from paddock.sharding import LayoutText

from .cli_flags import engine_config
from .engine_config import EngineConfig

# Keys of a sweep's file and attributes of its flags, with what is taken where neither says.
SIZES: dict[str, Any] = {"batch_sizes": [8], "input_lens": [128], "output_len": 32}
# Of what a row holds: one more whenever that changes, so that rows of before are run again and not misread.
ROW_FORMAT = 4
LAYOUT_FIELDS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "mesh", "rules", "layout")


@dataclasses.dataclass(frozen=True)
class SweepLayout:
    """A layout in the spelling of the flags; `preset` is what --layout takes. All empty is one device."""

    mesh: str = ""
    rules: str = ""
    preset: str = ""
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> SweepLayout:
        """Read ``"mesh=pipe=2,tensor=2; rules=vocab="``. Raises ValueError naming the part that is wrong."""
        return cls.from_table(_pairs(text), where=f"layout {text!r}")

    @classmethod
    def from_table(cls, table: dict[str, Any], where: str) -> SweepLayout:
        """From ``mesh``, ``rules``, ``preset`` and ``name``, all strings. Raises ValueError naming the key."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key, value in table.items():
            if key not in known:
                raise ValueError(f"{where}: unknown key {key!r}; there are {', '.join(known)}")
            if not isinstance(value, str):
                raise ValueError(f"{where}: {key} must be a string, not {value!r}")
        return cls(**table)

    @property
    def label(self) -> str:
        return self.name or " ".join(filter(None, [self.preset, self.mesh, self.rules])) or "one device"

    @property
    def is_single_device(self) -> bool:
        return not (self.mesh or self.rules or self.preset)

    def read(self) -> SweepLayout:
        """With what a layout file says in its place: changed, it is another layout, and not one that has been run.
        Raises ValueError naming the file."""
        if not self.preset.endswith(".toml"):
            return self
        text = LayoutText.read(self.mesh, self.rules, self.preset)
        return SweepLayout(text.mesh, text.rules, text.preset, self.label)

    def apply(self, config: EngineConfig) -> EngineConfig:
        """`config` with this layout instead of its own. Raises ValueError as EngineConfig does."""
        changes: dict[str, Any] = {name: 1 for name in LAYOUT_FIELDS if name.endswith("_size")}
        return dataclasses.replace(config, **changes, mesh=self.mesh, rules=self.rules, layout=self.preset)


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of `batch_size` prompts of `input_len` tokens, each continued by `output_len`."""

    batch_size: int
    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Every layout with every case, on the devices there are or on `num_cpu_devices` virtual ones. The first layout is
    the single device that the others, those asked for, are compared with. Raises ValueError naming the flag, or the
    name that two layouts have."""

    config: EngineConfig
    layouts: tuple[SweepLayout, ...]
    cases: tuple[Case, ...]
    num_cpu_devices: int | None = None

    def __post_init__(self) -> None:
        if self.num_cpu_devices is not None and self.num_cpu_devices < 1:
            raise ValueError(f"--devices must be at least 1, got {self.num_cpu_devices}")
        labels = [layout.label for layout in self.layouts]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two layouts are called {label!r}; give each a name of its own")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Sweep:
        """From the flags, over what the file of --config says. Raises ValueError naming the flag or the file's key that
        is wrong."""
        config = engine_config(args)
        file = _read(Path(args.config)) if args.config else {}
        listed = [SweepLayout(config.mesh if config.layout else config.layout_text.mesh, config.rules, config.layout)]
        listed += [SweepLayout(mesh=mesh) for mesh in args.meshes]
        listed += [SweepLayout(preset=preset) for preset in args.presets]
        listed += [SweepLayout.parse(text) for text in args.layouts]
        listed += [SweepLayout.from_table(table, where=f"sweep file {args.config}") for table in file.get("layout", [])]
        layouts = [layout.read() for layout in dict.fromkeys(listed) if not layout.is_single_device]
        if not layouts and not args.explain:
            raise ValueError("sweep needs layouts: --meshes, --presets, --layouts, --config, or --mesh and --rules")
        sizes = {name: file.get(name, default) for name, default in SIZES.items()}
        sizes |= {name: value for name in SIZES if (value := getattr(args, name)) is not None}
        cases = dict.fromkeys(
            Case(batch_size, input_len, sizes["output_len"])
            for input_len in sizes["input_lens"]
            for batch_size in sizes["batch_sizes"]
        )
        return cls(config, (SweepLayout(), *layouts), tuple(cases), args.devices)

    def key(self, layout: SweepLayout, case: Case) -> str:
        """Names one row of the results: the same for all that could change it, but for the machine."""
        settings = dataclasses.asdict(self.config)
        for name in (*LAYOUT_FIELDS, "compile_cache_dir", "served_model_name"):
            settings.pop(name)
        asked = [layout.mesh, layout.rules, layout.preset, dataclasses.astuple(case), self.num_cpu_devices]
        said = [ROW_FORMAT, settings, *asked]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _pairs(text: str) -> dict[str, str]:
    pairs = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(
                f"layout {text!r}: {part!r} is not of the form key=value, as in 'mesh=tensor=2; rules=vocab='"
            )
        pairs[key.strip()] = value.strip()
    return pairs


def _read(path: Path) -> dict[str, Any]:
    where = f"sweep file {path}"
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    known = ("layout", *SIZES)
    if unknown := sorted(set(raw) - set(known)):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; there are {', '.join(known)}")
    for key, value in raw.items():
        if key == "layout":
            kind, fits = "tables, each under [[layout]]", _is_list_of(dict, value)
        elif isinstance(SIZES[key], list):
            kind, fits = "a list of whole numbers", _is_list_of(int, value)
        else:
            kind, fits = "a whole number", type(value) is int
        if not fits:
            raise ValueError(f"{where}: {key} must be {kind}, got {value!r}")
    return raw


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)
