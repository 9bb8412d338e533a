"""What an answer is: the API's own word, or a page of somebody who stands before it (PROTOCOL.md S20).

Used by `client`, `auth` and `source`. Gateways, balancers, filters and sign-in pages of guest networks answer in the
API's place with 404, 403, 502, 503, redirects and 200. Whether an answer is the API's own is decided here and nowhere
else, by what the API is known to send:

    204                       an update is accepted
    2xx                       with JSON, or without a body
    4xx, 5xx                  with JSON that has `detail`
    500                       also as plain `Internal Server Error`, when the API crashed

Everything else is a ForeignAnswer, which is an outage: it accepts nothing, cancels nothing and refuses nothing
(FAULTS.md B21, B22). Its message names what came, so that a person can find out who sent it.
"""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from typing import Any

from jobfetcher.core.errors import SourceError, SourceRefused, SourceUnavailable
from jobfetcher.core.text import clean

#: FAULTS.md B15: 4 MiB of `[],` are 1.4 million objects. A job with MAX_FILES inputs has a fifth of this.
_VALUES = 50_000

#: Of any body so much is kept for messages (B10), and of a page so much is searched for its first words.
WORDS_BYTES, _PAGE_BYTES = 1024, 8192

#: FAULTS.md J8: worth another try later.
_TRY_LATER = frozenset({408, 425, 429})

#: FAULTS.md B11: a server may ask for at most this much patience.
_RETRY_AFTER_MAX_S = 600.0

#: What of a page no person reads.
_MARKUP = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>|<[^>]*>", re.IGNORECASE | re.DOTALL)

#: What the API says when it crashed.
_CRASHED = b"Internal Server Error"

#: What a port for TLS says to plain http (status 400; nginx: ngx_http_special_response.c, Apache: ssl_engine_io.c, Go:
#: net/http/server.go). The rest only hang up.
_WANTS_TLS = re.compile(r"plain http request|speaking plain http|http request to an https server", re.IGNORECASE)
_BEGIN_WITH_HTTPS = "; this port wants TLS: the address must begin with https://"


class UnusableAnswer(SourceUnavailable):
    """An answer that came whole, or would never end, and that nobody should act upon (FAULTS.md B15).

    Unlike one that was torn on its way, the next one will be the same. `start` is its first KiB, `why` what is wrong.
    """

    def __init__(self, message: str, start: bytes, why: str) -> None:
        super().__init__(message)
        self.start = start
        self.why = why


class ForeignAnswer(SourceUnavailable):
    """An answer that is not the API's own: an outage. `status` is what it came with."""

    def __init__(self, message: str, status: int, *, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.status = status


@dataclass(frozen=True)
class Reply:
    """Status, body and headers (any case) of an answer."""

    status: int
    body: bytes
    headers: Mapping[str, str]

    def json(self) -> Any:
        """The body as JSON. Raises SourceUnavailable for what is none, and UnusableAnswer for what JSON permits and a
        server has no reason for: duplicate keys, NaN, endless digits, absurd nesting, too many values."""
        if isinstance(self._parsed, SourceUnavailable):
            raise self._parsed
        return self._parsed[0]

    @cached_property
    def _parsed(self) -> tuple[Any] | SourceUnavailable:
        """What JSON the body is, or why it is none; read once, for it is asked more than once."""
        try:
            if sum(map(self.body.count, (b",", b"[", b"{"))) > _VALUES:
                raise ValueError("too many values")
            return (json.loads(self.body, object_pairs_hook=_distinct, parse_constant=_no_constant),)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            return SourceUnavailable(f"the answer is not the JSON expected ({type(error).__name__}): {self.described}")
        except RecursionError:
            why = "it is nested too deeply"
        except ValueError as error:
            why = clean(str(error), 120)
        message = f"the server's answer is not the JSON expected ({why}): {self.described}"
        return UnusableAnswer(message, self.body[:WORDS_BYTES], why)

    @property
    def is_own(self) -> bool:
        """Whether the API itself can have sent it (see the module)."""
        if self.status == 204:
            return True
        if 200 <= self.status < 300:
            return not self.body or (self._may_be_json and self._is_json)
        if self.status == 500 and self.body.strip() == _CRASHED:
            return True
        if self.status < 400 or not self._may_be_json or not self._is_json:
            return False
        return isinstance(said := self.json(), dict) and "detail" in said

    @property
    def _may_be_json(self) -> bool:
        """Whether the server says so, or does not say what it is."""
        kind = self.header("content-type").partition(";")[0].strip().lower()
        return not kind or kind.endswith("json")

    @property
    def _is_json(self) -> bool:
        """Of a success also what nobody should act upon: the API may have passed a user's words on (B15)."""
        return isinstance(self._parsed, tuple) or (self.status < 300 and isinstance(self._parsed, UnusableAnswer))

    def header(self, name: str) -> str:
        """A header by its lower-case name; empty where there is none."""
        return next((value for key, value in self.headers.items() if key.lower() == name), "")

    @property
    def words(self) -> str:
        """The start of the body as one harmless line, for messages; of a page what a person would read."""
        text = self.body[:_PAGE_BYTES].decode(errors="replace")
        if text.lstrip("\ufeff \r\n\t").startswith("<"):
            text = " ".join(_MARKUP.sub(" ", text).split()) or text
        return clean(text[:WORDS_BYTES], 300)

    @property
    def described(self) -> str:
        """Status, content type, `Location` and the first words, for a person who looks for who sent it."""
        parts = [f"{self.status} {_phrase(self.status)}".strip()]
        parts.append(clean(self.header("content-type"), 60) or "no content type")
        if location := self.header("location"):
            parts.append(f"Location {clean(location, 200)}")
        parts.append(f"it begins: {clean(self.words, 100)}" if self.body else "no body")
        return ", ".join(parts)

    @property
    def retry_after_s(self) -> float | None:
        """How much patience it asks for, in seconds."""
        return retry_after(self.header("retry-after") or None)


def own(reply: Reply, what: str, hint: str = "") -> Reply:
    """`reply`, if it is the API's own word; else raises ForeignAnswer. `what`: the call, `hint`: what to do."""
    if reply.is_own:
        return reply
    if 200 <= reply.status < 300:
        who = f"the answer to {what} is not the JSON expected of a worker API"
    else:
        who = f"not the worker API but something before it answered {reply.status} to {what}"
    whose = "" if _WANTS_TLS.search(reply.words) else "; a gateway, filter or sign-in page? It is"
    message = f"{who}{whose}: {reply.described}{hint if whose else _BEGIN_WITH_HTTPS}"
    raise ForeignAnswer(message, reply.status, retry_after_s=reply.retry_after_s)


def is_definite(reply: Reply) -> bool:
    """Whether the API will say the same again: 4xx, but for those that pass or are about our token (J8)."""
    return 400 <= reply.status < 500 and reply.status not in {401, 403} | _TRY_LATER


def failure(reply: Reply, what: str) -> SourceError:
    """The error that a reply of the API's own stands for that nobody planned for. `what`: the call, for a person."""
    if reply.status == 401:
        return SourceRefused(f"the server refused our token for {what} (401): {reply.words}")
    if reply.status == 403:
        return SourceRefused(
            f"the server does not let this account do that: {what} (403): is it in the group 'workers'? {reply.words}"
        )
    if reply.status in _TRY_LATER or reply.status >= 500:
        return SourceUnavailable(
            f"the server answered {reply.status} to {what}: {reply.words}", retry_after_s=reply.retry_after_s
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


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
