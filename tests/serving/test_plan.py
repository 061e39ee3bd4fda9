"""Plans by arithmetic: the figures everybody knows of Llama on 80 GB cards, times, and the command."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest

from paddock.model.shapes import SHAPES
from paddock.serving import plan
from paddock.serving.cli import main
from paddock.serving.engine_config import GPU_TOKENS
from paddock.serving.footprint import SLACK, Footprint
from paddock.serving.layout_plan import Plan
from paddock.serving.plan_report import plan_report
from paddock.serving.roofline import Seconds
from paddock.serving.speed_profile import Curve, SpeedProfile, shipped_profile
from paddock.sharding.accelerators import accelerator, accelerators
from paddock.sharding.memory import PlannedLayout

DATASHEET_ONLY = SpeedProfile("h100-80gb")


def by_datasheet(model: str, card: str, count: int, mesh: str = "", **fields) -> Plan:
    return plan(model, card, count, mesh=mesh, memory="datasheet", **fields)


def fitting(found: Plan) -> list[str]:
    return [str(layout.mesh) for layout in found.layouts if layout.fits]


@pytest.mark.parametrize(("model", "kib"), [("llama-3.1-8b", 128), ("llama-3.1-70b", 320), ("llama-3.1-405b", 504)])
def test_kv_bytes_of_a_token(model, kib):
    (layout,) = plan(model, "h200", 8, mesh="tensor=8").layouts
    assert layout.kv_bytes_per_token == kib * 1024
    (small,) = plan(model, "h200", 8, mesh="tensor=8", kv_cache_dtype="fp8_e4m3").layouts
    assert small.kv_bytes_per_token == kib * 512
    assert small.kv_tokens == pytest.approx(2 * layout.kv_tokens, rel=0.01)


def test_8b_fits_one_card():
    (layout,) = by_datasheet("llama-3.1-8b", "h100-80gb", 1).layouts
    assert layout.fits
    assert layout.bytes_per_device.weights == pytest.approx(16.06e9, rel=0.001)
    assert layout.kv_tokens == pytest.approx((72e9 - 16.06e9) / 131072, rel=0.001)


def test_70b_step_by_step():
    (one,) = by_datasheet("llama-3.1-70b", "h100-80gb", 1).layouts
    assert not one.fits
    assert "131.4 GiB of weights" in one.reason
    assert one.decode == ()
    (two,) = by_datasheet("llama-3.1-70b", "h100-80gb", 2, "tensor=2").layouts
    assert two.fits
    assert two.kv_tokens == pytest.approx(8.8e3, rel=0.02)
    assert two.reason == "only 8,704 KV tokens are left: 7 sequences of 1,152 at once"
    for count in (4, 8):
        (layout,) = by_datasheet("llama-3.1-70b", "h100-80gb", count, f"tensor={count}").layouts
        assert layout.fits
        assert layout.sequences >= 256
        assert layout.decode[-1].batch == 256


def test_405b_step_by_step():
    assert fitting(by_datasheet("llama-3.1-405b", "h100-80gb", 8)) == []
    assert "pipe=2,tensor=8" in fitting(by_datasheet("llama-3.1-405b", "h100-80gb", 16))
    assert "tensor=8" in fitting(by_datasheet("llama-3.1-405b", "mi300x", 8))
    (layout,) = by_datasheet("llama-3.1-405b", "h200", 8, "tensor=8").layouts
    assert layout.kv_tokens == pytest.approx(394e3, rel=0.002)


def test_quantized_weights():
    (half,) = plan("llama-3.1-8b", "l40s", quantization="int8").layouts
    (full,) = plan("llama-3.1-8b", "l40s").layouts
    products = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    scales = 32 * (6144 + 4096 + 2 * 14336 + 4096) * 4
    assert full.bytes_per_device.weights - half.bytes_per_device.weights == products - scales


@pytest.mark.parametrize("mesh", ["tensor=1", "tensor=8", "pipe=3,tensor=2", "data=2,tensor=4"])
def test_pages_are_what_the_engine_would_take(mesh):
    """The same arithmetic as at the engine's start: with one page more it would not fit."""
    (layout,) = plan("llama-3.1-8b", "h100-80gb", 8, mesh=mesh, max_model_len=8192).layouts
    footprint = Footprint(SHAPES["llama-3.1-8b"], "bfloat16", 64, 256, GPU_TOKENS, 8192, SLACK)
    pages = layout.kv_tokens // layout.mesh.num_replicas // 64 + 1
    placed = PlannedLayout.of(mesh)
    available = int(84_942_979_072 * 0.9)
    assert footprint.of(placed, pages) == layout.bytes_per_device
    assert footprint.of(placed, pages).fits(available)
    assert not footprint.of(placed, pages + 1).fits(available)


def test_every_split_is_tried():
    meshes = [str(layout.mesh) for layout in plan("llama-3.1-8b", "h100-80gb", 4).layouts]
    assert meshes == ["data=4", "data=2,pipe=2", "pipe=4", "data=2,tensor=2", "pipe=2,tensor=2", "tensor=4"]
    # 24 heads do not divide over 16 devices.
    assert "tensor=16" not in [str(layout.mesh) for layout in plan("llama-3.2-3b", "h100-80gb", 16).layouts]


def test_a_file_that_names_no_mesh_is_rules_for_every_split(tmp_path):
    file = tmp_path / "whole.toml"
    file.write_text('rules = "vocab="\n')
    by_flag, by_file = (
        plan("llama-3.1-8b", "h100-80gb", 4, **asked) for asked in ({"rules": "vocab="}, {"layout": str(file)})
    )
    assert by_file == by_flag
    assert len(by_file.layouts) == 6
    file.write_text('mesh = "tensor=2"\nrules = "vocab="\n')
    assert [str(layout.mesh) for layout in plan("llama-3.1-8b", "h100-80gb", 4, layout=str(file)).layouts] == [
        "tensor=2"
    ]


def test_datasheet_times_by_hand():
    (layout,) = plan("llama-3.1-8b", "h100-80gb", profile=DATASHEET_ONLY, input_len=1000, output_len=200).layouts
    assert layout.source == "datasheet"
    embedding = 128256 * 4096 * 2
    read = layout.bytes_per_device.weights - embedding
    one, *_, last = layout.decode
    assert one.seconds == pytest.approx((read + 1100 * 131072) / 3.35e12, rel=0.001)
    assert last.seconds == pytest.approx((read + 256 * 1100 * 131072) / 3.35e12, rel=0.001)
    assert (one.bound, last.bound) == ("memory", "memory")
    assert last.tokens_per_second == pytest.approx(256 / last.seconds)
    mlp = 3 * 4096 * 14336
    products = 32 * (4096 * 6144 + 4096 * 4096 + mlp) * 1000 - mlp * 999  # the last MLP is for the row that is sampled
    attention = 32 * 32 * 4 * 128 * 1000 * 1001 / 2
    assert layout.prefill_seconds == pytest.approx((2 * products + attention) / 989.4e12 + embedding / 3.35e12)


def test_h100_profile_gives_the_measured_steps():
    """docs/numbers.md, the engine on the 8B shape: steps, where the profile has times of kernels."""
    (layout,) = plan("llama-3.1-8b", "h100-80gb", input_len=128, output_len=128, max_num_batched_tokens=4096).layouts
    assert layout.source == "measured"
    predicted = {point.batch: point.seconds * 1000 for point in layout.decode}
    for batch, measured in ((1, 5.89), (32, 6.39), (256, 10.32)):
        assert predicted[batch] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("card", ["h100-80gb", "h200"])
@pytest.mark.parametrize("count", [2, 8, 12])
def test_no_step_takes_longer_than_a_larger_one(card, count):
    """Though an H100's profile has ten times more at one row than at eight for the logits' way over two devices."""
    for model in ("llama-3.1-8b", "llama-3.1-70b"):
        for layout in plan(model, card, count, max_num_seqs=300).layouts:
            seconds = [point.seconds for point in layout.decode]
            assert seconds == sorted(seconds), layout.mesh
    noise = {"weights": Curve((1, 50, 99), (1e12, 1e10, 9e12)), "host": Curve((1, 80, 99), (2.0, 1.0, 3.0))}
    worse = dataclasses.replace(shipped_profile("h100-80gb"), **noise, vocab={2: Curve((1, 64, 150), (2.0, 9.0, 0.1))})
    (noisy,) = plan("llama-3.1-8b", "h100-80gb", 2, mesh="tensor=2", max_num_seqs=100, profile=worse).layouts
    assert [point.seconds for point in noisy.decode] == sorted(point.seconds for point in noisy.decode)
    alone, many = (plan("llama-3.1-8b", "h100-80gb", 2, mesh="tensor=2", max_num_seqs=n).layouts[0] for n in (1, 256))
    assert alone.decode[0] == many.decode[0]


def test_stages_take_turns():
    """A token takes a tick per stage, each for its share of the sequences: weights are read as often as on one."""
    one = plan("llama-3.1-8b", "h100-80gb", profile=DATASHEET_ONLY).layouts[0].decode
    four = plan("llama-3.1-8b", "h100-80gb", 4, mesh="pipe=4", profile=DATASHEET_ONLY).layouts[0].decode
    at = {point.batch: point.seconds for point in four}
    assert at[1] == pytest.approx(at[4])
    assert at[4] == pytest.approx(one[0].seconds, rel=0.01)


def test_every_replica_runs_max_num_seqs():
    """As in the engine: each replica has the steps of an engine of its own."""
    one, four = (
        plan("llama-3.1-8b", "h100-80gb", count, mesh=f"data={count}", max_num_seqs=32).layouts[0] for count in (1, 4)
    )
    assert four.bytes_per_device == one.bytes_per_device
    assert [(p.batch, p.seconds) for p in four.decode] == [(4 * p.batch, p.seconds) for p in one.decode]
    assert four.decode[-1].batch == 128
    found = plan("llama-3.1-8b", "h100-80gb", 8, max_num_seqs=4)
    assert "data=8" in [str(layout.mesh) for layout, _ in found.meeting(itl=0.1)]
    # Sequences that fit are counted over all replicas, and so are those that are wanted.
    short = plan("llama-3.1-8b", "h100-80gb", 2, mesh="data=2", input_len=4000, max_num_seqs=128).layouts[0]
    assert 128 < short.sequences < 256
    assert "only" in short.reason


def test_the_largest_batch_that_is_held_has_a_time():
    """What makes tokens cheapest: 61 sequences over 8 stages read the weights as often as 32 do."""
    found = plan("llama-3.1-405b", "h200", 8, input_len=4096, output_len=256)
    deep = {str(layout.mesh): layout for layout in found.layouts}["pipe=8"]
    assert deep.sequences == 61
    assert [point.batch for point in deep.decode] == [1, 2, 4, 8, 16, 32, 61]
    assert deep.decode[-1].tokens_per_second > 1.8 * deep.decode[-2].tokens_per_second
    assert dict((str(layout.mesh), point.batch) for layout, point in found.meeting())["pipe=8"] == 61
    (two,) = plan("llama-3.1-70b", "h100-80gb", 4, mesh="data=2,tensor=2", memory="datasheet").layouts
    assert (two.sequences, [point.batch for point in two.decode]) == (14, [2, 4, 8, 14])


def test_tensor_parallelism_across_hosts_pays_for_the_network():
    fields = {"input_len": 128, "output_len": 128}
    inside, outside, strided = (
        plan("llama-3.1-405b", "h100-80gb", 16, mesh=mesh, **fields).layouts[0].decode[-1]
        for mesh in ("pipe=2,tensor=8", "tensor=16", "tensor=8,pipe=2")
    )
    # With pipe varying fastest a tensor group spreads over both hosts.
    assert strided.seconds > inside.seconds
    slow = dataclasses.replace(accelerator("h100-80gb"), nic_bandwidth=1e9)
    over_slow = plan("llama-3.1-405b", slow, 16, mesh="tensor=16", **fields).layouts[0].decode[-1]
    within = plan("llama-3.1-405b", slow, 16, mesh="pipe=2,tensor=8", **fields).layouts[0].decode[-1]
    assert over_slow.bound == "links"
    assert over_slow.seconds > 5 * outside.seconds
    assert within.bound != "links"


def test_measured_all_reduces_are_used():
    reductions = SpeedProfile("h200", all_reduce=shipped_profile("h200").all_reduce)
    (measured,) = plan("llama-3.1-8b", "h200", 2, mesh="tensor=2", profile=reductions).layouts
    (sheet,) = plan("llama-3.1-8b", "h200", 2, mesh="tensor=2", profile=SpeedProfile("h200")).layouts
    # 65 reductions of 22 to 24 microseconds that a datasheet says nothing about.
    assert measured.decode[0].seconds - sheet.decode[0].seconds == pytest.approx(65 * 24e-6, rel=0.02)
    assert measured.source == "datasheet"


@pytest.mark.parametrize(
    ("card", "mesh", "fields", "source"),
    [
        ("h100-80gb", "tensor=1", {}, "measured"),
        ("h100-80gb", "tensor=4", {}, "datasheet links"),
        ("h100-80gb", "tensor=1", {"quantization": "int8"}, "datasheet products"),
        ("h100-80gb", "tensor=1", {"quantization": "fp8"}, "datasheet products"),
        ("h100-80gb", "tensor=1", {"kv_cache_dtype": "fp8_e4m3"}, "datasheet attention"),
        ("h100-80gb", "tensor=4", {"dtype": "float16"}, "datasheet products, attention, links"),
        ("b200", "tensor=1", {}, "datasheet"),
        ("b200", "tensor=8", {}, "datasheet"),
    ],
)
def test_the_label_says_which_figures_are_a_datasheets(card, mesh, fields, source):
    (layout,) = plan("llama-3.1-8b", card, 8, mesh=mesh, **fields).layouts
    assert layout.source == source


def test_what_was_measured_of_one_dtype_is_not_said_of_another():
    fields = {"quantization": "int8", "kv_cache_dtype": "int8", "dtype": "bfloat16"}
    shipped = shipped_profile("h100-80gb")
    attention = {"decode_attention": None, "prefill_attention": None}
    without = dataclasses.replace(shipped, weights=None, head=None, matrix={}, **attention)
    one, other = (plan("llama-3.1-8b", "h100-80gb", profile=profile, **fields) for profile in (shipped, without))
    assert one.layouts == other.layouts
    without_host = dataclasses.replace(shipped, host=None)
    assert plan("llama-3.1-8b", "h100-80gb", profile=without_host).layouts[0].source == "datasheet host"


def test_the_slow_host_bounds():
    profile = dataclasses.replace(DATASHEET_ONLY, host=Curve((1, 256), (1.0, 2.0)))
    points = plan("llama-3.1-8b", "h100-80gb", profile=profile).layouts[0].decode
    assert {point.bound for point in points} == {"host"}
    assert (points[0].seconds, points[-1].seconds) == (1.0, 2.0)
    assert Seconds(memory=1, matrix=2, host=2.5).bound == "matrix"


def test_times_that_nobody_can_tell_are_left_out_with_the_reason():
    (gathered,) = plan("llama-3.1-8b", "h100-80gb", 4, layout="pope-xyz-weight-gathered").layouts
    assert gathered.fits
    assert (gathered.prefill_seconds, gathered.decode) == (None, ())
    assert gathered.untimed == "times are not predicted for layouts that split embed"
    (far,) = plan("llama-3.1-405b", "mi300x", 16, mesh="tensor=16").layouts
    assert "mi300x has no known bandwidth between its islands of 8" in far.untimed
    report = plan_report(plan("llama-3.1-405b", "mi300x", 16))
    assert "no times for pipe=16; " in report
    assert report.count("no known bandwidth") == 1


SWEEP = """
import time
from paddock.serving import plan
sweep = lambda n: len(plan("llama-3.1-70b", "h100-80gb", 64, input_len=1000 + n).layouts)
sweep(0)
start, layouts = time.process_time(), 0
while layouts < 400:
    layouts += sweep(layouts)
print(layouts / (time.process_time() - start))
"""


def test_a_notebook_may_sweep_thousands():
    """200 layouts a second of CPU time, where a slow core reaches 1,000; without the type checks of tests."""
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 200


def test_cheapest_first():
    found = plan("llama-3.1-70b", "h100-80gb", 8)
    best = found.meeting(ttft=0.1, itl=0.02)
    assert str(best[0][0].mesh) == "tensor=8"
    assert all(layout.prefill_seconds <= 0.1 and point.seconds <= 0.02 for layout, point in best)
    rates = [point.tokens_per_second for _, point in best]
    assert rates == sorted(rates, reverse=True)
    assert found.meeting(itl=1e-6) == []


def test_curves_and_profiles():
    curve = Curve((1, 3), (10.0, 20.0))
    assert [curve.at(x) for x in (0, 1, 2, 3, 5)] == [10, 10, 15, 20, 20]
    assert Curve((1, 3), (10.0, 20.0), extends=True).at(5) == 30
    assert Curve((1, 3), (20.0, 10.0), extends=True).at(5) == 10
    layer = shipped_profile("h100-80gb").layer
    assert [layer.at(rows) for rows in (8192, 16384)] == [layer.y[-1]] * 2
    assert shipped_profile("mi300x") == SpeedProfile("mi300x")
    assert set(shipped_profile("h200").all_reduce) == {2, 4}
    with pytest.raises(ValueError, match="speed profile mine: 'accelerator' is missing"):
        SpeedProfile.read("[host]\nrows=[1]\nseconds=[1.0]", "mine")
    with pytest.raises(ValueError, match=r"mine: points must ascend.*\[2, 1\]"):
        SpeedProfile.read('accelerator="a"\n[host]\nrows=[2, 1]\nseconds=[1.0, 2.0]', "mine")
    with pytest.raises(ValueError, match="mine: unknown key 'hots'"):
        SpeedProfile.read('accelerator="a"\n[hots]', "mine")
    with pytest.raises(ValueError, match="profile is of h200, not of h100-80gb"):
        plan("llama-3.1-8b", "h100-80gb", profile=shipped_profile("h200"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('copy = "fast"', "copy must be a number, got 'fast'"),
        ("copy = -1", "copy must be a number above 0, got -1"),
        ("copy = nan", "copy must be a number above 0, got nan"),
        ("weights = 3", "weights must be a table of rows and bytes_per_second, got 3"),
        ("[weights]\nrows = [1]", "weights has no bytes_per_second"),
        ("[[hop]]\nbytes = [1]\nseconds = [0]", "hop has no devices"),
        ("[weights]\nrows = 1\nbytes_per_second = [1.0]", "weights.rows must be an array, got 1"),
        ("[weights]\nrows = [1]\nbytes_per_second = [0]", "each of weights.bytes_per_second must be .* above 0, got 0"),
        ('[host]\nrows = [1, 2]\nseconds = ["a", "b"]', "each of host.seconds must be a number, got 'a'"),
        ("[host]\nrows = [1]\nseconds = [-1.0]", "each of host.seconds must be a number of at least 0, got -1.0"),
        ("[host]\nrows = [2, 1]\nseconds = [1.0, 2.0]", r"points must ascend.*\[2, 1\].* in host"),
        ("[hop]\ndevices = 2", "hop must be an array of tables, got {'devices': 2}"),
        ("[[hop]]\nbytes = [1]\nseconds = [0]\ndevices = 'two'", "hop.devices must be a whole number, got 'two'"),
        ("[matrix]\nbfloat16 = 3", "matrix.bfloat16 must be a table of rows and operations_per_second, got 3"),
        ("fitted = 1", "fitted must be an array, got 1"),
    ],
)
def test_a_profile_that_is_wrong(text, message, tmp_path, capsys):
    file = tmp_path / "mine.toml"
    file.write_text(f'accelerator = "h100-80gb"\n{text}')
    assert main(["plan", "llama-3.1-8b", "--accelerator", "h100-80gb", "--profile", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^paddock: speed profile {re.escape(str(file))}: {message}", line)


def test_json(capsys):
    limits = ["--ttft", "20", "--itl", "6"]
    assert main(["plan", "llama-3.1-8b", "--accelerator", "h100-80gb", "--count", "2", "--json", *limits]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[key] for key in ("model", "accelerator", "count")] == ["llama-3.1-8b", "h100-80gb", 2]
    assert [layout["mesh"] for layout in found["layouts"]] == ["data=2", "pipe=2", "tensor=2"]
    for layout in found["layouts"]:
        assert list(layout) == [
            *("mesh", "fits", "reason", "bytes_per_device", "kv_bytes_per_token", "kv_tokens"),
            *("prefill_seconds", "decode", "source", "untimed", "rules", "sequences", "meets"),
        ]
        held = layout["bytes_per_device"]
        assert list(held) == ["weights", "kv_cache", "temp", "total"]
        assert held["total"] == held["weights"] + held["kv_cache"] + held["temp"]
        assert list(layout["decode"][0]) == ["batch", "seconds", "bound"]
        assert (layout["source"], layout["untimed"], layout["rules"]) == ("measured", None, "")
        assert layout["sequences"] >= 256
    assert [layout["meets"] for layout in found["layouts"]] == [False, False, True]
    cheapest = [{"mesh": "tensor=2", "batch": 64}]
    assert found["objectives"] == {"ttft_seconds": 0.02, "itl_seconds": 0.006, "cheapest": cheapest}


def test_json_without_objectives_or_times():
    found = plan("llama-3.1-8b", "h100-80gb", 4, layout="pope-xyz-weight-gathered").to_json()
    (layout,) = found["layouts"]
    assert (layout["source"], layout["meets"]) == (None, None)
    assert layout["untimed"] == "times are not predicted for layouts that split embed"
    assert layout["rules"] == "embed=x,vocab=,batch=x"
    assert found["objectives"] == {"ttft_seconds": None, "itl_seconds": None, "cheapest": []}


def test_table_and_page(capsys, tmp_path):
    page = tmp_path / "report.html"
    options = ["--count", "2", "--ttft", "1000", "--itl", "30", "--memory", "datasheet", "--html", str(page)]
    assert main(["plan", "llama-3.1-70b", "--accelerator", "h100-80gb", *options]) == 0
    text = capsys.readouterr().out
    assert "74.51 GiB each (datasheet), 90% used" in text
    assert "only 8,704 KV tokens are left: 7 sequences of 1,152 at once" in text
    assert "TTFT <= 1000 ms and ITL <= 30 ms, cheapest first:\nmesh" in text
    html = page.read_text()
    assert "Pareto front" in html
    assert "TTFT &lt;= 1000 ms and ITL &lt;= 30 ms, cheapest first:" in html
    assert "memory of h100-80gb" in html
    assert "8,704 KV tokens" in html


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama-3.1-405b", "--count", "8"], r"does not fit 8 x h100-80gb .*smallest meshes .*: pipe=3,tensor=4; "),
        (["llama-3.1-8b", "--mesh", "tensor=3", "--count", "3"], "q_heads of size 32 .*does not divide over 3"),
        (["llama-3.1-8b", "--mesh", "tensor=4"], "tensor=4 needs 4 devices, but count is 1"),
        (["llama-3.1-8b", "--accelerator", "h1000"], "accelerator 'h1000' is unknown"),
        (["llama-9"], "model 'llama-9' is neither a folder, nor a config.json, nor one of llama-2-7b"),
        (["llama-3.1-8b", "--count", "0"], "count must be at least 1"),
        (
            ["llama-3.1-8b", "--count", "8", "--rules", "nosuch=tensor"],
            "^paddock: rules: unknown logical axis 'nosuch'",
        ),
        (["llama-3.1-8b", "--count", "8", "--rules", "mlp=nosuch"], "^paddock: rules: mlp names mesh axis 'nosuch'"),
        (["llama-3.1-8b", "--count", "3", "--rules", "mlp=tensor"], "no layout of 3 devices .*: rules: mlp names"),
        (["llama-3.1-8b", "--itl", "0"], "--itl must be more than 0 ms"),
        (["llama-3.1-8b", "--max-model-len", "100"], "max_model_len 100 is less than input_len"),
        (["llama-2-7b", "--max-model-len", "9999"], "more than the 4096 tokens of llama-2-7b"),
        (["llama-3.1-8b", "--input-len", "131000"], r"input_len \+ output_len, 131128 is more than the 131072 tokens"),
        (
            ["llama-3.1-70b", "--count", "2", "--mesh", "tensor=2", "--input-len", "30000", "--ttft", "100000"],
            "tensor=2: 14,464 KV tokens are left to a sequence in 90% of 79.11 GiB, fewer than the 30,128",
        ),
        (  # What both replicas hold together would do.
            ["llama-3.1-70b", "--count", "4", "--mesh", "data=2,tensor=2", "--input-len", "20000"],
            "tensor=2: 14,464 KV tokens are left to a sequence .*, fewer than the 20,128 that it needs",
        ),
    ],
)
def test_one_clear_sentence(words, message, capsys):
    assert main(["plan", "--accelerator", "h100-80gb", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])


WRONG = """
from paddock.serving import plan
for fields in (
    {"count": 1.5}, {"count": "8"}, {"mesh": {"tensor": 4}}, {"rules": {"mlp": "tensor"}}, {"layout": 3},
    {"input_len": 1.5}, {"max_model_len": "8192"}, {"max_model_len": 0}, {"utilization": "0.9"},
    {"accelerator_name": ["h200"]}, {"profile": "mine.toml"}, {"demand": {}},
):
    try:
        plan(**{"model": "llama-3.1-8b", "accelerator_name": "h100-80gb"} | fields)
    except ValueError as error:
        print(error)
"""


def test_arguments_of_another_kind():
    """Without the type checks of tests."""
    done = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True, check=True)
    spelling = "must be text in the flag's spelling, as in 'tensor=4', got"
    assert done.stdout.splitlines() == [
        "count must be an int, got 1.5",
        "count must be an int, got '8'",
        f"mesh {spelling} {{'tensor': 4}}",
        f"rules {spelling} {{'mlp': 'tensor'}}",
        f"layout {spelling} 3",
        "input_len must be an int, got 1.5",
        "max_model_len must be an int, got '8192'",
        "max_model_len must be at least 1, got 0",
        "utilization must be a number in (0, 1], got '0.9'",
        f"accelerator \"['h200']\" is unknown; there are {', '.join(accelerators())}",
        "profile must be a SpeedProfile, got 'mine.toml'",
        "demand must be a Demand, got {}",
    ]


def test_config_without_a_field(capsys, tmp_path):
    config = SHAPES["llama-3.2-1b"].to_hf_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--accelerator", "tpu-v5e", "--json"]) == 0
    capsys.readouterr()
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path / "config.json"), "--accelerator", "tpu-v5e"]) == 2
    assert "hidden_size" in capsys.readouterr().err


def test_plan_only_says_what_the_engine_would_take(capsys, monkeypatch):
    monkeypatch.setattr("paddock.serving.platform.prepare", lambda config: None)
    sizes = ["--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", str(2**26)]
    assert main(["serve", "--plan-only", "-tp", "2", *sizes]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the bundled model on tensor=2 of 8 x cpu, float32: fits\n")
    assert "no times: cpu is not in the table" in text
    assert main(["serve", "--plan-only", "-tp", "3", *sizes]) == 2


@pytest.mark.parametrize(("mesh", "sequences"), [("tensor=2", 4), ("data=2,x=2", 8)])
def test_plan_only_counts_sequences_in_whole_pages_of_a_partition(mesh, sequences, capsys, monkeypatch):
    """Of 17 tokens each, which take two pages of 16."""
    monkeypatch.setattr("paddock.serving.platform.prepare", lambda config: None)
    rules = ["--rules", "batch=x"] if "x" in mesh else []
    sizes = ["--max-num-seqs", "4", "--max-model-len", "17", "--block-size", "16"]
    assert main(["serve", "--plan-only", "--mesh", mesh, *rules, *sizes]) == 0
    assert f"{sequences * 32} KV tokens, {sequences} sequences of 17\n" in capsys.readouterr().out


@pytest.mark.parametrize(("mesh", "batches"), [("tensor=2", ["1", "2", "4"]), ("data=2", ["2", "4", "8"])])
def test_plan_only_predicts_times_on_a_known_card(mesh, batches, capsys, monkeypatch):
    monkeypatch.setattr("paddock.serving.platform.prepare", lambda config: None)
    card = dataclasses.replace(accelerator("h100-80gb"), device_kind="cpu")
    monkeypatch.setattr("paddock.sharding.accelerators.accelerators", lambda: {card.name: card})
    sizes = ["--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--dtype", "bfloat16"]
    assert main(["serve", "--plan-only", "--mesh", mesh, *sizes]) == 0
    text = capsys.readouterr().out
    assert "of 8 x cpu, bfloat16: fits" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(mesh)]
    assert [row[2] for row in rows[1:]] == batches
    assert {row[-1] for row in rows[1:]} == {"measured"}
