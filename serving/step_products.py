"""Who computes a step's products, and which all-reduce its blocks end in: the compiler's own, or kernels of ours."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from paddock.model import DeferringProducts, LlamaConfig, Normed, NormedProducts, Products, Reduction, reduction_axes
from paddock.pallas_kernels import (
    ADD_NORM,
    ALL_REDUCE,
    ALL_REDUCE_ADD_NORM,
    MATMUL,
    MATMUL_ADD,
    MATMUL_PARTS,
    MailboxShape,
    check_add_norm_mosaic,
    check_all_reduce_mosaic,
    check_matmul_add_mosaic,
    check_matmul_mosaic,
    mosaic_mode,
)
from paddock.sharding import Layout

from .step_plan import StepPlan

logger = logging.getLogger("paddock")

# Sums are left to the compiler, which puts them where the layout needs them.
COMPILER = "xla"
# Products that add to the residual stream and norm it themselves, as an entry for `add_norm`.
IN_PRODUCTS = "products"
# The table of mailboxes among a step's unchanging arrays, beside the weights.
MAILBOXES = "mailboxes"
# Where the kernel was measured to be the faster one (docs/numbers.md): cards with NVLink, and devices that reduce.
MEASURED_KINDS, MEASURED_DEVICES = ("NVIDIA H100 80GB HBM3",), (2,)
# Numbers of rows for which our products are faster than XLA's (docs/numbers.md): those of a batch and, with SwiGLU in
# them, of prompts, where rows that fill no whole tiles would be copied; and any number that a step may have.
BATCH_ROWS, PROMPT_ROWS, ALL_ROWS = range(32, 257), range(256, 2**20, 256), range(1, 2**20)
# Where products and the sums after them are both ours, all of a layer's kernels are, in steps of so many rows: on one
# device, and on several, where that is still to be measured.
CHAINED_ROWS, CHAINED_SHARED_ROWS = range(1, 257), range(0)
# One number of rows for each height that a tile of theirs has.
ENDING_ROWS = (64, 128, 192, 256)


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


def check_add_norm(name: str, products: str, config: LlamaConfig, layout: Layout, dtype: Any) -> str:
    """`name`, beside the chosen `products`. Raises ValueError for what a model, a layout or a device cannot have."""
    if name == COMPILER:
        return name
    if name not in {IN_PRODUCTS, *ADD_NORM}:
        known = ", ".join(sorted({IN_PRODUCTS, *ADD_NORM, COMPILER}))
        raise ValueError(f"add_norm {name!r} is unknown; there are {known}")
    try:
        if not _whole_layers(layout):
            raise ValueError("rules: layers are split over devices, so that a row is not all on one")
        if name == "mosaic":
            check_hopper(layout.mesh.devices.flat[0])
            check_add_norm_mosaic(config.embed_dim)
        if name == IN_PRODUCTS and products == COMPILER:
            raise ValueError("products are xla's, which cannot")
        if name == IN_PRODUCTS and jax.numpy.dtype(dtype) == jax.numpy.float16:
            raise ValueError("rows before their division may be larger than float16 holds")
        if name == IN_PRODUCTS and products == "mosaic":
            for rows, depth in itertools.product(ENDING_ROWS, (config.mlp_dim, config.num_heads * config.head_dim)):
                check_matmul_add_mosaic(dtype, rows, depth, config.embed_dim)
    except ValueError as error:
        raise ValueError(f"add_norm {name}: {error}") from error
    return name


def choose_products(name: str, config: LlamaConfig, layout: Layout, dtype: Any) -> str:
    """`name`, with auto resolved: the Mosaic kernels where they can run.

    Raises ValueError for what a model, a layout or a device cannot have.
    """
    if name == COMPILER:
        return name
    if name not in {"auto", *MATMUL}:
        raise ValueError(f"products {name!r} is unknown; there are {', '.join(sorted({*MATMUL, COMPILER}))}")
    try:
        for axis in ("tokens", "embed"):
            if layout.num_shards(axis) > 1:
                raise ValueError(f"rules: {axis} is split, so that rows are not whole")
        if name != "reference":
            check_hopper(layout.mesh.devices.flat[0])
            hidden = config.mlp_dim // layout.num_shards("mlp")
            group = config.num_heads // config.num_kv_heads + 2
            for columns in (2 * hidden, config.num_kv_heads * group * config.head_dim):
                check_matmul_mosaic(dtype, BATCH_ROWS[0], config.embed_dim, columns)
            for depth in (hidden, config.num_heads * config.head_dim) if _whole_layers(layout) else ():
                check_matmul_mosaic(dtype, BATCH_ROWS[0], depth, config.embed_dim)
    except ValueError as error:
        if name != "auto":
            raise ValueError(f"products {name}: {error}") from error
        return COMPILER
    return "mosaic" if name == "auto" else name


def _whole_layers(layout: Layout) -> bool:
    """Every device has all of the layers that it has a part of."""
    return layout.mesh.size == layout.num_shards("layers")


def check_hopper(device: Any) -> None:
    """Raise ValueError naming a device, or a version of JAX, that our kernels do not run on."""
    if getattr(device, "compute_capability", "") != "9.0":
        raise ValueError(f"{getattr(device, 'device_kind', device)} is no NVIDIA Hopper GPU")
    mosaic_mode(False)


def is_chained(plan: StepPlan, num_rows: int) -> bool:
    """Whether all of a layer's kernels are ours in steps of so many rows, each launched while the one before ends."""
    if plan.products == COMPILER:
        return False
    if plan.add_norm in (plan.products, IN_PRODUCTS):
        return num_rows in CHAINED_ROWS
    return plan.products == plan.all_reduce and num_rows in CHAINED_SHARED_ROWS and _fits_mailboxes(plan, num_rows)


def products_of(plan: StepPlan, params: dict[str, jax.Array], num_rows: int) -> Products:
    """For steps of so many rows. Messages that mailboxes are too small for are the compiler's, too."""
    chained = is_chained(plan, num_rows)
    kernels = _kernels(plan, chained)
    if plan.add_norm == IN_PRODUCTS:
        return DeferringProducts(multiply_add=_endings(plan), **kernels) if chained else Products(**kernels)
    if plan.add_norm != COMPILER:
        return NormedProducts(add_norm=ADD_NORM[plan.add_norm], **kernels)
    if plan.all_reduce == COMPILER or not _fits_mailboxes(plan, num_rows):
        return Products(**kernels)
    return Reduction(
        layout=plan.layout,
        axes=reduction_axes(plan.layout),
        all_reduce=ALL_REDUCE[plan.all_reduce],
        all_reduce_add_norm=ALL_REDUCE_ADD_NORM[plan.all_reduce],
        mailboxes=params.get(MAILBOXES),
        **kernels,
    )


def _fits_mailboxes(plan: StepPlan, num_rows: int) -> bool:
    if plan.all_reduce != "mosaic":
        return True
    row_bytes = plan.config.embed_dim * jax.numpy.dtype(plan.dtype).itemsize
    return num_rows <= MailboxShape(plan.layout.size_of(reduction_axes(plan.layout))).max_rows(row_bytes)


def _kernels(plan: StepPlan, chained: bool) -> dict[str, Any]:
    """What `Products` takes of ours: every device multiplies by its own gates and ups; blocks end in ours where layers
    are whole on a device, so that nothing is summed over several; `chained`, every product is ours."""
    if plan.products == COMPILER:
        return {}
    ours = plan.products == "mosaic"
    multiply, multiply_parts = (
        functools.partial(table[plan.products], w_constant=True) for table in (MATMUL, MATMUL_PARTS)
    )

    def swiglu(x: Normed, gate_up: jax.Array) -> jax.Array:
        return multiply(x, gate_up.reshape(gate_up.shape[0], -1), epilogue="swiglu")

    def project(x: Normed, weight: jax.Array) -> jax.Array:
        return multiply(x, weight.reshape(weight.shape[0], -1)).reshape(x.shape[0], *weight.shape[1:])

    def add(hidden: jax.Array, weight: jax.Array, x: jax.Array) -> jax.Array:
        return multiply(hidden, weight, residual=x)

    mapped = functools.partial(_mapped, plan)
    whole, split = PartitionSpec(), PartitionSpec(None, plan.layout.rules.mlp or None)
    kernels: dict[str, Any] = {"fused_swiglu": mapped(swiglu, whole, split, split)}
    kernels["fused_rows"] = (BATCH_ROWS, PROMPT_ROWS) if ours and not chained else (ALL_ROWS,)
    if chained:
        kernels |= {"multiply": mapped(project, whole, split, split), "multiply_parts": multiply_parts}
    if _whole_layers(plan.layout):
        kernels["added"] = mapped(add, whole, whole, whole, whole)
        kernels["added_rows"] = BATCH_ROWS if ours else ALL_ROWS
    return kernels


def _endings(plan: StepPlan) -> Callable[..., Any]:
    """Products that end a block, of layers that are whole on a device."""

    @functools.cache
    def ending(eps: float) -> Callable[..., Any]:
        multiply_add = functools.partial(MATMUL_ADD[plan.products], eps=eps, w_constant=True)
        return _mapped(plan, multiply_add, *[PartitionSpec()] * 5)

    def multiply_add(*operands: jax.Array, eps: float) -> Any:
        return ending(eps)(*operands)

    return multiply_add


def _mapped(plan: StepPlan, fn: Callable[..., Any], *specs: PartitionSpec) -> Callable[..., Any]:
    """Of each device's own arrays. Jitted: traced and lowered once, not once a layer."""
    return jax.jit(plan.layout.shard_map(fn, specs[:-1], specs[-1]))
