"""HTTP/1.1 as the broker speaks it: strict with its clients, plain with the engine. Used by `rules` and `server`.

Promises: a request is read whole before anybody acts on it, within limits of size and time; what can be read in two
ways is refused (two lengths, a length beside chunks, a header twice, a line end that is none, a path that is encoded or
goes up), so that nothing can be smuggled past a check; a client's bytes are never passed on, for the request that goes
to the engine is written anew from what was read.
"""

from __future__ import annotations

import http.client
import json
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode

#: Longest head of a request, in bytes: credentials for a registry are the longest part of it.
_HEAD_MAX = 32 * 1024

#: Longest body, in bytes: a job's environment and command, each string of which may have 128 KiB.
BODY_MAX = 4 * 1024 * 1024

#: Longest answer of the engine that is held, in bytes.
ANSWER_MAX = 16 * 1024 * 1024

#: A request that has begun must be there within this time, and an answer be taken, in seconds.
_TRANSFER_S = 30.0

#: A connection on which nobody asks anything is closed after this time, in seconds.
_IDLE_S = 600.0

_LINE = re.compile(rb"(GET|HEAD|POST|DELETE|PUT|PATCH|OPTIONS) (\S+) HTTP/1\.1")
_HEADER = re.compile(rb"([A-Za-z0-9-]{1,64}):[ \t]*([\x20-\x7e]*?)[ \t]*")

#: The path of every request that a worker makes: nothing in it needs an encoding.
_PATH = re.compile(r"(?:/[A-Za-z0-9_][A-Za-z0-9_.:@-]*)+")

#: Headers that a client may send. Of these only the credentials for a registry go further.
_KNOWN_HEADERS = frozenset(
    {
        "accept",
        "accept-encoding",
        "connection",
        "content-length",
        "content-type",
        "host",
        "user-agent",
        "x-registry-auth",
    }
)


class Refusal(Exception):
    """The broker answers for itself: an HTTP status, and one sentence that names the rule.

    `is_attempt`: a request that no worker of ours makes, which is logged. `closes`: nothing more is read of the client.
    """

    def __init__(self, status: int, sentence: str, *, is_attempt: bool = True, closes: bool = False) -> None:
        super().__init__(sentence)
        self.status = status
        self.is_attempt = is_attempt
        self.closes = closes


class Gone(Exception):
    """The other side has closed the connection, or takes nothing any more."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request, read and checked as to its form. `query` has each name once."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True)
class Reply:
    """What a client gets. `pieces` None: `body` is all of it; else they are passed as they come.

    `bodiless`: the answer to HEAD, which has a length and no body.
    """

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: Iterator[bytes] | None = None
    bodiless: bool = False


def refusal_reply(status: int, sentence: str) -> Reply:
    """An answer of the broker's own, in the form in which an engine complains."""
    return json_reply(status, {"message": sentence})


def json_reply(status: int, value: object) -> Reply:
    """An answer that is JSON."""
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


class Peer:
    """One side of a connection: bytes in, by lines and counts, with a deadline; bytes out.

    `waits_for`: the socket of whoever waits for what is received here; when that one hangs up, nobody does any more.
    """

    def __init__(self, sock: socket.socket, timeout_s: float, waits_for: socket.socket | None = None) -> None:
        self.sock = sock
        self._waits_for = waits_for
        self.sock.settimeout(timeout_s)
        self._buffer = b""

    def close(self) -> None:
        """Close it."""
        self.sock.close()

    @property
    def user(self) -> str:
        """Whose process is on the other side of a unix socket, as the kernel says (unix(7), SO_PEERCRED): `uid:gid`."""
        size = struct.calcsize("3i")
        _, uid, gid = struct.unpack("3i", self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        return f"{uid}:{gid}"

    @property
    def has_more(self) -> bool:
        """Whether something was read already that nobody has asked for."""
        return bool(self._buffer)

    def send(self, content: bytes) -> None:
        """Raises Gone."""
        try:
            self.sock.sendall(content)
        except OSError as error:
            raise Gone(str(error)) from error

    def receive(self) -> bytes:
        """What is there, at least a byte; nothing at its end. Raises Gone."""
        if self._buffer:
            found, self._buffer = self._buffer, b""
            return found
        if self._waits_for is not None:
            poll = select.poll()
            poll.register(self.sock, select.POLLIN)
            poll.register(self._waits_for, select.POLLIN)
            if self.sock.fileno() not in {number for number, _ in poll.poll()}:
                # Or it asks for more before it has its answer, which no worker does.
                raise Gone("the client hung up")
        try:
            return self.sock.recv(64 * 1024)
        except OSError as error:
            raise Gone(str(error) or type(error).__name__) from error

    def unread(self, content: bytes) -> None:
        """Put back what belongs to what comes next."""
        self._buffer = content + self._buffer

    def head(self, deadline: float | None = None) -> bytes | None:
        """Everything up to the empty line; None where the other side closed before it began. Raises Gone, Refusal."""
        found = b""
        while b"\r\n\r\n" not in found:
            if len(found) > _HEAD_MAX:
                raise Refusal(431, f"the head of a request has at most {_HEAD_MAX} bytes", closes=True)
            if deadline is not None and time.monotonic() > deadline:
                raise Gone("the head of a request took too long")
            piece = self.receive()
            if not piece:
                if not found:
                    return None
                raise Gone("it ended within a head")
            found += piece
        head, _, rest = found.partition(b"\r\n\r\n")
        if len(head) > _HEAD_MAX:
            raise Refusal(431, f"the head of a request has at most {_HEAD_MAX} bytes", closes=True)
        self.unread(rest)
        return head

    def exactly(self, count: int, deadline: float | None = None) -> bytes:
        """So many bytes. Raises Gone."""
        found = bytearray()
        while len(found) < count:
            if deadline is not None and time.monotonic() > deadline:
                raise Gone("the body of a request took too long")
            piece = self.receive()
            if not piece:
                raise Gone("it ended within a body")
            found += piece
        self.unread(bytes(found[count:]))
        return bytes(found[:count])


def wait_for_request(client: Peer, engine: Peer | None) -> bool:
    """Wait until the client asks for something. False: it has closed, was idle for too long, or the engine's side of
    this connection ended, which the client must see: all its answers come from one engine process (`engine.vouch`)."""
    if client.has_more:
        return True
    poll = select.poll()
    poll.register(client.sock, select.POLLIN)
    if engine is not None:
        poll.register(engine.sock, select.POLLIN)
    found = poll.poll(_IDLE_S * 1000)
    return [descriptor for descriptor, _ in found] == [client.sock.fileno()]


def read_request(client: Peer) -> Request | None:
    """The next request of a client, whole; None where it has closed. Raises Gone, and Refusal for what is none."""
    deadline = time.monotonic() + _TRANSFER_S
    head = client.head(deadline)
    if head is None:
        return None
    first, *lines = head.split(b"\r\n")
    found = _LINE.fullmatch(first)
    if found is None:
        raise Refusal(400, "a request begins with a method, a path and HTTP/1.1", closes=True)
    headers = _headers(lines)
    if "upgrade" in headers.get("connection", "").lower():
        raise Refusal(403, "a connection is never taken over (upgrade, hijack)", closes=True)
    length = headers.get("content-length", "0")
    if not re.fullmatch(r"\d{1,9}", length):
        raise Refusal(400, "Content-Length is one number", closes=True)
    if int(length) > BODY_MAX:
        raise Refusal(413, f"the body of a request has at most {BODY_MAX} bytes", closes=True)
    # Read before anything of it is judged: what follows is the next request.
    body = client.exactly(int(length), deadline)
    path, query = _target(found[2])
    return Request(found[1].decode(), path, query, headers, body)


def _headers(lines: list[bytes]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        found = _HEADER.fullmatch(line)
        if found is None:
            raise Refusal(400, "a header is a name, a colon and printable characters, in one line", closes=True)
        name = found[1].decode().lower()
        if name in headers:
            raise Refusal(400, f"the header {name} stands twice", closes=True)
        if name not in _KNOWN_HEADERS:
            raise Refusal(403, f"the header {name} is none that a worker sends", closes=True)
        headers[name] = found[2].decode()
    return headers


def _target(written: bytes) -> tuple[str, dict[str, str]]:
    text = written.decode("ascii", errors="replace")
    path, mark, query = text.partition("?")
    if not _PATH.fullmatch(path) or ".." in path:
        raise Refusal(403, "a path is plain: it begins with /, nothing in it is encoded or empty, and none goes up")
    if not mark or not query:  # a question mark with nothing behind it, as a client may write
        return path, {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=20)
    except ValueError:
        raise Refusal(400, "a query is made of NAME=VALUE in UTF-8") from None
    if len(pairs) != len(dict(pairs)):
        raise Refusal(400, "a parameter stands twice")
    return path, dict(pairs)


def write_reply(client: Peer, reply: Reply) -> None:
    """Answer. Raises Gone, also in the middle: then the client sees that the answer is not whole."""
    lines = [f"HTTP/1.1 {reply.status} {http.client.responses.get(reply.status, 'Said')}"]
    lines += [f"{name}: {value}" for name, value in reply.headers.items()]
    if reply.pieces is None:
        if reply.status != http.client.NO_CONTENT and not (reply.bodiless and "Content-Length" in reply.headers):
            lines.append(f"Content-Length: {len(reply.body)}")
        client.send("\r\n".join([*lines, "", ""]).encode() + (b"" if reply.bodiless else reply.body))
        return
    lines.append("Transfer-Encoding: chunked")
    client.send("\r\n".join([*lines, "", ""]).encode())
    for piece in reply.pieces:
        client.send(b"%x\r\n%b\r\n" % (len(piece), piece))
    client.send(b"0\r\n\r\n")


@dataclass(slots=True)
class Answer:
    """An engine's answer whose body is not read yet."""

    status: int
    headers: Mapping[str, str]
    decode: Callable[[bytes], tuple[bytes, bool]]
    is_over: bool


class Engine:
    """One connection to the engine, for one client: made with the first question and never made again.

    The engine may be silent for as long as the client waits: how long that is, is the client's to say.
    """

    def __init__(self, sock: socket.socket, timeout_s: float, client: Peer) -> None:
        self.peer = Peer(sock, timeout_s, client.sock)

    def close(self) -> None:
        """Close it."""
        self.peer.close()

    def ask(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: bytes | None = None, **headers: str
    ) -> Answer:
        """Send one request and read the head of its answer. `headers`: with `_` for `-`. Raises Gone."""
        target = path + (f"?{urlencode(query)}" if query else "")
        lines = [f"{method} {target} HTTP/1.1", "Host: localhost"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if body is not None or method == "POST":
            lines.append(f"Content-Length: {len(body or b'')}")
        self.peer.send("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        while True:
            try:
                head = self.peer.head()
            except Refusal as error:
                raise Gone(str(error)) from error
            if head is None:
                raise Gone("the engine closed the connection")
            answer = _answer(head, method)
            if answer.status >= 200:
                return answer

    def whole(self, answer: Answer) -> bytes:
        """The rest of an answer. Raises Gone, also for one that is too long to be held."""
        found = bytearray()
        while not answer.is_over:
            found += self._piece(answer)
            if len(found) > ANSWER_MAX:
                raise Gone(f"the engine's answer has more than {ANSWER_MAX} bytes")
        return bytes(found)

    def pieces(self, answer: Answer) -> Iterator[bytes]:
        """The rest of an answer, as it comes. Raises Gone."""
        while not answer.is_over:
            if piece := self._piece(answer):
                yield piece

    def _piece(self, answer: Answer) -> bytes:
        content = self.peer.receive()
        if not content and not answer.headers.get("_until_close"):
            raise Gone("the engine's answer ended early")
        decoded, answer.is_over = answer.decode(content)
        return decoded


def _answer(head: bytes, method: str) -> Answer:
    first, *lines = head.decode("latin-1").split("\r\n")
    found = re.match(r"HTTP/1\.[01] (\d{3})", first)
    if found is None:
        raise Gone("the engine does not speak HTTP")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status = int(found[1])
    length = headers.get("content-length", "")
    if method == "HEAD" or status < 200 or status in {204, 304}:
        return Answer(status, headers, _nothing, is_over=True)
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return Answer(status, headers, Chunks().feed, is_over=False)
    if length.isdecimal():
        return Answer(status, headers, _Counted(int(length)).feed, is_over=length == "0")
    return Answer(status, {**headers, "_until_close": "yes"}, lambda content: (content, not content), is_over=False)


def _nothing(content: bytes) -> tuple[bytes, bool]:
    raise Gone(f"the engine said {len(content)} bytes too many")


class _Counted:
    """A body with a length."""

    def __init__(self, left: int) -> None:
        self._left = left

    def feed(self, content: bytes) -> tuple[bytes, bool]:
        if len(content) > self._left:
            raise Gone("the engine's answer is longer than it says")
        self._left -= len(content)
        return content, self._left == 0


class Chunks:
    """A body in chunks (RFC 9112, section 7.1), whatever pieces it comes in."""

    def __init__(self) -> None:
        self._raw = b""
        self._left = 0  # of the chunk that has begun, its line end included
        self._in_trailer = False

    def feed(self, content: bytes) -> tuple[bytes, bool]:
        """What of the body these bytes bring, and whether it is over. Raises Gone for what is no chunk."""
        self._raw += content
        found = bytearray()
        while True:
            if self._left:
                piece = self._raw[: self._left]
                self._raw = self._raw[len(piece) :]
                data = max(0, min(len(piece), self._left - 2))
                found += piece[:data]
                self._left -= len(piece)
                if self._left:
                    return bytes(found), False
            line, end, rest = self._raw.partition(b"\r\n")
            if not end:
                if len(line) > 1000:
                    raise Gone("the engine sends no chunks")
                return bytes(found), False
            self._raw = rest
            if self._in_trailer:
                if not line:
                    return bytes(found), True
                continue
            size = line.partition(b";")[0].strip()
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", size):
                raise Gone("the engine sends no chunks")
            if int(size, 16) == 0:
                self._in_trailer = True
            else:
                self._left = int(size, 16) + 2


def strict_json(content: bytes) -> Any:
    """JSON in which no name stands twice and no number is none. Raises Refusal."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice")
        return found

    def none(text: str) -> Any:
        raise ValueError(f"{text} is no number")

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=once, parse_constant=none)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not plain JSON: {str(error)[:100]}") from None
