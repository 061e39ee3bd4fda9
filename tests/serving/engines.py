"""Tiny engines for tests, and how their tokens are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from http_client import wait_until

from paddock.serving import LLM, RequestOutput, SamplingParams
from paddock.serving.engine import Engine

NEAR_TIE = 1e-4


def tiny_llm(folder: Path, **options: Any) -> LLM:
    """Four sequences at once, 32 tokens a step, pages of 4 tokens: everything happens within a few steps."""
    defaults = dict(
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_seqs=4,
        max_num_batched_tokens=32,
        block_size=4,
        kv_cache_memory_bytes=2**20,
        compile_cache_dir=str(Path(__file__).parents[2] / "build" / "test-compile-cache"),
    )
    return LLM(str(folder), **{**defaults, **options})


def greedy(max_tokens: int = 24, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=2, **options)


def prompts_of(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(seed)
    return [{"prompt_token_ids": rng.integers(0, vocab, length).tolist()} for length in lengths]


def tokens_of(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def margins_of(output: RequestOutput) -> list[float]:
    """How far the most likely token was ahead of the next, in logits, at each position."""
    margins = []
    for candidates in output.outputs[0].logprobs or []:
        first, second = sorted((entry.logprob for entry in candidates.values()), reverse=True)[:2]
        margins.append(first - second)
    return margins


class TokenComparison:
    """Compares up to the first near-tie of the reference; `check` sees that nearly everything was compared."""

    def __init__(self) -> None:
        self.compared = self.total = 0

    def add(self, got: Sequence[int], want: Sequence[int], margins: Sequence[float]) -> None:
        assert len(got) == len(want)
        ties = [i for i, margin in enumerate(margins) if margin < NEAR_TIE]
        end = ties[0] if ties else len(want)
        assert list(got[:end]) == list(want[:end])
        self.compared += end
        self.total += len(want)

    def check(self) -> None:
        assert self.compared >= 0.95 * self.total


def assert_same_tokens(got: Sequence[RequestOutput], want: Sequence[RequestOutput]) -> None:
    comparison = TokenComparison()
    for one, other in zip(got, want, strict=True):
        comparison.add(tokens_of(one), tokens_of(other), margins_of(other))
    comparison.check()


def assert_nothing_leaked(llm: LLM) -> None:
    """All requests are over, but a step of one that stopped may still be on its way: its slot comes back with it."""
    for replica in llm.engine.replicas:
        with contextlib.suppress(AssertionError):
            wait_until(lambda engine=replica.engine: engine.is_idle and _is_whole(engine))
        replica.engine.scheduler.check_idle()


def _is_whole(engine: Engine) -> bool:
    try:
        engine.scheduler.check_idle()
    except RuntimeError:
        return False
    return True
