"""A tiny Llama with odd sizes, as a Hugging Face folder written at test time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from paddock.model import LlamaConfig, RopeConfig

Tensors = dict[str, np.ndarray]


@pytest.fixture
def config() -> LlamaConfig:
    """8 query heads over 2 kv heads, a vocabulary that no mesh divides, every kind of bias."""
    return LlamaConfig(
        vocab_size=101,
        embed_dim=24,
        mlp_dim=40,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=6,
        max_position=64,
        norm_eps=1e-5,
        rope=RopeConfig("default", 10000.0),
        tie_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        dtype="float32",
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def hf_tensors(config: LlamaConfig) -> Tensors:
    """Random float32 tensors by Hugging Face's names, spelled out here a second time on purpose."""
    D, F, V, h = config.embed_dim, config.mlp_dim, config.vocab_size, config.head_dim
    queries, keys = config.num_heads * h, config.num_kv_heads * h
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config.num_layers):
        at = f"model.layers.{i}."
        shapes |= {at + "input_layernorm.weight": (D,), at + "post_attention_layernorm.weight": (D,)}
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (size, D)
            if config.attention_bias:
                shapes[f"{at}self_attn.{name}_proj.bias"] = (size,)
        shapes[at + "self_attn.o_proj.weight"] = (D, queries)
        if config.attention_bias:
            shapes[at + "self_attn.o_proj.bias"] = (D,)
        for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            shapes[f"{at}mlp.{name}_proj.weight"] = shape
            if config.mlp_bias:
                shapes[f"{at}mlp.{name}_proj.bias"] = shape[:1]
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_folder(folder: Path, config: LlamaConfig, tensors: Tensors, *, files: int = 1) -> Path:
    """A Hugging Face folder; with `files` > 1, sharded, neighbouring tensors in different files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf_dict()))
    if files == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    weight_map = {tensor: names[i % files] for i, tensor in enumerate(tensors)}
    for name in names:
        safetensors.numpy.save_file({t: tensors[t] for t, n in weight_map.items() if n == name}, folder / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def tensors(config: LlamaConfig) -> Tensors:
    return hf_tensors(config)


@pytest.fixture
def folder(tmp_path: Path, config: LlamaConfig, tensors: Tensors) -> Path:
    return write_folder(tmp_path / "model", config, tensors)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """`make_folder(config, tensors=None, files=1, **changes)`: the folder of `config`, tensors random by default."""

    def make(config: LlamaConfig, tensors: Tensors | None = None, *, files: int = 1) -> Path:
        count = len(list(tmp_path.iterdir()))
        return write_folder(tmp_path / f"made{count}", config, tensors or hf_tensors(config), files=files)

    return make


@pytest.fixture
def tied(config: LlamaConfig) -> LlamaConfig:
    return dataclasses.replace(config, tie_embeddings=True, attention_bias=False, mlp_bias=False)


@pytest.fixture
def expected(config: LlamaConfig, tensors: Tensors) -> Callable[[int, int], Tensors]:
    """`expected(kv_repeat, vocab)`: the arrays that `tensors` make, head by head and row by row."""

    def fuse(kv_repeat: int, vocab: int) -> Tensors:
        h, K = config.head_dim, config.num_kv_heads * kv_repeat
        G = config.num_heads // K
        arrays = {"norm": tensors["model.norm.weight"]}
        for ours, theirs in (("embed", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
            arrays[ours] = np.zeros((vocab, config.embed_dim), np.float32)
            arrays[ours][: config.vocab_size] = tensors[theirs]
        for i in range(config.num_layers):
            layer = {
                name.removeprefix(f"model.layers.{i}."): value
                for name, value in tensors.items()
                if name.startswith(f"model.layers.{i}.")
            }
            for kind in ("weight", "bias"):
                in_first = (lambda x: np.moveaxis(x, -1, 0)) if kind == "weight" else (lambda x: x)
                q, k, v = (layer[f"self_attn.{name}_proj.{kind}"] for name in "qkv")
                heads = []
                for kv in range(K):
                    own = kv // kv_repeat
                    group = [q[j * h : (j + 1) * h] for j in range(kv * G, (kv + 1) * G)]
                    heads.append(np.stack([*group, k[own * h : (own + 1) * h], v[own * h : (own + 1) * h]]))
                suffix = "" if kind == "weight" else "_bias"
                arrays[f"layers.{i}.qkv{suffix}"] = in_first(np.stack(heads))
                gate_up = [layer[f"mlp.{name}_proj.{kind}"] for name in ("gate", "up")]
                arrays[f"layers.{i}.gate_up{suffix}"] = in_first(np.stack(gate_up, axis=1))
                arrays[f"layers.{i}.down{suffix}"] = in_first(layer[f"mlp.down_proj.{kind}"])
            out = layer["self_attn.o_proj.weight"]
            arrays[f"layers.{i}.out"] = np.stack([row.reshape(K, G, h) for row in out], axis=-1)
            arrays[f"layers.{i}.out_bias"] = layer["self_attn.o_proj.bias"]
            arrays[f"layers.{i}.attention_norm"] = layer["input_layernorm.weight"]
            arrays[f"layers.{i}.mlp_norm"] = layer["post_attention_layernorm.weight"]
        return arrays

    return fuse
