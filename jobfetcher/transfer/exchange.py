"""One HTTP request and its reply, and the libcurl handle that performs it, with everything that is switched off.

Used by `wire` (makes exchanges) and `multi` (runs them), in the loop's thread only. A handle is hardened once and then
stays warm: about thirty options cost more than the rest of a small file. It keeps one method for its life, and each
exchange sets all that may differ between two requests of that method (`Handle.load`), so nothing of one is left for
the next. An exception in a callback never reaches libcurl: it is kept in the exchange's `error`, which is then ended.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pycurl

from jobfetcher.core.hosts import NO_PROXIES, Proxies
from jobfetcher.core.text import clean
from jobfetcher.core.urls import parse_origin

if TYPE_CHECKING:
    from jobfetcher.transfer.limits import Bucket, Origin
    from jobfetcher.transfer.multi import TransferLoop
    from jobfetcher.transfer.story import Resume, Teller

#: Takes the next pieces of a reply's body, and their size in bytes; true when it has all it wants.
Sink = Callable[[list[bytes], int], bool]

#: Of a reply that is not a file (an error, a redirect, an upload's answer) no more is read.
MAX_WORDS = 65_536

#: Of a reply's headers no more are kept; libcurl itself refuses more than 300 KiB of them.
_MAX_HEADERS, _MAX_HEADER = 100, 16_384

#: Larger ones mean fewer calls, but what is handled again (written, encrypted) should still be in the core's own cache:
#: of 64 KiB to 2 MiB these are the fastest, by 3 to 10 % over http, and as fast as any over https. What one read brings
#: is what one write takes (`_GATHER`). A small file is spared the large buffer.
_READ_BUFFER, _SEND_BUFFER, _SMALL_SEND_BUFFER = 256 * 1024, 512 * 1024, 64 * 1024

#: libcurl hands a body over in pieces of 16 KiB (CURL_MAX_WRITE_SIZE). So much of them goes to the file at once, and
#: what there is at the end of each turn of the loop: one system call and one hand-over of the interpreter for 16.
_GATHER = 256 * 1024

#: A server may send tiny chunks, and one write takes 1,024 pieces (IOV_MAX).
_MOST_PIECES = 512

#: With a limit on bandwidth, an upload takes so much at once, so that many of them share it evenly.
_LIMITED_READ = 64 * 1024

#: How a head ends; some servers leave the carriage return out.
_BLANK = frozenset({b"\r\n", b"\n"})

#: CURLOPT_SUPPRESS_CONNECT_HEADERS, which pycurl has no name for: what a proxy says about itself is no reply.
_SUPPRESS_CONNECT_HEADERS = 265


@dataclass(frozen=True, slots=True)
class NetSettings:
    """How patient a connection is and whom it trusts.

    An exchange slower than `slow_bytes_per_s` for `slow_for_s` seconds is ended; there is no total limit (DESIGN.md,
    rule 9). `connect_timeout_s` covers name, connection and TLS. `ca_file` replaces the system's certificates, and so
    does `ca_pem`, which is the certificates themselves, where their file is not as libcurl reads it.
    `proxy`: one for everything, or which is for what; without it none is used, whatever the environment says.
    """

    connect_timeout_s: float = 10.0
    slow_bytes_per_s: int = 1024
    slow_for_s: int = 60
    ca_file: Path | None = None
    ca_pem: str | None = None
    proxy: str | Proxies | None = None

    @property
    def proxies(self) -> Proxies:
        """Which proxy is used for what."""
        if isinstance(self.proxy, Proxies):
            return self.proxy
        return NO_PROXIES if self.proxy is None else Proxies.everything_through(self.proxy)

    def proxy_for(self, origin: str) -> str | None:
        """The proxy for requests to an origin, written `scheme://host[:port]`; None: there is none for it."""
        return _chosen(self.proxies, origin)


@lru_cache(maxsize=256)
def _chosen(proxies: Proxies, origin: str) -> str | None:
    return proxies.choose(*parse_origin(origin))


@dataclass(slots=True)
class Reply:
    """What came back from `origin`. Header names in lower case, the first of equal names; `words` is a body that was
    not sunk."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    words: bytes = b""
    origin: str = ""


class Body(Protocol):
    """What is sent. `length` is exact: it becomes the Content-Length."""

    @property
    def length(self) -> int: ...

    def read(self, size: int) -> bytes: ...

    def rewind(self) -> None: ...


class Stale(Exception):
    """Raised by `on_start`: the request was signed too long ago, since it had to wait for a connection.

    It is to be signed anew; nothing has failed, and its turn is kept for a moment.
    """


class NotHttp(Exception):
    """A reply that cannot be read. The next one may be better: something between us and the store may have said it."""


class _LentSocket(socket.socket):
    """A socket that libcurl gets a duplicate of (pycurl calls `dup`); ours closes as soon as pycurl drops it."""

    def __del__(self) -> None:
        self.close()


class Exchange:
    """One request and its reply; a `story.Wait`. `origin` is scheme, host and port, `target` the path and query.

    `on_start` is called when a connection is free for it, and `on_reply` with the final headers, before the first byte
    of the body; that returns where the body goes, or None to have its first 64 KiB kept as words. Both may raise, which
    ends it with that `error`. An exchange that is cancelled before gets no `on_reply`.
    `check_address` raises for an address that must not be connected to.
    """

    __slots__ = (
        "_check_address",
        "_loop",
        "_on_reply",
        "_refused",
        "_sink",
        "age",
        "body",
        "code",
        "error",
        "failure",
        "handle",
        "has_enough",
        "headers",
        "in_body",
        "method",
        "on_start",
        "origin",
        "place",
        "reply",
        "resume",
        "since",
        "target",
    )

    def __init__(
        self,
        method: str,
        origin: str,
        target: str,
        headers: list[str],
        *,
        check_address: Callable[[str], None],
        on_start: Callable[[], None] | None = None,
        on_reply: Callable[[Exchange, Reply], Sink | None] | None = None,
        body: Body | None = None,
        since: float | None = None,
    ) -> None:
        self.method, self.origin, self.target, self.headers, self.body = method, origin, target, headers, body
        self.on_start = on_start
        self._check_address, self._on_reply = check_address, on_reply
        self.reply = Reply(origin=origin)
        self.error: BaseException | None = None
        self.code, self.failure = 0, ""
        self.age = 0
        self.handle: Handle | None = None
        #: Since when its file wants a connection: who came first is served first, also where it has to come again.
        self.since = time.monotonic() if since is None else since
        #: Where it waits for a connection, or has one.
        self.place: Origin | None = None
        self.resume: Resume | None = None
        self.in_body = self.has_enough = False
        self._loop: TransferLoop | None = None
        self._sink: Sink | None = None
        self._refused: Exception | None = None

    def begin(self, teller: Teller, resume: Resume) -> None:
        """Run it on the loop; the story goes on when it has ended, in whatever way."""
        self.resume = resume
        self._loop = teller.loop
        self._loop.start(self)

    def cancel(self) -> None:
        """End it; nobody waits any more."""
        self.resume = None
        if self._loop is not None:
            self._loop.abort(self, pycurl.E_ABORTED_BY_CALLBACK, "aborted")

    def finish(self, code: int, failure: str) -> None:
        """The loop is done with it: libcurl's result and words."""
        if self.has_enough and code in {pycurl.E_WRITE_ERROR, pycurl.E_ABORTED_BY_CALLBACK}:
            code, failure = 0, ""  # we ended it ourselves, having read as much as we wanted
        if code and not self.reply.status and self.error is None:
            self.error = self._refused
        self.code, self.failure = code, failure

    def wake(self) -> None:
        """Let the story go on."""
        if self.resume is not None:
            self.resume(self, None)

    def take_head(self, lines: list[bytes]) -> None:
        """All lines of the reply's head. Only the final one counts: 1xx replies come before it."""
        start, status = 0, _status(lines[0])
        while status < 200:
            start += next(number for number, line in enumerate(lines[start:], 1) if line in _BLANK)
            if start == len(lines):
                return
            status = _status(lines[start])
        self.reply.status = status
        headers = self.reply.headers
        for line in lines[start + 1 : start + _MAX_HEADERS]:
            if len(line) > _MAX_HEADER:
                continue
            name, value = _header(line)
            if name:
                headers.setdefault(name, value)
            elif line in _BLANK:
                break  # what follows an empty body, a chunked one's trailers, means nothing to us
        self.in_body = True
        if self._on_reply is not None:
            self._sink = self._on_reply(self, self.reply)

    def take_body(self, pieces: list[bytes], size: int) -> bool:
        """The next pieces of the body; true if no more is wanted."""
        if self._sink is not None:
            enough = self._sink(pieces, size)
        else:
            room = MAX_WORDS - len(self.reply.words)
            self.reply.words += b"".join(pieces)[:room]
            enough = size > room
        self.has_enough |= enough
        return enough

    def check_address(self, family: int, address: str) -> bool:
        """Whether this address may be connected to (FAULTS.md T7)."""
        try:
            if family not in {socket.AF_INET, socket.AF_INET6}:
                raise OSError("not an internet address")
            self._check_address(address)
        except Exception as error:
            self.refuse(error)
            return False
        return True

    def refuse(self, error: Exception) -> None:
        """There is no connection to this address; kept apart, since the host's next address may be allowed."""
        self._refused = error


class Handle:
    """A warm libcurl handle for requests of one method; `exchange` is the one it performs now.

    `proxy`: what all its requests go through. `limited`: what bounds its bandwidth. `on_bytes` is called when pieces of
    a body wait for `flush`, and `on_pause` when it stopped for want of tokens.
    """

    def __init__(
        self,
        method: str,
        net: NetSettings,
        *,
        proxy: str | None = None,
        limited: Bucket | None,
        on_bytes: Callable[[Handle], None],
        on_pause: Callable[[Handle], None],
    ) -> None:
        self.curl = pycurl.Curl()
        self.method, self.proxy = method, proxy
        self.exchange: Exchange | None = None
        self._net, self._bucket = net, limited
        self._on_bytes, self._on_pause = on_bytes, on_pause
        self._lines: list[bytes] = []
        self._pieces: list[bytes] = []
        self._size = 0
        self._headers: list[str] | None = None
        self._slow_for_s = self._send_buffer = 0
        curl = self.curl
        _harden(curl, net, proxy)
        # A method of C: it is called for each line, and a call into Python for each would be a tenth of a small file.
        curl.setopt(pycurl.HEADERFUNCTION, self._lines.append)
        curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open_socket)
        curl.setopt(pycurl.LOW_SPEED_LIMIT, net.slow_bytes_per_s)
        if method == "GET":
            curl.setopt(pycurl.HTTPGET, 1)
            curl.setopt(pycurl.WRITEFUNCTION, self._write if limited is None else self._write_limited)
        else:
            curl.setopt(pycurl.POST if method == "POST" else pycurl.UPLOAD, 1)
            curl.setopt(pycurl.WRITEFUNCTION, self._write)
            curl.setopt(pycurl.READFUNCTION, self._read)
            curl.setopt(pycurl.SEEKFUNCTION, self._seek)

    def load(self, exchange: Exchange) -> None:
        """Set all that differs between two requests of one method; raises pycurl.error for what libcurl refuses."""
        curl, net = self.curl, self._net
        self.exchange = exchange
        curl.setopt(pycurl.URL, exchange.origin + exchange.target)
        if self.proxy is None:
            curl.setopt(pycurl.REQUEST_TARGET, exchange.target)  # else `%2f` becomes `%2F`, and a signature may break
        if exchange.headers != self._headers:
            self._headers = None  # should libcurl refuse them
            # `Expect:` without a value keeps libcurl from asking first and waiting a second for an answer.
            curl.setopt(pycurl.HTTPHEADER, ["Accept-Encoding: identity", "Expect:", *exchange.headers])
            self._headers = exchange.headers
        slow_for_s = net.slow_for_s
        if exchange.body is not None:
            length = exchange.body.length
            curl.setopt(pycurl.POSTFIELDSIZE_LARGE if self.method == "POST" else pycurl.INFILESIZE_LARGE, length)
            send_buffer = _SEND_BUFFER if length > _SMALL_SEND_BUFFER else _SMALL_SEND_BUFFER
            if send_buffer != self._send_buffer:
                curl.setopt(pycurl.UPLOAD_BUFFERSIZE, send_buffer)
                self._send_buffer = send_buffer
            # A server that spools the body first may copy it before it answers, and is silent meanwhile: it gets one
            # second more for each 32 MiB, which makes 220 s for 5 GiB.
            slow_for_s += length >> 25
        if slow_for_s != self._slow_for_s:
            curl.setopt(pycurl.LOW_SPEED_TIME, slow_for_s)
            self._slow_for_s = slow_for_s

    def unload(self) -> None:
        """Forget the exchange and whatever it left."""
        self.exchange = None
        self._lines.clear()
        if self._size:
            self._pieces.clear()
            self._size = 0

    def take_head(self) -> bool:
        """Read the reply's head, if it is there and was not read; false if the exchange must be ended."""
        exchange, lines = self.exchange, self._lines
        if exchange is None or exchange.in_body or not lines or lines[-1] not in _BLANK:
            return True
        try:
            exchange.take_head(lines)
        except BaseException as error:
            exchange.error = error
            return False
        return True

    def flush(self) -> bool:
        """Hand the gathered pieces of the body on; false if the exchange must be ended."""
        exchange, size = self.exchange, self._size
        if exchange is None or not size:
            return True
        pieces, self._pieces, self._size = self._pieces, [], 0
        try:
            return not exchange.take_body(pieces, size)
        except BaseException as error:
            exchange.error = error
            return False

    def _write(self, data: bytes) -> int | None:
        if not self._size:
            if not self.take_head():
                return 0  # fewer bytes than given: libcurl ends the exchange
            self._on_bytes(self)
        self._pieces.append(data)
        self._size += len(data)
        if (self._size >= _GATHER or len(self._pieces) >= _MOST_PIECES) and not self.flush():
            return 0
        return None

    def _write_limited(self, data: bytes) -> int | None:
        if self._bucket is not None and not self._bucket.take(len(data)):
            self._on_pause(self)
            return pycurl.WRITEFUNC_PAUSE
        return self._write(data)

    def _read(self, size: int) -> bytes | int:
        exchange = self.exchange
        if exchange is None or exchange.body is None:
            return b""
        if self._bucket is not None:
            size = min(size, _LIMITED_READ)
            if not self._bucket.take(size):
                self._on_pause(self)
                return pycurl.READFUNC_PAUSE
        try:
            return exchange.body.read(size)
        except BaseException as error:
            exchange.error = error
            return pycurl.READFUNC_ABORT

    def _seek(self, offset: int, origin: int) -> int:
        """libcurl starts a body again when a kept-alive connection turns out to be dead."""
        exchange = self.exchange
        if exchange is None or exchange.body is None or offset or origin:
            return pycurl.SEEKFUNC_CANTSEEK
        try:
            exchange.body.rewind()
        except BaseException as error:
            exchange.error = error
            return pycurl.SEEKFUNC_FAIL
        return pycurl.SEEKFUNC_OK

    def _open_socket(self, _purpose: int, address: pycurl.CurlSockAddr) -> socket.socket | int:
        """The one place where connections begin, with the address about to be connected to (FAULTS.md T7)."""
        exchange = self.exchange
        if exchange is None or not exchange.check_address(address.family, str(address.addr[0])):
            return pycurl.SOCKET_BAD
        try:
            return _LentSocket(address.family, address.socktype, address.protocol)
        except OSError as error:
            exchange.refuse(error)
            return pycurl.SOCKET_BAD


@lru_cache(maxsize=16)
def _status(line: bytes) -> int:
    """Of a reply's first line, which libcurl reads less strictly (RFC 9112, 4). Raises NotHttp."""
    words = line.split(maxsplit=2)
    if len(words) < 2 or len(words[1]) != 3 or not words[1].isdigit():
        raise NotHttp(f"the storage answers {clean(line.decode('latin-1'), 60)}, which is no HTTP")
    return int(words[1])


@lru_cache(maxsize=64)  # of lines of 16 KiB, should somebody send such, that is 2 MiB
def _header(line: bytes) -> tuple[str, str]:
    """Name, in lower case, and value; no name where the line has none. Most lines of a store's replies are the same
    each time: to know them again costs a fifth of reading them."""
    name, colon, value = line.decode("latin-1").partition(":")
    return (name.strip().lower(), value.strip()) if colon else ("", "")


def _harden(curl: pycurl.Curl, net: NetSettings, proxy: str | None) -> None:
    """What every request has in common; nothing of it can be changed by a server."""
    for option, value in (
        (pycurl.NOSIGNAL, 1),
        (pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS),
        (pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1),  # one transfer a connection: each gets its own window
        (pycurl.HTTP09_ALLOWED, 0),
        (pycurl.PATH_AS_IS, 1),  # a signature covers the path as it is, `..` and all
        (pycurl.FOLLOWLOCATION, 0),
        (pycurl.HTTP_CONTENT_DECODING, 0),
        (pycurl.NETRC, pycurl.NETRC_IGNORED),
        (pycurl.PROXY, proxy or ""),
        (pycurl.NOPROXY, ""),
        (_SUPPRESS_CONNECT_HEADERS, 1),
        (pycurl.SSL_VERIFYPEER, 1),
        (pycurl.SSL_VERIFYHOST, 2),
        (pycurl.SSLVERSION, pycurl.SSLVERSION_TLSv1_2),
        (pycurl.CONNECTTIMEOUT_MS, max(1, int(net.connect_timeout_s * 1000))),
        (pycurl.TCP_KEEPALIVE, 1),
        (pycurl.BUFFERSIZE, _READ_BUFFER),
        (pycurl.USERAGENT, "jobfetcher"),
        *_trust(net),
    ):
        curl.setopt(option, value)


def _trust(net: NetSettings) -> list[tuple[int, str]]:
    """The certificates to trust. A pycurl wheel may be built for another distribution's path, so it is always named."""
    if net.ca_pem is not None:
        return [(pycurl.CAINFO_BLOB, net.ca_pem)]
    if net.ca_file is not None:
        return [(pycurl.CAINFO, str(net.ca_file))]
    system = ssl.get_default_verify_paths()
    found = [(pycurl.CAINFO, system.cafile), (pycurl.CAPATH, system.capath)]
    return [(option, path) for option, path in found if path is not None]
