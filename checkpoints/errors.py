"""The one error of this package."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or understood; the message names the file and the tensor or field."""
