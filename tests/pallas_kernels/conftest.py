"""One compile of what the threads of a kernel do, where JAX's interpreter compiles the same for each of them."""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.core
import pytest
from jax._src.pallas.mosaic.interpret import thread_map  # no public name: these tests only get faster by it


@pytest.fixture(autouse=True)
def threads_share_their_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every warpgroup of every block compiles its program as it starts, which is most of the time of these tests."""
    compiled: dict[int, tuple[Any, Any]] = {}  # by identity; the jaxpr is kept so that no other gets its id
    lock = threading.Lock()

    def evaluate(jaxpr: Any, consts: Any, *args: Any) -> None:
        jax.core.eval_jaxpr(jaxpr, consts, *args)

    def run(jaxpr: Any, consts: Any, *args: Any) -> None:
        with lock:
            if id(jaxpr) not in compiled:
                lowered = jax.jit(evaluate, static_argnums=0).lower(jaxpr, consts, *args)
                compiled[id(jaxpr)] = jaxpr, lowered.compile()
        compiled[id(jaxpr)][1](consts, *args)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run)
