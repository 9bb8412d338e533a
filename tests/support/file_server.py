"""A small HTTP/1.1 file server on a raw socket, whose misbehaviour is scripted and whose every request is recorded.

It plays an S3-like store: objects with ETag and Range, PUT, and POST forms. Each request takes the next `Act` of its
path's script, or behaves well when there is none. It speaks TLS where it is given a context. No web framework is used,
since most of what it must do is forbidden.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import ssl
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Self

_KEPT_BODY = 4 * 1024 * 1024
_BLOCK = 256 * 1024


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Object:
    """What is stored. `zeros` more zero bytes follow `content`, so that large objects take no memory."""

    content: bytes = b""
    zeros: int = 0
    etag: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.content) + self.zeros

    def blocks(self, first: int) -> Iterator[bytes]:
        at = first
        while at < self.size:
            piece = self.content[at : at + _BLOCK] or bytes(min(_BLOCK, self.size - at))
            at += len(piece)
            yield piece

    @property
    def etag_header(self) -> str:
        return self.etag if self.etag is not None else f'"{_md5(self.content)}"'


@dataclass
class Act:
    """One request's behaviour. The default is to behave well.

    `status` with `headers` and `body` replaces the answer. Else the answer is altered: `cut` bytes of the body and
    then the end of the connection (with `reset`, a reset, which may swallow bytes on their way); byte `flip` inverted;
    Range ignored; no length; chunked; `headers` put over the true ones (None: left out); silence in the middle of the
    headers or after one byte of the body, until the client leaves. For requests with a body: `cut_upload` bytes read,
    then a reset; `drop_reply`: all of it read, then closed without a word. `gate` is waited for before any answer.
    """

    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    reset: bool = False
    flip: int | None = None
    ignore_range: bool = False
    no_length: bool = False
    chunked: bool = False
    stall_headers: bool = False
    stall_body: bool = False
    cut_upload: int | None = None
    drop_reply: bool = False
    gate: threading.Event | None = None


@dataclass
class Seen:
    """One request as it came in. `sent` counts the bytes of the body that went back."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    connection: int
    body: bytes = b""
    body_size: int = 0
    body_md5: str = ""
    sent: int = 0

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def form(self) -> list[tuple[str, str, bytes]]:
        """The parts of a multipart form, in order: the raw disposition, the part's Content-Type, the content."""
        found = re.fullmatch(r"multipart/form-data; boundary=(\S+)", self.header("content-type") or "")
        assert found, "not a form"
        mark = b"--" + found[1].encode()
        first, *pieces, last = (b"\r\n" + self.body).split(b"\r\n" + mark)
        assert (first, last) == (b"", b"--\r\n"), "malformed form"
        parts = []
        for piece in pieces:
            head, _, content = piece.partition(b"\r\n\r\n")
            lines = dict(line.split(": ", 1) for line in head.decode().strip("\r\n").split("\r\n"))
            parts.append((lines["Content-Disposition"], lines.get("Content-Type", ""), content))
        return parts


class _Reset(Exception):
    """End this connection with a reset, not in peace."""


class FileServer:
    """Listens on `host` (loopback) from `with` to its end. Paths are without query."""

    def __init__(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.objects: dict[str, Object] = {}
        self.seen: list[Seen] = []
        self.scripts: dict[str, deque[Act]] = defaultdict(deque)
        self.always: Act | None = None
        self.connections = self.busy = self.busiest = 0
        self._tls, self._closing = tls, threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self.host, self.port = host, int(self._listener.getsockname()[1])

    def url(self, path: str, host: str | None = None) -> str:
        return f"{'https' if self._tls else 'http'}://{host or self.host}:{self.port}{path}"

    def script(self, path: str, *acts: Act) -> None:
        self.scripts[path].extend(acts)

    def requests(self, path: str) -> list[Seen]:
        return [seen for seen in list(self.seen) if seen.target.partition("?")[0] == path]

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                number = self.connections
                self._open.add(connection)
            self._start(self._serve, connection, number)

    def _serve(self, raw: socket.socket, number: int) -> None:
        connection = raw
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(raw, server_side=True)
                with self._lock:
                    self._open = self._open - {raw} | {connection}
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection.makefile("rb") as reader:
                while self._one(connection, reader, number):
                    pass
        except _Reset:
            # SO_LINGER with zero seconds: close() sends RST instead of FIN
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except (OSError, ValueError):
            pass  # the client left
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _one(self, connection: socket.socket, reader: BinaryIO, number: int) -> bool:
        line = reader.readline(65_536).decode("latin-1").split()
        if len(line) != 3 or not line[2].startswith("HTTP/"):  # a TLS greeting may have three words, too
            return False
        headers: list[tuple[str, str]] = []
        while (raw := reader.readline(65_536)) not in {b"\r\n", b""}:
            name, _, value = raw.decode("latin-1").rstrip("\r\n").partition(":")
            headers.append((name, value.strip()))
        seen = Seen(line[0], line[1], headers, number)
        path = seen.target.partition("?")[0]
        with self._lock:
            self.seen.append(seen)
            script = self.scripts.get(path)
            act = script.popleft() if script else (self.always or Act())
            self.busy += 1
            self.busiest = max(self.busiest, self.busy)
        try:
            self._read_body(reader, seen, act)
            while act.gate is not None and not act.gate.wait(0.05):
                if self._closing.is_set():
                    return False
            if act.drop_reply:
                return False
            self._answer(connection, path, seen, act)
        finally:
            with self._lock:
                self.busy -= 1
        return not act.no_length

    def _read_body(self, reader: BinaryIO, seen: Seen, act: Act) -> None:
        left = int(seen.header("content-length") or 0)
        digest = hashlib.md5(usedforsecurity=False)
        kept = bytearray()
        while left:
            if act.cut_upload is not None and seen.body_size >= act.cut_upload:
                raise _Reset
            allowed = left if act.cut_upload is None else act.cut_upload - seen.body_size
            piece = reader.read(min(left, _BLOCK, allowed))
            if not piece:
                raise OSError("client left")
            left -= len(piece)
            seen.body_size += len(piece)
            digest.update(piece)
            if len(kept) + len(piece) <= _KEPT_BODY:
                kept += piece
        seen.body, seen.body_md5 = bytes(kept), digest.hexdigest()

    def _answer(self, connection: socket.socket, path: str, seen: Seen, act: Act) -> None:
        if act.status is not None:
            headers = {"Content-Length": str(len(act.body)), **act.headers}
            self._reply(connection, act.status, headers, iter([act.body]), act, seen)
        elif seen.method == "GET":
            self._get(connection, path, seen, act)
        elif seen.method in {"PUT", "POST"} and seen.header("content-length") is not None:
            md5 = seen.body_md5
            if seen.method == "POST":
                content = seen.form()[-1][2] if seen.body_size <= _KEPT_BODY else b""
                md5 = _md5(content)
                path = f"{path.rstrip('/')}/{self._form_key(seen)}" if content or seen.body_size <= _KEPT_BODY else path
            else:
                content = seen.body
            self.objects[path] = Object(content)
            big = seen.method == "POST" and seen.body_size > _KEPT_BODY
            etag = {} if big else {"ETag": f'"{md5}"'}
            headers = {"Content-Length": "0", "x-amz-request-id": "1", **etag, **act.headers}
            self._reply(connection, 204 if seen.method == "POST" else 200, headers, iter(()), act, seen)
        else:
            self._reply(connection, 411, {"Content-Length": "0"}, iter(()), act, seen)

    @staticmethod
    def _form_key(seen: Seen) -> str:
        found = re.search(r'filename="([^"]*)"', seen.form()[-1][0])
        return found[1] if found else ""

    def _get(self, connection: socket.socket, path: str, seen: Seen, act: Act) -> None:
        thing = self.objects.get(path)
        if thing is None:
            body = b"<Error><Code>NoSuchKey</Code><Message>The specified key does not exist.</Message></Error>"
            self._reply(connection, 404, {"Content-Length": str(len(body))}, iter([body]), act, seen)
            return
        first, status = 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-", seen.header("range") or "")
        condition = seen.header("if-range")
        headers: dict[str, str | None] = {"ETag": thing.etag_header, "x-amz-request-id": "1", **thing.headers}
        if asked and not act.ignore_range and condition in {None, thing.etag_header}:
            first, status = int(asked[1]), 206
            headers["Content-Range"] = f"bytes {first}-{thing.size - 1}/{thing.size}"
            if first >= thing.size:
                headers = {"Content-Range": f"bytes */{thing.size}", "Content-Length": "0"}
                self._reply(connection, 416, headers | act.headers, iter(()), act, seen)
                return
        if act.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif not act.no_length:
            headers["Content-Length"] = str(thing.size - first)
        self._reply(connection, status, headers | act.headers, thing.blocks(first), act, seen)

    def _reply(
        self,
        connection: socket.socket,
        status: int,
        headers: dict[str, str | None],
        blocks: Iterator[bytes],
        act: Act,
        seen: Seen,
    ) -> None:
        lines = [f"HTTP/1.1 {status} Scripted"]
        lines += [f"{key}: {value}" for key, value in headers.items() if value is not None]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        if act.stall_headers:
            connection.sendall(head[:5])
            self._stall(connection)
        connection.sendall(head)
        if act.stall_body:
            connection.sendall(next(blocks)[:1])
            self._stall(connection)
        for block in blocks:
            piece = block
            if act.flip is not None and seen.sent <= act.flip < seen.sent + len(piece):
                at = act.flip - seen.sent
                piece = piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]
            if act.cut is not None:
                piece = piece[: act.cut - seen.sent]
            seen.sent += len(piece)  # first: the client may have it, and the test look, before this thread goes on
            try:
                connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if act.chunked else piece)
            except OSError:
                seen.sent -= len(piece)
                raise
            if len(piece) < len(block):
                raise _Reset if act.reset else OSError("cut, as scripted")
        if act.chunked:
            connection.sendall(b"0\r\n\r\n")

    @staticmethod
    def _stall(connection: socket.socket) -> None:
        """Say nothing more until the client has had enough."""
        connection.settimeout(30)
        connection.recv(1)
        raise OSError("the client left")
