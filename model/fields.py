"""Typed reads from a JSON object, with errors that name the field and the value."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

REQUIRED: Any = object()


class Fields:
    """The fields of one JSON object; absent and null are the same, and every method raises ValueError."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw

    def integer(self, name: str, default: Any = REQUIRED, *, at_least: int = 1) -> Any:
        value = self._get(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int) or value < at_least):
            raise ValueError(f"{name} is {value!r}; an integer of at least {at_least} is needed")
        return value

    def number(self, name: str, default: Any = REQUIRED, *, at_least: float = 0.0) -> Any:
        """A finite number, as a float: above 0, or from `at_least` on where that is not 0."""
        value = self._get(name, default)
        if value is default:
            return value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and at_least <= value <= sys.float_info.max and value > 0):  # NaN fails too
            bound = f"of at least {at_least}" if at_least else "above 0"
            raise ValueError(f"{name} is {value!r}; a number {bound} is needed")
        return float(value)

    def boolean(self, name: str, default: Any = REQUIRED) -> Any:
        value = self._get(name, default)
        if value is not default and not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; true or false is needed")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """An object without its null fields; empty when absent."""
        value = self._get(name, None)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{name} is {value!r}; an object is needed")
        return {key: entry for key, entry in (value or {}).items() if entry is not None}

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id, a list of ids, or none."""
        value = self._get(name, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise ValueError(f"{name} is {value!r}; a token id, a list of token ids or null is needed")
        return tuple(ids)

    def either(self, *names: str) -> str:
        """The first of several spellings of one field that is there (the first of all if none is).

        Raises when two spellings are there and disagree.
        """
        present = [name for name in names if self.raw.get(name) is not None]
        for other in present[1:]:
            if self.raw[other] != self.raw[present[0]]:
                raise ValueError(
                    f"{present[0]} {self.raw[present[0]]!r} and {other} {self.raw[other]!r} say different things"
                )
        return (present or names)[0]

    def check_supported(self, supported: Mapping[str, tuple[Any, ...]]) -> None:
        """Raises for the first field whose value is not among its supported ones."""
        for name, values in supported.items():
            value = self.raw.get(name)
            if value is not None and value not in values:
                allowed = " or ".join(map(repr, values)) or "null"
                raise ValueError(f"{name} {value!r} is not supported; it must be {allowed}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is None and default is REQUIRED:
            raise ValueError(f"{name} is {'null' if name in self.raw else 'missing'}")
        return default if value is None else value
