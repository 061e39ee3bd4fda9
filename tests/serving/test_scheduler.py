"""The scheduler against a device that answers at once: no JAX, milliseconds."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable

import numpy as np
import pytest

from paddock.serving.page_pool import PagePool
from paddock.serving.sampling_params import SamplingParams
from paddock.serving.schedule import Schedule
from paddock.serving.scheduler import Scheduler
from paddock.serving.sequence import Sequence, SequenceStatus


def make(
    num_pages: int = 33,
    page_size: int = 4,
    seqs: int = 4,
    tokens: int = 16,
    chunks: int = 4,
    partitions: int = 1,
    stages: int = 1,
) -> Scheduler:
    pools = [PagePool(num_pages, page_size) for _ in range(partitions)]
    return Scheduler(pools, max_num_seqs=seqs, max_num_batched_tokens=tokens, max_chunks=chunks, num_stages=stages)


def sequence(seq_id: int, num_prompt: int, max_tokens: int = 8, *, patient: bool = False) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        prompt_token_ids=list(range(num_prompt)),
        params=SamplingParams(),
        seed=0,
        max_tokens=max_tokens,
        stop_token_ids=frozenset(),
        patient=patient,
    )


def read(schedules: Iterable[Schedule], scheduler: Scheduler) -> None:
    """What the engine does when a step's tokens arrive."""
    for schedule in schedules:
        for seq in schedule.sampling:
            for ended in scheduler.land([seq], [1])[1]:
                scheduler.finish(ended, "length")


def test_prompts_are_chunked_to_the_budget_in_order_of_arrival() -> None:
    scheduler = make(tokens=16)
    for seq_id, length in enumerate((10, 20, 3)):
        scheduler.add(sequence(seq_id, length))
    first = scheduler.schedule()
    assert [(c.seq.seq_id, c.start, c.length, c.samples) for c in first.chunks] == [(0, 0, 10, True), (1, 0, 6, False)]
    second = scheduler.schedule()
    assert [seq.seq_id for seq in second.decodes] == [0]
    assert [(c.seq.seq_id, c.start, c.length, c.samples) for c in second.chunks] == [(1, 6, 14, True), (2, 0, 2, False)]
    assert (second.num_chunk_tokens, second.num_tokens) == (16, 17), "who decodes takes nothing from the prompts"


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


@pytest.mark.parametrize("partitions", [1, 2])
def test_seats_are_for_sequences_that_do_not_give_way(partitions: int) -> None:
    scheduler = make(num_pages=8, page_size=4, seqs=4 * partitions, partitions=partitions)  # 7 pages to use
    assert [scheduler.seats(length) // partitions for length in (4, 5, 12, 13, 28, 29)] == [4, 3, 2, 1, 1, 0]


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
    assert (victim.seq_id, victim.status, victim.pages) == (1, SequenceStatus.WAITING, [])
    assert victim.slot >= 0, "a step on its way still samples by the slot's state"
    assert scheduler.num_preemptions == 1
    assert victim.in_flight == 1, "its token of the second step has not been read"
    read(sent[1:2], scheduler)
    assert (victim.in_flight, victim.slot) == (0, -1)
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
    scheduler._preempt(scheduler.running[0])
    assert not scheduler.schedule(), "the sampled token is still on the device"
    scheduler.land([scheduler.waiting[0]], [1])
    assert scheduler.schedule().chunks[0].length == 5


def test_a_recomputed_last_token_comes_from_the_host() -> None:
    """A chunk of one token left over after preemption is no decode: the slot's token on the device is another's."""
    scheduler = make(tokens=4)
    seq = sequence(0, 4)
    scheduler.add(seq)
    read([scheduler.schedule()], scheduler)
    scheduler.restart()
    assert scheduler.schedule().chunks[0].length == 4
    last = scheduler.schedule()
    assert not last.decodes
    assert (last.chunks[0].start, last.chunks[0].length, last.chunks[0].samples) == (4, 1, True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("partitions", "stages"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_random_traffic_leaks_nothing_and_is_deterministic(partitions: int, stages: int, seed: int) -> None:
    def run() -> list[tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]]:
        rng = np.random.default_rng(seed)
        scheduler = make(
            20, 4, seqs=3 * partitions, tokens=12 * partitions, chunks=2, partitions=partitions, stages=stages
        )
        alive: list[Sequence] = []
        history = []
        pending = deque([Schedule((), ())] * stages)
        sent: dict[int, int] = {}  # the tick at which a sequence was last sampled
        tick = 0
        while tick < 100 or not scheduler.is_idle or any(pending):
            if tick < 100 and rng.random() < 0.5 * partitions:
                seq = sequence(tick, int(rng.integers(1, 40)), int(rng.integers(1, 30)))
                scheduler.add(seq)
                alive.append(seq)
            if alive and rng.random() < 0.05:
                scheduler.finish(alive.pop(int(rng.integers(len(alive)))), "abort")
            schedule = scheduler.schedule()
            assert schedule.num_chunk_tokens <= 12 * partitions
            for seq in schedule.decodes:
                assert seq.num_computed <= min(4 * len(seq.pages), seq.last_computed)
                assert tick - sent[seq.seq_id] >= stages, "its last token has not come out of the pipeline"
            sent |= dict.fromkeys((seq.seq_id for seq in schedule.sampling), tick)
            for part in scheduler.partitions:
                held = [page for seq in part.running for page in seq.pages]
                assert len(held) == len(set(held)) == part.pool.num_usable - part.pool.num_free
                slots = [seq.slot for seq in part.running]
                assert len(set(slots)) == len(slots)
                assert not set(slots).intersection(part.free_slots)
                assert {slot // part.num_slots for slot in slots} <= {part.index}
            pending.append(schedule)
            assert schedule.decode_rows.T.tolist() == [[seq.slot, seq.num_computed - 1] for seq in schedule.decodes]
            in_flight = Counter(seq.seq_id for step in pending for seq in step.sampling)
            for seq in alive:
                assert seq.in_flight == in_flight[seq.seq_id]
            read([pending.popleft()], scheduler)
            tick += 1
            history.append(
                (
                    tuple(seq.seq_id for seq in schedule.decodes),
                    tuple((c.seq.seq_id, c.start, c.length) for c in schedule.chunks),
                )
            )
            assert tick < 3000
        assert scheduler.num_preemptions > 0
        scheduler.check_idle()
        return history

    assert run() == run()


def test_the_sequences_that_go_on_are_the_same_object() -> None:
    """Until one joins or leaves: what follows from them alone is then made once."""
    scheduler = make(num_pages=100, seqs=2, tokens=16)
    scheduler.add(sequence(0, 4, max_tokens=30))
    read([scheduler.schedule()], scheduler)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first.decodes is second.decodes
    assert (second.decode_rows - first.decode_rows).tolist() == [[0], [1]]
    scheduler.add(sequence(1, 4))
    third, fourth = scheduler.schedule(), scheduler.schedule()
    assert third.decodes is first.decodes, "the other is still a prompt"
    assert [seq.seq_id for seq in fourth.decodes] == [0, 1]


def test_decoding_sequences_spread_over_the_ticks_of_a_pipeline() -> None:
    """Eight prompts enter in one tick; soon each of four ticks carries two of them, and none is idle."""
    scheduler = make(num_pages=100, seqs=8, tokens=64, chunks=8, stages=4)
    for seq_id in range(8):
        scheduler.add(sequence(seq_id, 4, max_tokens=30))
    assert len(scheduler.schedule().chunks) == 8
    pending = deque([Schedule((), ())] * 4)
    sizes = []
    for _ in range(16):
        schedule = scheduler.schedule()
        pending.append(schedule)
        read([pending.popleft()], scheduler)
        sizes.append(len(schedule.decodes))
    assert sizes == [0, 0, 0, *[2] * 13]


def test_one_group_is_one_however_its_prompts_came() -> None:
    """Four prompts enter in four ticks; then all decode in one of four."""
    scheduler = make(num_pages=100, seqs=8, tokens=4, chunks=8, stages=4)
    scheduler.num_groups = 1
    for seq_id in range(4):
        scheduler.add(sequence(seq_id, 4, max_tokens=30))
    pending = deque([Schedule((), ())] * 4)
    sizes = []
    for _ in range(24):
        schedule = scheduler.schedule()
        pending.append(schedule)
        read([pending.popleft()], scheduler)
        sizes.append(len(schedule.decodes))
    assert max(sizes) == 4
    assert [size for size in sizes[12:] if size] == [4, 4, 4]


def test_a_long_prompt_fills_every_stage() -> None:
    scheduler = make(num_pages=600, tokens=2048, stages=2)
    scheduler.add(sequence(0, 2000))
    assert [scheduler.schedule().num_chunk_tokens for _ in range(3)] == [1000, 1000, 0]
    small = make(num_pages=600, tokens=2048, stages=2)
    small.add(sequence(0, 100))
    assert small.schedule().num_chunk_tokens == 100, "too little to cut"


def test_new_sequences_go_where_most_pages_are_free() -> None:
    scheduler = make(num_pages=33, seqs=4, tokens=64, partitions=2)
    for seq_id, length in enumerate((20, 4, 4, 4)):
        scheduler.add(sequence(seq_id, length))
    schedule = scheduler.schedule()
    where = {c.seq.seq_id: (c.seq.partition, c.seq.slot // 2) for c in schedule.chunks}
    assert where == {0: (0, 0), 1: (1, 1), 2: (1, 1), 3: (0, 0)}, "the fourth finds no slot where most pages are"
    assert [c.seq.seq_id for c in schedule.chunks] == [0, 3, 1, 2], "partition by partition"


def test_prompts_are_cut_to_what_steps_are_compiled_for() -> None:
    def make_idle() -> Scheduler:
        options = dict(max_num_batched_tokens=1024, max_chunks=4, chunk_sizes=(64, 256, 1024))
        return Scheduler([PagePool(400, 16)], max_num_seqs=4, **options)

    scheduler = make_idle()
    scheduler.add(sequence(0, 800))
    scheduler.add(sequence(1, 90))
    schedule = scheduler.schedule()
    assert [(c.seq.seq_id, c.length) for c in schedule.chunks] == [(0, 800), (1, 90)], "890 are nearly 1,024"

    scheduler = make_idle()
    scheduler.add(sequence(0, 700))
    assert [scheduler.schedule().num_chunk_tokens for _ in range(4)] == [256, 256, 188, 0]
    scheduler.add(sequence(1, 890))
    assert scheduler.schedule().num_chunk_tokens == 256, "beside a decoding row the rest has a step anyway"
    scheduler.add(sequence(2, 350))
    assert scheduler.schedule().num_chunk_tokens == 984, "too nearly 1,024 to be cut"
    scheduler.add(sequence(3, 100))
    assert scheduler.schedule().num_chunk_tokens == 100, "as quick as 64"

    scheduler = make_idle()
    for seq_id in range(3):
        scheduler.add(sequence(seq_id, 5))
    scheduler.schedule()
    scheduler.add(sequence(3, 2000))
    assert scheduler.schedule().num_chunk_tokens == 1024, "what decodes takes no room from it"


def test_ticks_outgrow_32_bits() -> None:
    scheduler = make()
    scheduler._tick = 2**31 - 3
    scheduler.add(sequence(0, 4))
    assert [scheduler.schedule().num_tokens for _ in range(5)] == [4, 1, 1, 1, 1]


def test_what_cannot_be_admitted_does_not_fill_a_step() -> None:
    """With every slot taken, a long queue is no reason to run a larger program."""
    scheduler = Scheduler(
        [PagePool(400, 16)], max_num_seqs=1, max_num_batched_tokens=1024, max_chunks=4, chunk_sizes=(64, 256, 1024)
    )
    for seq_id in range(6):
        scheduler.add(sequence(seq_id, 600))
    assert [scheduler.schedule().num_chunk_tokens for _ in range(3)] == [256, 256, 88]


def test_a_chunk_is_stale_once_its_sequence_is_computed_again() -> None:
    scheduler = make(tokens=4)
    seq = sequence(0, 10)
    scheduler.add(seq)
    (chunk,) = scheduler.schedule().chunks
    assert not chunk.is_stale
    scheduler.restart()
    assert chunk.is_stale, "its slot may be another's"
    (again,) = scheduler.schedule().chunks
    assert (chunk.is_stale, again.is_stale) == (True, False), "even in the same slot"
    scheduler.finish(seq, "abort")
    assert again.is_stale


@pytest.mark.parametrize(("partitions", "stages"), [(1, 2), (2, 2), (2, 4)])
def test_chunks_that_come_out_have_their_slot_or_are_stale(partitions: int, stages: int) -> None:
    """Whatever gives way meanwhile: another's page table would have been attended through."""
    num_held = num_waiting = 0
    for seed in range(40):
        draw = random.Random(seed)
        scheduler = make(draw.randint(8, 16), seqs=4 * partitions, tokens=8 * partitions, chunks=4 * partitions,
                         partitions=partitions, stages=stages)  # fmt: skip
        flight: deque[tuple[Schedule, list[int]]] = deque([(Schedule((), ()), [])] * (stages - 1))
        for seq_id in range(200):
            if len(scheduler.waiting) < 6:
                scheduler.add(sequence(seq_id, draw.randint(1, 20), draw.randint(1, 10)))
            schedule = scheduler.schedule()
            flight.append((schedule, [chunk.seq.slot for chunk in schedule.chunks]))
            leaving, slots = flight.popleft()
            for chunk, slot in zip(leaving.chunks, slots, strict=True):
                if not chunk.is_stale:
                    num_held += 1
                    num_waiting += chunk.seq.status is SequenceStatus.WAITING
                    assert chunk.seq.slot == slot
                    assert not any(seq.slot == slot and seq is not chunk.seq for seq in scheduler.running)
            read([leaving], scheduler)
    assert num_held > 1000
    assert num_waiting > 0, "some that gave way are still of use"


def test_patient_sequences_wait_for_prompts_that_fill_whole_steps() -> None:
    scheduler = make(num_pages=65, seqs=8, tokens=16)
    for seq_id in range(5):
        scheduler.add(sequence(seq_id, 8, patient=True))
    steps = [scheduler.schedule() for _ in range(4)]
    # Two prompts a step; the fifth fills none, so that those before it decode beside it.
    assert [(len(step.chunks), len(step.decodes)) for step in steps] == [(2, 0), (2, 0), (1, 4), (0, 5)]
    read(steps, scheduler)
    assert [len(seq.output_token_ids) for seq in scheduler.running] == [3, 3, 3, 3, 2]


def test_one_that_is_not_patient_lets_all_decode() -> None:
    scheduler = make(num_pages=65, seqs=8, tokens=16)
    for seq_id in range(6):
        scheduler.add(sequence(seq_id, 8, patient=seq_id != 2))
    steps = [scheduler.schedule() for _ in range(3)]
    assert [(len(step.chunks), len(step.decodes)) for step in steps] == [(2, 0), (2, 0), (2, 4)]
    scheduler.finish(scheduler.running[2], "abort")
    scheduler.add(sequence(6, 16))
    assert [(len(step.chunks), len(step.decodes)) for step in (scheduler.schedule(), scheduler.schedule())] == [
        (1, 0),
        (0, 6),
    ]


def test_patience_ends_with_the_free_slots() -> None:
    """However many prompts wait, those that decode hold slots that nobody else can have."""
    scheduler = make(num_pages=65, seqs=4, tokens=16)
    for seq_id in range(9):
        scheduler.add(sequence(seq_id, 8, patient=True))
    steps = [scheduler.schedule() for _ in range(3)]
    assert [(len(step.chunks), len(step.decodes)) for step in steps] == [(2, 0), (2, 0), (0, 4)]


def test_patience_ends_where_a_prompt_fits_no_partition() -> None:
    """Four pages are free, two in each of the partitions, and the prompt that waits needs all of one's."""
    scheduler = make(num_pages=5, page_size=4, seqs=4, tokens=16, partitions=2)
    for seq_id in range(2):
        scheduler.add(sequence(seq_id, 8, max_tokens=3, patient=True))
    steps = [scheduler.schedule()]
    scheduler.add(sequence(2, 16, patient=True))
    steps += [scheduler.schedule() for _ in range(2)]
    assert [(len(step.chunks), len(step.decodes)) for step in steps] == [(2, 0), (0, 2), (0, 2)]
    read(steps, scheduler)
    assert [chunk.seq.seq_id for chunk in scheduler.schedule().chunks] == [2]


def test_patience_ends_after_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts whose first token is their last give their slots back, so that there are always free ones."""
    monkeypatch.setattr("paddock.serving.scheduler.MOST_ALONE", 3)
    scheduler = make(num_pages=257, seqs=64, tokens=16)
    scheduler.add(sequence(0, 8, patient=True))
    for seq_id in range(1, 20):
        scheduler.add(sequence(seq_id, 8, max_tokens=1, patient=True))
    steps = [scheduler.schedule() for _ in range(6)]
    assert [len(step.decodes) for step in steps] == [0, 0, 0, 1, 0, 0]
    assert all(len(step.chunks) == 2 for step in steps)
