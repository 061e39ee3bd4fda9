"""Steps lowered by other processes are the steps that this one would lower."""

from __future__ import annotations

import dataclasses
import io
import pickle
import subprocess
import sys
from collections import Counter

import jax
import pytest
from layout_runs import resolve_tiny

from paddock.serving import exporter as module
from paddock.serving.bucket import Bucket
from paddock.serving.build import _exporter
from paddock.serving.compiler import ExporterLost
from paddock.serving.engine_config import EngineConfig
from paddock.serving.export_worker import programs_of
from paddock.serving.exporter import Exporter, ExportJob, Worker, choose_processes
from paddock.serving.programs import Programs
from paddock.sharding.collectives import read_collectives


@pytest.fixture(scope="module")
def programs() -> Programs:
    with pytest.MonkeyPatch.context() as patch:
        return resolve_tiny(patch, mesh="pipe=2,tensor=2").programs


def test_a_step_from_another_process_is_the_same(programs: Programs) -> None:
    """Pools are still written in place, and nothing is sent more often, over stages and shards."""
    bucket = Bucket(programs.buckets.decodes[-1], 0, 0, True)
    with Exporter(programs, 2) as exporter:
        exporter.start([bucket])
        exporter.start([bucket])
        assert len(exporter._running) == 1, "once is enough"
        theirs = programs.lower(bucket, exporter.result(bucket)).compile()
    ours = programs.lower(bucket).compile()
    text = [step.as_text() for step in (theirs, ours)]
    assert [one.startswith("HloModule jit_step") for one in text] == [True, True], "profiles look for that name"
    sent = [Counter(dataclasses.astuple(c) for c in read_collectives(one)) for one in text]
    assert sent[0] == sent[1]
    assert sent[0]
    memory = [step.memory_analysis() for step in (theirs, ours)]
    for name in ("argument_size_in_bytes", "alias_size_in_bytes", "output_size_in_bytes"):
        assert getattr(memory[0], name) == getattr(memory[1], name) > 0
    assert jax.tree.map(lambda x: x.shape, theirs.out_info) == jax.tree.map(lambda x: x.shape, ours.out_info)


def test_a_step_that_cannot_be_lowered_says_why(programs: Programs) -> None:
    broken = dataclasses.replace(programs, plan=dataclasses.replace(programs.plan, decode_attention="nonsense"))
    buckets = programs.buckets.all()[:2]
    with Exporter(broken, 1) as exporter:
        exporter.start(buckets)
        for bucket in buckets:
            with pytest.raises(RuntimeError, match="a step could not be lowered: KeyError: 'nonsense'"):
                exporter.result(bucket)


def test_a_process_that_dies_says_so(programs: Programs) -> None:
    (bucket,) = programs.buckets.all()[:1]
    with Exporter(programs, 1) as exporter:
        exporter.start([bucket])
        exporter._running[0][0].kill()
        with pytest.raises(ExporterLost, match="a process that lowers steps ended with exit code -9"):
            exporter.result(bucket)


def test_half_an_answer_is_none() -> None:
    """Its process died while it wrote."""
    worker = object.__new__(Worker)
    worker._answers, worker._said = io.BytesIO(pickle.dumps(list(range(1000)))[:-9]), io.BytesIO()
    worker._process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(ExporterLost, match="ended with exit code 3"):
        worker.read()


def test_leaving_ends_the_processes(programs: Programs) -> None:
    with Exporter(programs, 2) as exporter:
        exporter.start(programs.buckets.all()[:2])
        processes = [worker._process for worker, _ in exporter._running]
        assert [process.poll() for process in processes] == [None, None]
    assert [process.poll() for process in processes] == [-9, -9]


def test_a_process_ends_with_the_one_that_started_it(programs: Programs) -> None:
    with Exporter(programs, 1) as exporter:
        exporter.start(programs.buckets.all())
        exporter.result(programs.buckets.all()[0])
        process = exporter._running[0][0]._process
        process.stdin.close()
        assert process.wait(20) == 1


def test_a_job_that_cannot_be_sent_starts_nothing(monkeypatch: pytest.MonkeyPatch, programs: Programs) -> None:
    monkeypatch.setattr(module, "settings", lambda: {"jax_new": lambda: None})
    with Exporter(programs, 1) as exporter, pytest.raises((AttributeError, pickle.PicklingError)):
        exporter.start(programs.buckets.all()[:1])
    assert not exporter._running


def test_settings_go_along(programs: Programs) -> None:
    """What the program has set is set there as well; who knows no such setting goes without."""
    before = jax.config.jax_default_matmul_precision
    with jax.default_device(jax.devices()[-1]):
        job = ExportJob.of(programs, [])
    assert not {"jax_platforms", "jax_num_cpu_devices", "jax_default_device"} & job.settings.keys()
    settings = {**job.settings, "jax_default_matmul_precision": "highest", "jax_of_a_plugin": 1}
    try:
        programs_of(pickle.loads(pickle.dumps(dataclasses.replace(job, settings=settings))))
        assert jax.config.jax_default_matmul_precision == "highest"
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def test_who_lowers(monkeypatch: pytest.MonkeyPatch, programs: Programs) -> None:
    for cores, count in ((2, 0), (8, 2), (16, 4), (128, 4)):
        monkeypatch.setattr(module.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert choose_processes(None, "gpu") == count
    assert choose_processes(None, "gpu", sharing=3) == 1
    assert choose_processes(None, "cpu") == choose_processes(None, "cpu", sharing=7) == 0
    assert choose_processes(3, "cpu") == 3
    assert _exporter(EngineConfig(), programs, 0) is None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert _exporter(EngineConfig(), programs, 0) is None
    with pytest.raises(ValueError, match="lowering_processes is for one process"):
        _exporter(EngineConfig(lowering_processes=1), programs, 0)
