"""The API's own host is trusted by where it was when the worker started, not by its name (FAULTS.md T7)."""

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from jobfetcher import build
from jobfetcher.core.addresses import Kind, OwnHost, class_of, kind_of, literal, plain
from jobfetcher.core.errors import SourceUnavailable, WorkerFault, WorkerReason
from jobfetcher.core.machine import Offer
from jobfetcher.core.urls import UrlPolicy, parse_origin
from jobfetcher.settings import Settings
from jobfetcher.sources.worker_api.client import Client
from tests.support.file_server import FileServer, Object
from tests.support.jobs import Emitted
from tests.support.transfers import Nap, Recorder, get, transfer, wanted

pytestmark = pytest.mark.fault("T7")

PUBLIC, OTHER_PUBLIC, INSIDE, HERE = "93.184.216.34", "8.8.8.8", "192.168.1.9", "127.0.0.1"
METADATA = ["169.254.169.254", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fe80::1", "0.0.0.0"]
POLICY = UrlPolicy(parse_origin("http://api.example"))


class Names:
    """A name server that answers what it is told to, whatever is asked."""

    def __init__(self, *answers: str) -> None:
        self.answers = answers

    def __call__(self, _: str) -> tuple[str, ...]:
        if not self.answers:
            raise OSError("no name server")
        return self.answers


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        running.objects["/in"] = Object(b"of this machine")
        yield running


# -- links to the API's own host --------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", METADATA)
@pytest.mark.parametrize("api", [PUBLIC, INSIDE, HERE, *METADATA])
def test_metadata_is_never_the_apis_own(api: str, address: str) -> None:
    for known in ([api], []):
        with pytest.raises(WorkerFault, match="no file is moved there") as caught:
            POLICY.check_address("api.example", address, known)
        assert caught.value.reason is WorkerReason.STORAGE


@pytest.mark.parametrize(
    ("api", "address", "taken"),
    [
        ([PUBLIC], PUBLIC, True),
        ([PUBLIC], OTHER_PUBLIC, True),
        ([PUBLIC], INSIDE, False),
        ([PUBLIC], HERE, False),
        ([INSIDE], "10.0.0.1", True),
        ([INSIDE], HERE, False),
        ([INSIDE], PUBLIC, False),
        ([HERE], "::1", True),
        ([HERE], INSIDE, False),
        ([PUBLIC, HERE], PUBLIC, True),
        ([PUBLIC, HERE], HERE, False),  # one of its addresses is not enough
        ([PUBLIC, INSIDE], INSIDE, False),
        ([INSIDE, HERE], HERE, False),
    ],
)
def test_a_link_to_the_apis_own_host_goes_where_the_api_is(api: list[str], address: str, taken: bool) -> None:
    if taken:
        POLICY.check_address("api.example", address, api)
    else:
        with pytest.raises(WorkerFault, match="add the host to STORAGE_ALLOW"):
            POLICY.check_address("api.example", address, api)
        named = UrlPolicy(POLICY.api, frozenset({"api.example"}))
        named.check_address("api.example", address, api)


@pytest.mark.parametrize("api", [[PUBLIC, HERE], [PUBLIC, INSIDE], [PUBLIC, "fe80::1"]])
def test_an_api_that_is_inside_in_part_opens_nothing_inside(api: list[str]) -> None:
    for address in (HERE, INSIDE):
        with pytest.raises(WorkerFault, match="internal address"):
            POLICY.check_address("files.example", address, api)


@pytest.mark.parametrize("address", METADATA)
def test_a_name_in_storage_allow_opens_no_metadata(address: str) -> None:
    named = UrlPolicy(POLICY.api, frozenset({"minio.lab", "10.0.0.0/8", "0.0.0.0/0", "::/0", "100.64.0.0/10"}))
    with pytest.raises(WorkerFault):
        named.check_address("minio.lab", address, [HERE])
    for written in (address, f"{address}/{32 if plain(address).version == 4 else 128}"):
        UrlPolicy(POLICY.api, frozenset({written})).check_address(address, address, [HERE])


def test_a_link_is_judged_by_where_the_api_was_at_first(server: FileServer, tmp_path: Path) -> None:
    """The name server answers with this machine later: neither the API's host nor another one is trusted for it."""
    names, nap = Names(PUBLIC), Nap()
    with closing(transfer(POLICY, resolver=names, rules=nap.rules)) as moving:  # type: ignore[arg-type]  # any collection
        for host in ("127.0.0.1", "localhost"):
            with pytest.raises(WorkerFault, match="internal address"):
                moving.download([wanted(tmp_path, "in", lambda host=host: get(server.url("/in", host)))], Recorder())  # type: ignore[misc]  # a default
            names.answers = (HERE,)
            nap.now += 100  # it is looked up anew
    assert server.connections == 0


# -- the API itself ---------------------------------------------------------------------------------------------------


def test_the_api_is_not_asked_where_its_name_leads_inside_later(server: FileServer) -> None:
    names = Names(INSIDE)
    own = OwnHost("api.example", names)
    own.learn()
    names.answers = (HERE,)
    with closing(Client(f"http://api.example:{server.port}", own=own)) as client:
        with pytest.raises(
            SourceUnavailable, match=r"leads to 127\.0\.0\.1, which is loopback, and it was private"
        ) as refused:
            client.ask("/access_info")
        assert not refused.value.sent
        assert "start the worker anew" in str(refused.value)
        assert server.connections == 0


def test_the_worker_asks_nobody_where_its_servers_name_moves_inside(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a worker has it: the first question finds a public server that is away, the second one a lie."""
    names = Names("192.0.2.1")  # documentation: private for us, and nobody is there
    monkeypatch.setattr(build, "resolve", names, raising=False)
    system = socket.getaddrinfo

    def lie(host: str, *rest: Any, **more: Any) -> Any:
        return system(HERE if host == "api.example" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", lie)
    settings = Settings(
        api_url=f"http://api.example:{server.port}", path_base=tmp_path, access_token="t", allow_insecure_http=True
    )
    own = build.make_own_host(settings)
    own.learn()
    names.answers = (HERE,)
    with closing(build.make_source(settings, Emitted(), own)) as source, pytest.raises(SourceUnavailable):
        source.fetch(Offer(1.0, 1000), 0.0)
    assert server.connections == 0


def test_a_server_that_moves_within_its_kind_is_followed(server: FileServer) -> None:
    names = Names("127.0.0.2")
    own = OwnHost("api.example", names)
    own.learn()
    names.answers = ("169.254.169.254", INSIDE, "127.0.0.9", HERE)  # only the last one is answered at
    with closing(Client(f"http://api.example:{server.port}", own=own)) as client:
        reply = client.send("GET", f"http://api.example:{server.port}/in")
    assert (reply.status, reply.body) == (200, b"of this machine")


def test_a_server_that_is_found_to_be_public_is_followed_and_trusted_with_less() -> None:
    """The first answer was that of a hotel's portal, say: no restart is needed, and nothing inside is trusted."""
    names = Names("10.0.0.1")
    own = OwnHost("api.example", names)
    assert (own.resolve(), own.kind) == (["10.0.0.1"], Kind.PRIVATE)
    names.answers = (PUBLIC,)
    assert (own.resolve(), own.kind) == ([PUBLIC], Kind.PUBLIC)
    names.answers = ("10.0.0.1",)
    with pytest.raises(ValueError, match="which is private, and it was public before"):
        own.resolve()
    assert own.addresses == frozenset({PUBLIC})


def test_a_server_that_tls_proves_may_move_inside_and_is_trusted_with_no_more(tmp_path: Path) -> None:
    """A VPN that is switched on: leases go on, and a storage inside is as closed as before."""
    names = Names(PUBLIC)
    settings = Settings(api_url="https://api.example", path_base=tmp_path, access_token="t")
    own = OwnHost("api.example", names, is_proven=True)
    own.learn()
    names.answers = (INSIDE,)
    assert (own.resolve(), own.kind) == ([INSIDE], Kind.PUBLIC)
    names.answers = ("169.254.169.254",)
    with pytest.raises(ValueError, match="it is not asked there"):
        own.resolve()
    policy = build.make_policy(settings)
    policy.check_address("api.example", INSIDE, [PUBLIC], port=443)
    for host, address, port in (
        ("api.example", INSIDE, 8443),
        ("api.example", "169.254.169.254", 443),
        ("files.example", INSIDE, 443),
    ):
        with pytest.raises(WorkerFault):
            policy.check_address(host, address, [PUBLIC], port=port)


def test_an_address_in_api_url_is_its_owners_word(server: FileServer) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        own = OwnHost(host, lambda host: (host,))
        with closing(Client(f"http://{host}:{server.port}", own=own)) as client:
            assert client.send("GET", f"http://{host}:{server.port}/in").status == 200


def test_a_name_without_an_address_is_a_server_that_is_away() -> None:
    own = OwnHost("api.example", Names())
    with closing(Client("http://api.example", own=own)) as client:
        with pytest.raises(SourceUnavailable, match="no name server") as away:
            client.ask("/access_info")
        assert not away.value.sent
    assert own.addresses is None


@pytest.mark.parametrize("first", [("169.254.169.254",), ("fe80::1%eth0", "168.63.129.16")])
def test_a_name_that_leads_to_metadata_from_the_start_is_never_asked(first: tuple[str, ...]) -> None:
    own = OwnHost("api.example", Names(*first))
    with pytest.raises(ValueError, match="is link-local or metadata: it is not asked there"):
        own.resolve()
    assert own.kind is None


# -- what an address is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        (PUBLIC, Kind.PUBLIC),
        ("2606:4700::1111", Kind.PUBLIC),
        (INSIDE, Kind.PRIVATE),
        ("100.64.0.1", Kind.PRIVATE),
        ("fd12::1", Kind.PRIVATE),
        ("127.8.8.8", Kind.LOOPBACK),
        ("::1", Kind.LOOPBACK),
        ("::ffff:127.0.0.1", Kind.LOOPBACK),
        ("0.1.2.3", Kind.NEVER),
        ("::ffff:168.63.129.16", Kind.NEVER),
        *((address, Kind.NEVER) for address in METADATA),
    ],
)
def test_an_address_is_of_one_kind(address: str, kind: Kind) -> None:
    assert kind_of(plain(address)) is kind
    assert class_of([address]) is (None if kind is Kind.NEVER else kind)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "::ffff:7f00:1"]
)
def test_a_number_is_an_address_however_it_is_written(host: str) -> None:
    assert str(literal(host)) == HERE


@pytest.mark.parametrize(
    "host", ["localhost", "1.example", "0xg", "a.b", "", "127.0.0.1.example", "1.2.3.4.5", "b\xfcro"]
)
def test_a_name_is_no_address(host: str) -> None:
    assert literal(host) is None
