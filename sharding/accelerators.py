"""Accelerators as data: memory, speeds and links of named cards, each figure with its source (`accelerators.toml`)."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from importlib import resources


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device, and the island of devices that its link joins. Bytes, bytes/s, operations/s; None: not known."""

    name: str
    datasheet_bytes: int
    usable: float
    memory_bandwidth: float
    matrix_rates: Mapping[str, float]
    link: str
    link_bandwidth: float
    island: int
    source: str
    driver_bytes: int | None = None
    nic_bandwidth: float | None = None
    device_kind: str | None = None

    @property
    def memory_bytes(self) -> int:
        """By the driver where that is known, else by the datasheet."""
        return self.driver_bytes if self.driver_bytes is not None else self.datasheet_bytes

    def matrix_rate(self, dtype: str) -> float:
        """Peak operations/s of a product of `dtype`. Raises ValueError where no source has it."""
        if dtype not in self.matrix_rates:
            known = ", ".join(self.matrix_rates)
            raise ValueError(f"accelerator {self.name} has no matrix rate for {dtype}; there are {known}")
        return self.matrix_rates[dtype]

    def between_islands(self) -> float:
        """Bytes/s of a device to another island. Raises ValueError where no source has it."""
        if self.nic_bandwidth is None:
            raise ValueError(
                f"accelerator {self.name} has no known bandwidth between its islands of {self.island} devices, which "
                "this layout sends across"
            )
        return self.nic_bandwidth

    def all_reduce_seconds(self, num_bytes: float, size: int, islands: int) -> float:
        """Of `num_bytes` on each of `size` devices, equally many on each of `islands`, at the links' full speed.

        Each island reduces and scatters, the pieces are reduced across islands over every device's own network link,
        and are gathered again: 2 (n - 1) / n of the bytes at each level (Patarasuk and Yuan 2009).
        """
        inside = size // islands
        seconds = 2 * (inside - 1) / inside * num_bytes / self.link_bandwidth
        if islands > 1:
            seconds += 2 * (islands - 1) / islands * num_bytes / inside / self.between_islands()
        return seconds

    def send_seconds(self, num_bytes: float, *, across: bool) -> float:
        """Of one device's `num_bytes` to another, in its island or `across`."""
        return num_bytes / (self.between_islands() if across else self.link_bandwidth)


@functools.cache
def accelerators() -> dict[str, Accelerator]:
    """All of the shipped table by name."""
    text = resources.files(__package__).joinpath("accelerators.toml").read_text(encoding="utf-8")
    return {name: Accelerator(name=name, **fields) for name, fields in tomllib.loads(text).items()}


def accelerator(name: str) -> Accelerator:
    """Raises ValueError listing the known names."""
    if name not in accelerators():
        raise ValueError(f"accelerator {name!r} is unknown; there are {', '.join(accelerators())}")
    return accelerators()[name]
