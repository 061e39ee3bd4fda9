"""The bundled model is a Hugging Face folder like any other, and its card says how good it is."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

from paddock.checkpoints import GenerationConfig, bundled_model, load
from paddock.model import LlamaConfig, param_specs
from paddock.serving.chat_template import ChatTemplate
from paddock.serving.tokenizer import load_tokenizer
from paddock.sharding import Layout

FOLDER = bundled_model()


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


def test_the_card_states_bits_per_byte_beside_its_baselines() -> None:
    card = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| \**([^|]*?)\** \| \**([\d.]+)\** \|$", card, re.MULTILINE)
    ours, *baselines = [float(value) for name, value in rows if name.startswith(("this model", "byte trigram", "xz"))]
    assert ours <= 2.4
    assert len(baselines) == 3
    assert ours < min(baselines)
    assert len(re.findall(r"^Prompt `.*`, seed \d+:$", card, re.MULTILINE)) == 3
