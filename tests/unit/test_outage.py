"""outage: one line when the server goes away, a reminder every ten minutes, one line when it is back."""

from __future__ import annotations

import pytest

from jobfetcher.core.errors import SourceRefused, SourceUnavailable, TooSoon
from jobfetcher.outage import Outage
from tests.support.jobs import Emitted, FakeClock

pytestmark = pytest.mark.fault("J10")
DOWN = SourceUnavailable("no answer")


@pytest.fixture
def outage(emit: Emitted, clock: FakeClock) -> Outage:
    return Outage(emit, clock=clock)


def said(emit: Emitted) -> list[str]:
    return [str(fields["message"]) for name, _, fields in emit.events if name.startswith("server_")]


def test_it_is_said_at_once_then_every_ten_minutes_then_that_it_is_over(
    outage: Outage, emit: Emitted, clock: FakeClock
) -> None:
    outage.failed("polling", "no job can be taken", DOWN, 45.0)
    assert said(emit) == ["no job can be taken: no answer; trying again in 45 s"]
    for _ in range(25):
        clock.now += 60
        outage.failed("polling", "no job can be taken", DOWN, 300.0)
    assert said(emit)[1:] == [
        "for 10 min now: no job can be taken: no answer; trying again in 5 min",
        "for 20 min now: no job can be taken: no answer; trying again in 5 min",
    ]
    clock.now += 60 * 200
    outage.answered("polling")
    outage.answered("polling")
    assert said(emit)[3:] == ["the server answers again, after 3 h 45 min"]
    outage.failed("polling", "no job can be taken", DOWN, 1.0)
    assert said(emit)[4:] == ["no job can be taken: no answer; trying again in 1 s"]


def test_it_is_said_for_the_worker_and_not_for_each_job(outage: Outage, emit: Emitted, clock: FakeClock) -> None:
    for who in ("polling", *map(str, range(20))):
        outage.failed(who, f"the keep-alive of job {who} is not delivered", DOWN, 15.0)
    clock.now += 601
    for who in map(str, range(20)):
        outage.failed(who, f"the keep-alive of job {who} is not delivered", DOWN, 15.0)
    assert len(said(emit)) == 2
    for who in map(str, range(20)):
        outage.answered(who)
    assert len(said(emit)) == 2  # nobody has asked for a job yet
    outage.answered("polling")
    assert said(emit)[2:] == ["the server answers again, after 10 min"]


def test_one_whose_calls_are_answered_does_not_end_anothers_trouble(outage: Outage, emit: Emitted) -> None:
    """S19: the server fails at updates for as long as the user's side is away, and answers all questions for jobs."""
    for _ in range(30):
        outage.failed("7", "the keep-alive of job 7 is not delivered", SourceUnavailable("500"), 15.0)
        outage.answered("polling")
    assert len(said(emit)) == 1


def test_a_reminder_comes_on_time_also_between_two_tries_and_says_when_the_next_one_is(
    outage: Outage, emit: Emitted, clock: FakeClock
) -> None:
    outage.failed("polling", "no job can be taken", DOWN, 3.0)
    clock.now += 599
    outage.failed("polling", "no job can be taken", DOWN, 200.0)
    outage.remind()
    assert len(said(emit)) == 1
    assert outage.due_in_s() == pytest.approx(1.0)
    clock.now += 1
    outage.remind()
    assert said(emit)[1:] == ["for 10 min now: no job can be taken: no answer; trying again in 3 min"]
    assert outage.due_in_s() == pytest.approx(600.0)


def test_a_new_reason_is_heard_at_once_and_reasons_without_end_are_not(outage: Outage, emit: Emitted) -> None:
    """A page may have another number in it each time it is asked for."""
    for number in range(100):
        outage.failed("polling", "no job can be taken", SourceUnavailable(f"request {number}"), 1.0)
        outage.failed("polling", "no job can be taken", SourceRefused("403"), 1.0)
    assert len(said(emit)) == 5
    assert said(emit)[1] == "no job can be taken: 403; trying again in 1 s"


def test_what_was_not_asked_is_no_trouble(outage: Outage, emit: Emitted) -> None:
    outage.failed("7", "the end of job 7 is not delivered yet", TooSoon("waiting", retry_after_s=30), 30.0)
    outage.answered("7")
    assert said(emit) == []


def test_who_makes_no_calls_any_more_keeps_no_trouble_open(outage: Outage, emit: Emitted, clock: FakeClock) -> None:
    outage.failed("7", "the end of job 7 is not delivered yet", DOWN, 15.0)
    outage.forget("7")
    clock.now += 601
    outage.remind()
    assert outage.due_in_s() is None
    assert len(said(emit)) == 1


def test_of_who_has_not_tried_for_long_nothing_is_said(outage: Outage, emit: Emitted, clock: FakeClock) -> None:
    outage.failed("7", "the keep-alive of job 7 is not delivered", DOWN, 15.0)
    clock.now += 1201
    outage.remind()
    assert len(said(emit)) == 1
