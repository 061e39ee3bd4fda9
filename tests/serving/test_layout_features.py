"""Everything that a request may ask for, in a pipeline and over partitions: the same as on one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import assert_nothing_leaked, assert_same_tokens, greedy, prompts_of, tiny_llm, tokens_of

from paddock.model import Dims, LlamaConfig
from paddock.serving import LLM, RequestOutput, SamplingParams, resolve
from paddock.serving.bucket import BucketTable
from paddock.serving.errors import RequestFailed
from paddock.serving.kv_cache import page_bytes
from paddock.serving.step_plan import StepPlan
from paddock.serving.step_planning import plan_steps
from paddock.sharding import Layout

LENGTHS = (5, 1, 40, 13, 4, 27, 3, 8)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, max_tokens=12, logprobs=1)
KINDS = {
    "penalties": [greedy(presence_penalty=0.5, frequency_penalty=0.4, repetition_penalty=1.2)] * 8,
    "bias and stops": [
        greedy(logit_bias={3: 5.0, 7: -50.0}, min_tokens=6, stop_token_ids=[3, 11, 20 + i]) for i in range(8)
    ],
    "prompt logprobs": [greedy(6, prompt_logprobs=2) for _ in range(8)],
    # Some give way when all that is left of them to compute is on its way through the stages.
    "prompts alone": [greedy(1, prompt_logprobs=2) if i % 2 else greedy(24) for i in range(24)],
    "seeds": [dataclasses.replace(SAMPLED, seed=100 + i) for i in range(8)],
}


@pytest.fixture(scope="module")
def one_device(golden: Path) -> Iterator[dict[str, list[RequestOutput]]]:
    with tiny_llm(golden / "gqa") as llm:
        yield {kind: llm.generate(prompts_for(kind, llm), params, use_tqdm=False) for kind, params in KINDS.items()}


def prompts_for(kind: str, llm: LLM) -> list[Any]:
    return prompts_of(LENGTHS * (len(KINDS[kind]) // len(LENGTHS)), llm.engine.vocab_size)


def with_two_samplers(*args: Any, **options: Any) -> tuple[StepPlan, BucketTable]:
    """As on a GPU: no branches, and the sampler's slow half in programs of their own."""
    plan, buckets = plan_steps(*args, **options)
    return dataclasses.replace(plan, branches=False), dataclasses.replace(buckets, full=False)


@pytest.fixture(scope="module", params=["pipe=2,tensor=2", "x=2", "tensor=2, two samplers"])
def split(golden: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """Few pages: some sequences are preempted, also with rows between stages."""
    mesh, _, two_samplers = request.param.partition(", ")
    rules = "batch=x" if mesh == "x=2" else ""
    config, layout = LlamaConfig.from_file(golden / "gqa" / "config.json"), Layout.build(mesh, rules)
    cache = 20 * page_bytes(Dims.of(config, layout), layout, 4, "float32")
    with pytest.MonkeyPatch.context() as patch:
        if two_samplers:
            patch.setattr(resolve, "plan_steps", with_two_samplers)
        llm = tiny_llm(golden / "gqa", mesh=mesh, rules=rules, max_model_len=68, kv_cache_memory_bytes=cache)
    with llm:
        assert any(isinstance(key, tuple) for key in llm.engine.replicas[0].executor.compiled) == bool(two_samplers)
        yield llm


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_on_one_device(split: LLM, one_device: dict[str, list[RequestOutput]], kind: str) -> None:
    got = split.generate(prompts_for(kind, split), KINDS[kind], use_tqdm=False)
    want = one_device[kind]
    if kind == "seeds":
        assert [tokens_of(output) for output in got] == [tokens_of(output) for output in want]
    elif kind == "bias and stops":
        assert [tokens_of(output) for output in got] == [tokens_of(output) for output in want]
        reasons = [(o.outputs[0].finish_reason, o.outputs[0].stop_reason) for o in got]
        assert reasons == [(o.outputs[0].finish_reason, o.outputs[0].stop_reason) for o in want]
        assert any(reason == "stop" for reason, _ in reasons)
        assert all(len(tokens_of(output)) >= 6 for output in got)
    else:
        assert_same_tokens(got, want)
    if kind.startswith("prompt"):
        for one, other in zip(got, want, strict=True):
            if other.prompt_logprobs is None:
                continue
            assert len(one.prompt_logprobs) == len(one.prompt_token_ids)
            for mine, theirs in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
                assert mine.keys() == theirs.keys()
                assert all(mine[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-4) for token in mine)
    assert_nothing_leaked(split)


def test_sequences_were_preempted_on_the_way(split: LLM) -> None:
    split.generate(prompts_of(LENGTHS, split.engine.vocab_size), greedy(), use_tqdm=False)
    assert split.engine.replicas[0].engine.scheduler.num_preemptions > 0


def test_aborts_give_everything_back(split: LLM) -> None:
    streams = [
        split.engine.submit(prompt["prompt_token_ids"], greedy(25))
        for prompt in prompts_of(LENGTHS, split.engine.vocab_size, seed=3)
    ]
    next(iter(streams[0]))
    for stream in streams:
        stream.abort()
    reasons = {output.outputs[0].finish_reason for stream in streams for output in stream}
    assert "abort" in reasons
    want = tokens_of(split.generate({"prompt_token_ids": [1, 2, 3]}, greedy(), use_tqdm=False)[0])
    assert len(want) == 24
    assert_nothing_leaked(split)


def test_a_step_that_raises_costs_nobody_else_anything(split: LLM) -> None:
    """What was between stages is computed again: its rows are lost with the cache."""
    prompts = prompts_of([5] * 8, split.engine.vocab_size)
    want = [tokens_of(output) for output in split.generate(prompts, greedy(10), use_tqdm=False)]
    executor = split.engine.replicas[0].executor
    original, calls = executor.dispatch, 0

    def failing(schedule):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise RuntimeError("planted")
        return original(schedule)

    executor.dispatch = failing
    try:
        streams = [split.engine.submit(p["prompt_token_ids"], greedy(10), output_kind="final") for p in prompts]
        outcomes = []
        for stream in streams:
            try:
                outcomes.append(next(iter(stream)).outputs[0].token_ids)
            except RequestFailed:
                outcomes.append(None)
    finally:
        executor.dispatch = original
    assert None in outcomes
    assert any(outcomes)
    assert [tokens for tokens in outcomes if tokens] == [w for w, tokens in zip(want, outcomes, strict=True) if tokens]
    assert split.engine.health() is None
    assert_nothing_leaked(split)
