"""What the network does to a worker's connections, to the API and to the storage, byte by byte (FAULTS.md B13, B14).

First the proxy that does it, by itself; then the worker behind it, the command on the real engine, its clock sped up.
"""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import pairwise

import httpx
import pytest

from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.file_server import FileServer, Object
from tests.support.services import wait_until
from tests.support.wired import BRISK, LATE_S, RETRY_S, WRITES, WRITTEN, Wired
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO

#: One byte a second, as it passes for a worker whose clock runs at BRISK.
SLOW_LORIS_S = 1 / BRISK

#: FAULTS.md J3, B14: a keep-alive takes at most so long, another call, and a transfer whose rate fell.
BEAT_S, CALL_S, SLOW_S = 10.0, 30.0, 60.0

CONTENT = hashlib.shake_128(b"some content").digest(300_000)

#: What can happen to a connection on which a short answer is waited for.
FAULTS = {
    "reset": Fault(reset=True),
    "black hole": Fault(black_hole=True),
    "cut request": Fault(cut_request=30),
    "cut answer": Fault(cut_answer=20),
    "half-closed": Fault(half_close=20),
    "flipped": Fault(flip=2),
    "answer lost": Fault(drop_answer=True),
    "slow headers": Fault(drip_s=SLOW_LORIS_S),
}

#: What can happen to one that stores a file: its answer is a line or two.
UPLOAD_FAULTS = {
    "reset": Fault(reset=True),
    "black hole": Fault(black_hole=True),
    "cut request": Fault(cut_request=100_000),
    "answer lost": Fault(drop_answer=True),
    "slow headers": Fault(drip_s=SLOW_LORIS_S),
}

#: What can happen to one that fetches a file, in this order: what arrived is kept, and the rest is asked for. (A byte
#: that is inverted on its way is test_transfer_faults.py's: this server gives no checksum that could be believed.)
DOWNLOAD_FAULTS = {
    **UPLOAD_FAULTS,
    "cut request": Fault(cut_request=100),
    "cut answer": Fault(cut_answer=100_000),
    "half-closed": Fault(half_close=50_000),
    "slow body": Fault(drip_s=SLOW_LORIS_S, drip_from=50_000),
}


# -- the proxy itself -------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as server:
        server.objects["/x"] = Object(CONTENT)
        yield server


@pytest.fixture
def proxy(server: FileServer) -> Iterator[FaultProxy]:
    before = set(os.listdir("/proc/self/fd"))
    with FaultProxy(f"http://{server.host}:{server.port}") as proxy:
        yield proxy
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= len(before) + server.busy, "descriptors are closed", 5)


def get(proxy: FaultProxy, timeout_s: float = 5.0) -> bytes:
    with httpx.Client(trust_env=False, timeout=timeout_s) as client:
        return client.get(f"{proxy.url}/x").raise_for_status().content


def test_the_proxy_passes_everything_on(proxy: FaultProxy) -> None:
    assert get(proxy) == CONTENT
    (kept,) = proxy.connections
    wait_until(lambda: proxy.open == 0, "the connection is closed", 5)  # what was passed on is counted a moment later
    assert kept.requested > 0
    assert kept.answered > len(CONTENT)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(black_hole=True), httpx.ReadTimeout),
        (Fault(cut_request=10), httpx.NetworkError),
        (Fault(cut_answer=1000), httpx.NetworkError),
        (Fault(half_close=1000), httpx.RemoteProtocolError),
        (Fault(drop_answer=True), httpx.RemoteProtocolError),
        (Fault(delay_s=0.5), httpx.ReadTimeout),
        (Fault(drip_s=0.5), httpx.ReadTimeout),
    ],
    ids=["black hole", "cut request", "cut answer", "half-closed", "answer lost", "late", "slow"],
)
def test_the_proxy_fails_as_it_is_told(proxy: FaultProxy, fault: Fault, error: type[Exception]) -> None:
    proxy.then(fault)
    with pytest.raises(error):
        get(proxy, 0.3 if error is httpx.ReadTimeout else 10.0)
    assert get(proxy) == CONTENT  # the next one is well
    assert [kept.fault for kept in proxy.connections] == [fault, Fault()]


def test_the_proxy_resets(proxy: FaultProxy) -> None:
    """Without httpx: if the reset comes before the request is written, that passes over the error and reads an end."""
    proxy.then(Fault(reset=True))
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2]))) as connection:
        connection.settimeout(5)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert get(proxy) == CONTENT
    assert [kept.fault for kept in proxy.connections] == [Fault(reset=True), Fault()]


def test_the_proxy_flips_one_byte(proxy: FaultProxy) -> None:
    proxy.then(Fault(flip=2))
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2]))) as connection:
        connection.sendall(b"GET /x HTTP/1.1\r\n\r\n")
        assert connection.recv(4) == bytes([ord("H"), ord("T"), ord("T") ^ 0xFF, ord("P")])


def test_the_proxy_drips(proxy: FaultProxy) -> None:
    proxy.then(Fault(drip_s=0.02, drip_from=5))
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2]))) as connection:
        connection.sendall(b"GET /x HTTP/1.1\r\n\r\n")
        received = b""
        while len(received) < 15:
            received += connection.recv(1)
    assert received.startswith(b"HTTP/1.1 200")
    assert time.monotonic() - began >= 0.2


def test_the_proxy_refuses_and_listens_again_on_its_port(proxy: FaultProxy) -> None:
    with httpx.Client(trust_env=False) as client:
        assert client.get(f"{proxy.url}/x").content == CONTENT
        for _ in range(3):
            proxy.refuse()
            with pytest.raises(httpx.ConnectError):
                client.get(f"{proxy.url}/x")
            proxy.listen()
            assert client.get(f"{proxy.url}/x").content == CONTENT


def test_the_proxy_acts_on_what_it_sees(proxy: FaultProxy, server: FileServer) -> None:
    proxy.on_request(b"GET /x", proxy.refuse)
    with pytest.raises(httpx.RemoteProtocolError):
        get(proxy)
    assert server.seen == []  # what it acts on has not been passed
    proxy.listen()
    proxy.on_answer(CONTENT[-20:], proxy.refuse)
    assert get(proxy) == CONTENT  # it was passed before
    wait_until(lambda: not proxy.is_listening, "it has acted", 5)


def test_the_proxy_swallows_what_is_open_and_lets_it_go(proxy: FaultProxy) -> None:
    with httpx.Client(trust_env=False, timeout=10.0) as client:
        client.get(f"{proxy.url}/x")
        proxy.always(Fault(black_hole=True))
        with pytest.raises(httpx.ReadTimeout):
            client.get(f"{proxy.url}/x", timeout=0.3)
        assert len(proxy.connections) == 1
        proxy.always()
        assert client.get(f"{proxy.url}/x").content == CONTENT


def test_many_connections_through_the_proxy_leave_nothing(proxy: FaultProxy) -> None:
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(get(proxy))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 20
    wait_until(lambda: proxy.open == 0, "all connections are closed", 5)


# -- the worker behind it ---------------------------------------------------------------------------------------------


def meet(wire: Wired, fault: Fault, name: str) -> None:
    """Wait until one call to the API has met `fault`, and the next one has come through."""
    before = len(wire.api.connections)
    wire.api.then(fault)
    with wire.at(BRISK):
        wait_until(
            lambda: any(kept.fault == Fault() and kept.answered for kept in wire.api.connections[before + 1 :]),
            f"a call meets it, and the next one comes through: {name}",
            DEADLINE_S,
        )


def assert_each_was_met_and_left(proxy: FaultProxy, faults: Mapping[str, Fault], within_s: float) -> None:
    """Each fault came upon one connection, and held the worker up for no longer than `within_s` of its seconds."""
    faulty = [kept for kept in proxy.connections if kept.fault != Fault()]
    assert [kept.fault for kept in faulty] == list(faults.values())
    took_s = {name: (kept.closed_at or 0) - kept.opened_at for name, kept in zip(faults, faulty, strict=True)}
    assert {name: took for name, took in took_s.items() if took > within_s / BRISK + LATE_S} == {}


def longest_silence_s(wire: Wired, job: int) -> float:
    """The longest time, in seconds here, in which the server heard nothing of the job."""
    times = [float(event["time"]) for event in wire.server.events("update", job)]
    return max(later - earlier for earlier, later in pairwise(times))


@pytest.mark.docker
@pytest.mark.fault("B13", "B14", "J7", "J8")
def test_keep_alives_survive_whatever_happens_to_a_connection(wire: Wired) -> None:
    """One after the other; the next word is heard in time, and no call takes longer than its deadline."""
    job = wire.submit(WRITES, ";", UNTIL_LET_GO)
    with wire.running(timeout_status="10") as worker:
        wire.server.wait_for_state(job, "running")
        for name, fault in FAULTS.items():
            meet(wire, fault, name)
        wire.lab.let_go(job)
        assert wire.ends(job) == "finished"
    assert_each_was_met_and_left(wire.api, FAULTS, BEAT_S)
    # One interval, one call to its deadline, and the pause after it: far from the 300 s of a lease.
    assert longest_silence_s(wire, job) <= (11 + BEAT_S + RETRY_S) / BRISK + LATE_S
    assert wire.results(job) == WRITTEN
    assert len(worker.errors.splitlines()) <= 10 + 2 * len(FAULTS)


@pytest.mark.docker
@pytest.mark.fault("B13", "B14")
def test_polls_survive_whatever_happens_to_a_connection(wire: Wired) -> None:
    with wire.running(timeout_job="5") as worker:
        for name, fault in FAULTS.items():
            meet(wire, fault, name)
        job = wire.submit(WRITES)
        assert wire.ends(job) == "finished"
    assert_each_was_met_and_left(wire.api, FAULTS, CALL_S)
    assert wire.results(job) == WRITTEN
    assert worker.errors.count("no job can be taken") <= len(FAULTS)


@pytest.mark.docker
@pytest.mark.fault("B13", "A7")
def test_an_end_whose_answer_the_network_loses_is_told_until_it_is_answered(wire: Wired) -> None:
    job = wire.submit(WRITES)
    wire.lab.told_again.add(job)
    wire.api.on_request(b"status=finished", lambda: wire.api.always(Fault(drop_answer=True)))
    with wire.running():
        wire.server.wait_for_state(job, "finished")
        wire.api.always()
        assert wire.ends(job) == "finished"
        wait_until(lambda: len(wire.server.heard_ends(job)) == 2, "it was told again", DEADLINE_S)
    assert wire.server.heard_ends(job) == ["finished", "finished"]
    assert wire.results(job) == WRITTEN


@pytest.mark.docker
@pytest.mark.fault("B13", "B14", "C2")
def test_an_input_arrives_whole_whatever_happens_to_its_connections(wire: Wired) -> None:
    """One after the other on the same file; meanwhile the keep-alives go on, which have connections of their own."""
    file = wire.server.put_input("data", CONTENT)
    job = wire.submit("cp /files/in/data /files/out/data", files_down={"in/data": file})
    wire.storage.then(*DOWNLOAD_FAULTS.values())
    with wire.running():
        wire.server.wait_for_state(job, "preprocessing")
        assert wire.ends(job) == "finished"
    assert wire.results(job) == {"output/out/data": CONTENT}
    assert_each_was_met_and_left(wire.storage, DOWNLOAD_FAULTS, SLOW_S)
    assert longest_silence_s(wire, job) <= 33 / BRISK + LATE_S


@pytest.mark.docker
@pytest.mark.fault("B13", "B14", "C8", "C9")
def test_an_output_is_stored_whole_whatever_happens_to_its_connections(wire: Wired) -> None:
    file = wire.server.put_input("data", CONTENT)
    job = wire.submit("cp /files/in/data /files/out/data;", UNTIL_LET_GO, files_down={"in/data": file})
    with wire.running():
        wire.server.wait_for_state(job, "running")
        wire.storage.then(*UPLOAD_FAULTS.values())
        wire.lab.let_go(job)
        assert wire.ends(job) == "finished"
    assert wire.results(job) == {"output/out/data": CONTENT}
    assert_each_was_met_and_left(wire.storage, UPLOAD_FAULTS, SLOW_S)
    assert longest_silence_s(wire, job) <= 33 / BRISK + LATE_S


@pytest.mark.docker
@pytest.mark.fault("B13")
def test_a_name_that_cannot_be_resolved_is_tried_again(wire: Wired) -> None:
    with wire.running(api_url="http://api.invalid", allow_insecure_http="true") as worker:
        worker.wait_for("no job can be taken: no answer from api.invalid:80")
        wire.clock.run(60, BRISK)
        assert worker.is_running
    assert worker.errors.count("no job can be taken") == 1
