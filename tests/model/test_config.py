from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import pytest

from paddock.model import LlamaConfig, RopeConfig, param_specs
from paddock.model.shapes import SHAPES

GOLDEN = pathlib.Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/config.json"))

RAW = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20000,
    "torch_dtype": "bfloat16",
    "eos_token_id": [5, 7],
}
MISTRAL = RAW | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def read(raw: dict, **changes: object) -> LlamaConfig:
    return LlamaConfig.from_dict(raw | changes, source="here/config.json")


def without(raw: dict, *names: str) -> dict:
    return {name: value for name, value in raw.items() if name not in names}


def test_reads_every_field():
    assert read(RAW) == LlamaConfig(
        vocab_size=101,
        embed_dim=48,
        mlp_dim=80,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        max_position=256,
        norm_eps=1e-5,
        rope=RopeConfig("default", 20000.0),
        tie_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_ids=(5, 7),
    )


def test_absent_fields_take_the_architectures_documented_values():
    absent = ("num_key_value_heads", "rope_theta", "torch_dtype", "eos_token_id")
    config = read(without(RAW, *absent))
    assert (config.num_kv_heads, config.rope.theta, config.dtype) == (6, 10000.0, "float32")
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    heads = {"num_attention_heads": 16, "hidden_size": 64}
    assert read(without(MISTRAL, *absent) | heads).num_kv_heads == 8


def test_flags_and_explicit_sizes():
    config = read(RAW, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=10, bos_token_id=None)
    assert config.attention_bias
    assert config.mlp_bias
    assert config.tie_embeddings
    assert config.head_dim == 10
    assert config.bos_token_id is None
    assert read(RAW, eos_token_id=3).eos_token_ids == (3,)
    assert read(RAW, eos_token_id=None).eos_token_ids == ()
    assert read(RAW, num_key_value_heads=None).num_kv_heads == 6


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}])
def test_both_spellings_are_the_same_config(scaling):
    old = read(RAW, rope_scaling=scaling)
    new = without(RAW, "rope_theta", "torch_dtype") | {"dtype": "bfloat16"}
    assert read(new, rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": 20000.0}) == old
    if scaling:
        by_old_name = {"type": scaling["rope_type"], **without(scaling, "rope_type")}
        assert read(RAW, rope_scaling=by_old_name) == old


def test_rope_fields_of_each_kind():
    def rope(**scaling: object) -> RopeConfig:
        return read(RAW, rope_scaling=scaling).rope

    assert rope(type="linear", factor=2) == RopeConfig("linear", 20000.0, factor=2.0)
    dynamic = RopeConfig("dynamic", 20000.0, factor=2.5, original_max_position=256)
    assert rope(type="dynamic", factor=2.5) == dynamic
    llama3 = RopeConfig(
        "llama3", 20000.0, factor=8.0, original_max_position=32, low_freq_factor=1.0, high_freq_factor=4.0
    )
    assert rope(**LLAMA3) == llama3
    yarn = RopeConfig(
        "yarn", 20000.0, factor=4.0, original_max_position=64, beta_fast=32.0, beta_slow=1.0, truncate=True
    )
    assert rope(**YARN, finetuned=True) == yarn
    assert rope(type="yarn", factor=4.0).original_max_position == 256
    given = {"attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.5}
    assert rope(**YARN, **given, truncate=False) == dataclasses.replace(yarn, **given, truncate=False)


def test_original_length_may_stand_beside_the_rope_object():
    scaling = without(LLAMA3, "original_max_position_embeddings")
    config = read(RAW, rope_scaling=scaling, original_max_position_embeddings=48)
    assert config.rope.original_max_position == 48


def test_context_length_grows_with_dynamic_rope_alone():
    assert read(RAW).context_length == 256
    assert read(RAW, rope_scaling=LLAMA3).context_length == 256
    assert read(RAW, rope_scaling={"type": "dynamic", "factor": 2.5}).context_length == 640


def test_harmless_metadata_is_not_an_error():
    metadata = {
        "_name_or_path": "somebody/something",
        "attention_dropout": 0.1,
        "auto_map": {"AutoModelForCausalLM": "modeling.LlamaForCausalLM"},
        "initializer_range": 0.02,
        "is_llama_config": True,
        "pad_token_id": -1,
        "pretraining_tp": 1,
        "quantization_config": None,
        "rope_interleaved": False,
        "transformers_version": "4.31.0",
        "use_cache": True,
    }
    assert read(RAW, **metadata) == read(RAW)


@pytest.mark.parametrize(
    "name",
    [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "rms_norm_eps"),
    ],
)
def test_what_a_checkpoint_must_say(name):
    with pytest.raises(ValueError, match=f"^here/config.json: {name} is missing"):
        read(without(RAW, name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, r"architectures \['MixtralForCausalLM'\] is not supported"),
        ({"architectures": ["LlamaForCausalLM", "LlamaModel"]}, r"architectures .* is not supported"),
        ({"architectures": None, "model_type": "qwen2"}, "model_type 'qwen2' is not supported"),
        ({"architectures": None, "model_type": None}, "architectures and model_type are missing"),
        ({"model_type": "mistral"}, "do not belong together"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; it must be 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp 2 is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .*awq.* is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"sliding_window": 128}, "sliding_window 128 is not supported; it must be null"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types .*sliding.*"),
        ({"per_layer_config": {"1": {"num_attention_heads": 3}}}, "per_layer_config .* is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"dtype": "float32"}, "dtype 'float32' and torch_dtype 'bfloat16' say different things"),
        ({"hidden_size": "48"}, "hidden_size is '48'; an integer of at least 1"),
        ({"hidden_size": 48.0}, "hidden_size is 48.0; an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; an integer of at least 1"),
        ({"num_hidden_layers": None}, "num_hidden_layers is null"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'; true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; true or false"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; a number above 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan; a number above 0"),
        ({"rope_theta": math.inf}, "rope_theta is inf; a number above 0"),
        ({"rope_theta": 0}, "rope_theta is 0; a number above 0"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'; a token id"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id is \[2, -1\]; a token id"),
        ({"bos_token_id": -1}, "bos_token_id is -1; an integer of at least 0"),
        ({"hidden_size": 50}, "hidden_size 50 is not a multiple of num_attention_heads 6"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; an object"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"rope_type \['yarn'\] is not supported"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_type None is not supported"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "rope_type 'yarn' and type 'linear' say different"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5; a number of at least 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3}}, "alpha 3 is not supported with .*'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2}, "head_dim 2 is too small .*dynamic"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor 1.0 must be .* below high_freq_factor"),
        ({"rope_scaling": without(LLAMA3, "original_max_position_embeddings")}, "original_max_position.* is missing"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate is 1; true or false"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "beta_slow 1.0 must be above 0 and below beta_fast 0.5"),
        ({"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta is both 20000 and"),
        ({"rope_scaling": LLAMA3, "rope_parameters": YARN}, "rope_parameters .* and rope_scaling .* say different"),
    ],
)
def test_errors_name_file_field_and_value(changes, message):
    with pytest.raises(ValueError, match=f"^here/config.json: .*{message}"):
        read(RAW, **changes)


def test_mistral_without_a_window():
    assert read(MISTRAL) == read(RAW)
    # Absent means transformers' 4096, which a shorter context never notices.
    assert read(without(MISTRAL, "sliding_window")) == read(RAW)
    with pytest.raises(ValueError, match="sliding_window 4096 is not supported"):
        read(without(MISTRAL, "sliding_window"), max_position_embeddings=32768)
    with pytest.raises(ValueError, match="sliding_window 4096 is not supported"):
        read(MISTRAL, sliding_window=4096)
    with pytest.raises(ValueError, match="attention_bias True is not supported"):
        read(MISTRAL, attention_bias=True)


def test_the_model_type_alone_names_the_architecture():
    assert read(without(RAW, "architectures")) == read(RAW)
    assert read(without(RAW, "model_type")) == read(RAW)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_written_configs_read_back_the_same(folder):
    config = LlamaConfig.from_file(folder / "config.json")
    written = json.loads(json.dumps(config.to_hf_dict()))
    assert LlamaConfig.from_dict(written, source="written") == config


def test_end_ids_and_biases_are_written():
    for eos in (None, 3, [3, 4]):
        config = read(RAW, eos_token_id=eos, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
        assert config.to_hf_dict()["eos_token_id"] == eos
        assert LlamaConfig.from_dict(config.to_hf_dict(), source="written") == config


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"[" * 100000])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not readable JSON"):
        LlamaConfig.from_file(path)


def test_a_file_that_is_not_an_object_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: a JSON object is needed, found list"):
        LlamaConfig.from_file(path)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        *(("llama-2-7b", 6.738), ("llama-2-13b", 13.016), ("llama-2-70b", 68.977)),
        *(("llama-3.1-8b", 8.030), ("llama-3.1-70b", 70.554), ("llama-3.1-405b", 405.853)),
        *(("llama-3.2-1b", 1.236), ("llama-3.2-3b", 3.213), ("smollm2-135m", 0.1345), ("tinyllama-1.1b", 1.100)),
    ],
)
def test_named_shapes_have_the_published_number_of_parameters(name, billions):
    parameters = sum(math.prod(spec.shape) for spec in param_specs(SHAPES[name]).values())
    assert parameters / 1e9 == pytest.approx(billions, abs=6e-4)
    assert LlamaConfig.from_dict(SHAPES[name].to_hf_dict(), source=name) == SHAPES[name]


def test_overrides_replace_what_a_config_says() -> None:
    model = LlamaConfig.from_dict(RAW, source="here")
    short = model.overridden({"num_hidden_layers": 1, "rope_scaling": YARN})
    assert (short.num_layers, short.rope.kind) == (1, "yarn")
    assert short.overridden({"num_hidden_layers": 3, "rope_scaling": None}) == model
    with pytest.raises(
        ValueError, match=r"hf_overrides: 'num_layers' cannot be replaced; what can is .*num_hidden_layers"
    ):
        model.overridden({"num_layers": 1})
    with pytest.raises(ValueError, match="hf_overrides: num_hidden_layers is 0"):
        model.overridden({"num_hidden_layers": 0})
