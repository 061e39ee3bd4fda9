"""Converted weights kept beside the compiled programs: a second start of the same checkpoint reads arrays, not tensors.

An entry is an Orbax folder as `convert` writes it, under the name of what it was made from. It serves every layout:
each reads of it what its shards hold.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from paddock.model import LlamaConfig
from paddock.sharding import Layout

from .errors import CheckpointError
from .orbax_folder import load_orbax, save_orbax

logger = logging.getLogger("paddock")

# To be raised when what canonical arrays look like changes.
VERSION = 1
Params = dict[str, jax.Array]


class WeightsCache:
    """Converted checkpoints in `folder`, an entry for each checkpoint, as its files are now, and dtype."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def path(self, source: Path, config: LlamaConfig, dtype: Any) -> Path:
        """By the files' real paths, sizes and times of change: to read them all would take as long as to convert."""
        files = sorted(file for pattern in ("*.safetensors", "*.json") for file in Path(source).glob(pattern))
        facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        text = repr((VERSION, facts, config, jnp.dtype(dtype or config.dtype).name))
        return self.folder / hashlib.sha256(text.encode()).hexdigest()[:32]

    def load(
        self, source: Path, config: LlamaConfig, layout: Layout, dtype: Any, convert: Callable[[], Params]
    ) -> Params:
        """What `convert()` gives, by way of the cache. An entry that cannot be read is made again, with a warning, and
        one that cannot be written is a warning, too. Raises what `convert` raises."""
        path = self.path(source, config, dtype)
        if path.is_dir():
            try:
                return load_orbax(path, config, layout, dtype)
            except CheckpointError as error:
                logger.warning("converted weights are made again: %s", error)
                shutil.rmtree(path, ignore_errors=True)
        params = convert()
        self._save(path, config, params)
        return params

    def _save(self, path: Path, config: LlamaConfig, params: Params) -> None:
        """Whole or not at all: another process may look for it meanwhile."""
        making = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            save_orbax(making, config, params)
            os.replace(making, path)
        except (OSError, CheckpointError) as error:
            logger.warning("converted weights are not kept in %s: %s", path.parent, error)
            shutil.rmtree(making, ignore_errors=True)
