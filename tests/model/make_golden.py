"""Writes tests/model/golden: tiny Llamas with random weights, and what transformers computes with them.

    python tests/model/make_golden.py        # needs torch and transformers 5; `make test` needs neither

Every case is a genuine Hugging Face folder (config.json, safetensors) with an expected.npz beside the weights:
    input_ids [T], logits [T, V]             one whole-sequence forward in float32, past the original context
    prompt_i, greedy_i [24], margin_i [24]   greedy continuations by recomputing the whole sequence for each token, EOS
                                             or not, and the distance between the two largest logits at each step
    dynamic RoPE alone, whose frequencies depend on the sequence's length:
    stepwise_logits [T, V], stepwise_i, stepwise_margin_i    the same, but fed token by token into a cache
    bfloat16 alone: logits_bfloat16 [T, V]   transformers' own bfloat16 (all else is float32 with the rounded weights)
rope.npz holds frequencies, cosines and sines of well-known models at positions up to 131,071.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, logging
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

GOLDEN = pathlib.Path(__file__).parent / "golden"
NUM_TOKENS, NUM_NEW, PROMPT_LENGTHS = 50, 24, (3, 13, 21)
POSITIONS = (0, 1, 17, 4095, 4096, 8191, 32767, 131071)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 89,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
# Few, wide heads: rotary embeddings with eight frequencies.
WIDE = LLAMA | {"intermediate_size": 20, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

# Configs as transformers 4 wrote them, kept as they are, and (SAVED) as transformers 5 writes them itself.
CASES: dict[str, dict[str, Any]] = {
    "llama1": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"torch_dtype": "float32"},
    "gqa": LLAMA
    | {"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 8, "num_key_value_heads": 2}
    | {"rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "float32", "eos_token_id": [2, 5]},
    "mqa_tied": LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_theta": 100000.0},
    "biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "head_dim": LLAMA | {"head_dim": 10, "num_hidden_layers": 3, "torch_dtype": "float32"},
    "mistral": WIDE
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "linear": WIDE | {"rope_scaling": {"type": "linear", "factor": 4.0}, "torch_dtype": "float32"},
    "dynamic": WIDE
    | {"max_position_embeddings": 20, "rope_scaling": {"type": "dynamic", "factor": 4.0}, "torch_dtype": "float32"},
    "yarn": WIDE
    | {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "finetuned": True}},
    "yarn_attention_factor": WIDE
    | {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 32},
            **{"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False},
        }
    },
    "yarn_mscale": WIDE
    | {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 16},
            **{"mscale": 1.4, "mscale_all_dim": 0.6},
        }
    },
    "llama3": WIDE
    | {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "torch_dtype": "float32"},
    "llama3_tied": WIDE
    | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}, "tie_word_embeddings": True},
    "sharded": LLAMA | {"torch_dtype": "float32"},
    "bfloat16": LLAMA | {"torch_dtype": "bfloat16", "rope_theta": 10000.0},
}
SAVED = {"mqa_tied", "biases", "mistral", "yarn_attention_factor", "yarn_mscale", "llama3_tied"}

# rope.npz: configs of well-known models (or, for kinds that none of them has, plausible ones) at full head size.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 100000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3, "original_max_position_embeddings": 8192},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 4096},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}


def randomize(model: torch.nn.Module) -> None:
    """Weights that keep logits spread out (deviation about 2) and attention and positions worth something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(noise * (1.5 if "q_proj" in name or "k_proj" in name else 1.0) / weight.shape[1] ** 0.5)


def write_folder(name: str, config: dict[str, Any]) -> pathlib.Path:
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    dtype = torch.bfloat16 if config.get("torch_dtype") == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    randomize(model)
    model.to(dtype).save_pretrained(folder, max_shard_size="30KB" if name == "sharded" else "1GB")
    (folder / "generation_config.json").unlink()
    if name not in SAVED:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def load(folder: pathlib.Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    # Eager attention in plain float32 operations; a fresh model, because dynamic RoPE remembers the longest sequence.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def whole(folder: pathlib.Path, ids: list[int], dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Logits [T, V] of one forward over the whole sequence."""
    return load(folder, dtype)(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def greedy(next_logits: Any, prompt: list[int]) -> tuple[np.ndarray, np.ndarray]:
    ids, margins = list(prompt), []
    for _ in range(NUM_NEW):
        logits = next_logits(ids)
        first, second = np.sort(logits)[[-1, -2]]
        margins.append(first - second)
        ids.append(int(np.argmax(logits)))
    return np.int32(ids[len(prompt) :]), np.float32(margins)


class Stepwise:
    """Logits of the last token, with one token at a time fed into a cache."""

    def __init__(self, folder: pathlib.Path):
        self.model, self.cache, self.seen = load(folder), None, 0

    def __call__(self, ids: list[int]) -> np.ndarray:
        for token in ids[self.seen :]:
            output = self.model(torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)
            self.cache = output.past_key_values
        self.seen = len(ids)
        return output.logits[0, -1].numpy()


def expected(folder: pathlib.Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, config["vocab_size"], NUM_TOKENS).tolist()
    arrays: dict[str, Any] = {"input_ids": np.int32(ids), "logits": whole(folder, ids)}
    for index, length in enumerate(PROMPT_LENGTHS):
        prompt = rng.integers(0, config["vocab_size"], length).tolist()
        arrays[f"prompt_{index}"] = np.int32(prompt)
        recompute = lambda so_far: whole(folder, so_far)[-1]
        arrays[f"greedy_{index}"], arrays[f"margin_{index}"] = greedy(recompute, prompt)
        if folder.name == "dynamic":
            results = greedy(Stepwise(folder), prompt)
            arrays[f"stepwise_{index}"], arrays[f"stepwise_margin_{index}"] = results
    if folder.name == "dynamic":
        step = Stepwise(folder)
        arrays["stepwise_logits"] = np.stack([step(ids[: n + 1]) for n in range(NUM_TOKENS)])
    if folder.name == "bfloat16":
        arrays["logits_bfloat16"] = whole(folder, ids, torch.bfloat16)
    return arrays


def rope_arrays() -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {"positions": np.int32(POSITIONS)}
    for name, rope in ROPES.items():
        sizes = {"hidden_size": 512, "num_attention_heads": 4, "max_position_embeddings": 4096}
        rotary = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=dict(rope)))
        cos, sin = rotary(torch.zeros(1), torch.tensor([POSITIONS]))
        half = cos.shape[-1] // 2
        arrays[f"{name}.frequencies"] = rotary.inv_freq.numpy()
        arrays[f"{name}.cos"], arrays[f"{name}.sin"] = cos[0, :, :half].numpy(), sin[0, :, :half].numpy()
    return arrays


def main() -> None:
    logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    GOLDEN.mkdir(exist_ok=True)
    for name, config in CASES.items():
        folder = write_folder(name, config)
        arrays = expected(folder, config)
        np.savez_compressed(folder / "expected.npz", **arrays)
        margins = np.concatenate([arrays[key] for key in arrays if "margin" in key])
        print(
            f"{name:24} logits std {arrays['logits'].std():.2f}  smallest greedy margin {margins.min():.1e}", flush=True
        )
    np.savez_compressed(GOLDEN / "rope.npz", **rope_arrays())
    (GOLDEN / "rope.json").write_text(json.dumps(ROPES, indent=2) + "\n")


if __name__ == "__main__":
    main()
