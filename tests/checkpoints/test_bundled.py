"""The bundled model is a Hugging Face folder like any other, and its card says how good it is."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from paddock.checkpoints import GenerationConfig, bundled_model, load
from paddock.model import LlamaConfig, param_specs
from paddock.serving.chat_template import ChatTemplate
from paddock.serving.tokenizer import load_tokenizer
from paddock.sharding import Layout

FOLDER = bundled_model()
EXAMPLES = Path(__file__).parents[2] / "examples"
BAR = 2.4  # bits per byte


@pytest.fixture(scope="module")
def config() -> LlamaConfig:
    return LlamaConfig.from_file(FOLDER / "config.json")


def test_it_is_a_small_llama_with_grouped_queries(config: LlamaConfig) -> None:
    parameters = sum(spec.num_bytes for spec in param_specs(config, dtype="uint8").values())
    assert 3_000_000 <= parameters <= 6_000_000
    assert 1 <= config.num_kv_heads < config.num_heads
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12_000_000


def test_its_weights_load_and_are_finite(config: LlamaConfig) -> None:
    params = load(FOLDER, config, Layout.build(), "float32")
    assert params.keys() == param_specs(config).keys()
    for name, value in params.items():
        assert bool(jnp.isfinite(value).all()), name
        assert float(np.std(value)) > 0, name


def test_its_tokenizer_gives_back_any_text(config: LlamaConfig) -> None:
    tokenizer = load_tokenizer(FOLDER)
    text = "KATHARINA:\nWell  aim'd,\n\n naïve 🙂 漢字\n"
    ids = tokenizer.encode(text)
    assert ids[0] == config.bos_token_id
    assert max(ids) < config.vocab_size
    assert tokenizer.decode(ids) == text


def test_a_chat_becomes_speeches_that_end_with_the_end_token(config: LlamaConfig) -> None:
    tokenizer = load_tokenizer(FOLDER)
    messages = [{"role": "system", "content": "It is night."}, {"role": "user", "content": "Who calls?"}]
    prompt = ChatTemplate.load(FOLDER, tokenizer).render(messages)
    assert prompt == "<s>Chorus:\nIt is night.</s>ROMEO:\nWho calls?</s>JULIET:\n"
    ids = tokenizer.encode(prompt)
    assert ids.count(config.bos_token_id) == 1
    assert [i for i in ids if i in config.eos_token_ids] == list(config.eos_token_ids) * 2
    assert set(config.eos_token_ids) <= set(GenerationConfig.from_folder(FOLDER, config).eos_token_ids)


def card_rows() -> dict[str, float]:
    """Bits per byte by the name of the row, as the card says them."""
    rows = re.findall(r"^\| \**([^|]*?)\** \| \**([\d.]+)\** \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    return {name: float(value) for name, value in rows if name.startswith(("this model", "byte trigram", "xz"))}


def test_the_card_states_bits_per_byte_beside_its_baselines() -> None:
    rows = card_rows()
    ours = rows.pop("this model")
    assert ours <= BAR
    assert len(rows) == 3
    assert ours < min(rows.values())
    assert len(re.findall(r"^Prompt `.*`, seed \d+:$", (FOLDER / "README.md").read_text(), re.MULTILINE)) == 3


def test_pieces_of_the_held_out_text_score_what_the_card_says(
    config: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worse model under an old card fails.

    Six pieces from all over the last 5%, for its plays differ in how hard they are (1.5 to 2.9 bits per byte); 9 of
    56 KB, so near the card's number but not on it.
    """
    monkeypatch.syspath_prepend(EXAMPLES)
    from demo_data import TEXT, split
    from demo_eval import bits_per_byte

    held_out = split(TEXT.read_text())[2]
    pieces = [held_out[len(held_out) * i // 6 :][:1500] for i in range(6)]
    params, tokenizer = load(FOLDER, config, Layout.build(), "float32"), load_tokenizer(FOLDER)
    scores = [bits_per_byte(config, params, tokenizer.encode(piece), len(piece.encode())) for piece in pieces]
    measured = float(np.mean(scores))
    assert measured <= BAR
    assert abs(measured - card_rows()["this model"]) <= 0.15
