"""One HTTP request on one libcurl handle: what goes out, what came back, and everything that is switched off.

Used by `wire` (makes them) and `multi` (runs them). A worker thread makes an exchange, hands it to the loop and waits
for `ended`; in between every method with a leading underscore runs in the loop's thread, so no lock is needed. An
exception in a callback never reaches libcurl: it is kept in `error` and the exchange is ended.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pycurl

#: Takes the body of a reply, piece by piece.
Sink = Callable[[bytes], None]

#: Of a reply that is not a file (an error, a redirect, an upload's answer) no more is read.
MAX_WORDS = 65_536

#: Of a reply's headers no more are kept; libcurl itself refuses more than 300 KiB of them.
_MAX_HEADERS, _MAX_HEADER = 100, 16_384

#: Larger reads mean fewer callbacks into Python: 512 KiB is the most that libcurl takes for the one, 2 MiB the other.
_READ_BUFFER, _SEND_BUFFER = 512 * 1024, 2 * 1024 * 1024

#: CURLOPT_SUPPRESS_CONNECT_HEADERS, which pycurl has no name for: what a proxy says about itself is no reply.
_SUPPRESS_CONNECT_HEADERS = 265


@dataclass(frozen=True, slots=True)
class NetSettings:
    """How patient a connection is and whom it trusts.

    An exchange slower than `slow_bytes_per_s` for `slow_for_s` seconds is ended; there is no total limit (DESIGN.md,
    rule 9). `connect_timeout_s` covers name, connection and TLS. `ca_file` replaces the system's certificates.
    `proxy` is used for everything; without it none is, whatever the environment says.
    """

    connect_timeout_s: float = 10.0
    slow_bytes_per_s: int = 1024
    slow_for_s: int = 60
    ca_file: Path | None = None
    proxy: str | None = None


@dataclass(slots=True)
class Reply:
    """What came back. Header names in lower case, the first of equal names; `words` is a body that was not sunk."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    words: bytes = b""


class Body(Protocol):
    """What is sent. `length` is exact: it becomes the Content-Length."""

    @property
    def length(self) -> int: ...

    def read(self, size: int) -> bytes: ...

    def rewind(self) -> None: ...


class _LentSocket(socket.socket):
    """A socket that libcurl gets a duplicate of (pycurl calls `dup`); ours closes as soon as pycurl drops it."""

    def __del__(self) -> None:
        self.close()


class Exchange:
    """One request and its reply. `origin` is scheme, host and port, `target` the path and query.

    `on_reply` is called in the loop's thread when the final headers are in, and returns where the body goes, or None
    to have its first 64 KiB kept as words. `check_address` raises for an address that must not be connected to.
    """

    def __init__(
        self,
        method: str,
        origin: str,
        target: str,
        headers: Sequence[str],
        *,
        check_address: Callable[[str], None],
        on_reply: Callable[[Reply], Sink | None] = lambda _: None,
        body: Body | None = None,
    ) -> None:
        self.ended = threading.Event()
        self.unwanted = False
        self.reply = Reply()
        self.error: BaseException | None = None
        self.code, self.failure = 0, ""
        self._method, self._origin, self._target = method, origin, target
        self._headers, self._body = headers, body
        self._check_address, self._on_reply = check_address, on_reply
        self._sink: Sink | None = None
        self._in_body = self._enough = False
        self._refused: Exception | None = None

    def prepare(self, curl: pycurl.Curl, net: NetSettings) -> None:
        """Set up a fresh or reset handle for this request."""
        _harden(curl, net)
        slow_for_s = net.slow_for_s
        curl.setopt(pycurl.URL, self._origin + self._target)
        if net.proxy is None:
            curl.setopt(pycurl.REQUEST_TARGET, self._target)  # else `%2f` becomes `%2F`, which may break a signature
        if self._body is not None:
            curl.setopt(pycurl.POST if self._method == "POST" else pycurl.UPLOAD, 1)
            size = pycurl.POSTFIELDSIZE_LARGE if self._method == "POST" else pycurl.INFILESIZE_LARGE
            curl.setopt(size, self._body.length)
            curl.setopt(pycurl.READFUNCTION, self._read)
            curl.setopt(pycurl.SEEKFUNCTION, self._seek)
            # A server that spools the body first may copy it before it answers, and is silent meanwhile: it gets one
            # second more for each 32 MiB, which makes 220 s for 5 GiB.
            slow_for_s += self._body.length >> 25
        curl.setopt(pycurl.LOW_SPEED_LIMIT, net.slow_bytes_per_s)
        curl.setopt(pycurl.LOW_SPEED_TIME, slow_for_s)
        # `Expect:` without a value keeps libcurl from asking first and waiting a second for an answer.
        curl.setopt(pycurl.HTTPHEADER, ["Accept-Encoding: identity", "Expect:", *self._headers])
        curl.setopt(pycurl.HEADERFUNCTION, self._header)
        curl.setopt(pycurl.WRITEFUNCTION, self._write)
        curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open_socket)

    def finish(self, code: int, failure: str) -> None:
        """The loop is done with it: libcurl's result and words. Wakes whoever waits."""
        if self._enough and code == pycurl.E_WRITE_ERROR:
            code, failure = 0, ""  # we ended it ourselves, having read as much as we wanted
        if code and not self.reply.status and self.error is None:
            self.error = self._refused
        self.code, self.failure = code, failure
        self.ended.set()

    def _header(self, line: bytes) -> int | None:
        try:
            self._take_header(line.decode("latin-1").rstrip("\r\n"))
        except BaseException as error:
            self.error = error
            return 0  # fewer bytes than given: libcurl ends the exchange
        return None

    def _take_header(self, line: str) -> None:
        if self._in_body:
            return  # trailers after a chunked body mean nothing to us
        if line.startswith("HTTP/"):
            self.reply = Reply(status=int(line.split(maxsplit=2)[1]))
        elif not line:
            if self.reply.status >= 200:  # 1xx replies come before the final one
                self._in_body = True
                self._sink = self._on_reply(self.reply)
        elif len(self.reply.headers) < _MAX_HEADERS and len(line) <= _MAX_HEADER:
            name, colon, value = line.partition(":")
            if colon:
                self.reply.headers.setdefault(name.strip().lower(), value.strip())

    def _write(self, data: bytes) -> int | None:
        try:
            if self._sink is not None:
                self._sink(data)
            else:
                room = MAX_WORDS - len(self.reply.words)
                self.reply.words += data[:room]
                if len(data) > room:
                    self._enough = True
                    return 0
        except BaseException as error:
            self.error = error
            return 0
        return None

    def _read(self, size: int) -> bytes | int:
        try:
            return b"" if self._body is None else self._body.read(size)
        except BaseException as error:
            self.error = error
            return pycurl.READFUNC_ABORT

    def _seek(self, offset: int, origin: int) -> int:
        """libcurl starts a body again when a kept-alive connection turns out to be dead."""
        if self._body is None or offset or origin:
            return pycurl.SEEKFUNC_CANTSEEK
        try:
            self._body.rewind()
        except BaseException as error:
            self.error = error
            return pycurl.SEEKFUNC_FAIL
        return pycurl.SEEKFUNC_OK

    def _open_socket(self, _purpose: int, address: pycurl.CurlSockAddr) -> socket.socket | int:
        """The one place where connections begin, with the address about to be connected to (FAULTS.md T7)."""
        try:
            if address.family not in {socket.AF_INET, socket.AF_INET6}:
                raise OSError("not an internet address")
            self._check_address(str(address.addr[0]))
            return _LentSocket(address.family, address.socktype, address.protocol)
        except Exception as error:
            self._refused = error  # kept apart: the host's next address may be allowed
            return pycurl.SOCKET_BAD


def _harden(curl: pycurl.Curl, net: NetSettings) -> None:
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
        (pycurl.PROXY, net.proxy or ""),
        (pycurl.NOPROXY, ""),
        (_SUPPRESS_CONNECT_HEADERS, 1),
        (pycurl.SSL_VERIFYPEER, 1),
        (pycurl.SSL_VERIFYHOST, 2),
        (pycurl.SSLVERSION, pycurl.SSLVERSION_TLSv1_2),
        (pycurl.CONNECTTIMEOUT_MS, max(1, int(net.connect_timeout_s * 1000))),
        (pycurl.TCP_KEEPALIVE, 1),
        (pycurl.BUFFERSIZE, _READ_BUFFER),
        (pycurl.UPLOAD_BUFFERSIZE, _SEND_BUFFER),
        (pycurl.USERAGENT, "jobfetcher"),
        *_trust(net.ca_file),
    ):
        curl.setopt(option, value)


def _trust(ca_file: Path | None) -> list[tuple[int, str]]:
    """The certificates to trust. A pycurl wheel may be built for another distribution's path, so it is always named."""
    if ca_file is not None:
        return [(pycurl.CAINFO, str(ca_file))]
    system = ssl.get_default_verify_paths()
    found = [(pycurl.CAINFO, system.cafile), (pycurl.CAPATH, system.capath)]
    return [(option, path) for option, path in found if path is not None]
