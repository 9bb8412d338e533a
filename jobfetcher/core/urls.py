"""Requests that a server signed for us, parsed into checked values; and which addresses bytes may go to.

A malicious or taken-over server (FAULTS.md M2) may answer anything where a presigned request is expected. So only four
fields are read, each against a strict grammar, and everything else is dropped (T6). The address is judged after name
resolution, by whoever connects (T7): a name is only a name. Pure: nothing here resolves or connects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple
from urllib.parse import urlsplit

from jobfetcher.core.addresses import Kind, class_of, is_open, kind_of, plain
from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.hosts import is_allowed
from jobfetcher.core.text import clean

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")  # RFC 9110, token
_PRINTABLE = re.compile(r"[\x20-\x7e\t]{0,8192}")
_URL = re.compile(r"[\x21-\x5b\x5d-\x7e]{1,16384}")  # printable ASCII without space and backslash
_HOST = re.compile(r"[A-Za-z0-9._:-]{1,253}")
_AUTHORITY = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//[^/?#]*")

#: What no URL may hold and yet servers write into one (RFC 3986, 2): a space, non-ASCII, a percent sign of its own.
#: Control characters and backslashes are not among it: they are no part of a name, and are refused.
_RAW = re.compile(r"[ \x80-\U0010ffff]+|%(?![0-9A-Fa-f]{2})")

_DEFAULT_PORTS = {"http": 80, "https": 443}

#: Headers a signed request may carry. Authorization is decided by origin (T8), the rest is S3, GCS and Azure practice.
_HEADERS = frozenset({"content-type", "content-disposition", "content-encoding", "content-md5", "cache-control"})
_HEADER_PREFIXES = ("x-amz-", "x-goog-", "x-ms-")

#: S3 POST policies have about ten fields; a policy document is a few KiB.
_MAX_FIELDS, _MAX_FIELD = 64, 65_536

#: Three times a path of 4,096 bytes in percent encoding, and room for a signature.
_LONGEST_RAW = 65_536


class Origin(NamedTuple):
    """RFC 6454: what must be equal for credentials to be sent along."""

    scheme: str
    host: str
    port: int


class Method(StrEnum):
    """How a signed request moves its file: GET fetches, PUT sends the raw body, POST sends a multipart form."""

    GET = "get"
    PUT = "put"
    POST = "post"


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """One request that a server signed. `fields` are the form's, for POST, sent before the file.

    `ignored` names what the server sent and we dropped, for the log.
    """

    method: Method
    url: str
    headers: tuple[tuple[str, str], ...] = ()
    fields: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()


def parse_origin(url: str) -> Origin:
    """The origin of an absolute http(s) URL; ValueError if it is not one."""
    if not _URL.fullmatch(url):
        raise ValueError("is empty, too long or has characters that no URL has")
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"}:
        raise ValueError("is not an http or https URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("carries a user name or password")
    host = (parts.hostname or "").rstrip(".")
    if not _HOST.fullmatch(host):
        raise ValueError("has no valid host name")
    port = parts.port  # raises ValueError itself when out of range
    return Origin(parts.scheme, host, port if port is not None else _DEFAULT_PORTS[parts.scheme])


def origin_text(origin: Origin) -> str:
    """The origin as the beginning of a URL, without the port that its scheme has anyway."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    port = "" if origin.port == _DEFAULT_PORTS[origin.scheme] else f":{origin.port}"
    return f"{origin.scheme}://{host}{port}"


def percent_encoded(url: str) -> str:
    """`url` with what no URL may hold percent-encoded in its path and query (FAULTS.md C19); all else stays as it is.

    A server on a local disk makes its links from decoded addresses (PROTOCOL.md): a name with a space comes out raw,
    while `%20`, `#` and `?` mean what they say. The host is left alone: one that is not ASCII is refused.
    """
    if len(url) > _LONGEST_RAW or (url.isascii() and " " not in url and "%" not in url):
        return url  # what is longer is no address of a file, and whoever asks for it refuses it (FAULTS.md T22)
    found = _AUTHORITY.match(url)
    authority = found[0] if found else ""
    try:
        return authority + _RAW.sub(_encoded, url[len(authority) :])
    except UnicodeEncodeError:  # half a character: the one who asks for it refuses it
        return url


def _encoded(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in found[0].encode("utf-8", "surrogateescape"))


def canonical_url(url: str) -> str:
    """An absolute http(s) URL as every spelling of it is: scheme and host in lower case, without the port that is the
    scheme's own, without slashes at its end. Raises ValueError as `parse_origin` does."""
    origin = parse_origin(url)
    return f"{origin_text(origin)}{urlsplit(url).path.rstrip('/')}"


@dataclass(frozen=True, slots=True)
class UrlPolicy:
    """Where files may be fetched from and sent to. `storage_allow`: hosts, domains and networks that the machine's
    owner trusts, each a `HostPattern`."""

    api: Origin
    storage_allow: frozenset[str] = frozenset()

    def allows(self, host: str, port: int | None, address: str | None = None) -> bool:
        """Whether STORAGE_ALLOW names the host, or the network that the host or `address` lies in (`is_allowed`)."""
        return is_allowed(self.storage_allow, host, port, address)

    def tidy(self, url: str) -> str:
        """`url` as it can be asked: raw characters encoded, and a link to the API's own host as safe as the API is.

        Behind a TLS terminator a server believes that it speaks http, and writes so into links to itself, with its own
        port or none. Another port is another service, and stays what it is (FAULTS.md C19).
        """
        url = percent_encoded(url)
        if self.api.scheme != "https" or url[:5].lower() != "http:":
            return url
        try:
            origin = parse_origin(url)
        except ValueError:
            return url
        if origin.host != self.api.host or origin.port not in {80, self.api.port}:
            return url
        found = _AUTHORITY.match(url)
        return origin_text(self.api) + url[len(found[0]) if found else 0 :]

    def check_url(self, url: str) -> Origin:
        """The origin of a URL that a server handed out, or the reason for refusing it."""
        try:
            origin = parse_origin(url)
        except ValueError as error:
            raise JobFault(JobReason.UNSAFE_REQUEST, f"the server handed out a file URL that {error}") from None
        if origin.scheme == "http" and self.api.scheme != "http" and not self.allows(origin.host, origin.port):
            raise WorkerFault(
                WorkerReason.STORAGE,
                f"the server handed out an unencrypted file URL on {origin.host}; "
                "if that storage is yours, add the host to STORAGE_ALLOW",
            )
        return origin

    def check_address(
        self, host: str, address: str, api_addresses: Collection[str], *, port: int | None = None
    ) -> None:
        """Raise WorkerFault unless a file may be moved to or from `address`, which `host` resolved to.

        Public addresses may; STORAGE_ALLOW may; private ones where the API itself is private or on this machine,
        loopback where the API is on this machine (FAULTS.md T7). Link-local ones, the clouds' metadata, multicast and
        unspecified ones never, unless allow-listed by number. The API's own host may have what is of the API's class,
        and nothing else, but where TLS proves that it is the API. `api_addresses`: what the API's host is known by
        (`OwnHost`); none: that is not known. `port`: the one that is asked, for entries that name one.
        """
        if self.allows(host, port, address):
            return
        ip = plain(address)
        kind, own = kind_of(ip), class_of(api_addresses)
        if host != self.api.host:
            if is_open(kind, own):
                return
            raise WorkerFault(
                WorkerReason.STORAGE,
                f"storage host {host} has the internal address {ip}, which this worker does not connect to; "
                "if that storage is yours, add the host to STORAGE_ALLOW",
            )
        is_proven = self.api.scheme == "https" and port == self.api.port  # `check_url` takes nothing without TLS there
        if kind is not Kind.NEVER and (is_proven or own in {kind, None}):
            return
        was = "" if own is None else f"; the API was {own} when this worker started"
        raise WorkerFault(
            WorkerReason.STORAGE,
            f"the API's own host {host} leads to {ip}, which is {kind}{was}: no file is moved there. If the server has "
            "moved, start the worker anew; if it is meant to be so, add the host to STORAGE_ALLOW",
        )

    def parse_request(self, raw: object) -> SignedRequest:
        """A server's answer (`{method, url, headers, data}`) as a SignedRequest. Raises JobFault or WorkerFault."""
        if not isinstance(raw, Mapping):
            raise JobFault(JobReason.UNSAFE_REQUEST, "the server handed out a file request that is not an object")
        try:
            method = Method(str(raw.get("method", "")).lower())
        except ValueError:
            raise JobFault(
                JobReason.UNSAFE_REQUEST, "the server handed out a file request that is neither get, put nor post"
            ) from None
        url = raw.get("url")
        if not isinstance(url, str):
            raise JobFault(JobReason.UNSAFE_REQUEST, "the server handed out a file request without a URL")
        url = self.tidy(url)
        origin = self.check_url(url)
        ignored = [str(key)[:40] for key in raw if key not in {"method", "url", "headers", "data"}]

        headers: list[tuple[str, str]] = []
        given = raw.get("headers") or {}
        for name, value in given.items() if isinstance(given, Mapping) else ():
            if self._takes_header(name, value, origin):
                headers.append((name, value))
            else:
                ignored.append(f"header {str(name)[:40]}")

        fields: list[tuple[str, str]] = []
        data = raw.get("data") or {}
        if not isinstance(data, Mapping):
            ignored.append("data that is no object")
            data = {}
        for name, value in data.items():
            if value is not None:
                fields.append((name, _field_text(name, value)))
        if len(fields) > _MAX_FIELDS:
            raise JobFault(JobReason.UNSAFE_REQUEST, "the server handed out an upload form with too many fields")
        return SignedRequest(method, url, tuple(headers), tuple(fields), tuple(ignored))

    def _takes_header(self, name: object, value: object, origin: Origin) -> bool:
        if not isinstance(name, str) or not isinstance(value, str):
            return False  # PROTOCOL.md S15: the schema allows nested values; they mean nothing
        if not _HEADER_NAME.fullmatch(name) or not _PRINTABLE.fullmatch(value):
            return False
        lower = name.lower()
        if lower == "authorization":
            return origin == self.api
        return lower in _HEADERS or lower.startswith(_HEADER_PREFIXES)


def _field_text(name: object, value: object) -> str:
    """A form's field as text (FAULTS.md C20): numbers and booleans as JSON writes them. Raises JobFault, naming it."""
    if isinstance(value, bool | int | float):
        value = json.dumps(value)
    if isinstance(name, str) and name != "file" and isinstance(value, str) and len(value) <= _MAX_FIELD:
        return value
    why = "is too long" if isinstance(value, str) else f"is neither text nor a number but {_kind(value)}"
    if name == "file":
        why = "has the name of the file's own part"
    raise JobFault(
        JobReason.UNSAFE_REQUEST,
        f"the server handed out an upload form whose field {clean(str(name), 60)!r} {why}",
    )


def _kind(value: object) -> str:
    return "an object" if isinstance(value, Mapping) else "a list"
