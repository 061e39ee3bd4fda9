"""The client's side of a request: waiting for outputs while it is still there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

from .outputs import RequestOutput

if TYPE_CHECKING:
    from .request import RequestStream

# Environment keys: waitress brings the first, our channel class (wsgi.py) the second.
DISCONNECTED = "waitress.client_disconnected"
ON_DISCONNECT = "paddock.on_disconnect"
POLL_SECONDS = 0.25


class ClientGone(Exception):
    """The client closed its connection; nobody reads the answer."""


class Connection:
    """One HTTP request's streams and its client.

    `notify` is what the engine calls when a stream has something. A client that closes its connection aborts the
    streams at once where the WSGI server calls back, and at the next poll where it only answers when asked.
    """

    def __init__(self, environ: Mapping[str, Any]) -> None:
        self.streams: list[RequestStream] = []
        self._wake = threading.Event()
        self._is_gone: Callable[[], bool] = environ.get(DISCONNECTED, lambda: False)
        if ON_DISCONNECT in environ:
            environ[ON_DISCONNECT](self._disconnected)

    def notify(self, stream: RequestStream) -> None:
        self._wake.set()

    def abort(self) -> None:
        for stream in self.streams:
            stream.abort()

    def outputs(self) -> Generator[tuple[int, RequestOutput], None, None]:
        """(index of the stream, output) pairs as they come, until all streams are finished.

        An early end, by an error or by closing this generator, aborts them. Raises ClientGone and what streams raise.
        """
        open_streams = dict(enumerate(self.streams))
        try:
            while open_streams:
                self._wake.wait(POLL_SECONDS)
                self._wake.clear()
                if self._is_gone():
                    raise ClientGone
                for index, stream in list(open_streams.items()):
                    output = stream.get(timeout=0)
                    if output is None:
                        continue
                    if output.finished:
                        del open_streams[index]
                    yield index, output
        finally:
            if open_streams:
                self.abort()

    def _disconnected(self) -> None:
        self.abort()
        self._wake.set()
