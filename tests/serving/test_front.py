"""Two replicas of an engine behind one front, on virtual CPU devices."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from engines import assert_same_tokens, greedy, prompts_of, tiny_llm, tokens_of
from http_client import wait_until
from prometheus_client.parser import text_string_to_metric_families

from paddock.serving import LLM, RequestOutput, SamplingParams
from paddock.serving.engine_loop import EngineLoop
from paddock.serving.errors import EngineBusy, EngineDead, RequestFailed
from paddock.serving.request import RequestStream
from paddock.serving.routing import home_of
from paddock.serving.server import create_app

LENGTHS = [3, 17, 40, 8, 1, 25, 12, 33, 6, 9, 2, 30]
NOTHING = {"running": 0, "waiting": 0}
SEATS = 2
TWO = "data=2,tensor=2"


@pytest.fixture(scope="module")
def one(golden: Path) -> Iterator[LLM]:
    with tiny_llm(golden / "gqa", max_num_seqs=SEATS) as llm:
        yield llm


@pytest.fixture(scope="module")
def two(golden: Path) -> Iterator[LLM]:
    with tiny_llm(golden / "gqa", mesh=TWO, max_num_seqs=SEATS) as llm:
        yield llm


class Gate:
    """Holds a replica's steps back until it is opened."""

    def __init__(self, replica: EngineLoop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, step = threading.Event(), replica.engine.step

        def held() -> object:
            assert self.open.wait(60)
            return step()

        monkeypatch.setattr(replica.engine, "step", held)


@pytest.fixture
def gates(two: LLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Gate]]:
    gates = [Gate(replica, monkeypatch) for replica in two.engine.replicas]
    yield gates
    for gate in gates:
        gate.open.set()
    wait_until(lambda: all(not replica.num_unfinished for replica in two.engine.replicas))


def prompt_at(replica: int, seed: int = 0, length: int = 9) -> list[int]:
    prompts = (prompts_of([length], 89, seed=1000 * seed + i)[0]["prompt_token_ids"] for i in range(1000))
    return next(prompt for prompt in prompts if home_of(prompt, 2) == replica)


def whole(stream: RequestStream) -> RequestOutput:
    (output,) = stream
    return output


def samples(llm: LLM, name: str) -> dict[str, float]:
    """A metric by the label `engine`."""
    families = text_string_to_metric_families(llm.engine.metrics.render().decode())
    return {s.labels["engine"]: s.value for family in families for s in family.samples if s.name == name}


def test_replicas_have_devices_of_their_own(two: LLM) -> None:
    found = [{d.id for d in replica.executor.params["embed"].devices()} for replica in two.engine.replicas]
    devices = [device.id for device in jax.devices()]
    assert found == [set(devices[:2]), set(devices[2:4])]


def test_both_replicas_together_give_the_tokens_of_one_engine(one: LLM, two: LLM) -> None:
    prompts = prompts_of(LENGTHS, two.engine.vocab_size)
    before = samples(two, "vllm:generation_tokens_total")
    outputs = two.generate(prompts, greedy(), use_tqdm=False)
    assert_same_tokens(outputs, one.generate(prompts, greedy(), use_tqdm=False))
    assert [output.prompt_token_ids for output in outputs] == [prompt["prompt_token_ids"] for prompt in prompts]
    made = {engine: value - before[engine] for engine, value in samples(two, "vllm:generation_tokens_total").items()}
    assert set(made) == {"0", "1"}
    assert min(made.values()) > 0
    assert sum(made.values()) == 24 * len(prompts)
    for replica in two.engine.replicas:
        replica.engine.scheduler.check_idle()


def test_requests_stay_at_home_while_there_is_room(two: LLM) -> None:
    for home in (0, 1, 1, 0):
        before = samples(two, "vllm:prompt_tokens_total")
        two.generate([{"prompt_token_ids": prompt_at(home, seed)} for seed in range(SEATS)], greedy(2), use_tqdm=False)
        after = samples(two, "vllm:prompt_tokens_total")
        grown = [after[engine] - before[engine] for engine in ("0", "1")]
        assert grown == ([18, 0] if home == 0 else [0, 18])


def test_an_overloaded_home_sends_requests_to_the_other(two: LLM, gates: list[Gate]) -> None:
    """Two sequences may run at once: the third finds its home full, the fifth finds both full."""
    first, second = two.engine.replicas
    streams, counts = [], []
    for _ in range(6):
        streams.append(two.engine.submit(prompt_at(1), greedy(2), output_kind="final"))
        counts.append((first.num_unfinished, second.num_unfinished))
    assert counts == [(0, 1), (0, 2), (1, 2), (2, 2), (3, 2), (3, 3)]
    for gate in gates:
        gate.open.set()
    assert len({tuple(tokens_of(whole(stream))) for stream in streams}) == 1


def test_the_queues_limit_is_one_for_all_replicas(two: LLM, gates: list[Gate], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two.engine, "config", dataclasses.replace(two.engine.config, max_num_queued_reqs=3))
    streams = [two.engine.submit(prompt_at(home), greedy(2)) for home in (0, 1, 0)]
    before = samples(two, "vllm:admission_rejections_total")
    with pytest.raises(EngineBusy, match="3 requests are waiting already"):
        two.engine.submit(prompt_at(1), greedy(2))
    after = samples(two, "vllm:admission_rejections_total")
    assert after == {"0": before["0"], "1": before["1"] + 1}
    gates[0].open.set()
    assert all(list(stream)[-1].finished for stream in (streams[0], streams[2]))
    more = two.engine.submit(prompt_at(1), greedy(2))
    gates[1].open.set()
    assert list(more)[-1].finished


def test_an_abort_reaches_the_replica_that_runs_the_request(two: LLM) -> None:
    streams = [two.engine.submit(prompt_at(home), greedy(100)) for home in (0, 1)]
    assert all(stream.get() is not None for stream in streams)
    streams[1].abort()
    wait_until(lambda: two.engine.replicas[1].load() == NOTHING)
    assert list(streams[1])[-1].outputs[0].finish_reason == "abort"
    assert list(streams[0])[-1].outputs[0].finish_reason == "length"
    assert two.engine.load() == NOTHING
    assert samples(two, "vllm:num_requests_running") == {"0": 0, "1": 0}
    for replica in two.engine.replicas:
        replica.engine.scheduler.check_idle()


def test_requests_that_only_one_replica_takes_end(two: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second replica goes between the choice and the queue: the first one's request ends, and both serve on."""
    second = two.engine.replicas[1]

    def refuse(_: object) -> None:
        raise EngineDead("lost just now")

    with monkeypatch.context() as patch:
        patch.setattr(second, "admit", refuse)
        with pytest.raises(EngineDead, match="lost just now"):
            two.generate([{"prompt_token_ids": prompt_at(home)} for home in (0, 1)], greedy(100), use_tqdm=False)
    wait_until(lambda: two.engine.load() == NOTHING)
    for home in (0, 1):
        assert len(tokens_of(whole(two.engine.submit(prompt_at(home), greedy(3), output_kind="final")))) == 3
    assert two.engine.health() is None


def test_drawn_seeds_do_not_depend_on_the_replica(one: LLM, two: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompt eight times, at home and, once that is full, in the other replica."""
    params = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True, n=2)
    drawn = []
    for llm in (one, two):
        monkeypatch.setattr(llm.engine, "_num_sequences", 1000)
        outputs = llm.generate([{"prompt_token_ids": prompt_at(0)}] * 8, params, use_tqdm=False)
        drawn.append([output.outputs[i].token_ids for output in outputs for i in range(2)])
        assert llm.engine._num_sequences == 1016
    assert drawn[0] == drawn[1]
    assert len(set(map(tuple, drawn[0]))) == 16


def test_a_replica_that_dies_takes_only_its_own_requests_with_it(golden: Path) -> None:
    with tiny_llm(golden / "gqa", mesh=TWO, max_num_seqs=SEATS) as llm:
        first, second = llm.engine.replicas
        client = create_app(llm.engine).test_client()
        want = tokens_of(whole(llm.engine.submit(prompt_at(0), greedy(8), output_kind="final")))
        assert client.get("/health").status_code == 200

        def broken(*_: object) -> None:
            raise RuntimeError("device lost")

        survivor = llm.engine.submit(prompt_at(1), greedy(100), output_kind="final")
        first.executor.dispatch = first.executor.reset = broken
        with pytest.raises(RequestFailed, match="device lost"):
            whole(llm.engine.submit(prompt_at(0), greedy(8), output_kind="final"))
        first._thread.join(timeout=10)

        answer = client.get("/health")
        assert answer.status_code == 503
        assert answer.json["error"]["message"].startswith("replica 0: the engine stopped: the device did not come back")
        assert not llm.engine.is_dead
        assert len(tokens_of(whole(survivor))) == 100
        moved = llm.generate([{"prompt_token_ids": prompt_at(0)}] * 6, greedy(8), use_tqdm=False)
        assert [tokens_of(output) for output in moved] == [want] * 6

        second.executor.dispatch = second.executor.reset = broken
        with pytest.raises(RequestFailed, match="device lost"):
            whole(llm.engine.submit(prompt_at(0), greedy(8), output_kind="final"))
        second._thread.join(timeout=10)
        assert llm.engine.is_dead
        with pytest.raises(EngineDead, match=r"replica 0: .*; replica 1: "):
            llm.engine.submit([1], greedy(4))


def test_shutdown_ends_every_replica(golden: Path) -> None:
    llm = tiny_llm(golden / "gqa", mesh=TWO, max_num_seqs=SEATS)
    streams = [llm.engine.submit(prompt_at(home), greedy(100)) for home in (0, 1)]
    assert all(stream.get() is not None for stream in streams)
    assert llm.engine.shutdown()
    assert [list(stream)[-1].outputs[0].finish_reason for stream in streams] == ["abort", "abort"]
    with pytest.raises(EngineBusy, match="shutting down"):
        llm.engine.submit([1], greedy(4))
    for replica in llm.engine.replicas:
        assert all(array.is_deleted() for array in replica.executor.params.values())
    assert llm.engine.is_dead


def test_a_replica_that_cannot_start_ends_those_that_did(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[EngineLoop] = []
    start = EngineLoop.__init__

    def failing(self: EngineLoop, *arguments: object, replica: int = 0, **options: object) -> None:
        if replica:
            raise ValueError("no room on this device")
        start(self, *arguments, **options)
        started.append(self)

    monkeypatch.setattr(EngineLoop, "__init__", failing)
    with pytest.raises(ValueError, match="no room on this device"):
        tiny_llm(golden / "gqa", data_parallel_size=2, max_num_seqs=SEATS)
    (first,) = started
    assert all(array.is_deleted() for array in first.executor.params.values())
