"""What the tests of transfers share: a watch that records, items, a policy for a server on loopback, certificates.

The folders that use the fixtures `nap` and `authority` import them in their conftest.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from jobfetcher.core.errors import JobFault, JobReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.ports import Download, Upload
from jobfetcher.core.run import Stored
from jobfetcher.core.urls import Method, SignedRequest, UrlPolicy, parse_origin
from jobfetcher.transfer.cache import Cache
from jobfetcher.transfer.exchange import NetSettings
from jobfetcher.transfer.patience import Rules
from jobfetcher.transfer.presigned import PresignedTransfer
from jobfetcher.tree import Changed, Found, Reader

#: A worker whose API is on this machine may use storage on this machine.
LOCAL = UrlPolicy(api=parse_origin("http://127.0.0.1:1"))


class Recorder:
    """A watch that keeps what it was told, and by which thread."""

    def __init__(self, on_done: Callable[[Stored], None] = lambda _: None) -> None:
        self.halt = Halt()
        self.sizes: list[int] = []
        self.expected = 0
        self.stored: list[Stored] = []
        self.threads: set[threading.Thread] = set()
        self.retries: list[tuple[str, str, float | None]] = []
        self.over: list[str] = []
        self.notices: list[tuple[str, str]] = []
        self._on_done = on_done

    def expect(self, size: int) -> None:
        self.threads.add(threading.current_thread())
        self.expected += size

    def moved(self, size: int) -> None:
        self.threads.add(threading.current_thread())
        self.sizes.append(size)

    def done(self, item: Download | Upload, stored: Stored) -> None:
        self.threads.add(threading.current_thread())
        assert item.name == stored.name
        self._on_done(stored)
        self.stored.append(stored)

    def retrying(self, item: Download | Upload, why: str, for_s: float | None) -> None:
        self.threads.add(threading.current_thread())
        self.retries.append((item.name, why, for_s))

    def recovered(self, item: Download | Upload) -> None:
        self.threads.add(threading.current_thread())
        self.over.append(item.name)

    def noticed(self, item: Download | Upload, what: str) -> None:
        self.threads.add(threading.current_thread())
        self.notices.append((item.name, what))

    @property
    def names(self) -> set[str]:
        return {stored.name for stored in self.stored}


class Nap:
    """Pauses that take no time, and a clock that believes they did."""

    def __init__(self) -> None:
        self.naps: list[float] = []
        self.now = 1000.0

    def pause(self, seconds: float) -> float:
        self.naps.append(seconds)
        self.now += seconds
        return 0.0

    @property
    def rules(self) -> Rules:
        return Rules(clock=lambda: self.now, pause=self.pause, dice=lambda: 1.0)


@pytest.fixture
def nap() -> Nap:
    """The pauses of the transfers of one test."""
    return Nap()


def transfer(
    policy: UrlPolicy = LOCAL,
    *,
    net: NetSettings | None = None,
    rules: Rules | None = None,
    concurrency: int = 8,
    ranges: int = 8,
    bandwidth_limit: float | None = None,
    cache: Cache | None = None,
    max_host_connections: int = 16,
    max_upload_bytes: int = 5 * 1024**3,
    resolver: Callable[[str], frozenset[str]] | None = None,
    download_budget_s: float = 6 * 3600.0,
    upload_budget_s: float = 7 * 86_400.0,
) -> PresignedTransfer:
    """The real adapter, with sleeps that take no time unless `rules` says otherwise."""
    return PresignedTransfer(
        policy,
        net=net or NetSettings(connect_timeout_s=5.0),
        rules=rules or Nap().rules,
        concurrency=concurrency,
        ranges=ranges,
        bandwidth_limit=bandwidth_limit,
        cache=cache,
        max_host_connections=max_host_connections,
        max_upload_bytes=max_upload_bytes,
        resolver=resolver or (lambda host: frozenset({host})),
        download_budget_s=download_budget_s,
        upload_budget_s=upload_budget_s,
    )


def get(url: str, **headers: str) -> SignedRequest:
    return SignedRequest(Method.GET, url, tuple((key.replace("_", "-"), value) for key, value in headers.items()))


def getting(url: str) -> Callable[[], SignedRequest]:
    """A `sign` that hands out a GET of `url`."""
    return lambda: get(url)


def putting(url: str) -> Callable[[bool], SignedRequest]:
    """A `sign` that hands out a PUT to `url`."""
    return lambda _: SignedRequest(Method.PUT, url)


def wanted(folder: Path, name: str, sign: Callable[[], SignedRequest]) -> Download:
    return Download(name, sign, folder / f"{name}.part")


def produced(
    path: Path,
    sign: Callable[[bool], SignedRequest],
    open_: Callable[[], int] | None = None,
    *,
    reader: Reader | None = None,
) -> Upload:
    """An upload of a file that lies at `path`, as a walk would have seen it. `reader`: of its folder."""
    info = path.stat()
    found = Found((path.name,), info.st_size, info.st_mtime_ns)
    if open_ is None:
        open_ = partial(_reopen, path.parent, found) if reader is None else partial(reader.reopen, found)
    return Upload(path.name, path.name, found.size, found.mtime_ns, open_, sign)


def _reopen(folder: Path, found: Found) -> int:
    try:
        with Reader(folder) as reader:
            return reader.reopen(found)
    except Changed as error:
        raise JobFault(JobReason.BAD_OUTPUT, f"output {found.parts[-1]} changed before it was sent") from error


def sparse(path: Path, size: int) -> Path:
    """A file of zeros that takes no room."""
    with path.open("wb") as file:
        os.truncate(file.fileno(), size)
    return path


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Authority:
    """A certificate authority of the tests' own, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.file = folder / "ca.pem"
        certificate = self._build(self._name, self._key.public_key(), ca=True, days=1, names=[])
        self.file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def server(self, *names: x509.GeneralName, days: int = 1) -> ssl.SSLContext:
        """A server's context with a certificate for `names` (default: 127.0.0.1); negative `days`: expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "storage")])
        given = list(names) or [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        certificate = self._build(subject, key.public_key(), ca=False, days=days, names=given)
        both = self._folder / f"server{x509.random_serial_number()}.pem"
        both.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(both)
        return context

    def _build(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, *, ca: bool, days: int, names: list[x509.GeneralName]
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=3))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody trusts unless told to."""
    return Authority(tmp_path_factory.mktemp("authority"))
