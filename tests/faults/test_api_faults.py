"""What a server, a proxy and a network can do to single calls: too much, too slow, too late, or by another way."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509

from jobfetcher.core.errors import (
    ConfigError,
    SourceError,
    SourceRefused,
    SourceUnavailable,
    UnreadableJob,
    WorkerFault,
)
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import parse_job_id
from jobfetcher.core.machine import Offer
from jobfetcher.core.phases import Phase
from jobfetcher.core.urls import UrlPolicy, parse_origin
from jobfetcher.heartbeat import ASKED_MOST_S, RETRY_S, beating
from jobfetcher.sources.worker_api.client import BODY_BYTES, Client
from jobfetcher.sources.worker_api.reply import Reply, failure, is_definite
from jobfetcher.sources.worker_api.source import Filter, WorkerApi
from jobfetcher.transfer.exchange import NetSettings
from tests.support.file_server import Act, FileServer, Object
from tests.support.http_proxy import HttpProxy, running_http_proxy
from tests.support.jobs import Emitted, FakeClock
from tests.support.scripted_api import Answer, ScriptedApi, head, reply
from tests.support.services import wait_until
from tests.support.talk import TOKEN, client_of
from tests.support.transfers import Authority, Recorder, getting, produced, putting, transfer, wanted

SEVEN = parse_job_id("7")
OFFER = Offer(4.0, 4096)
MIB = 1 << 20
LOGIN, IN_URL = "lab user:p@ss/word", "lab%20user:p%40ss%2Fword"


def source_of(client: Client) -> WorkerApi:
    return WorkerApi(client, UrlPolicy(parse_origin(client.base_url)), wanted=Filter(), emit=Emitted())


# -- how much (B15, T22) ----------------------------------------------------------------------------------------------


def peak_growth(call: Callable[[], object]) -> int:
    """By how many bytes the resident memory of this process was higher during the call (proc_pid_clear_refs(5))."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    call()
    return _peak() - before


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("this kernel does not tell the peak of a process")


def endless(start: bytes, piece: bytes, total: int) -> Answer:
    """A body of about `total` bytes that is never all in memory."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head(200, None) + start)
        block = piece * max(1, MIB // len(piece))
        for _ in range(total // len(block)):
            connection.sendall(block)

    return answer


def whole(start: bytes, piece: bytes, end: bytes) -> Answer:
    """A body just below the limit."""
    body = start + piece * ((BODY_BYTES - len(start) - len(end)) // len(piece)) + end
    return reply(200, body)


@pytest.mark.fault("B15")
@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (endless(b'{"7": "', b"x", 1 << 30), True),
        (endless(b"", b"x", 1 << 30), False),
        (endless(b'{"7": {"handler": {"files_down": {', b'"a/b/c": "s3://b/k",', 30 * MIB), True),
        (whole(b'{"7": [', b"{},", b"{}]}"), True),
        (whole(b'{"7": [', b"[],", b"[]]}"), True),
        (whole(b'{"7": ', b'{"a":', b""), True),
        (whole(b'{"7": ', b"[", b""), True),
        (whole(b'{"7": ["', b"\\u0416", b'"]}'), True),
        (whole(b'{"7": {"app": {"cmd": ["', b"x", b'"]}}}'), True),
        (whole(b'{"7": ', b"9", b"}"), True),
    ],
    ids=[
        "1-gb",
        "1-gb-nameless",
        "10^6-files",
        "objects",
        "arrays",
        "deep",
        "deep-arrays",
        "escapes",
        "text",
        "digits",
    ],
)
def test_no_answer_costs_much_memory(api: ScriptedApi, client: Client, answer: Answer, named: bool) -> None:
    """All of them are refused: those whose job can be named as a job that nobody could run."""
    source = source_of(client)
    api.then(reply(200, b"{}"))
    source.fetch(OFFER, 0.0)  # what the libraries load at their first use is not counted
    api.then(answer)

    def refused() -> None:
        with pytest.raises(UnreadableJob if named else SourceUnavailable) as error:
            source.fetch(OFFER, 0.0)
        if isinstance(error.value, UnreadableJob):
            assert error.value.lease.job_id == "7"
        assert len(str(error.value)) < 1000

    assert peak_growth(refused) < 50 * MIB


@pytest.mark.fault("T22")
@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * (10 * MIB) + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX\x00: y\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX y: z\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 20\r\n\r\n",
        b"\x00" * 1000,
        b"220 mail.example.org ESMTP\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"",
    ],
    ids=[
        "10-mib-header", "many-headers", "nul", "space", "two-lengths", "negative", "chunk", "status", "binary", "mail",
        "short-body", "short-head", "nothing",
    ],
)  # fmt: skip
@pytest.mark.fault("J8")
def test_what_is_no_http_is_no_answer(api: ScriptedApi, client: Client, raw: bytes) -> None:
    api.then(lambda connection: connection.sendall(raw))

    def ask() -> None:
        with pytest.raises(SourceUnavailable, match="no answer from") as error:
            client.request("GET", "/jobs")
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 500

    assert peak_growth(ask) < 20 * MIB


@pytest.mark.fault("T22")
def test_headers_of_a_refusal_reach_no_log_as_they_are(api: ScriptedApi, client: Client) -> None:
    api.then(reply(503, b"a\r\nb\x1b]52;c;\x07", retry_after="1\x1b[2J", location="http://x/\x1b[2J"))
    with pytest.raises(SourceUnavailable) as error:
        source_of(client).fetch(OFFER, 0.0)
    assert str(error.value).isprintable()


# -- what then (J8, B11, T23) -----------------------------------------------------------------------------------------


@pytest.mark.fault("J8")
def test_only_what_may_pass_is_tried_again() -> None:
    for status in range(300, 600):
        answer = Reply(status, b"", {})
        error = failure(answer, "a call")
        passes = status in {408, 425, 429} or status >= 500
        if status in {401, 403}:
            assert isinstance(error, SourceRefused)
        else:
            assert isinstance(error, SourceUnavailable)
            assert ("makes no sense here" in str(error)) is not passes
        assert is_definite(answer) is (400 <= status < 500 and not passes and status not in {401, 403})


@pytest.mark.fault("B11")
@pytest.mark.fault("T23")
@pytest.mark.parametrize(
    ("asked", "waits_s"),
    [("30", 30.0), ("0", RETRY_S[0]), ("-5", RETRY_S[0]), ("600", ASKED_MOST_S), ("1000000000", ASKED_MOST_S)],
)
def test_a_heartbeat_gives_the_server_the_time_it_asks_for_but_not_the_lease(
    api: ScriptedApi, client: Client, asked: str, waits_s: float
) -> None:
    assert ASKED_MOST_S <= 60
    clock = FakeClock(0.0)
    lease = source_of(client).resume(api.url, SEVEN)
    api.then(reply(429, retry_after=asked))
    emit = Emitted()
    with beating(lease, Halt(), interval_s=3600.0, emit=emit, clock=clock, jitter=lambda: 1.0) as pulse:
        assert emit.wait_for(lambda: bool(emit.named("heartbeat_failed")))
        clock.now = waits_s - 0.01
        pulse.enter(Phase.RUNNING)  # wakes it; while the server does not answer, nothing new is said at once
        assert len(api.asked) == 1
        clock.now = waits_s if waits_s == RETRY_S[0] else ASKED_MOST_S  # what was asked for is exceeded by a spread
        pulse.enter(Phase.RUNNING)
        wait_until(lambda: len(api.asked) >= 2, "the next heartbeat", 10.0)


# -- what is left on its way (J7, S6) ---------------------------------------------------------------------------------


@pytest.mark.fault("J7")
@pytest.mark.fault("S6")
def test_a_call_that_was_given_up_is_taken_back_from_the_network(api: ScriptedApi, client: Client) -> None:
    """Closed in peace, a connection is still delivered by the kernel, however late: the other side sees no reset."""
    ended: list[BaseException | bytes] = []
    over = threading.Event()

    def silent(connection: socket.socket) -> None:
        try:
            ended.append(connection.recv(1))
        except OSError as error:
            ended.append(error)
        over.set()

    api.then(silent)
    with pytest.raises(SourceUnavailable):
        client.request("PUT", "/jobs/7/status", within_s=0.3)
    assert over.wait(10)
    assert isinstance(ended[0], ConnectionResetError)


# -- by another way (B20, T8) -----------------------------------------------------------------------------------------


@pytest.fixture
def proxy() -> Iterator[HttpProxy]:
    with running_http_proxy(LOGIN) as running:
        yield running


def through(proxy: HttpProxy, login: str = IN_URL) -> str:
    """The proxy's address as a person writes it into the setting."""
    return proxy.url.replace("http://", f"http://{login}@")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpProxy]:
    """A proxy that the environment names and that nobody may ask."""
    with running_http_proxy() as running:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, running.url)
            monkeypatch.setenv(name.lower(), running.url)
        yield running
        assert running.asked == []


@pytest.mark.fault("B20")
@pytest.mark.usefixtures("nobody")
def test_an_http_api_is_asked_through_the_proxy(api: ScriptedApi, proxy: HttpProxy) -> None:
    client = client_of(api.url, proxy=through(proxy))
    api.default = reply(200, b"{}")
    for _ in range(3):
        assert client.request("GET", "/jobs", [("memory", "1")]).status == 200
    client.close()
    assert proxy.asked == [f"GET {api.url}/jobs?memory=1"] * 3
    assert [asked.path for asked in api.asked] == ["/jobs"] * 3
    assert not any("proxy-authorization" in asked.headers for asked in api.asked)


@pytest.mark.fault("B20")
@pytest.mark.fault("T8")
@pytest.mark.usefixtures("nobody")
def test_an_https_api_is_asked_through_a_tunnel_and_the_proxy_sees_no_token(
    proxy: HttpProxy, authority: Authority
) -> None:
    with FileServer(tls=authority.server()) as server:
        server.objects["/jobs"] = Object(b"{}")
        client = client_of(f"https://127.0.0.1:{server.port}", ca_file=str(authority.file), proxy=through(proxy))
        for _ in range(3):
            assert client.request("GET", "/jobs").body == b"{}"
        client.close()
        assert proxy.asked == [f"CONNECT 127.0.0.1:{server.port}"]  # one tunnel, kept
        assert [seen.header("authorization") for seen in server.seen] == [f"Bearer {TOKEN}"] * 3
        assert not any(seen.header("proxy-authorization") for seen in server.seen)
    assert TOKEN not in "".join(proxy.heads)


@pytest.mark.fault("B20")
@pytest.mark.fault("T20")
def test_a_proxy_cannot_pose_as_the_api(proxy: HttpProxy, authority: Authority) -> None:
    wrong = authority.server(x509.DNSName("elsewhere.example"))
    with FileServer(tls=wrong) as server:
        server.objects["/jobs"] = Object(b"{}")
        client = client_of(f"https://127.0.0.1:{server.port}", ca_file=str(authority.file), proxy=through(proxy))
        with pytest.raises(SourceUnavailable, match="certificate"):
            client.request("GET", "/jobs")
        client.close()
        assert server.seen == []


@pytest.mark.fault("B20")
@pytest.mark.fault("T10")
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_a_proxy_refuses_is_told_without_the_login(api: ScriptedApi, proxy: HttpProxy, scheme: str) -> None:
    url = api.url.replace("http", scheme, 1)
    client = client_of(url, proxy=through(proxy, "lab%20user:wr%6Fng-canary"))
    with pytest.raises(SourceError, match="407") as error:
        source_of(client).fetch(OFFER, 0.0)
    client.close()
    if scheme == "https":
        assert f"through the proxy 127.0.0.1:{proxy.port}" in str(error.value)
        assert isinstance(error.value, SourceUnavailable)
        assert not error.value.sent  # so a poll was certainly not heard
    for text in ("canary", "lab user", "lab%20user"):
        assert text not in f"{error.value!r} {error.value.__cause__!r}"
    assert api.asked == []


@pytest.mark.fault("B20")
@pytest.mark.fault("J7")
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_silent_proxy_holds_up_no_call(api: ScriptedApi, proxy: HttpProxy, scheme: str) -> None:
    proxy.silent = True
    client = client_of(api.url.replace("http", scheme, 1), proxy=through(proxy))
    with pytest.raises(SourceUnavailable, match="through the proxy"):
        client.request("GET", "/jobs", within_s=0.5)
    client.close()


@pytest.mark.fault("B20")
@pytest.mark.fault("J7")
def test_a_call_through_a_tunnel_ends_in_time(proxy: HttpProxy, authority: Authority) -> None:
    with FileServer(tls=authority.server()) as server:
        server.objects["/jobs"] = Object(b"{}")
        server.script("/jobs", Act(stall_body=True))
        client = client_of(f"https://127.0.0.1:{server.port}", ca_file=str(authority.file), proxy=through(proxy))
        with pytest.raises(SourceUnavailable, match="no answer"):
            client.request("GET", "/jobs", within_s=1.0)
        client.close()


@pytest.mark.fault("B20")
@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:3128",
        "socks5://127.0.0.1:1",
        "http://",
        "http://u:canary@h",
        "http://u:canary@h:99999",
        "http://[u:canary@h",
    ],
)
def test_a_proxy_that_cannot_be_read_is_a_wrong_setting(address: str) -> None:
    with pytest.raises(ConfigError, match="PROXY must be") as error:
        Client("http://127.0.0.1:9", proxy=address)
    assert "canary" not in str(error.value)


@pytest.mark.fault("B20")
@pytest.mark.usefixtures("nobody")
def test_the_environment_names_no_proxy_for_the_api(api: ScriptedApi, client: Client, authority: Authority) -> None:
    assert client.request("GET", "/jobs").status == 204
    with FileServer(tls=authority.server()) as server:
        server.objects["/jobs"] = Object(b"{}")
        safe = client_of(f"https://127.0.0.1:{server.port}", ca_file=str(authority.file))
        assert safe.request("GET", "/jobs").status == 200
        safe.close()


@pytest.mark.fault("B20")
@pytest.mark.usefixtures("nobody")
def test_an_api_that_has_only_ipv6_is_asked(authority: Authority) -> None:
    loopback = x509.IPAddress(ipaddress.ip_address("::1"))
    for tls in (None, authority.server(loopback)):
        with FileServer("::1", tls=tls) as server:
            server.objects["/jobs"] = Object(b"{}")
            scheme = "http" if tls is None else "https"
            client = client_of(f"{scheme}://[::1]:{server.port}", ca_file=str(authority.file))
            assert client.request("GET", "/jobs").body == b"{}"
            assert server.seen[0].header("host") == f"[::1]:{server.port}"
            client.close()
    client = client_of("http://[::1]:9")
    with pytest.raises(SourceUnavailable, match=r"no answer from \[::1\]:9: "):
        client.request("GET", "/jobs")
    client.close()


@pytest.mark.fault("B20")
@pytest.mark.fault("T8")
@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("safe", [False, True])
def test_files_go_through_the_proxy(tmp_path: Path, proxy: HttpProxy, authority: Authority, safe: bool) -> None:
    net = NetSettings(connect_timeout_s=5.0, ca_file=authority.file, proxy=through(proxy))
    with FileServer(tls=authority.server() if safe else None) as server:
        server.objects["/in"] = Object(b"content")
        (tmp_path / "out").write_bytes(b"result")
        moving = transfer(net=net, concurrency=1)
        item = wanted(tmp_path, "in", getting(server.url("/in?X-Sig=a%2fb")))
        moving.download([item], Recorder())
        moving.upload([produced(tmp_path / "out", putting(server.url("/out")))], Recorder())
        moving.close()
        assert item.part.read_bytes() == b"content"
        assert server.objects["/out"].content == b"result"
        assert server.seen[0].target == "/in?X-Sig=a%2fb"  # a signature covers it as it is
        assert not any(seen.header("proxy-authorization") for seen in server.seen)
        where = f"127.0.0.1:{server.port}"
    if safe:
        assert set(proxy.asked) == {f"CONNECT {where}"}
    else:
        assert proxy.asked == [f"GET http://{where}/in?X-Sig=a%2fb", f"PUT http://{where}/out"]


@pytest.mark.fault("B20")
@pytest.mark.usefixtures("nobody")
def test_the_environment_names_no_proxy_for_files(tmp_path: Path, authority: Authority) -> None:
    for tls in (None, authority.server()):
        with FileServer(tls=tls) as server:
            server.objects["/in"] = Object(b"content")
            moving = transfer(net=NetSettings(connect_timeout_s=5.0, ca_file=authority.file))
            moving.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
            moving.close()
            assert len(server.seen) == 1


@pytest.mark.fault("B20")
@pytest.mark.fault("T10")
def test_a_proxy_that_refuses_files_is_told_without_the_login(tmp_path: Path, proxy: HttpProxy) -> None:
    net = NetSettings(connect_timeout_s=5.0, proxy=through(proxy, "lab:wrong-canary"))
    moving = transfer(net=net, download_budget_s=0.5)
    with pytest.raises(WorkerFault) as fault:
        moving.download([wanted(tmp_path, "in", getting("https://127.0.0.1:9/in"))], Recorder())
    moving.close()
    assert "407" in str(fault.value)
    assert "canary" not in str(fault.value)


@pytest.mark.fault("B20")
@pytest.mark.fault("T7")
def test_a_proxy_is_not_asked_for_an_address_that_is_refused(tmp_path: Path, proxy: HttpProxy) -> None:
    moving = transfer(net=NetSettings(connect_timeout_s=5.0, proxy=through(proxy)))
    with pytest.raises(WorkerFault, match="internal address"):
        moving.download([wanted(tmp_path, "in", getting("http://169.254.169.254/latest/meta-data"))], Recorder())
    moving.close()
    assert proxy.asked == []
