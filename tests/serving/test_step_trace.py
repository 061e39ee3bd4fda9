"""What is read out of a profile: parts, idle time, gaps; and the command that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import tiny_llm

from paddock.serving.bench_profile import decode_bucket, record_as_usual
from paddock.serving.bench_workload import Job
from paddock.serving.cli import main
from paddock.serving.programs import Programs
from paddock.serving.step_parts import OTHER, PARTS, RESIDUAL, UNATTRIBUTED, part_of_instruction, parts_of
from paddock.serving.step_trace import STEPS, Kernel, StepTrace, _of_line, covered

CACHE = Path(__file__).parents[2] / "build" / "test-compile-cache"
HLO = """
%split (p: f32[4]) -> f32[4] {
  %dot.3 = f32[4]{0} dot(%p, %p), metadata={op_name="jit(step)/layer0/mlp/down/dot_general"}
  ROOT %convert.3 = f32[4]{0} convert(%dot.3)
}

%fused (p: f32[4]) -> f32[4] {
  ROOT %add.1 = f32[4]{0} add(%p, %p), metadata={op_name="jit(step)/layer0/attention/qkv/add" source_line=3}
}
ENTRY %main {
  %fusion.7 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/layer0/mlp/norm/mul"}
  ROOT %custom-call.2 = f32[4]{0} custom-call(%y), metadata={op_name="jit(step)/layer1/attention/attend/jit(decode)/m"}
  %add.9 = f32[4]{0} add(%x, %y), metadata={op_name="jit(step)/layer1/attention/add"}
  %gemm_fusion_dot.5 = (f32[4]{0}, s8[9]{0}) fusion(f32[4]{0} %x), kind=kCustom, calls=%split
  %reduce_fusion.6 = f32[4]{0} fusion(%gemm_fusion_dot.5), kind=kLoop, calls=%nothing_known
  %mpmd.8 = f32[4]{0} custom-call(%y), metadata={op_name="jit(step)/layer1/mlp/norm/jit(add_norm)/add_row/mpmd_map"}
}
"""


def test_idle_time_is_what_no_kernel_covers() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (8, 20)], 1, 10) == 2 + 1 + 2
    assert covered([], 0, 1) == 0


def test_instructions_belong_to_the_innermost_scope() -> None:
    parts = part_of_instruction(HLO)
    wanted = {"add.1": "qkv", "fusion.7": "norm", "custom-call.2": "attend", "add.9": "residual"}
    assert {name: parts[name] for name in wanted} == wanted


def test_instructions_without_scopes_belong_where_what_they_call_or_read_does() -> None:
    parts = part_of_instruction(HLO)
    assert parts["gemm_fusion_dot.5"] == parts["reduce_fusion.6"] == "down"
    assert parts["add_row_mosaic_gpu_kernel"] == parts["mpmd.8"] == "norm"


def test_collectives_are_a_part_of_their_own() -> None:
    parts = part_of_instruction("""
%wrapped (p: f32[4]) -> f32[4] {
  ROOT %reduce-scatter.1 = f32[2]{0} reduce-scatter(%p), to_apply=%sum
}
ENTRY %main {
  %dot.1 = f32[4]{0} dot(%x, %x), metadata={op_name="jit(step)/layer0/mlp/down/dot_general"}
  %all-reduce-start.1 = f32[4]{0} all-reduce-start(%dot.1), metadata={op_name="jit(step)/layer0/mlp/down/dot_general"}
  %all-reduce-done.1 = f32[4]{0} all-reduce-done(%all-reduce-start.1)
  %async-start.1 = ((f32[4]), f32[2]) async-start(%dot.1), calls=%wrapped
  %mpmd.1 = f32[4]{0} custom-call(%y), metadata={op_name="a/layer0/mlp/down/jit(all_reduce_mosaic)/body/mpmd_map"}
  %add.1 = f32[4]{0} add(%all-reduce-done.1, %x), metadata={op_name="jit(step)/layer0/add"}
}""")
    sums = {"all-reduce-start.1", "all-reduce-done.1", "async-start.1", "mpmd.1", "body_mosaic_gpu_kernel"}
    assert {name for name, part in parts.items() if part == "collectives"} == {*sums, "reduce-scatter.1"}
    assert (parts["dot.1"], parts["add.1"]) == ("down", "residual")


def steps(*kernels: tuple[str, str, float, float], count: int = 10, period: float = 100) -> StepTrace:
    """The same kernels (name, op, start, end) `count` times, a `period` apart."""
    events = [
        Kernel(name, op, step * period + start, step * period + end, end - start)
        for step in range(count)
        for name, op, start, end in kernels
    ]
    return StepTrace(tuple(events), on_gpu=True)


def test_parts_are_told_apart_by_instruction_or_by_name() -> None:
    trace = steps(
        ("nvjet", "fusion.7", 0, 10), ("fusion_7", "", 10, 20), ("custom_call_2", "", 30, 60), ("memcpy", "", 60, 70)
    )
    parts = {part.name: part for part in parts_of(trace, part_of_instruction(HLO), {"attend": 15e-9})}
    assert trace.num_steps == 10
    assert set(parts) == {"norm", "attend", UNATTRIBUTED}
    assert (parts["norm"].kernels, parts["norm"].seconds) == (2, pytest.approx(20e-9))
    assert parts["attend"].share == pytest.approx(30 / 60)
    assert parts["attend"].row[-1] == "50%"
    assert parts["norm"].floor is None


def test_kernels_of_a_graph_are_shared_out_as_those_that_tell() -> None:
    """One step tells what its kernels are for, nine do not: the same product serves `qkv`, 10 ns, and `down`, 30."""
    told = [Kernel("nvjet", "add.1", 0, 10, 10), Kernel("nvjet", "gemm_fusion_dot.5", 10, 40, 30)]
    graphs = steps(("nvjet", "", 100, 112), ("nvjet", "", 112, 140), ("once", "", 140, 141), count=9).kernels
    trace = StepTrace((*told, Kernel("once", "", 40, 41, 1), *graphs), on_gpu=True)
    assert trace.num_steps == 10
    parts = {part.name: part for part in parts_of(trace, part_of_instruction(HLO), {})}
    assert (parts["qkv"].kernels, parts["down"].kernels) == (1, 1)
    assert parts["qkv"].seconds == pytest.approx(10e-9)
    assert parts["down"].seconds == pytest.approx(30e-9)
    assert parts[UNATTRIBUTED].seconds == pytest.approx(1e-9)


@pytest.mark.parametrize(
    ("on_gpu", "spans", "busy"),
    [
        (True, [(0, 10), (4, 30), (5, 9), (32, 37)], [10, 20, 0, 5]),
        (False, [(0, 10), (2, 7), (10, 30), (32, 37)], [5, 5, 20, 5]),
    ],
)
def test_time_that_kernels_share_is_counted_once(on_gpu: bool, spans: list[tuple], busy: list[float]) -> None:
    """On a GPU one that is launched early waits for those before it; on a CPU calls are nested."""
    stats = {"hlo_module": "jit_step", "hlo_op": "add"}
    events = [SimpleNamespace(name="k", stats=stats, start_ns=a, duration_ns=b - a) for a, b in spans]
    assert [kernel.busy_ns for kernel in _of_line(events, on_gpu=on_gpu)] == busy


def test_idle_share_and_the_longest_gaps() -> None:
    trace = steps(("a", "", 0, 40), ("b", "", 40, 60), ("c", "", 70, 80))
    assert trace.idle_share() == pytest.approx(0.3, abs=0.05)
    assert [gap[1:] for gap in trace.gaps(7)][:5] == [("c", "a")] * 5
    assert trace.gaps(1)[0][0] == pytest.approx(20e-9)


def test_a_profile_with_graphs_has_its_results_on_the_device(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []
    with tiny_llm(golden / "gqa") as llm:
        compiled = llm.engine.replicas[0].executor.compiled
        bucket = decode_bucket(llm.engine, 1)
        usual = compiled[bucket]
        compile_step = Programs.compile_step

        def seen(programs: Programs, *how: Any) -> Any:
            step = compile_step(programs, how[0])  # a CPU knows no command buffers

            def run(*arguments: Any) -> Any:
                result = step(*arguments)
                kinds.append(result[2].sampled.tokens.sharding.memory_kind)
                return result

            return run

        monkeypatch.setattr(Programs, "compile_step", seen)
        record_as_usual(llm.engine, [Job(4, 24)], [[1, 2, 3, 4]], tmp_path)
        assert set(kinds) == {"device"}
        assert compiled[bucket] is usual


def test_bench_latency_profiles_a_step(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU: instructions instead of kernels, and no floors."""
    flags = f"--skip-tokenizer-init --dtype float32 --block-size 4 --max-num-seqs 4 --max-num-batched-tokens 32 \
        --kv-cache-memory-bytes {2**20} --batch-size 2 --input-len 4 --output-len 110 --num-iters 1 \
        --num-iters-warmup 0"
    folders = ["--model", str(golden / "gqa"), "--compile-cache-dir", str(CACHE)]
    command = ["bench", "latency", "--profile", str(tmp_path / "profile"), *folders, *flags.split()]
    assert main(command) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert len(list((tmp_path / "profile" / "parts").rglob("*.xplane.pb"))) == 1
    # Not all of them: programs in JAX's cache have the scopes of the day on which they were compiled.
    assert {"embed", "head", "sample"} <= result["parts_us"].keys() <= {*PARTS, RESIDUAL, OTHER, UNATTRIBUTED}
    assert sum(result["parts_us"].values()) > 4 * result["parts_us"].get(UNATTRIBUTED, 0.0)
    assert "instructions on the CPU" in out
    assert result["bucket"] == "2+0f"
    assert 8 <= result["profiled_steps"] <= STEPS + 4
    assert main(command) == 2, "a folder with a profile in it is left alone"
    assert "holds a profile already" in capsys.readouterr().err
