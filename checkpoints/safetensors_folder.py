"""A Hugging Face folder of safetensors, read into sharded arrays and written back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from tqdm import tqdm

from paddock.model import Dims, LlamaConfig, param_specs, placements
from paddock.sharding import ArraySpec, Layout

from .canonical import contract
from .errors import CheckpointError
from .json_file import read_json, write_json
from .names import Part, Slices, is_ignored, order_of, param_parts
from .safetensors_file import FLOATS, SafetensorsFile

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFolder:
    """The tensors of a folder, single-file or sharded, by name. As transformers does, a single file comes first.

    `bytes_read` counts what the shards have taken out of the files.
    """

    def __init__(self, folder: Path):
        """Reads every header and nothing else. Raises CheckpointError naming the file and the tensor."""
        self.folder, self.bytes_read = folder, 0
        self.file_of: dict[str, SafetensorsFile] = {}
        index = {} if (folder / SINGLE).is_file() else _read_index(folder)
        for path in sorted({folder / name for name in index.values()}) or [folder / SINGLE]:
            if not path.is_file():
                raise CheckpointError(f"{folder / INDEX} names {path.name}, which is not in the folder")
            file = SafetensorsFile(path)
            if twice := sorted(self.file_of.keys() & file.tensors.keys()):
                raise CheckpointError(f"tensor {twice[0]!r} is both in {self.file_of[twice[0]].path} and in {path}")
            self.file_of |= dict.fromkeys(file.tensors, file)
        for tensor, name in index.items():
            if tensor not in self.file_of or self.file_of[tensor].path.name != name:
                raise CheckpointError(f"{folder / name} lacks tensor {tensor!r}, which {INDEX} says it holds")

    def check(self, parts: list[Part], config: LlamaConfig) -> None:
        """Raises CheckpointError on the first missing, misshapen, not floating-point or unknown tensor."""
        wanted = {part.tensor: part for part in parts}
        missing = [name for name in wanted if name not in self.file_of]
        if missing:
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{self.folder}: tensor {missing[0]!r} of shape {list(wanted[missing[0]].shape)}{more} missing from "
                f"{', '.join(sorted({file.path.name for file in self.file_of.values()})) or 'its files'}"
            )
        for name, file in self.file_of.items():
            found = file.tensors[name]
            if name not in wanted:
                if is_ignored(name, tie_embeddings=config.tie_embeddings):
                    continue
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} of shape {list(found.shape)} is not part of the model that "
                    "config.json describes"
                )
            if found.shape != wanted[name].shape:
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} has shape {list(found.shape)}; config.json asks for "
                    f"{list(wanted[name].shape)}"
                )
            if found.dtype not in FLOATS:
                raise CheckpointError(
                    f"{file.path}: tensor {name!r} has dtype {found.dtype}; dtypes that load: {', '.join(FLOATS)}"
                )

    def read(self, parts: tuple[Part, ...], wanted: Slices, dtype: np.dtype) -> np.ndarray:
        """The piece `wanted` of the array made of `parts`: only the bytes that it holds are read."""
        piece = np.zeros([ask.stop - ask.start for ask in wanted], dtype)
        for part in parts:
            if overlap := part.overlap(wanted):
                self._copy(part, *overlap, piece)
        return piece

    def _copy(self, part: Part, inside: Slices, outside: Slices, piece: np.ndarray) -> None:
        file = self.file_of[part.tensor]
        rows, rest = outside[0], outside[1:]
        first, last = rows.start // part.repeat, (rows.stop - 1) // part.repeat + 1
        source = file.view(part.tensor).reshape(part.view)[(slice(first, last), *rest)]
        self.bytes_read += source.nbytes
        if part.repeat > 1:
            source = source[np.arange(rows.start, rows.stop) // part.repeat - first]
        with np.errstate(over="ignore"):
            piece[inside] = source
        if is_narrower(piece.dtype, source.dtype) and not np.isfinite(piece[inside]).all():
            raise CheckpointError(f"{file.path}: tensor {part.tensor!r} has values that {piece.dtype} cannot hold")


def load_params(
    folder: Path, config: LlamaConfig, layout: Layout, dtype: Any = None, *, progress: bool = False
) -> dict[str, jax.Array]:
    """The arrays of `param_specs(config, layout, dtype)` from a Hugging Face folder, each put straight into its shards,
    where `placements` says; without those that no device of this process holds.

    One shard at a time is assembled on the host (fused, repeated, padded, cast to `dtype`, by default the config's),
    put on its devices and dropped. Raises CheckpointError (a ValueError) naming the file and the tensor, from the
    headers alone and before anything is put on a device; only a value that overflows a narrower `dtype` shows later.
    """
    specs, parts = param_specs(config, layout, dtype), param_parts(Dims.of(config, layout))
    shardings = placements(config, layout, dtype)
    source = SafetensorsFolder(Path(folder))
    source.check([part for group in parts.values() for part in group], config)

    params = {}
    total = sum(spec.num_bytes for spec in specs.values())
    # delay: no bar at all for what is over in a second.
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", delay=1, disable=not progress) as bar:
        for name, spec in specs.items():
            if shardings[name].addressable_devices:
                order = order_of(name, len(spec.shape))
                params[name] = _place(source, parts[name], order, spec, shardings[name])
            bar.update(spec.num_bytes)
    return params


def _place(
    source: SafetensorsFolder,
    parts: tuple[Part, ...],
    order: tuple[int, ...],
    spec: ArraySpec,
    sharding: jax.sharding.NamedSharding,
) -> jax.Array:
    # Not make_array_from_callback: it holds every device's piece until the last is read, copies of one piece included.
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        bounds = [ask.indices(size)[:2] for ask, size in zip(index or (), spec.shape, strict=True)]
        devices.setdefault(tuple(bounds), []).append(device)
    shards = []
    for piece, holders in devices.items():
        stored = [piece[order.index(axis)] for axis in range(len(order))]
        host = source.read(parts, tuple(slice(*bounds) for bounds in stored), np.dtype(spec.dtype)).transpose(order)
        shards += jax.block_until_ready([jax.device_put(host, device) for device in holders])
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, shards)


def save_safetensors(folder: Path, config: LlamaConfig, params: Mapping[str, jax.Array], dtype: Any = None) -> None:
    """Write `params`, of any layout, as a Hugging Face folder: config.json and one model.safetensors in `dtype`.

    All tensors are gathered on the host. `dtype` defaults to the config's and is what config.json will say.
    """
    config = dataclasses.replace(config, dtype=jnp.dtype(dtype or config.dtype).name)
    tensors: dict[str, np.ndarray] = {}
    for name, parts in param_parts(Dims.of(config)).items():
        array = np.asarray(contract(name, params[name], config)).astype(jnp.dtype(config.dtype))
        array = array.transpose(np.argsort(order_of(name, array.ndim)))
        tensors |= {part.tensor: np.ascontiguousarray(array[part.block]).reshape(part.shape) for part in parts}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    write_json(folder / "config.json", config.to_hf_dict())


def is_narrower(dtype: Any, source: Any) -> bool:
    """Whether a finite number of `source` may become infinite in `dtype`."""
    return jnp.finfo(dtype).maxexp < jnp.finfo(source).maxexp


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX} ({found or 'it is empty'})")
    index = read_json(path).get("weight_map")
    # A name with a directory in it would read files from anywhere.
    if not isinstance(index, dict) or not all(isinstance(n, str) and Path(n).name == n for n in index.values()):
        raise CheckpointError(f"{path}: weight_map is not an object from tensor names to file names")
    if not index:
        raise CheckpointError(f"{path}: weight_map is empty")
    return index
