"""All-reduce, alone or with the addition and the norm that follow: the plain references, by XLA's own collective."""

from __future__ import annotations

from collections.abc import Hashable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num


def all_reduce_reference(
    partial: Num[Array, "T D"], *, axis_name: Hashable, mailbox: Int[Array, "N 2"] | None = None
) -> Float[Array, "T D"]:
    """The sum of `partial` over the devices along mesh axis `axis_name`, the same rows on each of them.

    `mailbox` is for kernels that know other devices' memory (`mailbox.address_table`). Raises ValueError where the
    arguments do not fit together. Call it under `shard_map`.
    """
    check_all_reduce(partial, mailbox, axis_name)
    return lax.psum(partial, axis_name)


def all_reduce_add_norm_reference(
    partial: Num[Array, "T D"],
    residual: Array,
    scale: Array,
    *,
    eps: float,
    axis_name: Hashable,
    mailbox: Int[Array, "N 2"] | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """(residual + the sum of `partial` over `axis_name`, the root-mean-square norm of that times `scale`).

    Statistics are float32, of the rounded sum (RMSNorm: Zhang & Sennrich 2019). `mailbox`, errors:
    `all_reduce_reference`.
    """
    check_add_norm(partial, residual, scale, mailbox, axis_name)
    total = residual + lax.psum(partial, axis_name)
    wide = total.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, wide.astype(total.dtype) * scale[None]


def check_all_reduce(partial: Array, mailbox: Array | None, axis_name: Hashable) -> None:
    """Raise ValueError unless the arguments fit together."""
    if partial.ndim != 2 or partial.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"partial must be [T, D] of float32, bfloat16 or float16: got {partial.dtype}{partial.shape}")
    if mailbox is not None:
        wanted = (lax.axis_size(axis_name) + 2, 2)
        if mailbox.shape != wanted or mailbox.dtype != jnp.int32:
            raise ValueError(f"mailbox must be int32{wanted}: got {mailbox.dtype}{mailbox.shape}")


def check_add_norm(partial: Array, residual: Array, scale: Array, mailbox: Array | None, axis_name: Hashable) -> None:
    """Raise ValueError unless the arguments fit together."""
    check_all_reduce(partial, mailbox, axis_name)
    for name, array, shape in (("residual", residual, partial.shape), ("scale", scale, partial.shape[1:])):
        if array.shape != shape or array.dtype != partial.dtype:
            raise ValueError(f"{name} must be {partial.dtype}{shape}: got {array.dtype}{array.shape}")
