"""An HTTP server on a real socket that answers as it is told, byte for byte, and keeps what it was asked.

For what no well-behaved server does: slow bytes, huge bodies, broken JSON, redirects.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl, urlsplit

#: Writes an answer to an open connection; returning closes it.
Answer = Callable[[socket.socket], None]


@dataclass(frozen=True)
class Asked:
    """One request. `path` as it came, percent-encoded; `headers` with lower-case names."""

    method: str
    path: str
    query: tuple[tuple[str, str], ...]
    headers: dict[str, str]


@dataclass
class ScriptedApi:
    """`answers` in order; once they are used up, `default`."""

    url: str
    answers: deque[Answer] = field(default_factory=deque)
    asked: list[Asked] = field(default_factory=list)
    default: Answer = field(default_factory=lambda: reply(204))

    def then(self, *answers: Answer | int) -> None:
        """Queue answers; a number is one of the API's own."""
        self.answers += [own(answer) if isinstance(answer, int) else answer for answer in answers]

    @property
    def said(self) -> list[str]:
        """The requests as one word each: the status that was put, or the method."""
        return [dict(asked.query).get("status", asked.method) for asked in self.asked]


def reply(status: int, body: bytes = b"", **headers: str) -> Answer:
    """A whole answer; a header `Retry-After` is written `retry_after=`."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head(status, len(body), **headers) + body)

    return answer


def own(status: int, **headers: str) -> Answer:
    """An answer as the API itself gives it: 204 without a body, a crash as plain text, else JSON with `detail`.

    No 5xx but 500 is the API's: those others are a gateway's page.
    """
    if status == 204:
        return reply(204, b"", **headers)
    if status == 500:
        return reply(500, b"Internal Server Error", content_type="text/plain; charset=utf-8", **headers)
    phrase = HTTPStatus(status).phrase
    if status > 500:
        page = f"<html><head><title>{status} {phrase}</title></head><body>nginx</body></html>"
        return reply(status, page.encode(), content_type="text/html", **headers)
    return reply(status, json.dumps({"detail": phrase}).encode(), content_type="application/json", **headers)


def head(status: int, length: int | None, **headers: str) -> bytes:
    """Status line and headers."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Connection: close"]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def hang_up(connection: socket.socket) -> None:
    """No answer at all."""


def drip(data: bytes, stop: threading.Event) -> Answer:
    """`data` at ten bytes a second, until `stop`; then as it pleases."""

    def answer(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for byte in data:
                connection.sendall(bytes([byte]))
                if stop.wait(0.1):
                    return

    return answer


@contextmanager
def scripted_api() -> Iterator[ScriptedApi]:
    """The server, for the length of the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        api = ScriptedApi(f"http://127.0.0.1:{listener.getsockname()[1]}")
        closing = threading.Event()
        threads: list[threading.Thread] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                if closing.is_set():
                    connection.close()
                    return
                thread = threading.Thread(target=_handle, args=(connection, api))
                threads.append(thread)
                thread.start()

        server = threading.Thread(target=serve)
        server.start()
        try:
            yield api
        finally:
            closing.set()
            with contextlib.suppress(OSError):
                socket.create_connection(listener.getsockname(), timeout=5).close()
            server.join()
            for thread in threads:
                thread.join()


def _handle(connection: socket.socket, api: ScriptedApi) -> None:
    with connection, contextlib.suppress(OSError):
        connection.settimeout(30)
        received = b""
        while b"\r\n\r\n" not in received:
            more = connection.recv(65_536)
            if not more:
                return
            received += more
        start, *lines = received.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        method, target, _ = start.split(" ")
        parts = urlsplit(f"http://x{target}")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        query = tuple(parse_qsl(parts.query, keep_blank_values=True))
        api.asked.append(Asked(method, parts.path, query, headers))
        answer = api.answers.popleft() if api.answers else api.default
        answer(connection)
