"""`paddock collect-env`: what a bug report should say about the machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import psutil

PACKAGES = (
    "paddock",
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "orbax-checkpoint",
    "numpy",
    "ml-dtypes",
    "sentencepiece",
    "tokenizers",
    "tiktoken",
    "flask",
    "waitress",
    "pydantic",
    "prometheus-client",
)
VARIABLES = ("JAX_", "XLA_", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
GIB = 2**30


def run(args: argparse.Namespace) -> int:
    print(collect())
    return 0


def collect() -> str:
    """One block of text: versions, system, memory, devices, environment variables that change how JAX runs."""
    memory = psutil.virtual_memory()
    rows = [
        ("python", platform.python_version()),
        ("system", platform.platform()),
        ("libc", " ".join(platform.libc_ver())),
        ("cpu", f"{_cpu_name()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"),
        ("memory", f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB free"),
        *((name, _version(name)) for name in PACKAGES),
        *(("device", line) for line in _devices()),
        *(("driver", line) for line in _nvidia_driver()),
        *((name, value) for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def describe_devices() -> str:
    """What JAX runs on, as "2 x NVIDIA H100" or "1 x cpu"."""
    import jax

    kinds = [device.device_kind for device in jax.devices()]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _devices() -> list[str]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        return [f"JAX cannot start: {error}"]
    lines = []
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        lines.append(f"{device.id}: {device.device_kind}" + (f", {limit / GIB:.1f} GiB" if limit else ""))
    return lines


def _nvidia_driver() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi failed: {error}"]
    return sorted(set(answer.stdout.split()))
