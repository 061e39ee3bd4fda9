"""The scheduler against a device that answers at once: no JAX, milliseconds."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from paddock.serving.page_pool import PagePool
from paddock.serving.sampling_params import SamplingParams
from paddock.serving.scheduler import Schedule, Scheduler
from paddock.serving.sequence import Sequence, SequenceStatus


def make(num_pages: int = 33, page_size: int = 4, seqs: int = 4, tokens: int = 16, chunks: int = 4) -> Scheduler:
    pool = PagePool(num_pages, page_size)
    return Scheduler(pool, max_num_seqs=seqs, max_num_batched_tokens=tokens, max_chunks=chunks)


def sequence(seq_id: int, num_prompt: int, max_tokens: int = 8) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        prompt_token_ids=list(range(num_prompt)),
        params=SamplingParams(),
        seed=0,
        max_tokens=max_tokens,
        stop_token_ids=frozenset(),
    )


def read(schedules: Iterable[Schedule], scheduler: Scheduler) -> None:
    """What the engine does when a step's tokens arrive."""
    for schedule in schedules:
        for seq in [*schedule.decodes, *(chunk.seq for chunk in schedule.chunks if chunk.samples)]:
            if seq.status is SequenceStatus.FINISHED:
                continue
            seq.in_flight -= 1
            seq.output_token_ids.append(1)
            if len(seq.output_token_ids) >= seq.max_tokens:
                scheduler.finish(seq, "length")


def test_prompts_are_chunked_to_the_budget_in_order_of_arrival() -> None:
    scheduler = make(tokens=16)
    for seq_id, length in enumerate((10, 20, 3)):
        scheduler.add(sequence(seq_id, length))
    first = scheduler.schedule()
    assert [(c.seq.seq_id, c.start, c.length, c.samples) for c in first.chunks] == [(0, 0, 10, True), (1, 0, 6, False)]
    second = scheduler.schedule()
    assert [seq.seq_id for seq in second.decodes] == [0]
    assert [(c.seq.seq_id, c.start, c.length, c.samples) for c in second.chunks] == [(1, 6, 14, True), (2, 0, 1, False)]
    assert second.num_tokens == 16


def test_a_sequence_is_not_scheduled_past_its_last_token() -> None:
    scheduler = make()
    scheduler.add(sequence(0, 4, max_tokens=2))
    first, second, third = scheduler.schedule(), scheduler.schedule(), scheduler.schedule()
    assert (len(first.chunks), len(second.decodes), bool(third)) == (1, 1, False)
    read([first, second], scheduler)
    assert scheduler.is_idle
    scheduler.check_idle()


def test_a_slot_and_pages_limit_admission() -> None:
    scheduler = make(seqs=2)
    for seq_id in range(3):
        scheduler.add(sequence(seq_id, 2))
    assert [c.seq.seq_id for c in scheduler.schedule().chunks] == [0, 1]
    scheduler = make(num_pages=4, page_size=4)
    scheduler.add(sequence(0, 8))
    scheduler.add(sequence(1, 8))
    assert [c.seq.seq_id for c in scheduler.schedule().chunks] == [0]


def test_the_latest_arrival_gives_way_and_is_computed_again() -> None:
    scheduler = make(num_pages=5, page_size=4)  # four pages: two sequences of eight tokens
    scheduler.add(sequence(0, 7, max_tokens=9))
    scheduler.add(sequence(1, 7, max_tokens=9))
    sent = [scheduler.schedule()]
    assert len(sent[0].chunks) == 2
    sent.append(scheduler.schedule())
    read(sent[:1], scheduler)
    sent.append(scheduler.schedule())  # position 8 needs a third page
    assert [seq.seq_id for seq in sent[2].decodes] == [0]
    (victim,) = scheduler.waiting
    assert (victim.seq_id, victim.status, victim.pages, victim.slot) == (1, SequenceStatus.WAITING, [], -1)
    assert scheduler.num_preemptions == 1
    assert victim.in_flight == 1, "its token of the second step has not been read"
    read(sent[1:2], scheduler)
    assert victim.in_flight == 0
    pending = [sent[2]]
    for _ in range(30):
        schedule = scheduler.schedule()
        read(pending, scheduler)
        pending = [schedule]
        if chunks := [chunk for chunk in schedule.chunks if chunk.seq is victim]:
            assert (chunks[0].start, chunks[0].is_first) == (0, True)
    assert scheduler.is_idle
    assert len(victim.output_token_ids) == 9
    scheduler.check_idle()


def test_a_preempted_sequence_waits_for_its_token() -> None:
    scheduler = make(num_pages=3, page_size=4)
    scheduler.add(sequence(0, 4))
    scheduler.schedule()
    scheduler.preempt_all()
    assert not scheduler.schedule(), "the sampled token is still on the device"
    scheduler.waiting[0].in_flight -= 1
    scheduler.waiting[0].output_token_ids.append(1)
    assert scheduler.schedule().chunks[0].length == 5


def test_a_recomputed_last_token_comes_from_the_host() -> None:
    """A chunk of one token left over after preemption is no decode: the slot's token on the device is another's."""
    scheduler = make(tokens=4)
    seq = sequence(0, 4)
    scheduler.add(seq)
    read([scheduler.schedule()], scheduler)
    scheduler.preempt_all()
    assert scheduler.schedule().chunks[0].length == 4
    last = scheduler.schedule()
    assert not last.decodes
    assert (last.chunks[0].start, last.chunks[0].length, last.chunks[0].samples) == (4, 1, True)


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_leaks_nothing_and_is_deterministic(seed: int) -> None:
    def run() -> list[tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]]:
        rng = np.random.default_rng(seed)
        scheduler = make(num_pages=20, page_size=4, seqs=3, tokens=12, chunks=2)
        alive: list[Sequence] = []
        history = []
        pending: list[Schedule] = []
        for step in range(400):
            if step < 200 and rng.random() < 0.4:
                seq = sequence(step, int(rng.integers(1, 40)), int(rng.integers(1, 30)))
                scheduler.add(seq)
                alive.append(seq)
            if alive and rng.random() < 0.05:
                scheduler.finish(alive.pop(int(rng.integers(len(alive)))), "abort")
            schedule = scheduler.schedule()
            assert schedule.num_tokens <= 12
            held = [page for seq in scheduler.running for page in seq.pages]
            assert len(held) == len(set(held)) == scheduler.pool.num_usable - scheduler.pool.num_free
            read(pending, scheduler)
            pending = [schedule]
            history.append(
                (
                    tuple(seq.seq_id for seq in schedule.decodes),
                    tuple((c.seq.seq_id, c.start, c.length) for c in schedule.chunks),
                )
            )
        while not scheduler.is_idle:
            schedule = scheduler.schedule()
            read(pending, scheduler)
            pending = [schedule]
        assert scheduler.num_preemptions > 0
        scheduler.check_idle()
        return history

    assert run() == run()
