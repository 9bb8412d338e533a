"""One signed request over the loop: redirects followed by hand, addresses checked, failures in our words.

Used by `download` and `upload`. What goes out is what the `SignedRequest` says and nothing of the machine's or the
worker's own: no token, no cookie, no netrc (FAULTS.md T8).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from urllib.parse import urljoin

import pycurl

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.text import clean
from jobfetcher.core.urls import Method, Origin, SignedRequest, UrlPolicy
from jobfetcher.transfer.exchange import Body, Exchange, NotHttp, Reply, Sink
from jobfetcher.transfer.guard import AddressGuard
from jobfetcher.transfer.patience import TryAgain
from jobfetcher.transfer.story import Aside, Tale

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_HOPS = 3
_DEFAULT_PORTS = {"http": 80, "https": 443}

#: So many authorities are remembered as checked.
_MOST_ORIGINS = 256

#: Trying again would not help: the certificate, the CA file or the URL stays what it is.
_HOPELESS = frozenset(
    {
        pycurl.E_PEER_FAILED_VERIFICATION,
        pycurl.E_SSL_CACERT_BADFILE,
        pycurl.E_URL_MALFORMAT,
        pycurl.E_UNSUPPORTED_PROTOCOL,
    }
)

_AUTHORITY = re.compile(r"[a-z]+://[^/?#]*", re.IGNORECASE)


class Wire:
    """Requests that follow the policy. Raises TryAgain for what may pass, WorkerFault or JobFault for what does not."""

    def __init__(self, policy: UrlPolicy, guard: AddressGuard, *, proxied: bool) -> None:
        self._policy, self._guard, self._proxied = policy, guard, proxied
        self._origins: dict[str, tuple[Origin, str]] = {}

    def get(
        self,
        request: SignedRequest,
        extra: Sequence[str],
        on_reply: Callable[[Exchange, Reply], Sink | None],
        on_start: Callable[[], None] | None = None,
        since: float | None = None,
    ) -> Tale[Reply]:
        """Fetch. At most three redirects, each one checked like the first URL; `extra` headers are ours and go along,
        those of `request` do not. `on_start` is called when there is a connection for it, and may raise; it
        waits for one as if `since` then."""
        url, headers = request.url, _lines(request)
        for _ in range(_MAX_HOPS + 1):
            exchange = yield from self._ask(
                "GET", url, [*headers, *extra], on_reply=on_reply, on_start=on_start, since=since
            )
            reply = exchange.reply
            if reply.status not in _REDIRECTS:
                return reply
            url, headers = self._next(url, reply), []
        raise WorkerFault(WorkerReason.STORAGE, f"the storage redirects more than {_MAX_HOPS} times")

    def send(
        self,
        request: SignedRequest,
        body: Body,
        content_type: str | None,
        on_start: Callable[[], None],
        since: float | None = None,
    ) -> Tale[Reply]:
        """Send `body` by PUT or POST; a redirect is refused, the file would go where nobody signed for. `on_start` and
        `since`: see `get`."""
        headers = _lines(request)
        if content_type is not None:
            headers = [line for line in headers if not line.lower().startswith("content-type:")]
            headers.append(f"Content-Type: {content_type}")
        method = "POST" if request.method is Method.POST else "PUT"
        exchange = yield from self._ask(method, request.url, headers, body=body, on_start=on_start, since=since)
        if exchange.reply.status in _REDIRECTS:
            raise WorkerFault(WorkerReason.STORAGE, "the storage redirects an upload, which is never followed")
        return exchange.reply

    def _ask(
        self,
        method: str,
        url: str,
        headers: list[str],
        *,
        on_reply: Callable[[Exchange, Reply], Sink | None] | None = None,
        body: Body | None = None,
        on_start: Callable[[], None] | None = None,
        since: float | None = None,
    ) -> Tale[Exchange]:
        origin, base, target = self._checked(url)
        if not self._guard.knows:
            yield Aside(self._guard.learn)
        if self._proxied:
            yield Aside(partial(self._guard.check_name, origin.host))

        def check_address(address: str) -> None:
            if not self._proxied:  # else it is the proxy's, which the machine's owner named
                self._guard.check(origin.host, address)

        exchange = Exchange(
            method,
            base,
            target,
            headers,
            check_address=check_address,
            on_start=on_start,
            on_reply=on_reply,
            body=body,
            since=since,
        )
        yield exchange
        if isinstance(exchange.error, NotHttp):
            raise TryAgain(f"{origin.host}: {exchange.error}")
        if exchange.error is not None:
            raise exchange.error
        if exchange.code and exchange.reply.status < 400:  # an error's status is enough, even if its words were cut
            failure = f"{origin.host}: {clean(exchange.failure, 200)}"
            if exchange.code in _HOPELESS:
                raise WorkerFault(WorkerReason.STORAGE, f"the storage cannot be trusted or asked: {failure}")
            raise TryAgain(failure)
        return exchange

    def _checked(self, url: str) -> tuple[Origin, str, str]:
        """The origin of `url` if it may be asked, the same as text, and the path and query.

        An authority that was found good is remembered: it alone decides, once the characters are known to be those of a
        URL; parsing each of ten thousand URLs of one store costs as much as a third of fetching them.
        """
        found = _AUTHORITY.match(url)
        authority = found[0] if found else ""
        checked = self._origins.get(authority) if _is_plain(url) else None
        if checked is None:
            origin = self._policy.check_url(url)
            if len(self._origins) >= _MOST_ORIGINS:
                self._origins.clear()
            checked = self._origins[authority] = (origin, _authority(origin))
        target = url[len(authority) :].partition("#")[0]
        return *checked, target if target.startswith("/") else f"/{target}"

    def _next(self, url: str, reply: Reply) -> str:
        """Where a redirect leads, as a URL that may be asked."""
        try:
            target = urljoin(url, reply.headers.get("location", ""))
        except ValueError:
            target = ""
        origin = self._policy.check_url(target)
        if origin.scheme == "http" and self._policy.check_url(url).scheme == "https":
            raise WorkerFault(
                WorkerReason.STORAGE, f"the storage redirects to {origin.host} without encryption, which is refused"
            )
        return target


def _lines(request: SignedRequest) -> list[str]:
    """Header lines for libcurl, which sends an empty one only when it is written with a semicolon."""
    return [f"{name}: {value}" if value.strip() else f"{name};" for name, value in request.headers]


def _is_plain(url: str) -> bool:
    """Whether all characters are ones that `UrlPolicy.check_url` lets pass, and not too many."""
    return len(url) <= 16_384 and url.isascii() and url.isprintable() and " " not in url and "\\" not in url


def _authority(origin: Origin) -> str:
    """The origin written as it was checked, so that libcurl cannot read another host into it. Path and query go byte
    for byte, since a signature may cover them as they are."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    port = "" if origin.port == _DEFAULT_PORTS[origin.scheme] else f":{origin.port}"
    return f"{origin.scheme}://{host}{port}"
