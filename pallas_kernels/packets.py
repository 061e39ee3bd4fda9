"""Sending arrays to other GPUs' memory and waiting for theirs, from inside a Mosaic GPU kernel.

The wire format is that of NCCL's low-latency protocol (Hu et al. 2025, "Demystifying NCCL", arXiv 2507.04786): every
four bytes of data travel with a four-byte flag in one eight-byte store, which is atomic. Who reads the flag of this
call has the data too, so that there are no fences and no separate signals; the price is twice the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from .inline import SCALAR, WARPGROUP, dialect, i32, i64, mlir, mosaic, offset_of, scalar_of
from .mailbox import COUNTER_BYTES

LINE_BYTES = 16  # of two data words and two flags
# Data words that a thread waits for at once: each wait costs a read of memory, each word a register.
WORDS_AT_ONCE = 64
_INT = plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR)


def layout(num_elements: int, dtype: Any) -> Any:
    """How a block's threads share a row: neighbours hold neighbouring pieces of 16 or 8 bytes."""
    itemsize = jnp.dtype(dtype).itemsize
    for size in (16, 8):
        if num_elements * itemsize % (WARPGROUP * size) == 0:
            return plgpu.Layout.WG_STRIDED((num_elements,), vec_size=size // itemsize)
    raise ValueError(f"rows must be a multiple of {WARPGROUP * 8} bytes: got {num_elements} of {jnp.dtype(dtype)}")


def read_call(mailbox: Any, block: jax.Array) -> jax.Array:
    """Which call of this block this is, int32."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR), return_type=_INT)
    def read(_: Any, table: Any, block: Any) -> Any:
        mgpu = mosaic()
        counter = offset_of(_entry(table, -2), scalar_of(block), 4)
        call = mgpu.utils.inline_ptx(
            "ld.relaxed.gpu.global.u32 $0, [$1];", counter, result_types=i32(), has_side_effects=True
        )
        return mgpu.FragmentedArray.splat(call, (), is_signed=True)

    return read(mailbox, block)


def end_call(mailbox: Any, block: jax.Array, call: jax.Array) -> None:
    """Count this call of the block."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR))
    def write(_: Any, table: Any, block: Any, call: Any) -> None:
        mgpu, arith = mosaic(), dialect("arith")
        following = arith.addi(scalar_of(call), mgpu.c(1, i32()))
        mgpu.warpgroup_barrier()  # everyone has read it
        mgpu.utils.inline_ptx(
            "st.relaxed.gpu.global.u32 [$0], $1;",
            offset_of(_entry(table, -2), scalar_of(block), 4),
            following,
            predicate=mgpu.single_thread_predicate(scope=mgpu.ThreadSubset.WARPGROUP),
        )

    write(mailbox, block, call)


def send(mailbox: Any, value: jax.Array, devices: Sequence[int], offset: jax.Array, flag: jax.Array) -> None:
    """Write `value` [N] at byte `offset` of this device's slot at each of `devices`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout(value.size, value.dtype), SCALAR, SCALAR))
    def store(_: Any, table: Any, array: Any, offset: Any, flag: Any) -> None:
        mgpu = mosaic()
        thread = _thread_offset(offset)
        words = _words(array)
        for device in devices:
            base = _add(_entry(table, device), thread)
            for line, pair in enumerate(zip(words[::2], words[1::2], strict=True)):
                mgpu.utils.inline_ptx(
                    "{ .reg .b64 a, b; mov.b64 a, {$1, $3}; mov.b64 b, {$2, $3}; "
                    f"st.relaxed.sys.global.v2.b64 [$0 + {line * WARPGROUP * LINE_BYTES}], {{a, b}}; }}",
                    base,
                    *pair,
                    scalar_of(flag),
                    has_side_effects=True,
                )

    store(mailbox, value, offset, flag)


def receive(
    mailbox: Any, senders: int, shaped: jax.ShapeDtypeStruct, offset: jax.Array, flag: jax.Array, *, half_bytes: int
) -> tuple[jax.Array, ...]:
    """Wait for the arrays [N] that came from each of `senders` to byte `offset` of their slots here.

    Slots are two `half_bytes` apart.
    """
    kind = layout(shaped.size, shaped.dtype)
    out = plgpu.ShapeDtypeStruct(shaped.shape, shaped.dtype, layout=kind)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR), return_type=(out,) * senders)
    def wait(_: Any, table: Any, offset: Any, flag: Any) -> Any:
        thread, here = _thread_offset(offset), _entry(table, -2)
        bases = [_add(here, thread, constant=COUNTER_BYTES + sender * 2 * half_bytes) for sender in range(senders)]
        num_words = shaped.size * shaped.dtype.itemsize // 4 // WARPGROUP
        at_once = max(1, WORDS_AT_ONCE // num_words)
        found = [_poll(bases[i : i + at_once], num_words, scalar_of(flag)) for i in range(0, senders, at_once)]
        return tuple(_array(words, kind.to_mgpu(), shaped) for group in found for words in group)

    return tuple(wait(mailbox, offset, flag))


def _poll(bases: list[Any], num_words: int, flag: Any) -> list[list[Any]]:
    """Read `num_words` from each base until all carry `flag`."""
    total = len(bases) * num_words
    lines = []
    for word in range(0, total, 2):
        place, line = divmod(word, num_words)
        start = line // 2 * WARPGROUP * LINE_BYTES
        lines.append(f"ld.relaxed.sys.global.v2.b64 {{a{word}, a{word + 1}}}, [${total + 1 + place} + {start}];")
    lines.append("mov.b32 wrong, 0;")
    for word in range(total):
        lines.append(f"mov.b64 {{${word}, f}}, a{word}; xor.b32 f, f, ${total}; or.b32 wrong, wrong, f;")
    text = (
        f"{{ .reg .b64 a<{total}>; .reg .b32 f, wrong; .reg .pred p; again: "
        + " ".join(lines)
        + " setp.ne.b32 p, wrong, 0; @p bra again; }"
    )
    words = mosaic().utils.inline_ptx(text, flag, *bases, result_types=[i32()] * total, has_side_effects=True)
    return [list(words[i : i + num_words]) for i in range(0, total, num_words)]


def _entry(table: Any, row: int) -> Any:
    """Row `row` of the address table as a 64-bit integer."""
    mgpu, llvm, ir = mosaic(), dialect("llvm"), mlir()
    rows = ir.MemRefType(table.type).shape[0]
    pointer = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(table), [row % rows], i64())
    return llvm.load(i64(), pointer)


def _thread_offset(offset: Any) -> Any:
    """Byte of this thread's first line."""
    mgpu, arith, gpu = mosaic(), dialect("arith"), dialect("gpu")
    thread = arith.index_cast(i64(), gpu.thread_id(gpu.Dimension.x))
    return arith.addi(arith.extui(i64(), scalar_of(offset)), arith.muli(thread, mgpu.c(LINE_BYTES, i64())))


def _add(a: Any, b: Any, constant: int = 0) -> Any:
    mgpu, arith = mosaic(), dialect("arith")
    total = arith.addi(a, b)
    return arith.addi(total, mgpu.c(constant, i64())) if constant else total


def _words(array: Any) -> list[Any]:
    """An array's registers as 32-bit integers."""
    ir, vector = mlir(), dialect("vector")
    words = []
    for register in array.registers.flat:
        num_bytes = ir.VectorType(register.type).shape[0] * mosaic().bitwidth(array.mlir_dtype) // 8
        packed = vector.bitcast(ir.VectorType.get((num_bytes // 4,), i32()), register)
        for i in range(num_bytes // 4):
            words.append(vector.extract(packed, dynamic_position=[], static_position=[i]))
    return words


def _array(words: list[Any], layout: Any, shaped: jax.ShapeDtypeStruct) -> Any:
    """`_words` undone: an array of that layout."""
    ir, vector, mgpu = mlir(), dialect("vector"), mosaic()
    kind = layout.registers_element_type(mgpu.utils.dtype_to_ir_type(shaped.dtype))
    registers = np.empty(layout.registers_shape(shaped.shape), object)
    each = len(words) // registers.size
    for place in range(registers.size):
        packed = vector.from_elements(ir.VectorType.get((each,), i32()), words[place * each : (place + 1) * each])
        registers.flat[place] = vector.bitcast(kind, packed)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
