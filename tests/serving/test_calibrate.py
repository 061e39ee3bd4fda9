"""`paddock plan --calibrate`: fits that give back what they were made from, and one small run on this machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddock.serving import calibrate as measuring
from paddock.serving import step_replay
from paddock.serving.calibrate import CPU, GPU, calibrate, point_name
from paddock.serving.calibrate_fit import Depths, fit_device, fit_stages, fit_tensor, line, step_times
from paddock.serving.cli import main
from paddock.serving.pack import Packer, lay_out
from paddock.serving.planner import plan
from paddock.serving.sampling_params import SamplingParams
from paddock.serving.schedule import Chunk, Schedule
from paddock.serving.sequence import Sequence
from paddock.serving.speed_profile import Curve, SpeedProfile, read_profile
from paddock.serving.step_replay import Sizes, StepReplay
from paddock.serving.timed_engine import TimedEngine
from paddock.sharding import Layout
from paddock.sharding.accelerators import Accelerator

TRUTH = SpeedProfile(
    "h100-80gb",
    weights=Curve((1, 32, 256), (2.9e12, 2.7e12, 2.3e12)),
    matrix={"bfloat16": Curve((512, 4096), (550e12, 700e12))},
    decode_attention=Curve((1, 32, 256), (1.1e12, 2.4e12, 2.6e12)),
    prefill_attention=Curve((512, 4096), (300e12, 560e12)),
    layer=Curve((1, 32, 256, 512, 4096), (15e-6, 20e-6, 35e-6, 60e-6, 250e-6), extends=True),
    head=Curve((1, 32, 256), (2.9e12, 2.8e12, 2.4e12)),
    step=Curve((1, 32, 256), (30e-6, 40e-6, 90e-6)),
    all_reduce={2: Curve((8192.0, 4194304.0, 33554432.0), (9e-6, 25e-6, 130e-6), extends=True)},
    vocab={2: Curve((1, 256), (40e-6, 200e-6), extends=True)},
    hop={2: Curve((8192.0, 33554432.0), (30e-6, 170e-6), extends=True)},
)
RULER = dataclasses.replace(GPU, rows=(1, 32, 256), chunks=(512, 4096))


def predicted(
    model: Any,
    mesh: str,
    point: tuple[str, int, int],
    stages: int = 1,
    profile: SpeedProfile = TRUTH,
    dtype: str = "bfloat16",
) -> float:
    """Of a step, or of a tick."""
    times = step_times(profile, dtype, model, mesh)
    kind, count, context = point
    if kind == "decode":
        return times.decode(stages * count, context).total / stages
    return times.chunk(count, count * (count + 1) / 2 + count * context).total


def depths(model: Any, layers: tuple[int, int], mesh: str = "", points: Any = RULER.short_points) -> Depths:
    shallow, deep = (dataclasses.replace(model, num_layers=count) for count in layers)
    times = [{point: predicted(one, mesh, point) for point in points} for one in (shallow, deep)]
    return Depths(shallow, deep, *times)


def test_fits_give_back_the_speeds_that_made_the_times():
    points = RULER.short_points + RULER.long_points
    narrow, wide = depths(RULER.narrow, (2, 8), points=points), depths(RULER.wide, (2, 6))
    found = fit_device("h100-80gb", "bfloat16", narrow, wide, RULER.base, RULER.long, RULER.starts)
    for name in ("weights", "decode_attention", "prefill_attention", "layer", "head", "step"):
        fitted, truth = getattr(found, name), getattr(TRUTH, name)
        assert fitted.x == truth.x, name
        assert fitted.y == pytest.approx(truth.y, rel=1e-3, abs=1e-7), name
    assert found.matrix["bfloat16"].y == pytest.approx(TRUTH.matrix["bfloat16"].y, rel=1e-3)

    found = fit_tensor(found, "bfloat16", 2, depths(RULER.narrow, (2, 8), "tensor=2"))
    reduce = found.all_reduce[2]
    assert [reduce.at(x) for x in (8192, 262144, 33554432)] == pytest.approx(
        [TRUTH.all_reduce[2].at(x) for x in (8192, 262144, 33554432)], rel=0.02, abs=2e-7
    )
    assert [found.vocab[2].at(x) for x in (1, 256)] == pytest.approx([40e-6, 200e-6], rel=0.02, abs=2e-6)

    staged = dataclasses.replace(RULER.narrow, num_layers=4)
    ticks = {point: predicted(staged, "pipe=2", point, stages=2) for point in RULER.short_points}
    found = fit_stages(found, "bfloat16", 2, staged, ticks)
    assert [found.hop[2].at(x) for x in (8192, 33554432)] == pytest.approx([30e-6, 170e-6], rel=0.05, abs=3e-6)

    # And so a whole model's steps are predicted as they would be, in layouts that nothing was fitted to.
    for model, mesh, batch, context in ((GPU.narrow, "", 32, 900), (GPU.wide, "tensor=2", 256, 640)):
        before, after = (step_times(p, "bfloat16", model, mesh).decode(batch, context).total for p in (TRUTH, found))
        assert after == pytest.approx(before, rel=0.01)


def test_line_stays_above_zero():
    assert line((1.0, 3.0), (2.0, 5.0)) == (2.0, 1.0)
    slope, height = line((1.0, 1.0), (2.0, 4.0))
    assert (slope, height) == (pytest.approx(9 / 5), 0.0)
    with pytest.raises(ValueError, match="is the machine busy"):
        line((1.0, 3.0), (2.0, 2.9))


def test_a_profile_is_read_back_as_it_was_written(tmp_path: Path):
    whole = dataclasses.replace(
        TRUTH, copy=2.9e12, host=Curve((1, 256), (1e-3, 2e-3)), host_layer=2e-5, fitted=("4x8x2 on one device: x",)
    )
    file = tmp_path / "mine.toml"
    file.write_text(whole.to_toml())
    assert read_profile(file) == whole
    (layout,) = plan("llama-3.1-8b", "h100-80gb", 2, mesh="pipe=2", profile=whole).layouts
    assert layout.source == "measured"
    without = dataclasses.replace(whole, hop={})
    assert plan("llama-3.1-8b", "h100-80gb", 2, mesh="pipe=2", profile=without).layouts[0].source == "datasheet links"


def test_calibrate_keeps_what_there_is_and_leaves_out_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def timed(using: Any, model: Any, mesh: str, points: Any) -> Any:
        if "pipe" in mesh:
            raise RuntimeError("no link")
        timed.calls.append(mesh)
        return {point: predicted(model, mesh, point) for point in points}

    timed.calls = []
    monkeypatch.setattr(measuring, "_timed", timed)
    monkeypatch.setattr(
        measuring, "_with_host", lambda known, using: dataclasses.replace(known, host=Curve((1,), (1e-3,)))
    )
    monkeypatch.setattr(measuring, "accelerator_here", lambda: "h100-80gb")
    monkeypatch.setattr(measuring.jax, "device_count", lambda: 2)
    notes: list[str] = []
    using = dataclasses.replace(RULER, copy_bytes=2**16)
    found = calibrate(tmp_path / "p.toml", notes.append, using)
    assert [note.partition(":")[0] for note in notes] == [
        "copy bandwidth",
        "steps of one device",
        "host",
        "tensor=2",
        "pipe=2",
    ]
    assert "pipe=2: failed, RuntimeError: no link" in notes
    assert found.copy > 0
    assert (set(found.all_reduce), found.hop) == ({2}, {})
    assert timed.calls == ["", "", "", "", "tensor=2", "tensor=2"]
    # What it was fitted to is named, so that a check can tell.
    deep = dataclasses.replace(GPU.narrow, num_layers=8)
    assert point_name(deep, "tensor=2", ("decode", 32, 256)) in found.fitted
    assert point_name(GPU.narrow, "", ("decode", 32, 256)) not in found.fitted

    notes.clear()
    again = calibrate(tmp_path / "p.toml", notes.append, using)
    assert [note.partition(":")[0] for note in notes] == ["pipe=2"]
    assert again.layer.y == pytest.approx(found.layer.y, rel=1e-3)

    (tmp_path / "p.toml").write_text('accelerator = "h200"')
    with pytest.raises(ValueError, match="is the profile of h200, but this machine has h100-80gb"):
        calibrate(tmp_path / "p.toml", notes.append, using)


def test_the_replayed_step_is_the_one_that_the_engine_would_send(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}

    def run(params: Any, cache: Any, state: Any, given: Any) -> Any:
        seen["given"] = given
        return cache, state, given

    def make(self: Any, jobs: Any) -> dict[Any, Any]:
        return {key: run for key in jobs} | {"allocate": jobs["allocate"].lower().compile()}

    monkeypatch.setattr(step_replay.StepsAlone, "run", make)
    monkeypatch.setattr(step_replay, "SECONDS", 0.0)
    sizes = Sizes(rows=(1, 3), chunks=(32,), context=128, tokens=3 * 128)
    replay = StepReplay(CPU.narrow, Layout.build(), "float32", sizes)
    try:
        assert replay.chunk(32, 64) > 0
        (bucket,) = (bucket for bucket in replay.programs.buckets.all() if bucket.chunk_tokens)
        views = replay.programs.packings[bucket].views(np.array(seen["given"]))
        seq = Sequence(0, views["token_ids"].tolist() * 3, SamplingParams(max_tokens=1), 0, 1, frozenset(), slot=0)
        seq.pages = [1, 2]
        packer = Packer(64, replay.plan.num_slots, 1)
        packed = np.zeros_like(replay.programs.packings[bucket].empty)
        group = packer.group(Schedule((), (Chunk(seq, 64, 32, True, 0),)))
        lay_out(replay.programs.packings[bucket], group, 1, packed)
        engines = replay.programs.packings[bucket].views(packed)
        for name in ("token_slot", "token_position", "chunk_slot", "chunk_start", "chunk_length", "chunk_kv_len"):
            np.testing.assert_array_equal(views[name], engines[name], name)
        np.testing.assert_array_equal(views["row_ints"][:2], engines["row_ints"][:2])

        replay.decode(3, 100)
        (bucket,) = (bucket for bucket in replay.programs.buckets.all() if bucket.decodes == 3)
        seqs = tuple(Sequence(i, [1], SamplingParams(), 0, 9, frozenset(), slot=i) for i in range(3))
        rows = np.array([range(3), [99] * 3], np.int32)
        packed = np.zeros_like(replay.programs.packings[bucket].empty)
        lay_out(replay.programs.packings[bucket], packer.group(Schedule(seqs, (), rows)), 1, packed)
        np.testing.assert_array_equal(np.array(seen["given"]), packed)
        # Every sequence has pages of its own, none of them the scratch page.
        table = np.array(replay.executor.state.page_table)[:, :2]
        assert len(set(table.flat)) == table.size
        assert table.min() > 0
        with pytest.raises(ValueError, match="no such step was asked for"):
            replay.decode(2, 100)
        with pytest.raises(ValueError, match="no such step was asked for"):
            replay.chunk(32, 100)
    finally:
        replay.close()


def test_batches_must_divide_over_replicas_and_stages():
    with pytest.raises(ValueError, match=r"batches \(1, 2\) do not divide over 2 replicas"):
        TimedEngine(CPU.narrow, "data=2", batches=(1, 2), prompts=(32,))
    with pytest.raises(ValueError, match="batches of 64 sequences leave no room in steps of 32 tokens"):
        TimedEngine(CPU.narrow, batches=(64,), prompts=(32,))


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("paddock.serving.platform.prepare", lambda config: None)
    monkeypatch.setattr(measuring, "_parts", lambda profile, using: iter([("copy bandwidth", fake)]))
    fake = lambda known: dataclasses.replace(known, copy=1.5e9)
    file = tmp_path / "mine.toml"
    assert main(["plan", "--calibrate", "--profile", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    assert (read_profile(file).accelerator, read_profile(file).copy) == ("cpu", 1.5e9)
    assert main(["plan", "llama-3.1-8b", "--calibrate"]) == 2
    assert "leave out MODEL" in capsys.readouterr().err
    assert main(["plan", "--accelerator", "h100-80gb"]) == 2
    assert "MODEL is missing" in capsys.readouterr().err
    assert main(["plan", "llama-3.1-8b"]) == 2
    assert "--accelerator is missing" in capsys.readouterr().err


def test_a_profile_of_this_machine_plans_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Steps for real, of models so small that it takes seconds; what they took is noise on a busy machine, and so they
    are said to have taken what `truth` says."""
    monkeypatch.setattr(measuring.jax, "device_count", lambda: 1)
    monkeypatch.setattr(step_replay, "SECONDS", 0.0)
    monkeypatch.setattr(step_replay, "ROUNDS", 1)
    truth = dataclasses.replace(TRUTH, accelerator="cpu", matrix={"float32": TRUTH.matrix["bfloat16"]})

    def steady(replay: StepReplay, points: Any) -> Any:
        assert all(seconds > 0 for seconds in step_replay.timed_steps(replay, points).values())
        return {point: predicted(replay.plan.config, "", point, profile=truth, dtype="float32") for point in points}

    monkeypatch.setattr(measuring, "timed_steps", steady)
    file, notes = tmp_path / "cpu.toml", []
    file.write_text('accelerator = "cpu"\ncopy = 1e9\n[host]\nrows = [1]\nseconds = [1e-4]')
    using = dataclasses.replace(CPU, rows=(1, 2), chunks=(64,), tokens=2**12)
    found = calibrate(file, notes.append, using)
    assert [note.partition(":")[0] for note in notes] == ["steps of one device"], notes
    assert (found.copy, found.host) == (1e9, Curve((1,), (1e-4,)))
    assert found.layer is not None, notes
    here = Accelerator("cpu", 2**33, 0.9, found.copy, {"float32": 1e12}, "", 1e9, 1, "measured")
    fields = {"dtype": "float32", "max_num_seqs": 2, "input_len": 63, "output_len": 2}
    (layout,) = plan(CPU.narrow, here, profile=read_profile(file), **fields).layouts
    assert layout.source == "measured"
    wanted = step_times(truth, "float32", CPU.narrow, "").decode(2, 64).total
    assert layout.decode[-1].seconds == pytest.approx(wanted, rel=0.02)
