"""A server's client under the test's control."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable
from typing import Any

from fake_engine import DEADLINE


class Client:
    """A raw HTTP/1.1 client: what it has read and when is under the test's control."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self.received = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def post(self, path: str = "/v1/completions", **body: Any) -> None:
        data = json.dumps({"prompt": "abcdef", "max_tokens": 6, **body}).encode()
        self.sock.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    def read_until(self, part: bytes) -> bytes:
        while part not in self.received:
            data = self.sock.recv(65536)
            assert data, f"closed before {part!r}: {self.received!r}"
            self.received += data
        return self.received

    def read_all(self) -> bytes:
        while data := self.sock.recv(65536):
            self.received += data
        return self.received


def get(port: int, path: str) -> tuple[int, Any]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
