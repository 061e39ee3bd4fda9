"""The memory that devices write into each other for the all-reduces of `pallas_kernels.packets`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paddock.pallas_kernels import MailboxShape


@dataclasses.dataclass(frozen=True)
class Mailboxes:
    """A mailbox on every device of a mesh, for the groups of devices that differ along some of its axes alone.

    `table` [devices of the mesh, devices of a group + 2, 2] is what programs take: each device's own row of it, the
    addresses of its group's mailboxes. The memory lives as long as this object: programs know only where it is.
    """

    table: jax.Array
    memory: tuple[jax.Array, ...]

    @classmethod
    def open(cls, mesh: Mesh, axes: Sequence[str]) -> Mailboxes:
        """Allocate them. Raises ValueError for devices of other processes: their memory has no address here."""
        devices = list(mesh.devices.flat)
        if any(device.process_index != jax.process_index() for device in devices):
            raise ValueError("mailboxes need all devices of the mesh in one process")
        shape = MailboxShape(mesh_size(mesh, axes))
        memory = tuple(jnp.zeros(shape.num_bytes, jnp.uint8, device=device) for device in devices)
        jax.block_until_ready(memory)  # before anyone else writes there
        base = {device: box.unsafe_buffer_pointer() for device, box in zip(devices, memory, strict=True)}
        rows = []
        for group, rank in groups(mesh, axes):
            rows.append(shape.address_table([base[device] for device in group], rank))
        sharding = table_sharding(mesh)
        pieces = [jax.device_put(row[None], device) for row, device in zip(rows, devices, strict=True)]
        table = jax.make_array_from_single_device_arrays((len(devices), *rows[0].shape), sharding, pieces)
        return cls(table, memory)


def mesh_size(mesh: Mesh, axes: Sequence[str]) -> int:
    return int(np.prod([mesh.shape[axis] for axis in axes]))


def table_sharding(mesh: Mesh) -> NamedSharding:
    """One row for each device."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def abstract_table(mesh: Mesh, axes: Sequence[str]) -> jax.ShapeDtypeStruct:
    """`Mailboxes.table`, described but not made."""
    shape = (mesh.size, mesh_size(mesh, axes) + 2, 2)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=table_sharding(mesh))


def groups(mesh: Mesh, axes: Sequence[str]) -> list[tuple[list[jax.Device], int]]:
    """For each device of the mesh, in its order: the devices that differ from it along `axes` alone, and its rank."""
    along = [mesh.axis_names.index(axis) for axis in axes]
    found = []
    for place in np.ndindex(mesh.devices.shape):
        where = [slice(None) if i in along else index for i, index in enumerate(place)]
        kept = [i for i in range(len(place)) if i in along]  # the order of the dimensions that are left
        group = mesh.devices[tuple(where)].transpose([kept.index(i) for i in along])
        rank = np.ravel_multi_index([place[i] for i in along], group.shape)
        found.append((list(group.flat), int(rank)))
    return found
