"""One signed request over the loop: redirects followed by hand, addresses checked, failures in our words.

Used by `download` and `upload`. What goes out is what the `SignedRequest` says and nothing of the machine's or the
worker's own: no token, no cookie, no netrc (FAULTS.md T8).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from urllib.parse import urljoin

import pycurl

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.text import clean
from jobfetcher.core.urls import Method, Origin, SignedRequest, UrlPolicy
from jobfetcher.transfer.batch import Batch
from jobfetcher.transfer.exchange import Body, Exchange, Reply, Sink
from jobfetcher.transfer.guard import AddressGuard
from jobfetcher.transfer.patience import TryAgain

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_HOPS = 3

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

    def get(
        self, request: SignedRequest, extra: Sequence[str], on_reply: Callable[[Reply], Sink | None], batch: Batch
    ) -> Reply:
        """Fetch. At most three redirects, each one checked like the first URL; `extra` headers are ours and go along,
        those of `request` do not."""
        url, headers = request.url, _lines(request)
        for _ in range(_MAX_HOPS + 1):
            reply = self._ask("GET", url, [*headers, *extra], batch, on_reply=on_reply)
            if reply.status not in _REDIRECTS:
                return reply
            url, headers = self._next(url, reply), []
        raise WorkerFault(WorkerReason.STORAGE, f"the storage redirects more than {_MAX_HOPS} times")

    def send(self, request: SignedRequest, body: Body, content_type: str | None, batch: Batch) -> Reply:
        """Send `body` by PUT or POST; a redirect is refused, the file would go where nobody signed for."""
        headers = _lines(request)
        if content_type is not None:
            headers = [line for line in headers if not line.lower().startswith("content-type:")]
            headers.append(f"Content-Type: {content_type}")
        method = "POST" if request.method is Method.POST else "PUT"
        reply = self._ask(method, request.url, headers, batch, body=body)
        if reply.status in _REDIRECTS:
            raise WorkerFault(WorkerReason.STORAGE, "the storage redirects an upload, which is never followed")
        return reply

    def _ask(
        self,
        method: str,
        url: str,
        headers: Sequence[str],
        batch: Batch,
        *,
        on_reply: Callable[[Reply], Sink | None] = lambda _: None,
        body: Body | None = None,
    ) -> Reply:
        origin = self._policy.check_url(url)
        self._guard.learn()
        if self._proxied:
            self._guard.check_name(origin.host)

        def check_address(address: str) -> None:
            if not self._proxied:  # else it is the proxy's, which the machine's owner named
                self._guard.check(origin.host, address)

        exchange = Exchange(
            method, *_split(origin, url), headers, check_address=check_address, on_reply=on_reply, body=body
        )
        batch.perform(exchange)
        if exchange.error is not None:
            raise exchange.error
        if exchange.code and exchange.reply.status < 400:  # an error's status is enough, even if its words were cut
            failure = f"{origin.host}: {clean(exchange.failure, 200)}"
            if exchange.code in _HOPELESS:
                raise WorkerFault(WorkerReason.STORAGE, f"the storage cannot be trusted or asked: {failure}")
            raise TryAgain(failure)
        return exchange.reply

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


def _split(origin: Origin, url: str) -> tuple[str, str]:
    """The authority of `url` written as it was checked, so that libcurl cannot read another host into it; and its path
    and query byte for byte, since a signature may cover them as they are."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    port = "" if origin.port == {"http": 80, "https": 443}[origin.scheme] else f":{origin.port}"
    target = _AUTHORITY.sub("", url, count=1).partition("#")[0]
    return f"{origin.scheme}://{host}{port}", target if target.startswith("/") else f"/{target}"
