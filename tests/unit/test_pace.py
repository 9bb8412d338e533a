"""pace: how soon the next question is asked, and what is said about it."""

from __future__ import annotations

from collections import Counter

import pytest

from jobfetcher.core.errors import JobReason, SourceUnavailable, WorkerFault, WorkerReason
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.outage import Outage
from jobfetcher.pace import Pace
from tests.support.jobs import Emitted, FakeClock

BAD = Outcome(Ending.JOB_FAILED, JobReason.EXIT_CODE, "exit code 1")
GOOD = Outcome(Ending.FINISHED, None, "")


@pytest.fixture
def pace(clock: FakeClock, emit: Emitted) -> Pace:
    return Pace(30.0, emit, clock=clock, jitter=lambda: 1.0)


@pytest.mark.fault("T23")
def test_after_five_bad_ends_the_machine_must_test_itself_and_jobs_are_taken_at_most_one_a_second(
    pace: Pace, clock: FakeClock, emit: Emitted
) -> None:
    doubts, pauses = [], []
    for _ in range(12):
        doubts.append(pace.ended(BAD))
        if doubts[-1]:
            pace.tested()
        pauses.append(pace.left_s())
        clock.now += pauses[-1]
    assert doubts == ([False] * 4 + [True]) * 2 + [False] * 2
    assert pauses == [0] * 4 + [1] * 8
    assert emit.levels("many_failures") == ["warning"]  # once, until a job ends well
    assert "5 jobs in a row ended badly; this machine has tested" in str(emit.named("many_failures")[0]["message"])
    pace.ended(GOOD)
    assert [pace.ended(BAD) for _ in range(5)] == [False] * 4 + [True]
    pace.tested()
    assert len(emit.named("many_failures")) == 2


@pytest.mark.fault("T23")
def test_doubts_stay_until_the_machine_has_passed(pace: Pace, emit: Emitted) -> None:
    for _ in range(5):
        pace.ended(BAD)
    assert pace.ended(BAD)
    assert pace.ended(BAD)
    pace.tested()
    assert not pace.ended(BAD)
    assert "7 jobs in a row ended badly" in str(emit.named("many_failures")[0]["message"])


@pytest.mark.fault("T23")
def test_a_good_end_or_ten_minutes_make_it_forget(pace: Pace, clock: FakeClock) -> None:
    for _ in range(4):
        assert not pace.ended(BAD)
    pace.ended(GOOD)
    for _ in range(4):
        assert not pace.ended(BAD)
    clock.now += 601
    assert not pace.ended(BAD)


@pytest.mark.fault("T23")
def test_a_test_for_another_reason_says_nothing_of_bad_ends(pace: Pace, emit: Emitted) -> None:
    for _ in range(4):
        pace.ended(BAD)
    pace.tested()
    assert emit.named("many_failures") == []
    assert [pace.ended(BAD) for _ in range(5)] == [False] * 4 + [True]


@pytest.mark.fault("T23")
def test_jobs_in_hand_count_as_those_that_may_end_badly_once_one_has(pace: Pace, clock: FakeClock) -> None:
    assert not pace.is_doubtful(8)
    pace.ended(BAD)
    assert [pace.is_doubtful(in_hand) for in_hand in (0, 3, 4, 8)] == [False, False, True, True]
    pace.tested()
    assert not pace.is_doubtful(8)
    pace.ended(BAD)
    clock.now += 601
    assert not pace.is_doubtful(8)


@pytest.mark.fault("T23")
@pytest.mark.parametrize(
    "outcome",
    [Outcome(Ending.DROPPED, None, "taken back"), Outcome(Ending.WORKER_FAILED, WorkerReason.SHUTDOWN, "shut down")],
    ids=["taken back", "shut down"],
)
def test_ends_that_are_nobodys_fault_do_not_count(pace: Pace, outcome: Outcome) -> None:
    for _ in range(20):
        assert not pace.ended(outcome)
    assert pace.left_s() == 0


@pytest.mark.fault("J8")
def test_an_idle_worker_waits_at_most_five_minutes_and_never_not_at_all(pace: Pace) -> None:
    waits = [pace.failed(SourceUnavailable("no answer", retry_after_s=0.0)) for _ in range(200)]
    assert min(waits) >= 1.0
    assert max(waits) <= 300.0
    assert max(waits[10:]) > 60.0


@pytest.mark.fault("J8")
def test_what_the_server_asks_for_is_waited_whatever_gets_free(pace: Pace) -> None:
    wait_s = pace.failed(SourceUnavailable("busy", retry_after_s=500.0))
    assert 501.0 <= wait_s <= 560.0  # and the back-off of a first failure
    assert pace.left_s() == pytest.approx(wait_s)


@pytest.mark.fault("J8")
def test_workers_that_were_all_told_the_same_moment_do_not_come_at_it_together(clock: FakeClock) -> None:
    told = SourceUnavailable("maintenance", retry_after_s=500.0)
    waits = [Pace(30.0, Emitted(), clock=clock).failed(told) for _ in range(3000)]
    busiest = max(Counter(int(wait - 500.0) for wait in waits).values())
    assert min(waits) >= 501.0
    assert max(waits) <= 560.0
    assert busiest <= 2 * len(waits) / 60  # 50 a second on average; chance gives some 70


def test_trouble_of_this_machine_is_looked_at_again_as_soon_as_something_changes(pace: Pace) -> None:
    assert pace.failed(WorkerFault(WorkerReason.DISK, "the disk is full")) > 0
    assert pace.left_s() == 0


@pytest.mark.fault("J10")
def test_trouble_is_said_once_per_change(pace: Pace, emit: Emitted) -> None:
    for _ in range(5):
        pace.failed(SourceUnavailable("no answer"))
    pace.failed(SourceUnavailable("another answer"))
    pace.well()
    pace.well()
    assert len(emit.named("not_polling")) == 2
    assert len(emit.named("polling_again")) == 1
    assert not pace.in_trouble


DOWN = SourceUnavailable("the server answered 500")


@pytest.fixture
def outage(clock: FakeClock, emit: Emitted) -> Outage:
    return Outage(emit, clock=clock)


@pytest.fixture
def shared(clock: FakeClock, emit: Emitted, outage: Outage) -> Pace:
    """A pace whose worker has jobs in hand: what is said of them is known to `outage`."""
    return Pace(30.0, emit, clock=clock, jitter=lambda: 1.0, outage=outage)


@pytest.mark.fault("B23")
def test_no_job_is_asked_for_while_words_about_one_in_hand_are_not_accepted(
    shared: Pace, outage: Outage, clock: FakeClock
) -> None:
    assert shared.left_s() == 0
    outage.failed("7", "the end of job 7", DOWN, 2.0)
    assert shared.left_s() == 30  # looked at again after the usual interval
    clock.now += 299
    assert shared.left_s() == 1
    clock.now += 1
    assert shared.left_s() == 0  # one question in five minutes
    shared.failed(DOWN)
    clock.now += shared.left_s()
    assert shared.left_s() == 30
    outage.answered("7")
    clock.now += 300
    assert shared.left_s() == 0


@pytest.mark.fault("B23")
def test_a_job_with_a_trouble_of_its_own_holds_up_no_other_once_a_question_was_answered(
    shared: Pace, outage: Outage, clock: FakeClock
) -> None:
    outage.failed("7", "the end of job 7", DOWN, 2.0)
    assert shared.left_s() == 30
    clock.now += 300
    assert shared.left_s() == 0
    shared.well()
    outage.failed("8", "the end of job 8", DOWN, 2.0)
    assert shared.left_s() == 0
    outage.answered("7")
    outage.answered("8")
    assert shared.left_s() == 0
    outage.failed("9", "the end of job 9", DOWN, 2.0)
    assert shared.left_s() == 30


def given_back(reason: WorkerReason, why: str = "that host is not in STORAGE_ALLOW") -> Outcome:
    return Outcome(Ending.WORKER_FAILED, reason, why)


@pytest.mark.fault("T23", "S3")
@pytest.mark.parametrize("reason", [WorkerReason.STORAGE, WorkerReason.POLICY])
def test_a_machine_that_gives_back_each_job_takes_ever_fewer(
    pace: Pace, clock: FakeClock, emit: Emitted, reason: WorkerReason
) -> None:
    pauses = []
    for _ in range(12):
        assert not pace.ended(given_back(reason))  # a box of its own would show nothing of it
        pauses.append(pace.left_s())
        clock.now += pauses[-1]
        assert pace.left_s() == 0
        pace.took()
    assert pauses == [1] * 4 + [60, 120, 240, 480, 600, 600, 600, 600]
    [said] = emit.named("giving_back")
    assert emit.levels("giving_back") == ["warning"]
    assert "5 jobs in a row were given back" in str(said["message"])
    assert "that host is not in STORAGE_ALLOW" in str(said["message"])
    assert emit.named("many_failures") == []


@pytest.mark.fault("T23")
def test_only_one_job_is_taken_to_see_whether_it_is_over(pace: Pace, clock: FakeClock) -> None:
    for _ in range(5):
        pace.ended(given_back(WorkerReason.STORAGE))
    clock.now += 60
    assert pace.left_s() == 0
    pace.took()  # a slot is still free, and this one has not ended yet
    assert pace.left_s() == 120
    clock.now += 20
    pace.ended(given_back(WorkerReason.STORAGE))
    assert pace.left_s() == 120


@pytest.mark.fault("T23")
@pytest.mark.parametrize("end", [GOOD, BAD, given_back(WorkerReason.ENGINE)], ids=["well", "badly", "by the engine"])
def test_any_other_end_makes_it_take_jobs_as_usual(pace: Pace, emit: Emitted, end: Outcome) -> None:
    for _ in range(4):
        pace.ended(given_back(WorkerReason.STORAGE))
    pace.ended(end)
    for _ in range(4):
        pace.ended(given_back(WorkerReason.STORAGE))
    assert pace.left_s() == 1
    assert emit.named("giving_back") == []
    pace.ended(given_back(WorkerReason.STORAGE))
    assert pace.left_s() == 60
    pace.ended(end)
    assert pace.left_s() <= 1
    assert len(emit.named("taking_again")) == 1
    pace.took()
    assert pace.left_s() <= 1


@pytest.mark.fault("T23")
def test_ends_that_say_nothing_about_it_change_nothing(pace: Pace) -> None:
    for _ in range(5):
        pace.ended(given_back(WorkerReason.STORAGE))
    pace.ended(Outcome(Ending.DROPPED, None, "taken back"))
    pace.ended(Outcome(Ending.WORKER_FAILED, WorkerReason.SHUTDOWN, "shut down"))
    assert pace.left_s() == 60


@pytest.mark.fault("T23")
def test_a_policy_that_has_let_a_job_pass_is_meant_and_holds_up_nobody(pace: Pace, emit: Emitted) -> None:
    """One user's two hundred jobs with an image that is not allowed here, in front of another one's good job."""
    pace.ended(GOOD)
    for _ in range(200):
        pace.ended(given_back(WorkerReason.POLICY, "image x is not among the ALLOWED_IMAGES of this worker"))
        assert pace.left_s() == 1
    assert emit.named("giving_back") == []
