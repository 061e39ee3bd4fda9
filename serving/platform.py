"""What must be said to JAX before its backend starts."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax._src import xla_bridge  # no public name tells whether a backend has started, without starting it
from jax.experimental.compilation_cache import compilation_cache

from paddock.sharding import MeshConfig

from .engine_config import EngineConfig
from .processes import Processes

_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


def prepare(config: EngineConfig) -> None:
    """Give JAX its number of CPU devices, its share of GPU memory and its cache of compiled programs.

    A device count or memory share that the user set is left alone. Raises ValueError when JAX has already started
    with too few devices for the mesh, or on a GPU with another share of its memory. One of several processes is joined
    with the others here; harmless the second time.
    """
    # XLA keeps what its autotuner found in a folder below.
    folder = str(cache_dir(config))
    if jax.config.jax_compilation_cache_dir not in (None, folder):  # type: ignore[attr-defined]
        compilation_cache.reset_cache()  # which is opened once, and then stays where it is
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    mesh = config.layout_text.mesh
    devices = MeshConfig.parse(mesh).num_devices
    processes = Processes.of(config)
    if processes is not None:
        _join(config, processes)
        return
    if xla_bridge.backends_are_initialized():
        if devices > len(jax.devices()):
            raise ValueError(
                f"the mesh {mesh} needs {devices} devices, but JAX has already started with "
                f"{len(jax.devices())}; make the LLM before anything else uses JAX, or set jax_num_cpu_devices yourself"
            )
        if jax.default_backend() == "gpu" and _FRACTION not in os.environ:
            raise ValueError(
                f"gpu_memory_utilization {config.gpu_memory_utilization} comes too late: JAX has already started on "
                f"the GPU with its own share; make the LLM before anything else uses JAX, or set {_FRACTION}"
            )
        return
    _set_devices(config, devices)


def make_cpu_devices(count: int) -> None:
    """Virtual ones, which are used where JAX then starts on a CPU; a number that the user set is left alone."""
    count_given = jax.config.jax_num_cpu_devices > 0  # type: ignore[attr-defined]
    asked = count_given or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if count > 1 and not asked:
        jax.config.update("jax_num_cpu_devices", count)


def _set_devices(config: EngineConfig, devices: int) -> None:
    os.environ.setdefault(_FRACTION, str(config.gpu_memory_utilization))
    make_cpu_devices(devices)


def _join(config: EngineConfig, processes: Processes) -> None:
    """Raises ValueError when the processes' devices are not those of the mesh, or JAX has started without them."""
    if not jax.distributed.is_initialized():
        if xla_bridge.backends_are_initialized():
            raise ValueError(
                "several processes come too late: JAX has already started in this one; make the LLM before anything "
                "else uses JAX, and only one in a program"
            )
        wanted = MeshConfig.parse(config.layout_text.mesh).num_devices
        if wanted % processes.count == 0:
            _set_devices(config, wanted // processes.count)
        # Or a process that finds a program in its cache of compiled ones leaves the others waiting for its share.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_shard_autotuning=false"
        processes.join(config.heartbeat_timeout_seconds)
    if jax.default_backend() == "cpu" and jax.local_device_count() > 1:
        # Measured with gloo on JAX 0.10.2 and 0.11.2: steps that overlap wait for each other for ever.
        raise ValueError(
            f"each of several processes may have one CPU device, but this one has {jax.local_device_count()}: start "
            "more processes for the mesh"
        )
    mesh = config.layout_text.mesh_config(jax.device_count())
    if mesh.num_devices != jax.device_count():
        raise ValueError(
            f"the mesh {mesh} has {mesh.num_devices} devices, but {processes.count} processes bring "
            f"{jax.device_count()}: all of them must be part of it"
        )


def cache_dir(config: EngineConfig) -> Path:
    """The one folder of everything that a later start need not make again."""
    if config.compile_cache_dir:
        return Path(config.compile_cache_dir).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "paddock" / "compiled"
