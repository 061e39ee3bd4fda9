"""The devices that a benchmark cannot do without."""

from __future__ import annotations

import jax


def require_gpu(who: str) -> None:
    """Ends the program in one line where there is none: `who` needs it, instead of failing, or taking minutes, on a
    CPU."""
    if jax.default_backend() != "gpu":
        raise SystemExit(f"{who} needs a GPU, but JAX runs on {jax.default_backend()} here")
