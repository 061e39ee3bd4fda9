"""The options all_reduce, add_norm and products: what they may be in which layout, and that all give the same tokens,
explicit reductions by the same two a layer."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest
from gpu_compiler import compiles_kernels
from jax.sharding import Mesh
from layout_runs import CONFIG, NUM_SLOTS, Run, assert_same, engine_of, resolve_tiny, run

from paddock.model.shapes import SHAPES
from paddock.pallas_kernels import ALL_REDUCE, ALL_REDUCE_ADD_NORM, MailboxShape
from paddock.serving import step_products
from paddock.serving.bucket import Bucket
from paddock.serving.plan_prove import target_description
from paddock.serving.plan_prove_worker import described_devices
from paddock.serving.programs import Programs
from paddock.serving.step_planning import plan_steps
from paddock.serving.step_products import MAILBOXES, choose_all_reduce
from paddock.sharding import Layout, read_collectives

SUMS = [
    ("", {"add_norm": "reference"}),
    ("pipe=2", {"add_norm": "reference"}),
    ("", {"add_norm": "products"}),
    ("pipe=2", {"add_norm": "products"}),
    ("tensor=2", {"all_reduce": "reference"}),
]


@pytest.fixture(scope="module")
def alone() -> Run:
    """The tokens of the compiler's own products on one device."""
    with pytest.MonkeyPatch.context() as patch:
        return run(resolve_tiny(patch), pages=1000, full=True)


def test_rows_that_float16_may_not_hold_are_refused() -> None:
    sizes: dict[str, Any] = {"page_size": 8, "max_num_seqs": 2, "max_num_batched_tokens": 8, "max_model_len": 16}
    with pytest.raises(ValueError, match="add_norm products: rows before their division may be larger than float16"):
        plan_steps(CONFIG, Layout.build(""), dtype="float16", products="reference", add_norm="products", **sizes)


def test_auto_leaves_cpus_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_tiny(monkeypatch, mesh="tensor=2").plan.all_reduce == "xla"


@pytest.mark.parametrize(
    ("option", "name", "mesh", "rules", "message"),
    [
        ("all_reduce", "ring", "tensor=2", "", "all_reduce 'ring' is unknown; there are mosaic, reference, xla"),
        ("all_reduce", "mosaic", "tensor=2", "", "all_reduce mosaic: cpu is no NVIDIA Hopper GPU"),
        ("all_reduce", "reference", "", "", "nothing to reduce"),
        ("all_reduce", "reference", "tensor=2", "tokens=tensor", "tokens is split"),
        ("all_reduce", "reference", "tensor=2,x=2", "q_heads=x", "summed over other devices"),
        ("all_reduce", "reference", "pipe=2,tensor=2", "", "layers is split"),
        ("add_norm", "layer", "", "", "add_norm 'layer' is unknown; there are mosaic, products, reference, xla"),
        ("add_norm", "mosaic", "", "", "add_norm mosaic: cpu is no NVIDIA Hopper GPU"),
        ("add_norm", "reference", "tensor=2", "", "add_norm reference: rules: layers are split over devices"),
        ("add_norm", "products", "", "", "add_norm products: products are xla's, which cannot"),
        ("products", "relu", "", "", "products 'relu' is unknown; there are mosaic, reference, xla"),
        ("products", "mosaic", "", "", "products mosaic: cpu is no NVIDIA Hopper GPU"),
        ("products", "reference", "tensor=2", "tokens=tensor", "products reference: rules: tokens is split"),
        ("products", "reference", "x=2", "embed=x", "products reference: rules: embed is split"),
    ],
)
def test_what_cannot_be_had_is_refused(
    monkeypatch: pytest.MonkeyPatch, option: str, name: str, mesh: str, rules: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_tiny(monkeypatch, mesh=mesh, rules=rules, **{option: name})


def test_addition_and_norm_together_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch, alone: Run) -> None:
    """Also where stages have layers to themselves; what the kernel computes is the reference's."""
    for mesh in ("", "pipe=2"):
        resolved = resolve_tiny(monkeypatch, mesh=mesh, add_norm="reference")
        assert resolved.plan.add_norm == "reference"
        assert_same(run(resolved, pages=1000, full=True), alone)


def test_explicit_products_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch, alone: Run) -> None:
    """Of each device's own gates and ups, and of whole layers in stages; what kernels compute is the reference's."""
    for mesh in ("tensor=2", "pipe=2"):
        resolved = resolve_tiny(monkeypatch, mesh=mesh, products="reference")
        assert resolved.plan.products == "reference"
        assert_same(run(resolved, pages=1000, full=True), alone)


@pytest.mark.parametrize(("mesh", "sums"), SUMS)
def test_chained_kernels_give_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, alone: Run, mesh: str, sums: dict[str, str]
) -> None:
    """All of a layer's products, sums and norms by tables' entries; what kernels compute is the reference's."""
    monkeypatch.setattr(step_products, "CHAINED_SHARED_ROWS", step_products.CHAINED_ROWS)
    resolved = resolve_tiny(monkeypatch, mesh=mesh, products="reference", **sums)
    assert step_products.is_chained(resolved.plan, NUM_SLOTS)
    assert_same(run(resolved, pages=1000, full=True), alone)


@compiles_kernels
@pytest.mark.parametrize("add_norm", ["mosaic", "products"])
def test_weights_that_are_fetched_early_are_the_steps_arguments(monkeypatch: pytest.MonkeyPatch, add_norm: str) -> None:
    """A kernel reads them before those before it have ended: one that a step computes might not be there yet."""
    monkeypatch.setattr(step_products, "check_hopper", lambda _: None)
    layout = Layout.build("tensor=1", devices=described_devices(target_description("h100-80gb"), 1))
    model = dataclasses.replace(SHAPES["llama-3.2-1b"], num_layers=2)
    sizes: dict[str, Any] = {"page_size": 64, "max_num_seqs": 32, "max_num_batched_tokens": 256, "max_model_len": 256}
    kernels = {"decode_attention": "mosaic", "prefill_attention": "mosaic", "products": "mosaic", "add_norm": add_norm}
    plan, buckets = plan_steps(model, layout, dtype="bfloat16", **sizes, **kernels)
    text = Programs(plan, buckets, 100).compile_step(Bucket(32, 0, 0, plan.branches)).as_text()
    made = dict(re.findall(r"%([\w.-]+) = .*? ([\w-]+)\(", text))
    source = dict(re.findall(r"%([\w.-]+) = [^(]* bitcast\(%([\w.-]+)\)", text))
    calls = [line for line in text.splitlines() if "mosaic_gpu_v2" in line and "jit(matmul" in line]
    products = [re.search(r"custom-call\(%[\w.-]+, %([\w.-]+)", line)[1] for line in calls]
    assert len(products) == 4 * model.num_layers
    for name in products:
        while name in source:
            name = source[name]
        assert made[name] == "parameter", name


@dataclasses.dataclass(frozen=True)
class Card:
    """A device that is not there."""

    id: int
    device_kind: str
    compute_capability: str = "9.0"
    process_index: int = 0
    platform: str = "gpu"


@pytest.mark.parametrize(
    ("kind", "count", "embed_dim", "chosen"),
    [
        ("NVIDIA H100 80GB HBM3", 2, 4096, "mosaic"),
        ("NVIDIA H100 80GB HBM3", 2, 576, "xla"),
        ("NVIDIA H100 80GB HBM3", 4, 4096, "xla"),
        ("NVIDIA H100 PCIe", 2, 4096, "xla"),
    ],
)
def test_auto_takes_the_kernel_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, kind: str, count: int, embed_dim: int, chosen: str
) -> None:
    cards = np.array([Card(i, kind) for i in range(count)])
    layout = Layout(Mesh(cards, ("tensor",)), Layout.build(f"tensor={count}").rules)
    monkeypatch.setattr("paddock.pallas_kernels.compat._PUBLIC_INTERPRETER", object())
    assert choose_all_reduce("auto", layout, embed_dim, "bfloat16") == chosen


@pytest.mark.parametrize(("mesh", "rules"), [("tensor=2", ""), ("x=2,y=2", "q_heads=x+y,mlp=x+y,kv_heads=x")])
def test_explicit_reductions_give_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, alone: Run, mesh: str, rules: str
) -> None:
    resolved = resolve_tiny(monkeypatch, mesh=mesh, rules=rules, all_reduce="reference")
    assert_same(run(resolved, pages=1000, full=True), alone)


def test_mailboxes_go_with_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is around the kernel, with the reference in its place: their table among a step's arrays, new ones after a
    failure, and larger messages by the compiler."""
    monkeypatch.setattr(step_products, "check_hopper", lambda _: None)
    monkeypatch.setattr(step_products, "check_all_reduce_mosaic", lambda *_: None)
    monkeypatch.setattr(MailboxShape, "max_rows", lambda *_: NUM_SLOTS)
    seen = []
    for table in (ALL_REDUCE, ALL_REDUCE_ADD_NORM):

        def watched(*args: Any, reference: Any = table["reference"], **options: Any) -> Any:
            seen.append((args[0].shape[-2], options["mailbox"].shape))
            return reference(*args, **options)

        monkeypatch.setitem(table, "mosaic", watched)
    resolved = resolve_tiny(monkeypatch, mesh="tensor=2", all_reduce="mosaic")
    programs = resolved.programs
    decode = next(b for b in programs.buckets.all() if not b.chunk_tokens)
    chunks = next(b for b in programs.buckets.all() if b.chunk_tokens and b.decodes)
    for bucket, count in ((decode, 2 * CONFIG.num_layers), (chunks, 0)):
        seen.clear()
        programs.lower(bucket)
        assert seen == [(bucket.decodes, (4, 2))] * count
    monkeypatch.setattr(MailboxShape, "max_rows", lambda *_: 10**6)
    engine = engine_of(resolved, pages=100, full=True)
    first = engine.runner.params[MAILBOXES]
    engine.runner.reset()
    assert engine.runner.params[MAILBOXES] is not first
    assert_same(run(resolved, pages=1000, full=True), run(resolve_tiny(monkeypatch), pages=1000, full=True))


def test_explicit_reductions_are_two_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = resolve_tiny(monkeypatch, mesh="tensor=2", all_reduce="reference").programs
    compiled: jax.stages.Compiled = programs.compile_step(Bucket(programs.buckets.decodes[-1], 0, 0, True))
    found = [c for c in read_collectives(compiled.as_text()) if c.part.startswith("layer")]
    assert {c.kind for c in found} == {"all-reduce"}
    assert len(found) == 2 * CONFIG.num_layers
