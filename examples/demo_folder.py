"""The demonstration model as a Hugging Face folder: weights, configs, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import sentencepiece
from demo_data import BOS, CHAT_TEMPLATE, EOS, load_tokenizer
from demo_eval import bits_per_byte
from safetensors.flax import load_file, save_file

from paddock.model import LlamaConfig


def to_hf(config: LlamaConfig, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The model's arrays under the names and in the shapes of a Hugging Face checkpoint."""
    tensors = {"model.embed_tokens.weight": params["embed"], "model.norm.weight": params["norm"]}
    D, h = config.embed_dim, config.head_dim
    for index in range(config.num_layers):
        qkv, out, gate_up, down, norm, mlp_norm = (
            params[f"layers.{index}.{name}"]
            for name in ("qkv", "out", "gate_up", "down", "attention_norm", "mlp_norm")
        )
        layer = {
            "self_attn.q_proj": qkv[:, :-2].reshape(config.num_heads * h, D),
            "self_attn.k_proj": qkv[:, -2].reshape(-1, D),
            "self_attn.v_proj": qkv[:, -1].reshape(-1, D),
            "self_attn.o_proj": out.reshape(D, -1),
            "mlp.gate_proj": gate_up[0],
            "mlp.up_proj": gate_up[1],
            "mlp.down_proj": down,
            "input_layernorm": norm,
            "post_attention_layernorm": mlp_norm,
        }
        tensors |= {f"model.layers.{index}.{name}.weight": value for name, value in layer.items()}
    return tensors


def from_hf(config: LlamaConfig, tensors: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The inverse of `to_hf`."""
    D, h, K = config.embed_dim, config.head_dim, config.num_kv_heads
    params = {"embed": tensors["model.embed_tokens.weight"], "norm": tensors["model.norm.weight"]}
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        q, k, v, out, gate, up, down, norm, mlp_norm = (
            tensors[f"{prefix}{name}.weight"]
            for name in (
                *(f"self_attn.{letter}_proj" for letter in "qkvo"),
                *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
                "input_layernorm",
                "post_attention_layernorm",
            )
        )
        qkv = [q.reshape(K, -1, h, D), k.reshape(K, 1, h, D), v.reshape(K, 1, h, D)]
        params |= {
            f"layers.{index}.qkv": jnp.concatenate(qkv, axis=1),
            f"layers.{index}.out": out.reshape(D, K, -1, h),
            f"layers.{index}.gate_up": jnp.stack([gate, up]),
            f"layers.{index}.down": down,
            f"layers.{index}.attention_norm": norm,
            f"layers.{index}.mlp_norm": mlp_norm,
        }
    return params


def save(folder: Path, config: LlamaConfig, params: Mapping[str, jax.Array], tokenizer: bytes) -> None:
    """Write all but the card; weights are rounded to `config.dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": config.to_hf_dict(),
        "generation_config.json": {
            "bos_token_id": BOS, "eos_token_id": EOS, "do_sample": True, "temperature": 0.8, "top_p": 0.95,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": False,
            "legacy": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position,
            "chat_template": CHAT_TEMPLATE,
        },
    }  # fmt: skip
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    rounded = {name: value.astype(config.dtype) for name, value in to_hf(config, params).items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> tuple[LlamaConfig, dict[str, jax.Array], sentencepiece.SentencePieceProcessor]:
    """Config, float32 parameters and tokenizer of a folder that `save` wrote."""
    config = LlamaConfig.from_file(folder / "config.json")
    params = from_hf(config, load_file(folder / "model.safetensors"))
    tokenizer = load_tokenizer((folder / "tokenizer.model").read_bytes())
    return config, {name: value.astype(jnp.float32) for name, value in params.items()}, tokenizer


def evaluate(folder: Path, text: str) -> float:
    """Bits per byte of `text` under the stored weights, computed in float32."""
    config, params, tokenizer = load(folder)
    # GPUs round float32 products to fewer bits unless told otherwise.
    with jax.default_matmul_precision("highest"):
        return bits_per_byte(config, params, [BOS, *tokenizer.encode(text)], len(text.encode()))
