"""`deterministic`: the same bits alone, in any batch, and after preemption."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import greedy, prompts_of, tiny_llm

from paddock.model import Dims, LlamaConfig
from paddock.serving import RequestOutput, SamplingParams
from paddock.serving.kv_cache import page_bytes
from paddock.sharding import Layout

LENGTHS = (5, 1, 40, 13, 4, 27, 3, 8)


def bits(output: RequestOutput) -> list[tuple[int, dict[int, float]]]:
    one = output.outputs[0]
    logprobs = [{token: entry.logprob for token, entry in step.items()} for step in one.logprobs]
    return list(zip(one.token_ids, logprobs, strict=True))


@pytest.mark.parametrize("mesh", ["", "tensor=2"])
def test_the_same_bits_alone_and_in_any_batch(golden: Path, mesh: str) -> None:
    config = LlamaConfig.from_file(golden / "gqa" / "config.json")
    layout = Layout.build(mesh)
    cache = 20 * page_bytes(Dims.of(config, layout), layout, 4, "float32")
    options = dict(deterministic=True, mesh=mesh, max_model_len=68, kv_cache_memory_bytes=cache)
    with tiny_llm(golden / "gqa", **options) as llm:
        prompts = prompts_of(LENGTHS, llm.engine.vocab_size)
        params = [
            greedy(20) if i % 2 else SamplingParams(temperature=0.9, top_p=0.9, seed=i, max_tokens=20, logprobs=2)
            for i in range(8)
        ]
        alone = [llm.generate(p, one, use_tqdm=False)[0] for p, one in zip(prompts, params, strict=True)]
        scheduler = llm.engine.replicas[0].engine.scheduler
        assert scheduler.num_preemptions == 0
        together = llm.generate(prompts, params, use_tqdm=False)
        assert scheduler.num_preemptions > 0
        assert len(llm.engine.replicas[0].executor.programs.packings) == 1
    assert [bits(output) for output in together] == [bits(output) for output in alone]


def test_attention_that_depends_on_the_batch_is_refused(golden: Path) -> None:
    with pytest.raises(ValueError, match="decodes by the prefill attention, which must be blocked or reference"):
        tiny_llm(golden / "gqa", deterministic=True, decode_attention="mosaic")
