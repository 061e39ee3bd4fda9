"""Process 0's dealings with the processes that follow it; for an engine that is alone all of this is nothing."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable

import jax

from .broadcast import Leader
from .build import Built, build
from .engine import StepResult
from .engine_config import EngineConfig
from .errors import EngineDead
from .executor import Executor
from .follower import build_together, shared_options
from .processes import Processes
from .turn import Turn

logger = logging.getLogger("paddock")

# Time for a failed start to be reported by the thread that starts, before the program is ended.
GRACE_SECONDS = 5.0


class Peers:
    """`is_alone`: there are no others. `lost` is set once one is gone: then this process cannot go on."""

    def __init__(self, config: EngineConfig):
        """Raises ValueError unless this is process 0."""
        self._processes, self._leader = Processes.of(config), None
        self.lost = threading.Event()
        if self._processes is None:
            return
        if self._processes.index:
            raise ValueError(f"process_id {self._processes.index} only follows: start it with `paddock serve`")
        self._leader = Leader(self._processes, config.heartbeat_timeout_seconds)

    @property
    def is_alone(self) -> bool:
        return self._leader is None

    def build(self, config: EngineConfig, *, replica: int, progress: bool) -> Built:
        """`build`, here and in the others, for which it waits.

        Raises ValueError as `build` does, EngineDead when one of the others fails; ends the program if that happens
        while this thread is deep in JAX.
        """
        if self._leader is None:
            return build(config, replica=replica, progress=progress)
        done = threading.Event()
        self._leader.watch(lambda message: _exit_unless(done))
        try:
            self._leader.welcome(shared_options(config))
            return build_together(config, self._leader, progress=progress)
        except BaseException:
            self._leader.close()
            raise
        finally:
            done.set()

    def watch(self, on_lost: Callable[[str], None], at_exit: Callable[[], object]) -> None:
        """Call `on_lost` when one of the others is gone, and `at_exit` before JAX waits for them at the end."""
        if self._leader is None:
            return

        def lose(message: str) -> None:
            self.lost.set()
            on_lost(message)

        self._leader.watch(lose)
        atexit.register(at_exit)

    def tell(self, turn: Turn) -> None:
        """Raises EngineDead when one of the others is gone."""
        if self._leader is not None:
            self._leader.tell(kind="turn", **turn.to_dict())

    def check(self, result: StepResult) -> None:
        """Raises EngineDead on a failed step: alone an engine recovers, but the others know nothing of the failure."""
        if self._leader is not None and result.error:
            raise EngineDead(f"a step failed in process 0: {result.error}")

    def reason(self, error: BaseException) -> str:
        """Why the engine stopped with `error`: what a collective says when its other end is gone does not name it."""
        lost = self._leader.lost_within(1.0) if self._leader is not None else None
        return lost or str(error)

    def fail(self) -> None:
        """End the others, too."""
        if self._leader is not None:
            self._leader.close()

    def end(self, executor: Executor) -> None:
        """Let the others end in good order."""
        if self._leader is None or self._processes is None:
            return
        jax.block_until_ready(executor.state)  # they need this process until the last step is done
        if self._leader.end():
            self._processes.leave()


def _exit_unless(done: threading.Event) -> None:
    if not done.wait(GRACE_SECONDS):
        logger.critical("this process ends, too")
        sys.stderr.flush()
        os._exit(1)
