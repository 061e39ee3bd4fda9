"""Collectives read from what this machine compiles, and from lines that compilers for GPUs have written."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from paddock.sharding import Layout
from paddock.sharding.collectives import Collective, Total, part_of, read_collectives, summarize

KIB = 1024


@pytest.fixture(scope="module")
def compiled() -> list[Collective]:
    """One collective of each kind, over a mesh of 2 x 4, on arrays of 64 KiB per device."""
    layout = Layout.build("x=2,y=4", "q_heads=x,mlp=y,vocab=")

    def per_device(x: jax.Array, weight: jax.Array) -> jax.Array:
        with jax.named_scope("layer3"):
            with jax.named_scope("attention"):
                x = jax.lax.psum(x @ weight, "y")  # [64, 256]
                x = jax.lax.all_gather(x, "x", axis=0, tiled=True)
                x = jax.lax.psum_scatter(x, "x", scatter_dimension=0, tiled=True)
            with jax.named_scope("mlp"):
                x = jax.lax.all_to_all(x, "y", 0, 1, tiled=True)
        with jax.named_scope("head"):
            x = jax.lax.ppermute(x, "y", [(0, 1), (1, 2), (2, 3)])
        with jax.named_scope("sample"):
            x = jax.lax.fori_loop(0, 3, lambda _, v: jnp.tanh(jax.lax.psum(v, "y")), x)
        return jax.lax.psum(x, ("x", "y"))

    mapped = layout.shard_map(per_device, (PartitionSpec(None, "y"), PartitionSpec("y")), PartitionSpec())
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(layout.mesh, spec))
        for shape, spec in (((64, 512), PartitionSpec(None, "y")), ((512, 256), PartitionSpec("y")))
    ]
    return read_collectives(jax.jit(mapped).lower(*shapes).compile().as_text())


@pytest.mark.parametrize(
    ("kind", "group_size", "part", "operand", "result", "sent"),
    [
        ("all-reduce", 4, "layer3/attention", 64, 64, 96),
        ("all-gather", 2, "layer3/attention", 64, 128, 64),
        ("reduce-scatter", 2, "layer3/attention", 128, 64, 64),
        ("all-to-all", 4, "layer3/mlp", 64, 64, 48),
        ("collective-permute", 4, "head", 64, 64, 64),
        ("all-reduce", 8, "", 64, 64, 112),
    ],
)
def test_each_kind(compiled, kind, group_size, part, operand, result, sent):
    (found,) = [c for c in compiled if (c.kind, c.group_size, c.part) == (kind, group_size, part)]
    assert (found.operand_bytes, found.result_bytes, found.sent_bytes) == (operand * KIB, result * KIB, sent * KIB)
    assert not found.in_loop


def test_loops_are_told_apart(compiled):
    (looped,) = [c for c in compiled if c.in_loop]
    assert looped == Collective("all-reduce", 64 * KIB, 4, "sample", in_loop=True)
    assert len(compiled) == 7


def test_one_device_has_none():
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile().as_text()
    assert read_collectives(text) == []


def test_totals_take_layers_together():
    found = [Collective("all-reduce", 100, 2, f"layer{i}/{part}") for i in range(12) for part in ("attention", "mlp")]
    found.append(Collective("all-reduce", 7, 2, "embed"))
    assert summarize(found) == [Total("all-reduce", "", False, 2, 25, 2407, 2407)]
    assert [(t.part, t.count, t.num_bytes) for t in summarize(found, by_part=True)] == [
        ("layers/attention", 12, 1200),
        ("layers/mlp", 12, 1200),
        ("embed", 1, 7),
    ]


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(step)/layer0/mlp/dot_general", "layer0/mlp"),
        ("jit(step)/stages/layer2/shard_map/attention/add", "layer2/attention"),
        ("jit(step)/stages/ppermute", "stages"),
        ("jit(step)/head/sample/while/body/psum", "sample"),
        ("jit(step)/embedding/headroom", ""),
    ],
)
def test_part_of_the_model(op_name, part):
    assert part_of(f'all-reduce(%x), metadata={{op_name="{op_name}" stack_frame_id=3}}') == part


# As the GPU compilers of JAX 0.10.2 and 0.11.2 write them, shortened.
GPU_TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: bf16[64]) -> bf16[32] {
  %p = bf16[64]{0} parameter(0)
  ROOT %rs = bf16[32]{0} reduce-scatter(%p), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
}

%search.body (t: (s32[], f32[16])) -> (s32[], f32[16]) {
  %t = (s32[], f32[16]{0}) parameter(0)
  %v = f32[16]{0} get-tuple-element(%t), index=1
  %inner = (f32[16]{0}) conditional(%c, %v, %v), branch_computations={%yes, %no}
}

%yes (y: f32[16]) -> f32[16] {
  %y = f32[16]{0} parameter(0)
  ROOT %ar = f32[16]{0} all-reduce(%y), replica_groups={}, to_apply=%add
}

%no (n: f32[16]) -> f32[16] {
  ROOT %n = f32[16]{0} parameter(0)
}

ENTRY %main (x: bf16[64], s: (s32[], f32[16]), q: f8e4m3fn[32], m: pred[10]) -> bf16[64] {
  %x = bf16[64]{0} parameter(0)
  %s = (s32[], f32[16]{0}) parameter(1)
  %q = f8e4m3fn[32]{0} parameter(2)
  %m = pred[10]{0} parameter(3)
  %ag-start = ((bf16[64]{0}), bf16[256]{0}) all-gather-start(%x), replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
  %ag-done = bf16[256]{0} all-gather-done(%ag-start), metadata={op_name="jit(step)/layer1/mlp/dot_general"}
  %part = bf16[64]{0} all-reduce(%x), replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}, to_apply=%add
  %both = (f8e4m3fn[32]{0}, /*index=1*/pred[10]{0}) all-reduce-start(%q, %m), replica_groups={{0,4},{1,5}}, to_apply=%add, metadata={op_name="layer10/norm/attention/mlp_2"}
  %done = (f8e4m3fn[32]{0}, pred[10]{0}) all-reduce-done(%both)
  %ring = bf16[64]{0} collective-permute(%x), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
  %later = ((bf16[64]{0}), bf16[32]{0}, s32[]) async-start(%x), calls=%wrapped
  %now = bf16[32]{0} async-done(%later)
  %w = (s32[], f32[16]{0}) while(%s), condition=%no, body=%search.body
}
"""  # noqa: E501


def test_text_of_gpu_compilers():
    assert read_collectives(GPU_TEXT) == [
        Collective("reduce-scatter", 128, 2),
        Collective("all-reduce", 64, 8, in_loop=True),
        Collective("all-gather", 128, 4),
        Collective("all-reduce", 128, 2),
        Collective("all-reduce", 42, 2, "layer10/attention"),
        Collective("collective-permute", 128, 2),
    ]
