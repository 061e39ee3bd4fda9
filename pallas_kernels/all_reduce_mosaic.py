"""All-reduce over NVLink for small messages, alone or with the addition and the norm that follow (Mosaic GPU)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Num

from . import packets
from .all_reduce_reference import check_all_reduce, check_reduce_add_norm
from .compat import load, mosaic_mode
from .early_launch import await_kernel_before, launch_kernel_after
from .inline import WARPGROUP
from .mailbox import BLOCKS, MailboxShape

# Bytes of a message from which more than two devices reduce a piece each, instead of everybody everything.
TWO_SHOT_BYTES = 128 * 1024
# What a kernel does with a row: its index, (where, float32 sum) of its pieces, the other inputs, the outputs.
Finish = Callable[[Any, list[tuple[Any, jax.Array]], Any, Any], None]


@functools.partial(jax.jit, static_argnames=("axis_name", "two_shot"))  # traced once, not once a layer
def all_reduce_mosaic(
    partial: Num[Array, "T D"], *, axis_name: Hashable, mailbox: Int[Array, "N 2"], two_shot: bool | None = None
) -> Float[Array, "T D"]:
    """As `all_reduce_reference`, summed in float32 in the devices' order: bitwise the same on each of them.

    One shot: everyone sends its rows to everyone and sums. Two shots, for more than two devices and larger messages:
    everyone sums one piece of each row and sends that to everyone. Calls of one program must come in the same order on
    all devices. Raises ValueError for rows that threads cannot share, for messages larger than the mailbox, and on JAX
    older than 0.11.
    """
    check_all_reduce(partial, mailbox, axis_name)
    two_shot = _two_shot(partial, mailbox, two_shot)
    # As many blocks as possible: their rows need not be the message's.
    even = WARPGROUP * 16 // partial.dtype.itemsize * (mailbox.shape[0] - 2 if two_shot else 1)
    width = even if partial.size % even == 0 else partial.shape[1]
    wire = jax.ShapeDtypeStruct((partial.size // width, width), partial.dtype)
    [out] = _call(_store, partial.reshape(1, *wire.shape), wire, (), 1, mailbox, two_shot)
    return out.reshape(partial.shape)


@functools.partial(jax.jit, static_argnames=("axis_name", "eps", "two_shot"))
def all_reduce_add_norm_mosaic(
    parts: Num[Array, "S R D"],
    residual: Array,
    scale: Array,
    *,
    eps: float,
    axis_name: Hashable,
    mailbox: Int[Array, "N 2"],
    two_shot: bool | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """As `all_reduce_add_norm_reference`, in one kernel; see `all_reduce_mosaic`."""
    check_reduce_add_norm(parts, residual, scale, mailbox, axis_name)
    finish = functools.partial(_add_norm, eps=eps)
    wire = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    total, normed = _call(finish, parts, wire, (residual, scale), 2, mailbox, two_shot)
    return total, normed


def check_all_reduce_mosaic(width: int, devices: int, dtype: Any) -> None:
    """Raise ValueError unless rows of `width` can be sent in one shot, and in two by `devices`."""
    if width % devices:
        raise ValueError(f"all_reduce mosaic needs rows that {devices} devices divide: got {width}")
    for size in (width, width // devices):
        packets.layout(size, dtype)


def _store(row: Any, pieces: list[tuple[Any, jax.Array]], _: Any, outs: Any) -> None:
    for where, total in pieces:
        outs[0][row, where] = total.astype(outs[0].dtype)


def _add_norm(row: Any, pieces: list[tuple[Any, jax.Array]], inputs: Any, outs: Any, *, eps: float) -> None:
    residual, scale = inputs
    rounded = []
    for where, total in pieces:
        total = total.astype(residual.dtype).astype(jnp.float32)  # as the sum is without this fusion
        rounded.append((residual[row, where].astype(jnp.float32) + total).astype(residual.dtype))
        outs[0][row, where] = rounded[-1]
    wide = [part.astype(jnp.float32) for part in rounded]
    squares = functools.reduce(jnp.add, [jnp.sum(part * part) for part in wide])
    factor = lax.rsqrt(squares / residual.shape[1] + eps)
    for (where, _), part in zip(pieces, wide, strict=True):
        outs[1][row, where] = (part * factor).astype(outs[1].dtype) * scale[where]


def _call(
    finish: Finish,
    parts: jax.Array,
    summed: jax.ShapeDtypeStruct,
    others: tuple[jax.Array, ...],
    outputs: int,
    mailbox: jax.Array,
    two_shot: Any,
) -> tuple[jax.Array, ...]:
    """Run the kernel: a thread block takes rows alone, from sending the sums of their parts [S, R, W], as they are
    `summed` [T, W], to `finish`."""
    devices, (num_rows, width), dtype = mailbox.shape[0] - 2, summed.shape, summed.dtype
    rows_each = -(-num_rows // BLOCKS)
    blocks = -(-num_rows // rows_each)
    shape, wire = MailboxShape(devices), 2 * width * dtype.itemsize
    if num_rows > (most := shape.max_rows(wire // 2)):
        raise ValueError(f"all_reduce mosaic takes at most {most} rows of {width} {dtype}: got {num_rows}")
    two_shot = _two_shot(summed, mailbox, two_shot)
    check_all_reduce_mosaic(width, devices if two_shot else 1, dtype)
    piece = width // devices

    def body(x_ref: Any, mail: Any, *refs: Any) -> None:
        launch_kernel_after(False)
        await_kernel_before(False)
        inputs, outs = refs[: len(others)], refs[len(others) :]
        block = lax.axis_index("block")
        call = packets.read_call(mail, block)
        start, flag = (call & 1) * shape.half_bytes + block * shape.block_bytes, call + 1

        def rows(do: Callable[[Any, Any], None]) -> None:
            """`do` for each of the block's rows and its place in the mailbox."""
            if rows_each == 1:
                do(block, start)
                return

            @pl.loop(0, rows_each)
            def _(i: jax.Array) -> None:
                pl.when(block + i * blocks < num_rows)(lambda: do(block + i * blocks, start + i * wire))

        def send(row: Any, where: Any, devices: Any, place: Any) -> None:
            kind = packets.layout(where.size, dtype)
            values = [load(x_ref.at[part, row, where], kind) for part in range(parts.shape[0])]
            value = values[0] if len(values) == 1 else _sum(values)
            packets.send(mail, value.astype(dtype), devices, place, flag)

        def receive(size: int, place: Any) -> tuple[jax.Array, ...]:
            shaped = jax.ShapeDtypeStruct((size,), dtype)
            return packets.receive(mail, devices, shaped, place, flag, half_bytes=shape.half_bytes)

        def send_row(row: Any, place: Any) -> None:
            send(row, pl.ds(0, width), range(devices), place)

        def sum_row(row: Any, place: Any) -> None:
            finish(row, [(pl.ds(0, width), _sum(receive(width, place)))], inputs, outs)

        def send_pieces(row: Any, place: Any) -> None:
            for device in range(devices):
                send(row, pl.ds(device * piece, piece), [device], place)

        def sum_piece(_: Any, place: Any) -> None:
            total = _sum(receive(piece, place)).astype(dtype)
            packets.send(mail, total, range(devices), place + wire // devices, flag)

        def join_pieces(row: Any, place: Any) -> None:
            pieces = receive(piece, place + wire // devices)
            joined = [(pl.ds(i * piece, piece), total.astype(jnp.float32)) for i, total in enumerate(pieces)]
            finish(row, joined, inputs, outs)

        for phase in (send_pieces, sum_piece, join_pieces) if two_shot else (send_row, sum_row):
            rows(phase)
        packets.end_call(mail, block, call)

    return plgpu.kernel(
        body,
        out_type=(summed,) * outputs,
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=mosaic_mode(False),
    )(parts, mailbox, *others)


def _two_shot(rows: Any, mailbox: jax.Array, asked: bool | None) -> bool:
    if asked is not None:
        return asked
    return mailbox.shape[0] - 2 > 2 and rows.size * rows.dtype.itemsize > TWO_SHOT_BYTES


def _sum(parts: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, [part.astype(jnp.float32) for part in parts])
