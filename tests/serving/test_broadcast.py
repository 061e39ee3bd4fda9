"""The sockets between processes, and turns: threads of one process stand for processes, and no device is needed."""

from __future__ import annotations

import dataclasses
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from paddock.serving import EngineConfig, SamplingParams
from paddock.serving.broadcast import Follower, Leader
from paddock.serving.bucket import Bucket
from paddock.serving.engine import Engine, Limits
from paddock.serving.errors import EngineDead, OutOfStep
from paddock.serving.executor import StepFuture
from paddock.serving.page_pool import PagePool
from paddock.serving.processes import Processes
from paddock.serving.schedule import Schedule
from paddock.serving.scheduler import Scheduler
from paddock.serving.turn import Admission, Lockstep, Turn

WAIT = 20.0
OPTIONS = {"block_size": 64, "mesh": "tensor=2"}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Group:
    """One leader and its followers, each follower's `body` in a thread; `lost` collects what ends are told."""

    def __init__(self, count: int):
        port = free_port()
        self.processes = [Processes(count, index, f"127.0.0.1:{port}", port) for index in range(count)]
        self.lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.leader = Leader(self.processes[0], heartbeat_seconds=10)
        self.leader.watch(self.lost.put)
        self.results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.followers: list[Follower] = []
        self.threads: list[threading.Thread] = []

    def follow(self, index: int, body: Callable[[Follower], Any], options: dict[str, Any] | None = None) -> None:
        def run() -> None:
            follower = Follower(self.processes[index], 10, self.lost.put)
            self.followers.append(follower)
            try:
                follower.join(options or OPTIONS)
                self.results.put(body(follower))
            except Exception as error:
                self.results.put(error)

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def close(self) -> None:
        for thread in self.threads:
            thread.join(WAIT)
            assert not thread.is_alive()
        for end in (*self.followers, self.leader):
            end.close()


class CountingFuture(StepFuture):
    """Every sequence's tokens are 1, 2, 3, ..."""

    def __init__(self, schedule: Schedule):
        self.schedule, self.bucket, self.num_tokens = schedule, Bucket(1, 0, 0, True), schedule.num_tokens
        self.seqs = schedule.sampling

    def read(self) -> tuple[list[int], dict]:
        return [len(seq.output_token_ids) + 1 for seq in self.seqs], {}

    def read_prompt_logprobs(self) -> tuple[()]:
        return ()


class CountingRunner:
    in_flight = False

    def dispatch(self, schedule: Schedule) -> StepFuture:
        return CountingFuture(schedule)

    def edit_bias(self, slot: int, bias: dict[int, float], *, clear: bool) -> None: ...

    def reset(self) -> None: ...


def lockstep() -> Lockstep:
    """An engine over two slots and few pages, so that requests wait and preempt each other."""
    scheduler = Scheduler([PagePool(5, 4)], max_num_seqs=2, max_num_batched_tokens=8, max_chunks=2)
    return Lockstep(Engine(CountingRunner(), scheduler, Limits(100, 16, 5, frozenset({99}), 0)))


@pytest.fixture
def pair() -> Iterator[Group]:
    group = Group(2)
    yield group
    group.close()


def read_turns(follower: Follower) -> list[Turn]:
    turns = []
    while (message := follower.receive())["kind"] == "turn":
        turns.append(Turn.from_dict(message))
    follower.bye()
    return turns


def test_turns_arrive_as_they_were_told_and_the_end_is_orderly() -> None:
    group = Group(3)
    for index in (1, 2):
        group.follow(index, read_turns)
    group.leader.welcome(OPTIONS)
    params = SamplingParams(n=2, seed=2**64 - 1, stop=["a"], logit_bias={5: 0.1}, stop_token_ids=[7], max_tokens=None)
    turns = [Turn(0, (Admission([1, 2], params, patient=True),), (), 0), Turn(1, (), (0, 3), 2**32 - 1), Turn(2)]
    for turn in turns:
        group.leader.tell(kind="turn", **turn.to_dict())
    assert group.leader.end()
    assert [group.results.get(timeout=WAIT) for _ in range(2)] == [turns, turns]
    group.close()
    assert group.lost.empty()


def test_values_are_exchanged_in_the_order_of_processes() -> None:
    group = Group(3)
    for index in (2, 1):
        group.follow(index, lambda follower: follower.exchange(follower._index * 10))
    group.leader.welcome(OPTIONS)
    assert group.leader.exchange(7) == [7, 10, 20]
    assert [group.results.get(timeout=WAIT) for _ in range(2)] == [[7, 10, 20]] * 2
    group.leader.close()
    group.close()


def test_other_options_are_refused_by_name_and_the_right_ones_still_welcome(pair: Group) -> None:
    welcoming = threading.Thread(target=pair.leader.welcome, args=(OPTIONS,))
    welcoming.start()
    pair.follow(1, read_turns, OPTIONS | {"block_size": 16})
    error = pair.results.get(timeout=WAIT)
    assert isinstance(error, ValueError)
    assert "block_size is 16 in process 1 and 64 in process 0" in str(error)
    pair.follow(1, read_turns)
    welcoming.join(WAIT)
    assert pair.leader.end()
    assert pair.results.get(timeout=WAIT) == []


def test_a_process_id_is_taken_once() -> None:
    group = Group(3)
    welcoming = threading.Thread(target=group.leader.welcome, args=(OPTIONS,))
    welcoming.start()
    group.follow(1, read_turns)
    group.follow(1, read_turns)
    error = group.results.get(timeout=WAIT)
    assert isinstance(error, ValueError)
    assert "two processes with process_id 1" in str(error)
    group.follow(2, read_turns)
    welcoming.join(WAIT)
    assert group.leader.end()
    group.close()


def test_a_follower_that_vanishes_is_named(pair: Group) -> None:
    pair.follow(1, lambda follower: follower.close())
    pair.leader.welcome(OPTIONS)
    assert pair.lost.get(timeout=WAIT) == "process 1 has gone"
    with pytest.raises(EngineDead, match="process 1 has gone"):
        pair.leader.tell(kind="turn", **Turn(0).to_dict())


def test_a_follower_says_why_it_fails(pair: Group) -> None:
    pair.follow(1, lambda follower: follower.fail("ValueError: no such checkpoint"))
    pair.leader.welcome(OPTIONS)
    assert pair.lost.get(timeout=WAIT) == "process 1 failed: ValueError: no such checkpoint"
    with pytest.raises(EngineDead, match="no such checkpoint"):
        pair.leader.exchange(1)


def test_a_leader_that_vanishes_is_noticed(pair: Group) -> None:
    joined = threading.Event()
    pair.follow(1, lambda follower: joined.set())
    pair.leader.welcome(OPTIONS)
    assert joined.wait(WAIT)
    pair.leader.close()
    assert pair.lost.get(timeout=WAIT) == "process 0 has gone"


def test_an_address_in_use_is_an_error(pair: Group) -> None:
    with pytest.raises(ValueError, match="process 0 cannot listen on 127"):
        Leader(pair.processes[0], heartbeat_seconds=10)
    pair.leader.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 2}, "num_processes is given but no coordinator_address"),
        ({"process_id": 1}, "process_id is given but no coordinator_address"),
        ({"coordinator_address": "a:1", "num_processes": 2}, "needs num_processes and process_id"),
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "process_id 2 is not below"),
        ({"coordinator_address": "a", "num_processes": 2, "process_id": 1}, "must be host:port, got 'a'"),
        ({"coordinator_address": "auto"}, "neither Slurm nor"),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1, "mesh": "data=2"},
            "data in several processes is not supported",
        ),
    ],
    ids=str,
)
def test_options_that_name_no_processes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Processes.of(EngineConfig(**options))


def test_slurm_says_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"JOB_ID": "4095", "STEP_NODELIST": "node[03-06]", "NTASKS": "4", "PROCID": "2", "LOCALID": "0"}
    for name, value in names.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    processes = Processes.of(EngineConfig(coordinator_address="auto", mesh="tensor=4"))
    # Slurm's largest port: there is none above it.
    assert processes == Processes(4, 2, "node03:65535", 65534)


def test_one_process_alone() -> None:
    assert Processes.of(EngineConfig()) is None
    assert Processes.of(EngineConfig(num_processes=1, process_id=0)) is None


def test_other_steps_are_noticed() -> None:
    """Engines told the same agree at every step; one that was told something else is out of step at the next."""
    ours, theirs = lockstep(), lockstep()
    params = SamplingParams(max_tokens=9)
    digests = set()
    for step in range(20):
        admitted = (Admission([1, 2, step + 1], params),) if step < 3 else ()
        turn = Turn(step, admitted, (1,) if step == 6 else (), ours.digest)
        for one in (ours, theirs):
            one.take(Turn.from_dict(turn.to_dict()))
            one.run()
        assert ours.digest == theirs.digest
        digests.add(ours.digest)
    assert len(digests) > 15
    assert ours.engine.scheduler.num_preemptions > 0
    turn = Turn(20, (Admission([1], params),), (), ours.digest)
    ours.take(turn)
    theirs.take(dataclasses.replace(turn, admitted=(Admission([1, 2], params),)))
    ours.run()
    theirs.run()
    with pytest.raises(OutOfStep, match="the schedules of the processes differ: after step 21"):
        theirs.take(Turn(21, (), (), ours.digest))
    with pytest.raises(OutOfStep, match="after step 21"):
        ours.take(Turn(22, (), (), ours.digest))


def test_a_sequence_that_ended_by_itself_may_be_aborted_late() -> None:
    engine = lockstep()
    ((seq,),) = engine.take(Turn(0, (Admission([1], SamplingParams(max_tokens=1)),)))
    for _ in range(2):
        engine.run()
    engine.take(Turn(2, (), (seq.seq_id,), engine.digest))
    assert seq.finish_reason == "length"
