"""journal: what is written is there after a kill, what is illegal is refused, and a full disk loses nothing."""

import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from jobfetcher.core.errors import ConfigError, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.job import JobId
from jobfetcher.core.phases import IllegalMove, Phase
from jobfetcher.core.run import Ending, Exit, Outcome, Stored
from jobfetcher.journal import VERSION, Journal, Record
from tests.support.jobs import make_job
from tests.support.mounts import needs_root, tmpfs
from tests.support.trees import names_in

SEVEN, EIGHT = JobId("7"), JobId("8")
FAILED = Outcome(Ending.JOB_FAILED, JobReason.EXIT_CODE, "exit code 3")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path / "journal.db")) as opened:
        yield opened


def reread(path: Path) -> list[Record]:
    with closing(Journal(path)) as journal:
        return journal.records()


def test_a_job_is_remembered_through_all_its_phases(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    job = make_job(inputs={"in/a": "s3://b/a"}, outputs={"output": "out"}, env={"A": "ä"})
    steps: list[Record] = []
    with closing(Journal(path)) as journal:
        journal.claim(SEVEN, "https://api", job)
        steps += reread(path)
        journal.advance(SEVEN, Phase.STAGING_IN)
        steps += reread(path)
        journal.advance(SEVEN, Phase.RUNNING)
        journal.started(SEVEN, "c0ffee")
        steps += reread(path)
        journal.exited(SEVEN, Exit(3, oom_killed=True, genuine=False, started_at="s", finished_at="f", error="e"))
        steps += reread(path)
        journal.settling(SEVEN, FAILED)
        steps += reread(path)
        journal.forget(SEVEN)
    assert [record.phase for record in steps] == list(Phase)
    last = steps[-1]
    assert (last.id, last.token, last.job, last.container) == ("7", "https://api", job, "c0ffee")
    assert last.exit == Exit(3, oom_killed=True, genuine=False, started_at="s", finished_at="f", error="e")
    assert last.outcome == FAILED
    assert last.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert abs(last.claimed_at - time.time()) < 60
    assert reread(path) == []


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(),
        Outcome(Ending.FINISHED, None, ""),
        FAILED,
        Outcome(Ending.WORKER_FAILED, WorkerReason.DISK, "ü\n"),
        Outcome(Ending.DROPPED, None, "lost"),
    ],
)
def test_every_outcome_comes_back_as_it_was(journal: Journal, outcome: Outcome) -> None:
    journal.claim(SEVEN, "t", make_job())
    journal.settling(SEVEN, outcome)
    record = journal.record(SEVEN)
    assert record is not None
    assert record.outcome == outcome


@pytest.mark.parametrize("reason", [*JobReason, *WorkerReason])
def test_every_reason_keeps_its_kind(journal: Journal, reason: JobReason | WorkerReason) -> None:
    journal.claim(SEVEN, "t", None)
    journal.settling(SEVEN, Outcome(Ending.JOB_FAILED, reason, "x"))
    record = journal.record(SEVEN)
    assert record is not None
    assert record.outcome is not None
    assert record.outcome.reason is reason


def test_illegal_moves_are_refused_and_change_nothing(journal: Journal) -> None:
    journal.claim(SEVEN, "t", make_job())
    for phase in (Phase.CLAIMED, Phase.RUNNING, Phase.STAGING_OUT):
        with pytest.raises(IllegalMove):
            journal.advance(SEVEN, phase)
    with pytest.raises(IllegalMove):
        journal.exited(SEVEN, Exit(0))
    journal.settling(SEVEN, FAILED)
    for phase in Phase:
        with pytest.raises(IllegalMove):
            journal.advance(SEVEN, phase)
    with pytest.raises(IllegalMove):
        journal.settling(SEVEN, Outcome(Ending.FINISHED, None, ""))
    record = journal.record(SEVEN)
    assert record is not None
    assert (record.phase, record.outcome, record.exit) == (Phase.SETTLING, FAILED, None)


def test_a_job_that_is_not_on_record_cannot_move(journal: Journal) -> None:
    with pytest.raises(WorkerFault, match="no record of job 7"):
        journal.settling(SEVEN, FAILED)


def test_jobs_are_listed_oldest_first_and_one_without_a_spec_is_kept(journal: Journal) -> None:
    journal.claim(EIGHT, "t", None)
    journal.claim(SEVEN, "t", make_job())
    assert [(record.id, record.job is None) for record in journal.records()] == [("8", True), ("7", False)]


def test_a_spec_that_cannot_be_read_any_more_counts_as_none(tmp_path: Path, journal: Journal) -> None:
    journal.claim(SEVEN, "t", make_job())
    with closing(sqlite3.connect(tmp_path / "journal.db")) as other, other:
        other.execute("""UPDATE job SET spec = '{"id": "../x", "image": "i"}'""")
    record = journal.record(SEVEN)
    assert record is not None
    assert record.job is None


# -- marks ----------------------------------------------------------------------------------------------------------


def test_marks_are_kept_by_direction_and_the_last_one_counts(journal: Journal) -> None:
    journal.claim(SEVEN, "t", make_job())
    journal.mark(SEVEN, "in", Stored("a", 1, "sha256:1"))
    journal.mark(SEVEN, "out", Stored("output:a", 2, "md5:2", "etag"))
    journal.mark(SEVEN, "in", Stored("a", 3, "sha256:3"))
    assert journal.marked(SEVEN, "in") == {"a": Stored("a", 3, "sha256:3")}
    assert journal.marked(SEVEN, "out") == {"output:a": Stored("output:a", 2, "md5:2", "etag")}
    assert journal.marked(EIGHT, "in") == {}


def seen_from_outside(path: Path) -> int:
    with closing(sqlite3.connect(path)) as other:
        return int(other.execute("SELECT count(*) FROM file").fetchone()[0])


def test_marks_are_committed_in_groups(tmp_path: Path, journal: Journal) -> None:
    path = tmp_path / "journal.db"
    journal.claim(SEVEN, "t", make_job())
    before = time.monotonic()
    journal.mark(SEVEN, "in", Stored("a", 1, "d"))
    journal.mark(SEVEN, "in", Stored("b", 1, "d"))
    if time.monotonic() - before < 0.5:  # a machine that stood still here may have committed already
        assert seen_from_outside(path) == 0
    journal.advance(SEVEN, Phase.STAGING_IN)
    assert seen_from_outside(path) == 2


def test_the_last_mark_of_a_group_is_committed_though_nothing_follows_it(tmp_path: Path, journal: Journal) -> None:
    journal.claim(SEVEN, "t", make_job())
    journal.mark(SEVEN, "in", Stored("a", 1, "d"))
    deadline = time.monotonic() + 10
    while seen_from_outside(tmp_path / "journal.db") == 0:
        assert time.monotonic() < deadline, "a mark waited for the next one"
        time.sleep(0.05)


def test_forgetting_a_job_forgets_its_files(tmp_path: Path, journal: Journal) -> None:
    journal.claim(SEVEN, "t", make_job())
    journal.mark(SEVEN, "in", Stored("a", 1, "d"))
    journal.forget(SEVEN)
    assert seen_from_outside(tmp_path / "journal.db") == 0
    journal.claim(SEVEN, "t", make_job())
    assert journal.marked(SEVEN, "in") == {}


# -- killed at any moment -------------------------------------------------------------------------------------------

STORY = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from jobfetcher.core.job import Job, JobId
    from jobfetcher.core.phases import Phase
    from jobfetcher.core.run import Ending, Exit, Outcome, Stored
    from jobfetcher.journal import Journal

    journal, seven = Journal(Path(sys.argv[1])), JobId("7")
    steps = [
        lambda: journal.claim(seven, "t", Job(id="7", image="i")),
        lambda: journal.advance(seven, Phase.STAGING_IN),
        lambda: (journal.mark(seven, "in", Stored("a", 1, "d")), journal.advance(seven, Phase.RUNNING)),
        lambda: journal.started(seven, "c0ffee"),
        lambda: journal.exited(seven, Exit(0)),
        lambda: journal.settling(seven, Outcome(Ending.FINISHED, None, "")),
        lambda: journal.forget(seven),
    ]
    for step in steps[: int(sys.argv[2])]:
        step()
    os.kill(os.getpid(), signal.SIGKILL)
    """
)


@pytest.mark.fault("A10")
@pytest.mark.parametrize("steps", range(1, 8))
def test_a_worker_killed_after_any_write_finds_it_again(tmp_path: Path, steps: int) -> None:
    path = tmp_path / "journal.db"
    killed = subprocess.run([sys.executable, "-c", STORY, str(path), str(steps)], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with closing(Journal(path)) as journal:
        records, marks = journal.records(), journal.marked(SEVEN, "in")
    if steps == 7:
        assert records == []
        return
    [record] = records
    phases = [Phase.CLAIMED, Phase.STAGING_IN, Phase.RUNNING, Phase.RUNNING, Phase.STAGING_OUT, Phase.SETTLING]
    assert record.phase is phases[steps - 1]
    assert record.job is not None
    assert record.container == ("c0ffee" if steps >= 4 else None)
    assert (record.exit is not None) == (steps >= 5)
    assert (record.outcome is not None) == (steps >= 6)
    assert ("a" in marks) == (steps >= 3)


# -- files that cannot be used --------------------------------------------------------------------------------------


@pytest.mark.fault("F12")
@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_newer_journal_is_refused_and_untouched(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "journal.db"
    with closing(sqlite3.connect(path)) as newer, newer:
        newer.execute(f"PRAGMA journal_mode={mode}")
        newer.execute("CREATE TABLE job (something TEXT)")
        newer.execute(f"PRAGMA user_version={VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=f"newer jobfetcher .format {VERSION + 1}.*upgrade"):
        Journal(path)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["journal.db"]


@pytest.mark.parametrize("content", [b"not a database at all" * 300, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_file_that_is_no_journal_is_a_clear_refusal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot be used: .*move it away"):
        Journal(path)
    assert path.read_bytes() == content


def test_a_folder_in_the_journals_place_is_a_clear_refusal(tmp_path: Path) -> None:
    (tmp_path / "journal.db").mkdir()
    with pytest.raises(ConfigError, match="cannot be used"):
        Journal(tmp_path / "journal.db")


def test_opening_again_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(Journal(path)) as journal:
        journal.claim(SEVEN, "t", make_job())
    assert [record.id for record in reread(path)] == ["7"]


# -- a full disk ----------------------------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    """Write until there is no room left."""
    with (folder / "filler").open("wb", buffering=0) as filler:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    filler.write(b"x" * size)
            except OSError:
                continue


@pytest.mark.fault("D2")
@needs_root
def test_on_a_full_disk_the_ballast_makes_room_for_the_end(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "16m") as disk, closing(Journal(disk / "journal.db")) as journal:
        journal.claim(SEVEN, "t", make_job())
        assert (disk / "journal.ballast").stat().st_size == 4 << 20
        fill(disk)
        for number in range(100):  # more than the space left over in the log's last page
            journal.claim(JobId(str(number + 100)), "t" * 4000, make_job())
        journal.settling(SEVEN, FAILED)
        assert not (disk / "journal.ballast").exists()
        assert len(journal.records()) == 101


@pytest.mark.fault("D5")
@needs_root
def test_without_room_a_write_fails_as_a_worker_fault_and_changes_nothing(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "16m") as disk, closing(Journal(disk / "journal.db")) as journal:
        journal.claim(SEVEN, "t", make_job())
        fill(disk)
        (disk / "journal.ballast").unlink()
        fill(disk)
        claimed: list[int] = []

        def claim_on() -> None:
            for number in range(10_000):
                journal.claim(JobId(f"x{number}"), "t" * 4000, make_job())
                claimed.append(number)

        def mark_on() -> None:
            for number in range(100_000):
                journal.mark(SEVEN, "in", Stored("x" * 2000 + str(number), 1, "d"))
                if number % 100 == 0:
                    journal.started(SEVEN, str(number))

        with pytest.raises(WorkerFault, match="the journal cannot be written") as fault:
            claim_on()
        assert fault.value.reason is WorkerReason.DISK
        assert len(journal.records()) == 1 + len(claimed)
        with pytest.raises(WorkerFault):
            mark_on()
        (disk / "filler").unlink()
        journal.advance(SEVEN, Phase.STAGING_IN)
        journal.settling(SEVEN, FAILED)
        record = journal.record(SEVEN)
        assert record is not None
        assert record.outcome == FAILED


@pytest.mark.fault("D5")
@needs_root
def test_a_worker_starts_on_a_full_disk_to_end_what_it_holds(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "16m") as disk:
        with closing(Journal(disk / "journal.db")) as journal:
            journal.claim(SEVEN, "t", make_job())
        (disk / "journal.ballast").unlink()
        (disk / "spare").write_bytes(b"x" * 200_000)  # SQLite needs a little to open a journal at all
        fill(disk)
        (disk / "spare").unlink()
        with closing(Journal(disk / "journal.db")) as journal:
            assert [record.id for record in journal.records()] == ["7"]
        assert not (disk / "journal.ballast").exists()
