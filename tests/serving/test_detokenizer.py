"""Text token by token against decoding at once, and no broken character on the way."""

from __future__ import annotations

import base64
import io
import itertools
import json

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from paddock.serving.detokenizer import Detokenizer
from paddock.serving.tokenizer import Tokenizer, load_tokenizer

TEXT = "the horse 日本語 😀👩‍👩‍👧 naïve ∀x  two\n"


@pytest.fixture(scope="module", params=["sentencepiece", "tiktoken"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sentencepiece":
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the horse runs over the green hill"] * 5),
            model_writer=out,
            model_type="bpe",
            vocab_size=290,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        model = out.getvalue()
    else:
        # The last two: a token that ends inside a character and one that begins inside one.
        pieces = [*(bytes([byte]) for byte in range(256)), b"th", b"the", b" the", b" \xe6\x97", b"\xa5\xe6"]
        model = b"".join(base64.b64encode(piece) + b" %d\n" % i for i, piece in enumerate(pieces))
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    return load_tokenizer(folder)


def test_whole_characters_only(tokenizer):
    ids = tokenizer.encode(TEXT)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add([token]) for token in ids]
    assert detokenizer.finish() == ""
    assert "".join(pieces) == TEXT == tokenizer.decode(ids)
    assert "😀" in pieces
    assert "".join(pieces[: len(ids) // 2])  # text flows on the way, not all at the end
    assert pieces.count("") > 8  # and waits while a character lacks bytes


def test_unfinished_character_is_flushed(tokenizer):
    ids = tokenizer.encode("ab😀")[:-1]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.add(ids) == "ab"
    assert detokenizer.finish() == "\ufffd"
    assert tokenizer.decode(ids) == "ab\ufffd"


@given(data=st.data())
def test_any_tokens_in_any_pieces_equal_decoding_at_once(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    skip = data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    edges = [0, *cuts, len(ids)]
    pieces = [detokenizer.add(ids[a:b]) for a, b in itertools.pairwise(edges)]
    assert "".join([*pieces, detokenizer.finish()]) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(data=st.data())
def test_output_continues_the_prompt(tokenizer, data):
    prompt = tokenizer.encode(data.draw(st.text(alphabet=" theé😀", max_size=8)))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    detokenizer = Detokenizer(tokenizer, prompt_ids=prompt)
    text = "".join([detokenizer.add([token]) for token in ids]) + detokenizer.finish()
    assert text == tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


def test_space_between_prompt_and_output(tokenizer):
    hello, world = tokenizer.encode("hello"), tokenizer.encode(" the", add_special_tokens=False)[-1:]
    assert tokenizer.id_to_bytes(world[0]) == b" the"
    assert Detokenizer(tokenizer, prompt_ids=hello).add(world) == " the"
    assert Detokenizer(tokenizer, prompt_ids=hello[:1]).add(world) == tokenizer.decode(world)
    assert tokenizer.decode(world) == ("the" if tokenizer.strips_leading_space else " the")


def test_output_finishes_the_prompts_character(tokenizer):
    ids = tokenizer.encode("horse 😀!")
    for cut in (2, 3, 4):
        detokenizer = Detokenizer(tokenizer, prompt_ids=ids[:-cut])
        assert [detokenizer.add([token]) for token in ids[-cut:]][-2:] == ["😀", "!"]


def test_special_tokens_show_only_when_asked_for(tokenizer):
    ids = [*tokenizer.encode("ab"), tokenizer.eos_token_id]
    eos = tokenizer.special_tokens["eos_token"]
    assert Detokenizer(tokenizer).add(ids) == "ab"
    assert Detokenizer(tokenizer, skip_special_tokens=False, prompt_ids=ids[:-2]).add(ids[-2:]) == "b" + eos


def test_each_token_is_converted_once(tokenizer, monkeypatch):
    converted: list[int] = []
    original = type(tokenizer).id_to_bytes

    def counted(self: Tokenizer, token: int) -> bytes:
        converted.append(token)
        return original(self, token)

    monkeypatch.setattr(type(tokenizer), "id_to_bytes", counted)
    ids = tokenizer.encode(TEXT * 20, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, prompt_ids=ids)
    assert len(converted) <= 3  # of the prompt only its end
    converted.clear()
    for token in ids:
        detokenizer.add([token])
    assert converted == ids


def test_ids_outside_the_vocabulary(tokenizer):
    with pytest.raises(ValueError, match=f"token id {tokenizer.vocab_size} "):
        Detokenizer(tokenizer).add([tokenizer.vocab_size])
