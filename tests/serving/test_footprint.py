"""What an engine needs per device, and layouts that are refused before anything is made."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import psutil
import pytest

from paddock.model import LlamaConfig
from paddock.model.shapes import SHAPES
from paddock.model.stages import slot_specs
from paddock.serving.engine_config import EngineConfig
from paddock.serving.footprint import Footprint, refuse_too_large
from paddock.serving.resolve import resolve
from paddock.sharding import Layout
from paddock.sharding.memory import GIB

TINY = LlamaConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 101,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
    },
    source="test",
)


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ("", ""),
        ("tensor=4", ""),
        ("pipe=2,tensor=4", ""),
        ("x=2,y=4", "embed=x,q_heads=y,mlp=y,vocab=y"),
        ("x=8", "embed=x,vocab=,batch=x"),
    ],
)
def test_weights_are_those_that_are_placed(mesh, rules):
    """Padding of the vocabulary and of stages, repeated kv heads and all."""
    layout = Layout.build(mesh, rules)
    placed = sum(
        math.prod(layout.place(spec).shard_shape(spec.shape)) * 4
        for spec in slot_specs(TINY, layout, "float32").values()
    )
    assert Footprint(TINY, "float32", 16, 4, 64, 128).of(layout, 1).weights == placed


def test_pages_are_split_by_heads_stages_and_sequences():
    footprint = Footprint(TINY, "float32", 16, 4, 64, 128)
    page = 2 * 5 * (2 * 16 * 8) * 4  # keys and values of 5 layers, 2 heads of 8
    assert footprint.of(Layout.build(), 3).kv_cache == 3 * page
    assert footprint.of(Layout.build("tensor=2"), 3).kv_cache == 3 * page // 2
    assert footprint.of(Layout.build("tensor=4"), 3).kv_cache == 3 * page // 2  # a kv head on each of two shards
    assert footprint.of(Layout.build("pipe=2"), 3).kv_cache == 3 * page * 3 // 5
    by_sequence = Layout.build("x=2", "q_heads=x,mlp=x,vocab=x,batch=x,tokens=")
    assert footprint.of(by_sequence, 3).kv_cache == 3 * page  # three pages each


@pytest.mark.parametrize(
    ("model", "gib", "smallest"),
    [("llama-3.1-8b", 14, ["tensor=2", "pipe=2"]), ("llama-3.1-405b", 140, ["pipe=3,tensor=2", "pipe=6"])],
)
def test_refused_with_the_smallest_meshes(model, gib, smallest):
    footprint = Footprint(SHAPES[model], "bfloat16", 64, 32, 512, 8192)
    with pytest.raises(ValueError, match=f"{gib} GiB are free") as refused:
        refuse_too_large(footprint, Layout.build(), 8192, gib * GIB)
    need = footprint.least(Layout.build(), 8192)
    assert f"each device needs {need}" in str(refused.value)
    named = str(refused.value).partition("on which it fits: ")[2].split("; ")
    assert [text.partition(" (")[0] for text in named] == smallest


def test_what_fits_is_not_refused():
    footprint = Footprint(TINY, "float32", 16, 4, 64, 128)
    refuse_too_large(footprint, Layout.build(), 128, footprint.least(Layout.build(), 128).total)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GiB of RAM, all of it free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GIB, available=16 * GIB))


@pytest.mark.usefixtures("small_machine")
def test_refused_before_anything_is_allocated():
    before = len(jax.live_arrays())
    config = EngineConfig(model="llama-3.1-70b", load_format="dummy", dtype="bfloat16", tensor_parallel_size=8)
    with pytest.raises(ValueError, match=r"does not fit mesh tensor=8.* and 2 GiB are free"):
        resolve(config)
    assert len(jax.live_arrays()) == before


@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize(
    ("model", "tokens", "proposed"),
    [("llama-3.1-8b", 6144, "No mesh makes it fit"), ("llama-3.2-3b", 65536, "The smallest .* fits: one device")],
)
def test_devices_of_a_cpu_share_its_memory(model, tokens, proposed):
    """More of them have less each, so that none of a larger mesh is proposed."""
    sizes = {"max_num_batched_tokens": tokens, "tensor_parallel_size": 8}
    with pytest.raises(ValueError, match=f"and 2 GiB are free. {proposed}"):
        resolve(EngineConfig(model=model, load_format="dummy", dtype="bfloat16", **sizes))


@pytest.mark.usefixtures("small_machine")
def test_cache_that_does_not_fit_beside_the_weights():
    shape = {"model": "llama-3.2-1b", "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 1024}
    with pytest.raises(ValueError, match="kv_cache_memory_bytes is 15 GiB, but weights and steps leave 1"):
        resolve(EngineConfig(**shape, kv_cache_memory_bytes=15 * GIB))
    assert resolve(EngineConfig(**shape, kv_cache_memory_bytes=GIB)).max_model_len == 1024
