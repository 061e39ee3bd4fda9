"""Tests that compile for accelerators that are not there, which takes XLA's GPU compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from paddock.pallas_kernels import mosaic_mode
from paddock.serving.plan_prove import require_wheels


def can(*requirements: Callable[[], Any]) -> bool:
    """Whether none of these raises ValueError."""
    try:
        for require in requirements:
            require()
    except ValueError:
        return False
    return True


needs_wheels = pytest.mark.skipif(not can(require_wheels), reason="needs the wheels of the extra `plan`")


def compiles_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test whose programs have Mosaic kernels in them."""
    able = can(require_wheels, lambda: mosaic_mode(False))
    skip = pytest.mark.skipif(not able, reason="needs JAX 0.11 and the wheels of the extra `plan`")
    # JAX keeps programs for devices that are not there, and cannot read them again.
    return skip(pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")(test))
