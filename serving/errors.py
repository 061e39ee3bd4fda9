"""What can go wrong with a request besides a ValueError for bad input."""

from __future__ import annotations


class EngineBusy(RuntimeError):
    """The queue is full, or the engine is shutting down: try again later (HTTP 503)."""


class RequestFailed(RuntimeError):
    """A step that held this request raised; the message says what (HTTP 500)."""


class EngineDead(RuntimeError):
    """The device is lost: nothing more will run in this process (HTTP 503)."""


class OutOfStep(RuntimeError):
    """This process has not done what the others did: it cannot go on with them."""
