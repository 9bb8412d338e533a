"""What a sceptic found in the fast transfers: holes taken for bytes, stories without an end, one job's end for all."""

import contextlib
import itertools
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from jobfetcher import recovery
from jobfetcher.core.errors import SourceUnavailable, Stopped, StopReason, WorkerFault
from jobfetcher.core.job import JobId
from jobfetcher.core.machine import Gpu, Inventory, Share
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Upload
from jobfetcher.core.run import Image
from jobfetcher.core.urls import Method, SignedRequest
from jobfetcher.journal import Journal
from jobfetcher.resources.budget import Budget
from jobfetcher.sources.worker_api.auth import StaticToken
from jobfetcher.sources.worker_api.client import Client
from jobfetcher.testing.fake_source import FakeSource
from jobfetcher.transfer import batch, download, upload
from jobfetcher.transfer import cache as cache_room
from jobfetcher.transfer.cache import Cache, Entry
from jobfetcher.transfer.exchange import Exchange, NetSettings, Reply
from jobfetcher.transfer.multi import TransferLoop
from jobfetcher.transfer.part import Part
from jobfetcher.transfer.patience import Rules
from jobfetcher.transfer.presigned import PresignedTransfer
from tests.faults.test_ranges import CONTENT, MIB, SLOW, moving, same
from tests.support import file_server
from tests.support.file_server import FileServer, Object
from tests.support.jobs import make_job
from tests.support.range_server import EXPIRED, Act, RangeServer, Seen, Thing, _End
from tests.support.services import wait_until
from tests.support.transfers import LOCAL, Recorder, getting, produced, putting, transfer, wanted


class Uncounted:
    """A tally that counts nothing."""

    def expect(self, size: int) -> None: ...

    def moved(self, size: int) -> None: ...


def in_background(
    made: PresignedTransfer, server: RangeServer, folder: Path, watch: Recorder, name: str = "in"
) -> tuple[threading.Thread, list[BaseException]]:
    """A download in a thread of its own; what it raised, once it has ended."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            made.download([wanted(folder, name, getting(server.url(f"/{name}")))], watch)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


@pytest.mark.fault("A2")
def test_a_note_never_claims_a_hole(tmp_path: Path) -> None:
    """Cut before its first byte is here, as it is where a file begins anew with several connections wanted and its
    store takes long for the first byte; then the worker is killed."""
    path = tmp_path / "part"
    headers = {"etag": '"two"', "content-length": str(len(CONTENT)), "accept-ranges": "bytes"}
    with ThreadPoolExecutor(1) as hashers:
        killed = Part(path, "in", Uncounted(), lambda: hashers)
        (first,) = killed.pieces
        killed.wanted(first)
        assert killed.accept(first, Reply(200, headers), alone=True) is not None
        second = killed.cut(first, 4 * MIB)
        if second is not None:
            killed.wanted(second)
            last = len(CONTENT) - 1
            ranged = {**headers, "content-range": f"bytes {4 * MIB}-{last}/{len(CONTENT)}"}
            ranged["content-length"] = str(len(CONTENT) - 4 * MIB)
            sink = killed.accept(second, Reply(206, ranged), alone=False)
            assert sink is not None
            sink([CONTENT[4 * MIB : 5 * MIB]], MIB)

        after = Part(path, "in", Uncounted(), lambda: hashers)  # the first one is not closed: nobody had the time
        with closing(after):
            after.resume()
            here = [(piece.start, piece.at) for piece in after.pieces if piece.at > piece.start]
        killed.close()
    assert all(start >= 4 * MIB for start, _ in here), here


@pytest.mark.fault("B17")
def test_a_job_that_is_cancelled_while_the_loop_is_held_up_ends_no_other(tmp_path: Path) -> None:
    """A slow disk holds the loop for longer than a batch waits for its end; then its story goes on, to threads that
    are gone."""
    with RangeServer() as server, closing(moving(ranges=1)) as made:
        server.things["/in"] = Thing(CONTENT[:300_000])
        server.things["/other"] = Thing(CONTENT[: 2 * MIB])
        gate, held = threading.Event(), threading.Event()
        server.plan = lambda seen: Act(rate=0.4 * MIB) if seen.target == "/other" else Act(gate=gate)
        first, other = Recorder(), Recorder()
        thread, raised = in_background(made, server, tmp_path, first)
        wait_until(lambda: server.running == 1, "the job that is going to be cancelled")
        beside, others = in_background(made, server, tmp_path, other, "other")
        wait_until(lambda: server.running == 2, "both on their way")

        def hold() -> None:
            """What a write to a disk that is busy does."""
            held.set()
            time.sleep(2.0)

        made._loop.call(hold)
        assert held.wait(5)
        gate.set()  # the file comes meanwhile
        first.halt.set(StopReason.CANCELLED)
        thread.join()
        beside.join()
        assert isinstance(raised[0], Stopped)
        assert others == []


@pytest.mark.fault("F10")
def test_a_signer_that_cannot_be_started_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = threading.Thread.start, itertools.count()

    def start(thread: threading.Thread) -> None:
        if thread.name == "transfer-sign" and next(count) > 0:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    watch = Recorder()
    with RangeServer() as server, closing(moving()) as made:
        server.things["/in"] = Thing(b"x")
        ended = threading.Event()
        names = [f"in{number}" for number in range(20)]

        def run() -> None:
            with contextlib.suppress(Exception):
                made.download([wanted(tmp_path, name, getting(server.url("/in"))) for name in names], watch)
            ended.set()

        thread = threading.Thread(target=run)
        thread.start()
        in_time = ended.wait(20)
        watch.halt.set(StopReason.SHUTDOWN)
        thread.join()
    assert in_time, f"{len(watch.names)} of {len(names)} files, and no end"


@pytest.mark.fault("F10")
def test_a_thread_that_cannot_be_had_ends_no_other_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = threading.Event()
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if refuse.is_set() and thread.name.startswith("transfer-aside"):
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with RangeServer(rate=0.4 * MIB) as server, closing(moving(ranges=1)) as made:
        server.things["/in"] = Thing(CONTENT[: 2 * MIB])
        server.plan = lambda seen: Act(rate=None) if seen.number else None
        watch = Recorder()
        thread, raised = in_background(made, server, tmp_path, watch)
        wait_until(lambda: server.sent > 0, "the first")
        refuse.set()
        server.plan = lambda seen: Act(rate=50.0 * MIB)
        with contextlib.suppress(Exception):  # its digest needs a thread that there is not
            made.download([wanted(tmp_path, "b", getting(server.url("/in")))], Recorder())
        refuse.clear()
        thread.join()
        assert raised == []


@pytest.mark.fault("C4", "T23")
def test_a_server_that_always_sends_more_than_a_part_is_not_asked_without_end(tmp_path: Path) -> None:
    """Each answer says the right range, and brings what does not belong to it behind it, in the same packet."""

    def plan(seen: Seen) -> Act | None:
        if not seen.ranged or seen.last is None or seen.last >= len(CONTENT) - 1:
            return None
        first, last = seen.span(len(CONTENT))
        body = CONTENT[first : last + 1] + b"more" * 250
        chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        headers = {"Content-Length": None, "Transfer-Encoding": "chunked"}
        return Act(206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(CONTENT)}"}, chunked, rate=50.0 * MIB)

    with RangeServer(rate=SLOW) as server:
        server.things["/in"] = Thing(CONTENT)
        server.plan = plan
        watch = Recorder()
        with closing(moving()) as made:
            thread, _ = in_background(made, server, tmp_path, watch)
            thread.join(20)
            in_time = not thread.is_alive()
            watch.halt.set(StopReason.SHUTDOWN)
            thread.join()
        assert in_time, f"{len(server.seen)} requests, and no end"
        assert same(tmp_path / "in.part", CONTENT)
        assert any(seen.ranged and seen.last is not None for seen in server.seen), "no part was asked for"
        assert len(server.seen) <= 30


@pytest.mark.fault("C4")
def test_a_server_that_sends_more_than_a_part_holds_nobody_for_ever(tmp_path: Path) -> None:
    """The last part comes whole, chunked, and then a byte that does not belong to it."""
    gate = threading.Event()

    class Generous(RangeServer):
        done = False

        def _answer(self, connection: socket.socket, seen: Seen, act: Act) -> None:
            first, last = seen.span(len(CONTENT))
            if not seen.ranged or last == len(CONTENT) - 1 or self.done:
                super()._answer(connection, seen, act)
                return
            self.done = True
            seen.status = 206
            head = f'HTTP/1.1 206 P\r\nETag: "one"\r\nContent-Range: bytes {first}-{last}/{len(CONTENT)}\r\n'
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            body = CONTENT[first : last + 1]
            for block in (body[:-1], body[-1:]):
                connection.sendall(b"%x\r\n%b\r\n" % (len(block), block))
                if len(block) > 1:
                    while not gate.is_set():
                        self._pause(connection, 0.05)
            seen.sent = len(body)
            time.sleep(0.5)
            connection.sendall(b"1\r\nx\r\n0\r\n\r\n")

    with Generous(rate=SLOW) as server:
        server.things["/in"] = Thing(CONTENT)
        watch = Recorder()
        with closing(moving()) as made:
            thread, _ = in_background(made, server, tmp_path, watch)
            wait_until(lambda: len(server.ranged) >= 2, "several connections", 15)
            server.rate = 40.0 * MIB
            wait_until(lambda: server.running == 1, "the last connection", 20)
            gate.set()
            thread.join(6)
            in_time = not thread.is_alive()
            watch.halt.set(StopReason.SHUTDOWN)
            thread.join()
        assert in_time, f"all of {sum(watch.sizes)} bytes are here, and no end"
        assert same(tmp_path / "in.part", CONTENT)


@pytest.mark.fault("C2")
def test_a_part_of_the_rest_is_not_the_rest(tmp_path: Path) -> None:
    """A store that streams says no length; cut off, it goes on with a part, which RFC 9110 (15.3.7) lets it do."""
    content = CONTENT[:MIB]

    class Streaming(RangeServer):
        def _answer(self, connection: socket.socket, seen: Seen, act: Act) -> None:
            first = seen.first or 0
            last = min(first + 300_000, len(content)) - 1
            kind, size = "200 OK", f"{len(content):x}"
            if seen.ranged:
                kind, size = f"206 P\r\nContent-Range: bytes {first}-{last}/{len(content)}", f"{last - first + 1:x}"
            head = f'HTTP/1.1 {kind}\r\nETag: "one"\r\nAccept-Ranges: bytes\r\nTransfer-Encoding: chunked\r\n\r\n'
            connection.sendall(head.encode() + size.encode() + b"\r\n" + content[first : last + 1])
            if not seen.ranged:
                raise _End
            connection.sendall(b"\r\n0\r\n\r\n")

    with Streaming() as server, closing(moving()) as made:
        watch = Recorder()
        made.download([wanted(tmp_path, "in", getting(server.url("/in")))], watch)
        assert (tmp_path / "in.part").stat().st_size == len(content)
        assert same(tmp_path / "in.part", content)


@pytest.mark.fault("D2")
def test_bytes_out_of_the_cache_are_promised_like_others(tmp_path: Path) -> None:
    """Where the filesystem has no clones they take as much room as any, and the reserve is kept for them, too."""
    cache = Cache(tmp_path / "cache", 64 * MIB, lambda *_, **__: None, room_for=lambda size: None)
    with RangeServer() as server:
        server.things["/in"] = Thing(CONTENT[:MIB])
        server.plan = lambda seen: Act(status=304, body=b"") if "if-none-match" in seen.headers else None
        for name in ("one", "two"):
            (folder := tmp_path / name).mkdir()
            watch = Recorder()
            with closing(transfer(cache=cache)) as made:
                made.download([wanted(folder, "in", getting(server.url("/in")))], watch)
            assert same(folder / "in.part", CONTENT[:MIB])
        assert [seen.status for seen in server.seen] == [200, 304]
    assert watch.expected == MIB


@pytest.mark.fault("D2")
def test_room_for_bytes_out_of_the_cache_is_asked_for_before_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", 64 * MIB, lambda *_, **__: None, room_for=lambda size: None)
    watch, take = Recorder(), Cache.take

    def late(cache: Cache, entry: Entry, fd: int, check: Callable[[], None], moved: Callable[[int], None]) -> str:
        wait_until(lambda: watch.expected == 10 * MIB, "what is to come was told", 5)
        assert watch.sizes == []
        return take(cache, entry, fd, check, moved)

    monkeypatch.setattr(Cache, "take", late)
    with RangeServer() as server:
        server.things["/in"] = Thing(CONTENT[: 10 * MIB])
        server.plan = lambda seen: Act(status=304, body=b"") if "if-none-match" in seen.headers else None
        for name, heard in (("one", Recorder()), ("two", watch)):
            (folder := tmp_path / name).mkdir()
            with closing(transfer(cache=cache)) as made:
                made.download([wanted(folder, "in", getting(server.url("/in")))], heard)
    assert sum(watch.sizes) == 10 * MIB


@pytest.mark.fault("A10")
def test_no_gpu_is_held_twice_after_a_power_cut_in_the_last_sync(tmp_path: Path) -> None:
    """The first job's share went to the second while what the first wrote was still synced; then the power went. Both
    were RUNNING on record, neither has a container any more, and both are run again from a clean state."""
    gpu = Gpu("GPU-a", "NVIDIA RTX A4000", 16000, "8.6")
    share = Share(4.0, 1000, (gpu,))
    image = Image("sha256:x", "busybox:latest", None, "amd64", size_bytes=1)
    with closing(Journal(tmp_path / "journal.db", boot_id="one")) as journal:
        for job in (JobId("1"), JobId("2")):
            journal.claim(job, "t", make_job(job))
            journal.advance(job, Phase.STAGING_IN)
            journal.running(job, share, image)
            journal.started(job, f"container-{job}")
    with closing(Journal(tmp_path / "journal.db", boot_id="two")) as journal:
        budget = Budget(
            Inventory(4.0, 1000, (gpu,)),
            slots=1,
            memory_in_use_mib=lambda: 0,
            read_gpus=lambda: (gpu,),
            reserve_cpus=0.0,
            reserve_memory_mib=0,
            prefetch=1,
        )
        found = recovery.open_jobs(journal, FakeSource(), budget, lambda *_, **__: None, crashed=True)
        first, second = [one.hold for one in found if one.hold is not None]
        assert (first.take(), second.take()) == (True, False)
        assert first.share.gpus == (gpu,)
        first.release()
        assert second.take()


@pytest.mark.fault("C2")
def test_a_body_in_tiny_chunks_is_a_body(tmp_path: Path) -> None:
    """A server that streams line by line; the kernel takes 1,024 pieces at a time (IOV_MAX)."""
    content = CONTENT[: 64 * 1024]

    class Lines(RangeServer):
        def _answer(self, connection: socket.socket, seen: Seen, act: Act) -> None:
            seen.status = 200
            chunks = b"".join(b"a\r\n%b\r\n" % content[at : at + 10] for at in range(0, 65_530, 10))
            head = b'HTTP/1.1 200 OK\r\nETag: "one"\r\nTransfer-Encoding: chunked\r\n\r\n'
            connection.sendall(head + chunks + b"6\r\n%b\r\n0\r\n\r\n" % content[65_530:])

    with Lines() as server, closing(moving()) as made:
        made.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
    assert same(tmp_path / "in.part", content)


@pytest.mark.fault("B13")
@pytest.mark.fault("N4")
def test_a_heartbeat_gets_through_while_every_signature_hangs() -> None:
    """Four jobs that ask for eight signatures each have all 32 connections to the API; the keep-alive needs one."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        answered = threading.Event()

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                if b"/status" in connection.recv(4096):
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                    answered.set()
                connection.recv(1)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}")
        client.auth = StaticToken("t")
        raised: list[Exception] = []

        def ask() -> None:
            with contextlib.suppress(SourceUnavailable):
                client.request("GET", "/files/a/url", within_s=6.0)

        signers = [threading.Thread(target=ask) for _ in range(32)]
        for signer in signers:
            signer.start()
        time.sleep(0.5)
        began = time.monotonic()
        try:
            client.request("PUT", "/jobs/1/status", within_s=5.0)
        except SourceUnavailable as error:
            raised.append(error)
        took = time.monotonic() - began
        for signer in signers:
            signer.join()
        client.close()
    assert (raised, took < 5.5) == ([], True), took


@pytest.mark.fault("F10")
@pytest.mark.parametrize("name", ["transfer", "transfer-sign"])
def test_without_a_thread_nothing_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        real(thread)

    with RangeServer() as server, closing(moving()) as made:
        server.things["/in"] = Thing(b"x")
        items = [wanted(tmp_path, "in", getting(server.url("/in")))]
        with monkeypatch.context() as refusing:
            refusing.setattr(threading.Thread, "start", start)
            with pytest.raises(WorkerFault, match="can't start new thread"):
                made.download(items, Recorder())
        made.download(items, Recorder())
        assert same(tmp_path / "in.part", b"x")


@pytest.mark.fault("F10")
def test_transfers_leave_half_of_the_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may have as few as 64 (ulimit -n), and a connection takes two: its socket and its file."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    size = 300_000  # a part of it is written before all of it is here
    with RangeServer(rate=0.3 * MIB) as server, closing(moving(max_host_connections=64)) as made:
        before = len(os.listdir("/proc/self/fd"))
        server.things["/in"] = Thing(CONTENT[:size])
        files = [wanted(tmp_path, f"in{number}", getting(server.url("/in"))) for number in range(32)]
        watch = Recorder()
        thread = threading.Thread(target=made.download, args=(files, watch))
        thread.start()
        wait_until(lambda: server.sent > 4 * size, "many at a time")
        ours = len(os.listdir("/proc/self/fd")) - before - server.running  # the server's own are in this process, too
        server.rate = None
        thread.join()
    assert max(seen.together for seen in server.seen) == 16
    assert ours <= 32 + 4  # and the loop's own: epoll, what wakes it, what wakes libcurl and its resolver
    assert len(watch.names) == len(files)


@pytest.mark.fault("A2")
def test_a_halt_is_heard_while_the_next_file_is_looked_for(tmp_path: Path) -> None:
    """A walk over 100,000 files that were sent before finds nothing to send for a long time."""
    walking, found = threading.Event(), threading.Event()
    path = tmp_path / "out"
    path.write_bytes(b"x")

    def items(url: str) -> Iterator[Upload]:
        yield produced(path, putting(url))
        walking.set()
        assert found.wait(20)
        yield produced(path, putting(url))

    with RangeServer() as server, closing(moving()) as made:
        server.things["/out"] = Thing(b"")
        watch, raised = Recorder(), list[BaseException]()

        def run() -> None:
            try:
                made.upload(items(server.url("/out")), watch)
            except Stopped as stopped:
                raised.append(stopped)

        thread = threading.Thread(target=run)
        thread.start()
        assert walking.wait(5)
        watch.halt.set(StopReason.SHUTDOWN)
        thread.join(5)
        in_time = not thread.is_alive()
        found.set()
        thread.join()
    assert in_time
    assert len(raised) == 1


@pytest.mark.fault("C14")
def test_many_that_cannot_even_begin_end_one_after_the_other() -> None:
    """Each gives its connection to the next one: 5,000 of them are no 5,000 calls within each other."""

    class Nobody:
        def flush(self) -> bool:
            return False

        def lost(self, why: str) -> None: ...

    def refuse() -> None:
        raise OSError("it is gone")

    ended: list[BaseException | None] = []
    gate = threading.Event()
    with RangeServer() as server, closing(TransferLoop(NetSettings(), max_host_connections=1)) as loop:
        server.things["/in"] = Thing(b"x")
        server.plan = lambda seen: Act(gate=gate)
        origin = server.url("")

        def ask(number: int) -> None:
            exchange = Exchange(
                "GET", origin, "/in", [], check_address=lambda _: None, on_start=refuse if number else None
            )
            exchange.resume = lambda result, _: ended.append(result.error)
            loop.start(exchange)

        loop.join(Nobody())
        for number in range(5000):
            loop.call(partial(ask, number))
        wait_until(lambda: server.running == 1, "the first, which has the only connection")
        gate.set()
        wait_until(lambda: len(ended) == 5000, "all")
    assert sum(isinstance(error, OSError) for error in ended) == 4999


# --- whose turn it is


def test_large_outputs_keep_no_input_waiting(tmp_path: Path) -> None:
    """The next job's inputs come from the store that the last one's outputs go to: a GPU must not wait for those."""
    gate = threading.Event()
    outputs = [tmp_path / f"out{number}" for number in range(40)]
    for path in outputs:
        path.write_bytes(b"x")
    with FileServer() as server, closing(transfer()) as made, ThreadPoolExecutor(2) as pool:
        server.objects["/in"] = Object(b"content")
        for path in outputs:
            server.script(f"/{path.name}", file_server.Act(gate=gate))
        sending = pool.submit(
            made.upload, [produced(path, putting(server.url(f"/{path.name}"))) for path in outputs], Recorder()
        )
        wait_until(lambda: server.busy == 16, "as many outputs as there may be at once are on their way")
        coming = pool.submit(made.download, [wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
        try:
            coming.result(20)
            still_busy = server.busy
        finally:
            gate.set()
        sending.result()
    assert (tmp_path / "in.part").read_bytes() == b"content"
    assert still_busy >= 16


def test_who_has_all_connections_does_not_keep_them(tmp_path: Path) -> None:
    with RangeServer(rate=125_000) as one, RangeServer() as other, ThreadPoolExecutor(1) as pool:
        names = [f"a{number}" for number in range(200)]
        for name in names:
            one.things[f"/{name}"] = Thing(b"x" * 5000)
        other.things["/b"] = Thing(b"y")
        made = PresignedTransfer(
            LOCAL, max_host_connections=2, max_connections=2, resolver=lambda host: frozenset({host})
        )
        with closing(made):
            items = [wanted(tmp_path, name, getting(one.url(f"/{name}"))) for name in names]
            all_of_one = pool.submit(made.download, items, Recorder())
            wait_until(lambda: one.running == 2, "all connections are taken")
            made.download([wanted(tmp_path, "b", getting(other.url("/b")))], Recorder())
            all_of_one.result()
    assert other.seen[0].began < one.seen[-1].began


# --- beginning anew


def test_a_download_that_begins_anew_takes_several_connections_again(tmp_path: Path) -> None:
    def plan(seen: Seen) -> Act | None:
        return {0: Act(cut=4 * MIB), 1: Act(status=416, body=b"")}.get(seen.number)

    with RangeServer(rate=2.5 * SLOW) as server, closing(moving()) as made:
        server.things["/in"] = Thing(CONTENT)
        server.plan = plan
        made.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
        assert server.busiest > 1
    assert same(tmp_path / "in.part", CONTENT)


@pytest.mark.fault("T22")
@pytest.mark.parametrize("line", [b"HTTP/1.1 200OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 200-OK"])
def test_a_status_that_cannot_be_read_is_the_networks_doing(tmp_path: Path, line: bytes) -> None:
    class Odd(RangeServer):
        def _answer(self, connection: socket.socket, seen: Seen, act: Act) -> None:
            if seen.number:
                super()._answer(connection, seen, act)
                return
            connection.sendall(line + b"\r\nContent-Length: 2\r\n\r\nhi")
            raise _End

    with Odd() as server, closing(moving()) as made:
        server.things["/in"] = Thing(b"content")
        made.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
        assert len(server.seen) == 2
    assert (tmp_path / "in.part").read_bytes() == b"content"


# --- signatures that are not good for ever


class Short(FileServer):
    """Takes only requests that are younger than `VALID_S` when they come, one tenth of a second each."""

    VALID_S = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.expired = 0

    def sending(self, name: str, _renew: bool) -> SignedRequest:
        return SignedRequest(Method.PUT, self._signed(name))

    def fetching(self, name: str) -> SignedRequest:
        return SignedRequest(Method.GET, self._signed(name))

    def _signed(self, name: str) -> str:
        return self.url(f"/{name}?until={time.monotonic() + self.VALID_S}")

    def _answer(self, connection: socket.socket, path: str, seen: file_server.Seen, act: file_server.Act) -> None:
        if time.monotonic() > float(seen.target.partition("until=")[2]):
            self.expired += 1
            act = file_server.Act(403, body=EXPIRED.body or b"")
        time.sleep(0.1)
        super()._answer(connection, path, seen, act)


@pytest.mark.fault("C1", "C10")
def test_what_waits_long_for_a_connection_is_signed_anew_and_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty files over one connection, each as long as a fifth of what a signature is good for."""
    monkeypatch.setattr(upload, "_STALE_S", 0.3)
    monkeypatch.setattr(download, "_STALE_S", 0.3)
    names = [f"f{number}" for number in range(20)]
    with Short() as server, closing(transfer(rules=Rules(), max_host_connections=1)) as made:
        for name in names:
            (tmp_path / name).write_bytes(name.encode())
        sent, came = Recorder(), Recorder()
        made.upload([produced(tmp_path / name, partial(server.sending, name)) for name in names], sent)
        made.download([wanted(tmp_path, name, partial(server.fetching, name)) for name in names], came)
    assert sent.names == came.names == set(names)
    assert all((tmp_path / f"{name}.part").read_bytes() == name.encode() for name in names)
    assert server.expired <= 3  # on a machine that stands still for a moment; of those not signed anew, nearly all are


def test_what_is_signed_anew_keeps_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else new files pass it each time, where a queue takes longer than a signature may wait."""
    monkeypatch.setattr(upload, "_STALE_S", 0.3)
    names = [f"f{number:02}" for number in range(40)]
    with Short() as server, closing(transfer(max_host_connections=1)) as made:
        for name in names:
            (tmp_path / name).write_bytes(name.encode())
        sent = Recorder()
        made.upload((produced(tmp_path / name, partial(server.sending, name)) for name in names), sent)
    # a file begins when its turn has come, or one or two later: its signature takes a moment
    assert all(abs(names.index(stored.name) - turn) <= 3 for turn, stored in enumerate(sent.stored))
    assert len(sent.stored) == 40


def test_an_ordinary_file_needs_no_thread_but_its_signers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To look up the API's addresses is theirs, too: a thread for each file that begins took longer than the file."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(batch, "ThreadPoolExecutor", refuse)
    with RangeServer() as server, closing(transfer()) as made:
        server.things["/in"] = Thing(b"x")
        watch = Recorder()
        made.download([wanted(tmp_path, "in", getting(server.url("/in")))], watch)
    assert watch.names == {"in"}


def test_an_attempt_that_ends_as_it_begins_is_not_repeated_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(ThreadPoolExecutor):
        def submit(self, *_: object, **__: object) -> NoReturn:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(batch, "ThreadPoolExecutor", Full)
    proxied = NetSettings(proxy="http://127.0.0.1:1")  # so a name is looked up first, which takes a thread
    with RangeServer() as server, closing(transfer(net=proxied)) as made:
        server.things["/in"] = Thing(b"x")
        thread, raised = in_background(made, server, tmp_path, Recorder())
        thread.join(10)
        assert not thread.is_alive()
    assert "a thread for transfers cannot be started" in str(raised[0])


def test_bytes_out_of_the_cache_are_counted_as_they_land(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the room that was promised to them would be wanted twice while they are copied."""
    (base := tmp_path / "base").mkdir()
    watch, write = Recorder(), cache_room._write_part
    counted = 0

    def as_a_disk_does(fd: int, data: memoryview, at: int) -> None:
        nonlocal counted
        write(fd, data, at)
        time.sleep(len(data) / (32 * MIB))
        counted = sum(watch.sizes)

    def plan(seen: Seen) -> Act | None:
        return Act(304, {"Content-Length": None}, b"") if "if-none-match" in seen.headers else None

    monkeypatch.setattr(cache_room, "_clone", lambda source, target: False)
    monkeypatch.setattr(cache_room, "_write_part", as_a_disk_does)
    kept = Cache(base / "cache", 2**30, lambda *_, **__: None, room_for=lambda _: None)
    with RangeServer() as server, closing(transfer(cache=kept)) as made:
        server.things["/in"] = Thing(CONTENT)
        server.plan = plan
        made.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
        made.download([wanted(tmp_path, "again", getting(server.url("/in")))], watch)
        assert [seen.status for seen in server.seen] == [200, 304]
    assert same(tmp_path / "again.part", CONTENT)
    assert sum(watch.sizes) == watch.expected == len(CONTENT)
    assert counted >= len(CONTENT) - 16 * MIB
