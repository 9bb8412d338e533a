"""What a store's answer means. Pure readings of a `Reply`; used by `download`, `upload`, `part` and `wire`.

Everything here comes from outside (FAULTS.md T22): it is matched against a grammar or cleaned before anyone sees it.
"""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from jobfetcher.core.errors import JobReason
from jobfetcher.core.text import clean
from jobfetcher.transfer.exchange import Reply

#: FAULTS.md J8: worth asking again, whatever is asked for.
_LATER = frozenset({408, 425, 429})

#: S3 says these with 400, and yet they are the network's doing: a body that stalled or came damaged.
_LATER_CODES = frozenset({"RequestTimeout", "IncompleteBody", "BadDigest", "SlowDown", "InternalError"})

_MAX_RETRY_AFTER_S = 600.0
_LENGTH = re.compile(r"\d{1,18}")
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.IGNORECASE)
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,18})", re.IGNORECASE)
_STRONG_ETAG = re.compile(r'"[!#-~]{1,200}"')  # RFC 9110, 8.8.3, without what is not ASCII
_XML = re.compile(rb"<(Code|Message|Endpoint)>([^<]{1,300})")

#: RFC 9110, 15.4: the answer lies elsewhere.
REDIRECTS = frozenset({301, 302, 303, 307, 308})

#: Codes of S3 and its kin that no patience changes: this object cannot be stored under this name, or there is no room
#: for it (FAULTS.md C18). Those of quotas end so in MinIO, Ceph and others.
_FINAL = frozenset({"KeyTooLong", "KeyTooLongError", "EntityTooSmall", "InvalidObjectName", "XMinioInvalidObjectName"})
_FULL = frozenset({"EntityTooLarge"})
_QUOTA = "QuotaExceeded"

_HTML = ("text/html", "application/xhtml+xml")
_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<!--.{0,200}?-->\s*)?<(?:!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL
)
_ERROR = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]{0,200}>\s*)?<Error[\s>]")


class ContentRange(NamedTuple):
    """RFC 9110, 14.4: first and last byte, and the whole size where the server knows it."""

    first: int
    last: int
    whole: int | None


def content_length(reply: Reply) -> int | None:
    """The length of the body, if the reply says it."""
    value = reply.headers.get("content-length", "")
    return int(value) if _LENGTH.fullmatch(value) else None


def content_range(reply: Reply) -> ContentRange | None:
    """Which bytes a 206 carries; None if it does not say so in a way that makes sense."""
    found = _RANGE.fullmatch(reply.headers.get("content-range", ""))
    if found is None:
        return None
    first, last = int(found[1]), int(found[2])
    whole = None if found[3] == "*" else int(found[3])
    return None if last < first or (whole is not None and last >= whole) else ContentRange(first, last, whole)


def unsatisfied_size(reply: Reply) -> int | None:
    """The whole size that a 416 names."""
    found = _UNSATISFIED.fullmatch(reply.headers.get("content-range", ""))
    return int(found[1]) if found else None


def strong_etag(reply: Reply) -> str:
    """The ETag if it is a strong one, else empty: a weak one promises nothing about bytes."""
    value = reply.headers.get("etag", "")
    return value if _STRONG_ETAG.fullmatch(value) else ""


def retry_after_s(reply: Reply) -> float | None:
    """How long the store asks to be left alone, 0 to 600 s; None if it does not."""
    value = reply.headers.get("retry-after", "")
    if _LENGTH.fullmatch(value):
        return min(float(value), _MAX_RETRY_AFTER_S)
    when = _date(value)
    return None if when is None else min(max(0.0, when - time.time()), _MAX_RETRY_AFTER_S)


def skew_s(reply: Reply) -> float | None:
    """By how many seconds this machine's clock is ahead of the store's."""
    when = _date(reply.headers.get("date", ""))
    return None if when is None else time.time() - when


def code(reply: Reply) -> str:
    """The error code of an S3-like store, such as `NoSuchKey`, or empty."""
    return _xml(reply).get(b"Code", "")


def words(reply: Reply) -> str:
    """What the store said, for people: at most 260 characters, harmless, never the whole body (FAULTS.md T7).

    A store that moved a bucket names its endpoint; of a redirect the host is named, of a page that it is one.
    """
    said = _xml(reply)
    text = ": ".join(said[key] for key in (b"Code", b"Message") if key in said)
    if b"Endpoint" in said:
        text += f"; its endpoint is {said[b'Endpoint']}"
    elif not text and is_page(reply):
        text = "a web page"
    if reply.status in REDIRECTS and (location := reply.headers.get("location")):
        text += f"{'; ' if text else ''}redirects to {location.partition('?')[0]}"
    return f"HTTP {reply.status}" + (f" ({clean(text, 250)})" if text else "")


def is_page(reply: Reply) -> bool:
    """Whether it is written for people's browsers. An answer without a body is none, whatever type it says: some
    stores call the empty answer to a PUT HTML."""
    is_html = reply.headers.get("content-type", "").lower().startswith(_HTML)
    if reply.words:
        return is_html or begins_as_page(reply.words)
    return is_html and reply.headers.get("content-length") != "0" and reply.status != 204


def begins_as_page(body: bytes) -> bool:
    """Whether a body begins as HTML does."""
    return _PAGE.match(body) is not None


def is_error(body: bytes) -> bool:
    """Whether a body is an error document of S3's, which comes with 200 as well where something failed late."""
    return _ERROR.match(body) is not None


def is_json(reply: Reply) -> bool:
    """Whether the body is JSON, by what it says and by what it is."""
    if not reply.headers.get("content-type", "").lower().startswith("application/json"):
        return False
    try:
        json.loads(reply.words)
    except (ValueError, RecursionError):
        return False
    return True


def final_reason(reply: Reply) -> JobReason | None:
    """Why an object can never be stored as it is, if the store says so; None where it may yet be."""
    said = code(reply)
    if said in _FINAL:
        return JobReason.BAD_OUTPUT
    too_much = reply.status == 413 or (reply.status < 500 and (said in _FULL or said.endswith(_QUOTA)))
    return JobReason.OUTPUT_TOO_LARGE if too_much else None


def clock_hint(reply: Reply) -> str:
    """A wrong clock is the usual reason where a fresh signature is refused for its time (C10)."""
    skew = skew_s(reply)
    if code(reply) != "RequestTimeTooSkewed" or skew is None:
        return ""
    where = "ahead of" if skew > 0 else "behind"
    return f"; check the clock of this machine: it is {abs(skew):.0f} s {where} the storage's"


def is_later(reply: Reply) -> bool:
    """Whether the store means: not now."""
    return reply.status in _LATER or reply.status >= 500 or (reply.status == 400 and code(reply) in _LATER_CODES)


def is_refused(reply: Reply) -> bool:
    """Whether a newly signed request may do better: it expired, or the store does not take this signature (C1)."""
    return reply.status in {401, 403} or (reply.status == 400 and b"expired" in reply.words.lower())


def is_missing(reply: Reply) -> bool:
    """Whether the store says that there is no such object (PROTOCOL.md S14)."""
    return reply.status in {404, 410} or code(reply) in {"NoSuchKey", "NoSuchBucket"}


def _xml(reply: Reply) -> dict[bytes, str]:
    return {name: value.decode(errors="replace") for name, value in _XML.findall(reply.words)}


def _date(value: str) -> float | None:
    try:
        when = parsedate_to_datetime(value[:64])
    except (ValueError, OverflowError):
        return None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).astimezone(UTC).timestamp() if _sane(when) else None


def _sane(when: datetime) -> bool:
    return 1970 < when.year < 9000
