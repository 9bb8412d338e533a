"""An httpx transport with a total deadline.

httpx and httpcore time out single reads: a server that sends one byte every few seconds holds a call for ever
(FAULTS.md B14, J7). Here every network operation of a call is given what is left of the call's own time, so the whole
call ends on time. Name resolution is the operating system's and has its own limits.
"""

from __future__ import annotations

import email.utils
import socket
import ssl
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import httpcore
import httpx

from jobfetcher.core.addresses import OwnHost
from jobfetcher.core.errors import ConfigError
from jobfetcher.core.hosts import NO_PROXIES, Proxies

#: What httpcore raises; it has no root class of its own.
TRANSPORT_ERRORS = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
    httpx.HTTPError,
    httpx.InvalidURL,
    httpx.StreamError,
)

#: Errors that certainly came before the first byte of the request was sent.
NOT_SENT = (
    httpcore.ConnectError,
    httpcore.ConnectTimeout,
    httpcore.PoolTimeout,
    httpcore.ProxyError,  # the proxy would not open the tunnel that the request was to go through
    httpcore.UnsupportedProtocol,
)

#: A connection that we close is gone with all that it still held. Else the kernel goes on delivering the request of a
#: call that was given up, or of a process that was killed, for minutes: a heartbeat sent into a network that is down
#: would arrive after the job's end and open it again (PROTOCOL.md S6).
_NO_LINGER = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

#: X509_V_FLAG_NO_CHECK_TIME: all of a certificate is verified but the time. Python has no name for it.
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)

#: The question what time it is has so long at most, in seconds.
_ASK_TIME_S = 5.0

#: End of the current call on time.monotonic(), per thread (a call runs in the thread that makes it).
_ends_at: ContextVar[float | None] = ContextVar("ends_at", default=None)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Every network operation inside fails with a time-out once `seconds` are over in all."""
    mark = _ends_at.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _ends_at.reset(mark)


def _left(timeout: float | None, error: type[httpcore.TimeoutException]) -> float | None:
    ends_at = _ends_at.get()
    if ends_at is None:
        return timeout
    left = ends_at - time.monotonic()
    if left <= 0:
        raise error("the call's total time is over")
    return left if timeout is None else min(timeout, left)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, _left(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, _left(timeout, httpcore.ConnectTimeout)))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Backend(httpcore.SyncBackend):
    """`own`: a host that is connected to only where its addresses are of the kind they were at first."""

    def __init__(self, own: OwnHost | None) -> None:
        self._own = own

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        options = [*(socket_options or ()), _NO_LINGER]
        is_own = self._own is not None and host.lower().rstrip(".") == self._own.host
        addresses = self._where(self._own) if self._own is not None and is_own else [host]
        for address in addresses[:-1]:  # as `socket.create_connection` would
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                left = _left(timeout, httpcore.ConnectTimeout)
                return _Stream(super().connect_tcp(address, port, left, local_address, options))
        left = _left(timeout, httpcore.ConnectTimeout)
        return _Stream(super().connect_tcp(addresses[-1], port, left, local_address, options))

    def _where(self, own: OwnHost) -> list[str]:
        try:
            if addresses := own.resolve():
                return addresses
        except (OSError, ValueError) as error:
            raise httpcore.ConnectError(str(error)) from error
        raise httpcore.ConnectError(f"{own.host} has no address")


class _Body(httpx.SyncByteStream):
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __iter__(self) -> Iterator[bytes]:
        yield from self._inner

    def close(self) -> None:
        self._inner.close()


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy: `name` is host and port, for people; its URL, and its user and password if it has some."""

    name: str
    url: str
    login: tuple[bytes, bytes] | None = field(repr=False)

    @classmethod
    def parse(cls, address: str) -> Self:
        """`http://[USER:PASSWORD@]HOST:PORT`, or https; user and password percent-encoded. Raises ConfigError."""
        try:
            parts = urlsplit(address)
            port = parts.port
            if parts.scheme not in {"http", "https"} or not parts.hostname or port is None:
                raise ValueError
        except ValueError:  # its words may have the password in them
            raise ConfigError("PROXY must be an address with a port, such as http://proxy.example.org:3128") from None
        name = f"[{parts.hostname}]:{port}" if ":" in parts.hostname else f"{parts.hostname}:{port}"
        login = None
        if parts.username is not None:
            login = (unquote(parts.username).encode(), unquote(parts.password or "").encode())
        return cls(name, f"{parts.scheme}://{name}", login)


class DeadlineTransport(httpx.BaseTransport):
    """Kept-alive HTTP/1.1 connections whose every operation respects `deadline`. Thread-safe.

    `proxies` says which call goes through which proxy. Through one, an https call is a tunnel (CONNECT), so that the
    proxy sees host and port; an http call is not. `ca_file`, or `ca_pem` as text, replaces the system's certificates.
    """

    def __init__(
        self,
        *,
        ca_file: str | None = None,
        ca_pem: str | None = None,
        proxies: Proxies = NO_PROXIES,
        own: OwnHost | None = None,
    ) -> None:
        self._ca = (ca_file, ca_pem)
        self._own = own
        self._proxies = proxies
        context = tls(*self._ca)
        self._pools: dict[str | None, httpcore.ConnectionPool] = {
            proxy: _pool(None if proxy is None else Proxy.parse(proxy), context, context, own)
            for proxy in (None, *proxies.addresses)
        }

    def proxy_for(self, url: httpx.URL) -> str | None:
        """The proxy that a call goes through; None: there is none for it."""
        scheme = url.scheme
        return self._proxies.choose(scheme, url.host, url.port or (443 if scheme == "https" else 80))

    def server_time(self, url: httpx.URL) -> float | None:
        """What the server says the time is, in seconds since 1970, where its certificate is good but for the time;
        None where that cannot be found out. Nothing is sent but a HEAD of `/`."""
        context = tls(*self._ca)
        context.verify_flags |= _NO_CHECK_TIME
        proxy = self.proxy_for(url)
        with _pool(None if proxy is None else Proxy.parse(proxy), context, tls(*self._ca), self._own) as pool:
            target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=b"/")
            headers = [(b"Host", url.netloc), (b"User-Agent", b"jobfetcher"), (b"Connection", b"close")]
            times = {"timeout": httpx.Timeout(_ASK_TIME_S).as_dict()}
            try:
                with pool.stream("HEAD", target, headers=headers, extensions=times) as response:
                    dates = [value for name, value in response.headers if name.lower() == b"date"]
            except TRANSPORT_ERRORS:
                return None
        try:
            return email.utils.parsedate_to_datetime(dates[0].decode("latin-1")).timestamp()
        except (IndexError, ValueError, TypeError, OverflowError):
            return None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._pools[self.proxy_for(request.url)].handle_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(
                    scheme=request.url.raw_scheme,
                    host=request.url.raw_host,
                    port=request.url.port,
                    target=request.url.raw_path,
                ),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx.Response(
            response.status, headers=response.headers, stream=_Body(response.stream), extensions=response.extensions
        )

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def _pool(
    proxy: Proxy | None, context: ssl.SSLContext, to_proxy: ssl.SSLContext, own: OwnHost | None
) -> httpcore.ConnectionPool:
    options: dict[str, Any] = {
        "ssl_context": context,
        # One for each thread that asks, and their number is bounded by the settings: with a bound here, signatures
        # that hang would keep the keep-alives of all jobs waiting (FAULTS.md B13).
        "max_connections": None,
        "max_keepalive_connections": 16,
        "keepalive_expiry": 60.0,
        "network_backend": _Backend(own if proxy is None else None),
    }
    if proxy is None:
        return httpcore.ConnectionPool(**options)
    return httpcore.HTTPProxy(
        proxy.url, proxy.login, proxy_ssl_context=to_proxy if proxy.url.startswith("https") else None, **options
    )


def tls(ca_file: str | None, ca_pem: str | None) -> ssl.SSLContext:
    """TLS 1.2 or later, trusting these certificates, or the system's where there are none."""
    data = None if ca_pem is None else ca_pem.encode("ascii", errors="replace").decode()
    context = ssl.create_default_context(cafile=ca_file, cadata=data)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
