"""What the engine promises beyond the tokens: nothing compiles, nothing leaks, failures stay where they happened."""

from __future__ import annotations

import functools
import gc
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import assert_nothing_leaked, greedy, prompts_of, tiny_llm, tokens_of
from http_client import wait_until

from paddock.checkpoints import load_params
from paddock.model import LlamaConfig, forward
from paddock.serving import LLM, SamplingParams
from paddock.serving.engine import Engine
from paddock.serving.errors import EngineBusy, EngineDead, RequestFailed
from paddock.serving.executor import Executor, StepFuture
from paddock.serving.page_pool import PagePool
from paddock.serving.quiet_heap import HEAP
from paddock.serving.sampler import Sampled
from paddock.serving.schedule import Schedule
from paddock.serving.scheduler import Scheduler
from paddock.sharding import Layout


@pytest.fixture(scope="module")
def llm(golden: Path) -> Iterator[LLM]:
    with tiny_llm(golden / "gqa") as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(golden: Path):
    """Logits [T V] of a whole sequence, by full recompute."""
    config = LlamaConfig.from_file(golden / "gqa" / "config.json")
    params = load_params(golden / "gqa", config, Layout.build(), "float32")

    def logits(token_ids: list[int]) -> np.ndarray:
        padded = jnp.asarray(token_ids + [0] * (48 - len(token_ids)))
        return np.asarray(compiled(padded))[: len(token_ids)]

    compiled = jax.jit(lambda ids: forward(config, params, ids))
    return logits


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits))


def some_params(rng: np.random.Generator, vocab: int) -> SamplingParams:
    """Every kind of request there is."""
    pick = lambda *choices: choices[int(rng.integers(len(choices)))]
    max_tokens = int(rng.integers(1, 24))
    return SamplingParams(
        n=pick(1, 1, 1, 2),
        temperature=pick(0.0, 0.7, 1.3),
        top_k=pick(0, 0, 5),
        top_p=pick(1.0, 0.9),
        min_p=pick(0.0, 0.05),
        seed=pick(None, 3),
        presence_penalty=pick(0.0, 0.5),
        repetition_penalty=pick(1.0, 1.2),
        logit_bias=pick(None, {3: 2.0, 7: -50.0}),
        logprobs=pick(None, None, 3),
        prompt_logprobs=pick(None, None, 2),
        stop_token_ids=pick(None, [int(rng.integers(vocab))]),
        ignore_eos=pick(True, False),
        max_tokens=max_tokens,
        min_tokens=int(rng.integers(0, max_tokens + 1)) * pick(0, 0, 1),
    )


def test_no_step_takes_the_slow_way_through_jax(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call of an executable goes through Python; the C++ path knows every later one by its arguments."""
    slow: Counter[int] = Counter()
    call = jax.stages.Compiled.call

    def counted(params, *args):
        slow[id(params.executable)] += 1
        return call(params, *args)

    monkeypatch.setattr(jax.stages.Compiled, "call", staticmethod(counted))
    executor = llm.engine.replicas[0].executor
    for compiled in executor.compiled.values():
        compiled._call = None  # as if it had never been called
    for _ in range(3):
        llm.generate(prompts_of([5, 20, 9, 33], llm.engine.vocab_size), greedy(12), use_tqdm=False)
    assert 1 < len(slow) <= len(executor.compiled)
    assert set(slow.values()) == {1}


def test_what_there_is_may_be_garbage_while_nothing_runs(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are not held up by a search for cycles in everything; an LLM in one is found all the same."""
    engine, frozen = llm.engine.replicas[0].engine, []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (frozen.append(gc.get_freeze_count()), step())[1])
    llm.generate(prompts_of([3], llm.engine.vocab_size), greedy(4), use_tqdm=False)
    assert len(frozen) >= 4
    assert min(frozen) > 1000
    wait_until(lambda: not gc.get_freeze_count())
    HEAP.begin()  # another engine's
    try:
        llm.generate(prompts_of([3], llm.engine.vocab_size), greedy(4), use_tqdm=False)
        wait_until(lambda: engine.is_idle)
        assert gc.get_freeze_count()
    finally:
        HEAP.end()
    wait_until(lambda: not gc.get_freeze_count())


def test_a_thousand_steps_of_mixed_traffic_compile_nothing_and_leak_nothing(llm: LLM) -> None:
    """500 requests of every kind with random aborts."""
    compiled: list[str] = []
    listener = lambda name, *_, **__: compiled.append(name) if "compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    before = llm.engine.metrics.render()
    steps = 0
    engine = llm.engine.replicas[0].engine
    original = engine.step

    def counted():
        nonlocal steps
        steps += 1
        return original()

    engine.step = counted
    try:
        rng = np.random.default_rng(0)
        streams = []
        for index in range(500):
            prompt = prompts_of([int(rng.integers(1, 60))], llm.engine.vocab_size, index)[0]["prompt_token_ids"]
            streams.append(llm.engine.submit(prompt, some_params(rng, llm.engine.vocab_size)))
            if rng.random() < 0.3:
                streams[int(rng.integers(len(streams)))].abort()
            if index % 10 == 9:
                next(iter(streams[index]), None)
        reasons = set()
        for stream in streams:
            for output in stream:
                reasons |= {completion.finish_reason for completion in output.outputs}
        assert reasons >= {"abort", "length", "stop"}
        assert steps >= 1000
    finally:
        engine.step = original
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []
    counter = b"paddock:step_compilations_total"
    line = lambda text: [row for row in text.splitlines() if row.startswith(counter)]
    assert line(llm.engine.metrics.render()) == line(before) != []
    assert llm.engine.load() == {"running": 0, "waiting": 0}
    assert_nothing_leaked(llm)
    assert llm.engine.health() is None


def test_logprobs_are_those_of_a_full_recompute(llm: LLM, reference) -> None:
    prompt = prompts_of([9], llm.engine.vocab_size)[0]
    output = llm.generate(prompt, greedy(12, presence_penalty=1.0), use_tqdm=False)[0]
    tokens = tokens_of(output)
    want = log_softmax(reference(prompt["prompt_token_ids"] + tokens)[8:-1])
    for token, row, candidates in zip(tokens, want, output.outputs[0].logprobs, strict=True):
        assert candidates[token].logprob == pytest.approx(row[token], abs=1e-4)
        assert candidates[token].rank == (row > row[token] + 1e-6).sum() + 1
        for best in np.argsort(row)[::-1][:2]:
            assert candidates[int(best)].logprob == pytest.approx(row[best], abs=1e-4)
    total = sum(row[token] for token, row in zip(tokens, want, strict=True))
    assert output.outputs[0].cumulative_logprob == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("length", [1, 2, 45])
def test_prompt_logprobs_are_those_of_a_full_recompute(llm: LLM, reference, length: int) -> None:
    """45 tokens are two chunks, and more rows than one call of the head takes."""
    prompt = prompts_of([length], llm.engine.vocab_size)[0]
    params = SamplingParams(max_tokens=1, prompt_logprobs=3)
    output = llm.generate(prompt, params, use_tqdm=False)[0]
    assert output.prompt_logprobs is not None
    first, *rest = output.prompt_logprobs
    assert first is None
    want = log_softmax(reference(prompt["prompt_token_ids"]))
    for row, token, candidates in zip(want[:-1], prompt["prompt_token_ids"][1:], rest, strict=True):
        assert candidates[token].logprob == pytest.approx(row[token], abs=1e-4)
        assert {int(t) for t in np.argsort(row)[::-1][:3]} <= set(candidates)


def test_penalties_count_prompt_and_output(llm: LLM, reference) -> None:
    """The device's counts against a greedy loop in numpy."""
    prompt = prompts_of([6], llm.engine.vocab_size, seed=5)[0]
    output = llm.generate(
        prompt, greedy(20, presence_penalty=0.7, frequency_penalty=0.9, repetition_penalty=1.4), use_tqdm=False
    )[0]
    tokens: list[int] = []
    for _ in range(20):
        logits = reference(prompt["prompt_token_ids"] + tokens)[-1].astype(np.float64)
        counts = np.bincount(tokens, minlength=len(logits))
        seen = counts + np.bincount(prompt["prompt_token_ids"], minlength=len(logits)) > 0
        logits = np.where(seen, np.where(logits > 0, logits / 1.4, logits * 1.4), logits)
        tokens.append(int((logits - 0.9 * counts - 0.7 * (counts > 0)).argmax()))
    assert tokens_of(output) == tokens
    assert tokens != tokens_of(llm.generate(prompt, greedy(20), use_tqdm=False)[0])


def test_logit_bias_and_its_removal_with_the_slot(llm: LLM) -> None:
    prompt = prompts_of([4], llm.engine.vocab_size)[0]
    plain = tokens_of(llm.generate(prompt, greedy(8), use_tqdm=False)[0])
    biased = llm.generate([prompt] * 4, greedy(8, logit_bias={11: 100}), use_tqdm=False)
    assert all(tokens_of(output) == [11] * 8 for output in biased)
    mixed = llm.generate([prompt, prompt], [greedy(8), greedy(8, logit_bias={12: 100})], use_tqdm=False)
    assert [tokens_of(output) for output in mixed] == [plain, [12] * 8]


def test_stop_token_ids_and_min_tokens(llm: LLM) -> None:
    prompt = prompts_of([4], llm.engine.vocab_size)[0]
    plain = tokens_of(llm.generate(prompt, greedy(12), use_tqdm=False)[0])
    stop = plain[4]
    first = plain.index(stop)
    output = llm.generate(prompt, greedy(12, stop_token_ids=[stop]), use_tqdm=False)[0].outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (plain[: first + 1], "stop", stop)
    later = llm.generate(prompt, greedy(12, stop_token_ids=[stop], min_tokens=9), use_tqdm=False)[0].outputs[0]
    assert stop not in later.token_ids[:9]
    assert len(later.token_ids) >= 9
    forced = greedy(12, stop_token_ids=[stop], min_tokens=5, logit_bias={stop: 100})
    exact = llm.generate(prompt, forced, use_tqdm=False)[0].outputs[0]
    assert (len(exact.token_ids), exact.token_ids[-1], exact.finish_reason) == (6, stop, "stop")


def test_eos_ends_unless_ignored(llm: LLM) -> None:
    prompt = prompts_of([4], llm.engine.vocab_size)[0]
    eos = max(llm.engine.replicas[0].engine.limits.eos_token_ids)
    to_eos = SamplingParams(temperature=0, max_tokens=5, logit_bias={eos: 100})
    output = llm.generate(prompt, to_eos, use_tqdm=False)[0].outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([eos], "stop", None)
    assert tokens_of(llm.generate(prompt, greedy(5, logit_bias={eos: 100}), use_tqdm=False)[0]) == [eos] * 5


def test_n_outputs_differ_and_are_reproducible(llm: LLM) -> None:
    prompt = prompts_of([4], llm.engine.vocab_size)[0]
    params = SamplingParams(n=3, temperature=2.0, seed=4, max_tokens=8)
    outputs = [llm.generate(prompt, params, use_tqdm=False)[0].outputs for _ in range(2)]
    assert [o.index for o in outputs[0]] == [0, 1, 2]
    assert len({tuple(o.token_ids) for o in outputs[0]}) == 3
    assert [o.token_ids for o in outputs[0]] == [o.token_ids for o in outputs[1]]


BAD_REQUESTS = {
    "prompt is empty": ([], {}),
    "prompt_token_ids holds 89": ([1, 89], {}),
    "prompt_token_ids holds -1": ([-1], {}),
    "prompt has 500 tokens": ([1] * 500, {}),
    "max_tokens 4000": ([1], {"max_tokens": 4000}),
    "logprobs 21 is more than max_logprobs 20": ([1], {"logprobs": 21}),
    "stop_token_ids names token 89": ([1], {"stop_token_ids": [5, 89]}),
    "logit_bias names token 300": ([1], {"logit_bias": {300: 1.0}}),
    "stop strings need a tokenizer": ([1], {"stop": "x"}),
}


@pytest.mark.parametrize("message", BAD_REQUESTS)
def test_bad_requests_name_what_was_wrong(llm: LLM, message: str) -> None:
    prompt, options = BAD_REQUESTS[message]
    with pytest.raises(ValueError, match=message):
        llm.engine.submit(prompt, SamplingParams(**options))


def test_prompt_logprobs_of_a_step_that_was_lost_are_scored_again(llm: LLM) -> None:
    """An engine of the test's own over the idle executor: its first chunk is sent and never read."""
    limits, served = llm.engine.replicas[0].engine.limits, llm.engine.replicas[0].engine.scheduler
    scheduler = Scheduler(
        [PagePool(part.pool.num_pages, part.pool.page_size) for part in served.partitions],
        max_num_seqs=llm.engine.replicas[0].executor.plan.num_slots,
        max_num_batched_tokens=served.max_num_batched_tokens,
        max_chunks=served.max_chunks,
    )
    engine = Engine(llm.engine.replicas[0].executor, scheduler, limits)
    prompt = prompts_of([45], limits.vocab_size)[0]["prompt_token_ids"]
    engine.add(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert [chunk.length for chunk in engine.step().schedule.chunks] == [32]
    engine.close()
    scheduler.restart()
    positions = []
    while not engine.is_idle:
        positions += [position for _, position, _ in engine.step().prompt_logprobs]
    assert positions == list(range(1, 45))


def exposed(llm: LLM, name: str) -> float:
    """The sum of the metrics whose names start so."""
    rows = [row for row in llm.engine.metrics.render().decode().splitlines() if row.startswith(name)]
    return sum(float(row.split()[-1]) for row in rows)


def test_metrics_tell_what_happened(llm: LLM) -> None:
    value = functools.partial(exposed, llm)
    names = ("vllm:iteration_tokens_total_sum", "vllm:generation_tokens_total", "vllm:prompt_tokens_total")
    stops = 'vllm:request_success_total{engine="0",finished_reason="length"'
    before = [value(name) for name in names]
    lengths = value(stops)
    llm.generate(prompts_of([7], llm.engine.vocab_size), greedy(5), use_tqdm=False)
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [7 + 5 - 1, 5, 7]
    assert value(stops) == lengths + 1
    compilations = value("paddock:step_compilations_total")
    compile_something = lambda: jax.jit(lambda x: x * 3.25 + 17)(jnp.arange(7.0)).block_until_ready()
    compile_something()
    assert value("paddock:step_compilations_total") == compilations, "it was not the engine that compiled"
    llm.engine.replicas[0]._inbox.put(lambda _: compile_something())
    llm.generate(prompts_of([7], llm.engine.vocab_size), greedy(5), use_tqdm=False)
    assert value("paddock:step_compilations_total") > compilations


def test_an_engine_that_has_rested_does_not_hang(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a request's arrival and its first step, however long there was nothing to do."""
    loop = llm.engine.replicas[0]
    admit, health = loop._inbox.admit, []

    def watched(streams: Any) -> None:
        health.append(loop.health())
        admit(streams)

    monkeypatch.setattr(loop._inbox, "admit", watched)
    monkeypatch.setattr(loop, "_beat", time.monotonic() - 1000)
    llm.generate(prompts_of([7], llm.engine.vocab_size), greedy(2), use_tqdm=False)
    assert health == [None]


def test_the_times_between_tokens_add_up(llm: LLM) -> None:
    """Whether the same sequences go on or one ends, and although nobody follows them token by token."""

    def between() -> tuple[float, float]:
        count, seconds = (exposed(llm, f"vllm:inter_token_latency_seconds_{name}") for name in ("count", "sum"))
        return count, seconds

    (count, seconds), lengths = between(), (4, 9, 9, 20)
    prompts = prompts_of([5, 6, 7, 8], llm.engine.vocab_size)
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    times = [output.times for output in outputs]
    assert between()[0] - count == sum(lengths) - len(lengths)
    assert between()[1] - seconds == pytest.approx(sum(t.last_token - t.first_token for t in times), rel=1e-6)


def test_the_next_step_is_sent_before_the_last_is_read(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    read, dispatch = StepFuture.read, llm.engine.replicas[0].executor.dispatch

    def sending(schedule: Schedule) -> StepFuture:
        calls.append("send")
        return dispatch(schedule)

    def reading(future: StepFuture) -> list:
        calls.append("read")
        return read(future)

    monkeypatch.setattr(llm.engine.replicas[0].executor, "dispatch", sending)
    monkeypatch.setattr(StepFuture, "read", reading)
    llm.generate({"prompt_token_ids": [1, 2, 3]}, greedy(5), use_tqdm=False)
    assert calls == ["send", *["send", "read"] * 4, "read"], "five tokens, five steps, none computed in vain"


def test_only_what_is_in_the_hosts_memory_outlives_its_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the device's allocator has other holes at each step, and CUDA graphs are written anew for the addresses."""
    futures = []
    read = StepFuture.read
    monkeypatch.setattr(StepFuture, "read", lambda future: futures.append(future) or read(future))
    llm.generate(prompts_of([9], llm.engine.vocab_size), greedy(4, prompt_logprobs=1), use_tqdm=False)
    kept = jax.tree.leaves([(future.sampled, [scored for *_, scored in future.prompt_scores]) for future in futures])
    assert len(kept) > len(futures) * len(Sampled._fields)
    assert {array.sharding.memory_kind for array in kept} == {"pinned_host"}
    held = (value for future in futures for value in vars(future).values())
    assert not [value for value in held if isinstance(value, jax.Array)], "all that a future holds was looked at"


def test_a_step_moved_on_is_what_laying_it_out_anew_would_be(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    repeat, moved = Executor._repeat, []

    def compared(executor: Executor, schedule: Schedule) -> Any:
        step = repeat(executor, schedule)
        if step is not None:
            np.testing.assert_array_equal(step.packed, executor._pack(schedule).packed)
            moved.append(schedule)
        return step

    monkeypatch.setattr(Executor, "_repeat", compared)
    llm.generate(prompts_of([5, 9], llm.engine.vocab_size), greedy(12), use_tqdm=False)
    assert len(moved) > 8, "over several pages of four tokens"


def test_a_reset_frees_the_old_cache_first(llm: LLM) -> None:
    executor = llm.engine.replicas[0].executor
    old = [*executor.cache.k, executor.state.page_table]
    executor.reset()
    assert all(array.is_deleted() for array in old)


def test_a_step_that_raises_fails_its_requests_and_no_others(llm: LLM) -> None:
    executor = llm.engine.replicas[0].executor
    original = executor.dispatch
    prompts = prompts_of([5, 5, 5, 5, 5, 5], llm.engine.vocab_size)
    want = [tokens_of(output) for output in llm.generate(prompts, greedy(10), use_tqdm=False)]
    calls = 0

    def failing(schedule):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("planted")
        return original(schedule)

    executor.dispatch = failing
    try:
        streams = [llm.engine.submit(p["prompt_token_ids"], greedy(10), output_kind="final") for p in prompts]
        outcomes = []
        for stream in streams:
            try:
                outcomes.append(next(iter(stream)).outputs[0].token_ids)
            except RequestFailed as error:
                outcomes.append(str(error))
    finally:
        executor.dispatch = original
    assert outcomes[:4] == ["the step that held this request failed: RuntimeError: planted"] * 4
    assert outcomes[4:] == want[4:], "those that waited are served"
    assert_nothing_leaked(llm)
    assert llm.engine.health() is None


def test_a_lost_device_ends_everything_and_says_so(golden: Path) -> None:
    with tiny_llm(golden / "gqa") as llm:

        def broken(*_: object) -> None:
            raise RuntimeError("device lost")

        llm.engine.replicas[0].executor.dispatch = llm.engine.replicas[0].executor.reset = broken
        stream = llm.engine.submit([1, 2], greedy(4))
        with pytest.raises(RequestFailed, match="device lost"):
            next(iter(stream))
        llm.engine.replicas[0]._thread.join(timeout=10)
        assert "device lost" in (llm.engine.health() or "")
        with pytest.raises(EngineDead, match="device lost"):
            llm.engine.submit([1], greedy(4))


def test_shutdown_refuses_new_requests_and_ends_running_ones(golden: Path) -> None:
    llm = tiny_llm(golden / "gqa", max_num_queued_reqs=5)
    stream = llm.engine.submit([1, 2, 3], greedy(100))
    assert stream.get() is not None
    llm.close()
    assert [output.outputs[0].finish_reason for output in stream][-1] == "abort"
    with pytest.raises((EngineBusy, EngineDead)):
        llm.engine.submit([1], greedy(4))
    assert all(array.is_deleted() for array in llm.engine.replicas[0].executor.params.values())
    llm.close()


def test_options_that_cannot_be_had(golden: Path) -> None:
    for message, options in {
        "LLM has no option 'max_seqs'": {"max_seqs": 3},
        "decode_attention 'flash' is unknown": {"decode_attention": "flash"},
        "max_model_len 4096 is more than the 128": {"max_model_len": 4096},
        "fewer than max_model_len 128": {"max_model_len": 128, "kv_cache_memory_bytes": 4096},
        "rules: no rule uses mesh axis 'x'": {"mesh": "x=2"},
        "does not divide over 3 shards": {"mesh": "tensor=3"},
        "block_size must be at least 1": {"block_size": 0},
        "block_size must be of type int, got '16'": {"block_size": "16"},
        "hf_overrides: 'layers' cannot be replaced": {"hf_overrides": {"layers": 2}},
        "max_num_queued_reqs must be at least 1": {"max_num_queued_reqs": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            tiny_llm(golden / "gqa", **options)
