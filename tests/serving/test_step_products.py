"""The option all_reduce: what it may be in which layout, and that explicit reductions are the same two a layer."""

from __future__ import annotations

import jax
import pytest
from layout_runs import CONFIG, assert_same, resolve_tiny, run

from paddock.serving.bucket import Bucket
from paddock.serving.step_products import choose_all_reduce
from paddock.sharding import Layout, read_collectives


def test_auto_leaves_cpus_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_tiny(monkeypatch, mesh="tensor=2").plan.all_reduce == "xla"


@pytest.mark.parametrize(
    ("name", "mesh", "rules", "message"),
    [
        ("ring", "tensor=2", "", "all_reduce 'ring' is unknown; there are mosaic, reference, xla"),
        ("mosaic", "tensor=2", "", "all_reduce mosaic needs NVIDIA Hopper GPUs"),
        ("reference", "", "", "nothing to reduce"),
        ("reference", "tensor=2", "tokens=tensor", "tokens is split"),
        ("reference", "tensor=2,x=2", "q_heads=x", "summed over other devices"),
        ("reference", "pipe=2,tensor=2", "", "layers is split"),
    ],
)
def test_what_cannot_be_had_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, mesh: str, rules: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_tiny(monkeypatch, mesh=mesh, rules=rules, all_reduce=name)


class Card:
    """A device as `choose_all_reduce` sees it."""

    def __init__(self, kind: str, capability: str = "9.0"):
        self.device_kind, self.compute_capability, self.process_index = kind, capability, 0


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
    layout = Layout.build(f"tensor={count}")
    cards = type("Cards", (), {"flat": [Card(kind)] * count})
    monkeypatch.setattr(type(layout.mesh), "devices", cards)
    monkeypatch.setattr("paddock.pallas_kernels.compat._PUBLIC_INTERPRETER", object())
    assert choose_all_reduce("auto", layout, embed_dim, "bfloat16") == chosen


@pytest.mark.parametrize(("mesh", "rules"), [("tensor=2", ""), ("x=2,y=2", "q_heads=x+y,mlp=x+y,kv_heads=x")])
def test_explicit_reductions_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch, mesh: str, rules: str) -> None:
    alone = run(resolve_tiny(monkeypatch), pages=1000, full=True)
    resolved = resolve_tiny(monkeypatch, mesh=mesh, rules=rules, all_reduce="reference")
    assert_same(run(resolved, pages=1000, full=True), alone)


def test_explicit_reductions_are_two_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = resolve_tiny(monkeypatch, mesh="tensor=2", all_reduce="reference").programs
    compiled: jax.stages.Compiled = programs.compile_step(Bucket(programs.buckets.decodes[-1], 0, 0, True))
    found = [c for c in read_collectives(compiled.as_text()) if c.part.startswith("layer")]
    assert {c.kind for c in found} == {"all-reduce"}
    assert len(found) == 2 * CONFIG.num_layers
