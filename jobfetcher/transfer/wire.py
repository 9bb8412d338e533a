"""One signed request over the loop: redirects followed by hand, addresses checked, failures in our words.

Used by `download` and `upload`. What goes out is what the `SignedRequest` says and nothing of the machine's or the
worker's own: no token, no cookie, no netrc (FAULTS.md T8).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple
from urllib.parse import urljoin

import pycurl

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.hosts import NO_PROXIES, Proxies
from jobfetcher.core.text import clean
from jobfetcher.core.tls import in_words
from jobfetcher.core.urls import Method, SignedRequest, UrlPolicy, origin_text, percent_encoded
from jobfetcher.transfer.exchange import Body, Exchange, NotHttp, Reply, Sink
from jobfetcher.transfer.guard import AddressGuard
from jobfetcher.transfer.patience import TryAgain
from jobfetcher.transfer.proof import Proof
from jobfetcher.transfer.replies import REDIRECTS
from jobfetcher.transfer.story import Aside, Tale

_MAX_HOPS = 3

#: So many authorities are remembered as checked.
_MOST_ORIGINS = 256

#: Trying again would not help: the CA file or the URL stays what it is.
_HOPELESS = frozenset(
    {
        pycurl.E_SSL_CACERT_BADFILE,
        pycurl.E_URL_MALFORMAT,
        pycurl.E_UNSUPPORTED_PROTOCOL,
    }
)

_AUTHORITY = re.compile(r"[a-z]+://[^/?#]*", re.IGNORECASE)


class _Place(NamedTuple):
    """An origin that may be asked: its host, all of it as text, and what raises for an address it must not have."""

    host: str
    origin: str
    check_address: Callable[[str], None]
    port: int
    proxied: bool


class Wire:
    """Requests that follow the policy. Raises TryAgain for what may pass, WorkerFault or JobFault for what does not.

    `proxies`: which origins are asked through one; there the name is checked, since the address is the proxy's.
    `proof`: what tells the stores that are asked from pages that others answer with.
    """

    def __init__(self, policy: UrlPolicy, guard: AddressGuard, *, proxies: Proxies = NO_PROXIES) -> None:
        self._policy, self._guard, self._proxies = policy, guard, proxies
        self.proof = Proof(origin_text(policy.api))
        self._places: dict[str, _Place] = {}

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
            place, target = self._checked(url)
            if place.proxied or not self._guard.knows:
                yield from self._look_up(place)
            exchange = Exchange(
                "GET",
                place.origin,
                target,
                [*headers, *extra],
                check_address=place.check_address,
                on_start=on_start,
                on_reply=on_reply,
                since=since,
            )
            yield exchange
            _check(exchange, place)
            reply = exchange.reply
            if reply.status not in REDIRECTS or not reply.headers.get("location"):
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
        """Send `body` by PUT or POST; a redirect is not followed, the file would go where nobody signed for. `on_start`
        and `since`: see `get`."""
        headers = _lines(request) if request.headers else []
        if content_type is not None:
            headers = [line for line in headers if not line.lower().startswith("content-type:")]
            headers.append(f"Content-Type: {content_type}")
        place, target = self._checked(request.url)
        if place.proxied or not self._guard.knows:
            yield from self._look_up(place)
        exchange = Exchange(
            "POST" if request.method is Method.POST else "PUT",
            place.origin,
            target,
            headers,
            check_address=place.check_address,
            on_start=on_start,
            body=body,
            since=since,
        )
        yield exchange
        _check(exchange, place)
        return exchange.reply

    def _look_up(self, place: _Place) -> Tale[None]:
        """Find out which addresses may be connected to: before there is a connection, since it may block."""
        if not self._guard.knows:  # not any more: a file may have been signed long ago
            yield Aside(self._guard.learn)
        if place.proxied:
            yield Aside(partial(self._guard.check_name, place.host, port=place.port))

    def _checked(self, url: str) -> tuple[_Place, str]:
        """Whom `url` asks, if it may be asked; and the path and query.

        An authority that was found good is remembered: it alone decides, once the characters are known to be those of a
        URL; parsing each of ten thousand URLs of one store costs as much as a third of fetching them.
        """
        found = _AUTHORITY.match(url)
        authority = found[0] if found else ""
        place = self._places.get(authority) if _is_plain(url) else None
        if place is None:
            origin = self._policy.check_url(url)
            if len(self._places) >= _MOST_ORIGINS:
                self._places.clear()
            proxied = self._proxies.choose(*origin) is not None
            check_address = _anything if proxied else partial(self._guard.check, origin.host, port=origin.port)
            place = _Place(origin.host, origin_text(origin), check_address, origin.port, proxied)
            self._places[authority] = place
        target = url[len(authority) :].partition("#")[0]
        return place, target if target.startswith("/") else f"/{target}"

    def _next(self, url: str, reply: Reply) -> str:
        """Where a redirect leads, as a URL that may be asked."""
        said = reply.headers["location"].encode("latin-1").decode(errors="surrogateescape")  # as it came, byte for byte
        try:
            target = self._policy.tidy(urljoin(url, percent_encoded(said)))
        except ValueError:
            target = ""
        origin = self._policy.check_url(target)
        if origin.scheme == "http" and self._policy.check_url(url).scheme == "https":
            raise WorkerFault(
                WorkerReason.STORAGE, f"the storage redirects to {origin.host} without encryption, which is refused"
            )
        return target


def _anything(_: str) -> None:
    """The address is the proxy's, which the machine's owner named."""


def _check(exchange: Exchange, place: _Place) -> None:
    """Raise what went wrong with it, if it matters.

    A certificate that is not the store's may be a portal's, which leaves. So the file waits for one that is: a job that
    is given back at once is one that this account never gets again (PROTOCOL.md S3).
    """
    if isinstance(exchange.error, NotHttp):
        raise TryAgain(f"{place.host}: {exchange.error}")
    if exchange.error is not None:
        raise exchange.error
    if exchange.code and exchange.reply.status < 400:  # an error's status is enough, even if its words were cut
        failure = f"{place.host}: {in_words(exchange.failure) or clean(exchange.failure, 200)}"
        if exchange.code in _HOPELESS:
            raise WorkerFault(WorkerReason.STORAGE, f"the storage cannot be trusted or asked: {failure}")
        raise TryAgain(failure)


def _lines(request: SignedRequest) -> list[str]:
    """Header lines for libcurl, which sends an empty one only when it is written with a semicolon."""
    return [f"{name}: {value}" if value.strip() else f"{name};" for name, value in request.headers]


def _is_plain(url: str) -> bool:
    """Whether all characters are ones that `UrlPolicy.check_url` lets pass, and not too many."""
    return len(url) <= 16_384 and url.isascii() and url.isprintable() and " " not in url and "\\" not in url
