"""Runs the application under waitress, in the engine's process, and ends it well."""

from __future__ import annotations

import logging
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flask
import waitress.server
import waitress.wasyncore
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask

from .admission import Admission
from .api_errors import ApiError
from .connection import ON_DISCONNECT

if TYPE_CHECKING:
    from .front import Front

logger = logging.getLogger("paddock")

# Threads beyond those that generation requests may hold, for /health, /metrics and refusals.
RESERVED_THREADS = 16
# Idle keep-alive connections hold no thread, only a file descriptor.
IDLE_CONNECTIONS = 1024
FLUSH_SECONDS = 5.0
WATCH_SECONDS = 0.5


def bind(host: str, port: int) -> socket.socket:
    """Take the address before the model loads, so that a port in use is an error at once. Raises ValueError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except BaseException:
            sock.close()
            raise
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error}") from error
    return sock


class HttpServer:
    """waitress over a bound socket, in threads of its own; never forks. Usable as a context manager."""

    def __init__(self, app: flask.Flask, sock: socket.socket) -> None:
        self.admission: Admission = app.extensions["paddock"]
        threads = self.admission.limit + RESERVED_THREADS
        self._map: dict[int, Any] = {}
        self._dispatcher = ThreadedTaskDispatcher()
        self._dispatcher.set_thread_count(threads)
        self._server = waitress.server.create_server(
            app,
            map=self._map,
            _dispatcher=self._dispatcher,
            sockets=[sock],
            threads=threads,
            # One request is read ahead, which is how a closed connection is noticed while its request runs.
            channel_request_lookahead=1,
            connection_limit=_raise_file_limit(2 * threads + IDLE_CONNECTIONS),
            asyncore_use_poll=True,
            # waitress refuses a body of exactly the limit, Flask one that is longer.
            max_request_body_size=app.config["MAX_CONTENT_LENGTH"] + 1,
            ident="paddock",
        )
        self._server.channel_class = _Channel
        self.host, self.port = sock.getsockname()[:2]
        self._closing, self._deadline = threading.Event(), 0.0
        self._thread = threading.Thread(target=self._run, name="paddock-http", daemon=True)
        self._thread.start()

    def close(self, flush_seconds: float = FLUSH_SECONDS) -> None:
        """Take no new requests, send running responses for up to `flush_seconds`, then close every socket."""
        self.admission.drain()
        self._deadline = time.monotonic() + flush_seconds
        self._closing.set()
        self._server.pull_trigger()
        self._thread.join()
        # Last of all, for worker threads write to the server's wake-up pipe.
        self._dispatcher.shutdown(timeout=1)
        self._server.close()

    def __enter__(self) -> HttpServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing.is_set() or (self._is_busy() and time.monotonic() < self._deadline):
            waitress.wasyncore.loop(
                timeout=0.05 if self._closing.is_set() else 1.0, use_poll=True, map=self._map, count=1
            )
        for channel in list(self._server.active_channels.values()):
            channel.handle_close()

    def _is_busy(self) -> bool:
        """Some response is being made, or lies in a buffer."""
        return any(channel.requests or channel.total_outbufs_len for channel in self._server.active_channels.values())


def serve(app: flask.Flask, engine: Front, sock: socket.socket, *, grace_seconds: float, name: str) -> int:
    """Serve until SIGTERM or SIGINT, then end the requests that run within `grace_seconds`; a second signal ends them
    at once. The engine is shut down afterwards. Returns the exit code: 0, or 1 if the engine died or hangs: then the
    device may block what Python does at exit, too. To be called in the main thread."""
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()  # the one queue that a signal handler may put to
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, frame: signals.put(number)) for number in numbers}
    try:
        server = HttpServer(app, sock)
        print(f"Paddock serves {name} on http://{_url_host(server.host)}:{server.port} (Ctrl+C stops)", flush=True)
        while not _signalled(signals, WATCH_SECONDS):
            if engine.is_dead:
                logger.critical("the server ends with the engine: %s", engine.health())
                server.close()
                engine.shutdown(0.0)
                return 1
        print(f"Paddock stops: {grace_seconds:g} s for the requests that run", file=sys.stderr, flush=True)
        server.admission.drain()
        if not _shut_down(engine, grace_seconds, signals):
            logger.critical("the engine does not stop: a step hangs")
            server.close(flush_seconds=0.0)  # what would be waited for does not come
            return 1
        server.close()
        return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signalled(signals: queue.SimpleQueue[int], timeout: float) -> bool:
    try:
        signals.get(timeout=timeout)
    except queue.Empty:
        return False
    return True


def _shut_down(engine: Front, grace_seconds: float, signals: queue.SimpleQueue[int]) -> bool:
    """Whether the engine has ended; another signal takes the grace time away."""
    endings: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def end(seconds: float) -> None:
        ended = False
        try:
            ended = engine.shutdown(seconds)
        finally:
            endings.put(ended)

    threading.Thread(target=end, args=(grace_seconds,), name="paddock-shutdown", daemon=True).start()
    while True:
        try:
            return endings.get(timeout=0.05)
        except queue.Empty:
            if _signalled(signals, 0.0):
                threading.Thread(target=end, args=(0.0,), name="paddock-shutdown-now", daemon=True).start()


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _raise_file_limit(wanted: int) -> int:
    """Allow this process that many open files if it may; returns how many connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = 128  # for everything that is not a connection
    if soft != resource.RLIM_INFINITY and soft < wanted + spare:
        soft = wanted + spare if hard == resource.RLIM_INFINITY else min(hard, wanted + spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - spare))


class _JsonErrorTask(ErrorTask):
    """What waitress refuses by itself (a body too large, a malformed request) in OpenAI's shape too."""

    def execute(self) -> None:
        error = self.request.error
        message = f"{error.reason}: {error.body}"
        if error.code == 413:
            message = f"the body is larger than {self.channel.adj.max_request_body_size - 1} bytes"
        body = flask.json.dumps(ApiError(error.code, message).body).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class _Task(WSGITask):
    """Lets the application ask to be called when the client goes away."""

    def get_environment(self) -> dict[str, Any]:
        environ = super().get_environment()
        environ[ON_DISCONNECT] = self.channel.call_on_disconnect
        return environ


class _Channel(HTTPChannel):
    """A client's connection."""

    task_class = _Task
    error_task_class = _JsonErrorTask

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._callback: Callable[[], None] | None = None
        super().__init__(*args, **kwargs)

    def call_on_disconnect(self, callback: Callable[[], None]) -> None:
        """For the request that runs now; a connection runs one at a time. Must not block: the I/O loop calls it."""
        self._callback = callback
        if not self.connected:
            callback()

    def service(self) -> None:
        # Cleared here and not afterwards: by then another thread may already serve the next request.
        self._callback = None
        super().service()

    def handle_close(self) -> None:
        super().handle_close()
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()
