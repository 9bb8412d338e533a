"""A forward HTTP proxy on loopback, as small as one can be: CONNECT tunnels, and plain requests in absolute form.

It records what it was asked, head by head, and can want a login, refuse, or say nothing at all.
"""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_TIMEOUT_S = 30.0


@dataclass
class HttpProxy:
    """`login` is `user:password` or None; `status`, if set, is its answer to everything; `silent`: it never answers."""

    port: int
    login: str | None = None
    status: int | None = None
    silent: bool = False
    heads: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """Its address, without a login."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def asked(self) -> list[str]:
        """The request lines so far, without the HTTP version."""
        return [head.partition(" HTTP/")[0] for head in self.heads]


@contextmanager
def running_http_proxy(login: str | None = None) -> Iterator[HttpProxy]:
    """A proxy for the length of the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = HttpProxy(listener.getsockname()[1], login)
        threads: list[threading.Thread] = []

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                if proxy.closing.is_set():
                    connection.close()
                    return
                thread = threading.Thread(target=_handle, args=(connection, proxy))
                threads.append(thread)
                thread.start()

        server = threading.Thread(target=serve)
        server.start()
        try:
            yield proxy
        finally:
            proxy.closing.set()
            socket.create_connection(listener.getsockname(), timeout=5).close()
            server.join()
            for thread in threads:
                thread.join()


def _handle(client: socket.socket, proxy: HttpProxy) -> None:
    with client, contextlib.suppress(OSError):
        client.settimeout(_TIMEOUT_S)
        head, rest = _read_head(client)
        proxy.heads.append(head)
        if proxy.silent:
            proxy.closing.wait(_TIMEOUT_S)
            return
        status = proxy.status or (None if _is_admitted(head, proxy.login) else 407)
        if status is not None:
            client.sendall(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)
            return
        method, target, _ = head.split("\r\n")[0].split(" ")
        parts = urlsplit(f"//{target}" if method == "CONNECT" else target)
        with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=_TIMEOUT_S) as server:
            if method == "CONNECT":
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                _tunnel(client, server)
            else:
                origin_form = parts._replace(scheme="", netloc="").geturl() or "/"
                _forward(client, server, head.replace(target, origin_form, 1), rest)


def _read_head(connection: socket.socket) -> tuple[str, bytes]:
    """Start line and headers, and what came with them of the body."""
    received = b""
    while b"\r\n\r\n" not in received:
        more = connection.recv(65_536)
        if not more:
            raise OSError("it left")
        received += more
    head, _, rest = received.partition(b"\r\n\r\n")
    return head.decode("latin-1"), rest


def _forward(client: socket.socket, server: socket.socket, head: str, rest: bytes) -> None:
    """One request and its answer; each connection carries one."""
    start, *headers = head.split("\r\n")
    kept = [line for line in headers if not line.lower().startswith(("proxy-", "connection:"))]
    server.sendall("\r\n".join([start, "Connection: close", *kept, "", ""]).encode("latin-1") + rest)
    length = next((int(line.split(":")[1]) for line in kept if line.lower().startswith("content-length:")), 0)
    left = length - len(rest)
    while left > 0 and (data := client.recv(65_536)):
        server.sendall(data)
        left -= len(data)
    answer, body = _read_head(server)
    start, *headers = answer.split("\r\n")
    kept = [line for line in headers if not line.lower().startswith("connection:")]
    client.sendall("\r\n".join([start, "Connection: close", *kept, "", ""]).encode("latin-1") + body)
    while data := server.recv(65_536):
        client.sendall(data)


def _is_admitted(head: str, login: str | None) -> bool:
    """RFC 9110, 11.7.2, and RFC 7617: the name of the header and of the scheme in any case, the rest as it is."""
    if login is None:
        return True
    wanted = base64.b64encode(login.encode()).decode()
    values = (line.partition(":") for line in head.split("\r\n"))
    given = [value.split() for name, _, value in values if name.lower() == "proxy-authorization"]
    return any(scheme.lower() == "basic" and word == wanted for scheme, word in given)


def _tunnel(one: socket.socket, other: socket.socket) -> None:
    """Bytes both ways until either side has ended."""
    back = threading.Thread(target=_copy, args=(other, one))
    back.start()
    _copy(one, other)
    back.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
