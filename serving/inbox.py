"""What other threads ask of an engine's thread, until it takes it in."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable
from collections.abc import Sequence as ListOf

from .quiet_heap import HEAP
from .request import RequestStream


@dataclasses.dataclass
class Wishes:
    """What they asked for since the step before."""

    admitted: list[RequestStream] = dataclasses.field(default_factory=list)
    # Outputs of a request that shall end, and why.
    aborted: list[tuple[RequestStream, list[int], str]] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.admitted or self.aborted)


# What an engine at work mostly finds: the same object each time, since two lists a step would be made for nothing.
NOTHING = Wishes()


class Inbox:
    """Any thread may `put`, in whose order the engine's thread takes it."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Callable[[Wishes], object] | None] = queue.SimpleQueue()

    def put(self, command: Callable[[Wishes], object]) -> None:
        """To be called in the engine's thread, before its next step."""
        self._commands.put(command)

    def admit(self, streams: ListOf[RequestStream]) -> None:
        """Requests that join, in the same step."""
        self.put(lambda wishes: wishes.admitted.extend(streams))

    def abort(self, stream: RequestStream, indices: list[int], reason: str) -> None:
        self.put(lambda wishes: wishes.aborted.append((stream, indices, reason)))

    def close(self) -> None:
        """Nothing after this is taken in."""
        self._commands.put(None)

    def collect(self, *, is_idle: bool) -> Wishes | None:
        """All that was put; an engine that is idle waits for some. None once the inbox is closed."""
        if not is_idle and self._commands.empty():
            return NOTHING
        wishes = Wishes()
        while not self._commands.empty() or (is_idle and not wishes):
            command = self._commands.get() if not self._commands.empty() else self._rest()
            if command is None:
                return None
            command(wishes)
        return wishes

    def _rest(self) -> Callable[[Wishes], object] | None:
        """Wait for what comes next."""
        HEAP.end()
        try:
            return self._commands.get()
        finally:
            HEAP.begin()
