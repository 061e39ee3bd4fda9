"""Weights from a model folder in any format, and from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from paddock.model import LlamaConfig, stack_stages
from paddock.sharding import Layout

from .dummy import init_dummy_params
from .errors import CheckpointError
from .orbax_folder import PARAMS, check_empty, load_orbax, save_orbax
from .safetensors_folder import load_params
from .weights_cache import WeightsCache

LOAD_FORMATS = ("auto", "safetensors", "orbax", "dummy")


def detect_format(folder: Path) -> str:
    """ "safetensors" or "orbax". Raises CheckpointError when the folder holds neither, or both."""
    folder = Path(folder)
    orbax = (folder / PARAMS / "_METADATA").is_file()
    safetensors = any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))
    if orbax and safetensors:
        raise CheckpointError(f"{folder} holds both safetensors and an Orbax checkpoint; say which with load_format")
    if not (orbax or safetensors):
        what = "no such folder"
        if folder.is_dir():
            what = "found " + (", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing")
        raise CheckpointError(f"{folder} holds no weights: no *.safetensors, no Orbax checkpoint {PARAMS}/ ({what})")
    return "orbax" if orbax else "safetensors"


def load(
    folder: Path,
    config: LlamaConfig,
    layout: Layout,
    dtype: Any = None,
    load_format: str = "auto",
    *,
    seed: int = 0,
    progress: bool = False,
    cache: WeightsCache | None = None,
) -> dict[str, jax.Array]:
    """The arrays of `slot_specs(config, layout, dtype)`; `load_format` is one of LOAD_FORMATS.

    "dummy" makes random weights from `seed` and reads nothing. Safetensors come by way of `cache`, if there is one, and
    leave what they were converted to there. Raises ValueError on an unknown format, CheckpointError
    when the folder does not fit.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format {load_format!r} is not one of {', '.join(LOAD_FORMATS)}")
    if load_format == "dummy":
        params = init_dummy_params(config, layout, dtype, seed)
    elif (detect_format(folder) if load_format == "auto" else load_format) == "orbax":
        params = load_orbax(folder, config, layout, dtype)
    else:
        convert = lambda: load_params(folder, config, layout, dtype, progress=progress)
        params = convert() if cache is None else cache.load(folder, config, layout, dtype, convert)
    return stack_stages(config, layout, params)


def convert(source: Path, destination: Path, dtype: Any = None, *, progress: bool = False) -> None:
    """Write the Hugging Face folder `source` as an Orbax folder, in `dtype` (by default the checkpoint's).

    The weights pass through the memory of the CPU, whatever accelerators there are. Raises CheckpointError when
    `destination` holds anything, before anything is read.
    """
    source, destination = Path(source), Path(destination)
    check_empty(destination)
    config = LlamaConfig.from_file(source / "config.json")
    cpu = Layout.build(devices=jax.local_devices(backend="cpu"))
    params = load_params(source, config, cpu, dtype, progress=progress)
    save_orbax(destination, config, params, companions=source)
