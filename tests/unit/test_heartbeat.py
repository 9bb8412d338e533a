"""heartbeat: one sender in order, never a word after the end, and what each answer of the source does to the job.

No fixed sleeps: intervals are either very short or longer than any test, and tests wait on conditions.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from jobfetcher.core.errors import SourceRefused, SourceUnavailable, Stopped, StopReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Lease, Standing
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.heartbeat import ASKED_MOST_S, RETRY_S, Pulse, beating, retry_pause_s
from jobfetcher.testing.fake_source import FakeLease, FakeSource
from tests.support.jobs import Emitted, make_job

NEVER_S = 3600.0
SEVEN = JobId("7")


class Held(FakeLease):
    """A lease whose beats wait inside the call until the test lets them go on."""

    def __init__(self, source: FakeSource, *, first_free: int = 0) -> None:
        super().__init__(source, "t", SEVEN, source.put(make_job()))
        self.inside = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.overlaps = 0
        self._free = first_free
        self._busy = 0

    def beat(self, phase: Phase, note: str = "") -> Standing:
        if self._free:
            self._free -= 1
            return super().beat(phase, note)
        self._busy += 1
        self.overlaps += self._busy > 1
        self.inside.release()
        self.go_on.wait(10)
        self._busy -= 1
        return super().beat(phase, note)


@contextmanager
def pulsing(
    lease: Lease,
    *,
    interval_s: float = NEVER_S,
    emit: Emitted | None = None,
    jitter: Callable[[], float] = lambda: 1.0,
) -> Iterator[tuple[Pulse, Halt]]:
    halt = Halt()
    with beating(lease, halt, interval_s=interval_s, emit=emit or Emitted(), jitter=jitter) as pulse:
        yield pulse, halt


def said(source: FakeSource) -> list[str]:
    return source.said[SEVEN].words


def new_lease(source: FakeSource) -> Lease:
    source.put(make_job())
    return source.resume("t", SEVEN)


def test_a_job_is_spoken_of_at_once_and_again_and_again() -> None:
    source = FakeSource()
    with pulsing(new_lease(source), interval_s=0.01):
        assert source.wait_for(lambda: len(said(source)) >= 20)
    assert set(said(source)) == {"claimed"}


def test_a_new_phase_is_said_at_once_and_repeated_from_then_on() -> None:
    source = FakeSource()
    with pulsing(new_lease(source)) as (pulse, _):
        for phase in (Phase.STAGING_IN, Phase.RUNNING, Phase.STAGING_OUT):
            pulse.enter(phase)
            assert source.wait_for(lambda phase=phase: said(source)[-1:] == [phase.value])  # type: ignore[misc]  # a default binds the loop's value; mypy cannot infer it
    assert said(source) == ["claimed", "staging_in", "running", "staging_out"]


def test_phases_entered_in_a_hurry_are_all_said_in_order_before_the_end() -> None:
    source = FakeSource()
    with pulsing(new_lease(source)) as (pulse, _):
        for phase in (Phase.STAGING_IN, Phase.RUNNING, Phase.STAGING_OUT):
            pulse.enter(phase)
    assert said(source) == ["claimed", "staging_in", "running", "staging_out"]


@pytest.mark.fault("A7")
def test_nothing_is_said_after_the_end_even_when_a_beat_is_under_way() -> None:
    """PROTOCOL.md S6: a late `running` after `finished` would open the job again."""
    source = FakeSource()
    lease = Held(source)
    ended = threading.Event()

    def job() -> None:
        with pulsing(lease):
            assert lease.inside.acquire(timeout=10)
        lease.settle(Outcome(Ending.FINISHED, None, ""))
        ended.set()

    thread = threading.Thread(target=job)
    thread.start()
    assert not ended.wait(0.3), "the end was told while a beat was under way"
    assert said(source) == []
    lease.go_on.set()
    assert ended.wait(10)
    thread.join()
    assert said(source) == ["claimed", "finished"]
    assert not any(thread.name.startswith("heartbeat") for thread in threading.enumerate())


def test_the_jobs_own_thread_never_waits_for_a_beat_and_two_never_cross() -> None:
    source = FakeSource()
    lease = Held(source)
    with pulsing(lease, interval_s=0.001) as (pulse, _):
        assert lease.inside.acquire(timeout=10)
        pulse.enter(Phase.STAGING_IN)  # returns although a beat hangs
        pulse.enter(Phase.RUNNING)
        lease.go_on.set()
        assert source.wait_for(lambda: said(source).count("running") > 5)
    words = said(source)
    assert list(dict.fromkeys(words)) == ["claimed", "staging_in", "running"]
    assert words == sorted(words, key=["claimed", "staging_in", "running"].index)
    assert lease.overlaps == 0


@pytest.mark.fault("B7")
@pytest.mark.parametrize(
    ("answer", "reason"), [(Standing.CANCEL, StopReason.CANCELLED), (Standing.LOST, StopReason.LOST)]
)
def test_a_job_taken_back_is_halted_and_not_mentioned_again(answer: Standing, reason: StopReason) -> None:
    source = FakeSource()
    lease = new_lease(source)
    source.said[SEVEN].answers += [Standing.KEEP, answer]
    with pulsing(lease, interval_s=0.001) as (pulse, halt):
        assert halt.wait(10)
        pulse.enter(Phase.RUNNING)
        with pytest.raises(Stopped):
            halt.check()
    assert halt.reason is reason
    assert said(source) == ["claimed"]


@pytest.mark.fault("B1")
@pytest.mark.parametrize("error", [SourceUnavailable("down"), SourceRefused("401")])
def test_a_failed_beat_is_repeated_and_told_once(error: SourceUnavailable | SourceRefused) -> None:
    source, emit = FakeSource(), Emitted()
    lease = new_lease(source)
    source.said[SEVEN].answers += [error] * 4
    with pulsing(lease, emit=emit, interval_s=10**7, jitter=lambda: 0.001) as (pulse, halt):
        pulse.enter(Phase.RUNNING)
        assert source.wait_for(lambda: said(source) == ["claimed", "running"])
        assert halt.reason is None  # neither an outage nor a refusal stops a job (S16)
    assert emit.levels("server_away") == ["warning"]
    assert f"the keep-alive of job 7 is not delivered: {error}; trying again" in str(emit.named("server_away")[0])
    assert len(emit.named("server_back")) == 1
    assert len(emit.named("heartbeat_failed")) == len(emit.named("heartbeat_recovered")) == 1


def test_ten_tries_fit_into_a_lease() -> None:
    waits = [RETRY_S[min(number, len(RETRY_S)) - 1] * 1.1 for number in range(1, 10)]
    assert sum(waits) + 10 * 10 <= 300  # J3: each try may take its whole deadline of 10 s


@pytest.mark.fault("B11")
def test_heartbeats_that_were_all_told_the_same_moment_come_spread_and_within_a_minute() -> None:
    pauses = [retry_pause_s(1, 20.0, 30.0, 1.0) for _ in range(3000)]
    assert min(pauses) >= 20.0
    assert max(pauses) <= 50.0
    assert max(Counter(int(pause) for pause in pauses).values()) <= 2 * len(pauses) / 30
    assert all(retry_pause_s(1, 600.0, 30.0, 1.0) == ASKED_MOST_S for _ in range(100))
    assert retry_pause_s(3, None, 30.0, 1.1) == RETRY_S[2] * 1.1
    assert retry_pause_s(1, 0.0, 30.0, 1.0) == RETRY_S[0]


def test_while_the_source_is_down_a_new_phase_does_not_hammer_it() -> None:
    source = FakeSource()
    lease = new_lease(source)
    source.said[SEVEN].answers += [SourceUnavailable("down")] * 1000
    with pulsing(lease, jitter=lambda: 1000.0) as (pulse, _):
        assert source.wait_for(lambda: len(source.said[SEVEN].answers) == 999)
        for _ in range(100):
            pulse.enter(Phase.STAGING_IN)
        assert len(source.said[SEVEN].answers) == 999
    assert len(source.said[SEVEN].answers) == 998  # leaving tries once more, and does not wait for the next retry


def test_leaving_while_the_source_is_down_takes_one_try_at_most() -> None:
    source = FakeSource()
    lease = new_lease(source)
    with pulsing(lease, jitter=lambda: 1000.0) as (pulse, _):  # no other try is due meanwhile
        assert source.wait_for(lambda: said(source) == ["claimed"])
        answers = source.said[SEVEN].answers
        answers += [SourceUnavailable("down")] * 5
        for phase in (Phase.STAGING_IN, Phase.RUNNING, Phase.STAGING_OUT):
            pulse.enter(phase)
        assert source.wait_for(lambda: len(answers) == 4)
    assert len(answers) == 3


class Broken(FakeLease):
    """A lease with a bug of ours: the first `times` beats raise what nobody expects."""

    def __init__(self, source: FakeSource, times: int) -> None:
        super().__init__(source, "t", SEVEN, source.put(make_job()))
        self.times = times

    def beat(self, phase: Phase, note: str = "") -> Standing:
        if self.times:
            self.times -= 1
            raise KeyError("a bug")
        return super().beat(phase, note)


@pytest.mark.fault("F8")
def test_one_bug_does_not_end_the_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobfetcher.heartbeat.RETRY_S", (0.001,))
    source, emit = FakeSource(), Emitted()
    with pulsing(Broken(source, 2), emit=emit) as (_, halt):
        assert source.wait_for(lambda: said(source) == ["claimed"])
        assert halt.reason is None
    assert emit.levels("heartbeat_bug") == ["error", "error"]


@pytest.mark.fault("F8")
def test_three_bugs_in_ten_minutes_end_the_job_as_the_workers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobfetcher.heartbeat.RETRY_S", (0.001,))
    source = FakeSource()
    with pulsing(Broken(source, 3)) as (_, halt):
        assert halt.wait(10)
        assert halt.reason is StopReason.HEARTBEAT


@pytest.mark.fault("F8")
def test_bugs_that_lie_far_apart_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobfetcher.heartbeat.RETRY_S", (0.0,))
    source = FakeSource()
    times = iter(range(0, 10**9, 400))  # each look at the clock is 400 s later
    halt = Halt()
    with beating(Broken(source, 6), halt, interval_s=NEVER_S, emit=Emitted(), clock=lambda: float(next(times))):
        assert source.wait_for(lambda: said(source) != [])
        assert halt.reason is None


@pytest.mark.fault("F8")
def test_the_beat_ends_with_the_job_whatever_the_job_raises() -> None:
    source = FakeSource()

    def job() -> None:
        with pulsing(new_lease(source), interval_s=0.001):
            raise RuntimeError("the job's own")

    with pytest.raises(RuntimeError, match="the job's own"):
        job()
    assert not any(thread.name.startswith("heartbeat") for thread in threading.enumerate())


def test_a_hung_beat_of_one_job_does_not_hold_up_another() -> None:
    hung, well = FakeSource(), FakeSource()
    lease = Held(hung)
    with pulsing(lease), pulsing(new_lease(well), interval_s=0.001):
        assert lease.inside.acquire(timeout=10)
        assert well.wait_for(lambda: len(said(well)) > 50)
        lease.go_on.set()
