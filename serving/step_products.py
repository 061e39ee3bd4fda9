"""Who computes a step's products, and which all-reduce its blocks end in: the compiler's own, or kernels of ours."""

from __future__ import annotations

import logging
from typing import Any

import jax

from paddock.model import NormedProducts, Products, Reduction, reduction_axes
from paddock.pallas_kernels import (
    ADD_NORM,
    ALL_REDUCE,
    ALL_REDUCE_ADD_NORM,
    MailboxShape,
    check_add_norm_mosaic,
    check_all_reduce_mosaic,
    mosaic_mode,
)
from paddock.sharding import Layout

from .step_plan import StepPlan

logger = logging.getLogger("paddock")

# Sums are left to the compiler, which puts them where the layout needs them.
COMPILER = "xla"
# The table of mailboxes among a step's unchanging arrays, beside the weights.
MAILBOXES = "mailboxes"
# Where the kernel was measured to be the faster one (docs/numbers.md): cards with NVLink, and devices that reduce.
MEASURED_KINDS, MEASURED_DEVICES = ("NVIDIA H100 80GB HBM3",), (2,)


def choose_all_reduce(name: str, layout: Layout, embed_dim: int, dtype: Any) -> str:
    """`name`, with auto resolved: the Mosaic kernel where it can run and was measured to be faster.

    Raises ValueError for what a layout or a device cannot have.
    """
    if name == COMPILER:
        return name
    if name not in {"auto", *ALL_REDUCE}:
        raise ValueError(f"all_reduce {name!r} is unknown; there are {', '.join(sorted({*ALL_REDUCE, COMPILER}))}")
    device, devices = layout.mesh.devices.flat[0], layout.num_shards("mlp")
    measured = getattr(device, "device_kind", "") in MEASURED_KINDS and devices in MEASURED_DEVICES
    if name == "auto" and not measured:
        return COMPILER
    try:
        reduction_axes(layout)
        if name != "reference":
            check_hopper(device)
            if any(other.process_index != jax.process_index() for other in layout.mesh.devices.flat):
                raise ValueError("all devices must be in one process, since others' memory has no address here")
            check_all_reduce_mosaic(embed_dim, devices, dtype)
    except ValueError as error:
        if name != "auto":
            raise ValueError(f"all_reduce {name}: {error}") from error
        logger.info("all_reduce is %s: %s", COMPILER, error)
        return COMPILER
    return "mosaic" if name == "auto" else name


def check_add_norm(name: str, layout: Layout, embed_dim: int) -> str:
    """`name`. Raises ValueError for what a layout or a device cannot have."""
    if name == COMPILER:
        return name
    if name not in ADD_NORM:
        raise ValueError(f"add_norm {name!r} is unknown; there are {', '.join(sorted({*ADD_NORM, COMPILER}))}")
    try:
        if layout.mesh.size != layout.num_shards("layers"):
            raise ValueError("rules: layers are split over devices, so that a row is not all on one")
        if name == "mosaic":
            check_hopper(layout.mesh.devices.flat[0])
            check_add_norm_mosaic(embed_dim)
    except ValueError as error:
        raise ValueError(f"add_norm {name}: {error}") from error
    return name


def check_hopper(device: Any) -> None:
    """Raise ValueError naming a device, or a version of JAX, that our kernels do not run on."""
    if getattr(device, "compute_capability", "") != "9.0":
        raise ValueError(f"{getattr(device, 'device_kind', device)} is no NVIDIA Hopper GPU")
    mosaic_mode(False)


def products_of(plan: StepPlan, params: dict[str, jax.Array], num_rows: int) -> Products:
    """For steps of so many rows. Messages that mailboxes are too small for are the compiler's, too."""
    if plan.add_norm != COMPILER:
        return NormedProducts(ADD_NORM[plan.add_norm])
    if plan.all_reduce == COMPILER:
        return Products()
    axes = reduction_axes(plan.layout)
    if plan.all_reduce == "mosaic":
        row_bytes = plan.config.embed_dim * jax.numpy.dtype(plan.dtype).itemsize
        if num_rows > MailboxShape(plan.layout.size_of(axes)).max_rows(row_bytes):
            return Products()
    kernels = ALL_REDUCE[plan.all_reduce], ALL_REDUCE_ADD_NORM[plan.all_reduce]
    return Reduction(plan.layout, axes, *kernels, params.get(MAILBOXES))
