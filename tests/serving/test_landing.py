"""Tokens noted for a whole group are the same as those given to each."""

from __future__ import annotations

import pytest

from paddock.serving.landing import MOST_STEPS
from paddock.serving.page_pool import PagePool
from paddock.serving.sampling_params import SamplingParams
from paddock.serving.scheduler import Scheduler
from paddock.serving.sequence import Sequence

STOP = 5000


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler([PagePool(200, 4)], max_num_seqs=4, max_num_batched_tokens=16, max_chunks=4)


def start(scheduler: Scheduler, *max_tokens: int) -> list[Sequence]:
    seqs = [Sequence(i, [1], SamplingParams(), 0, most, frozenset({STOP})) for i, most in enumerate(max_tokens)]
    for seq in seqs:
        scheduler.add(seq)
    return seqs


def land(scheduler: Scheduler, *tokens: int) -> list[int]:
    """Ids of the sequences that had their last token in the next step."""
    taking = scheduler.schedule().sampling
    advanced, last = scheduler.land(taking, tokens)
    assert list(advanced) == list(taking)
    for seq in last:
        scheduler.finish(seq, "length")
    return [seq.seq_id for seq in last]


def test_each_has_its_own_tokens_whoever_looks_and_when(scheduler: Scheduler) -> None:
    steps = 2 * MOST_STEPS + 7
    first, second = start(scheduler, steps + 1, steps + 1)
    for step in range(steps):
        assert land(scheduler, step, 1000 + step) == []
        if step % 50 == 49:
            assert second.output_token_ids[-2:] == [999 + step, 1000 + step]
    assert first.landing is second.landing is not None
    assert first.output_token_ids == list(range(steps))
    assert land(scheduler, 5, 6) == [0, 1]
    assert second.output_token_ids == [*range(1000, 1000 + steps), 6]


def test_a_stop_token_or_the_last_one_ends_who_has_it(scheduler: Scheduler) -> None:
    first, second, third = start(scheduler, 50, 6, 50)
    ends = [land(scheduler, 1, 2, 3) for _ in range(5)]
    assert (ends, land(scheduler, 1, 2, 3)) == ([[]] * 5, [1])
    ends = [land(scheduler, 1, 3) for _ in range(5)]
    assert (ends, land(scheduler, STOP, 3)) == ([[]] * 5, [0])
    assert [len(seq.output_token_ids) for seq in (first, second, third)] == [12, 6, 12]


@pytest.mark.parametrize("leave", ["finish", "restart"])
def test_who_leaves_has_all_that_was_read(scheduler: Scheduler, leave: str) -> None:
    first, second = start(scheduler, 50, 50)
    for step in range(6):
        land(scheduler, step, step)
    if leave == "finish":
        scheduler.finish(first, "abort")
    else:
        scheduler.restart()
    assert first.landing is second.landing is None
    assert first.output_token_ids == second.output_token_ids == list(range(6))
    assert scheduler.running == ([second] if leave == "finish" else [])
