"""Compiled programs on disk: a start that finds its own neither traces nor lowers.

JAX's persistent cache is asked with a lowered program, and lowering is what most of a warm start then goes to: on an
H100 with 16 cores 25 s for 13 steps of the 8B shape, against 2 s to read them from here. JAX's cache stays beside this
one: it knows a program again when only our source has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

logger = logging.getLogger("paddock")

PACKAGES = ("model", "sharding", "pallas_kernels", "serving")
# Flags of the environment that change what is compiled.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# What JAX's own settings say about where and how to keep or log things, not about programs.
_IRRELEVANT = ("cache", "log", "dump", "traceback", "debug", "explain", "heartbeat")


class ProgramCache:
    """A folder of serialized executables for `devices`, in files named by a hash of all that they depend on.

    `facts` is what the programs have in common beside their own keys, as text. Entries are trusted as JAX's are:
    whoever writes to the folder runs code here.
    """

    def __init__(self, folder: Path, devices: Sequence[jax.Device], facts: str):
        self.folder, self.devices = folder, list(devices)
        self._facts = "\n".join([facts, *_surroundings(devices)])

    def path(self, key: object, options: Mapping[str, Any]) -> Path:
        text = f"{self._facts}\n{key!r}\n{sorted(options.items())}"
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.program"

    def has(self, key: object, options: Mapping[str, Any]) -> bool:
        """Whether there is one, by its name."""
        return self.path(key, options).is_file()

    def load(self, key: object, options: Mapping[str, Any]) -> jax.stages.Compiled | None:
        """None where there is none, or, with a warning, none that can be used."""
        path = self.path(key, options)
        try:
            digest, content = _split(path.read_bytes())
            if hashlib.sha256(content).digest() != digest:
                raise ValueError("its content is damaged")
            payload, in_tree, out_tree = pickle.loads(content)
            backend: Any = self.devices[0].client
            return serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, backend=backend, execution_devices=self.devices
            )
        except (FileNotFoundError, NotADirectoryError):
            return None
        # Whatever a backend says to an executable that it cannot take.
        except Exception as error:
            logger.warning("compiled program %s in %s is made again: %s", path.name[:12], path.parent, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def save(self, key: object, options: Mapping[str, Any], compiled: jax.stages.Compiled) -> None:
        """Whole or not at all, whoever else writes; a folder that takes nothing is worth a warning and no more."""
        path = self.path(key, options)
        try:
            content = pickle.dumps(serialize_executable.serialize(compiled))
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                part = Path(folder) / path.name
                part.write_bytes(hashlib.sha256(content).digest() + content)
                os.replace(part, path)
        except Exception as error:
            logger.warning("compiled program %s is not kept in %s: %s", path.name[:12], path.parent, error)


def _split(data: bytes) -> tuple[bytes, bytes]:
    return data[:32], data[32:]


def settings() -> dict[str, Any]:
    """JAX's own, as far as programs depend on them."""
    return {name: value for name, value in jax.config.values.items() if not any(word in name for word in _IRRELEVANT)}


def _surroundings(devices: Sequence[jax.Device]) -> list[str]:
    """What a program depends on that no argument says."""
    device = devices[0]
    return [
        f"{jax.__version__} {jaxlib.__version__} {platform.python_version()} {device.client.platform_version}",
        f"{device.device_kind} {[d.id for d in devices]} of {len(device.client.devices())} {_cpu_features()}",
        repr(sorted(settings().items(), key=lambda item: item[0])),
        repr([os.environ.get(name) for name in VARIABLES]),
        _source_hash(),
    ]


def _cpu_features() -> str:
    """Programs for a CPU use all that it can; a folder may be shared by machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {features}"


def _source_hash() -> str:
    """Of every module that a traced function may come from."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted(resources.files(f"paddock.{package}").iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
