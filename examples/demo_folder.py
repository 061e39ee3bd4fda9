"""The demonstration model as a Hugging Face folder: weights, configs, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import sentencepiece
from demo_data import BOS, CHAT_TEMPLATE, EOS, load_tokenizer
from demo_eval import bits_per_byte

from paddock.checkpoints import load_params, save_safetensors
from paddock.model import LlamaConfig
from paddock.sharding import Layout


def save(folder: Path, config: LlamaConfig, params: Mapping[str, jax.Array], tokenizer: bytes) -> None:
    """Write all but the card; weights are rounded to `config.dtype`."""
    save_safetensors(folder, config, params)
    files = {
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


def load(folder: Path) -> tuple[LlamaConfig, dict[str, jax.Array], sentencepiece.SentencePieceProcessor]:
    """Config, float32 parameters and tokenizer of a folder that `save` wrote."""
    config = LlamaConfig.from_file(folder / "config.json")
    params = load_params(folder, config, Layout.build(), "float32")
    return config, params, load_tokenizer((folder / "tokenizer.model").read_bytes())


def evaluate(folder: Path, text: str) -> float:
    """Bits per byte of `text` under the stored weights, computed in float32."""
    config, params, tokenizer = load(folder)
    # GPUs round float32 products to fewer bits unless told otherwise.
    with jax.default_matmul_precision("highest"):
        return bits_per_byte(config, params, [BOS, *tokenizer.encode(text)], len(text.encode()))
