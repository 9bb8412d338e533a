"""overlap: two things at once as one step: both done, or the first failure, and never a thread left."""

import threading
from collections.abc import Callable

import pytest

from jobfetcher.core.errors import JobFault, JobReason, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.overlap import both

FAULT = JobFault(JobReason.IMAGE_MISSING, "the registry does not have it")
OTHER = WorkerFault(WorkerReason.STORAGE, "the storage is away")


def fails(error: BaseException) -> Callable[[Halt], str]:
    def act(halt: Halt) -> str:
        raise error

    return act


def heeds(halt: Halt) -> str:
    """Goes on until the halt is set."""
    assert halt.wait(20), "nobody told it to end"
    halt.check()
    return "never"


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_both_are_done_at_the_same_time_and_both_answers_come_back() -> None:
    meeting = threading.Barrier(2, timeout=20)
    seen: list[str] = []

    def here(halt: Halt) -> int:
        meeting.wait()
        seen.append(threading.current_thread().name)
        return 1

    def beside(halt: Halt) -> str:
        meeting.wait()
        seen.append(threading.current_thread().name)
        return "two"

    assert both(Halt(), here, beside, "pull-7") == (1, "two")
    assert sorted(seen) == sorted([threading.current_thread().name, "pull-7"])
    assert "pull-7" not in names()


@pytest.mark.parametrize("beside_fails", [False, True])
@pytest.mark.parametrize("error", [FAULT, OTHER, ValueError("a bug"), SystemExit()], ids=lambda error: repr(error)[:12])
def test_the_failure_of_one_ends_the_other_and_is_what_counts(beside_fails: bool, error: BaseException) -> None:
    here, beside = (heeds, fails(error)) if beside_fails else (fails(error), heeds)
    halt = Halt()
    with pytest.raises(type(error)) as caught:
        both(halt, here, beside, "pull-7")
    assert caught.value is error
    assert halt.reason is None, "the job itself was not told to end"
    assert "pull-7" not in names()


@pytest.mark.parametrize("first_here", [False, True])
def test_of_two_failures_the_first_one_counts(first_here: bool) -> None:
    """What the other one says when it is cut off is no cause."""

    def second(halt: Halt) -> str:
        assert halt.wait(20)
        raise OTHER

    here, beside = (fails(FAULT), second) if first_here else (second, fails(FAULT))
    with pytest.raises(JobFault) as caught:
        both(Halt(), here, beside, "pull-7")
    assert caught.value is FAULT


@pytest.mark.parametrize("reason", [StopReason.CANCELLED, StopReason.DETACH, StopReason.SHUTDOWN])
@pytest.mark.parametrize("before", [False, True], ids=["meanwhile", "before"])
def test_a_halt_reaches_both_with_its_reason(reason: StopReason, before: bool) -> None:
    halt, heard = Halt(), []
    began = threading.Barrier(3 if not before else 2, timeout=20)

    def listen(inner: Halt) -> str:
        began.wait()
        assert inner.wait(20)
        heard.append(inner.reason)
        return heeds(inner)

    def stop() -> None:
        began.wait()
        halt.set(reason)

    setter = threading.Thread(target=stop)
    if before:
        halt.set(reason)
    else:
        setter.start()
    with pytest.raises(Stopped) as stopped:
        both(halt, listen, listen, "pull-7")
    if not before:
        setter.join()
    assert stopped.value.reason is reason
    assert heard == [reason, reason]
    assert "pull-7" not in names()


def test_a_halt_after_the_end_reaches_nobody() -> None:
    inner: list[Halt] = []

    def keep(halt: Halt) -> None:
        inner.append(halt)

    halt = Halt()
    both(halt, keep, keep, "pull-7")
    halt.set(StopReason.CANCELLED)
    assert [one.reason for one in inner] == [None, None]


@pytest.mark.fault("F10")
def test_where_no_more_threads_may_start_one_is_done_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def act(name: str) -> Callable[[Halt], str]:
        def run(halt: Halt) -> str:
            halt.check()
            done.append(name)
            return name

        return run

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert both(Halt(), act("here"), act("beside"), "pull-7") == ("here", "beside")
    assert done == ["here", "beside"]
    with pytest.raises(JobFault):
        both(Halt(), fails(FAULT), act("never"), "pull-7")
    assert "never" not in done
    halt = Halt()

    def stopped_meanwhile(inner: Halt) -> None:
        halt.set(StopReason.SHUTDOWN)

    with pytest.raises(Stopped):
        both(halt, stopped_meanwhile, act("never"), "pull-7")
