"""All-reduces of random rows, compared bit by bit with the gathered rows' sum, on every device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from paddock.pallas_kernels import ALL_REDUCE, ALL_REDUCE_ADD_NORM

EPS = 1e-5
SHARED, OWN = PartitionSpec(), PartitionSpec(("a", "b"))


def mesh_of(devices: Any, a: int = 1) -> Mesh:
    """Groups of devices along b; `a` of them."""
    return Mesh(np.array(devices).reshape(a, -1), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def mapped(fn: Any, mesh: Mesh, *, num_inputs: int) -> Any:
    """`fn` of arrays whose first axis is the devices, the seed alone excepted."""
    specs = (SHARED, *(OWN,) * (num_inputs - 1))
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=OWN, check_vma=False))


def differences(
    mesh: Mesh, mailboxes: jax.Array | None, name: str, rows: int, width: int, rounds: int, dtype: Any, **options: Any
) -> Any:
    """A program of one seed: the rounds of new data in which a device's sums, or its sums with the residual, differ in
    any bit from those of the gathered rows, and the largest relative error of the norms; [devices, 3].

    Each round has calls of three sizes, so that blocks count their calls apart, and devices that come late.
    """

    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])

    def rounded(x: jax.Array) -> jax.Array:  # even where the compiler would keep more precision
        return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)

    def run(seed: jax.Array, *boxes: jax.Array) -> jax.Array:
        box, rank = (boxes[0][0] if boxes else None), jax.lax.axis_index("b")
        sum_rows = functools.partial(ALL_REDUCE[name], axis_name="b", mailbox=box, **options)
        sum_norm = functools.partial(ALL_REDUCE_ADD_NORM[name], eps=EPS, axis_name="b", mailbox=box, **options)
        late = jnp.zeros((256, 256), jnp.float32)

        def once(i: jax.Array, found: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed[0]), i)
            x = jax.random.normal(jax.random.fold_in(key, rank), (rows, width), dtype)
            residual, scale = jax.random.normal(key, (rows, width), dtype), jnp.linspace(0.5, 2, width, dtype=dtype)
            # Devices take turns in being late.
            delay = jnp.where((i + rank) % 2 == 0, 20, 0)
            x = x + jax.lax.fori_loop(0, delay, lambda _, y: y @ y, late)[0, 0].astype(dtype)
            wrong, error = jnp.zeros(2, bool), jnp.zeros(())
            for count in (rows, 1, max(1, rows // 2)):
                parts = jax.lax.all_gather(x[:count], "b").astype(jnp.float32)
                wanted = rounded(functools.reduce(jnp.add, list(parts)))
                total = rounded(residual[:count].astype(jnp.float32) + wanted)
                normed = total * jax.lax.rsqrt(jnp.mean(total * total, axis=-1, keepdims=True) + EPS) * scale[None]
                # In halves, which add up to it exactly, with a row more that does not count.
                halves = jnp.full((2, count + 1, width), jnp.nan).at[:, :count].set(x[:count].astype(jnp.float32) / 2)
                out, (got, got_normed) = sum_rows(x[:count]), sum_norm(halves, residual[:count], scale)
                wrong |= jnp.stack(
                    [jnp.any(bits(a) != bits(b.astype(dtype))) for a, b in ((out, wanted), (got, total))]
                )
                distance = jnp.linalg.norm(got_normed.astype(jnp.float32) - normed, axis=-1)
                error = jnp.maximum(error, jnp.max(distance / jnp.linalg.norm(normed, axis=-1)))
            sums, totals, worst = found
            return jnp.stack([sums + wrong[0], totals + wrong[1], jnp.maximum(worst, error)])

        return jax.lax.fori_loop(0, rounds, once, jnp.zeros(3))[None]

    program = mapped(run, mesh, num_inputs=1 if mailboxes is None else 2)
    return lambda seed: program(seed) if mailboxes is None else program(seed, mailboxes)
