"""Run as a program: process 0 of several, as a user's script might be. Its last line is what came out, in JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from engines import greedy, margins_of, prompts_of, tokens_of

from paddock.serving import LLM, SamplingParams

LENGTHS = (5, 13, 1, 20, 7, 9)


def mixed_batch(llm: LLM) -> dict[str, Any]:
    """Requests that join while others run, are aborted at some point, or sample with seeds nobody gave; the tokens of
    those that were let be, with margins."""
    engine = llm.engine
    kept = []
    for prompt in prompts_of(LENGTHS, engine.vocab_size):
        noise = SamplingParams(temperature=1.0, max_tokens=6, n=2, logit_bias={3: -100.0}, ignore_eos=True)
        other = engine.submit(prompt["prompt_token_ids"][:3], noise)
        kept.append(engine.submit(prompt["prompt_token_ids"], greedy(), output_kind="final"))
        if len(kept) % 2:
            next(iter(other))  # it runs by now
            other.abort()
    outputs = [next(iter(stream)) for stream in kept]
    return {
        "tokens": [tokens_of(output) for output in outputs],
        "margins": [margins_of(output) for output in outputs],
        "preemptions": engine.replicas[0].engine.scheduler.num_preemptions,
    }


if __name__ == "__main__":
    with LLM(**json.loads(sys.argv[1])) as llm:
        print(json.dumps(mixed_batch(llm)))
