"""The sockets between process 0, which tells what happens, and the others, which follow.

One TCP connection for each follower. A message is one JSON object with its `kind`. There is no authentication: the port
belongs on a private network, and process 0 listens on the coordinator's address alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from .errors import EngineDead
from .processes import START_SECONDS, Processes

logger = logging.getLogger("paddock")

POLL_MS = 50
# A closed socket sends what is left for so long.
LINGER_MS = 2000
# How long an orderly end waits for the other side to take part.
BYE_SECONDS = 10.0


class _End:
    """What both ends share: a socket, and a thread that hears of lost connections."""

    def __init__(self, kind: int, heartbeat_seconds: int):
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        self._socket.set(zmq.IPV6, 1)
        self._socket.set(zmq.LINGER, LINGER_MS)
        # ZeroMQ's own threads send and watch these, however busy Python is: they notice a machine that has vanished.
        self._socket.set(zmq.HEARTBEAT_IVL, heartbeat_seconds * 1000 // 3)
        self._socket.set(zmq.HEARTBEAT_TIMEOUT, heartbeat_seconds * 1000)
        # Nothing is ever dropped: whoever reads slowly holds up the steps themselves.
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.RCVHWM, 0)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="paddock-peers", daemon=True)

    def _watch(self) -> None:
        while not self._closing.is_set():
            if self._monitor.poll(POLL_MS) and recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED:
                self._on_disconnect()
        self._monitor.close()

    def _on_disconnect(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        self._closing.set()
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._socket.close()


class Leader(_End):
    """Process 0's end. Its methods may be called by any thread.

    Once a follower has gone every method raises EngineDead. Raises ValueError when the address cannot be had.
    """

    def __init__(self, processes: Processes, heartbeat_seconds: int):
        super().__init__(zmq.ROUTER, heartbeat_seconds)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._lock = threading.RLock()  # a ZeroMQ socket may change threads, with a lock between them
        self._count = processes.count
        self._peers: dict[int, bytes] = {}
        self._unread: deque[tuple[bytes, dict[str, Any]]] = deque()
        self._ending, self._gone = False, threading.Event()
        self._lost: str | None = None
        self._on_lost: Callable[[str], object] = lambda message: None
        where = f"{processes.host}:{processes.broadcast_port}"
        try:
            found = socket.getaddrinfo(processes.host, processes.broadcast_port, type=socket.SOCK_STREAM)
            self._socket.bind(_url(str(found[0][4][0]), processes.broadcast_port))
        except (OSError, zmq.ZMQError) as error:
            self._monitor.close()
            self._close()
            raise ValueError(f"process 0 cannot listen on {where}: {error}") from error
        self._watcher.start()

    def welcome(self, options: Mapping[str, Any]) -> None:
        """Wait until all followers are there; one with other options is refused. Raises TimeoutError naming who is
        missing."""
        options = json.loads(json.dumps(options))
        logger.info("process 0 waits for %d others", self._count - 1)
        deadline = time.monotonic() + START_SECONDS
        while len(self._peers) < self._count - 1:
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, self._count)) - set(self._peers))
                raise TimeoutError(f"after {START_SECONDS} s there is still no process {', '.join(map(str, missing))}")
            received = self._receive()
            if received is None or received[1]["kind"] != "hello":
                continue
            identity, hello = received
            index = hello["index"]
            problem = _difference(index, options, hello["options"])
            if index in self._peers:
                problem = f"there are two processes with process_id {index}"
            if problem is not None:
                logger.error("refused: %s", problem)
                self._send(identity, json.dumps({"kind": "refused", "error": problem}).encode())
            else:
                self._peers[index] = identity
        self.tell(kind="welcome")

    def exchange(self, value: Any) -> list[Any]:
        """Every process's value, by process; each must call it."""
        values = {0: value}
        while len(values) < self._count:
            received = self._receive()
            if received is not None and received[1]["kind"] == "value":
                values[received[1]["index"]] = received[1]["value"]
        ordered = [values[index] for index in range(self._count)]
        self.tell(kind="values", values=ordered)
        return ordered

    def tell(self, **message: Any) -> None:
        """To all followers, in order, without waiting for them."""
        raw = json.dumps(message).encode()
        for identity in self._peers.values():
            self._send(identity, raw)

    def end(self) -> bool:
        """Let the followers end in good order; whether all did."""
        self._ending = True
        waiting, deadline = set(self._peers.values()), time.monotonic() + BYE_SECONDS
        with contextlib.suppress(EngineDead):
            self.tell(kind="end")
            while waiting and time.monotonic() < deadline:
                received = self._receive()
                if received is not None and received[1]["kind"] == "bye":
                    waiting.discard(received[0])
        self.close()
        return not waiting

    def watch(self, on_lost: Callable[[str], object]) -> None:
        """Call `on_lost`, instead of who was to be called before, when a follower has gone; in a thread of its own."""
        with self._lock:
            self._on_lost = on_lost
            if self._lost is not None:
                self._report()

    def _report(self) -> None:
        threading.Thread(target=self._on_lost, args=(self._lost,), name="paddock-lost", daemon=True).start()

    def lost_within(self, seconds: float) -> str | None:
        """Who has gone, or why it failed; None if there is no such news in that time."""
        self._gone.wait(seconds)
        return self._lost

    def close(self) -> None:
        """Harmless the second time. Followers that were not told an end take it for this process's death."""
        with self._lock:
            self._close()

    def _send(self, identity: bytes, raw: bytes) -> None:
        with self._lock:
            self._check()
            try:
                self._socket.send_multipart([identity, raw])
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                index = next((i for i, peer in self._peers.items() if peer == identity), None)
                if index is not None:  # else one that was refused, and left before it heard why
                    self._lose(index)
                    self._check()

    def _receive(self) -> tuple[bytes, dict[str, Any]] | None:
        """The next message and its sender, None after a while without one."""
        with self._lock:
            self._check()
            self._pull()
            if self._unread:
                return self._unread.popleft()
        self._closing.wait(POLL_MS / 1000)  # without the lock, which the watcher may need
        return None

    def _pull(self) -> None:
        while self._socket.poll(0):
            identity, raw = self._socket.recv_multipart()
            message = json.loads(raw)
            if message["kind"] == "failed":
                self._lose(message["index"], message["error"])
                self._check()
            self._unread.append((identity, message))

    def _check(self) -> None:
        if self._lost is not None:
            raise EngineDead(self._lost)

    def _on_disconnect(self) -> None:
        # The event does not say whose connection it was. Its routing entry goes a moment later.
        for _ in range(10):
            with self._lock:
                if self._ending or self._closing.is_set():
                    return
                try:
                    self._pull()
                    self.tell(kind="ping")
                except EngineDead:
                    return
            self._closing.wait(0.05)

    def _lose(self, index: int, error: str | None = None) -> None:
        if self._lost is None:
            self._lost = f"process {index} " + (f"failed: {error}" if error else "has gone")
            self._gone.set()
            logger.critical("%s", self._lost)
            self._report()
            self.close()


class Follower(_End):
    """The end of any other process. All methods are for one thread.

    `on_lost` is called in a thread of its own when process 0 goes without saying so.
    """

    def __init__(self, processes: Processes, heartbeat_seconds: int, on_lost: Callable[[str], None]):
        super().__init__(zmq.DEALER, heartbeat_seconds)
        self._index, self._on_lost = processes.index, on_lost
        self._socket.connect(_url(processes.host, processes.broadcast_port))
        self._watcher.start()

    def join(self, options: Mapping[str, Any]) -> None:
        """Wait for process 0. Raises ValueError naming the option that it has otherwise, TimeoutError."""
        self._send(kind="hello", options=options)
        if not self._socket.poll(START_SECONDS * 1000):
            raise TimeoutError(f"after {START_SECONDS} s process 0 has not answered")
        answer = self.receive()
        if answer["kind"] == "refused":
            self.close()
            raise ValueError(answer["error"])

    def exchange(self, value: Any) -> list[Any]:
        """Every process's value, by process; each must call it."""
        self._send(kind="value", value=value)
        return self.receive()["values"]

    def receive(self) -> dict[str, Any]:
        """The next message of process 0, however long it takes."""
        while True:
            message = json.loads(self._socket.recv())
            if message["kind"] == "end":
                self._closing.set()
            if message["kind"] != "ping":
                return message

    def bye(self) -> None:
        """Answer the end."""
        self._send(kind="bye")
        self.close()

    def fail(self, error: str) -> None:
        """Tell process 0 why this process ends."""
        self._closing.set()
        self._send(kind="failed", error=error)
        self.close()

    def close(self) -> None:
        """Harmless the second time."""
        self._close()

    def _send(self, **message: Any) -> None:
        self._socket.send(json.dumps({"index": self._index, **message}).encode())

    def _on_disconnect(self) -> None:
        # Process 0 leaves in good order only after this process's bye.
        if not self._closing.is_set():
            self._on_lost("process 0 has gone")


def _url(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _difference(index: int, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            return (
                f"{name} is {theirs.get(name)!r} in process {index} and {ours.get(name)!r} in process 0: all processes "
                "must be started with the same options"
            )
    return None
