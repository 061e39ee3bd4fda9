"""What a checkpoint's `config.json` says of a Llama.

Hugging Face spells the file in two ways, transformers 4's (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5's
(`rope_parameters`, `dtype`); both are read, and values that the model does not compute are refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from .fields import Fields
from .rope_config import RopeConfig

# What transformers documents for a field that the file leaves out, by architecture. Sizes, `rms_norm_eps` and
# `max_position_embeddings` are not here: a guess at those gives plausible nonsense, so a file must say them.
# None stands for "follows from other fields" (as many kv heads as query heads, hidden_size / heads) or for "none".
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        "num_key_value_heads": None,
        "head_dim": None,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
}
DEFAULTS["MistralForCausalLM"] = DEFAULTS["LlamaForCausalLM"] | {"num_key_value_heads": 8, "sliding_window": 4096}
MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}

# Fields that change what a model computes, and the values under which it is still a Llama; absent or null is fine too.
# Every other field that is not read (use_cache, initializer_range, auto_map, ...) is taken for harmless metadata.
SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "quantization_config": (),
    "compression_config": (),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "attention_chunk_size": (),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "bias": (False,),
    "qkv_bias": (False,),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
}
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of one model. There are no defaults for anything that a checkpoint says.

    `max_position` is the file's max_position_embeddings, in tokens; `dtype` is that of the stored weights.
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs")
        if self.rope.kind == "dynamic" and self.head_dim < 4:
            raise ValueError(f"head_dim {self.head_dim} is too small for rope_type 'dynamic', which needs 4")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not supported; supported: {', '.join(DTYPES)}")

    @property
    def context_length(self) -> int:
        """Tokens that the model was made for: dynamic RoPE alone reaches beyond `max_position`, by its factor."""
        if self.rope.kind == "dynamic" and self.rope.factor is not None:
            return int(self.max_position * self.rope.factor)
        return self.max_position

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> LlamaConfig:
        """Reads a config.json; raises ValueError naming the file, and FileNotFoundError where there is none."""
        with open(path, "rb") as file:
            try:
                raw = json.load(file)
            except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, endless nesting
                raise ValueError(f"{os.fspath(path)} is not readable JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{os.fspath(path)}: a JSON object is needed, found {type(raw).__name__}")
        return cls.from_dict(raw, source=os.fspath(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, source: str) -> LlamaConfig:
        """The config in `raw`, as parsed from JSON; `source` names it in errors (ValueError: field and value)."""
        try:
            return cls(**_read(raw))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def overridden(self, fields: Mapping[str, Any]) -> LlamaConfig:
        """With `fields` in the place of those of `to_hf_dict`. Raises ValueError for one that is not there, or a bad
        value."""
        own = self.to_hf_dict()
        if unknown := sorted(set(fields) - set(own)):
            raise ValueError(f"hf_overrides: {unknown[0]!r} cannot be replaced; what can is {', '.join(own)}")
        return type(self).from_dict({**own, **fields}, source="hf_overrides")

    def to_hf_dict(self) -> dict[str, Any]:
        """A config.json that `from_dict` reads back the same, spelled so that transformers 4 and 5 both read it."""
        eos = self.eos_token_ids
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.embed_dim,
            "intermediate_size": self.mlp_dim,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope.theta,
            "rope_scaling": self.rope.to_hf_dict(),
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "torch_dtype": self.dtype,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(eos) if len(eos) > 1 else eos[0] if eos else None,
        }


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    architecture = _architecture(raw)
    # Absent fields get the documented value; a null among them means "follows from other fields" or "none".
    filled = {**DEFAULTS[architecture], **raw}
    fields = Fields(filled)
    max_position = fields.integer("max_position_embeddings")
    if "sliding_window" not in raw and max_position <= (filled["sliding_window"] or 0):
        filled["sliding_window"] = None  # a window that no context outgrows changes nothing
    fields.check_supported(SUPPORTED_VALUES)
    layer_types = raw.get("layer_types")
    if layer_types is not None and layer_types != ["full_attention"] * fields.integer("num_hidden_layers"):
        raise ValueError(f"layer_types {layer_types!r} is not supported; every one must be 'full_attention'")
    if architecture == "MistralForCausalLM":
        fields.check_supported({"attention_bias": (False,), "mlp_bias": (False,)})

    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", None)
    if head_dim is None:
        if hidden % heads:
            raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; say head_dim")
        head_dim = hidden // heads
    return {
        "vocab_size": fields.integer("vocab_size"),
        "embed_dim": hidden,
        "mlp_dim": fields.integer("intermediate_size"),
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        "max_position": max_position,
        "norm_eps": fields.number("rms_norm_eps"),
        "rope": RopeConfig.from_dict(
            raw, default_theta=DEFAULTS[architecture]["rope_theta"], max_position=max_position
        ),
        "tie_embeddings": fields.boolean("tie_word_embeddings"),
        "attention_bias": fields.boolean("attention_bias"),
        "mlp_bias": fields.boolean("mlp_bias"),
        "dtype": raw.get(Fields(raw).either("dtype", "torch_dtype")) or DEFAULTS[architecture]["dtype"],
        "bos_token_id": fields.integer("bos_token_id", None, at_least=0),
        "eos_token_ids": fields.token_ids("eos_token_id"),
    }


def _architecture(raw: Mapping[str, Any]) -> str:
    names, model_type = raw.get("architectures"), raw.get("model_type")
    by_type = MODEL_TYPES.get(model_type) if isinstance(model_type, str) else None
    if names is None and model_type is None:
        raise ValueError("architectures and model_type are missing")
    if names is not None and names not in [[name] for name in DEFAULTS]:
        raise ValueError(f"architectures {names!r} is not supported; supported: {', '.join(DEFAULTS)}")
    if model_type is not None and by_type is None:
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}")
    if names is not None and by_type not in (None, names[0]):
        raise ValueError(f"architectures {names!r} and model_type {model_type!r} do not belong together")
    return names[0] if names is not None else str(by_type)
