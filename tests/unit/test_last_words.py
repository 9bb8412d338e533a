"""What is said of each job in hand when the process ends at once is what the next start does (recovery, runner)."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from jobfetcher.core.errors import JobReason
from jobfetcher.core.job import JobId
from jobfetcher.core.machine import Share
from jobfetcher.core.phases import Phase
from jobfetcher.core.run import Ending, Exit, Image, Outcome
from jobfetcher.journal import Journal
from jobfetcher.recovery import next_start
from tests.support.jobs import make_job

SEVEN = JobId("7")
SHARE = Share(1.5, 4096)
IMAGE = Image("sha256:1", "docker.io/library/busybox:latest", "busybox@sha256:2", "amd64", 4_000_000, pulled=True)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path / "journal.db")) as opened:
        opened.claim(SEVEN, "https://api", make_job())
        yield opened


def runs(journal: Journal) -> None:
    journal.advance(SEVEN, Phase.STAGING_IN)
    journal.running(SEVEN, SHARE, IMAGE)
    journal.started(SEVEN, "container")


def is_stopped(journal: Journal) -> None:
    runs(journal)
    journal.stopping(SEVEN)


def is_stopped_again(journal: Journal) -> None:
    runs(journal)
    assert journal.again(SEVEN)
    journal.running(SEVEN, SHARE, IMAGE)
    journal.stopping(SEVEN)


def uploads(journal: Journal) -> None:
    runs(journal)
    journal.exited(SEVEN, Exit(0))


def has_ended(journal: Journal) -> None:
    uploads(journal)
    journal.settling(SEVEN, Outcome(Ending.JOB_FAILED, JobReason.EXIT_CODE, "exit code 3"))


@pytest.mark.fault("F4")
@pytest.mark.parametrize(
    ("stand", "told"),
    [
        (lambda journal: None, "job 7 is left where it is (claimed); the next start goes on with it"),
        (runs, "job 7 runs on in its container; the next start goes on with it"),
        (
            is_stopped,
            "job 7 was being stopped, and what it computed is lost; the next start runs it once more, from the "
            "beginning",
        ),
        (is_stopped_again, "job 7 was being stopped, and what it computed is lost; the next start gives it back"),
        (uploads, "job 7 is left where it is (staging out); the next start goes on with it"),
        (has_ended, "job 7 has ended here; the next start sees to it that the server knows"),
    ],
    ids=["claimed", "runs", "is stopped", "is stopped again", "uploads", "has ended"],
)
def test_each_job_in_hand_is_told_what_becomes_of_it(
    journal: Journal, stand: Callable[[Journal], None], told: str
) -> None:
    stand(journal)
    assert [next_start(record) for record in journal.records()] == [told]


@pytest.mark.fault("F4")
def test_what_was_said_stays_true_to_the_end(journal: Journal) -> None:
    """After the last words no other thread can note that it begins to stop a job, and so none begins."""
    runs(journal)
    said: list[str] = []
    over = threading.Event()

    def part() -> None:
        said.extend(next_start(record) for record in journal.last_records(5.0))
        over.wait(30)  # the real one ends the process here
        journal._lock.release()

    last = threading.Thread(target=part)
    last.start()
    while not said:
        last.join(0.01)
    stopping = threading.Thread(target=journal.stopping, args=(SEVEN,))
    stopping.start()
    stopping.join(0.2)
    assert stopping.is_alive()
    over.set()
    for thread in (last, stopping):
        thread.join()
    assert said == ["job 7 runs on in its container; the next start goes on with it"]


def test_a_journal_that_is_busy_is_not_waited_for(journal: Journal) -> None:
    busy, over = threading.Event(), threading.Event()

    def hold() -> None:
        with journal._lock:
            busy.set()
            over.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    busy.wait()
    assert journal.last_records(0.05) == []
    over.set()
    holder.join()
