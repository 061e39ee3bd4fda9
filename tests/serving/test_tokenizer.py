"""Three tokenizer formats against the libraries that define them, and everything that can be wrong with a folder."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from paddock.serving.tokenizer import load_tokenizer
from paddock.serving.tokenizer_json import BYTE_OF_CHARACTER
from paddock.serving.tokenizer_tiktoken import LLAMA3_SPLIT, llama3_special_tokens

CORPUS = [
    "the horse runs over the green hill",
    "a mare and her foal graze in the paddock",
    "They're 1234 years old",
] * 5
TEXTS = [
    "the horse runs",
    "They're in the paddock.\n\n  Two  spaces\tand 12345 digits ",
    " a leading space",
    "naïve 日本語のテスト 한국어 😀👩‍👩‍👧 ∀x",
    "x\x00y",
    " ",
    "",
]
KINDS = ["sentencepiece", "tiktoken", "byte_level", "byte_fallback"]


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def sentencepiece_model(**options: bool) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return out.getvalue()


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([token.content for token in llama3_special_tokens(size).values()])
    bos = ("<|begin_of_text|>", size)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # merges stay within words, as Llama's do
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=70))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(pair) for pair in model["merges"]]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = trained.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    (found["sentencepiece"] / "tokenizer.model").write_bytes(sentencepiece_model())
    levels = byte_level()
    levels.save(str(found["byte_level"] / "tokenizer.json"))
    byte_fallback().save(str(found["byte_fallback"] / "tokenizer.json"))
    # The same vocabulary in tiktoken's format, so that tokenizers' merging is an oracle for tiktoken's.
    size = levels.get_vocab_size(with_added_tokens=False)
    pieces = (bytes(BYTE_OF_CHARACTER[c] for c in levels.id_to_token(i)) for i in range(size))
    lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)]
    (found["tiktoken"] / "tokenizer.model").write_bytes(b"".join(lines))
    return found


@pytest.fixture
def folder(request, folders, tmp_path) -> Path:
    """A copy of the folder of the kind asked for, to be changed freely."""
    return Path(shutil.copytree(folders[request.param], tmp_path / "model"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_with_one_bos(folders, kind, text):
    tokenizer = load_tokenizer(folders[kind])
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1:] == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids) == text
    assert max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_defining_library(folders, text):
    model = sentencepiece.SentencePieceProcessor(model_file=str(folders["sentencepiece"] / "tokenizer.model"))
    assert load_tokenizer(folders["sentencepiece"]).encode(text) == [model.bos_id(), *model.encode(text)]
    for kind in ("byte_level", "byte_fallback"):
        library = tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
        ids = load_tokenizer(folders[kind]).encode(text)
        assert ids == library.encode(text).ids
        assert load_tokenizer(folders[kind]).decode(ids) == library.decode(ids)
    assert load_tokenizer(folders["tiktoken"]).encode(text) == load_tokenizer(folders["byte_level"]).encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_bos_in_the_text_is_not_doubled_and_special_text_is_read(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    bos = tokenizer.special_tokens["bos_token"]
    ids = tokenizer.encode(bos + "the horse" + bos)
    assert ids.count(tokenizer.bos_token_id) == 2
    assert ids[0] == ids[-1] == tokenizer.bos_token_id
    assert ids[1] != tokenizer.bos_token_id
    assert tokenizer.decode(ids) == "the horse"
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith(bos)

    literal = tokenizer.encode(bos + "the horse", parse_special=False)
    assert literal[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in literal[1:]
    assert tokenizer.decode(literal) == bos + "the horse"


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_add_bos_token_of_the_settings_wins(folder):
    write(folder, "tokenizer_config.json", {"add_bos_token": False})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_token_id not in tokenizer.encode("the horse")
    bos, eos = ("<s>", "</s>") if tokenizer.strips_leading_space else ("<|begin_of_text|>", "<|eot_id|>")
    names = {"bos_token": {"content": bos}, "eos_token": eos}
    write(folder, "tokenizer_config.json", {"add_bos_token": True, "add_eos_token": True, **names})
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("the horse")
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert [tokenizer.id_to_piece(i) for i in (ids[0], ids[-1])] == [bos, eos]
    assert tokenizer.encode(f"{bos}the horse{eos}") == ids


@pytest.mark.parametrize("folder", ["byte_level"], indirect=True)
def test_tokenizer_json_without_bos_rule(folder):
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    library.enable_truncation(2)
    library.enable_padding(length=64)
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_token_id is None
    assert tokenizer.decode(tokenizer.encode("the green hill")) == "the green hill"  # neither cut nor padded

    llama = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|begin_of_text|>"}
    write(folder, "tokenizer_config.json", llama)
    assert load_tokenizer(folder).encode("hill")[0] == library.token_to_id("<|begin_of_text|>")


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_bytes(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    ids = tokenizer.encode("the é")
    assert b"".join(map(tokenizer.id_to_bytes, ids[1:])).removeprefix(b" ") == "the é".encode()
    assert tokenizer.id_to_piece(ids[0]) == tokenizer.special_tokens["bos_token"]
    assert tokenizer.id_to_bytes(ids[0]).decode() == tokenizer.special_tokens["bos_token"]
    assert tokenizer.id_to_bytes(ids[-1]) == b"\xa9"  # the letter is in no vocabulary: its bytes are
    for wrong in (-1, tokenizer.vocab_size):
        for call in (tokenizer.id_to_piece, tokenizer.id_to_bytes, lambda token: tokenizer.decode([token])):
            with pytest.raises(ValueError, match=f"token id {wrong} "):
                call(wrong)


def test_pieces_keep_the_vocabularys_spelling(folders):
    spelled = {"sentencepiece": "▁the", "byte_fallback": "▁the", "byte_level": "Ġthe", "tiktoken": " the"}
    for kind, piece in spelled.items():
        tokenizer = load_tokenizer(folders[kind])
        token = tokenizer.encode("in the paddock")[2]
        assert tokenizer.id_to_piece(token) == piece
        assert tokenizer.id_to_bytes(token) == b" the"


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_no_text(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(ValueError, match="must be a string, not int"):
        tokenizer.encode(3)


def added(content: str, **flags: bool) -> dict:
    return {"content": content, "normalized": False, **flags}


@pytest.mark.parametrize("folder", ["sentencepiece", "byte_fallback"], indirect=True)
def test_added_tokens_of_the_settings(folder):
    size = load_tokenizer(folder).vocab_size
    listed = {str(size): added("<|im_start|>", special=True), str(size + 1): added("<tool>")}
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": listed, "eos_token": "<|im_end|>"})
    write(folder, "added_tokens.json", {"<|im_end|>": size + 2, "<tool>": size + 1, "<|im_start|>": size})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.eos_token_id == size + 2
    text = "<|im_start|>the<tool>horse<|im_end|>"
    ids = tokenizer.encode(text)
    assert [i for i in ids if i >= size] == [size, size + 1, size + 2]
    assert tokenizer.decode(ids).replace(" ", "") == "the<tool>horse"
    assert {size, size + 2} <= tokenizer.special_ids
    assert size + 1 not in tokenizer.special_ids
    literal = tokenizer.encode(text, parse_special=False)
    assert [i for i in literal if i >= size] == [size + 1]


@pytest.mark.parametrize("folder", ["sentencepiece"], indirect=True)
def test_added_tokens_take_their_spaces_and_longest_match_wins(folder):
    size = load_tokenizer(folder).vocab_size
    flags = [added("<a>", lstrip=True), added("<b>", rstrip=True), added("foal", single_word=True), added("<a><a>")]
    listed = {str(size + i): entry for i, entry in enumerate(flags)}
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": listed})
    tokenizer = load_tokenizer(folder)

    def parts(text: str) -> list[str]:
        return [tokenizer.id_to_piece(i) for i in tokenizer.encode(text, add_special_tokens=False)]

    assert parts("the  <a>") == parts("the<a>") == ["▁the", "<a>"]
    assert parts("<b> \n the") == ["<b>", "▁the"]
    assert "foal" in parts("a foal.")
    assert "foal" not in parts("a foals")
    assert parts("<a><a><a>") == ["<a><a>", "<a>"]


@pytest.mark.parametrize("folder", ["sentencepiece"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({}, ["<s>", "▁the", "</s>", "▁the"]),
        ({"legacy": True}, ["<s>", "▁the", "</s>", "▁the"]),
        ({"legacy": False}, ["<s>", "the", "</s>", "the"]),
    ],
)
def test_sentencepiece_space_after_special_tokens(folder, settings, pieces):
    write(folder, "tokenizer_config.json", settings)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("<s>the</s>the")
    spelled = " ".join(tokenizer.id_to_piece(i) for i in ids)
    assert spelled.replace("t he", "the").split() == pieces  # without the space, "the" is two pieces
    assert tokenizer.id_to_bytes(tokenizer.encode("the")[1]) == b" the"


@pytest.mark.parametrize("folder", ["sentencepiece"], indirect=True)
def test_sentencepiece_without_prefix_space(folder):
    write(folder, "tokenizer_config.json", {"add_prefix_space": False})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.id_to_bytes(tokenizer.encode(" the")[1]) == b" the"
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"
    assert tokenizer.id_to_bytes(tokenizer.encode("the")[1])[:1] == b"t"


def test_sentencepiece_with_spaces_behind_words(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(treat_whitespace_as_suffix=True))
    with pytest.raises(ValueError, match="spaces behind words are not supported"):
        load_tokenizer(tmp_path)


def test_llama3_special_tokens_have_their_published_ids():
    tokens = llama3_special_tokens(128_000)
    expected = {
        128_000: "<|begin_of_text|>",
        128_001: "<|end_of_text|>",
        128_002: "<|reserved_special_token_0|>",
        128_004: "<|finetune_right_pad_id|>",
        128_005: "<|reserved_special_token_2|>",
        128_006: "<|start_header_id|>",
        128_007: "<|end_header_id|>",
        128_008: "<|eom_id|>",
        128_009: "<|eot_id|>",
        128_010: "<|python_tag|>",
        128_011: "<|reserved_special_token_3|>",
        128_255: "<|reserved_special_token_247|>",
    }
    assert {token: tokens[token].content for token in expected} == expected
    assert len(tokens) == 256
    assert all(token.special for token in tokens.values())


@pytest.mark.parametrize("folder", ["tiktoken"], indirect=True)
def test_tiktoken_names_from_the_settings(folder):
    base = load_tokenizer(folder).bos_token_id
    listed = {str(base): added("<begin>", special=True), str(base + 1): added("<end>", special=True)}
    settings = {"added_tokens_decoder": listed, "bos_token": "<begin>", "eos_token": "<end>"}
    write(folder, "tokenizer_config.json", settings)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (base, base + 1, base + 2)
    assert tokenizer.encode("<begin>the<end>")[-1] == base + 1
    assert len(tokenizer.encode("<|eot_id|>")) > 2  # not a token of this folder


@pytest.mark.parametrize("character", [" ", "a"])
def test_tiktoken_survives_a_megabyte_of_one_character(folders, character):
    tokenizer = load_tokenizer(folders["tiktoken"])
    text = character * 1_000_000 + "!"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer in .*: looked for tokenizer.json and tokenizer.model") as error:
        load_tokenizer(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(error.value)


@pytest.mark.parametrize("folder", KINDS, indirect=True)
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_truncated_file_is_named(folder, keep):
    (path,) = folder.iterdir()
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match="tokenizer") as error:
        load_tokenizer(folder)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("folder", ["tiktoken"], indirect=True)
def test_tiktoken_cut_at_a_line(folder):
    path = folder / "tokenizer.model"
    lines = path.read_bytes().splitlines(keepends=True)
    listed = {str(len(lines)): added("<|begin_of_text|>", special=True)}
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": listed})
    path.write_bytes(b"".join(lines[:-3]))
    with pytest.raises(ValueError, match=f"ends at rank {len(lines) - 4}.*has id {len(lines)}"):
        load_tokenizer(folder)
    path.write_bytes(b"".join(lines[:5] + lines[6:]))
    with pytest.raises(ValueError, match=r"tokenizer.model, line 6: .*rank 6 follows 4"):
        load_tokenizer(folder)


@pytest.mark.parametrize("folder", ["sentencepiece"], indirect=True)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", '{"add_bos', r"tokenizer_config.json is not readable JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config.json holds a JSON list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "malformed"),
        ("added_tokens.json", '{"a": "b"}', "malformed"),
        ("tokenizer_config.json", '{"bos_token": "<nope>"}', r"bos_token '<nope>' is not in the vocabulary"),
        ("special_tokens_map.json", '{"eos_token": {"content": "<no>"}}', r"eos_token '<no>' is not in the vocabulary"),
    ],
)
def test_bad_settings_are_named(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("folder", ["byte_level"], indirect=True)
def test_tokenizer_json_that_does_not_fit(folder):
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": {"9999": added("<tool>")}})
    with pytest.raises(ValueError, match=r"added token '<tool>' has id \d+, the settings say 9999"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.decoder = decoders.WordPiece()
    library.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json: decoder .*WordPiece.* is not supported"):
        load_tokenizer(folder)
