"""What a whole file must hash to, as far as a store says so, and the hashing itself while bytes pass by.

Used by `part`, `body` and `hashing`. One hash per byte where that is enough: the MD5 or SHA-256 that the store vouches
for, else SHA-256 for our own record.

An ETag of 32 hex digits is an object's MD5 only where S3 is spoken. Other servers make up such an ETag from time and
size (Starlette's FileResponse does, and with it the local-disk servers of PROTOCOL.md), so it is believed only beside
an `x-amz-` header, which every S3 sends (`x-amz-request-id`), and not where a key of the customer's encrypts.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, Self

from jobfetcher.transfer.exchange import Reply
from jobfetcher.transfer.replies import content_length, strong_etag

Algorithm = Literal["md5", "sha256", "sha1", "crc32"]

_MD5_ETAG = re.compile(r'"?([0-9a-fA-F]{32})"?')

#: Checksum headers that are verified, and the length of the digest. CRC32C and CRC64NVME need a library of their own.
_SUM_HEADERS: dict[str, tuple[Algorithm, int]] = {
    "x-amz-checksum-sha256": ("sha256", 32),
    "x-amz-checksum-sha1": ("sha1", 20),
    "x-amz-checksum-crc32": ("crc32", 4),
    "content-md5": ("md5", 16),
}


_OUR_OWN: frozenset[Algorithm] = frozenset({"sha256"})


class _Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


#: Made by their constructors: to find one by its name takes longer than to hash a small file.
_HASHERS: dict[Algorithm, Callable[[], _Hasher]] = {
    "md5": partial(hashlib.md5, usedforsecurity=False),
    "sha256": partial(hashlib.sha256, usedforsecurity=False),
    "sha1": partial(hashlib.sha1, usedforsecurity=False),
    "crc32": _Crc32,
}


@dataclass(frozen=True, slots=True)
class Expected:
    """What a whole object must be, from the headers of the reply that began it.

    `etag` is a strong one or empty; `size` None where the store does not say; `sums` are hex digits by algorithm.
    """

    etag: str
    size: int | None
    sums: dict[Algorithm, str]

    @classmethod
    def of(cls, reply: Reply, *, etag_is_md5: bool = True) -> Self:
        """Read from a 200, whose checksums are those of the whole object (those of a 206 may be a part's).

        `etag_is_md5`: false where this store's ETags are known to be none, whatever they look like.
        """
        sums: dict[Algorithm, str] = {}
        if etag_is_md5 and (md5 := etag_md5(reply.headers)) is not None:
            sums["md5"] = md5
        for header, (name, size) in _SUM_HEADERS.items():
            if header not in reply.headers:
                continue
            try:
                digest = base64.b64decode(reply.headers[header], validate=True)
            except ValueError:
                continue  # also `...-3`, the sum of a multipart object's sums
            if len(digest) == size and reply.headers.get("x-amz-checksum-type", "").upper() != "COMPOSITE":
                sums[name] = digest.hex()
        if "sha256" in sums:
            sums.pop("md5", None)  # proves no more
        return cls(etag=strong_etag(reply), size=content_length(reply), sums=sums)


def etag_md5(headers: Mapping[str, str]) -> str | None:
    """The object's MD5 in hex digits, if its ETag is one."""
    found = _MD5_ETAG.fullmatch(headers.get("etag", ""))
    if found is None or not any(name.startswith("x-amz-") for name in headers):
        return None
    if headers.get("x-amz-server-side-encryption", "").lower().startswith("aws:kms"):
        return None
    return None if "x-amz-server-side-encryption-customer-algorithm" in headers else found[1].lower()


class Digests:
    """Running hashes of one stream of bytes."""

    __slots__ = ("_hashers",)

    def __init__(self, names: frozenset[Algorithm]) -> None:
        self._hashers: dict[str, _Hasher] = {name: _HASHERS[name]() for name in names}

    @classmethod
    def for_expected(cls, expected: Expected) -> Self:
        """Those that `expected` needs, and always one that is good enough to be kept."""
        names = frozenset(expected.sums)
        if not names:
            return cls(_OUR_OWN)
        return cls(names if "md5" in names or "sha256" in names else names | _OUR_OWN)

    def update(self, data: bytes | memoryview) -> None:
        for hasher in self._hashers.values():
            hasher.update(data)

    def mismatch(self, expected: Expected) -> str:
        """What differs, for people; empty if nothing does."""
        for name, should in expected.sums.items():
            if (is_ := self._hashers[name].hexdigest()) != should:
                return f"its {name} is {is_}, the storage says {should}"
        return ""

    def beside_etag(self, expected: Expected) -> str:
        """The MD5 of the bytes where nothing but the ETag says another one (FAULTS.md C22); else empty."""
        md5 = expected.sums.get("md5", "")
        if not md5 or expected.etag.strip('"').lower() != md5:
            return ""
        others = {name: digest for name, digest in expected.sums.items() if name != "md5"}
        if any(self._hashers[name].hexdigest() != should for name, should in others.items()):
            return ""
        return self._hashers["md5"].hexdigest()

    @property
    def digest(self) -> str:
        """As in `Stored.digest`: SHA-256 where there is one, else MD5."""
        name = "sha256" if "sha256" in self._hashers else "md5"
        return f"{name}:{self._hashers[name].hexdigest()}"
