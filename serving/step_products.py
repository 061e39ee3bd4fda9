"""Who computes a step's products, and which all-reduce its blocks end in: the compiler's own, or kernels of ours."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from paddock.model import LlamaConfig, NormedProducts, Products, Reduction, reduction_axes
from paddock.pallas_kernels import (
    ADD_NORM,
    ALL_REDUCE,
    ALL_REDUCE_ADD_NORM,
    MATMUL,
    MailboxShape,
    check_add_norm_mosaic,
    check_all_reduce_mosaic,
    check_matmul_mosaic,
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
# Rows from which on the kernel with SwiGLU in it is faster than XLA's product and its kernel for that (H100, 8B shape,
# us: 191 and 210 at 512 rows, 641 and 692 at 2,048, 1,284 and 1,372 at 4,096, 2,637 and 2,720 at 8,448, 202 and 134
# at 300).
FUSED_FROM = 512


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


def choose_swiglu(name: str, config: LlamaConfig, layout: Layout, dtype: Any) -> str:
    """`name`, with auto resolved: the Mosaic kernel where it can run.

    Raises ValueError for what a model, a layout or a device cannot have.
    """
    if name == COMPILER:
        return name
    if name not in {"auto", *MATMUL}:
        raise ValueError(f"swiglu {name!r} is unknown; there are {', '.join(sorted({*MATMUL, COMPILER}))}")
    try:
        if config.mlp_bias:
            raise ValueError("the model adds a bias between product and SwiGLU")
        for axis in ("tokens", "embed"):
            if layout.num_shards(axis) > 1:
                raise ValueError(f"rules: {axis} is split, so that rows are not whole")
        if name != "reference":
            check_hopper(layout.mesh.devices.flat[0])
            columns = 2 * config.mlp_dim // layout.num_shards("mlp")
            check_matmul_mosaic(dtype, FUSED_FROM, config.embed_dim, columns)
    except ValueError as error:
        if name != "auto":
            raise ValueError(f"swiglu {name}: {error}") from error
        return COMPILER
    return "mosaic" if name == "auto" else name


def check_hopper(device: Any) -> None:
    """Raise ValueError naming a device, or a version of JAX, that our kernels do not run on."""
    if getattr(device, "compute_capability", "") != "9.0":
        raise ValueError(f"{getattr(device, 'device_kind', device)} is no NVIDIA Hopper GPU")
    mosaic_mode(False)


def products_of(plan: StepPlan, params: dict[str, jax.Array], num_rows: int) -> Products:
    """For steps of so many rows. Messages that mailboxes are too small for are the compiler's, too."""
    fused = _fused_swiglu(plan)
    if plan.add_norm != COMPILER:
        return NormedProducts(add_norm=ADD_NORM[plan.add_norm], **fused)
    if plan.all_reduce == COMPILER:
        return Products(**fused)
    axes = reduction_axes(plan.layout)
    if plan.all_reduce == "mosaic":
        row_bytes = plan.config.embed_dim * jax.numpy.dtype(plan.dtype).itemsize
        if num_rows > MailboxShape(plan.layout.size_of(axes)).max_rows(row_bytes):
            return Products(**fused)
    return Reduction(
        layout=plan.layout,
        axes=axes,
        all_reduce=ALL_REDUCE[plan.all_reduce],
        all_reduce_add_norm=ALL_REDUCE_ADD_NORM[plan.all_reduce],
        mailboxes=params.get(MAILBOXES),
        **fused,
    )


def _fused_swiglu(plan: StepPlan) -> dict[str, Any]:
    """What `Products` takes for it: every device multiplies by its own gates and ups."""
    if plan.swiglu == COMPILER:
        return {}
    multiply: Callable[..., jax.Array] = functools.partial(MATMUL[plan.swiglu], epilogue="swiglu")

    def local(x: jax.Array, gate_up: jax.Array) -> jax.Array:
        return multiply(x, gate_up.reshape(gate_up.shape[0], -1))

    columns = plan.layout.rules.mlp or None
    split = PartitionSpec(None, columns)
    mapped = plan.layout.shard_map(local, (PartitionSpec(), PartitionSpec(None, columns, None)), split)
    return {"fused_swiglu": mapped, "fused_from": FUSED_FROM if plan.swiglu == "mosaic" else 1}
