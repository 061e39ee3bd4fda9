"""Steps lowered by other processes are the steps that this one would lower."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import pytest
from layout_runs import resolve_tiny

from paddock.serving import exporter as module
from paddock.serving.bucket import Bucket
from paddock.serving.build import _exporter
from paddock.serving.engine_config import EngineConfig
from paddock.serving.exporter import Exporter, choose_processes
from paddock.serving.programs import Programs
from paddock.sharding.collectives import read_collectives


@pytest.fixture(scope="module")
def programs() -> Programs:
    with pytest.MonkeyPatch.context() as patch:
        return resolve_tiny(patch, mesh="pipe=2,tensor=2").programs


def test_a_step_from_another_process_is_the_same(programs: Programs) -> None:
    """Pools are still written in place, and nothing is sent more often, over stages and shards."""
    bucket = Bucket(programs.buckets.decodes[-1], 0, 0, True)
    with Exporter(programs, 1) as exporter:
        exporter.start([bucket])
        exporter.start([bucket])  # once is enough
        theirs = programs.lower(bucket, exporter.result(bucket)).compile()
    ours = programs.lower(bucket).compile()
    sent = [Counter(dataclasses.astuple(c) for c in read_collectives(step.as_text())) for step in (theirs, ours)]
    assert sent[0] == sent[1]
    assert sent[0]
    memory = [step.memory_analysis() for step in (theirs, ours)]
    for name in ("argument_size_in_bytes", "alias_size_in_bytes", "output_size_in_bytes"):
        assert getattr(memory[0], name) == getattr(memory[1], name) > 0
    assert jax.tree.map(lambda x: x.shape, theirs.out_info) == jax.tree.map(lambda x: x.shape, ours.out_info)


def test_a_process_that_fails_says_why(programs: Programs) -> None:
    broken = dataclasses.replace(programs, plan=dataclasses.replace(programs.plan, decode_attention="nonsense"))
    buckets = programs.buckets.all()[:2]
    with Exporter(broken, 1) as exporter:
        exporter.start(buckets)
        for bucket in buckets:
            with pytest.raises(RuntimeError, match="lowering steps in another process failed: KeyError: 'nonsense'"):
                exporter.result(bucket)


def test_who_lowers(monkeypatch: pytest.MonkeyPatch, programs: Programs) -> None:
    for cores, count in ((2, 0), (8, 2), (16, 4), (128, 4)):
        monkeypatch.setattr(module.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert choose_processes(None, "gpu") == count
    assert choose_processes(None, "cpu") == 0
    assert choose_processes(3, "cpu") == 3
    assert _exporter(EngineConfig(), programs) is None
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert _exporter(EngineConfig(), programs) is None
    with pytest.raises(ValueError, match="lowering_processes is for one process"):
        _exporter(EngineConfig(lowering_processes=1), programs)
