"""All-reduce, alone or with the addition and the norm that follow: the plain references, by XLA's own collective."""

from __future__ import annotations

from collections.abc import Hashable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from .add_norm_reference import check_add_norm


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
    parts: Num[Array, "S R D"],
    residual: Array,
    scale: Array,
    *,
    eps: float,
    axis_name: Hashable,
    mailbox: Int[Array, "N 2"] | None = None,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """(residual + the sum of `parts` and of that over `axis_name`, the root-mean-square norm of that times `scale`).

    A device's parts are added in float32 and rounded to residual's dtype; rows past T do not count. Statistics are
    float32, of the rounded sum (RMSNorm: Zhang & Sennrich 2019). `mailbox`, errors: `all_reduce_reference`.
    """
    check_reduce_add_norm(parts, residual, scale, mailbox, axis_name)
    own = parts[:, : residual.shape[0]].astype(jnp.float32).sum(axis=0).astype(residual.dtype)
    total = residual + lax.psum(own, axis_name)
    wide = total.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return total, wide.astype(total.dtype) * scale[None]


def check_all_reduce(rows: Array, mailbox: Array | None, axis_name: Hashable) -> None:
    """Raise ValueError unless the arguments fit together."""
    if rows.ndim != 2 or rows.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"rows must be [T, D] of float32, bfloat16 or float16: got {rows.dtype}{rows.shape}")
    if mailbox is not None:
        wanted = (lax.axis_size(axis_name) + 2, 2)
        if mailbox.shape != wanted or mailbox.dtype != jnp.int32:
            raise ValueError(f"mailbox must be int32{wanted}: got {mailbox.dtype}{mailbox.shape}")


def check_reduce_add_norm(
    parts: Array, residual: Array, scale: Array, mailbox: Array | None, axis_name: Hashable
) -> None:
    """Raise ValueError unless the arguments fit together."""
    check_all_reduce(residual, mailbox, axis_name)
    check_add_norm(parts, residual, scale)
