"""Jobs that want the same input at the same time: with a cache it is fetched once, and nobody waits for what fails."""

import base64
import contextlib
import errno
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from jobfetcher.core.errors import Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.urls import SignedRequest
from jobfetcher.transfer.cache import Cache
from jobfetcher.transfer.flights import Flight, Flights, Landing
from jobfetcher.transfer.part import Part
from jobfetcher.transfer.patience import Rules
from jobfetcher.transfer.presigned import PresignedTransfer
from jobfetcher.transfer.story import Teller
from tests.support.range_server import EXPIRED, SLOW_DOWN, Act, RangeServer, Seen, Thing
from tests.support.services import wait_until
from tests.support.transfers import Nap, Recorder, get, transfer, wanted

MIB = 1024**2
CONTENT = bytes(range(256)) * 1200 + b"end"
MD5 = base64.b64encode(hashlib.md5(CONTENT, usedforsecurity=False).digest()).decode()
LIMIT = 16 * MIB


@pytest.fixture
def kept(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", LIMIT, lambda *_, **__: None, room_for=lambda _: None)


@pytest.fixture
def made(kept: Cache) -> Iterator[PresignedTransfer]:
    """The real adapter, with a cache."""
    with closing(transfer(cache=kept)) as made:
        yield made


@pytest.fixture
def store() -> Iterator[RangeServer]:
    """Has /in and /other, and says when they are still the same."""
    with RangeServer() as store:
        store.things["/in"] = Thing(CONTENT)
        store.things["/other"] = Thing(b"other")
        store.plan = partial(unchanged, store)
        yield store


def unchanged(store: RangeServer, seen: Seen) -> Act | None:
    """A 304, where it is due."""
    etag = store.things[seen.target].etag
    return Act(status=304, body=b"", headers={"ETag": etag}) if seen.headers.get("if-none-match") == etag else None


def hold_first(store: RangeServer) -> threading.Event:
    """The first request for all of /in gets no answer before the event is set."""
    gate = threading.Event()

    def plan(seen: Seen) -> Act | None:
        return unchanged(store, seen) or (Act(gate=gate) if seen.target == "/in" and len(asked(store)) == 1 else None)

    store.plan = plan
    return gate


class Job:
    """A job's download of /in, in a thread of its own; `with` waits for its end."""

    def __init__(self, made: PresignedTransfer, store: RangeServer, folder: Path, name: str) -> None:
        self.watch = Recorder()
        self.raised: BaseException | None = None
        self.file = folder / name / "in.part"
        self._made, self._store, self._name = made, store, name
        self._signed = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.file.parent.mkdir(exist_ok=True)
        try:
            self._made.download([wanted(self.file.parent, "in", self._sign)], self.watch)
        except BaseException as error:
            self.raised = error

    def _sign(self) -> SignedRequest:
        self._signed.set()
        return get(self._store.url("/in"))

    def settle(self) -> None:
        """Return when it is on the wire, or waits: another file, begun after it and looked for in the cache like it,
        has come and gone."""
        assert self._signed.wait(10)
        for turn in range(3):
            self._made.download(
                [wanted(self.file.parent, f"other{turn}", lambda: get(self._store.url("/other")))], Recorder()
            )

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(30)
        assert self.ended

    def check(self) -> None:
        """It has brought the file, and counted it once."""
        self.join()
        assert self.raised is None
        assert self.file.read_bytes() == CONTENT
        assert sum(self.watch.sizes) == self.watch.expected == len(CONTENT)


def asked(store: RangeServer) -> list[str]:
    """The requests for /in, in order: `all` of it, or `again` whether it is the same."""
    return ["again" if "if-none-match" in seen.headers else "all" for seen in store.seen if seen.target == "/in"]


def test_an_input_of_several_jobs_is_fetched_once(made: PresignedTransfer, store: RangeServer, tmp_path: Path) -> None:
    gate = threading.Event()
    store.plan = lambda seen: unchanged(store, seen) or (Act(gate=gate) if seen.target == "/in" else None)
    jobs = [Job(made, store, tmp_path, "first")]
    wait_until(lambda: store.running == 1, "the first one on its way")
    for name in ("second", "third", "fourth"):
        jobs.append(Job(made, store, tmp_path, name))
        jobs[-1].settle()
    assert asked(store) == ["all"]
    gate.set()
    for job in jobs:
        job.check()
    assert asked(store) == ["all", "again", "again", "again"]


def test_an_input_that_a_job_names_twice_is_fetched_once(
    made: PresignedTransfer, store: RangeServer, tmp_path: Path
) -> None:
    watch = Recorder()
    made.download([wanted(tmp_path, name, lambda: get(store.url("/in"))) for name in ("a", "b")], watch)
    assert [(tmp_path / f"{name}.part").read_bytes() for name in ("a", "b")] == [CONTENT] * 2
    assert sum(watch.sizes) == watch.expected == 2 * len(CONTENT)
    assert asked(store) == ["all", "again"]


@pytest.mark.fault("B17")
def test_who_waits_for_a_job_that_is_cancelled_fetches_the_input_itself(
    made: PresignedTransfer, store: RangeServer, tmp_path: Path
) -> None:
    hold_first(store)
    first = Job(made, store, tmp_path, "first")
    wait_until(lambda: store.running == 1, "the first one on its way")
    others = [Job(made, store, tmp_path, name) for name in ("second", "third")]
    for other in others:
        other.settle()
    first.watch.halt.set(StopReason.CANCELLED)
    first.join()
    assert isinstance(first.raised, Stopped)
    for other in others:
        other.check()
    assert asked(store) == ["all", "all", "again"]


@pytest.mark.fault("B17")
def test_a_job_that_is_cancelled_while_it_waits_ends_at_once_and_alone(
    made: PresignedTransfer, store: RangeServer, tmp_path: Path
) -> None:
    gate = hold_first(store)
    first = Job(made, store, tmp_path, "first")
    wait_until(lambda: store.running == 1, "the first one on its way")
    second = Job(made, store, tmp_path, "second")
    second.settle()
    second.watch.halt.set(StopReason.CANCELLED)
    second.join()
    assert isinstance(second.raised, Stopped)
    assert not first.ended
    gate.set()
    first.check()
    assert asked(store) == ["all"]


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(Act(cut=1000), id="cut"),
        pytest.param(Act(flip=9), id="damaged"),
        pytest.param(EXPIRED, id="expired"),
    ],
)
@pytest.mark.fault("C2")
def test_nobody_waits_for_what_fails(made: PresignedTransfer, store: RangeServer, tmp_path: Path, trouble: Act) -> None:
    store.things["/in"] = Thing(CONTENT, headers={"Content-MD5": MD5})
    fails, held = threading.Event(), threading.Event()

    def plan(seen: Seen) -> Act | None:
        if seen.target != "/in" or "if-none-match" in seen.headers:
            return unchanged(store, seen)
        number = len(asked(store))  # this one among them
        return replace(trouble if number == 1 else Act(), gate={1: fails, 2: held}.get(number))

    store.plan = plan
    jobs = [Job(made, store, tmp_path, "first")]
    wait_until(lambda: store.running == 1, "the first one on its way")
    jobs.append(Job(made, store, tmp_path, "second"))
    jobs[1].settle()
    assert asked(store) == ["all"]
    fails.set()
    wait_until(lambda: any(job.ended for job in jobs), "one of them brought it while the other one is held")
    assert not all(job.ended for job in jobs)
    held.set()
    for job in jobs:
        job.check()


@pytest.mark.fault("C2")
def test_nobody_waits_for_one_who_was_told_to_come_back_later(kept: Cache, store: RangeServer, tmp_path: Path) -> None:
    gate = threading.Event()
    later = replace(SLOW_DOWN, headers={"Retry-After": "20"}, gate=gate)
    store.plan = lambda seen: later if asked(store) == ["all"] and seen.target == "/in" else unchanged(store, seen)
    with closing(transfer(cache=kept, rules=Rules(pause=lambda _: 3600.0))) as made:
        first = Job(made, store, tmp_path, "first")
        wait_until(lambda: store.running == 1, "the first one on its way")
        second = Job(made, store, tmp_path, "second")
        second.settle()
        assert asked(store) == ["all"]
        gate.set()
        second.check()
        assert not first.ended
        first.watch.halt.set(StopReason.CANCELLED)
        first.join()
        assert isinstance(first.raised, Stopped)


@pytest.mark.parametrize("why", ["it has no ETag", "it is too large"])
def test_nobody_waits_for_what_is_not_kept(kept: Cache, store: RangeServer, tmp_path: Path, why: str) -> None:
    content = CONTENT if why == "it has no ETag" else bytes(LIMIT)
    store.things["/in"] = Thing(content, headers={"ETag": None} if why == "it has no ETag" else {})
    store.rate = 2_000.0  # hours, until it is turned up
    store.plan = lambda seen: Act(rate=1e12) if seen.target != "/in" or len(asked(store)) > 1 else None
    with closing(transfer(cache=kept, ranges=1)) as made:
        first = Job(made, store, tmp_path, "first")
        wait_until(lambda: store.running == 1, "the first one on its way")
        second = Job(made, store, tmp_path, "second")
        second.join()
        assert second.raised is None
        assert not first.ended
        store.rate = 1e12
        first.join()
    assert first.raised is None
    assert first.file.read_bytes() == second.file.read_bytes() == content
    assert set(asked(store)) == {"all"}


@pytest.mark.parametrize("why", ["no directory", "no room", "no ETag"])
@pytest.mark.fault("D2")
def test_where_nothing_is_kept_those_who_waited_go_on_side_by_side(
    store: RangeServer, tmp_path: Path, why: str
) -> None:
    def full(_: int) -> None:
        raise WorkerFault(WorkerReason.DISK, "there is no room")

    (tmp_path / "file").touch()
    folder = tmp_path / ("file/cache" if why == "no directory" else "cache")
    kept = Cache(folder, LIMIT, lambda *_, **__: None, room_for=full if why == "no room" else lambda _: None)
    store.things["/in"] = Thing(CONTENT, headers={"ETag": None} if why == "no ETag" else {})
    began, held = threading.Event(), threading.Event()
    store.plan = lambda seen: Act(gate=began if asked(store) == ["all"] else held) if seen.target == "/in" else None
    with closing(transfer(cache=kept)) as made:
        jobs = [Job(made, store, tmp_path, "first")]
        wait_until(lambda: store.running == 1, "the first one on its way")
        for name in ("second", "third", "fourth"):
            jobs.append(Job(made, store, tmp_path, name))
            jobs[-1].settle()
        began.set()
        wait_until(lambda: store.running == 3, "the others on their way together")
        held.set()
        for job in jobs:
            job.check()
    assert asked(store) == ["all"] * 4


def test_what_is_kept_is_asked_for_side_by_side(made: PresignedTransfer, store: RangeServer, tmp_path: Path) -> None:
    Job(made, store, tmp_path, "before").check()
    first, held = threading.Event(), threading.Event()

    def plan(seen: Seen) -> Act | None:
        answer = unchanged(store, seen)
        if answer is None or seen.target != "/in":
            return answer
        return replace(answer, gate=first if len(asked(store)) == 2 else held)

    store.plan = plan
    jobs = [Job(made, store, tmp_path, "first")]
    wait_until(lambda: store.running == 1, "the first one on its way")
    for name in ("second", "third"):
        jobs.append(Job(made, store, tmp_path, name))
        jobs[-1].settle()
    first.set()
    wait_until(lambda: store.running == 2, "the others on their way together")
    held.set()
    for job in jobs:
        job.check()
    assert asked(store) == ["all", "again", "again", "again"]


def test_an_input_that_changed_is_fetched_once(made: PresignedTransfer, store: RangeServer, tmp_path: Path) -> None:
    store.things["/in"] = Thing(b"old", etag='"old"')
    Job(made, store, tmp_path, "before").join()
    store.things["/in"] = Thing(CONTENT)
    gate = threading.Event()
    store.plan = lambda seen: unchanged(store, seen) or (Act(gate=gate) if seen.target == "/in" else None)
    jobs = [Job(made, store, tmp_path, "first")]
    wait_until(lambda: store.running == 1, "the first one on its way")
    for name in ("second", "third"):
        jobs.append(Job(made, store, tmp_path, name))
        jobs[-1].settle()
    gate.set()
    for job in jobs:
        job.check()
    assert [seen.status for seen in store.seen if seen.target == "/in"] == [200, 200, 304, 304]


def test_who_goes_on_with_what_it_has_waits_for_nobody(
    made: PresignedTransfer, store: RangeServer, tmp_path: Path
) -> None:
    store.rate = 200_000.0
    before = Job(made, store, tmp_path, "second")
    wait_until(lambda: before.file.exists() and before.file.stat().st_size >= 100_000, "a part of it")
    store.rate = 20_000.0  # the rest takes ten seconds, however late the halt is
    before.watch.halt.set(StopReason.SHUTDOWN)
    before.join()
    store.rate = None
    gate = threading.Event()
    store.plan = lambda seen: Act(gate=gate) if seen.target == "/in" and not seen.ranged else None
    first = Job(made, store, tmp_path, "first")
    wait_until(lambda: store.running == 1, "the first one on its way")
    second = Job(made, store, tmp_path, "second")
    second.join()
    assert second.raised is None
    assert second.file.read_bytes() == CONTENT
    assert not first.ended
    gate.set()
    first.check()


@pytest.mark.fault("C2")
def test_to_wait_takes_nothing_of_the_own_patience(kept: Cache, store: RangeServer, tmp_path: Path) -> None:
    nap, gate = Nap(), hold_first(store)
    held_first = store.plan

    def plan(seen: Seen) -> Act | None:
        first_again = "if-none-match" in seen.headers and asked(store).count("again") == 1
        return SLOW_DOWN if first_again and seen.target == "/in" else held_first(seen)

    store.plan = plan
    with closing(transfer(cache=kept, rules=nap.rules)) as made:
        first = Job(made, store, tmp_path, "first")
        wait_until(lambda: store.running == 1, "the first one on its way")
        second = Job(made, store, tmp_path, "second")
        second.settle()
        nap.now += 7 * 3600  # a slow link, and longer than anybody's budget
        gate.set()
        second.check()
        first.check()


@pytest.mark.fault("B13")
def test_a_job_whose_source_hangs_keeps_no_other_from_the_input(
    kept: Cache, store: RangeServer, tmp_path: Path
) -> None:
    """Its one thread hangs in a call for a new signature, so it cannot look for the input that both want."""
    store.plan = lambda seen: EXPIRED if seen.target == "/expired" else unchanged(store, seen)
    hung, hang = threading.Event(), threading.Event()
    signed = []

    def sign_expired() -> SignedRequest:
        signed.append(1)
        if len(signed) > 1:
            hung.set()
            assert hang.wait(60)
        return get(store.url("/expired"))

    def sign_later() -> SignedRequest:
        assert hung.wait(60)
        return get(store.url("/in"))

    watch, ended = Recorder(), threading.Event()

    def run(moving: PresignedTransfer) -> None:
        folder = tmp_path / "first"
        folder.mkdir()
        with contextlib.suppress(Stopped):
            moving.download([wanted(folder, "expired", sign_expired), wanted(folder, "in", sign_later)], watch)
        ended.set()

    with closing(transfer(cache=kept, concurrency=1)) as moving:
        thread = threading.Thread(target=run, args=(moving,))
        thread.start()
        assert hung.wait(30)
        second = Job(moving, store, tmp_path, "second")
        second.settle()
        second.check()
        assert not ended.is_set()
        watch.halt.set(StopReason.CANCELLED)
        hang.set()
        thread.join()


@pytest.mark.fault("D6")
def test_a_file_that_fails_as_it_is_closed_keeps_nobody_waiting(
    made: PresignedTransfer, store: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network's file system may say only then that the disk is full (close(2))."""
    real, failed = Part.close, threading.Event()

    def close(part: Part) -> None:
        real(part)
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(Part, "close", close)
    store.plan = lambda seen: Act(status=404, body=b"") if asked(store) == ["all"] else unchanged(store, seen)
    first = Job(made, store, tmp_path, "first")
    first.join()
    assert first.raised is not None
    assert failed.is_set()
    Job(made, store, tmp_path, "second").check()


class _Turns:
    """What is to be called in turns of their own, and who went on."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []
        self.gone_on: list[str] = []

    def land(self, flight: Flight, name: str) -> Landing:
        landing = Landing(flight, self.due.append)
        landing.begin(cast(Teller, None), lambda *_: self.gone_on.append(name))
        return landing

    def pass_by(self) -> None:
        while self.due:
            self.due.pop(0)()


def test_who_waited_goes_on_in_a_turn_of_its_own() -> None:
    """The end of a flight may be told within a callback of libcurl, or in the midst of a closing."""
    turns, flight = _Turns(), Flights().begin("in")
    turns.land(flight, "one")
    turns.land(flight, "another")
    turns.pass_by()
    assert turns.gone_on == []
    flight.end()
    assert turns.gone_on == []
    turns.pass_by()
    assert turns.gone_on == ["one", "another"]
    flight.end()
    turns.pass_by()
    assert turns.gone_on == ["one", "another"]


def test_who_comes_when_a_flight_has_just_ended_does_not_wait() -> None:
    turns, flight = _Turns(), Flights().begin("in")
    flight.end()
    turns.land(flight, "late")
    turns.pass_by()
    assert turns.gone_on == ["late"]


def test_who_is_cancelled_before_its_turn_does_not_go_on() -> None:
    turns, flight = _Turns(), Flights().begin("in")
    landing = turns.land(flight, "one")
    flight.end()
    landing.cancel()
    turns.pass_by()
    assert turns.gone_on == []
