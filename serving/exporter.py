"""Steps traced and lowered by processes of their own: it is Python's work, of which one process does one at a time."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import jax
from jax.export import Exported

from .bucket import Bucket
from .compiler import ExporterLost
from .program_cache import settings
from .programs import Programs

logger = logging.getLogger("paddock")

# More than these were not measured to help: XLA's threads, which take over, want the cores as well.
MOST_PROCESSES, CORES_OF_ONE = 4, 4
# Of JAX's settings those that differ on purpose: what is lowered is for other devices than those of who lowers.
OWN_SETTINGS = ("jax_platforms", "jax_platform_name", "jax_xla_backend", "jax_default_device", "jax_num_cpu_devices")


def choose_processes(wanted: int | None, platform: str, *, sharing: int = 1) -> int:
    """How many processes lower: `wanted`, or of a GPU's host a quarter of the cores, at most four; an equal part of
    those, where so many replicas start at a time, but one. On a CPU none: its models are small."""
    if wanted is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = min(MOST_PROCESSES, cores // CORES_OF_ONE) if platform == "gpu" else 0
    return max(wanted // sharing, 1) if wanted else 0


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

    @classmethod
    def of(cls, programs: Programs, buckets: Sequence[Bucket]) -> ExportJob:
        layout = programs.plan.layout
        return cls(
            programs=_fields(programs, "plan"),
            plan=_fields(programs.plan, "layout"),
            axes=tuple(layout.mesh.shape.items()),
            rules=layout.rules,
            settings={name: value for name, value in settings().items() if name not in OWN_SETTINGS},
            platform=jax.export.default_export_platform(),
            buckets=tuple(buckets),
        )


class Worker:
    """One process, and its answers, which come in the order of the job's buckets."""

    def __init__(self, job: ExportJob):
        content = pickle.dumps(job)
        answers, channel = os.pipe()
        self._answers = os.fdopen(answers, "rb")
        self._said: Any = tempfile.TemporaryFile()  # noqa: SIM115 - libraries print, some as they are imported
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "paddock.serving.export_worker", str(channel)],
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=self._said,
            env=_environment(math.prod(size for _, size in job.axes)),
            pass_fds=(channel,),
            start_new_session=True,  # who interrupts this process does not mean that one
        )
        os.close(channel)
        assert self._process.stdin
        # One that has ended says so to who reads. Left open: a process whose input ends has lost this one.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(content)
            self._process.stdin.flush()

    def read(self) -> Exported:
        """Raises RuntimeError saying why there is none, ExporterLost where the process is gone."""
        try:
            answer = pickle.load(self._answers)
        except (EOFError, pickle.UnpicklingError) as error:  # it may have ended in the middle of one
            code, lines = self._process.wait(), self._lines()
            last = f": {lines[-1]}" if lines and code > 0 else ""
            raise ExporterLost(f"a process that lowers steps ended with exit code {code}{last}") from error
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # type: ignore[union-attr]
        for line in self._lines():
            logger.debug("a process that lowers steps: %s", line)
        self._answers.close()
        self._said.close()

    def _lines(self) -> list[str]:
        self._said.seek(0)
        return self._said.read().decode(errors="replace").strip().splitlines()


class Exporter:
    """`count` processes, each of which makes every so many of the steps in the order in which they are asked for.

    They see no accelerator. A context: leaving it ends those that are still at work.
    """

    def __init__(self, programs: Programs, count: int):
        self.programs, self.count = programs, count
        self._running: list[tuple[Worker, threading.Thread]] = []
        self._made: dict[Bucket, concurrent.futures.Future[Exported]] = {}

    def __enter__(self) -> Exporter:
        return self

    def __exit__(self, *error: object) -> None:
        for worker, _ in self._running:
            worker.kill()
        for _, thread in self._running:
            thread.join()
        self._running.clear()

    def start(self, buckets: Sequence[Bucket]) -> None:
        """Have these made, but for those that are already asked for."""
        buckets = [bucket for bucket in buckets if bucket not in self._made]
        for first in range(min(self.count, len(buckets))):
            mine = buckets[first :: self.count]
            worker = Worker(ExportJob.of(self.programs, mine))
            self._made |= {bucket: concurrent.futures.Future() for bucket in mine}
            thread = threading.Thread(target=self._collect, args=(worker, mine), daemon=True)
            thread.start()
            self._running.append((worker, thread))

    def result(self, bucket: Bucket) -> Exported:
        """Waits for it. Raises RuntimeError where it cannot be lowered, ExporterLost where its process is gone."""
        return self._made[bucket].result()

    def _collect(self, worker: Worker, buckets: Sequence[Bucket]) -> None:
        failure: Exception | None = None
        for bucket in buckets:
            try:
                if failure is None:
                    self._made[bucket].set_result(worker.read())
            except Exception as error:
                failure = error
                worker.kill()  # it may be at a step that nobody wants any more
            if failure is not None:
                self._made[bucket].set_exception(failure)
        worker.close()


def _environment(num_devices: int) -> dict[str, str]:
    """This process's, for one with so many CPU devices and no other, that finds what this one may import. XLA's flags
    are for who compiles."""
    return {
        **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path if path),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
    }


def _fields(value: Any, without: str) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != without}
