"""How many requests the server works on, and whether it still takes new ones."""

from __future__ import annotations

import threading

from .errors import EngineBusy


class Admission:
    """Counts generation requests from `enter` to `leave`.

    Every one of them holds a thread while it waits and streams: the limit keeps the last threads free for /health and
    /metrics. Requests beyond it are refused at once rather than queued where nothing could answer them.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"max_concurrent_requests must be at least 1, got {limit}")
        self.limit = limit
        self.active = 0
        self.draining = False
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Raises EngineBusy when the server is full or shutting down."""
        with self._lock:
            if self.draining:
                raise EngineBusy("the server is shutting down")
            if self.active >= self.limit:
                raise EngineBusy(f"the server is working on {self.limit} requests, as many as it takes at once")
            self.active += 1

    def leave(self) -> None:
        with self._lock:
            self.active -= 1

    def drain(self) -> None:
        """Refuse everything new from here on."""
        with self._lock:
            self.draining = True
