"""What every attention implementation asks of its arguments."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array


def check_pages(q: Array, k_pages: Array, v_pages: Array, page_table: Array) -> None:
    """Raise ValueError unless q [*, H, h], pools [P, K, p, h] and page_table [*, N] fit together."""
    if q.ndim != 3:
        raise ValueError(f"q must have 3 axes (rows, query heads, head_dim): got shape {q.shape}")
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            "k_pages and v_pages must be alike, with 4 axes (pages, kv heads, page size, head_dim): "
            f"got {k_pages.dtype}{k_pages.shape} and {v_pages.dtype}{v_pages.shape}"
        )
    if q.shape[2] != k_pages.shape[3]:
        raise ValueError(f"q has head_dim {q.shape[2]}, but k_pages {k_pages.shape[3]}")
    if q.shape[1] % k_pages.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide over {k_pages.shape[1]} kv heads")
    if page_table.ndim != 2:
        raise ValueError(f"page_table must have 2 axes: got shape {page_table.shape}")
    if page_table.dtype != jnp.int32:
        raise ValueError(f"page_table must be int32: got {page_table.dtype}")


def check_decode(q: Array, k_pages: Array, v_pages: Array, page_table: Array, kv_len: Array) -> None:
    """Raise ValueError unless the arguments of a decode attention fit together."""
    check_pages(q, k_pages, v_pages, page_table)
    batch = q.shape[0]
    if page_table.shape[0] != batch or kv_len.shape != (batch,) or kv_len.dtype != jnp.int32:
        raise ValueError(
            f"{batch} rows of q need page_table int32[{batch}, N] and kv_len int32[{batch}]: "
            f"got {page_table.dtype}{page_table.shape} and {kv_len.dtype}{kv_len.shape}"
        )


def check_scales(k_pages: Array, k_scale: Array | None, v_scale: Array | None) -> None:
    """Raise ValueError unless there are no scales, or float32 [P, K] for keys and for values, and then 8-bit pages."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is None) != (k_pages.dtype.itemsize > 1):
            raise ValueError(f"{name} goes with pages of 8 bits, and only with them: got pages of {k_pages.dtype}")
        if scale is not None and (scale.shape != k_pages.shape[:2] or scale.dtype != jnp.float32):
            raise ValueError(f"{name} must be float32{k_pages.shape[:2]}: got {scale.dtype}{scale.shape}")


def check_prefill(
    q: Array, k_pages: Array, v_pages: Array, page_table: Array, q_start: Array, q_len: Array, kv_len: Array
) -> None:
    """Raise ValueError unless the arguments of a prefill attention fit together."""
    check_pages(q, k_pages, v_pages, page_table)
    chunks = page_table.shape[0]
    for name, value in (("q_start", q_start), ("q_len", q_len), ("kv_len", kv_len)):
        if value.shape != (chunks,) or value.dtype != jnp.int32:
            raise ValueError(
                f"page_table has {chunks} chunks, so {name} must be int32[{chunks}]: got {value.dtype}{value.shape}"
            )


def check_append(k_pages: Array, v_pages: Array, k: Array, v: Array, page: Array, offset: Array) -> None:
    """Raise ValueError unless rows [T, K, h], page and offset int32 [T], and pools [P, K, p, h] fit together."""
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            "k_pages and v_pages must be alike, with 4 axes (pages, kv heads, page size, head_dim): "
            f"got {k_pages.dtype}{k_pages.shape} and {v_pages.dtype}{v_pages.shape}"
        )
    tokens, wanted = k.shape[:1], (k_pages.shape[1], k_pages.shape[3])
    if k.shape != v.shape or k.shape[1:] != wanted:
        raise ValueError(f"k and v must be rows of {wanted} (kv heads, head_dim): got {k.shape} and {v.shape}")
    for name, value in (("page", page), ("offset", offset)):
        if value.shape != tokens or value.dtype != "int32":
            raise ValueError(f"{name} must be int32{tokens}: got {value.dtype}{value.shape}")


def check_rotation(qkv: Array, cos: Array, sin: Array, k_pages: Array, v_pages: Array) -> None:
    """Raise ValueError unless qkv [T, K, G+2, h], float32 cos and sin [T, h/2], pools [P, K, p, h] fit together."""
    if qkv.ndim != 4 or qkv.shape[2] < 3:
        raise ValueError(f"qkv must have 4 axes (rows, kv heads, query heads of each + 2, head_dim): got {qkv.shape}")
    check_pages(qkv[:, :, 0], k_pages, v_pages, jnp.zeros((1, 1), jnp.int32))
    if qkv.shape[1] != k_pages.shape[1]:
        raise ValueError(f"qkv has {qkv.shape[1]} kv heads, but k_pages {k_pages.shape[1]}")
    wanted = (qkv.shape[0], qkv.shape[3] // 2)
    for name, value in (("cos", cos), ("sin", sin)):
        if value.shape != wanted or value.dtype != jnp.float32:
            raise ValueError(f"{name} must be float32{wanted}: got {value.dtype}{value.shape}")


def check_decode_append(
    qkv: Array, cos: Array, sin: Array, k_pages: Array, v_pages: Array, page_table: Array, kv_len: Array
) -> None:
    """Raise ValueError unless the arguments of a decode attention that appends fit together."""
    check_rotation(qkv, cos, sin, k_pages, v_pages)
    check_decode(qkv[:, :, 0], k_pages, v_pages, page_table, kv_len)
