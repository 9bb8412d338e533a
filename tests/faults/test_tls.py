"""TLS that fails, in words for who can mend it; and proxies that count for some addresses only (FAULTS.md T20, B20)."""

import datetime
import ipaddress
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from jobfetcher.certificates import read_certificates
from jobfetcher.core.errors import SourceUnavailable, WorkerFault
from jobfetcher.core.hosts import Proxies
from jobfetcher.core.tls import apart, in_words
from jobfetcher.core.urls import UrlPolicy, parse_origin
from jobfetcher.transfer.exchange import NetSettings
from tests.support.file_server import Act, FileServer, Object
from tests.support.http_proxy import HttpProxy, running_http_proxy
from tests.support.services import require_program
from tests.support.talk import TOKEN, client_of
from tests.support.transfers import Authority, Recorder, getting, transfer, wanted

DAY = 86_400.0


def complaint(url: str, **settings: str | Proxies | None) -> str:
    """What a person reads when the API cannot be asked at `url`."""
    client = client_of(url, **settings)
    with pytest.raises(SourceUnavailable) as error:
        client.request("GET", "/jobs")
    client.close()
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# -- words for the API ------------------------------------------------------------------------------------------------


@pytest.mark.fault("T20")
def test_an_unknown_authority_is_a_matter_of_ca_file(authority: Authority) -> None:
    with FileServer(tls=authority.server()) as server:
        said = complaint(f"https://127.0.0.1:{server.port}")
        assert "name its certificate in CA_FILE" in said
        assert server.seen == []


@pytest.mark.fault("T20")
def test_an_intermediate_that_the_server_leaves_out_is_named(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    with FileServer(tls=chain.server(whole=True)) as server:
        server.objects["/jobs"] = Object(b"{}")
        client = client_of(f"https://127.0.0.1:{server.port}", ca_file=str(chain.root))
        assert client.request("GET", "/jobs").body == b"{}"
        client.close()
    with FileServer(tls=chain.server(whole=False)) as server:
        said = complaint(f"https://127.0.0.1:{server.port}", ca_file=str(chain.root))
        assert "the server does not send its intermediate certificate" in said


@pytest.mark.fault("T20")
@pytest.mark.parametrize(
    ("off_s", "told"),
    [
        (0.0, "it agrees with the server's"),
        (400 * DAY, "it is 400 days ahead of the server's"),
        (7500, "2 hours ahead"),
    ],
)
def test_an_expired_certificate_says_how_far_the_clock_is_off(
    authority: Authority, monkeypatch: pytest.MonkeyPatch, off_s: float, told: str
) -> None:
    with FileServer(tls=authority.server(days=-1)) as server:
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        server.always = Act(status=200, headers={"Date": date})
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + off_s)
        said = complaint(f"https://127.0.0.1:{server.port}", ca_file=str(authority.file))
        assert "its certificate has expired, by this machine's clock" in said
        assert told in said
        assert [seen.method for seen in server.seen] == ["HEAD"]
        assert TOKEN not in str(server.seen)


@pytest.mark.fault("T20")
def test_a_clock_that_is_behind_says_by_how_much(tmp_path: Path) -> None:
    """The certificate begins in a month, and by the server's clock a month and a day have gone by."""
    chain = Chain(tmp_path, begins_in_days=30)
    with FileServer(tls=chain.server(whole=True)) as server:
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 31 * DAY))
        server.always = Act(status=200, headers={"Date": date})
        said = complaint(f"https://127.0.0.1:{server.port}", ca_file=str(chain.root))
        assert "its certificate is not valid yet, by this machine's clock; set the clock" in said
        assert "(it is 31 days behind the server's)" in said
        server.always = Act(status=200, headers={"Date": "soon"})
        said = complaint(f"https://127.0.0.1:{server.port}", ca_file=str(chain.root))
        assert "set the clock: " in said  # a server that does not know the time is of no help


@pytest.mark.fault("T20")
def test_the_time_is_not_asked_of_somebody_else(authority: Authority, tmp_path: Path) -> None:
    """A certificate that is wrong in another way as well is nobody's word about the time."""
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")
    with FileServer(tls=authority.server(days=-1)) as server:
        client = client_of(f"https://127.0.0.1:{server.port}", ca_file=str(other.file))
        assert client._transport.server_time(httpx.URL(client.base_url)) is None
        client.close()
        assert server.seen == []


@pytest.mark.fault("T20")
def test_another_name_is_told(authority: Authority) -> None:
    with FileServer(tls=authority.server(x509.DNSName("other.example"))) as server:
        said = complaint(f"https://127.0.0.1:{server.port}", ca_file=str(authority.file))
        assert "its certificate is for another name" in said


def test_plain_http_on_a_port_for_https_and_the_other_way_round(authority: Authority) -> None:
    with plain_server() as port:
        assert "https:// must be http:// there" in complaint(f"https://127.0.0.1:{port}")
    with FileServer() as server:  # some say nothing to what they cannot read
        assert "there may be plain http on this port" in complaint(f"https://127.0.0.1:{server.port}")
    with FileServer(tls=authority.server()) as server:
        assert "the address must begin with https://" in complaint(f"http://127.0.0.1:{server.port}")


@pytest.mark.fault("T20")
def test_certificates_in_any_form_are_trusted_by_both_libraries(authority: Authority, tmp_path: Path) -> None:
    pem = authority.file.read_text()
    with FileServer(tls=authority.server()) as server:
        server.objects["/jobs"], server.objects["/in"] = Object(b"{}"), Object(b"content")
        client = client_of(f"https://127.0.0.1:{server.port}", ca_pem=pem)
        assert client.request("GET", "/jobs").body == b"{}"
        client.close()
        moving = transfer(net=NetSettings(ca_pem=pem))
        moving.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
        moving.close()


@pytest.mark.fault("T20")
def test_a_directory_of_certificates_is_trusted_by_both_libraries(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its files where CA_FILE or REQUESTS_CA_BUNDLE names it, by OpenSSL's names for them with SSL_CERT_DIR."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    (folder / "lab.pem").write_bytes(authority.file.read_bytes())
    pem = read_certificates(folder).pem
    with FileServer(tls=authority.server()) as server:
        server.objects["/jobs"], server.objects["/in"] = Object(b"{}"), Object(b"content")

        def ask_both(ca_pem: str | None, name: str) -> None:
            client = client_of(f"https://127.0.0.1:{server.port}", ca_pem=ca_pem)
            assert client.request("GET", "/jobs").body == b"{}"
            client.close()
            moving = transfer(net=NetSettings(ca_pem=ca_pem))
            moving.download([wanted(tmp_path, name, getting(server.url("/in")))], Recorder())
            moving.close()

        ask_both(pem, "named")
        subprocess.run([require_program("openssl", "openssl"), "rehash", folder], check=True)
        assert read_certificates(folder).pem == pem
        monkeypatch.setenv("SSL_CERT_DIR", str(folder))
        ask_both(None, "found")


# -- words for the storage --------------------------------------------------------------------------------------------


@pytest.mark.fault("T20")
def test_a_storage_that_cannot_be_trusted_is_told_in_the_same_words(authority: Authority, tmp_path: Path) -> None:
    for context, ca_file, told in (
        (authority.server(), None, "name its certificate in CA_FILE"),
        (authority.server(days=-1), authority.file, "its certificate has expired, by this machine's clock"),
        (authority.server(x509.DNSName("other.example")), authority.file, "its certificate is for another name"),
    ):
        with FileServer(tls=context) as server:
            moving, watch = transfer(net=NetSettings(ca_file=ca_file), download_budget_s=600.0), Recorder()
            with pytest.raises(WorkerFault) as fault:
                moving.download([wanted(tmp_path, "in", getting(server.url("/in")))], watch)
            moving.close()
            assert told in str(fault.value)
            assert [told in why for _, why, _ in watch.retries] == [True]  # it waits, and its owner hears at once why


def test_a_storage_without_tls_on_its_port_is_told(tmp_path: Path) -> None:
    with plain_server() as port:
        moving = transfer(net=NetSettings(), download_budget_s=0.3)
        with pytest.raises(WorkerFault, match="there is plain http on this port and no TLS"):
            moving.download([wanted(tmp_path, "in", getting(f"https://127.0.0.1:{port}/in"))], Recorder())
        moving.close()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate is not yet valid (_ssl.c:1006)",
            "clock",
        ),
        ("SSL certificate problem: certificate is not yet valid", "clock"),
        ("SSL certificate problem: self-signed certificate in certificate chain", "CA_FILE"),
        ("SSL certificate problem: unable to verify the first certificate", "intermediate"),
        ("[SSL: UNSUPPORTED_PROTOCOL] unsupported protocol (_ssl.c:1006)", "old versions of TLS"),
        ("TLS connect error: error:0A000126:SSL routines::unexpected eof while reading", "hung up"),
        ("Connection refused", ""),
    ],
)
def test_what_openssl_says_has_a_meaning(said: str, told: str) -> None:
    assert told in in_words(said)
    assert bool(in_words(said)) is bool(told)


def test_a_difference_of_clocks_is_coarse() -> None:
    assert [apart(seconds) for seconds in (5, 61, 7300, 86_500, 10 * DAY)] == [
        "less than a minute", "1 minute", "2 hours", "1 day", "10 days",
    ]  # fmt: skip


@contextmanager
def plain_server() -> Iterator[int]:
    """Answers what it cannot read as nginx and Apache do, in plain http; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    if not connection.recv(65_536):
                        return
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        port = int(listener.getsockname()[1])
        try:
            yield port
        finally:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()  # one that sends nothing ends it
            thread.join(5)


class Chain:
    """An authority, an intermediate one, and a server's certificate that the latter issued."""

    def __init__(self, folder: Path, begins_in_days: int = -1) -> None:
        self._folder = folder
        keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]
        names = [
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("root", "intermediate", "server")
        ]
        now = datetime.datetime.now(datetime.UTC)
        self._pem = []
        for number, issuer in enumerate((0, 0, 1)):
            builder = (
                x509.CertificateBuilder()
                .subject_name(names[number])
                .issuer_name(names[issuer])
                .public_key(keys[number].public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now + datetime.timedelta(days=begins_in_days))
                .not_valid_after(now + datetime.timedelta(days=begins_in_days + 10))
                .add_extension(x509.BasicConstraints(ca=number < 2, path_length=None), critical=True)
                .add_extension(
                    x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
                )
            )
            certificate = builder.sign(keys[issuer], hashes.SHA256())
            self._pem.append(certificate.public_bytes(serialization.Encoding.PEM))
        self._key = keys[2].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self.root = folder / "root.pem"
        self.root.write_bytes(self._pem[0])

    def server(self, *, whole: bool) -> ssl.SSLContext:
        """The server's context; `whole`: it sends the intermediate certificate along, as it should."""
        path = self._folder / f"server-{whole}.pem"
        path.write_bytes(self._key + self._pem[2] + (self._pem[1] if whole else b""))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


# -- proxies for some addresses ---------------------------------------------------------------------------------------


@pytest.fixture
def proxy() -> Iterator[HttpProxy]:
    with running_http_proxy() as running:
        yield running


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes a name lead to an address on this machine, for a proxy's sake: of its own addresses none is used."""
    known: dict[str, str] = {}
    ask = socket.getaddrinfo

    def getaddrinfo(host: str, *more: object, **named: object) -> object:
        return ask(known.get(host, host), *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return lambda name, address: known.update({name: address})


@pytest.mark.fault("B20")
@pytest.mark.fault("T8")
def test_the_api_is_asked_through_the_proxy_for_its_scheme(
    authority: Authority, proxy: HttpProxy, by_name: Callable[[str, str], None]
) -> None:
    by_name("api.example", "127.0.0.1")
    with FileServer(tls=authority.server(x509.DNSName("api.example"))) as server:
        server.objects["/jobs"] = Object(b"{}")
        url = f"https://api.example:{server.port}"
        ca_file = str(authority.file)
        for proxies, asked in (
            (Proxies(http=proxy.url), 0),
            (Proxies(https=proxy.url, without=("api.example",)), 0),
            (Proxies(https=proxy.url), 1),
            (Proxies.everything_through(proxy.url), 2),
        ):
            client = client_of(url, ca_file=ca_file, proxy=proxies)
            assert client.request("GET", "/jobs").body == b"{}"
            client.close()
            assert proxy.asked == [f"CONNECT api.example:{server.port}"] * asked
    assert TOKEN not in "".join(proxy.heads)


@pytest.mark.fault("B20")
@pytest.mark.fault("T7")
def test_files_go_through_the_proxy_of_the_environment_as_its_rules_say(tmp_path: Path) -> None:
    """One worker and its warm connections: a storage through the proxy, one of this machine, one that is refused."""
    policy = UrlPolicy(parse_origin("http://api.example"), frozenset({"127.0.0.1"}))
    addresses = {"inside.example": "169.254.169.254", "api.example": "93.184.216.34", "127.0.0.1": "127.0.0.1"}
    with FileServer() as proxy, FileServer() as direct:
        proxy.always = Act(status=200, body=b"through the proxy")
        direct.objects["/in"] = Object(b"directly")
        moving = transfer(
            policy,
            net=NetSettings(proxy=Proxies(http=proxy.url(""))),
            resolver=lambda host: frozenset({addresses.get(host, "93.184.216.34")}),
        )
        for number in range(3):
            for url, content in (
                ("http://files.example/in?X-Sig=a%2fb", b"through the proxy"),
                (direct.url("/in?X-Sig=a%2fb"), b"directly"),
            ):
                item = wanted(tmp_path, f"in{number}-{len(content)}", getting(url))
                moving.download([item], Recorder())
                assert item.part.read_bytes() == content
        with pytest.raises(WorkerFault, match="internal address"):
            moving.download([wanted(tmp_path, "x", getting("http://inside.example/latest/meta-data"))], Recorder())
        moving.close()
    assert [seen.target for seen in proxy.seen] == ["http://files.example/in?X-Sig=a%2fb"] * 3
    assert [seen.target for seen in direct.seen] == ["/in?X-Sig=a%2fb"] * 3  # as it was signed, byte for byte
