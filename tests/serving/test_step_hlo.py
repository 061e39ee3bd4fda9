"""What the compiled decode step sends between devices: counted in its HLO."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable

import jax
import pytest
from layout_runs import CONFIG, resolve_tiny

from paddock.serving.bucket import Bucket
from paddock.serving.programs import Programs
from paddock.sharding.collectives import Collective, read_collectives

Compiled = tuple[Programs, jax.stages.Compiled, list[Collective]]


@pytest.fixture(scope="module")
def decode_step() -> Callable[..., Compiled]:
    """The largest decode bucket of a layout, with the sampler's slow half compiled in."""
    kept: dict[tuple[str, str, str], Compiled] = {}

    def compiled(mesh: str, rules: str = "", layout: str = "") -> Compiled:
        if (mesh, rules, layout) not in kept:
            with pytest.MonkeyPatch.context() as patch:
                programs = resolve_tiny(patch, mesh=mesh, rules=rules, layout=layout).programs
            executable = programs.lower(Bucket(programs.buckets.decodes[-1], 0, 0, True)).compile()
            kept[mesh, rules, layout] = programs, executable, read_collectives(executable.as_text())
        return kept[mesh, rules, layout]

    return compiled


def counts(collectives: list[Collective]) -> Counter[tuple[str, str]]:
    return Counter((c.part, c.kind) for c in collectives)


@pytest.mark.parametrize("mesh", ["tensor=2", "tensor=4"])
def test_tensor_parallelism_reduces_twice_a_layer(decode_step: Callable[..., Compiled], mesh: str) -> None:
    """One reduction for the embedding; logits turn into whole rows once, and what was sampled is gathered once."""
    _, _, collectives = decode_step(mesh)
    layers = {(f"layer{i}/{part}", "all-reduce"): 1 for i in range(CONFIG.num_layers) for part in ("attention", "mlp")}
    rest = {("embed", "all-reduce"): 1, ("sample", "all-to-all"): 1, ("sample", "all-gather"): 1}
    assert counts(collectives) == layers | rest
    assert not any(c.in_loop for c in collectives), "the sampler's search iterates on each device alone"


def test_a_pipeline_adds_a_permute_and_the_rows_that_come_out(decode_step: Callable[..., Compiled]) -> None:
    programs, _, collectives = decode_step("pipe=2,tensor=2")
    found = counts(collectives)
    slots = programs.plan.stages.num_slots
    assert slots == 2
    assert found[("stages", "collective-permute")] == found[("stages", "all-reduce")] == 1
    assert sum(n for (part, _), n in found.items() if part.startswith("layer")) == 2 * slots
    assert sum(found.values()) == 2 * slots + 5


def test_sequence_parallelism_gathers_before_each_block(decode_step: Callable[..., Compiled]) -> None:
    """The CPU's compiler writes a reduce-scatter as an all-reduce and a slice."""
    _, _, collectives = decode_step("tensor=2", "", "sequence-parallel")
    found = counts(collectives)
    for i in range(CONFIG.num_layers):
        for part in ("attention", "mlp"):
            kinds = {kind: n for (where, kind), n in found.items() if where == f"layer{i}/{part}"}
            assert kinds.pop("all-gather") == 1
            assert kinds in ({"all-reduce": 1}, {"reduce-scatter": 1})


@pytest.mark.parametrize("mesh", ["tensor=2", "pipe=2,tensor=2", "x=2"])
def test_no_weight_and_no_pool_is_gathered(decode_step: Callable[..., Compiled], mesh: str) -> None:
    """Nothing but rows of activations moves: reductions, logits turned into whole rows, rows on to the next stage."""
    _, _, collectives = decode_step(mesh, "batch=x,embed=" if mesh == "x=2" else "")
    moved = {(c.part, c.kind) for c in collectives if c.kind != "all-reduce"}
    by_rows = {("stages", "collective-permute"), ("sample", "all-to-all"), ("sample", "all-gather")}
    if mesh == "x=2":  # the rows to sample, and which row a device takes
        by_rows |= {("embed", "all-gather"), ("", "all-gather"), ("head", "all-gather"), ("", "collective-permute")}
    assert moved <= by_rows


def test_attention_over_the_batch_moves_rows_to_the_weights(decode_step: Callable[..., Compiled]) -> None:
    """Its rows are split otherwise than the product's before it, which must not become whole for that."""
    programs, _, collectives = decode_step("x=2,y=2", "", "pope-2d-weight-stationary-batch-attention")
    moved = [c.operand_bytes for c in collectives if c.part.startswith("layer") and c.kind != "all-reduce"]
    weight = programs.params["layers.0.qkv"]
    assert moved
    assert max(moved) < math.prod(weight.sharding.shard_shape(weight.shape)) * weight.dtype.itemsize


def test_weight_gathered_layouts_do_gather_weights(decode_step: Callable[..., Compiled]) -> None:
    programs, _, collectives = decode_step("x=2", "", "pope-xyz-weight-gathered")
    gathered = Counter(c.operand_bytes for c in collectives if c.kind == "all-gather")
    for name in ("qkv", "out", "gate_up", "down"):
        spec = programs.params[f"layers.0.{name}"]
        share = math.prod(spec.shape) * spec.dtype.itemsize // 2
        assert gathered[share] >= CONFIG.num_layers, name


@pytest.mark.parametrize("mesh", ["", "tensor=2", "pipe=2,tensor=2"])
def test_pools_and_state_stay_where_they_are(decode_step: Callable[..., Compiled], mesh: str) -> None:
    """Donated bytes are aliased in place, and no instruction copies a whole pool.

    In a pipeline the CPU's compiler does copy them; compiled for an H100 the same step has bitcasts and scatters alone.
    """
    programs, executable, _ = decode_step(mesh)
    kept = jax.tree.leaves((programs.cache, programs.state))
    local = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in kept)
    assert executable.memory_analysis().alias_size_in_bytes == local
    if programs.plan.stages.count == 1:
        pool = programs.cache.k[0]
        shape = ",".join(map(str, pool.sharding.shard_shape(pool.shape)))
        assert not re.findall(rf"= f32\[{shape}\]\S* copy\(", executable.as_text())


@pytest.mark.parametrize("mesh", ["", "tensor=2"])
def test_what_is_compiled_in_is_no_branch(mesh: str) -> None:
    """On a GPU a branch makes the host wait for its flag: the sampler's pieces are in the program or not at all."""
    with pytest.MonkeyPatch.context() as patch:
        programs = resolve_tiny(patch, mesh=mesh).programs
    plan = dataclasses.replace(programs.plan, branches=False)
    lowered = dataclasses.replace(programs, plan=plan).lower(Bucket(programs.buckets.decodes[-1], 0, 0, True))
    assert "stablehlo.case" not in lowered.as_text()
    assert "stablehlo.case" in programs.lower(Bucket(programs.buckets.decodes[-1], 0, 0, True)).as_text()


@pytest.mark.parametrize(("mesh", "late"), [("", True), ("tensor=2", True), ("pipe=2", False)])
def test_the_last_mlp_of_a_chunk_step_is_for_the_rows_that_sample(mesh: str, late: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        programs = resolve_tiny(patch, mesh=mesh).programs
    bucket = next(bucket for bucket in programs.buckets.all() if bucket.chunk_tokens and not bucket.decodes)
    # Rows of the products with weights [D, 2F], which are gate_up's and, as wide in this model, qkv's.
    weight = f"{CONFIG.embed_dim}x{2 * CONFIG.mlp_dim}xf32"
    rows = re.findall(rf"dot_general.*\(tensor<(\d+)x\w+>, tensor<{weight}>\)", programs.lower(bucket).as_text())
    layers = programs.plan.stages.num_slots
    assert Counter(map(int, rows)) == Counter([bucket.chunk_tokens] * (2 * layers - late) + [bucket.chunks] * late)
