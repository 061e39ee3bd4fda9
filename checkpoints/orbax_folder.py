"""An Orbax folder: a complete model folder whose weights are an Orbax checkpoint, in `params/`.

It stores the canonical arrays under the names of `param_specs`, in chunks of a few megabytes, so that a mesh of any
shape reads what its shards hold.
"""

from __future__ import annotations

import functools
import importlib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from paddock.model import Dims, LlamaConfig, param_specs, placements
from paddock.sharding import Layout

from .canonical import contract, expand
from .errors import CheckpointError
from .json_file import read_json, write_json
from .safetensors_folder import is_narrower

PARAMS = "params"
# What makes a folder of weights a model, beside the weights; licences go where the weights go.
COMPANIONS = ("*.json", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*")
_CHUNK_BYTES = 8 << 20


def save_orbax(
    path: Path, config: LlamaConfig, params: Mapping[str, jax.Array], *, companions: Path | None = None
) -> None:
    """Write `params`, of any layout, as an Orbax folder that must not exist yet or be empty.

    config.json, generation_config.json and the tokenizer's files are copied from the folder `companions`; without one,
    config.json is written from `config`. Raises CheckpointError when `path` holds anything.
    """
    path = check_empty(Path(path))
    arrays = {name: contract(name, params[name], config) for name in param_specs(config)}
    ocp = _orbax()
    chunked = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays}
    with _checkpointer(arrays) as checkpointer:
        checkpointer.save((path / PARAMS).absolute(), args=ocp.args.StandardSave(arrays, save_args=chunked))
    raw = read_json(companions / "config.json") if companions else config.to_hf_dict()
    # Whichever spelling the file uses: what it says is what loading defaults to, so it must be what is stored.
    spellings = [name for name in ("dtype", "torch_dtype") if name in raw] or ["torch_dtype"]
    write_json(path / "config.json", raw | dict.fromkeys(spellings, jnp.dtype(arrays["embed"].dtype).name))
    if companions:
        _copy_companions(companions, path)


def load_orbax(path: Path, config: LlamaConfig, layout: Layout, dtype: Any = None) -> dict[str, jax.Array]:
    """The arrays of `param_specs(config, layout, dtype)` from an Orbax folder, whatever mesh wrote it, each where
    `placements` puts it.

    Orbax reads each shard into its place. Arrays that the layout repeats or pads are read in their canonical shape,
    split over all its devices, then changed there, one after the other. Raises CheckpointError naming the folder and
    the array.
    """
    folder, dims = Path(path) / PARAMS, Dims.of(config, layout)
    specs, canonical = param_specs(config, layout, dtype), param_specs(config, None, dtype)
    places = placements(config, layout, dtype)
    if not all(place.addressable_devices for place in places.values()):
        raise CheckpointError(
            f"{folder}: Orbax cannot read pipeline stages of which other processes hold all devices; use safetensors, "
            "or a mesh whose stages span the processes"
        )
    targets = {n: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=places[n]) for n, spec in specs.items()}
    differs = {name for name in specs if specs[name].shape != canonical[name].shape}
    wanted = targets | {n: _spread(canonical[n].shape, canonical[n].dtype, places[n]) for n in differs}
    narrowed = _check(folder, wanted)
    try:
        with _checkpointer(wanted) as checkpointer:
            params = dict(checkpointer.restore(folder.absolute(), args=_orbax().args.StandardRestore(wanted)))
    # Orbax raises whatever its storage does, and the storage raises whatever it likes for damaged files.
    except Exception as error:
        blame = next((f"array {name!r}" for name in wanted if f"'{name}/'" in str(error)), "its arrays")
        raise CheckpointError(f"{folder}: {blame} cannot be read: {_reason(error)}") from error
    for name in narrowed:
        if not jnp.isfinite(params[name]).all():
            raise CheckpointError(f"{folder}: array {name!r} has values that {targets[name].dtype} cannot hold")
    for name in specs:
        if name in differs:
            params[name] = _expander(name.rpartition(".")[2], dims, targets[name].sharding)(params.pop(name))
            params[name].block_until_ready()  # so that the array it came from is gone before the next is made
    return {name: params[name] for name in specs}


def check_empty(path: Path) -> Path:
    """`path`, made if needed. Raises CheckpointError when it is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not an empty folder")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _copy_companions(source: Path, destination: Path) -> None:
    files = {file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()}
    for file in sorted(files):
        if file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, destination / file.name)


def _check(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> list[str]:
    """Raises CheckpointError unless the metadata are those of `wanted`; returns the names that a cast narrows."""
    if not (folder / "_METADATA").is_file():
        raise CheckpointError(f"{folder} is not an Orbax checkpoint: it has no file _METADATA")
    try:
        with _orbax().StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata(folder.absolute()).item_metadata
    except Exception as error:
        raise CheckpointError(f"{folder}: the metadata cannot be read: {_reason(error)}") from error
    if found is None:  # Orbax logs why and goes on
        raise CheckpointError(f"{folder}: the metadata cannot be read: files are damaged or missing")
    found = dict(found)
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(f"{folder}: array {missing[0]!r} of shape {list(wanted[missing[0]].shape)} is missing")
    if extra := [name for name in found if name not in wanted]:
        raise CheckpointError(f"{folder}: array {extra[0]!r} is not part of the model that config.json describes")
    for name in wanted:
        array = found[name]
        if tuple(array.shape) != wanted[name].shape:
            raise CheckpointError(
                f"{folder}: array {name!r} has shape {list(array.shape)}; config.json asks for "
                f"{list(wanted[name].shape)}"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise CheckpointError(f"{folder}: array {name!r} has dtype {array.dtype}; it must be a float")
    return [name for name in wanted if is_narrower(wanted[name].dtype, found[name].dtype)]


def _reason(error: BaseException) -> str:
    """The first line of what the storage said; Orbax wraps it in pages of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0][:300]


def _orbax() -> Any:
    """Orbax, imported by who uses it: 0.4 s that no other start has to take."""
    return importlib.import_module("orbax.checkpoint")


def _checkpointer(arrays: Mapping[str, Any]) -> Any:
    """A checkpointer whose copies in host memory stay near the largest array, not Orbax's 96 GB."""
    largest = max(math.prod(array.shape) * jnp.dtype(array.dtype).itemsize for array in arrays.values())
    gigabytes = 2 + math.ceil(2 * largest / 1e9)
    ocp = _orbax()
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=gigabytes, restore_concurrent_gb=gigabytes)
    return ocp.Checkpointer(handler)


def _spread(shape: tuple[int, ...], dtype: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
    """An array split over all devices of `place` along its last dimension that divides; whole on each if none does."""
    mesh: Any = place.mesh
    axis = next((i for i in reversed(range(len(shape))) if shape[i] % mesh.size == 0), None)
    entries = [mesh.axis_names if i == axis else None for i in range(len(shape))]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*entries)))


@functools.lru_cache(maxsize=64)
def _expander(kind: str, dims: Dims, sharding: NamedSharding) -> Any:
    """One compiled function for all arrays of a kind."""
    return jax.jit(functools.partial(expand, kind, dims=dims), out_shardings=sharding)
