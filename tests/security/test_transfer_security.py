"""What a hostile storage or network gets out of the transfer: nothing (FAULTS.md T7, T8, T16, T20, T22)."""

import contextlib
import gzip
import itertools
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest

from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.urls import Method, SignedRequest, UrlPolicy, parse_origin
from jobfetcher.transfer.exchange import NetSettings
from tests.security.impostors import IMPOSTORS
from tests.support.file_server import Act, FileServer, Object, Seen
from tests.support.transfers import (
    LOCAL,
    Authority,
    Nap,
    Recorder,
    get,
    getting,
    produced,
    putting,
    transfer,
    wanted,
)

CANARY = "canary-3f1c"

#: An API in the open: nothing on this machine or in its network is any of its business.
OPEN = UrlPolicy(api=parse_origin("http://api.example"))
#: The API's host and a storage host that both are this machine, told apart by their names.
NAMED = UrlPolicy(api=parse_origin("http://api.example"), storage_allow=frozenset({"127.0.0.1"}))


def public(_: str) -> frozenset[str]:
    return frozenset({"93.184.216.34"})


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        running.objects["/in"] = Object(b"secret of this machine")
        yield running


def download(policy: UrlPolicy, url: str, folder: Path, **settings: object) -> Recorder:
    watch = Recorder()
    with closing(transfer(policy, resolver=public, download_budget_s=30, **settings)) as moving:  # type: ignore[arg-type]  # passed on
        moving.download([wanted(folder, "in", getting(url))], watch)
    return watch


# --- T7: where it connects to


@pytest.mark.fault("T7")
@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "localhost.",
        "LOCALHOST",
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "0",
        "0.0.0.0",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::ffff:0.0.0.0]",
        "[0:0:0:0:0:ffff:7f00:0001]",
    ],
)
def test_no_spelling_of_this_machine_is_connected_to(server: FileServer, tmp_path: Path, host: str) -> None:
    with pytest.raises(WorkerFault, match="internal address") as caught:
        download(OPEN, server.url("/in", host), tmp_path)
    assert caught.value.reason is WorkerReason.STORAGE
    assert server.connections == 0
    assert not any(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.fault("T7")
def test_an_upload_does_not_connect_there_either(server: FileServer, tmp_path: Path) -> None:
    (path := tmp_path / "out").write_bytes(b"out")
    for method in (Method.PUT, Method.POST):
        request = SignedRequest(method, server.url("/up"))
        with closing(transfer(OPEN, resolver=public)) as moving, pytest.raises(WorkerFault, match="internal address"):
            moving.upload([produced(path, lambda _, request=request: request)], Recorder())  # type: ignore[misc]  # a default
    assert server.connections == 0


@pytest.mark.fault("T7")
def test_ipv6_loopback_is_not_connected_to(tmp_path: Path) -> None:
    try:
        six = FileServer("::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    with six, pytest.raises(WorkerFault, match="internal address ::1"):
        download(OPEN, six.url("/in", "[::1]"), tmp_path)
    assert six.connections == 0


@pytest.mark.fault("T7")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target", ["http://localhost:{port}/in", "//localhost:{port}/in", "http://2130706433:{port}/in"]
)
def test_a_redirect_to_this_machine_is_not_followed(
    server: FileServer, tmp_path: Path, status: int, target: str
) -> None:
    with FileServer() as storage:
        storage.script("/in", Act(status=status, headers={"Location": target.format(port=server.port)}))
        with pytest.raises(WorkerFault, match="internal address"):
            download(NAMED, storage.url("/in"), tmp_path)
        assert len(storage.seen) == 1
    assert server.connections == 0


@pytest.mark.fault("T7")
@pytest.mark.fault("C6")
@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/in", "http://a@127.0.0.1/in", "http://[/", "gopher://x/"]
)
def test_a_redirect_to_no_web_address_is_refused(server: FileServer, tmp_path: Path, location: str) -> None:
    server.script("/in", Act(status=302, headers={"Location": location}))
    with pytest.raises(JobFault) as caught:
        download(LOCAL, server.url("/in"), tmp_path, net=NetSettings())
    assert caught.value.reason is JobReason.UNSAFE_REQUEST
    assert len(server.seen) == 1


@pytest.mark.fault("T7")
def test_a_name_whose_address_moves_is_judged_by_the_address_connected_to(server: FileServer, tmp_path: Path) -> None:
    """DNS rebinding: our own look-up says public, libcurl's says loopback; the connected address counts."""
    with pytest.raises(WorkerFault, match="internal address"):
        download(OPEN, server.url("/in", "localhost"), tmp_path)
    assert server.connections == 0


@pytest.mark.fault("T7")
def test_while_the_apis_own_address_is_unknown_nothing_internal_is_connected_to(
    server: FileServer, tmp_path: Path
) -> None:
    answers: list[frozenset[str] | OSError] = [OSError("no name server"), OSError("no"), frozenset({"127.0.0.1"})]

    def resolver(_: str) -> frozenset[str]:
        seen_at_answer.append(server.connections)
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    seen_at_answer: list[int] = []
    with closing(transfer(OPEN, resolver=resolver)) as moving:
        moving.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
    assert seen_at_answer == [0, 0, 0]
    assert server.connections == 1


@pytest.mark.fault("T7")
def test_the_apis_address_is_asked_for_once_a_minute(server: FileServer, tmp_path: Path) -> None:
    nap, asked = Nap(), 0

    def resolver(host: str) -> frozenset[str]:
        nonlocal asked
        assert host == "api.example"
        asked += 1
        return frozenset({"127.0.0.1"})

    with closing(transfer(OPEN, resolver=resolver, rules=nap.rules)) as moving:
        for expected in (1, 1, 2):
            moving.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
            assert asked == expected
            nap.now += 40


@pytest.mark.fault("T7")
def test_an_address_that_cannot_be_found_is_asked_for_once_a_second_however_many_wait(
    server: FileServer, tmp_path: Path
) -> None:
    """A look-up may take ten seconds to fail, and files that wait for it wait one after the other."""
    nap, asked = Nap(), list[float]()

    def resolver(_: str) -> frozenset[str]:
        asked.append(nap.now)
        if nap.now < 1005:
            raise OSError("no name server")
        return frozenset({"127.0.0.1"})

    items = [wanted(tmp_path, f"in{number}", getting(server.url("/in"))) for number in range(40)]
    watch = Recorder()
    with closing(transfer(OPEN, resolver=resolver, rules=nap.rules)) as moving:
        moving.download(items, watch)
    assert len(watch.stored) == 40
    assert len(asked) > 1
    assert all(later - earlier >= 1 for earlier, later in itertools.pairwise(asked))


@pytest.mark.fault("T7")
def test_through_a_proxy_an_internal_name_is_not_asked_for(server: FileServer, tmp_path: Path) -> None:
    with FileServer() as proxy, ExitStack() as stack:
        proxy.script("http://files.example:80/in", Act(status=200, body=b"through the proxy"))

        def resolver(host: str) -> frozenset[str]:
            return frozenset({"127.0.0.1" if host == "localhost" else "93.184.216.34"})

        net = NetSettings(proxy=proxy.url("/"))
        moving = stack.enter_context(closing(transfer(OPEN, net=net, resolver=resolver)))
        with pytest.raises(WorkerFault, match="internal address"):
            moving.download([wanted(tmp_path, "in", getting(server.url("/in", "localhost")))], Recorder())
        assert (proxy.connections, server.connections) == (0, 0)
        proxy.always = Act(status=200, body=b"through the proxy")
        moving.download([wanted(tmp_path, "in", getting("http://files.example/in"))], Recorder())
        assert proxy.seen[0].target == "http://files.example/in"
    assert (tmp_path / "in.part").read_bytes() == b"through the proxy"


@pytest.mark.fault("T7")
@pytest.mark.fault("T8")
def test_proxies_netrc_and_cookies_of_the_machine_are_not_used(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text(f"default login me password {CANARY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    with FileServer() as trap:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, trap.url("/"))
        server.script("/in", Act(headers={"Set-Cookie": f"a={CANARY}"}))
        download(LOCAL, server.url("/in"), tmp_path)
        download(LOCAL, server.url("/in"), tmp_path)
        assert trap.connections == 0
    for seen in server.seen:
        assert CANARY not in str(seen.headers)
        assert seen.header("cookie") is None
        assert seen.header("authorization") is None


# --- C6, T8: what goes along


@pytest.mark.fault("T8")
def test_nothing_but_the_signed_headers_goes_out(server: FileServer, tmp_path: Path) -> None:
    request = get(server.url("/in"), x_amz_meta_a="b")
    with closing(transfer()) as moving:
        moving.download([wanted(tmp_path, "in", lambda: request)], Recorder())
    assert {name.lower(): value for name, value in server.seen[0].headers} == {
        "host": f"127.0.0.1:{server.port}",
        "user-agent": "jobfetcher",
        "accept": "*/*",
        "accept-encoding": "identity",
        "x-amz-meta-a": "b",
    }


def _names(seen: Seen) -> set[str]:
    return {name.lower() for name, _ in seen.headers}


@pytest.mark.fault("T8")
def test_a_warm_connection_carries_nothing_from_one_download_to_the_next(server: FileServer, tmp_path: Path) -> None:
    content = b"0123456789" * 20_000
    server.objects["/long"] = Object(content)
    server.script("/long", Act(cut=100_000))  # it is resumed: Range and If-Range
    server.script("/away", Act(status=302, headers={"Location": "/in"}))
    with closing(transfer(max_host_connections=1)) as moving:  # one handle does it all
        for number, request in enumerate(
            [
                get(server.url("/long?secret"), Authorization=f"Bearer {CANARY}", x_amz_security_token=CANARY),
                get(server.url("/away"), x_amz_meta_a=CANARY),
                get(server.url("/in")),
            ]
        ):
            moving.download([wanted(tmp_path, f"in{number}", partial(_same, request))], Recorder())
        (tmp_path / "out").write_bytes(b"")
        moving.upload([produced(tmp_path / "out", putting(server.url("/out")))], Recorder())
        moving.download([wanted(tmp_path, "in3", getting(server.url("/in")))], Recorder())
    base = {"host", "user-agent", "accept", "accept-encoding"}
    cut, resumed, away, followed, plain, put, last = server.seen
    assert _names(resumed) == _names(cut) | {"range", "if-range"}
    assert _names(away) == base | {"x-amz-meta-a"}
    assert [(_names(seen), seen.target, seen.body) for seen in (followed, plain, last)] == [(base, "/in", b"")] * 3
    assert (put.method, put.body, _names(put)) == ("PUT", b"", {*base, "content-length"})
    assert len({seen.connection for seen in (resumed, away, followed, plain, put, last)}) == 1
    assert [(tmp_path / f"in{number}.part").read_bytes() for number in (1, 2, 3)] == [b"secret of this machine"] * 3


@pytest.mark.fault("T8")
@pytest.mark.parametrize("method", [Method.PUT, Method.POST])
def test_a_warm_connection_carries_nothing_from_one_upload_to_the_next(
    server: FileServer, tmp_path: Path, method: Method
) -> None:
    (tmp_path / "long").write_bytes(CANARY.encode() * 50_000)
    (tmp_path / "short").write_bytes(b"short")
    final = b"<Error><Code>KeyTooLongError</Code><Message>too long</Message></Error>"
    server.script("/up", Act(status=400, body=final))  # the end, after the body has gone
    key = (("key", "${filename}"),)
    first = SignedRequest(method, server.url("/up"), (("x-amz-meta-a", CANARY),), (*key, ("policy", CANARY)))
    second = SignedRequest(method, server.url("/up"), fields=key)
    with closing(transfer(max_host_connections=1)) as moving:
        with pytest.raises(JobFault, match="the storage refuses it"):
            moving.upload([produced(tmp_path / "long", lambda _: first)], Recorder())
        moving.upload([produced(tmp_path / "short", lambda _: second)], Recorder())
    *refused, stored = server.seen
    assert all(seen.header("x-amz-meta-a") == CANARY for seen in refused)
    assert CANARY not in str(stored)
    assert stored.connection == refused[-1].connection
    sent = stored.body if method is Method.PUT else stored.form()[-1][2]
    assert sent == b"short"
    assert int(stored.header("content-length") or 0) == len(stored.body)


@pytest.mark.fault("T7")
def test_a_warm_connection_checks_the_next_address_as_the_first(server: FileServer, tmp_path: Path) -> None:
    with closing(transfer(NAMED, resolver=public, max_host_connections=1)) as moving:
        moving.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
        with pytest.raises(WorkerFault, match="storage host localhost has the internal address"):
            moving.download([wanted(tmp_path, "again", getting(server.url("/in", host="localhost")))], Recorder())
        moving.download([wanted(tmp_path, "last", getting(server.url("/in")))], Recorder())
    assert [seen.connection for seen in server.seen] == [1, 1]


def _same(request: SignedRequest) -> SignedRequest:
    return request


@pytest.mark.fault("C6")
@pytest.mark.fault("T8")
def test_a_redirect_is_followed_without_the_headers_but_with_the_range(server: FileServer, tmp_path: Path) -> None:
    content = b"0123456789" * 20_000
    with FileServer() as other:
        other.objects["/there"] = Object(content)
        other.script("/there", Act(cut=100_000))
        for _ in range(2):
            server.script("/in", Act(status=302, headers={"Location": "/on"}))
            server.script("/on", Act(status=307, headers={"Location": other.url("/there")}))
        request = get(server.url("/in"), Authorization=f"Bearer {CANARY}", x_amz_security_token=CANARY)
        with closing(transfer()) as moving:
            moving.download([wanted(tmp_path, "in", lambda: request)], Recorder())
        assert (tmp_path / "in.part").read_bytes() == content
        assert [seen.header("range") for seen in other.seen] == [None, "bytes=100000-"]
        assert CANARY not in str([seen.headers for seen in other.seen])
        assert CANARY not in str([seen.headers for seen in server.requests("/on")])
        assert all(seen.header("authorization") == f"Bearer {CANARY}" for seen in server.requests("/in"))


@pytest.mark.fault("C6")
def test_redirects_end_after_three(server: FileServer, tmp_path: Path) -> None:
    server.script("/in", *(Act(status=302, headers={"Location": "/in"}) for _ in range(3)))
    download(LOCAL, server.url("/in"), tmp_path)
    assert len(server.seen) == 4
    server.always = Act(status=302, headers={"Location": "/in"})
    with pytest.raises(WorkerFault, match="redirects more than 3 times"):
        download(LOCAL, server.url("/in"), tmp_path)
    assert len(server.seen) == 8


@pytest.mark.fault("C6")
@pytest.mark.parametrize("method", [Method.PUT, Method.POST])
def test_an_upload_is_never_redirected(server: FileServer, tmp_path: Path, method: Method) -> None:
    (path := tmp_path / "out").write_bytes(CANARY.encode())
    with FileServer() as other:
        server.script("/up", Act(status=307, headers={"Location": other.url("/up")}))
        request = SignedRequest(method, server.url("/up"))
        server.always = server.scripts["/up"][0]  # a portal's redirect may go away, so it is tried again for a while
        made = transfer(upload_budget_s=120)
        with closing(made) as moving, pytest.raises(WorkerFault, match="redirects an upload") as caught:
            moving.upload([produced(path, lambda _: request)], Recorder())
        assert other.connections == 0
    assert caught.value.reason is WorkerReason.STORAGE


def test_a_signed_path_is_asked_for_byte_by_byte(server: FileServer, tmp_path: Path) -> None:
    path = "/a//b/../c/./%2e%2E/d+e~'(x)?X-Sig=a%2Fb==&q={1,2}[3]|^`"
    server.objects[path.partition("?")[0]] = Object(b"x")
    download(LOCAL, server.url(path), tmp_path)
    assert server.seen[0].target == path


# --- T16, T22: what comes back


@pytest.mark.fault("T16")
@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "gzip, identity", "GZIP", "zstd, aws-chunked", "x-gzip"])
def test_a_compressed_reply_is_refused(server: FileServer, tmp_path: Path, encoding: str) -> None:
    bomb = gzip.compress(bytes(20 * 2**20))
    server.objects["/in"] = Object(bomb)
    server.script("/in", Act(headers={"Content-Encoding": encoding}))
    with pytest.raises(JobFault, match="Content-Encoding") as caught:
        download(LOCAL, server.url("/in"), tmp_path)
    assert caught.value.reason is JobReason.INPUT_CORRUPT
    assert len(str(caught.value)) < 300
    assert not any(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.fault("T16")
def test_a_compressed_file_without_the_header_stays_as_it_is(server: FileServer, tmp_path: Path) -> None:
    server.objects["/in"] = Object(gzip.compress(bytes(1000)))
    server.script("/in", Act(headers={"Content-Encoding": "aws-chunked", "Content-Type": "application/gzip"}))
    download(LOCAL, server.url("/in"), tmp_path)
    assert (tmp_path / "in.part").read_bytes() == server.objects["/in"].content


@pytest.mark.fault("T22")
@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"' + "x" * 60_000 + '"'},
        {"ETag": '"a\x01b"'},
        {"ETag": "\xff\xfe"},
        {f"X-Many-{number}": "y" * 1000 for number in range(250)},
        {"x-amz-checksum-sha256": "A" * 50_000},
        {"Content-Type": "\x1b]52;c;x\x07"},
    ],
    ids=["long", "control", "bytes", "many", "checksum", "escape"],
)
def test_headers_made_to_hurt_do_not(server: FileServer, tmp_path: Path, headers: dict[str, str | None]) -> None:
    server.script("/in", Act(headers=headers))
    watch = download(LOCAL, server.url("/in"), tmp_path)
    assert (tmp_path / "in.part").read_bytes() == server.objects["/in"].content
    assert len(watch.stored[0].etag) <= 202
    assert watch.stored[0].etag.isascii()
    assert watch.stored[0].etag.isprintable()


@pytest.mark.fault("T22")
@pytest.mark.parametrize(
    "headers",
    [
        {f"X-Many-{number}": "y" * 10_000 for number in range(200)},
        {"Content-Length": "-5"},
        {"Content-Length": "22, 23"},
        {"Content-Length": "1e3"},
        {"Transfer-Encoding": "gzip, chunked"},
    ],
    ids=["2 MB", "negative", "two", "float", "coding"],
)
def test_a_reply_that_is_no_http_is_tried_again(
    server: FileServer, tmp_path: Path, headers: dict[str, str | None]
) -> None:
    server.script("/in", Act(headers=headers))
    download(LOCAL, server.url("/in"), tmp_path)
    assert (tmp_path / "in.part").read_bytes() == server.objects["/in"].content
    assert len(server.seen) == 2


@pytest.mark.fault("T22")
def test_an_error_page_without_end_is_not_read_to_its_end(server: FileServer, tmp_path: Path) -> None:
    server.script("/in", Act(status=404, headers={"Content-Length": str(10**12)}, body=b"x" * 2_000_000))
    with pytest.raises(JobFault, match="input in not found") as caught:
        download(LOCAL, server.url("/in"), tmp_path)
    assert len(str(caught.value)) < 400


@pytest.mark.fault("T22")
@pytest.mark.parametrize(
    ("begin", "again"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X-Header: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n", b"X-Trailer: y\r\n"),
    ],
    ids=["interim replies", "headers", "trailers"],
)
def test_header_lines_without_end_are_not_kept(tmp_path: Path, begin: bytes, again: bytes) -> None:
    sent = 0

    def serve() -> None:
        nonlocal sent
        with contextlib.suppress(OSError):  # the client leaves
            while True:
                connection, _ = listener.accept()
                with contextlib.suppress(OSError), connection:
                    connection.recv(65_536)
                    connection.sendall(begin)
                    while sent < 2**30:
                        sent += len(again) * 1000
                        connection.sendall(again * 1000)

    with socket.create_server(("127.0.0.1", 0)) as listener, closing(transfer(download_budget_s=1)) as moving:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/in"
        with pytest.raises(WorkerFault) as caught:
            moving.download([wanted(tmp_path, "in", getting(url))], Recorder())
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    assert caught.value.reason is WorkerReason.STORAGE
    assert sent < 256 * 2**20


# --- T20: who is there


HTTPS = UrlPolicy(api=parse_origin("https://127.0.0.1:1"))


@pytest.mark.fault("T20")
def test_a_server_with_a_certificate_of_the_given_authority_is_trusted(authority: Authority, tmp_path: Path) -> None:
    (path := tmp_path / "out").write_bytes(b"x" * 3_000_000)
    with FileServer(tls=authority.server()) as server:
        server.objects["/in"] = Object(b"y" * 3_000_000)
        with closing(transfer(HTTPS, net=NetSettings(ca_file=authority.file))) as moving:
            moving.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
            moving.upload([produced(path, putting(server.url("/up")))], Recorder())
        assert (tmp_path / "in.part").read_bytes() == b"y" * 3_000_000
        assert server.objects["/up"].content == b"x" * 3_000_000


@pytest.mark.fault("T20")
@IMPOSTORS
def test_a_server_that_is_not_who_it_says_is_sent_nothing(
    authority: Authority, tmp_path: Path, made: Callable[[Authority], ssl.SSLContext], trusted: bool
) -> None:
    with FileServer(tls=made(authority)) as server:
        server.objects["/in"] = Object(b"in")
        net = NetSettings(ca_file=authority.file if trusted else None)
        with closing(transfer(HTTPS, net=net, download_budget_s=1)) as moving, pytest.raises(WorkerFault) as caught:
            moving.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
        assert caught.value.reason is WorkerReason.STORAGE
        assert server.seen == []


@pytest.mark.fault("T20")
@pytest.mark.fault("C6")
def test_a_redirect_out_of_encryption_is_refused(authority: Authority, server: FileServer, tmp_path: Path) -> None:
    policy = UrlPolicy(api=parse_origin("https://api.example"), storage_allow=frozenset({"127.0.0.1"}))
    with FileServer(tls=authority.server()) as secure:
        secure.script("/in", Act(status=302, headers={"Location": server.url("/in")}))
        with pytest.raises(WorkerFault, match="without encryption"):
            download(policy, secure.url("/in"), tmp_path, net=NetSettings(ca_file=authority.file))
    assert server.connections == 0
