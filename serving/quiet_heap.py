"""Python's search for cycles, kept from looking at everything while steps run."""

from __future__ import annotations

import gc
import threading


class QuietHeap:
    """Searching all that a start has made has held a step up for 0.2 s. While any of a process's engines is at work
    what there was when one began counts as used; when all rest an `LLM` that nobody has any more can be found."""

    def __init__(self) -> None:
        self._at_work = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """One engine more is at work."""
        with self._lock:
            self._at_work += 1
            gc.freeze()

    def end(self) -> None:
        with self._lock:
            self._at_work -= 1
            if not self._at_work:
                gc.unfreeze()


HEAP = QuietHeap()
