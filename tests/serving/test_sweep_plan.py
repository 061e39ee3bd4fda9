"""What the flags and the file of `paddock sweep` ask for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import jax
import jax.numpy as jnp
import pytest

from paddock.serving.build import Built
from paddock.serving.cli import build_parser, main
from paddock.serving.engine_config import EngineConfig
from paddock.serving.page_pool import PagePool
from paddock.serving.scheduler import Scheduler
from paddock.serving.sweep_measure import check, decode_bytes, headroom
from paddock.serving.sweep_plan import Case, Sweep, SweepLayout
from paddock.serving.sweep_worker import fit


def sweep_of(*flags: str) -> Sweep:
    return Sweep.from_args(build_parser().parse_args(["sweep", *flags]))


def test_every_spelling_of_a_layout(tmp_path: Path):
    file = tmp_path / "sweep.toml"
    file.write_text(
        """
        batch_sizes = [1, 64]
        input_lens = [16]
        output_len = 4
        [[layout]]
        name = "split head"
        mesh = "x=2,y=2"
        rules = "q_heads=x,mlp=y,vocab=x+y"
        """
    )
    sweep = sweep_of(
        *("-tp", "8", "--meshes", "tensor=2", "pipe=2,tensor=2", "--presets", "llama3"),
        *("--layouts", "mesh=tensor=4; rules=vocab=", "preset=llama3;mesh=pipe=4,tensor=2;name=deep"),
        *("--config", str(file), "--batch-sizes", "8", "2"),
    )
    assert sweep.layouts == (
        SweepLayout(),
        SweepLayout(mesh="tensor=8"),
        SweepLayout(mesh="tensor=2"),
        SweepLayout(mesh="pipe=2,tensor=2"),
        SweepLayout(preset="llama3"),
        SweepLayout(mesh="tensor=4", rules="vocab="),
        SweepLayout(mesh="pipe=4,tensor=2", preset="llama3", name="deep"),
        SweepLayout(mesh="x=2,y=2", rules="q_heads=x,mlp=y,vocab=x+y", name="split head"),
    )
    assert [layout.label for layout in sweep.layouts[-4:]] == ["llama3", "tensor=4 vocab=", "deep", "split head"]
    assert sweep.cases == (Case(8, 16, 4), Case(2, 16, 4))  # flags go before the file


def test_a_layout_is_run_once():
    assert len(sweep_of("--meshes", "tensor=2", "tensor=2", "--layouts", "mesh=tensor=2").layouts) == 2


def test_a_layout_file_is_what_it_says(tmp_path: Path):
    """Changed, its rows are others; and a row tells what was run."""
    file, case = tmp_path / "mine.toml", Case(8, 128, 32)
    flags = ("--layouts", f"preset={file}; name=mine")
    file.write_text('mesh = "tensor=2"\nrules = "vocab="\n')
    before = sweep_of(*flags)
    assert before.layouts[1] == SweepLayout("tensor=2", "vocab=", name="mine")
    assert sweep_of("--layout", str(file)).layouts[1] == SweepLayout("tensor=2", "vocab=", name=str(file))
    file.write_text('preset = "llama3"\nmesh = "pipe=2,tensor=2"\nrules = "vocab=tensor"\n')
    after = sweep_of(*flags)
    assert after.layouts[1].apply(EngineConfig()).layout_text == EngineConfig(layout=str(file)).layout_text
    assert before.key(before.layouts[1], case) != after.key(after.layouts[1], case)
    file.write_text('rules = "vocab=tensor"\nmesh = "tensor=2"')
    third = sweep_of(*flags)
    assert before.key(before.layouts[1], case) != third.key(third.layouts[1], case)


def test_a_mesh_needs_no_more_devices_than_are_asked_for():
    with pytest.raises(ValueError, match=r"^--devices 8 is fewer than the 16 that the mesh tensor=16 needs$"):
        fit(EngineConfig(), SweepLayout("tensor=16"), [Case(1, 8, 2)], 8)


@pytest.mark.parametrize(
    ("mesh", "rules", "slots"),
    [("tensor=2", "", 5), ("data=2,tensor=2", "", 3), ("data=2,x=4", "batch=x", 4), ("x=4", "batch=x", 8)],
)
def test_a_replica_has_room_for_its_share_of_the_batch(
    mesh: str, rules: str, slots: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("paddock.serving.sweep_worker.prepare", lambda config: None)
    config = fit(EngineConfig(), SweepLayout(mesh, rules), [Case(5, 8, 2), Case(2, 8, 2)], None)
    assert config.max_num_seqs == slots
    assert fit(EngineConfig(max_num_seqs=7), SweepLayout(mesh, rules), [Case(5, 8, 2)], None).max_num_seqs == 7


def test_the_layout_replaces_that_of_the_config():
    config = EngineConfig(tensor_parallel_size=4, max_num_seqs=3)
    changed = SweepLayout("pipe=2", "vocab=").apply(config)
    assert (changed.layout_text.mesh, changed.rules, changed.max_num_seqs) == ("pipe=2", "vocab=", 3)


def test_keys_tell_what_could_change_a_row():
    layout, case = SweepLayout("tensor=2"), Case(8, 128, 32)
    sweep = sweep_of("--meshes", "tensor=2")
    key = sweep.key(layout, case)
    assert key == sweep_of("--presets", "llama3", "-tp", "4", "--compile-cache-dir", "x").key(layout, case)
    others = [
        sweep.key(SweepLayout("tensor=4"), case),
        sweep.key(SweepLayout("tensor=2", "vocab="), case),
        sweep.key(layout, Case(8, 128, 16)),
        sweep_of("--meshes", "tensor=2", "--block-size", "16").key(layout, case),
        sweep_of("--meshes", "tensor=2", "--devices", "8").key(layout, case),
    ]
    assert len({key, *others}) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "sweep needs layouts"),
        (["--layouts", "tensor"], "'tensor' is not of the form key=value"),
        (["--layouts", "axes=tensor"], "unknown key 'axes'"),
        (["--meshes", "tensor=2", "--batch-sizes", "0"], "batch_size must be at least 1, got 0"),
        (["--meshes", "tensor=2", "--output-len", "0"], "output_len must be at least 1, got 0"),
        (["--meshes", "tensor=2", "--devices", "0"], "--devices must be at least 1, got 0"),
        (["--config", "missing.toml"], "sweep file missing.toml"),
        (["--layouts", "preset=missing.toml"], "layout file missing.toml"),
        (["--layouts", "mesh=tensor=2; name=a", "mesh=tensor=4; name=a"], "two layouts are called 'a'"),
        (["--layouts", "mesh=tensor=2; name=one device"], "two layouts are called 'one device'"),
    ],
)
def test_what_is_wrong_is_named(flags: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        sweep_of(*flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lengths = [1]", "unknown key 'lengths'"),
        ("[[layout]]\nmesh = 2", "sweep file .*sweep.toml: mesh must be a string, not 2"),
        ("[layout]\nmesh = 'tensor=2'", "sweep.toml: layout must be tables, each under .*, got {'mesh': 'tensor=2'}"),
        ("layout = 'x'", "sweep.toml: layout must be tables, each under .*, got 'x'"),
        ("output_len = '4'\n[[layout]]\nmesh = 'tensor=2'", "sweep.toml: output_len must be a whole number, got '4'"),
        ("batch_sizes = 4\n[[layout]]\nmesh = 'tensor=2'", "batch_sizes must be a list of whole numbers, got 4"),
        ("input_lens = ['4']\n[[layout]]\nmesh = 'tensor=2'", "input_lens must be a list of whole numbers, got .'4'."),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, text: str, message: str):
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        sweep_of("--config", str(file))


@pytest.mark.parametrize(
    ("case", "budget", "stages", "steps"),
    [
        (Case(8, 32, 4), 64, 1, 4),  # 64 prompt tokens a step, whatever decodes
        (Case(256, 8, 4), 2048, 1, 4),  # at most 64 prompts a step
        (Case(4, 8, 4), 4, 2, 8),  # half a prompt a step
    ],
)
def test_the_first_sequences_last_until_all_decode(case: Case, budget: int, stages: int, steps: int):
    assert steps <= headroom(case, budget, stages) <= steps + 4 + 2 * stages


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_out_that_no_timer_takes(seconds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert main(["sweep", "--meshes", "tensor=2", "--out", str(out), "--timeout", seconds]) == 2
    message = f"paddock: --timeout must be more than 0 s and no more than a timer takes, got {float(seconds)}\n"
    assert capsys.readouterr().err == message
    assert not out.exists()


def test_each_group_of_a_replica_reads_the_weights_once():
    """Two stages of two replicas: of two sequences each replica has one, and so one group in its pipeline."""
    plan = Mock(config=SimpleNamespace(tie_embeddings=False), stages=SimpleNamespace(count=2), page_size=4)
    plan.num_partitions = 1
    x = jax.device_put(jnp.zeros(100), jax.devices()[0])
    built = Mock(spec=Built)
    built.resolved, built.executor = Mock(plan=plan), Mock(params={"embed": x, "layers.0.down": x})
    with patch("paddock.serving.sweep_measure.page_bytes", lambda *_: 0):
        read = [decode_bytes(built, Case(batch, 8, 2), 2) for batch in (1, 2, 3, 4, 8)]
    assert read == [400, 400, 800, 800, 800]


def test_a_batch_that_does_not_run_all_together_is_refused():
    """It would be timed as if it did: 4 slots, but pages for two sequences of 8 + 2 tokens and the 7 that they may be
    ahead by."""
    scheduler = Scheduler([PagePool(12, 4)], max_num_seqs=4, max_num_batched_tokens=16, max_chunks=4)
    plan = SimpleNamespace(max_chunk_tokens=16, stages=SimpleNamespace(count=1), num_slots=4, num_partitions=1)
    built = Mock(spec=Built)
    built.engine = SimpleNamespace(scheduler=scheduler, check=lambda prompt, params: None)
    built.resolved = SimpleNamespace(plan=plan, num_pages=12, page_size=4)
    check([built], Case(2, 8, 2))
    check([built, built], Case(4, 8, 2))
    wrong = "a batch of 3 does not run all together: there is room for 2 sequences of 18 tokens, with max_num_seqs 4 "
    with pytest.raises(ValueError, match=f"^{wrong}and a KV cache of 44 tokens$"):
        check([built], Case(3, 8, 2))
