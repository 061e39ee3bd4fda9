"""All-reduces: the references over CPU devices, mailboxes, refusals, and the kernels as a GPU's compiler takes them.

The interpreter of Mosaic kernels hangs with several CPU devices: on those kernels run on GPUs alone.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from all_reduce_cases import differences, mapped, mesh_of
from gpu_compiler import compiles_kernels

from paddock.pallas_kernels import ALL_REDUCE, ALL_REDUCE_ADD_NORM, MailboxShape, check_all_reduce_mosaic
from paddock.pallas_kernels.mailbox import BLOCKS, COUNTER_BYTES
from paddock.serving.mailboxes import Mailboxes, abstract_table
from paddock.serving.plan_prove import target_description
from paddock.serving.plan_prove_worker import described_devices


def test_references_sum_over_their_axis_alone():
    """Two groups of two devices: the sum, the residual and the norm, in float32 where rounding hides nothing."""
    mesh = mesh_of(jax.devices()[:4], 2)
    found = differences(mesh, None, "reference", 3, 256, 2, jnp.float32)(np.asarray([0], np.int32))
    assert found.shape == (4, 3)
    assert np.asarray(found).max() <= 1e-6


@pytest.mark.parametrize(
    ("message", "change"),
    {
        "rows must be": {"residual": np.zeros((2, 8), np.int32)},
        r"do not fit together: \(1, 2, 8\), \(2, 4\)": {"residual": np.zeros((2, 4), np.float32)},
        r"scale must be float32\(8,\)": {"scale": np.zeros(8, np.float16)},
        r"mailbox must be int32\(4, 2\)": {"mailbox": np.zeros((3, 2), np.int32)},
    }.items(),
)
@pytest.mark.parametrize("name", sorted(ALL_REDUCE))
def test_arguments_that_do_not_fit_are_refused(name: str, message: str, change: dict[str, Any]):
    arrays = {
        "parts": np.zeros((1, 2, 8), np.float32),
        "residual": np.zeros((2, 8), np.float32),
        "scale": np.zeros(8, np.float32),
        "mailbox": np.zeros((4, 2), np.int32),
    }

    def run(_: jax.Array) -> jax.Array:
        given = {key: jnp.asarray(value) for key, value in (arrays | change).items()}
        return ALL_REDUCE_ADD_NORM[name](**given, eps=1e-5, axis_name="b")[0]

    with pytest.raises(ValueError, match=message):
        mapped(run, mesh_of(jax.devices()[:2]), num_inputs=1)(jnp.zeros(1))


def test_rows_that_threads_cannot_share_are_refused():
    check_all_reduce_mosaic(4096, 8, jnp.bfloat16)
    with pytest.raises(ValueError, match="rows must be a multiple of 1024 bytes"):
        check_all_reduce_mosaic(576, 2, jnp.bfloat16)
    with pytest.raises(ValueError, match="rows that 3 devices divide"):
        check_all_reduce_mosaic(1024, 3, jnp.bfloat16)


def test_a_message_larger_than_the_mailbox_is_refused():
    shape = MailboxShape(2)
    most = shape.max_rows(8192)
    assert 2 * 8192 * most <= shape.half_bytes < 2 * 8192 * (most + 1)

    def run(_: jax.Array) -> jax.Array:
        rows, box = jnp.zeros((most + 1, 4096), jnp.bfloat16), jnp.zeros((4, 2), jnp.int32)
        return ALL_REDUCE_ADD_NORM["mosaic"](rows[None], rows, rows[0], eps=1e-5, axis_name="b", mailbox=box)[0]

    with pytest.raises(ValueError, match=f"at most {most} rows of 4096 bfloat16: got {most + 1}"):
        mapped(run, mesh_of(jax.devices()[:2]), num_inputs=1)(jnp.zeros(1))


def test_slots_of_a_mailbox_do_not_overlap():
    """Every (receiver, sender, half, block) has bytes of its own, after the counters and inside the mailbox."""
    shape, bases = MailboxShape(3), [1 << 40, 5 << 40, 9 << 40]
    tables = [shape.address_table(bases, rank).view(np.int64).reshape(-1) for rank in range(3)]
    for receiver, base in enumerate(bases):
        slots = [int(table[receiver]) - base for table in tables]
        assert slots == sorted(slots)
        assert slots[0] >= COUNTER_BYTES
        assert all(
            b - a >= 2 * BLOCKS * shape.block_bytes for a, b in zip(slots, [*slots[1:], shape.num_bytes], strict=True)
        )
    assert [list(table[-2:]) for table in tables] == [[base, rank] for rank, base in enumerate(bases)]


@pytest.mark.parametrize("axes", [("b",), ("a",), ("b", "a")])
def test_mailboxes_know_those_that_differ_along_their_axes(axes: tuple[str, ...]):
    mesh = mesh_of(jax.devices()[:4], 2)
    boxes = Mailboxes.open(mesh, axes)
    assert boxes.table.shape == abstract_table(mesh, axes).shape
    base = [box.unsafe_buffer_pointer() for box in boxes.memory]
    table = np.asarray(boxes.table).view(np.int64)[..., 0]
    shape = MailboxShape(table.shape[1] - 2)
    for device, row in enumerate(table):
        a, b = divmod(device, 2)
        group = {("b",): [2 * a, 2 * a + 1], ("a",): [b, 2 + b], ("b", "a"): [0, 2, 1, 3]}[axes]
        rank = group.index(device)
        assert list(row[:-2]) == [base[other] + COUNTER_BYTES + rank * 2 * shape.half_bytes for other in group]
        assert list(row[-2:]) == [base[device], rank]
    assert not any(np.asarray(box).any() for box in boxes.memory)


@compiles_kernels
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize(("rows", "dtype"), [(1, jnp.bfloat16), (129, jnp.bfloat16), (3, jnp.float32)])
def test_kernels_compile_for_gpus_that_are_not_there(count: int, two_shot: bool, rows: int, dtype: Any):
    mesh = mesh_of(described_devices(target_description("h100-80gb"), count))

    def run(x: jax.Array, mailboxes: jax.Array) -> tuple[jax.Array, jax.Array]:
        common = {"axis_name": "b", "mailbox": mailboxes[0], "two_shot": two_shot}
        total = ALL_REDUCE["mosaic"](x[0], **common)
        parts = jnp.stack([total.astype(jnp.float32)] * 2)
        return ALL_REDUCE_ADD_NORM["mosaic"](parts, x[0], x[0, 0], eps=1e-5, **common)

    table = abstract_table(mesh, ["b"])
    x = jax.ShapeDtypeStruct((count, rows, 2048), dtype, sharding=table.sharding)
    specs = functools.partial(jax.tree.map, lambda array: array.sharding.spec)
    program = jax.shard_map(run, mesh=mesh, in_specs=specs((x, table)), out_specs=x.sharding.spec, check_vma=False)
    text = jax.jit(program).lower(x, table).compile().as_text()
    assert text.count("mosaic_gpu_v2") >= 2
    assert "all-reduce" not in text
