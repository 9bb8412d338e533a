"""A server of large files for downloads in ranges: each connection has a speed of its own, and much else goes wrong.

`FileServer` beside it plays a store that is scripted request by request. Where several connections fetch one file, no
script knows which request comes next; so here a function, `plan`, sees each request and says how it is answered, and
what all connections have in common are switches that a test turns while they run: `rate`, `cap`, `drop_reused`.
What the client left unread is noticed at once, as far as the kernel knows of it, so that the counts are true:
how many requests were in progress at a time, and how many bytes went out.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

_BLOCK = 65_536

#: A wait is cut into pieces of this length, so that a switch that was turned meanwhile is seen.
_SLICE_S = 0.05


@dataclass(frozen=True)
class Thing:
    """What is stored. `headers` go out with every 200 and 206, over the ordinary ones (None: that one is left out)."""

    content: bytes
    etag: str = '"one"'
    headers: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Act:
    """How one request is answered. The default is to behave well.

    `status`, `headers` (None: left out) and `body` are put over the true ones. `ignore_range`, `ignore_if_range`: that
    header counts for nothing. Of the body's bytes, number `flip` is inverted; after `cut` the connection ends, by a
    reset if `reset`, and after `drop` before a byte of the answer. `close`: the connection is closed after a complete
    answer that did not say so. `rate`: bytes per second, over the server's own. `gate` is waited for before any answer.
    """

    status: int | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)
    body: bytes | None = None
    ignore_range: bool = False
    ignore_if_range: bool = False
    flip: int | None = None
    cut: int | None = None
    drop: bool = False
    reset: bool = False
    close: bool = False
    rate: float | None = None
    gate: threading.Event | None = None


SLOW_DOWN = Act(
    status=503, body=b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
TOO_MANY = Act(status=429, headers={"Retry-After": "1"}, body=b"")
EXPIRED = Act(
    status=403, body=b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>", headers={}
)
RESET = Act(drop=True, reset=True)


@dataclass(eq=False)
class Seen:
    """One request, and what became of it.

    `number` counts all requests, `turn` those of its connection, both from 0. `first` and `last` are the bytes asked
    for (`last` None: to the end); `first` is None for a request without Range. `together`: requests in progress when it
    came, itself among them. `sent` counts the body's bytes that went out. Times are `time.monotonic()`.
    """

    number: int
    connection: int
    turn: int
    target: str
    headers: dict[str, str]
    first: int | None
    last: int | None
    together: int
    began: float
    ended: float | None = None
    status: int = 0
    sent: int = 0

    @property
    def ranged(self) -> bool:
        return self.first is not None

    def span(self, size: int) -> tuple[int, int]:
        """First and last byte that were asked for, of a file of `size` bytes."""
        return self.first or 0, size - 1 if self.last is None else min(self.last, size - 1)


class _Left(Exception):
    """The client has left, or the test is over."""


class _End(Exception):
    """This connection is over. `reset`: the client is told so by a reset."""

    def __init__(self, *, reset: bool = False) -> None:
        super().__init__()
        self.reset = reset


class RangeServer:
    """Listens on loopback from `with` to its end.

    `rate`: bytes per second of each connection, None: no limit. `cap`: requests in progress above which one is answered
    by `refusal`; None: no limit. `drop_reused`: requests that come second or later on a connection get no answer.
    """

    def __init__(self, rate: float | None = None) -> None:
        self.things: dict[str, Thing] = {}
        self.rate = rate
        self.cap: int | None = None
        self.refusal = SLOW_DOWN
        self.drop_reused = False
        self.plan: Callable[[Seen], Act | None] = lambda _: None
        self.seen: list[Seen] = []
        self._lock = threading.RLock()  # a plan runs under it, and may look at what was seen
        self._closing = threading.Event()
        self._busy: dict[socket.socket, Seen] = {}
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])

    def url(self, target: str) -> str:
        return f"http://127.0.0.1:{self.port}{target}"

    @property
    def sent(self) -> int:
        """Bytes of files (not of errors) that went out so far."""
        return sum(seen.sent for seen in list(self.seen) if seen.status in {200, 206})

    @property
    def busiest(self) -> int:
        """The most requests that were in progress at a time."""
        return max((seen.together for seen in list(self.seen)), default=0)

    @property
    def ranged(self) -> list[Seen]:
        """The requests for a part of a file."""
        return [seen for seen in list(self.seen) if seen.ranged]

    @property
    def open(self) -> int:
        """Connections that are there now, and that no client has left."""
        with self._lock:
            return sum(not _left(connection) for connection in self._open)

    @property
    def running(self) -> int:
        """Requests that are in progress now."""
        with self._lock:
            return self._running()

    def cut_all(self) -> None:
        """Reset every connection."""
        with self._lock:
            for connection in self._open:
                _linger(connection)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_all()
        for thread in self._threads:
            thread.join(5)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="range-server", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections += 1
                self._open.add(connection)
                self._start(self._serve, connection, self._connections)

    def _serve(self, connection: socket.socket, number: int) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Little lies between here and the client, so that what was sent is nearly what was read.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _BLOCK)
            turn = 0
            while self._one(connection, number, turn):
                turn += 1
        except _End as end:
            if end.reset:
                _linger(connection)
        except (OSError, _Left):
            pass
        finally:
            with self._lock:
                self._open.discard(connection)
                self._busy.pop(connection, None)
            connection.close()

    def _one(self, connection: socket.socket, number: int, turn: int) -> bool:
        head = _head(connection)
        if head is None:
            return False
        line, *lines = head.split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (text.partition(":") for text in lines)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        first = int(asked[1]) if asked else None
        last = int(asked[2]) if asked and asked[2] else None
        with self._lock:
            together = 1 + self._running()
            target = line.split()[1]
            seen = Seen(len(self.seen), number, turn, target, headers, first, last, together, began=time.monotonic())
            self.seen.append(seen)
            self._busy[connection] = seen
            if self.drop_reused and turn:
                act = Act(drop=True)
            elif self.cap is not None and together > self.cap:
                act = self.refusal
            else:
                act = self.plan(seen) or Act()
        try:
            while act.gate is not None and not act.gate.is_set():
                self._pause(connection, _SLICE_S)
            if act.drop:
                raise _End(reset=act.reset)
            self._answer(connection, seen, act)
        finally:
            self._over(connection)
        return not act.close

    def _over(self, connection: socket.socket) -> None:
        """The request on `connection` is in progress no more."""
        with self._lock:
            seen = self._busy.pop(connection, None)
            if seen is not None:
                seen.ended = time.monotonic()

    def _running(self) -> int:
        return sum(not _left(connection) for connection in self._busy)

    def _answer(self, connection: socket.socket, seen: Seen, act: Act) -> None:
        thing = self.things.get(seen.target.partition("?")[0])
        headers: dict[str, str | None]
        if thing is None:
            status, headers, body = 404, {}, memoryview(b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            status, headers, body = _honest(thing, seen, act)
        if act.status is not None and act.status not in {200, 206}:
            headers = {}
        if act.body is not None:
            body = memoryview(act.body)
        seen.status = status if act.status is None else act.status
        headers = {"Content-Length": str(len(body)), **headers, **act.headers}
        said = [f"{name}: {value}\r\n" for name, value in headers.items() if value is not None]
        connection.sendall(f"HTTP/1.1 {seen.status} Scripted\r\n{''.join(said)}\r\n".encode("latin-1"))
        self._send(connection, seen, body, act)

    def _send(self, connection: socket.socket, seen: Seen, body: memoryview, act: Act) -> None:
        """The body, at the speed that this connection has. The first block waits, too: none is faster than `rate`."""
        end = len(body) if act.cut is None else min(act.cut, len(body))
        due = time.monotonic()
        while seen.sent < end:
            rate = self.rate if act.rate is None else act.rate
            size = min(_BLOCK, end - seen.sent) if rate is None else min(_BLOCK, end - seen.sent, int(rate / 50) or 1)
            if rate is not None:
                due += size / rate
                if not self._until(due, connection, rate, act):
                    due = time.monotonic()
                    continue
                due = max(due, time.monotonic() - _SLICE_S)  # time that was lost is not made up for all at once
            block = bytes(body[seen.sent : seen.sent + size])
            if act.flip is not None and seen.sent <= act.flip < seen.sent + size:
                at = act.flip - seen.sent
                block = block[:at] + bytes([block[at] ^ 0xFF]) + block[at + 1 :]
            if seen.sent + size == len(body):
                self._over(connection)  # said first: the client may ask again before this thread goes on
            seen.sent += size  # first: the client may have it, and the test look, before this thread goes on
            try:
                connection.sendall(block)
            except OSError:
                seen.sent -= size
                raise
        if act.cut is not None:
            raise _End(reset=act.reset)

    def _until(self, due: float, connection: socket.socket, rate: float, act: Act) -> bool:
        """Wait; False if the rate was changed meanwhile."""
        while (left := due - time.monotonic()) > 0:
            self._pause(connection, min(left, _SLICE_S))
            if act.rate is None and self.rate != rate:
                return False
        return True

    def _pause(self, connection: socket.socket, seconds: float) -> None:
        if _left(connection, seconds) or self._closing.is_set():
            raise _Left


def _honest(thing: Thing, seen: Seen, act: Act) -> tuple[int, dict[str, str | None], memoryview]:
    """Status, headers and body as they should be (RFC 9110, 13.1.5 and 14)."""
    content, size = memoryview(thing.content), len(thing.content)
    headers: dict[str, str | None] = {"ETag": thing.etag, "Accept-Ranges": "bytes", **thing.headers}
    same = act.ignore_if_range or seen.headers.get("if-range", thing.etag) == thing.etag
    if not seen.ranged or act.ignore_range or not same:
        return 200, headers, content
    first, last = seen.span(size)
    if last < first:
        return 416, {"Content-Range": f"bytes */{size}"}, memoryview(b"")
    return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}, content[first : last + 1]


def _head(connection: socket.socket) -> str | None:
    """A request's line and headers; None if the client has no more. Bodies are not for this server."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        piece = connection.recv(_BLOCK)
        if not piece:
            return None
        head += piece
    return head[:-4].decode("latin-1")


def _left(connection: socket.socket, wait_s: float = 0.0) -> bool:
    """Whether the client has closed its side, looked at for `wait_s`."""
    poll = select.poll()
    try:
        poll.register(connection, select.POLLRDHUP)  # errors and hang-ups are told in any case
    except ValueError:
        return True  # closed on this side
    return bool(poll.poll(wait_s * 1000))


def _linger(connection: socket.socket) -> None:
    """From now on closing it sends a reset."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
