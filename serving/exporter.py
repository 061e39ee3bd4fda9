"""Steps traced and lowered by processes of their own: it is Python's work, of which one process does one at a time."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import IO, Any, BinaryIO

import jax
from jax.export import Exported

from .bucket import Bucket
from .programs import Programs

# More than these were not measured to help: XLA's threads, which take over, want the cores as well.
MOST_PROCESSES, CORES_OF_ONE = 4, 4
# Of JAX's settings those that change what a step is, and that a program may have set other than by the environment.
SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable", "jax_default_prng_impl")


def choose_processes(wanted: int | None, platform: str) -> int:
    """How many processes lower: `wanted`, or of a GPU's host a quarter of the cores, at most four. On a CPU none: its
    models are small."""
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_PROCESSES, cores // CORES_OF_ONE) if platform == "gpu" else 0


@dataclasses.dataclass(frozen=True)
class ExportJob:
    """What a process needs to make steps of `Programs`: all of it but devices, which it does without."""

    programs: dict[str, Any]  # fields of Programs, and of its plan
    plan: dict[str, Any]
    axes: tuple[tuple[str, int], ...]
    rules: Any
    settings: dict[str, Any]  # JAX's
    platform: str
    buckets: tuple[Bucket, ...]


class Exporter:
    """`count` processes, each of which makes every so many of the steps in the order in which they are asked for.

    They see no accelerator. A context: leaving it ends those that are still at work.
    """

    def __init__(self, programs: Programs, count: int):
        self.programs, self.count = programs, count
        self._running: list[tuple[subprocess.Popen[bytes], threading.Thread]] = []
        self._made: dict[Bucket, concurrent.futures.Future[Exported]] = {}

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, *error: object) -> None:
        for process, _ in self._running:
            process.kill()
        for _, thread in self._running:
            thread.join()
        self._running.clear()

    def start(self, buckets: Sequence[Bucket]) -> None:
        """Have these made, but for those that are already asked for."""
        buckets = [bucket for bucket in buckets if bucket not in self._made]
        for first in range(min(self.count, len(buckets))):
            mine = buckets[first :: self.count]
            self._made |= {bucket: concurrent.futures.Future() for bucket in mine}
            errors = tempfile.TemporaryFile()  # noqa: SIM115 - the thread closes it
            command = [sys.executable, "-P", "-m", "paddock.serving.export_worker"]
            env = _environment(self.programs.plan.layout.mesh.size)
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, env=env)
            thread = threading.Thread(target=self._talk, args=(process, mine, errors), daemon=True)
            thread.start()
            self._running.append((process, thread))

    def result(self, bucket: Bucket) -> Exported:
        """Waits for it. Raises RuntimeError where its process failed."""
        return self._made[bucket].result()

    def _talk(self, process: subprocess.Popen[bytes], buckets: Sequence[Bucket], errors: BinaryIO) -> None:
        with errors, process:
            try:
                pickle.dump(self._job(buckets), _there(process.stdin))
                _there(process.stdin).close()
                for bucket in buckets:
                    answer = pickle.load(_there(process.stdout))
                    if isinstance(answer, RuntimeError):
                        raise answer
                    self._made[bucket].set_result(answer)
            except Exception as error:
                # An answer cut short, or none: what the process says last says why. It ends when nobody listens.
                _there(process.stdout).close()
                process.wait()
                errors.seek(0)
                said = [str(error), *errors.read().decode(errors="replace").strip().splitlines()]
                reason = said[0] if isinstance(error, RuntimeError) else said[-1]
                for bucket in buckets:
                    if not self._made[bucket].done():
                        failure = RuntimeError(f"lowering steps in another process failed: {reason}")
                        self._made[bucket].set_exception(failure)

    def _job(self, buckets: Sequence[Bucket]) -> ExportJob:
        programs, mesh = _fields(self.programs, "plan"), self.programs.plan.layout.mesh
        return ExportJob(
            programs=programs,
            plan=_fields(self.programs.plan, "layout"),
            axes=tuple(mesh.shape.items()),
            rules=self.programs.plan.layout.rules,
            settings={name: jax.config.values[name] for name in SETTINGS},
            platform=jax.export.default_export_platform(),
            buckets=tuple(buckets),
        )


def _there(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _environment(num_devices: int) -> dict[str, str]:
    """This process's, for one with so many CPU devices and no other, that finds what this one may import. XLA's flags
    are for who compiles."""
    return {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
    }


def _fields(value: Any, without: str) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != without}
