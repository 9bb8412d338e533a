"""Jobs that want the same input at the same time: with a cache it is fetched once, and nobody waits for what fails."""

import base64
import hashlib
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from jobfetcher.core.errors import Stopped, StopReason
from jobfetcher.core.urls import SignedRequest
from jobfetcher.transfer.cache import Cache
from jobfetcher.transfer.patience import Rules
from jobfetcher.transfer.presigned import PresignedTransfer
from tests.support.range_server import EXPIRED, SLOW_DOWN, Act, RangeServer, Seen, Thing
from tests.support.services import wait_until
from tests.support.transfers import Recorder, get, transfer, wanted

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
        self.file.parent.mkdir()
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
def test_nobody_waits_for_what_is_not_kept(
    made: PresignedTransfer, store: RangeServer, tmp_path: Path, why: str
) -> None:
    content = CONTENT if why == "it has no ETag" else bytes(LIMIT)
    store.things["/in"] = Thing(content, headers={"ETag": None} if why == "it has no ETag" else {})
    store.rate = 50_000.0
    store.plan = lambda seen: Act(rate=1e12) if seen.target != "/in" or len(asked(store)) > 1 else None
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
