"""Any layout gives the tokens of one device: presets, pipelines, partitions and random rules."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from layout_runs import Run, assert_same, resolve_tiny, run

from paddock.serving.resolve import Resolved
from paddock.sharding import PRESETS

LOGICAL = ("batch", "tokens", "embed", "q_heads", "head_dim", "mlp", "vocab", "layers")
NUM_RANDOM = 32
# Quick to compile; the kernels that walk pages are compared with it in tests/pallas_kernels.
PLAIN = {"decode_attention": "reference", "prefill_attention": "reference"}


@pytest.fixture(scope="module")
def alone() -> Run:
    with pytest.MonkeyPatch.context() as patch:
        found = run(resolve_tiny(patch), pages=1000, full=True)
    assert found.preemptions == 0
    return found


def few_pages(resolved: Resolved) -> int:
    """Too few for all sequences, enough for the longest; over many partitions each has one and lacks nothing."""
    count = resolved.plan.num_partitions
    return 20 if count == 1 else 14 * count


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(monkeypatch: pytest.MonkeyPatch, alone: Run, preset: str) -> None:
    resolved = resolve_tiny(monkeypatch, layout=preset, **PLAIN)
    got = run(resolved, pages=few_pages(resolved))
    assert got.preemptions > 0 or resolved.plan.num_partitions > 1
    assert_same(got, alone)


def test_one_device_under_preemption(monkeypatch: pytest.MonkeyPatch, alone: Run) -> None:
    got = run(resolve_tiny(monkeypatch), pages=20, full=True)
    assert got.preemptions > 0
    assert_same(got, alone)


@pytest.mark.parametrize(
    ("mesh", "rules", "pages"),
    [
        ("pipe=3", "", 24),
        ("pipe=2,tensor=4", "vocab=tensor", 24),
        ("pipe=2,x=2,tensor=2", "batch=x", 32),
        ("x=2,y=2", "q_heads=x+y,kv_heads=x", 20),
        ("x=2,tensor=2", "head_dim=x", 20),
    ],
)
def test_chosen_layouts_under_preemption(
    monkeypatch: pytest.MonkeyPatch, alone: Run, mesh: str, rules: str, pages: int
) -> None:
    got = run(resolve_tiny(monkeypatch, mesh=mesh, rules=rules), pages=pages, full=True)
    assert got.preemptions > 0
    assert_same(got, alone)


def random_layout(seed: int) -> tuple[str, str]:
    """A mesh of up to eight devices with names that mean nothing, and rules that may or may not suit it."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(["a", "b", "c"])[: rng.choice([1, 2, 2, 3])]
    sizes = rng.choice([2, 2, 2, 4, 3], len(names))
    rules: dict[str, list[str]] = {name: [] for name in LOGICAL}
    for axis in names:
        for logical in rng.permutation(LOGICAL)[: rng.integers(1, 4)]:
            rules[logical].append(str(axis))
    mesh = ",".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
    return mesh, ",".join(f"{logical}={'+'.join(axes)}" for logical, axes in rules.items() if axes)


@pytest.fixture(scope="module")
def random_layouts() -> list[tuple[str, str]]:
    """The first that the engine takes; what it takes must work."""
    found: dict[tuple[str, str], None] = {}
    with pytest.MonkeyPatch.context() as patch:
        for seed in range(1000):
            mesh, rules = random_layout(seed)
            with contextlib.suppress(ValueError):
                resolve_tiny(patch, mesh=mesh, rules=rules)
                found[mesh, rules] = None
            if len(found) == NUM_RANDOM:
                return list(found)
    raise AssertionError(f"only {len(found)} of 1000 layouts were valid")


@pytest.mark.parametrize("index", range(NUM_RANDOM))
def test_random_layouts(
    monkeypatch: pytest.MonkeyPatch, alone: Run, random_layouts: list[tuple[str, str]], index: int
) -> None:
    mesh, rules = random_layouts[index]
    print(mesh, rules)  # shown when it fails
    resolved = resolve_tiny(monkeypatch, mesh=mesh, rules=rules, **PLAIN)
    got = run(resolved, pages=few_pages(resolved))
    assert got.preemptions > 0 or resolved.plan.num_partitions > 1
    assert_same(got, alone)


def test_random_layouts_use_every_axis(random_layouts: list[tuple[str, str]]) -> None:
    assert {rule.partition("=")[0] for _, rules in random_layouts for rule in rules.split(",")} == set(LOGICAL)
