"""Starting an engine for a command, and ending it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .engine_config import EngineConfig

if TYPE_CHECKING:
    from .front import Front


def start_engine(config: EngineConfig) -> Front:
    """Load and compile. JAX is imported here and not before: it must first hear how many devices there are."""
    from .front import Front

    return Front(config, progress=True)


@contextlib.contextmanager
def running_engine(config: EngineConfig) -> Iterator[Front]:
    engine = start_engine(config)
    try:
        yield engine
    finally:
        engine.shutdown(0.0)
