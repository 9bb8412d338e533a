"""One request to the worker API, one reply, in bounded time and memory.

Knows HTTP and tokens, and no endpoint. Never follows a redirect and speaks to one origin only, so the token cannot
leave for another host (FAULTS.md T8); nothing of the environment (proxies, netrc) is read here. Nothing is repeated
here except once after a 401, which the server did not act upon (PROTOCOL.md S1).
"""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlencode

import httpcore
import httpx

from jobfetcher.core.errors import SourceError, SourceRefused, SourceUnavailable
from jobfetcher.core.hosts import Proxies
from jobfetcher.core.text import clean
from jobfetcher.core.tls import apart, in_words, is_about_time
from jobfetcher.core.urls import Origin, parse_origin
from jobfetcher.sources.worker_api.auth import Auth
from jobfetcher.sources.worker_api.deadline import NOT_SENT, TRANSPORT_ERRORS, DeadlineTransport, Proxy, deadline

#: DESIGN.md rule 9: connect 5 s, whole call 30 s, body 4 MiB.
CONNECT_S, CALL_S, BODY_BYTES = 5.0, 30.0, 4 * 1024 * 1024

#: FAULTS.md B15: 4 MiB of `[],` are 1.4 million objects. A job with MAX_FILES inputs has a fifth of this.
_VALUES = 50_000

#: Of an answer that is no success no more is read; and of any body, so much is kept for messages (B10).
_ERROR_BYTES, _WORDS_BYTES = 65_536, 1024

#: Clocks that are less apart, in seconds, agree.
_CLOCK_S = 60.0

#: FAULTS.md J8: worth another try later.
_TRY_LATER = frozenset({408, 425, 429})

#: FAULTS.md B11: a server may ask for at most this much patience.
_RETRY_AFTER_MAX_S = 600.0

Params = Sequence[tuple[str, str]]

_HEADERS = {"User-Agent": "jobfetcher", "Accept": "application/json", "Accept-Encoding": "identity"}
_TIMEOUTS = {"timeout": httpx.Timeout(CALL_S, connect=CONNECT_S).as_dict()}


class UnusableAnswer(SourceUnavailable):
    """An answer that came whole, or would never end, and that nobody should act upon (FAULTS.md B15).

    Unlike one that was torn on its way, the next one will be the same. `start` is its first KiB, `why` what is wrong.
    """

    def __init__(self, message: str, start: bytes, why: str) -> None:
        super().__init__(message)
        self.start = start
        self.why = why


class Reply(NamedTuple):
    """Status, body and headers of an answer."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    def json(self) -> Any:
        """The body as JSON. Raises SourceUnavailable for what is none, and UnusableAnswer for what JSON permits and a
        server has no reason for: duplicate keys, NaN, endless digits, absurd nesting, too many values."""
        start = clean(self.body[:80].decode(errors="replace"), 80)
        try:
            if sum(map(self.body.count, (b",", b"[", b"{"))) > _VALUES:
                raise ValueError("too many values")
            return json.loads(self.body, object_pairs_hook=_distinct, parse_constant=_no_constant)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise SourceUnavailable(
                f"the server's answer is not the JSON expected ({type(error).__name__}: it begins {start!r}); "
                "is API_URL the address of a worker API?"
            ) from None
        except RecursionError:
            why = "it is nested too deeply"
        except ValueError as error:
            why = clean(str(error), 120)
        raise UnusableAnswer(
            f"the server's answer is not the JSON expected ({why}: it begins {start!r})", self.body[:_WORDS_BYTES], why
        )

    @property
    def words(self) -> str:
        """The start of the body as one harmless line, for messages."""
        return clean(self.body[:_WORDS_BYTES].decode(errors="replace"), 300)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


class Client:
    """Requests to one base URL. Thread-safe; close it when done.

    `proxy`: the address of an HTTP proxy for all of them, a name and password in it if it wants some, or which is for
    what. Without one none is used, whatever the environment says. Raises ConfigError for one that cannot be read.
    """

    def __init__(
        self,
        base_url: str,
        *,
        ca_file: str | None = None,
        ca_pem: str | None = None,
        proxy: str | Proxies | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.origin: Origin = parse_origin(base_url)
        proxies = proxy if isinstance(proxy, Proxies) else Proxies.everything_through(proxy)
        # Without httpx.Client: all that it adds (redirects, cookies, the environment's proxies and netrc) is unwanted
        # here, and costs a seventh of a call.
        self._transport = DeadlineTransport(ca_file=ca_file, ca_pem=ca_pem, proxies=proxies)
        self.auth: Auth | None = None

    def request(self, method: str, path: str, params: Params = (), *, within_s: float = CALL_S) -> Reply:
        """Send one authorised request to `path` (already percent-encoded) below the base URL.

        Raises SourceUnavailable when there is no answer; any status is returned, 401 after one renewal of the token.
        """
        assert self.auth is not None  # noqa: S101 - set by build before the first request
        url = f"{self.base_url}{path}"
        token = self.auth.token()
        reply = self.send(method, url, params, {"Authorization": f"Bearer {token}"}, within_s=within_s)
        if reply.status != 401:
            return reply
        token = self.auth.renew(token)
        return self.send(method, url, params, {"Authorization": f"Bearer {token}"}, within_s=within_s)

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
                bytes(body[:_WORDS_BYTES]),
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


def is_definite(reply: Reply) -> bool:
    """Whether the server will say the same again: 4xx, but for those that pass or are about our token (J8)."""
    return 400 <= reply.status < 500 and reply.status not in {401, 403} | _TRY_LATER


def failure(reply: Reply, what: str) -> SourceError:
    """The error that a reply nobody planned for stands for. `what` names the call for a person."""
    if reply.status == 401:
        return SourceRefused(f"the server refused our token for {what} (401): {reply.words}")
    if reply.status == 403:
        return SourceRefused(
            f"the server does not let this account do that: {what} (403): is it in the group 'workers'?"
        )
    if reply.status in _TRY_LATER or reply.status >= 500:
        return SourceUnavailable(
            f"the server answered {reply.status} to {what}: {reply.words}",
            retry_after_s=retry_after(reply.headers.get("retry-after")),
        )
    return SourceUnavailable(f"the server answered {reply.status} to {what}, which makes no sense here: {reply.words}")


def retry_after(value: str | None, now: float | None = None) -> float | None:
    """RFC 9110, 10.2.3: seconds or a date, as seconds from now within 0..600; None when absent or unreadable."""
    if value is None:
        return None
    try:
        seconds = float(max(0, min(int(value), int(_RETRY_AFTER_MAX_S))))  # as integers: 400 digits fit no float
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(value).timestamp()
        except (ValueError, TypeError, OverflowError):
            return None
        seconds = moment - (time.time() if now is None else now)
    return min(max(seconds, 0.0), _RETRY_AFTER_MAX_S)
