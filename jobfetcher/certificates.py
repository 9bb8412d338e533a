"""CA_FILE, read and checked when the worker starts: PEM or DER, with or without a byte order mark, or a directory.

Used by `settings`, so that a wrong file is one line before anything begins, and by `build`, which hands the result to
whoever makes connections. Python's ssl and libcurl read plain PEM files themselves; other forms go to them as text. So
does what lies in a directory: both could look certificates up there by themselves, but only where their names are
OpenSSL's hashes.
"""

from __future__ import annotations

import codecs
import re
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from jobfetcher.core.errors import ConfigError

#: The bundles of all public authorities have a quarter of a MiB.
_MOST_BYTES = 16 * 2**20

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))

#: What OpenSSL's `rehash` calls a certificate: the hash of its subject, and a number.
_HASHED = re.compile(r"[0-9a-f]{8}\.\d+")

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class Trust(NamedTuple):
    """What to trust instead of the system's certificates: a PEM `file`, or `pem` text; neither: the system's."""

    file: Path | None = None
    pem: str | None = None


def read_certificates(path: Path | None, name: str = "CA_FILE") -> Trust:
    """The certificates in `path`, a file or a directory. `name`: the setting that names it.

    Raises ConfigError when there is none in it.
    """
    if path is None:
        return Trust()
    try:
        if path.is_dir():
            return Trust(pem=_all_in(path, name))
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{name}: there is no file {path}") from None
    except OSError as error:
        raise ConfigError(f"{name}: {path} cannot be read: {error.strerror}") from None
    if not content.strip():
        raise ConfigError(f"{name}: {path} is empty; it must have certificates in it (PEM or DER)")
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{name}: {path} is no file of certificates: it is larger than {_MOST_BYTES >> 20} MiB")
    pem, is_plain = _as_pem(content)
    if pem is None or not _has_certificates(pem):
        key = "; there is a private key in it, which does not belong there" if b"PRIVATE KEY" in content else ""
        raise ConfigError(f"{name}: {path} has no certificate in it that can be read (PEM or DER){key}")
    return Trust(file=path) if is_plain else Trust(pem=pem)


def _all_in(folder: Path, name: str) -> str:
    """All certificates in it, as PEM text. Files that hold none, or cannot be read, do not count.

    Of a directory that OpenSSL's `rehash` has been through those with its names, as other programs take it; of any
    other one all. Raises OSError, and ConfigError when there is none.
    """
    files = sorted(entry for entry in folder.iterdir() if entry.is_file())
    files = [file for file in files if is_hashed(file.name)] or files
    # once each: bundles lie beside their parts, and names are links
    found = list(dict.fromkeys(one for file in files for one in _certificates(file)))
    if not found:
        raise ConfigError(
            f"{name}: {folder} is a directory without a certificate in it that can be read (PEM or DER); name the file "
            "that has them (docker makes a directory where a file that is to be mounted is missing)"
        )
    return "\n".join(found) + "\n"


def is_hashed(name: str) -> bool:
    """Whether a file of this name is what OpenSSL looks for in a directory of certificates."""
    return _HASHED.fullmatch(name) is not None


def _certificates(file: Path) -> Iterator[str]:
    with suppress(OSError):
        with file.open("rb") as opened:
            content = opened.read(_MOST_BYTES)
        for found in _CERTIFICATE.findall(_as_pem(content)[0] or ""):
            if _has_certificates(found):  # one that is broken would spoil the others
                yield found


def _as_pem(content: bytes) -> tuple[str | None, bool]:
    """The content as PEM text, if it can be that, and whether it was PEM without a byte order mark already."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding, errors="replace"), False
    if b"-----BEGIN " in content:
        return content.decode("latin-1"), True
    try:
        return ssl.DER_cert_to_PEM_cert(content), False
    except ValueError:
        return None, False


def _has_certificates(pem: str) -> bool:
    """Whether OpenSSL finds any; it takes ASCII only, and people write names in their own script beside them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=pem.encode("ascii", errors="replace").decode())
    except (ssl.SSLError, ValueError):
        return False
    return context.cert_store_stats()["x509"] > 0
