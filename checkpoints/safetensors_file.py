"""One safetensors file: its header, checked, and its tensors, lazily.

The safetensors library reads numpy slices too, but not of 8-bit floats (numpy has no such types of its own), and it
cannot reshape before it slices, which is what makes a shard of a fused array a plain slice.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .errors import CheckpointError

FLOATS: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What the header says of a tensor; `begin` and `end` are bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A safetensors file, mapped into memory: pages are read when touched and are the system's to drop."""

    def __init__(self, path: Path):
        """Reads and checks the header alone. Raises CheckpointError naming the file and the tensor."""
        self.path = path
        self.tensors = _read_header(path)

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def view(self, name: str) -> np.ndarray:
        """The tensor, unread: slice it, then copy the slice."""
        tensor = self.tensors[name]
        return self._bytes[tensor.begin : tensor.end].view(FLOATS[tensor.dtype]).reshape(tensor.shape)


def _read_header(path: Path) -> dict[str, Tensor]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or 8 + length > size:
                raise CheckpointError(f"{path} is truncated: its {size} bytes do not hold the header")
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} is not a safetensors file: its header would be {length} bytes long")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, endless nesting
        raise CheckpointError(f"{path} is not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _read_entry(path, name, entry, 8 + length, size) for name, entry in header.items()}


def _read_entry(path: Path, name: str, entry: Any, data: int, size: int) -> Tensor:
    def is_sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)

    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(key, 0) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and is_sizes(shape) and is_sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{path}: tensor {name!r} has a header entry that is not safetensors': {entry!r}")
    tensor = Tensor(dtype, tuple(shape), data + offsets[0], data + offsets[1])
    if tensor.end > size:
        raise CheckpointError(f"{path} is truncated: tensor {name!r} ends at byte {tensor.end}, the file at {size}")
    if dtype in FLOATS and tensor.end - tensor.begin != math.prod(shape) * FLOATS[dtype].itemsize:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} has {tensor.end - tensor.begin} bytes"
        )
    return tensor
