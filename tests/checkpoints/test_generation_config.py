"""generation_config.json: where to stop and how to sample by default."""

from __future__ import annotations

import json
import re

import pytest

from paddock.checkpoints import GenerationConfig


def read(folder, config, **fields) -> GenerationConfig:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return GenerationConfig.from_folder(folder, config)


def test_llama_31_instruct_has_three_ends(tmp_path, config):
    said = read(
        tmp_path,
        config,
        bos_token_id=128000,
        do_sample=True,
        eos_token_id=[128001, 128008, 128009],
        temperature=0.6,
        top_p=0.9,
        transformers_version="4.42.3",
    )
    assert said.eos_token_ids == (128001, 128008, 128009)
    assert said.sampling_defaults() == {"temperature": 0.6, "top_p": 0.9}


def test_every_sampling_default_has_its_name(tmp_path, config):
    fields = {"temperature": 1, "top_p": 0.5, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.2}
    said = read(tmp_path, config, eos_token_id=5, max_new_tokens=99, **fields)
    assert said.eos_token_ids == (5,)
    assert said.sampling_defaults() == fields | {"max_tokens": 99}


def test_what_the_file_leaves_out_is_the_configs_or_nothing(tmp_path, config):
    assert GenerationConfig.from_folder(tmp_path, config) == GenerationConfig((2,))
    assert read(tmp_path, config, temperature=None, eos_token_id=None, use_cache=True) == GenerationConfig((2,))
    assert GenerationConfig((2,)).sampling_defaults() == {}


def test_do_sample_false_is_greedy_and_absent_is_not(tmp_path, config):
    assert read(tmp_path, config, do_sample=False, temperature=0.7).temperature == 0
    assert read(tmp_path, config, temperature=0.7).temperature == 0.7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 2.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("max_new_tokens", 0),
        ("do_sample", "yes"),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, -1]),
        ("eos_token_id", True),
    ],
)
def test_a_bad_field_is_named(field, value, tmp_path, config):
    with pytest.raises(ValueError, match=rf"generation_config.json: {field} is .*") as error:
        read(tmp_path, config, **{field: value})
    bad = -1 if value == [1, -1] else value
    assert re.search(re.escape(repr(bad)), str(error.value))


@pytest.mark.parametrize(("text", "says"), [("{", "is not JSON"), ("[1]", "the whole is"), ("\xff", "is not JSON")])
def test_a_bad_file_is_named(text, says, tmp_path, config):
    (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"generation_config.json.*{says}"):
        GenerationConfig.from_folder(tmp_path, config)
