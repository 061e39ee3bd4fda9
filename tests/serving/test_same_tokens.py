"""A request's greedy tokens do not depend on how it was served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engines import (
    TokenComparison,
    assert_nothing_leaked,
    assert_same_tokens,
    greedy,
    margins_of,
    prompts_of,
    tiny_llm,
    tokens_of,
)

from paddock.serving import LLM, RequestOutput, SamplingParams
from paddock.serving.page_pool import PagePool

LENGTHS = (5, 1, 40, 13, 4, 27, 3, 8)
PENALIZED = greedy(presence_penalty=0.5, frequency_penalty=0.4, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def llm(golden: Path) -> LLM:
    with tiny_llm(golden / "gqa") as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[RequestOutput]:
    """Each prompt served by itself: the reference of the other tests."""
    prompts = prompts_of(LENGTHS, llm.engine.vocab_size)
    return [llm.generate(prompt, greedy(), use_tqdm=False)[0] for prompt in prompts]


@pytest.fixture(scope="module")
def alone_penalized(llm: LLM) -> list[RequestOutput]:
    prompts = prompts_of(LENGTHS, llm.engine.vocab_size)
    return [llm.generate(prompt, PENALIZED, use_tqdm=False)[0] for prompt in prompts]


@pytest.mark.parametrize("case", ["gqa", "mqa_tied", "biases", "dynamic", "llama3_tied"])
def test_transformers_tokens(golden: Path, case: str) -> None:
    """Those of a full recompute; dynamic RoPE depends on the length, and there those of cached decoding."""
    key = "stepwise" if case == "dynamic" else "greedy"
    expected = np.load(golden / case / "expected.npz")
    comparison = TokenComparison()
    with tiny_llm(golden / case, max_num_seqs=2) as llm:
        count = sum(name.startswith("prompt_") for name in expected.files)
        prompts = [{"prompt_token_ids": expected[f"prompt_{i}"].tolist()} for i in range(count)]
        for i, output in enumerate(llm.generate(prompts, greedy(), use_tqdm=False)):
            margins = expected[f"{key}_margin_{i}" if case == "dynamic" else f"margin_{i}"].tolist()
            comparison.add(tokens_of(output), expected[f"{key}_{i}"].tolist(), margins)
    comparison.check()


def test_in_a_batch(llm: LLM, alone: list[RequestOutput]) -> None:
    """Eight sequences of four slots: some join when others leave."""
    prompts = [{"prompt_token_ids": output.prompt_token_ids} for output in alone]
    assert_same_tokens(llm.generate(prompts, greedy(), use_tqdm=False), alone)


def test_while_others_join_and_leave_at_random(llm: LLM, alone: list[RequestOutput]) -> None:
    rng = np.random.default_rng(1)
    streams = []
    for output in alone:
        noise = prompts_of([int(rng.integers(1, 30))], llm.engine.vocab_size, int(rng.integers(1000)))[0]
        params = SamplingParams(temperature=1.0, max_tokens=int(rng.integers(1, 20)), top_k=int(rng.integers(0, 9)))
        other = llm.engine.submit(noise["prompt_token_ids"], params)
        streams.append(llm.engine.submit(output.prompt_token_ids, greedy(), output_kind="final"))
        if rng.random() < 0.5:
            other.abort()
    assert_same_tokens([next(iter(stream)) for stream in streams], alone)


def test_under_preemption(
    llm: LLM,
    alone: list[RequestOutput],
    alone_penalized: list[RequestOutput],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens and penalty counts are rebuilt when a sequence is computed again."""
    prompts = [{"prompt_token_ids": output.prompt_token_ids} for output in alone]
    scheduler = llm.engine.replicas[0].engine.scheduler
    # Twenty pages, page 0 included, are little more than the longest sequence alone needs.
    monkeypatch.setattr(scheduler.partitions[0], "pool", PagePool(20, 4))
    before = scheduler.num_preemptions
    outputs = llm.generate(prompts, greedy(), use_tqdm=False)
    assert scheduler.num_preemptions > before + 3
    penalized = llm.generate(prompts, PENALIZED, use_tqdm=False)
    assert_nothing_leaked(llm)
    assert_same_tokens(outputs, alone)
    assert_same_tokens(penalized, alone_penalized)


@pytest.mark.parametrize("options", [{"block_size": 16, "max_num_batched_tokens": 7}, {"block_size": 1}], ids=str)
def test_any_page_and_chunk_size(golden: Path, alone: list[RequestOutput], options: dict[str, int]) -> None:
    prompts = [{"prompt_token_ids": output.prompt_token_ids} for output in alone]
    with tiny_llm(golden / "gqa", max_num_seqs=2, **options) as llm:
        assert_same_tokens(llm.generate(prompts, greedy(), use_tqdm=False), alone)


@pytest.mark.parametrize("options", [{"mesh": "tensor=2"}, {"tensor_parallel_size": 4}], ids=str)
def test_tensor_parallel(golden: Path, alone: list[RequestOutput], options: dict[str, int | str]) -> None:
    """The weights and the cache are really split, and the tokens are the single device's."""
    prompts = [{"prompt_token_ids": output.prompt_token_ids} for output in alone]
    with tiny_llm(golden / "gqa", max_num_seqs=2, **options) as llm:
        assert_same_tokens(llm.generate(prompts, greedy(), use_tqdm=False), alone)
        executor = llm.engine.replicas[0].executor
        shards = executor.plan.layout.mesh.size
        local = {name: x.sharding.shard_shape(x.shape) for name, x in executor.params.items()}
        for name in ("layers.0.qkv", "layers.1.out", "layers.0.gate_up", "layers.1.down"):
            axis = [i for i, (a, b) in enumerate(zip(local[name], executor.params[name].shape, strict=True)) if a != b]
            assert len(axis) == 1
            assert local[name][axis[0]] * shards == executor.params[name].shape[axis[0]]
        assert local["embed"][0] == -(-89 // shards)
        pool = executor.cache.k[0]
        assert pool.sharding.shard_shape(pool.shape)[1] * shards == pool.shape[1]
        assert all(len(x.sharding.device_set) == shards for x in executor.params.values())


def test_seeded_sampling_is_the_same_alone_and_in_any_batch(llm: LLM) -> None:
    prompts = prompts_of(LENGTHS, llm.engine.vocab_size, seed=7)
    params = [SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=100 + i, max_tokens=12) for i in range(8)]
    alone = [llm.generate(p, one, use_tqdm=False)[0] for p, one in zip(prompts, params, strict=True)]
    together = llm.generate(prompts, params, use_tqdm=False)
    assert [tokens_of(output) for output in together] == [tokens_of(output) for output in alone]
    other_seed = llm.generate(prompts[0], SamplingParams(temperature=5.0, seed=1, max_tokens=12), use_tqdm=False)[0]
    same_seed = llm.generate(prompts[0], SamplingParams(temperature=5.0, seed=2, max_tokens=12), use_tqdm=False)[0]
    assert tokens_of(other_seed) != tokens_of(same_seed)


def test_margins_are_seen(alone: list[RequestOutput]) -> None:
    """The comparison above would be empty talk if margins were not real numbers."""
    assert all(margin >= 0 for output in alone for margin in margins_of(output))
    assert len({round(m, 6) for output in alone for m in margins_of(output)}) > 50
