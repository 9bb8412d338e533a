"""Large inputs over several connections, from servers that do not play by the rules (FAULTS.md C, A2, B14, D2).

Each connection of the server has a speed of its own, so that more of them are worth having; what goes wrong is in the
replies. Everything is seen from the seam: what was asked of the server, what lies in the file, what the watch was told.
Most cases wait most of the time, for ranges begin after half a second at the least; so they run side by side.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from jobfetcher.core.errors import JobFault, JobReason, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.urls import SignedRequest
from jobfetcher.transfer.exchange import NetSettings
from jobfetcher.transfer.patience import Rules
from jobfetcher.transfer.presigned import PresignedTransfer
from tests.support import mounts
from tests.support.range_server import EXPIRED, RESET, SLOW_DOWN, TOO_MANY, Act, RangeServer, Seen, Thing
from tests.support.services import REPOSITORY, wait_until
from tests.support.side_by_side import side_by_side, when
from tests.support.transfers import LOCAL, Nap, Recorder, get, getting, open_files, wanted

MIB = 1024 * 1024
SIZE = 24 * MIB
CONTENT = random.Random(1).randbytes(SIZE)  # noqa: S311  repeatable, not secret
OTHER = random.Random(2).randbytes(SIZE)  # noqa: S311

#: Of one connection. The file takes 16 s over one: long enough for several to be worth while.
SLOW = 1.5 * MIB
#: For what is left once a test has seen what it is about; not without limit, so that little is sent in vain.
FAST = 40.0 * MIB

#: What the kernels may hold for connections that are ended early, where nobody reads it: 50 ms at full speed for each.
IN_VAIN = 4 * MIB

#: What one connection can have brought before there are others, and what all can have brought soon after.
ALONE, SPREAD = 2 * SLOW, 4 * SLOW


def moving(
    *,
    ranges: int = 8,
    rules: Rules | None = None,
    net: NetSettings | None = None,
    max_host_connections: int = 16,
    download_budget_s: float = 3600.0,
) -> PresignedTransfer:
    """The real adapter; its pauses take no time unless `rules` says otherwise."""
    return PresignedTransfer(
        LOCAL,
        ranges=ranges,
        rules=rules or Nap().rules,
        net=net or NetSettings(connect_timeout_s=5.0),
        max_host_connections=max_host_connections,
        resolver=lambda host: frozenset({host}),
        download_budget_s=download_budget_s,
    )


def strict() -> PresignedTransfer:
    """One that gives up at the first failure that counts: its clock goes on by a second whenever it is read.

    It has four connections, since libcurl tries five dead ones, one after the other, before it calls that a failure.
    """
    clock = itertools.count(1)
    rules = Rules(clock=lambda: float(next(clock)), pause=lambda _: 0.0)
    return moving(rules=rules, max_host_connections=4, download_budget_s=0.5)


def bring(made: PresignedTransfer, server: RangeServer, folder: Path) -> Recorder:
    """Fetch /in with `made`, close it, and check that the file is whole, alone, and that the sums are exact."""
    watch = Recorder()
    with closing(made):
        made.download([wanted(folder, "in", getting(server.url("/in")))], watch)
    check(folder, server.things["/in"].content, watch)
    return watch


def check(folder: Path, content: bytes, watch: Recorder) -> None:
    assert same(folder / "in.part", content)
    assert [path.name for path in folder.iterdir()] == ["in.part"]
    assert sum(watch.sizes) == watch.expected == len(content)
    check_digest(content, watch)


def check_digest(content: bytes, watch: Recorder) -> None:
    (stored,) = watch.stored
    algorithm, _, digest = stored.digest.partition(":")
    assert (stored.size, digest) == (len(content), hashlib.new(algorithm, content).hexdigest())


def same(path: Path, content: bytes) -> bool:
    """Whether the file has that content. Not compared in an assertion: pytest would print the difference, all of it."""
    return path.read_bytes() == content


def sent_more(server: RangeServer, than: float) -> bool:
    return server.sent > than


def faster_at(server: RangeServer, sent: float) -> contextlib.AbstractContextManager[None]:
    """While the block runs: from so many bytes on, the rest comes fast."""
    return when(partial(sent_more, server, sent), lambda: setattr(server, "rate", FAST))


def nth_range(number: int) -> Callable[[Seen], bool]:
    """Whether a request is the so-many-th for a range. The server's list does not tell: two may come at once."""
    ranged = itertools.count(1)
    return lambda seen: seen.ranged and next(ranged) == number


Case = Callable[[RangeServer, Path], None]


def in_own_worlds(folder: Path, cases: Mapping[str, Case]) -> None:
    """Run all cases side by side, each with a server and a folder of its own."""

    def run(number: int, case: Case) -> None:
        (own := folder / str(number)).mkdir()
        with RangeServer(rate=SLOW) as server:
            server.things["/in"] = Thing(CONTENT)
            case(server, own)

    side_by_side({name: partial(run, number, case) for number, (name, case) in enumerate(cases.items())})


@pytest.fixture
def server() -> Iterator[RangeServer]:
    with RangeServer(rate=SLOW) as running:
        running.things["/in"] = Thing(CONTENT)
        yield running


# --- honest servers


@pytest.mark.fault("C13")
def test_a_large_file_comes_over_several_connections_and_no_byte_twice(server: RangeServer, tmp_path: Path) -> None:
    server.rate = 3.0 * MIB
    server.things["/in"] = Thing(CONTENT + OTHER)
    began = time.monotonic()
    bring(moving(ranges=8), server, tmp_path)
    # One connection takes 16 s at the least, since the server is no faster; this is no test of speed.
    assert time.monotonic() - began < 2 * SIZE / server.rate / 1.5
    assert 6 <= server.busiest <= 8
    assert server.sent < 2 * SIZE + IN_VAIN
    assert all(seen.headers["if-range"] == '"one"' for seen in server.ranged)
    # None is asked for less than is worth a request of its own.
    assert len(server.seen) <= 1 + 2 * SIZE / (2 * MIB)


@pytest.mark.fault("C4", "C5", "C6")
def test_who_gets_one_connection_and_who_more(tmp_path: Path) -> None:
    def one(server: RangeServer, folder: Path, *, thing: Thing, ranges: int = 8) -> None:
        server.things["/in"] = thing
        with faster_at(server, ALONE):  # ranges would have begun by now
            bring(moving(ranges=ranges), server, folder)
        assert len(server.seen) == 1
        assert server.sent == SIZE

    def three(server: RangeServer, folder: Path) -> None:
        with when(lambda: server.busiest == 3, lambda: setattr(server, "rate", 3 * SLOW)):
            bring(moving(ranges=3), server, folder)
        assert server.busiest == 3

    def four_files(server: RangeServer, folder: Path) -> None:
        names = [f"file{number}" for number in range(4)]
        server.things = {f"/{name}": Thing(CONTENT[number:]) for number, name in enumerate(names)}
        server.rate = 4 * SLOW
        watch = Recorder()
        with closing(moving(max_host_connections=6)) as made:
            made.download((wanted(folder, name, getting(server.url(f"/{name}"))) for name in names), watch)
        assert all(same(folder / f"{name}.part", CONTENT[number:]) for number, name in enumerate(names))
        assert sum(watch.sizes) == watch.expected == sum(stored.size for stored in watch.stored)
        assert server.ranged
        assert server.busiest <= 6

    def redirected(server: RangeServer, folder: Path) -> None:
        to = Act(status=302, headers={"Location": server.url("/there")}, body=b"")
        server.things["/there"] = server.things["/in"]
        server.plan = lambda seen: to if seen.target == "/in" else None
        with faster_at(server, ALONE):
            bring(moving(), server, folder)
        assert any(seen.target == "/there" and seen.status == 206 for seen in server.ranged)
        assert server.sent < SIZE + IN_VAIN

    in_own_worlds(
        tmp_path,
        {
            "TRANSFER_RANGES=1": partial(one, thing=Thing(CONTENT), ranges=1),
            "no Accept-Ranges": partial(one, thing=Thing(CONTENT, headers={"Accept-Ranges": None})),
            "Accept-Ranges: none": partial(one, thing=Thing(CONTENT, headers={"Accept-Ranges": "none"})),
            "a weak ETag": partial(one, thing=Thing(CONTENT, etag='W/"one"')),
            "no ETag": partial(one, thing=Thing(CONTENT, headers={"ETag": None})),
            "an ETag that is none": partial(one, thing=Thing(CONTENT, etag="one")),
            "TRANSFER_RANGES=3": three,
            "four files, six connections": four_files,
            "each range is redirected": redirected,
        },
    )


@pytest.mark.fault("C5")
def test_a_fast_connection_is_enough(server: RangeServer, tmp_path: Path) -> None:
    """Alone: beside others it may be slow at first, and then ranges are right."""
    server.rate = FAST
    bring(moving(), server, tmp_path)
    assert len(server.seen) == 1


# --- servers that ignore Range, or lie about it


@pytest.mark.fault("C5")
def test_a_server_that_ignores_ranges_costs_a_few_requests(server: RangeServer, tmp_path: Path) -> None:
    server.rate = 2 * SLOW
    server.things["/in"] = Thing(CONTENT + OTHER)
    server.plan = lambda _: Act(ignore_range=True)
    with faster_at(server, ALONE):
        bring(moving(), server, tmp_path)
    assert server.ranged  # it was asked, and never gave one
    assert len(server.seen) <= 9
    # The answers nobody wanted are left at once, and the one that came first is not thrown away.
    assert server.sent < 2 * SIZE + IN_VAIN


def _multipart(seen: Seen) -> Act:
    first, last = seen.span(SIZE)
    body = (
        b"--x\r\nContent-Type: application/octet-stream\r\n"
        + f"Content-Range: bytes {first}-{last}/{SIZE}\r\n\r\n".encode()
        + CONTENT[first : last + 1]
        + b"\r\n--x--\r\n"
    )
    return Act(headers={"Content-Type": "multipart/byteranges; boundary=x", "Content-Range": None}, body=body)


def _elsewhere(seen: Seen) -> Act:
    """The bytes before those that were asked for, and it says so."""
    first, last = seen.span(SIZE)
    by = min(MIB, first)
    return Act(
        headers={"Content-Range": f"bytes {first - by}-{last - by}/{SIZE}"}, body=CONTENT[first - by : last - by + 1]
    )


def _from_the_start(_: Seen) -> Act:
    """The whole file, called a part of it."""
    return Act(headers={"Content-Range": f"bytes 0-{SIZE - 1}/{SIZE}"}, body=CONTENT)


def _fewer(seen: Seen) -> Act:
    """Says that it brings what was asked for, and that this is shorter than it is."""
    first, last = seen.span(SIZE)
    return Act(body=CONTENT[first : (first + last) // 2])


def _more(seen: Seen) -> Act:
    """Goes on with other bytes where the range ends."""
    first, last = seen.span(SIZE)
    return Act(body=CONTENT[first : last + 1] + b"x" * MIB)


def _more_unsaid(seen: Seen) -> Act:
    """The same without a length; the end of the connection is the end."""
    return Act(body=_more(seen).body, headers={"Content-Length": None}, close=True)


def _beyond(seen: Seen) -> Act:
    """More than was asked for, and it says so."""
    first, last = seen.span(SIZE)
    end = min(last + MIB, SIZE - 1)
    return Act(headers={"Content-Range": f"bytes {first}-{end}/{SIZE}"}, body=CONTENT[first : end + 1])


def _another_total(seen: Seen) -> Act:
    """Bytes of a file of another size under the same name and ETag."""
    first, last = seen.span(SIZE)
    return Act(headers={"Content-Range": f"bytes {first}-{last}/{SIZE + 1}"}, body=OTHER[first : last + 1])


def _another_object(seen: Seen, etag: str | None = '"two"') -> Act:
    first, last = seen.span(SIZE)
    return Act(headers={"ETag": etag}, body=OTHER[first : last + 1], ignore_if_range=True)


def _it_ends_here(seen: Seen) -> Act:
    """As if the file were as long as what comes before the range."""
    return Act(status=416, headers={"Content-Range": f"bytes */{seen.first}"}, body=b"")


LIES: dict[str, Callable[[Seen], Act]] = {
    "multipart": _multipart,
    "elsewhere": _elsewhere,
    "the whole file": _from_the_start,
    "fewer": _fewer,
    "more": _more,
    "more, no length": _more_unsaid,
    "beyond the range": _beyond,
    "another total": _another_total,
    "another object": _another_object,
    "another object, weak ETag": partial(_another_object, etag='W/"two"'),
    "another object, odd ETag": partial(_another_object, etag="two"),
    "no Content-Range": lambda _: Act(headers={"Content-Range": None}),
    "absurd Content-Range": lambda _: Act(headers={"Content-Range": "bytes 10-5/20"}),
    "another 200": lambda _: Act(status=200, headers={"Content-Range": None}, body=OTHER[: SIZE // 2]),
    "204": lambda _: Act(status=204, headers={"Content-Range": None}, body=b""),
    "416, it ends here": _it_ends_here,
}


@pytest.mark.fault("C4", "C5")
@pytest.mark.parametrize("which", ["each", "third"])
def test_a_range_that_is_not_what_was_asked_for_is_not_taken(tmp_path: Path, which: str) -> None:
    def lies(server: RangeServer, folder: Path, *, lie: Callable[[Seen], Act]) -> None:
        told = 0
        is_third = nth_range(3)

        def plan(seen: Seen) -> Act | None:
            nonlocal told
            if not seen.ranged or (which == "third" and not is_third(seen)):
                return None
            told += 1
            return lie(seen)

        server.plan = plan
        with faster_at(server, ALONE):
            bring(moving(), server, folder)
        assert told
        assert len(server.seen) < 40
        assert server.sent < 2.6 * SIZE  # once over again is the most

    in_own_worlds(tmp_path, {name: partial(lies, lie=lie) for name, lie in LIES.items()})


@pytest.mark.fault("C4")
def test_a_part_that_nobody_asked_for_is_discarded(server: RangeServer, tmp_path: Path) -> None:
    part = Act(status=206, headers={"Content-Range": f"bytes 0-{MIB - 1}/{SIZE}"}, body=OTHER[:MIB])
    server.rate = FAST
    server.plan = lambda seen: part if seen.number < 2 else None
    bring(moving(), server, tmp_path)
    assert len(server.seen) == 3


@pytest.mark.fault("T16")
def test_a_range_that_is_packed_is_not_taken(server: RangeServer, tmp_path: Path) -> None:
    """Nothing is ever unpacked: the reason is said, as for a whole file."""
    server.plan = lambda seen: Act(headers={"Content-Encoding": "gzip"}) if seen.ranged else None
    with closing(moving()) as made, pytest.raises(JobFault, match="Content-Encoding gzip") as caught:
        made.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
    assert caught.value.reason is JobReason.INPUT_CORRUPT


def _vouched_for(content: bytes, how: str = "etag") -> Thing:
    """An object with a checksum."""
    digest = hashlib.md5(content, usedforsecurity=False)
    if how == "etag":
        return Thing(content, etag=f'"{digest.hexdigest()}"', headers={"x-amz-request-id": "1"})
    if how == "content-md5":
        return Thing(content, headers={"Content-MD5": base64.b64encode(digest.digest()).decode()})
    sha256 = base64.b64encode(hashlib.sha256(content).digest()).decode()
    return Thing(content, headers={"x-amz-checksum-sha256": sha256})


@pytest.mark.fault("C3")
def test_damaged_ranges_are_found_by_the_checksum(tmp_path: Path) -> None:
    def once(server: RangeServer, folder: Path, *, how: str) -> None:
        server.things["/in"] = _vouched_for(CONTENT, how)
        is_first = nth_range(1)
        server.plan = lambda seen: Act(flip=1000) if is_first(seen) else None
        with faster_at(server, ALONE):
            bring(moving(), server, folder)
        assert server.ranged
        assert SIZE < server.sent < 2.6 * SIZE

    def always(server: RangeServer, folder: Path) -> None:
        server.things["/in"] = _vouched_for(
            CONTENT, "content-md5"
        )  # an ETag that is wrong each time is no checksum (C22)
        server.plan = lambda seen: Act(flip=1000)
        with (
            closing(moving()) as made,
            faster_at(server, ALONE),
            pytest.raises(JobFault, match="input in arrived damaged 3 times") as caught,
        ):
            made.download([wanted(folder, "in", getting(server.url("/in")))], Recorder())
        assert caught.value.reason is JobReason.INPUT_CORRUPT
        assert server.ranged
        assert server.sent < 4.6 * SIZE  # three times, and once because it may have been the ranges that were wrong
        assert list(folder.iterdir()) == []

    cases: dict[str, Case] = {how: partial(once, how=how) for how in ("etag", "content-md5", "sha256")}
    in_own_worlds(tmp_path, {**cases, "always": always})


# --- servers that take few connections


def above(seen: list[Seen], cap: int) -> list[Seen]:
    """The requests that were one too many."""
    return [one for one in seen if one.together > cap]


@pytest.mark.fault("C2")
def test_a_server_that_takes_few_connections_gets_few(tmp_path: Path) -> None:
    def capped(server: RangeServer, folder: Path, *, cap: int, refusal: Act) -> None:
        server.cap, server.refusal = cap, refusal
        with when(
            lambda: bool(above(list(server.seen), cap)) and server.sent > ALONE, lambda: setattr(server, "rate", FAST)
        ):
            bring(moving(rules=Rules()), server, folder)
        assert len(above(server.seen, cap)) <= 8
        assert server.sent < SIZE + IN_VAIN
        served = [seen for seen in server.seen if seen.status in {200, 206}]
        assert max(seen.together for seen in served) == cap  # what is allowed is used

    in_own_worlds(
        tmp_path,
        {
            f"{cap}, else {name}": partial(capped, cap=cap, refusal=refusal)
            for cap, name, refusal in (
                (1, "503", SLOW_DOWN),
                (2, "503", SLOW_DOWN),
                (3, "503", SLOW_DOWN),
                (1, "429", TOO_MANY),
                (2, "429", TOO_MANY),
                (1, "a reset", RESET),
                (3, "a reset", RESET),
            )
        },
    )


@pytest.mark.fault("C2")
def test_fewer_connections_then_more_again_when_the_server_takes_them(tmp_path: Path) -> None:
    files = {f"file{number}": random.Random(number).randbytes(MIB // 8) for number in range(150)}  # noqa: S311

    def capped(server: RangeServer, folder: Path, *, refusal: Act) -> None:
        server.things = {f"/{name}": Thing(content) for name, content in files.items()}
        server.rate, server.cap, server.refusal = 4.0 * MIB, 2, refusal
        lifted = 0

        def lift(_: object) -> None:
            nonlocal lifted
            if len(watch.stored) >= 30 and not lifted:
                server.cap, lifted = None, len(server.seen)

        watch = Recorder(lift)
        with closing(moving(rules=Rules())) as made:
            made.download((wanted(folder, name, getting(server.url(f"/{name}"))) for name in files), watch)
        assert all(same(folder / f"{name}.part", content) for name, content in files.items())
        assert sum(watch.sizes) == watch.expected == server.sent == sum(map(len, files.values()))
        before, after = server.seen[:lifted], server.seen[lifted:]
        assert 0 < len(above(before, 2)) <= 40
        assert max(seen.together for seen in after) >= 4

    in_own_worlds(
        tmp_path,
        {
            "503": partial(capped, refusal=SLOW_DOWN),
            "429": partial(capped, refusal=TOO_MANY),
            "a reset": partial(capped, refusal=RESET),
        },
    )


# --- the file changes


@pytest.mark.fault("C4")
def test_a_file_that_changes_between_ranges_is_wholly_the_new_one(tmp_path: Path) -> None:
    """A server that keeps the rules answers If-Range with all of the new file; another with a part of it."""

    def changes(server: RangeServer, folder: Path, *, polite: bool, size: int, after: int) -> None:
        new = Thing((OTHER + CONTENT)[:size], etag='"two"')

        def plan(_: Seen) -> Act | None:
            if len(server.ranged) >= after and server.things["/in"] is not new:
                server.things["/in"] = new
                server.rate = FAST
            return Act(ignore_if_range=not polite)

        server.plan = plan
        watch = bring(moving(), server, folder)
        assert server.things["/in"] is new
        assert watch.stored[0].etag == '"two"'
        assert server.sent < SIZE + 2 * size

    in_own_worlds(
        tmp_path,
        {
            f"{'200' if polite else '206'}, {more:+d} MiB, after {after}": partial(
                changes, polite=polite, size=SIZE + more * MIB, after=after
            )
            for polite, more, after in (
                (True, 0, 1),
                (True, -3, 3),
                (True, 3, 1),
                (False, 0, 1),
                (False, 0, 3),
                (False, -3, 1),
                (False, 3, 3),
            )
        },
    )


# --- connections that do not last


@pytest.mark.fault("C2")
def test_kept_alive_connections_that_do_not_last_are_no_failure(tmp_path: Path) -> None:
    def many(
        server: RangeServer,
        folder: Path,
        *,
        made: PresignedTransfer,
        plan: Callable[[Seen], Act | None] = lambda _: None,
        drop_reused: bool = False,
    ) -> None:
        """A large file and 60 small ones."""
        files = {f"file{number}": random.Random(number).randbytes(1000 * number) for number in range(60)}  # noqa: S311
        server.things |= {f"/{name}": Thing(content) for name, content in files.items()}
        server.plan, server.drop_reused = plan, drop_reused
        files["in"] = CONTENT
        watch = Recorder()
        with closing(made), faster_at(server, SPREAD):
            made.download((wanted(folder, name, getting(server.url(f"/{name}"))) for name in reversed(files)), watch)
        assert all(same(folder / f"{name}.part", content) for name, content in files.items())
        assert len(list(folder.iterdir())) == len(files)
        assert sum(watch.sizes) == watch.expected == sum(map(len, files.values()))

    in_own_worlds(
        tmp_path,
        {
            "closed after each reply": partial(many, made=strict(), plan=lambda _: Act(close=True)),
            "closed now and then": partial(many, made=strict(), plan=lambda seen: Act(close=seen.turn == 2)),
            "broken at the next request": partial(many, made=strict(), drop_reused=True),
            "many such": partial(many, made=moving(), drop_reused=True),
        },
    )


# --- one byte a second


@pytest.mark.fault("B14", "T23")
def test_connections_that_trickle_are_left(tmp_path: Path) -> None:
    net = NetSettings(slow_for_s=1)
    soon = NetSettings(slow_for_s=1, slow_bytes_per_s=MIB)  # libcurl judges by the mean of some seconds

    def ranges(server: RangeServer, folder: Path) -> None:
        server.plan = lambda seen: Act(rate=1) if seen.ranged and len(server.ranged) <= 2 else None
        with faster_at(server, SPREAD):
            bring(moving(net=net), server, folder)
        assert server.ranged
        assert server.sent < SIZE + IN_VAIN

    def first(server: RangeServer, folder: Path) -> None:
        server.rate = FAST
        server.plan = lambda seen: Act(rate=1) if seen.number < 2 else None
        bring(moving(net=net), server, folder)
        assert 3 <= len(server.seen) <= 12

    def all_of_them(server: RangeServer, folder: Path) -> None:
        def plan(_: Seen) -> Act | None:
            if len(server.ranged) >= 2:
                server.rate = 1
            return None

        server.plan = plan
        hours = Rules(clock=lambda: time.monotonic() * 3600, pause=lambda _: 0.0)  # a second passes for an hour
        watch = Recorder()
        with (
            closing(moving(net=soon, rules=hours, download_budget_s=3600)) as made,
            pytest.raises(WorkerFault, match=r"input in could not be moved for [\d.]+ hours.*slow") as caught,
        ):
            made.download([wanted(folder, "in", getting(server.url("/in")))], watch)
        assert caught.value.reason is WorkerReason.STORAGE
        assert len(server.seen) < 50
        assert sum(watch.sizes) < watch.expected == SIZE

    in_own_worlds(tmp_path, {"two ranges": ranges, "the first": first, "all": all_of_them})


# --- C1, C2 and other answers in the middle


def numbered(server: RangeServer, signed: list[int]) -> Callable[[], SignedRequest]:
    """A `sign` whose URLs have a number."""

    def sign() -> SignedRequest:
        signed.append(len(signed))
        return get(server.url(f"/in?signature={signed[-1]}"))

    return sign


def number_of(seen: Seen) -> int:
    return int(seen.target.rpartition("=")[2])


@pytest.mark.fault("C1", "C2")
def test_urls_that_expire_while_ranges_run_are_renewed(tmp_path: Path) -> None:
    def expire(server: RangeServer, folder: Path, *, status: int) -> None:
        signed: list[int] = []
        valid = 0
        used: list[int] = []

        def plan(seen: Seen) -> Act | None:
            nonlocal valid
            if seen.ranged and used.count(valid) >= 2:
                valid = number_of(seen) + 1  # each is good for two requests; those that run go on
            if number_of(seen) < valid:
                return Act(status=status, body=EXPIRED.body)
            used.append(valid)
            return None

        server.plan = plan
        watch = Recorder()
        with closing(strict()) as made, faster_at(server, SPREAD):
            made.download([wanted(folder, "in", numbered(server, signed))], watch)
        check(folder, CONTENT, watch)
        assert any(seen.status == status for seen in server.seen)
        assert server.sent < SIZE + IN_VAIN
        assert len(signed) <= len(server.seen) <= 40

    def break_and_expire(server: RangeServer, folder: Path) -> None:
        signed: list[int] = []
        valid = 0

        def break_all() -> None:
            nonlocal valid
            valid = len(signed)
            server.cut_all()
            server.rate = FAST

        server.plan = lambda seen: EXPIRED if number_of(seen) < valid else None
        watch = Recorder()
        with closing(moving()) as made, when(lambda: server.running >= 3, break_all):
            made.download([wanted(folder, "in", numbered(server, signed))], watch)
        check(folder, CONTENT, watch)
        assert server.sent < SIZE + IN_VAIN
        assert 2 <= len(signed) <= 10

    in_own_worlds(
        tmp_path,
        {
            "400": partial(expire, status=400),
            "403": partial(expire, status=403),
            "after all connections broke": break_and_expire,
        },
    )


@pytest.mark.fault("C2")
def test_ranges_that_are_cut_go_on_where_they_were(tmp_path: Path) -> None:
    def cutting(server: RangeServer, folder: Path, *, cut: int, reset: bool) -> None:
        cuts = 0

        def plan(seen: Seen) -> Act | None:
            nonlocal cuts
            if not seen.ranged or cuts >= 10:
                return None
            cuts += 1
            return Act(cut=cut, reset=reset)

        server.plan = plan
        with faster_at(server, ALONE):
            bring(moving(), server, folder)
        assert cuts
        assert server.sent < SIZE + IN_VAIN

    in_own_worlds(
        tmp_path,
        {
            f"after {cut}{', reset' if reset else ''}": partial(cutting, cut=cut, reset=reset)
            for cut, reset in ((0, False), (0, True), (1, True), (100_000, False), (100_000, True), (MIB, False))
        },
    )


@pytest.mark.fault("C2", "C5", "C7")
def test_an_odd_answer_to_a_range_costs_little(tmp_path: Path) -> None:
    """The same URL gives the file, so a range that is not there is a server's slip and no missing input."""

    def odd(server: RangeServer, folder: Path, *, status: int, times: int) -> None:
        told = 0

        def plan(seen: Seen) -> Act | None:
            nonlocal told
            if not seen.ranged or told >= times:
                return None
            told += 1
            return Act(status=status, headers={"Location": "/in"} if status == 301 else {}, body=b"")

        server.plan = plan
        with faster_at(server, ALONE):
            bring(moving(), server, folder)
        assert told
        assert len(server.seen) < 30
        # 416 says that there is no such part, so the file may be another one: C5 starts over, once.
        assert server.sent < SIZE + (SIZE / 2 if status == 416 else IN_VAIN)

    in_own_worlds(
        tmp_path,
        {
            f"{status}, {times} times": partial(odd, status=status, times=times)
            for status in (416, 404, 403, 500, 502)
            for times in (1, 1000)
        }
        | {"301": partial(odd, status=301, times=2)},
    )


# --- killed, and what lies beside the part

_PROCESS = """
import sys
from pathlib import Path
from jobfetcher.transfer.presigned import PresignedTransfer
from tests.support.transfers import LOCAL, Recorder, getting, wanted
made = PresignedTransfer(LOCAL, ranges=4, resolver=lambda host: frozenset({host}))
made.download([wanted(Path(sys.argv[2]), "in", getting(sys.argv[1]))], Recorder())
"""


def kill_in_the_middle(server: RangeServer, folder: Path, sent: float = 0.65 * SIZE) -> None:
    """Let another process fetch /in, and kill it when the server has sent so much."""
    with subprocess.Popen([sys.executable, "-c", _PROCESS, server.url("/in"), str(folder)], cwd=REPOSITORY) as process:
        try:
            wait_until(lambda: server.sent >= sent or process.poll() is not None, "the middle of the file", 20)
            assert process.poll() is None
        finally:
            process.kill()
    wait_until(lambda: server.running == 0, "the server sees that it left", 5)
    assert len(server.ranged) >= 2


class Killed(NamedTuple):
    """A folder as a process leaves it that was killed in the middle of ranges, and what it was sent by then."""

    folder: Path
    sent: int

    def copy_to(self, folder: Path) -> None:
        for path in self.folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Killed]:
    """One of an object without a checksum, and one of an object with one."""
    left: dict[str, Killed] = {}

    def kill(server: RangeServer, folder: Path, *, name: str, thing: Thing) -> None:
        server.things["/in"] = thing
        kill_in_the_middle(server, folder)
        left[name] = Killed(folder, server.sent)

    things = {"plain": Thing(CONTENT), "vouched for": _vouched_for(CONTENT)}
    cases: dict[str, Case] = {name: partial(kill, name=name, thing=thing) for name, thing in things.items()}
    in_own_worlds(tmp_path_factory.mktemp("killed"), cases)
    return left


def notes(folder: Path) -> list[Path]:
    """Whatever lies beside the part."""
    return [path for path in folder.iterdir() if path.name != "in.part"]


@pytest.mark.fault("A2")
def test_after_a_kill_in_the_middle_of_ranges_only_what_is_missing_is_fetched(
    server: RangeServer, killed: dict[str, Killed], tmp_path: Path
) -> None:
    server.rate = FAST
    killed["plain"].copy_to(tmp_path)
    watch = Recorder()
    with closing(moving()) as made:
        made.download([wanted(tmp_path, "in", getting(server.url("/in")))], watch)
    assert same(tmp_path / "in.part", CONTENT)
    assert notes(tmp_path) == []
    check_digest(CONTENT, watch)
    assert sum(watch.sizes) == watch.expected
    # It is noted about once a second: what 4 connections bring in 2 s may not have been noted yet.
    assert killed["plain"].sent + server.sent - SIZE <= 4 * SLOW * 2
    assert killed["plain"].sent + watch.expected - SIZE <= 4 * SLOW * 2
    assert all(seen.ranged for seen in server.seen)


Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def _numbers(note: Json, change: Callable[[int], Json]) -> Json:
    """The note with all its numbers changed."""
    match note:
        case bool() | None | str() | float():
            return note
        case int():
            return change(note)
        case list():
            return [_numbers(entry, change) for entry in note]
        case dict():
            return {key: _numbers(entry, change) for key, entry in note.items()}


def _moved(note: Json, places: Iterator[int]) -> Json:
    """The note with other places in it, in rising order; the size stays."""
    return _numbers(note, lambda number: number if number == SIZE else next(places))


def _lists(note: Json, change: Callable[[list[Json]], list[Json]]) -> Json:
    """The note with all its lists changed."""
    match note:
        case list():
            return change(note)
        case dict():
            return {key: _lists(entry, change) for key, entry in note.items()}
        case _:
            return note


#: From the text of a note to one that no sound worker ever wrote.
SPOILT: dict[str, Callable[[str], str]] = {
    "empty": lambda note: "",
    "garbage": lambda note: "\x00\x7f{{{",
    "half": lambda note: note[: len(note) // 2],
    "deep": lambda note: "[" * 100_000,
    "10 MB": lambda note: note[:-1] + " " * 10_000_000 + note[-1:],
    "negative": lambda note: json.dumps(_numbers(json.loads(note), lambda number: -number - 1)),
    "beyond the size": lambda note: json.dumps(_numbers(json.loads(note), lambda number: number + SIZE)),
    "huge": lambda note: json.dumps(_numbers(json.loads(note), lambda number: 10**30)),
    "words": lambda note: json.dumps(_numbers(json.loads(note), lambda number: f"{number} bytes")),
    "overlapping": lambda note: json.dumps(_lists(json.loads(note), lambda entries: entries * 2)),
    "10 MB of entries": lambda note: json.dumps(_lists(json.loads(note), lambda entries: entries * 200_000)),
}


@pytest.mark.fault("A2", "C5")
@pytest.mark.parametrize("how", SPOILT)
def test_a_note_that_cannot_be_true_is_not_believed(
    server: RangeServer, killed: dict[str, Killed], tmp_path: Path, how: str
) -> None:
    server.rate = None
    killed["plain"].copy_to(tmp_path)
    assert notes(tmp_path)
    (tmp_path / "in.part").write_bytes(b"z" * SIZE)  # what the note says is there is not
    for note in notes(tmp_path):
        note.write_text(SPOILT[how](note.read_text()))
    bring(moving(), server, tmp_path)


@pytest.mark.fault("A2", "C3")
@pytest.mark.parametrize("seed", range(5))
def test_a_note_that_lies_within_reason_is_found_out_by_the_checksum(
    server: RangeServer, killed: dict[str, Killed], tmp_path: Path, seed: int
) -> None:
    """The first one is true, but for the bytes; in the others other bytes are there, in as many pieces."""
    dice = random.Random(seed)  # noqa: S311
    server.rate, server.things["/in"] = None, _vouched_for(CONTENT)
    killed["vouched for"].copy_to(tmp_path)
    (tmp_path / "in.part").write_bytes(b"z" * SIZE)
    for note in notes(tmp_path) if seed else []:
        known: Json = json.loads(note.read_text())
        note.write_text(json.dumps(_moved(known, iter(sorted(dice.sample(range(SIZE), 1000))))))
    watch = Recorder()
    with closing(moving()) as made:
        made.download([wanted(tmp_path, "in", getting(server.url("/in")))], watch)
    assert same(tmp_path / "in.part", CONTENT)
    assert notes(tmp_path) == []
    assert sum(watch.sizes) == watch.expected


@pytest.mark.fault("A10", "C5")
def test_a_part_that_is_shorter_than_its_note_says_is_not_believed(
    server: RangeServer, killed: dict[str, Killed], tmp_path: Path
) -> None:
    """As after a power cut: the note reached the disk, the last of the bytes did not."""
    server.rate = None
    killed["plain"].copy_to(tmp_path)
    os.truncate(tmp_path / "in.part", (tmp_path / "in.part").stat().st_size // 2)
    watch = Recorder()
    with closing(moving()) as made:
        made.download([wanted(tmp_path, "in", getting(server.url("/in")))], watch)
    assert same(tmp_path / "in.part", CONTENT)
    assert sum(watch.sizes) == watch.expected


@pytest.mark.fault("A2", "C4")
def test_a_file_that_changed_while_nobody_was_there_is_wholly_the_new_one(
    server: RangeServer, killed: dict[str, Killed], tmp_path: Path
) -> None:
    server.rate, server.things["/in"] = FAST, Thing(OTHER, etag='"two"')
    killed["plain"].copy_to(tmp_path)
    watch = Recorder()
    with closing(moving()) as made:
        made.download([wanted(tmp_path, "in", getting(server.url("/in")))], watch)
    assert same(tmp_path / "in.part", OTHER)
    assert sum(watch.sizes) == watch.expected == SIZE
    check_digest(OTHER, watch)


# --- the disk fills up, and the end from outside


@mounts.needs_root
@pytest.mark.fault("D2")
def test_a_disk_that_fills_up_while_ranges_run_is_the_disks_fault(server: RangeServer, tmp_path: Path) -> None:
    with mounts.tmpfs(tmp_path / "disk", "32m") as disk:
        with (
            closing(moving()) as made,
            when(lambda: server.running >= 3, lambda: mounts.fill(disk)),
            pytest.raises(WorkerFault, match=r"input in (could not be written|needs .* MiB more)") as caught,
        ):
            made.download([wanted(disk, "in", getting(server.url("/in")))], Recorder())
        assert caught.value.reason is WorkerReason.DISK
        wait_until(lambda: server.running == 0, "no more requests", 2)
        assert not list(disk.glob("in*"))


@pytest.mark.fault("B17")
@pytest.mark.parametrize("state", ["running", "silent"])
def test_a_halt_ends_all_ranges_at_once(server: RangeServer, tmp_path: Path, state: str) -> None:
    silent = threading.Event()
    if state == "silent":
        server.plan = lambda seen: Act(gate=silent) if seen.ranged else None
    many = 4 if state == "running" else 2
    before, threads = open_files(), set(threading.enumerate())
    watch = Recorder()
    halted: list[float] = []

    def halt() -> None:
        halted.append(time.monotonic())
        watch.halt.set(StopReason.CANCELLED)

    def ours() -> list[threading.Thread]:
        return [thread for thread in set(threading.enumerate()) - threads if thread.name != "range-server"]

    with closing(moving()) as made:
        with when(lambda: server.running >= many, halt), pytest.raises(Stopped):
            made.download([wanted(tmp_path, "in", getting(server.url("/in")))], watch)
        assert time.monotonic() - halted[0] < 5.0  # the rest would take three times as long, or for ever
        wait_until(lambda: server.running == 0, "no more requests", 5)
    wait_until(lambda: server.open == 0, "no more connections", 5)
    wait_until(lambda: ours() == [], "no more threads", 5)
    wait_until(lambda: open_files() <= before, "no more descriptors", 5)


@pytest.mark.fault("B17", "A2")
def test_after_each_halt_the_next_one_goes_on_without_losing_a_byte(server: RangeServer, tmp_path: Path) -> None:
    server.rate = 2 * SLOW
    for part in (1, 2):
        watch = Recorder()
        with (
            closing(moving()) as made,
            when(partial(sent_more, server, part * SIZE / 3), partial(watch.halt.set, StopReason.SHUTDOWN)),
            pytest.raises(Stopped),
        ):
            made.download([wanted(tmp_path, "in", getting(server.url("/in")))], watch)
    server.rate = FAST
    again = Recorder()
    with closing(moving()) as made:
        made.download([wanted(tmp_path, "in", getting(server.url("/in")))], again)
    assert same(tmp_path / "in.part", CONTENT)
    assert notes(tmp_path) == []
    check_digest(CONTENT, again)
    assert sum(again.sizes) == again.expected
    assert server.sent < SIZE + IN_VAIN
