"""Decode steps whose layers are kernels of ours alone, each launched while the one before ends: the same numbers, bit
for bit, as where every kernel waits for the one before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from paddock.checkpoints import load
from paddock.model.shapes import SHAPES
from paddock.serving.bucket import Bucket
from paddock.serving.programs import Programs
from paddock.serving.step_planning import plan_steps
from paddock.serving.step_products import is_chained
from paddock.sharding import Layout

pytestmark = pytest.mark.gpu
MODEL = dataclasses.replace(SHAPES["llama-3.1-8b"], num_layers=3, vocab_size=4096)
# In command buffers no kernel starts early: XLA makes a graph of its own of each of ours.
GRAPH = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL"}
STEPS, ROUNDS = 8, 20


@pytest.mark.parametrize("add_norm", ["mosaic", "products"])
@pytest.mark.parametrize("rows", [2, 32, 256])
def test_kernels_that_start_early_compute_the_same(rows: int, add_norm: str) -> None:
    layout = Layout.build("tensor=1")
    sizes: dict[str, Any] = {"page_size": 64, "max_num_seqs": rows, "max_num_batched_tokens": 8 * rows}
    kernels = {"products": "mosaic", "add_norm": add_norm, "decode_attention": "mosaic"}
    plan, buckets = plan_steps(MODEL, layout, dtype="bfloat16", max_model_len=256, **kernels, **sizes)
    assert is_chained(plan, rows)
    programs = Programs(plan, buckets, rows * plan.pages_per_seq + 1)
    params = load(Path(), MODEL, layout, "bfloat16", "dummy", seed=0)
    bucket = Bucket(rows, 0, 0, plan.branches)
    graph, stream = programs.compile_step(bucket, GRAPH), programs.compile_step(bucket)
    waiting = list(logits(graph, programs, params, bucket))
    assert all(np.isfinite(step).all() for step in waiting)
    assert not (waiting[0] == waiting[-1]).all()
    for _ in range(ROUNDS):
        for early, late in zip(logits(stream, programs, params, bucket), waiting, strict=True):
            np.testing.assert_array_equal(early, late)


def logits(
    compiled: jax.stages.Compiled, programs: Programs, params: dict[str, jax.Array], bucket: Bucket
) -> Iterator[np.ndarray]:
    """Of some steps from the sequences' first token on, all of which are queued at once."""
    plan, packing, rows = programs.plan, programs.packings[bucket], bucket.decodes
    cache, state = programs.compile_allocate()()
    pages = np.arange(1, rows * plan.pages_per_seq + 1, dtype=np.int32).reshape(rows, -1)
    state = state._replace(page_table=plan.layout.put(pages))
    outputs = []
    for step in range(STEPS):
        host = packing.empty.copy()
        views = packing.views(host)
        views["decode_slot"][:] = views["row_ints"][0] = np.arange(rows)
        views["decode_position"][:] = step
        cache, state, output = compiled(params, cache, state, plan.layout.put(host))
        outputs.append(output.logits)
    return iter(jax.device_get(outputs))
