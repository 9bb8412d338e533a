"""core.phases, core.errors, core.halt, core.machine: the tables that everything else trusts."""

import itertools
import threading

import pytest

from jobfetcher.core.errors import (
    ConfigError,
    JobFault,
    JobReason,
    SourceRefused,
    SourceUnavailable,
    Stopped,
    StopReason,
    UnreadableJob,
    Verdict,
    WorkerFault,
    WorkerReason,
    verdict,
)
from jobfetcher.core.halt import Halt
from jobfetcher.core.machine import Offer
from jobfetcher.core.phases import ALLOWED, IllegalMove, Phase, check_move
from jobfetcher.testing.fake_source import FakeSource
from tests.support.jobs import make_job

FORWARD = [Phase.CLAIMED, Phase.STAGING_IN, Phase.RUNNING, Phase.STAGING_OUT, Phase.SETTLING]


@pytest.mark.parametrize(("old", "new"), list(itertools.product(Phase, Phase)))
def test_a_phase_is_followed_by_the_next_one_or_by_the_end(old: Phase, new: Phase) -> None:
    step = FORWARD.index(new) - FORWARD.index(old)
    again = (old, new) == (Phase.RUNNING, Phase.STAGING_IN)  # a run that this machine interrupted is repeated
    if step == 1 or again or (new is Phase.SETTLING and old is not Phase.SETTLING):
        check_move(old, new)
    else:
        with pytest.raises(IllegalMove, match=f"{old.value} cannot become {new.value}"):
            check_move(old, new)


def test_every_phase_has_its_row() -> None:
    assert set(ALLOWED) == set(Phase)


@pytest.mark.fault("J5")
def test_each_error_has_one_verdict() -> None:
    source = FakeSource()
    lease = source.resume("t", make_job().id)
    expected: dict[Verdict, list[Exception]] = {
        Verdict.RETRY: [SourceUnavailable("x"), SourceRefused("x")],
        Verdict.FAIL_JOB: [*(JobFault(reason, "x") for reason in JobReason), UnreadableJob(lease, "x")],
        Verdict.GIVE_BACK: [
            *(WorkerFault(reason, "x") for reason in WorkerReason),
            Stopped(StopReason.SHUTDOWN),
            Stopped(StopReason.HEARTBEAT),
            Stopped(StopReason.SILENCE),
            Stopped(StopReason.WAITED),
            Stopped(StopReason.FAILED),
            ValueError("a bug of ours"),
            KeyError("x"),
            OSError(28, "x"),
        ],
        Verdict.SILENCE: [Stopped(StopReason.CANCELLED), Stopped(StopReason.LOST)],
        Verdict.STOP_WORKER: [ConfigError("x")],
    }
    for answer, errors in expected.items():
        for error in errors:
            assert verdict(error) is answer, error
    assert {error.reason for error in expected[Verdict.SILENCE] if isinstance(error, Stopped)} | {
        StopReason.SHUTDOWN,
        StopReason.HEARTBEAT,
        StopReason.SILENCE,
        StopReason.DETACH,
        StopReason.WAITED,
        StopReason.FAILED,
    } == set(StopReason), "a new reason to stop needs a verdict of its own"


def test_the_first_reason_to_halt_counts() -> None:
    halt = Halt()
    halt.check()
    assert not halt.wait(0)
    halt.set(StopReason.CANCELLED)
    halt.set(StopReason.SHUTDOWN)
    assert halt.reason is StopReason.CANCELLED
    assert halt.wait(0)
    with pytest.raises(Stopped) as stopped:
        halt.check()
    assert stopped.value.reason is StopReason.CANCELLED


def test_wakers_are_called_once_and_only_while_registered() -> None:
    halt = Halt()
    calls: list[str] = []
    with halt.waking(lambda: calls.append("early")):
        pass
    with halt.waking(lambda: calls.append("inside")):
        halt.set(StopReason.LOST)
        halt.set(StopReason.LOST)
        assert calls == ["inside"]
    with halt.waking(lambda: calls.append("late")):
        assert calls == ["inside", "late"]


def test_a_waker_may_look_at_the_halt_that_calls_it() -> None:
    halt = Halt()
    seen: list[StopReason | None] = []

    def wake() -> None:
        with halt.waking(lambda: seen.append(halt.reason)):
            pass

    with halt.waking(wake):
        halt.set(StopReason.SHUTDOWN)
    assert seen == [StopReason.SHUTDOWN]


def test_of_many_threads_that_halt_one_gives_the_reason_and_wakes() -> None:
    for _ in range(50):
        _race_to_halt()


def _race_to_halt() -> None:
    halt = Halt()
    woken: list[StopReason | None] = []
    start = threading.Barrier(len(StopReason))

    def ask(reason: StopReason) -> None:
        start.wait()
        halt.set(reason)

    threads = [threading.Thread(target=ask, args=(reason,)) for reason in StopReason]
    with halt.waking(lambda: woken.append(halt.reason)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert woken == [halt.reason]


@pytest.mark.parametrize(("cores", "whole"), [(1.9, 2), (1.5, 2), (1.49, 1), (0.5, 1), (0.49, 0), (8.0, 8)])
def test_cores_are_rounded_half_up(cores: float, whole: int) -> None:
    assert Offer(cores, 1).whole_cores == whole
