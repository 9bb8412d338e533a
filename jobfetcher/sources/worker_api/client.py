"""One request to the worker API, one reply, in bounded time and memory.

Knows HTTP and tokens, and no endpoint. Never follows a redirect and speaks to one origin only, so the token cannot
leave for another host (FAULTS.md T8); nothing of the environment (proxies, netrc) is read here. Nothing is repeated
here except once after a 401 or 403, which the server did not act upon (PROTOCOL.md S1, FAULTS.md B24).

What comes back from `request` and `ask` is the API's own word: pages of others end here (reply.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from urllib.parse import urlencode

import httpcore
import httpx

from jobfetcher.core.addresses import OwnHost
from jobfetcher.core.errors import SourceRefused, SourceUnavailable
from jobfetcher.core.hosts import Proxies
from jobfetcher.core.text import clean
from jobfetcher.core.tls import apart, in_words, is_about_time
from jobfetcher.core.urls import Origin, parse_origin
from jobfetcher.sources.worker_api.auth import Auth
from jobfetcher.sources.worker_api.deadline import NOT_SENT, TRANSPORT_ERRORS, DeadlineTransport, Proxy, deadline
from jobfetcher.sources.worker_api.reply import WORDS_BYTES, Reply, UnusableAnswer, own

#: DESIGN.md rule 9: connect 5 s, whole call 30 s, body 4 MiB.
CONNECT_S, CALL_S, BODY_BYTES = 5.0, 30.0, 4 * 1024 * 1024

#: Clocks that are less apart, in seconds, agree.
_CLOCK_S = 60.0

#: Of an answer that is no success no more is read.
_ERROR_BYTES = 65_536

Params = Sequence[tuple[str, str]]

_HEADERS = {"User-Agent": "jobfetcher", "Accept": "application/json", "Accept-Encoding": "identity"}
_TIMEOUTS = {"timeout": httpx.Timeout(CALL_S, connect=CONNECT_S).as_dict()}


class Client:
    """Requests to one base URL. Thread-safe; close it when done.

    `proxy`: the address of an HTTP proxy for all of them, a name and password in it if it wants some, or which is for
    what. Without one none is used, whatever the environment says. Raises ConfigError for one that cannot be read.
    `own`: the API's host, which is connected to where its addresses are of the kind they were at first (FAULTS.md T7);
    None: wherever it is, for tools. Through a proxy the address is the proxy's to find.
    """

    def __init__(
        self,
        base_url: str,
        *,
        ca_file: str | None = None,
        ca_pem: str | None = None,
        proxy: str | Proxies | None = None,
        own: OwnHost | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.origin: Origin = parse_origin(base_url)
        proxies = proxy if isinstance(proxy, Proxies) else Proxies.everything_through(proxy)
        # Without httpx.Client: all that it adds (redirects, cookies, the environment's proxies and netrc) is unwanted
        # here, and costs a seventh of a call.
        self._transport = DeadlineTransport(ca_file=ca_file, ca_pem=ca_pem, proxies=proxies, own=own)
        self.auth: Auth | None = None
        #: Whether the API ever took a call: until then its address may be wrong.
        self._met = False

    def request(self, method: str, path: str, params: Params = (), *, within_s: float = CALL_S) -> Reply:
        """Send one authorised request to `path` (already percent-encoded) below the base URL.

        Returns what the API itself answers, whatever the status, 401 and 403 after one renewal of the token. Raises
        SourceUnavailable when there is no answer, and ForeignAnswer for one that is not the API's own; SourceRefused
        when there is no token to be had.
        """
        assert self.auth is not None  # noqa: S101 - set by build before the first request
        url = f"{self.base_url}{path}"
        token = _before_sending(self.auth.token)
        reply = self.send(method, url, params, {"Authorization": f"Bearer {token}"}, within_s=within_s)
        if reply.status in {401, 403} and (newer := self._renewed(token, reply)) is not None:
            reply = self.send(method, url, params, {"Authorization": f"Bearer {newer}"}, within_s=within_s)
        return self._own(reply, f"{method} {clean(path, 200)}")

    def ask(self, path: str) -> Reply:
        """GET `path` as anybody may, without a token. Returns and raises as `request` does."""
        return self._own(self.send("GET", f"{self.base_url}{path}"), f"GET {path}")

    def _renewed(self, refused: str, reply: Reply) -> str | None:
        """A token to try again with after a 401 or 403, or None: then the answer stands as it is.

        Whoever stands before the API may look at tokens, too, so it does not matter whose answer it is. But only the
        API's own 401 says that there must be a new token: a 403 may be about the account, and a page about anything.
        """
        assert self.auth is not None  # noqa: S101 - as above
        try:
            return _before_sending(partial(self.auth.renew, refused, reply.status))
        except SourceRefused:
            if reply.status == 401 and reply.is_own:
                raise
        except SourceUnavailable:
            if reply.is_own:
                raise
        return None

    def _own(self, reply: Reply, what: str) -> Reply:
        hint = "" if self._met else f"; is API_URL ({clean(self.base_url, 200)}) the address of a worker API?"
        own(reply, what, hint)
        self._met = self._met or reply.status < 300
        return reply

    def send(
        self,
        method: str,
        url: str,
        params: Params = (),
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        *,
        within_s: float = CALL_S,
    ) -> Reply:
        """Send one request as given, without a token. Raises SourceUnavailable; `sent` says whether it went out."""
        try:
            request = httpx.Request(
                method,
                f"{url}?{urlencode(params)}" if params else url,  # httpx would read the whole URL twice for it
                headers=_HEADERS | dict(headers or {}),
                content=content,
                extensions=_TIMEOUTS,
            )
            with deadline(within_s):
                response = self._transport.handle_request(request)
                try:
                    body = bytearray()
                    most = BODY_BYTES if response.status_code < 300 else _ERROR_BYTES
                    for piece in response.iter_raw():
                        body += piece
                        if len(body) > most:
                            break
                finally:
                    response.close()
        except TRANSPORT_ERRORS as error:
            raise SourceUnavailable(
                f"no answer from {self._where(url)}: {self._why(error, url)}",
                sent=not isinstance(error, NOT_SENT),
            ) from error
        if response.status_code < 300 and len(body) > BODY_BYTES:
            size = f"larger than {BODY_BYTES >> 20} MiB"
            raise UnusableAnswer(
                f"the server's answer to {method} {request.url.path} is {size}; it was cut off",
                bytes(body[:WORDS_BYTES]),
                f"it is {size}",
            )
        return Reply(response.status_code, bytes(body), response.headers)

    def close(self) -> None:
        """Close all connections."""
        self._transport.close()

    def _where(self, url: str) -> str:
        """Who did not answer, for a person: nothing of it is a secret."""
        host = f"[{self.origin.host}]" if ":" in self.origin.host else self.origin.host
        where = f"{host}:{self.origin.port}" if url.startswith(self.base_url) else clean(url, 200)
        try:
            proxy = self._transport.proxy_for(httpx.URL(url))
        except httpx.InvalidURL:
            proxy = None
        return where if proxy is None else f"{where} through the proxy {Proxy.parse(proxy).name}"

    def _why(self, error: Exception, url: str) -> str:
        """What went wrong, and what to do where that is known (core.tls)."""
        said = clean(str(error) or type(error).__name__, 200)
        if url.startswith("http://") and isinstance(error, httpcore.RemoteProtocolError | httpcore.ReadError):
            return f"{said}; if the server wants TLS there, the address must begin with https://"
        if not (meaning := in_words(said)):
            return said
        if is_about_time(said) and (there := self._transport.server_time(httpx.URL(url))) is not None:
            off_s = time.time() - there
            if abs(off_s) >= _CLOCK_S:
                how = f"{apart(abs(off_s))} {'ahead of' if off_s > 0 else 'behind'} the server's"
                return f"{meaning} (it is {how}): {said}"
            return f"{meaning} (it agrees with the server's, so the certificate is what is wrong): {said}"
        return f"{meaning}: {said}"


def _before_sending(token: Callable[[], str]) -> str:
    """A token. When there is none for now, the call that needs it was certainly not sent."""
    try:
        return token()
    except SourceUnavailable as error:
        error.sent = False
        raise
