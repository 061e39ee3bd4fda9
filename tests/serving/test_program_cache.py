"""Programs on disk: a second start lowers nothing, a damaged one is made again, another program is never served."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from layout_runs import resolve_tiny

from paddock.serving.bucket import Bucket
from paddock.serving.build import _program_cache
from paddock.serving.compiler import Compiler, ExporterLost, Job
from paddock.serving.engine_config import EngineConfig
from paddock.serving.platform import prepare
from paddock.serving.program_cache import ProgramCache


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[dict[str, Job]]:
    """Two small programs that JAX's own cache does not know."""
    before = jax.config.jax_compilation_cache_dir
    use_cache_in(str(tmp_path / "jax"))
    x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    yield {
        "twice": Job(lambda: jax.jit(lambda x: x * 2 + jnp.sin(x)).lower(x)),
        "donated": Job(lambda: jax.jit(lambda x: (x + 1, jnp.sum(x)), donate_argnums=0).lower(x)),
    }
    use_cache_in(before)


def use_cache_in(folder: str) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def cache_in(folder: Path, facts: str = "") -> ProgramCache:
    return ProgramCache(folder, jax.devices()[:1], facts)


def results(programs: dict[str, jax.stages.Compiled]) -> list[float]:
    x = jnp.arange(4.0)
    (grown, total), twice = programs["donated"](x + 0), programs["twice"](x)
    return [*map(float, grown), float(total), *map(float, twice)]


def test_a_second_start_finds_them_all(jobs: dict[str, Job], tmp_path: Path) -> None:
    first, second = Compiler(cache_in(tmp_path)), Compiler(cache_in(tmp_path))
    want = results(first.run(jobs))
    assert (first.report.num_found, first.report.num_lowered, first.report.num_compiled) == (0, 2, 2)
    unlowered = {key: Job(lambda: pytest.fail("lowered again")) for key in jobs}
    assert results(second.run(unlowered)) == want
    assert (second.report.num_found, second.report.num_lowered) == (2, 0)
    assert first.report.lower_seconds > 0 == second.report.lower_seconds
    assert second.report.read_seconds > 0


def test_nothing_is_written_before_all_are_lowered(jobs: dict[str, Job], tmp_path: Path) -> None:
    """Writing holds up the one thread that lowers."""
    order: list[str] = []

    class Watched(ProgramCache):
        def save(self, key: object, *rest: Any) -> None:
            order.append("save")
            super().save(key, *rest)

    def lower(job: Job) -> jax.stages.Lowered:
        order.append("lower")
        return job.lower()

    watched = {key: Job(functools.partial(lower, job)) for key, job in jobs.items()}
    Compiler(Watched(tmp_path, jax.devices()[:1], "")).run(watched)
    assert order == ["lower", "lower", "save", "save"]


def test_after_an_error_nothing_more_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that ends the program is one, and should not wait for minutes of compiling."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    begun, ended = threading.Event(), threading.Event()
    compiled: list[str] = []

    class Lowered(jax.stages.Lowered):
        def __init__(self) -> None: ...

        def compile(self, *_: Any) -> jax.stages.Compiled:
            begun.set()
            assert ended.wait(20)
            compiled.append("one")
            return object.__new__(jax.stages.Compiled)

    def interrupted() -> Any:
        assert begun.wait(20)
        raise SystemExit(0)

    with pytest.raises(SystemExit):
        Compiler().run({**{i: Job(Lowered) for i in range(5)}, "last": Job(interrupted)})
    ended.set()
    time.sleep(0.3)
    assert compiled == ["one"]


def test_a_step_whose_process_is_gone_is_lowered_here(jobs: dict[str, Job], caplog: pytest.LogCaptureFixture) -> None:
    class Lost:
        def start(self, keys: Any) -> None: ...

        def result(self, key: Any) -> Any:
            raise ExporterLost("a process that lowers steps ended with exit code -9")

    compiler = Compiler(exporter=Lost())
    with caplog.at_level(logging.WARNING, logger="paddock"):
        programs = compiler.run({key: dataclasses.replace(job, exportable=True) for key, job in jobs.items()})
    assert results(programs)
    assert (compiler.report.num_exported, compiler.report.num_lowered) == (0, 2)
    assert "exit code -9: step twice is lowered here instead" in caplog.text


def test_a_full_disk_leaves_no_pieces(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING, logger="paddock"):
        Compiler(cache_in(tmp_path / "programs")).run(jobs)
    assert caplog.text.count("No space left on device") == 2
    assert not list((tmp_path / "programs").iterdir())


def test_a_second_engine_has_a_folder_of_its_own(jobs: dict[str, Job], tmp_path: Path) -> None:
    for folder in (tmp_path / "first", tmp_path / "second"):
        prepare(EngineConfig(compile_cache_dir=str(folder)))
        jobs["twice"].lower().compile()
        assert any(folder.rglob("*"))


def test_what_is_lowered_soon_and_large_steps_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = resolve_tiny(monkeypatch).programs
    # As on a GPU, where steps have the least of the sampler.
    programs = dataclasses.replace(programs, buckets=dataclasses.replace(programs.buckets, full=False))
    keys = list(programs.jobs())
    steps = [key for key in keys if isinstance(key, Bucket)]
    assert keys[-len(steps) :] == steps == programs.buckets.all()
    assert len(keys) == 2 * len(steps) + 3
    sizes = [bucket.decodes + bucket.chunk_tokens for bucket in steps]
    assert sizes == sorted(sizes, reverse=True)


def test_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Programs that XLA's CPU compiler wrote may load and then not run."""
    config = EngineConfig(compile_cache_dir=str(tmp_path))
    assert _program_cache(config, resolve_tiny(monkeypatch).programs) is None


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: data[:-1] + b"x", lambda _: b""])
def test_a_damaged_one_is_made_again(
    jobs: dict[str, Job], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    want = results(Compiler(cache_in(tmp_path)).run(jobs))
    path = cache_in(tmp_path).path("twice", {})
    path.write_bytes(damage(path.read_bytes()))
    use_cache_in(str(tmp_path / "another"))
    again = Compiler(cache_in(tmp_path))
    with caplog.at_level(logging.WARNING, logger="paddock"):
        assert results(again.run(jobs)) == want
    assert (again.report.num_found, again.report.num_lowered) == (1, 1)
    assert "is made again: its content is damaged" in caplog.text
    assert cache_in(tmp_path).load("twice", {}) is not None


def test_a_folder_that_cannot_be_written_costs_a_warning(
    jobs: dict[str, Job], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="paddock"):
        results(Compiler(cache_in(tmp_path / "file")).run(jobs))
    assert "is not kept in" in caplog.text


def test_what_a_program_depends_on_is_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache_in(tmp_path).path("a", {})
    others = {
        cache_in(tmp_path).path("b", {}),
        cache_in(tmp_path).path("a", {"xla_gpu_enable_triton_gemm": False}),
        cache_in(tmp_path, "other facts").path("a", {}),
        ProgramCache(tmp_path, jax.devices()[1:2], "").path("a", {}),
    }
    with jax.default_matmul_precision("bfloat16"):
        others.add(cache_in(tmp_path).path("a", {}))
    monkeypatch.setenv("XLA_FLAGS", "--xla_nothing")
    others.add(cache_in(tmp_path).path("a", {}))
    monkeypatch.undo()
    monkeypatch.setattr("paddock.serving.program_cache._source_hash", lambda: "edited")
    others.add(cache_in(tmp_path).path("a", {}))
    monkeypatch.undo()
    assert cache_in(tmp_path).path("a", {}) == path
    assert len(others | {path}) == 8


def test_facts_are_those_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    one, split = (resolve_tiny(monkeypatch, mesh=mesh).programs for mesh in ("", "tensor=2"))
    larger = dataclasses.replace(one, num_pages=one.num_pages + 1)
    slower = dataclasses.replace(one, plan=dataclasses.replace(one.plan, decode_attention="reference"))
    assert one.facts() == resolve_tiny(monkeypatch).programs.facts()
    assert len({programs.facts() for programs in (one, split, larger, slower)}) == 4
