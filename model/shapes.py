"""The shapes of well-known models, as their config.json files say them: for benchmarks and planning."""

from __future__ import annotations

from typing import Any

from .config import LlamaConfig

_LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
}
_LLAMA_3_1: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA_3_2 = _LLAMA_3_1 | {
    "rope_scaling": _LLAMA_3_1["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
}


def _sizes(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


_RAW: dict[str, dict[str, Any]] = {
    "llama-2-7b": _LLAMA_2 | _sizes(4096, 11008, 32, 32, 32),
    "llama-2-13b": _LLAMA_2 | _sizes(5120, 13824, 40, 40, 40),
    "llama-2-70b": _LLAMA_2 | _sizes(8192, 28672, 80, 64, 8),
    "llama-3.1-8b": _LLAMA_3_1 | _sizes(4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _LLAMA_3_1 | _sizes(8192, 28672, 80, 64, 8),
    "llama-3.1-405b": _LLAMA_3_1 | _sizes(16384, 53248, 126, 128, 8),
    "llama-3.2-1b": _LLAMA_3_2 | _sizes(2048, 8192, 16, 32, 8),
    "llama-3.2-3b": _LLAMA_3_2 | _sizes(3072, 8192, 28, 24, 8),
    "tinyllama-1.1b": _LLAMA_2
    | _sizes(2048, 5632, 22, 32, 4)
    | {"max_position_embeddings": 2048, "torch_dtype": "bfloat16"},
    "smollm2-135m": _LLAMA_2
    | _sizes(576, 1536, 30, 9, 3)
    | {
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}

SHAPES: dict[str, LlamaConfig] = {name: LlamaConfig.from_dict(raw, source=name) for name, raw in _RAW.items()}
