"""`BANDWIDTH_LIMIT`: never faster than it says, each way, however many files and connections; and nothing else changes.

Times are tested in one direction only: what is moved takes at least as long as the limit makes it.
"""

import contextlib
import random
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from jobfetcher.core.errors import Stopped, StopReason
from jobfetcher.core.urls import Method, SignedRequest
from jobfetcher.transfer.exchange import NetSettings
from jobfetcher.transfer.presigned import PresignedTransfer
from tests.support.file_server import FileServer, Object
from tests.support.range_server import RangeServer, Thing
from tests.support.services import wait_until
from tests.support.side_by_side import side_by_side, when
from tests.support.transfers import LOCAL, Nap, Recorder, getting, open_files, produced, putting, wanted

MIB = 1024 * 1024
LIMIT = 6 * MIB
FILES = {f"file{number}": random.Random(number).randbytes(3 * MIB) for number in range(4)}  # noqa: S311
TOTAL = sum(map(len, FILES.values()))

#: A limit is kept on the average, with pieces of some size: in the 2 s of these tests, this much faster is kept.
TOLERANCE = 1.15


@pytest.fixture
def server() -> Iterator[FileServer]:
    with store() as running:
        yield running


@contextlib.contextmanager
def store() -> Iterator[FileServer]:
    """A server without limits, with the files."""
    with FileServer() as running:
        running.objects |= {f"/{name}": Object(content) for name, content in FILES.items()}
        yield running


def limited(limit: int | None = LIMIT, net: NetSettings | None = None) -> PresignedTransfer:
    return PresignedTransfer(
        LOCAL,
        bandwidth_limit=limit,
        rules=Nap().rules,
        net=net or NetSettings(connect_timeout_s=5.0),
        resolver=lambda host: frozenset({host}),
    )


def bring(made: PresignedTransfer, server: FileServer, folder: Path) -> float:
    """Fetch all files, check them, and return the seconds that it took."""
    watch = Recorder()
    began = time.monotonic()
    made.download((wanted(folder, name, getting(server.url(f"/{name}"))) for name in FILES), watch)
    took = time.monotonic() - began
    assert all((folder / f"{name}.part").read_bytes() == content for name, content in FILES.items())
    assert sum(watch.sizes) == watch.expected == TOTAL
    return took


def send(made: PresignedTransfer, server: FileServer, folder: Path, method: Method = Method.PUT) -> float:
    """Send all files, check them, and return the seconds that it took."""
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    watch = Recorder()

    def form(_: bool) -> SignedRequest:
        return SignedRequest(Method.POST, server.url("/put"), fields=(("key", "${filename}"),))

    began = time.monotonic()
    made.upload(
        (
            produced(folder / name, putting(server.url(f"/put/{name}")) if method is Method.PUT else form)
            for name in FILES
        ),
        watch,
    )
    took = time.monotonic() - began
    assert all(server.objects[f"/put/{name}"].content == content for name, content in FILES.items())
    assert sum(watch.sizes) == watch.expected == TOTAL
    return took


@pytest.mark.fault("B14")
def test_never_faster_than_the_limit(tmp_path: Path) -> None:
    def downloads(folder: Path) -> None:
        with store() as server, closing(limited()) as made:
            assert bring(made, server, folder) > TOTAL / LIMIT / TOLERANCE
            assert len(server.seen) == len(FILES)

    def uploads(folder: Path, method: Method) -> None:
        with store() as server, closing(limited()) as made:
            assert send(made, server, folder, method) > TOTAL / LIMIT / TOLERANCE
            assert len(server.seen) == len(FILES)

    def two_calls(folder: Path) -> None:
        """Each job has a call of its own; the limit is the worker's."""
        with store() as server, closing(limited(2 * LIMIT)) as made:
            began = time.monotonic()
            side_by_side({name: partial(bring, made, server, own(folder, name)) for name in ("one", "two")})
            assert time.monotonic() - began > 2 * TOTAL / (2 * LIMIT) / TOLERANCE
            assert len(server.seen) == 2 * len(FILES)

    def slow_on_purpose(folder: Path) -> None:
        """Of the limit each file has a quarter, less than what ends an exchange; and yet none is ended."""
        net = NetSettings(slow_bytes_per_s=LIMIT, slow_for_s=1)
        with store() as server, closing(limited(net=net)) as made:
            bring(made, server, folder)
            send(made, server, folder)
            assert len(server.seen) == 2 * len(FILES)

    side_by_side(
        {
            "downloads": partial(downloads, own(tmp_path, "downloads")),
            "uploads, PUT": partial(uploads, own(tmp_path, "put"), Method.PUT),
            "uploads, POST": partial(uploads, own(tmp_path, "post"), Method.POST),
            "two calls": partial(two_calls, own(tmp_path, "calls")),
            "not slow": partial(slow_on_purpose, own(tmp_path, "slow")),
        }
    )


def own(folder: Path, name: str) -> Path:
    """A new folder."""
    (folder / name).mkdir()
    return folder / name


def test_each_direction_has_a_limit_of_its_own(server: FileServer, tmp_path: Path) -> None:
    took: dict[str, float] = {}
    with closing(limited()) as made:
        began = time.monotonic()
        side_by_side(
            {
                "in": lambda: took.update(up=bring(made, server, own(tmp_path, "in"))),
                "out": lambda: took.update(down=send(made, server, own(tmp_path, "out"))),
            }
        )
        together = time.monotonic() - began
    assert min(took.values()) > TOTAL / LIMIT / TOLERANCE
    assert 2 * TOTAL / together > 1.2 * LIMIT  # or else they share one


def test_ranges_together_are_no_faster_than_the_limit(tmp_path: Path) -> None:
    content = random.Random(9).randbytes(24 * MIB)  # noqa: S311
    limit = 10 * MIB
    with RangeServer(rate=4.0 * MIB) as server:
        server.things["/in"] = Thing(content)
        watch = Recorder()
        with closing(limited(limit)) as made:
            began = time.monotonic()
            made.download([wanted(tmp_path, "in", getting(server.url("/in")))], watch)
            assert time.monotonic() - began > len(content) / limit / TOLERANCE
        assert server.ranged
        # What waits in the kernel for a connection that is not needed any more is lost, and there is more of it here.
        assert server.sent < 1.3 * len(content)
    assert (tmp_path / "in.part").read_bytes() == content
    assert sum(watch.sizes) == watch.expected == len(content)


@pytest.mark.fault("B14")
def test_a_server_that_is_slow_itself_is_left_all_the_same(tmp_path: Path) -> None:
    with RangeServer(rate=1.0) as server:
        server.things["/in"] = Thing(b"content")
        watch = Recorder()
        net = NetSettings(slow_bytes_per_s=1024, slow_for_s=1)
        second_try = when(lambda: len(server.seen) >= 2, lambda: setattr(server, "rate", None))
        with closing(limited(net=net)) as made, second_try:
            made.download([wanted(tmp_path, "in", getting(server.url("/in")))], watch)
    assert (tmp_path / "in.part").read_bytes() == b"content"


@pytest.mark.fault("B17")
@pytest.mark.parametrize("direction", ["download", "upload"])
def test_a_halt_during_a_pause_ends_at_once(server: FileServer, tmp_path: Path, direction: str) -> None:
    before = open_files()
    watch = Recorder()
    halted: list[float] = []

    def halt() -> None:
        halted.append(time.monotonic())
        watch.halt.set(StopReason.CANCELLED)

    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    made = limited(65_536)

    def move() -> None:
        if direction == "download":
            made.download((wanted(tmp_path, name, getting(server.url(f"/{name}"))) for name in FILES), watch)
        else:
            made.upload((produced(tmp_path / name, putting(server.url(f"/put/{name}"))) for name in FILES), watch)

    with when(lambda: bool(watch.sizes), halt), pytest.raises(Stopped):  # the limit is spent with the first piece
        move()
    assert time.monotonic() - halted[0] < 5.0
    assert watch.stored == []
    assert sum(watch.sizes) < TOTAL / 2
    closed = time.monotonic()
    made.close()
    assert time.monotonic() - closed < 5.0
    wait_until(lambda: open_files() <= before, "no more sockets", 5)


def test_without_a_limit_nothing_waits(server: FileServer, tmp_path: Path) -> None:
    with closing(limited(None)) as made:
        assert bring(made, server, tmp_path) < TOTAL / LIMIT / TOLERANCE
        assert send(made, server, tmp_path) < TOTAL / LIMIT / TOLERANCE
