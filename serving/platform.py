"""What must be said to JAX before its backend starts."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax._src import xla_bridge  # no public name tells whether a backend has started, without starting it

from paddock.sharding import MeshConfig

from .engine_config import EngineConfig

_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def prepare(config: EngineConfig) -> None:
    """Give JAX its number of CPU devices, its share of GPU memory and its cache of compiled programs.

    A device count or memory share that the user set is left alone. Raises ValueError when JAX has already started
    with too few devices for the mesh, or on a GPU with another share of its memory.
    """
    directory = Path(config.compile_cache_dir or default_cache_dir()).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    devices = MeshConfig.parse(config.mesh_text).num_devices
    if xla_bridge.backends_are_initialized():
        if devices > len(jax.devices()):
            raise ValueError(
                f"the mesh {config.mesh_text} needs {devices} devices, but JAX has already started with "
                f"{len(jax.devices())}; make the LLM before anything else uses JAX, or set jax_num_cpu_devices yourself"
            )
        if jax.default_backend() == "gpu" and _FRACTION not in os.environ:
            raise ValueError(
                f"gpu_memory_utilization {config.gpu_memory_utilization} comes too late: JAX has already started on "
                f"the GPU with its own share; make the LLM before anything else uses JAX, or set {_FRACTION}"
            )
        return
    os.environ.setdefault(_FRACTION, str(config.gpu_memory_utilization))
    count_given = jax.config.jax_num_cpu_devices > 0  # type: ignore[attr-defined]
    asked = count_given or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if devices > 1 and not asked:
        jax.config.update("jax_num_cpu_devices", devices)


def default_cache_dir() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "paddock" / "compiled"
