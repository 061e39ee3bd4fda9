"""The Mosaic all-reduces on real GPUs, two or more of one host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from all_reduce_cases import differences, mesh_of

from paddock.serving.mailboxes import Mailboxes

pytestmark = pytest.mark.gpu
ROUNDS = 100


@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [
        (1, 4096, jnp.bfloat16),
        (8, 1024, jnp.float16),
        (9, 2048, jnp.float32),
        (130, 4096, jnp.bfloat16),
        (256, 4096, jnp.bfloat16),
    ],
)
def test_every_device_has_the_same_bits(rows: int, width: int, dtype: Any, two_shot: bool) -> None:
    """A race would show as a difference in some round."""
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    mesh = mesh_of(jax.devices())
    boxes = Mailboxes.open(mesh, ["b"])
    program = differences(mesh, boxes.table, "mosaic", rows, width, ROUNDS, dtype, two_shot=two_shot)
    sums, totals, error = np.asarray(program(np.asarray([rows], np.int32))).max(0)
    assert sums == totals == 0
    assert error <= 5e-3
