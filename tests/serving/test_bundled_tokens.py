"""The bundled model's greedy tokens, the same on every platform: `bundled_tokens.json` holds what a CPU gave.

`python tests/serving/test_bundled_tokens.py` writes that file anew, after the model was trained again.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
from engines import TokenComparison, margins_of, tokens_of

from paddock.serving import LLM, RequestOutput, SamplingParams

EXPECTED = Path(__file__).with_name("bundled_tokens.json")
PROMPTS = ["ROMEO:\n", "First Citizen:\nBefore we proceed", "KING RICHARD III:\nNow is the winter", "What"]


def generate() -> list[RequestOutput]:
    cache = Path(__file__).parents[2] / "build" / "test-compile-cache"
    options = dict(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=256, compile_cache_dir=str(cache))
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, logprobs=2)
    with LLM(dtype="float32", **options) as llm:
        return llm.generate(PROMPTS, params, use_tqdm=False)


def check() -> None:
    comparison = TokenComparison()
    for output, want in zip(generate(), json.loads(EXPECTED.read_text()), strict=True):
        assert output.prompt == want["prompt"]
        comparison.add(tokens_of(output), want["tokens"], want["margins"])
    comparison.check()


@pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="test_on_gpu is for this platform")
def test_on_cpu() -> None:
    check()


@pytest.mark.gpu
def test_on_gpu() -> None:
    assert jax.devices()[0].platform == "gpu"
    check()


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    rows = [
        {"prompt": o.prompt, "tokens": tokens_of(o), "margins": [round(m, 6) for m in margins_of(o)]}
        for o in generate()
    ]
    EXPECTED.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
