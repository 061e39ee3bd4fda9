"""New keys and values into their pages, in plain jnp: what every other implementation is tested against."""

from __future__ import annotations

from jaxtyping import Array, Float, Int, Num

from .checks import check_append


def append_reference(
    k_pages: Num[Array, "P K p h"],
    v_pages: Num[Array, "P K p h"],
    k: Float[Array, "T K h"],
    v: Float[Array, "T K h"],
    page: Int[Array, " T"],
    offset: Int[Array, " T"],
) -> tuple[Num[Array, "P K p h"], Num[Array, "P K p h"]]:
    """The pools with row t of k and v written at token offset[t] of page[t]; in place where the pools are donated.

    Rows are cast to the pools' dtype. Of several rows at one place any may win. Raises ValueError for shapes that do
    not fit together.
    """
    check_append(k_pages, v_pages, k, v, page, offset)
    # One scatter writes all heads of a row: the indexed axes come first in the updates.
    return (
        k_pages.at[page, :, offset].set(k.astype(k_pages.dtype)),
        v_pages.at[page, :, offset].set(v.astype(v_pages.dtype)),
    )
