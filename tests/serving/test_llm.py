"""The Python API with text, on the bundled model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from engines import assert_nothing_leaked

from paddock.serving import LLM, SamplingParams
from paddock.serving.request import RequestStream

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
ROMEO = "ROMEO:\nBut, soft! what light"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    cache = Path(__file__).parents[2] / "build" / "test-compile-cache"
    options = dict(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=256, lowering_processes=1)
    with LLM(**options, compile_cache_dir=str(cache)) as llm:
        yield llm


def test_generate_keeps_the_order_and_the_texts(llm: LLM) -> None:
    assert llm.engine.compiling.num_exported > 0, "as the options ask for"
    prompts = [ROMEO, {"prompt_token_ids": llm.tokenizer.encode("JULIET:\n")}, "KING"]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == [ROMEO, None, "KING"]
    for output in outputs:
        completion = output.outputs[0]
        whole = llm.tokenizer.decode(output.prompt_token_ids + completion.token_ids)
        assert whole == llm.tokenizer.decode(output.prompt_token_ids) + completion.text
        assert output.finished
        assert completion.finish_reason == "length"
        assert output.times.arrival <= output.times.scheduled <= output.times.first_token <= output.times.last_token


def test_generate_queues_everything_at_once_and_what_may_become_longest_first(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (replica,) = llm.engine.replicas
    admit, seen = replica.admit, []

    def watched(streams: Sequence[RequestStream]) -> None:
        seen.append([stream.params.max_tokens for stream in streams])
        admit(streams)

    monkeypatch.setattr(replica, "admit", watched)
    params = [dataclasses.replace(GREEDY, max_tokens=count) for count in (2, 5, 3, 5)]
    outputs = llm.generate([ROMEO, "KING", "A", "B"], params, use_tqdm=False)
    assert seen == [[5, 5, 3, 2]]
    assert [output.prompt for output in outputs] == [ROMEO, "KING", "A", "B"]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 5, 3, 5]
    with pytest.raises(ValueError, match="prompt is empty"):
        llm.generate([ROMEO, {"prompt_token_ids": []}], GREEDY, use_tqdm=False)
    assert len(seen) == 1, "one that cannot run keeps the others out of the queue"
    assert_nothing_leaked(llm)


def test_a_stream_joins_to_what_generate_returns(llm: LLM) -> None:
    want = llm.generate(ROMEO, GREEDY, use_tqdm=False)[0].outputs[0]
    pieces = list(llm.stream(ROMEO, GREEDY))
    assert "".join(piece.outputs[0].text for piece in pieces) == want.text
    assert [token for piece in pieces for token in piece.outputs[0].token_ids] == want.token_ids
    assert [piece.finished for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces) > 1


@pytest.mark.parametrize(
    ("kind", "stop", "wakes"), [("delta", None, 24), ("final", None, 1), ("final", "never said", 24)]
)
def test_a_reader_is_woken_no_more_than_it_needs(llm: LLM, kind: str, stop: str | None, wakes: int) -> None:
    """Waking it for every token of 256 sequences takes as long as all else that a step costs in Python."""
    events: list[object] = []
    params = dataclasses.replace(GREEDY, stop=stop)
    stream = llm.engine.submit(ROMEO, params, output_kind=kind, on_event=events.append)
    outputs = list(stream)
    assert outputs[-1].finished
    assert events == [stream] * wakes


def test_leaving_a_stream_ends_the_request(llm: LLM) -> None:
    stream = llm.stream(ROMEO, SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    llm.generate("x", GREEDY, use_tqdm=False)
    assert llm.engine.load() == {"running": 0, "waiting": 0}
    assert_nothing_leaked(llm)


def test_a_stream_that_nobody_begins_is_ended_when_it_is_dropped(llm: LLM) -> None:
    stream = llm.stream(ROMEO, SamplingParams(max_tokens=200, ignore_eos=True))
    del stream
    llm.generate("x", GREEDY, use_tqdm=False)
    assert llm.engine.load() == {"running": 0, "waiting": 0}
    assert_nothing_leaked(llm)


def test_stop_strings_cut_the_text_and_end_the_request(llm: LLM) -> None:
    text = llm.generate(ROMEO, GREEDY, use_tqdm=False)[0].outputs[0].text
    stop = text[9:13]
    cut = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=["never said", stop])
    output = llm.generate(ROMEO, cut, use_tqdm=False)[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == (text[: text.index(stop)], "stop", stop)
    kept = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert llm.generate(ROMEO, kept, use_tqdm=False)[0].outputs[0].text.endswith(stop)


def test_chat_ends_of_its_own_accord_and_has_one_bos(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What say you?"}]
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=200)
    one, two = llm.chat([messages, messages], params, use_tqdm=False)
    assert one.prompt_token_ids.count(llm.tokenizer.bos_token_id) == 1
    assert one.outputs[0].token_ids == two.outputs[0].token_ids
    assert one.outputs[0].finish_reason == "stop"
    assert "</s>" not in one.outputs[0].text


def test_logprobs_come_with_their_texts(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1)
    output = llm.generate(ROMEO, params, use_tqdm=False)[0]
    spelled = "".join(
        candidates[token].decoded_token
        for token, candidates in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
    )
    assert spelled == output.outputs[0].text
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([3], None, "a prompt is a string or"),
        ({"prompt": "x"}, None, "a prompt is a string or"),
        (["x", "y"], [GREEDY], "sampling_params holds 1 entries for 2 prompts"),
        ("x " * 300, None, "but prompt and output together may have 256"),
        ("x" * 100_000, None, "prompt has 100000 characters, more than fit the context of 256 tokens"),
    ],
)
def test_bad_arguments_are_named(llm: LLM, prompts: object, params: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params, use_tqdm=False)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"no such folder|neither a folder"):
        LLM("./nowhere/at-all")
