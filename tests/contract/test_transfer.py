"""The contract of `core.ports.Transfer`: one set of tests for the fake and for the real adapter on a real socket."""

import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Protocol

import pytest

from jobfetcher.core.errors import (
    JobFault,
    JobReason,
    SourceRefused,
    SourceUnavailable,
    Stopped,
    StopReason,
    WorkerFault,
    WorkerReason,
)
from jobfetcher.core.ports import Download, Transfer, Upload
from jobfetcher.core.urls import Method, SignedRequest
from jobfetcher.testing.fake_transfer import FakeTransfer
from tests.support.file_server import Act, FileServer, Object
from tests.support.services import wait_until
from tests.support.transfers import Recorder, get, getting, open_files, produced, putting, sparse, transfer, wanted


class World(Protocol):
    """A store, and the transfer under test that can reach it."""

    @property
    def transfer(self) -> Transfer: ...

    def put(self, path: str, content: bytes) -> None: ...

    def content(self, path: str) -> bytes | None: ...

    def url(self, path: str) -> str: ...

    def stall(self, path: str, name: str) -> None:
        """From now on nothing comes of moving `name` to or from `path`."""
        ...


class FakeWorld:
    def __init__(self) -> None:
        self.transfer = FakeTransfer(max_upload_bytes=1_000_000)

    def put(self, path: str, content: bytes) -> None:
        self.transfer.objects[self.url(path)] = content

    def content(self, path: str) -> bytes | None:
        return self.transfer.objects.get(self.url(path))

    def url(self, path: str) -> str:
        return f"https://storage.test{path}"

    def stall(self, path: str, name: str) -> None:
        self.transfer.stall.add(name)


class RealWorld:
    def __init__(self, server: FileServer) -> None:
        self.server = server
        self.transfer = transfer(max_upload_bytes=1_000_000, concurrency=4)

    def put(self, path: str, content: bytes) -> None:
        self.server.objects[path] = Object(content)

    def content(self, path: str) -> bytes | None:
        thing = self.server.objects.get(path)
        return None if thing is None else thing.content

    def url(self, path: str) -> str:
        return self.server.url(path)

    def stall(self, path: str, name: str) -> None:
        self.server.script(path, Act(stall_headers=True))


@pytest.fixture(params=["fake", "presigned"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    if request.param == "fake":
        yield FakeWorld()
        return
    with FileServer() as server:
        real = RealWorld(server)
        with closing(real.transfer):
            yield real


def _content(number: int) -> bytes:
    return (f"content of file {number}\n" * (number * 7)).encode()


def test_inputs_arrive_whole_and_are_told_by_the_callers_thread(world: World, tmp_path: Path) -> None:
    contents = {f"in{number}": _content(number) for number in range(20)}  # number 0 is an empty file
    for name, content in contents.items():
        world.put(f"/{name}", content)
    watch = Recorder()
    world.transfer.download((wanted(tmp_path, name, getting(world.url(f"/{name}"))) for name in contents), watch)
    assert {name: (tmp_path / f"{name}.part").read_bytes() for name in contents} == contents
    assert {stored.name: stored.size for stored in watch.stored} == {key: len(val) for key, val in contents.items()}
    for stored in watch.stored:
        algorithm, _, digest = stored.digest.partition(":")
        assert hashlib.new(algorithm, contents[stored.name]).hexdigest() == digest
    assert sum(watch.sizes) == watch.expected == sum(map(len, contents.values()))
    assert watch.threads == {threading.current_thread()}


@pytest.mark.parametrize("method", [Method.PUT, Method.POST])
def test_outputs_arrive_whole(world: World, tmp_path: Path, method: Method) -> None:
    contents = {f"out{number}": _content(number) for number in range(20)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)

    def sign(name: str) -> Callable[[bool], SignedRequest]:
        if method is Method.PUT:
            return putting(world.url(f"/put/{name}"))
        return lambda _: SignedRequest(Method.POST, world.url("/put"), fields=(("key", "put/${filename}"),))

    watch = Recorder()
    world.transfer.upload((produced(tmp_path / name, sign(name)) for name in contents), watch)
    assert {name: world.content(f"/put/{name}") for name in contents} == contents
    assert watch.names == set(contents)
    for stored in watch.stored:
        # Both are stores that say the MD5 of what they got; see C9 in tests/faults for those that do not.
        assert stored.digest == f"md5:{hashlib.md5(contents[stored.name], usedforsecurity=False).hexdigest()}"
    assert sum(watch.sizes) == watch.expected == sum(map(len, contents.values()))
    assert watch.threads == {threading.current_thread()}


def test_nothing_to_do(world: World) -> None:
    watch = Recorder()
    world.transfer.download([], watch)
    world.transfer.upload([], watch)
    assert (watch.sizes, watch.stored) == ([], [])


def test_items_are_taken_lazily(world: World, tmp_path: Path) -> None:
    taken, done = 0, 0

    def items() -> Iterator[Download]:
        nonlocal taken
        for number in range(600):
            taken += 1
            assert taken - done <= 256  # of files that go by fast; 20 of others, here
            world.put(f"/{number}", b"x")
            yield wanted(tmp_path, str(number), getting(world.url(f"/{number}")))

    def count(_: object) -> None:
        nonlocal done
        done += 1

    world.transfer.download(items(), Recorder(count))
    assert (taken, done) == (600, 600)


@pytest.mark.fault("J6")
def test_a_walk_that_fails_while_the_last_file_is_marked_is_heard(world: World, tmp_path: Path) -> None:
    """Else a job would be called finished though part of its outputs could not even be looked at."""
    path = tmp_path / "out"
    path.write_bytes(b"x")
    caller, marking = threading.current_thread(), threading.Event()
    walkers: list[threading.Thread] = []

    def items() -> Iterator[Upload]:
        walkers.append(threading.current_thread())
        yield produced(path, putting(world.url("/out")))
        walkers.append(threading.current_thread())
        marking.wait(10)
        raise PermissionError(13, "Permission denied", "sub")

    def mark(_: object) -> None:
        marking.set()
        if walkers[0] is not caller:
            wait_until(lambda: len(walkers) == 2, "the walk goes on")
            walkers[1].join(10)

    with pytest.raises(PermissionError):
        world.transfer.upload(items(), Recorder(mark))


@pytest.mark.fault("C7")
def test_a_missing_input_ends_the_download(world: World, tmp_path: Path) -> None:
    with pytest.raises(JobFault, match="input gone not found in storage") as caught:
        world.transfer.download([wanted(tmp_path, "gone", getting(world.url("/gone")))], Recorder())
    assert caught.value.reason is JobReason.INPUT_MISSING


def test_a_failed_download_begins_no_more_files(world: World, tmp_path: Path) -> None:
    def items() -> Iterator[Download]:
        yield wanted(tmp_path, "gone", getting(world.url("/gone")))
        for number in itertools.count():
            world.put(f"/{number}", b"x")
            yield wanted(tmp_path, str(number), getting(world.url(f"/{number}")))

    watch = Recorder()
    with pytest.raises(JobFault):
        world.transfer.download(items(), watch)  # that it ends says that there is an end to them


@pytest.mark.fault("C11")
def test_a_failed_upload_lets_the_others_go_on(world: World, tmp_path: Path) -> None:
    big = sparse(tmp_path / "big", 1_000_001)
    small = [tmp_path / f"small{number}" for number in range(10)]
    for path in small:
        path.write_bytes(b"small")
    watch = Recorder()
    with pytest.raises(JobFault, match="output big is") as caught:
        world.transfer.upload(
            (produced(path, putting(world.url(f"/{path.name}"))) for path in [big, *small]),
            watch,
        )
    assert caught.value.reason is JobReason.OUTPUT_TOO_LARGE
    assert watch.names == {path.name for path in small}
    assert world.content("/big") is None


@pytest.mark.fault("C14")
@pytest.mark.parametrize("change", ["grown", "touched"])
def test_an_output_that_changed_is_the_jobs_fault(world: World, tmp_path: Path, change: str) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"before")
    item = produced(path, putting(world.url("/out")))
    match change:
        case "grown":
            path.write_bytes(b"before and after")
        case "touched":
            os.utime(path, ns=(1, item.mtime_ns + 1))
    with pytest.raises(JobFault, match="output out changed before it was sent") as caught:
        world.transfer.upload([item], Recorder())
    assert caught.value.reason is JobReason.BAD_OUTPUT
    assert world.content("/out") is None


def test_an_output_that_is_gone_is_the_machines_fault(world: World, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"before")
    item = produced(path, putting(world.url("/out")))
    path.unlink()
    with pytest.raises(WorkerFault, match="output out cannot be read: No such file or directory") as caught:
        world.transfer.upload([item], Recorder())
    assert caught.value.reason is WorkerReason.DISK
    assert world.content("/out") is None


@pytest.mark.parametrize("error", [SourceUnavailable("no answer"), SourceRefused("no access")])
def test_a_source_that_comes_back_is_waited_for(world: World, tmp_path: Path, error: Exception) -> None:
    world.put("/in", b"in")
    (tmp_path / "out").write_bytes(b"out")
    errors: list[Exception] = [error] * 10  # 5 tries for each file

    def sign_input() -> SignedRequest:
        if len(errors) > 5:
            raise errors.pop()
        return get(world.url("/in"))

    def sign_output(_: bool) -> SignedRequest:
        if errors:
            raise errors.pop()
        return SignedRequest(Method.PUT, world.url("/out"))

    watch = Recorder()
    world.transfer.download([wanted(tmp_path, "in", sign_input)], watch)
    world.transfer.upload([produced(tmp_path / "out", sign_output)], watch)
    assert watch.names == {"in", "out"}
    assert world.content("/out") == b"out"


@pytest.mark.parametrize(
    "error",
    [
        JobFault(JobReason.INPUT_MISSING, "nobody knows it"),
        WorkerFault(WorkerReason.SOURCE, "no use"),
        Stopped(StopReason.LOST),
        RuntimeError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_signing_says_is_final(world: World, tmp_path: Path, error: Exception) -> None:
    (tmp_path / "out").write_bytes(b"out")

    def refuse(*_: object) -> SignedRequest:
        raise error

    with pytest.raises(type(error)) as caught:
        world.transfer.download([wanted(tmp_path, "in", refuse)], Recorder())
    assert caught.value is error
    with pytest.raises(type(error)) as caught:
        world.transfer.upload([produced(tmp_path / "out", refuse)], Recorder())
    assert caught.value is error


@pytest.mark.fault("T6")
def test_a_request_of_the_wrong_direction_is_refused(world: World, tmp_path: Path) -> None:
    world.put("/x", b"theirs")
    (tmp_path / "out").write_bytes(b"ours")
    put = SignedRequest(Method.PUT, world.url("/x"))
    with pytest.raises(JobFault) as caught:
        world.transfer.download([wanted(tmp_path, "in", lambda: put)], Recorder())
    assert caught.value.reason is JobReason.UNSAFE_REQUEST
    with pytest.raises(JobFault) as caught:
        world.transfer.upload([produced(tmp_path / "out", lambda _: get(world.url("/x")))], Recorder())
    assert caught.value.reason is JobReason.UNSAFE_REQUEST
    assert world.content("/x") == b"theirs"


def test_a_halt_that_is_set_already_moves_nothing(world: World, tmp_path: Path) -> None:
    world.put("/in", b"in")
    watch = Recorder()
    watch.halt.set(StopReason.SHUTDOWN)
    with pytest.raises(Stopped):
        world.transfer.download([wanted(tmp_path, "in", getting(world.url("/in")))], watch)
    (tmp_path / "out").write_bytes(b"out")
    with pytest.raises(Stopped):
        world.transfer.upload([produced(tmp_path / "out", putting(world.url("/out")))], watch)
    assert world.content("/out") is None


@pytest.mark.fault("B17")
@pytest.mark.parametrize("direction", ["download", "upload"])
def test_a_halt_ends_what_is_in_flight_at_once(world: World, tmp_path: Path, direction: str) -> None:
    world.put("/slow", b"slow")
    world.stall("/slow", "slow")
    path = tmp_path / "slow"
    path.write_bytes(b"slow")
    watch = Recorder()
    before = open_files()
    halted_at: list[float] = []

    def halt() -> None:
        halted_at.append(time.monotonic())
        watch.halt.set(StopReason.CANCELLED)

    timer = threading.Timer(0.3, halt)
    timer.start()

    def move() -> None:
        if direction == "download":
            world.transfer.download([wanted(tmp_path, "slow", getting(world.url("/slow")))], watch)
        else:
            world.transfer.upload([produced(path, putting(world.url("/slow")))], watch)

    with pytest.raises(Stopped) as caught:
        move()
    timer.join()
    assert caught.value.reason is StopReason.CANCELLED
    assert time.monotonic() - halted_at[0] < 10.0
    assert watch.stored == []
    world.transfer.close()
    deadline = time.monotonic() + 5
    while open_files() > before and time.monotonic() < deadline:
        time.sleep(0.01)  # until the server has noticed that we left
    assert open_files() <= before


def test_an_error_in_done_ends_the_batch(world: World, tmp_path: Path) -> None:
    for number in range(50):
        world.put(f"/{number}", b"x")

    class Mine(Exception):
        pass

    def refuse(_: object) -> None:
        raise Mine

    watch = Recorder(refuse)
    with pytest.raises(Mine):
        world.transfer.download(
            (wanted(tmp_path, str(number), getting(world.url(f"/{number}"))) for number in range(50)),
            watch,
        )
    assert watch.stored == []


def test_a_closed_transfer_refuses(world: World, tmp_path: Path) -> None:
    world.put("/in", b"in")
    world.transfer.close()
    with pytest.raises(WorkerFault) as caught:
        world.transfer.download([wanted(tmp_path, "in", getting(world.url("/in")))], Recorder())
    assert caught.value.reason is WorkerReason.INTERNAL
