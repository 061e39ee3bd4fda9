"""Programs made ready: found on disk, or lowered one after the other and compiled in threads meanwhile."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.export import Exported
from tqdm import tqdm

from .program_cache import ProgramCache

logger = logging.getLogger("paddock")


class _Finds(threading.local):
    """What this thread found in JAX's own cache, by the events that JAX sends."""

    count = 0

    def note(self, event: str, **_: object) -> None:
        self.count += event == "/jax/compilation_cache/cache_hits"


_FINDS = _Finds()
jax.monitoring.register_event_listener(_FINDS.note)


@dataclasses.dataclass(frozen=True)
class Job:
    """A program to be: how to lower it, and XLA's options for it. `exportable`: `lower` takes it exported, too."""

    lower: Callable[..., jax.stages.Lowered]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    exportable: bool = False


class ExporterLost(RuntimeError):
    """Whoever was to lower a step is gone; the step itself may be fine."""


@runtime_checkable
class Exporting(Protocol):
    """Who lowers exportable programs elsewhere: an `Exporter`."""

    def start(self, keys: Sequence[Any]) -> None: ...
    def result(self, key: Any) -> Exported:
        """Raises ExporterLost, and RuntimeError for a step that cannot be lowered."""


@dataclasses.dataclass
class CompileReport:
    """Where the time went: programs that were found whole, those that had to be lowered, and those of them that other
    processes lowered and that JAX's own cache did not have. `lower_seconds` are this thread's, with what it waits for
    processes that lower; `read_seconds` and `compile_seconds` are those of all threads together, and with lowering they
    overlap."""

    num_found: int = 0
    num_lowered: int = 0
    num_exported: int = 0
    num_compiled: int = 0
    read_seconds: float = 0.0
    lower_seconds: float = 0.0
    compile_seconds: float = 0.0


class Compiler:
    """Makes all programs of an engine; `report` then says how."""

    def __init__(self, cache: ProgramCache | None = None, exporter: Exporting | None = None, *, progress: bool = False):
        self.cache, self.exporter, self.progress, self.report = cache, exporter, progress, CompileReport()
        self._lock = threading.Lock()

    def run(self, jobs: Mapping[Any, Job]) -> dict[Any, jax.stages.Compiled]:
        """Lowering is Python: threads that lower at once wait for each other, and compile nothing while they do. So
        one lowers, the jobs in their order, or with an `exporter` processes do, and the others take over what is
        lowered. Writing executables out holds Python up as well, so that it comes when all are lowered."""
        with (
            _threads() as pool,
            tqdm(total=len(jobs), desc="Compiling steps", unit="step", disable=not self.progress) as bar,
        ):
            reading = {key: pool.submit(self._read, key, job) for key, job in jobs.items()}
            missing = {key: job for key, job in jobs.items() if reading[key].result() is None}
            bar.update(len(jobs) - len(missing))
            self._export(missing)
            making = {}
            for key, job in missing.items():
                lowered = self._timed("lower_seconds", functools.partial(self._lower, key, job))
                making[key] = pool.submit(self._make, job, lowered)
                making[key].add_done_callback(lambda _: bar.update())
            for key, made in making.items():
                pool.submit(self._save, key, jobs[key], made)
            self.report.num_lowered, self.report.num_found = len(making), len(jobs) - len(making)
            programs: dict[Any, Any] = {key: (making.get(key) or reading[key]).result() for key in jobs}
            return programs

    def foresee(self, jobs: Mapping[Any, Job]) -> None:
        """Have exported what `run` will not find, while the caller does something else."""
        if self.exporter:
            cache = self.cache
            self._export({key: job for key, job in jobs.items() if not (cache and cache.has(key, job.options))})

    def _export(self, jobs: Mapping[Any, Job]) -> None:
        if self.exporter:
            self.exporter.start([key for key, job in jobs.items() if job.exportable])

    def _lower(self, key: Any, job: Job) -> jax.stages.Lowered:
        if not (self.exporter and job.exportable):
            return job.lower()
        try:
            exported = self.exporter.result(key)
        except ExporterLost as error:
            logger.warning("%s: step %s is lowered here instead", error, key)
            return job.lower()
        self.report.num_exported += 1
        return job.lower(exported)

    def _read(self, key: Any, job: Job) -> jax.stages.Compiled | None:
        cache = self.cache
        return None if cache is None else self._timed("read_seconds", lambda: cache.load(key, job.options))

    def _make(self, job: Job, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        finds = _FINDS.count
        compiled = self._timed("compile_seconds", lambda: lowered.compile(dict(job.options)))
        is_new = _FINDS.count == finds
        with self._lock:
            self.report.num_compiled += is_new
        return compiled

    def _save(self, key: Any, job: Job, made: concurrent.futures.Future[jax.stages.Compiled]) -> None:
        if self.cache is not None and made.exception() is None:
            self.cache.save(key, job.options, made.result())

    def _timed(self, name: str, fn: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = fn()
        with self._lock:
            setattr(self.report, name, getattr(self.report, name) + time.perf_counter() - start)
        return result


@contextlib.contextmanager
def _threads() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """Threads that begin nothing more once an error, or a signal that ends the program, has come."""
    pool = concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
