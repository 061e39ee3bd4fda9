"""A Llama of a few thousand parameters whose sizes divide over two, four and eight devices."""

from __future__ import annotations

from paddock.model import LlamaConfig, RopeConfig

CONFIG = LlamaConfig(
    vocab_size=101,
    embed_dim=16,
    mlp_dim=24,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    max_position=64,
    norm_eps=1e-5,
    rope=RopeConfig("default", 10000.0),
    tie_embeddings=False,
    attention_bias=True,
    mlp_bias=False,
    dtype="float32",
    bos_token_id=1,
    eos_token_ids=(2,),
)
