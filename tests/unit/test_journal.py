"""journal: what is written is there after a kill, what is illegal is refused, and neither a full disk nor an older
format loses anything. Damage of every kind: tests/faults/test_journal_damage.py."""

import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from jobfetcher.core import failpoints
from jobfetcher.core.errors import ConfigError, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.job import JobId
from jobfetcher.core.machine import Gpu, Share
from jobfetcher.core.phases import IllegalMove, Phase
from jobfetcher.core.run import Ending, Exit, Image, Outcome, Stored
from jobfetcher.journal import VERSION, Journal, KeptImage, Record
from tests.support.jobs import make_job
from tests.support.mounts import needs_root, tmpfs
from tests.support.trees import names_in

SEVEN, EIGHT = JobId("7"), JobId("8")
FAILED = Outcome(Ending.JOB_FAILED, JobReason.EXIT_CODE, "exit code 3")
SHARE = Share(1.5, 4096, (Gpu("GPU-0", "stub", 8000, "8.6"),))
IMAGE = Image("sha256:1", "docker.io/library/busybox:latest", "busybox@sha256:2", "amd64", 4_000_000, pulled=True)

GOLDEN = Path(__file__).parent / "golden" / "journal-v1.db"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path / "journal.db")) as opened:
        yield opened


def reread(path: Path) -> list[Record]:
    with closing(Journal(path)) as journal:
        assert journal.damage == ""
        return journal.records()


def of(journal: Journal, job_id: JobId = SEVEN) -> Record:
    record = journal.record(job_id)
    assert record is not None
    return record


class Wall:
    """A wall clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.25

    def __call__(self) -> float:
        return self.now


def test_a_job_is_remembered_through_all_its_phases(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    job = make_job(inputs={"in/a": "s3://b/a"}, outputs={"output": "out"}, env={"A": "ä"})
    ended = Exit(3, oom_killed=True, genuine=False, started_at="s", finished_at="f", error="\n\x1b\u202e")
    steps: list[Record] = []
    with closing(Journal(path)) as journal:
        journal.claim(SEVEN, "https://api", job)
        steps += reread(path)
        journal.advance(SEVEN, Phase.STAGING_IN)
        steps += reread(path)
        journal.running(SEVEN, SHARE, IMAGE)
        journal.started(SEVEN, "c0ffee")
        steps += reread(path)
        journal.exited(SEVEN, ended)
        steps += reread(path)
        journal.settling(SEVEN, FAILED)
        steps += reread(path)
        journal.forget(SEVEN)
    assert [record.phase for record in steps] == list(Phase)
    last = steps[-1]
    assert (last.id, last.token, last.job, last.container) == ("7", "https://api", job, "c0ffee")
    assert (last.exit, last.outcome, last.share, last.image, last.runs) == (ended, FAILED, SHARE, IMAGE, 1)
    assert abs(last.claimed_at - time.time()) < 60
    assert [record.decided_at is None for record in steps] == [True, True, True, True, False]
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


@pytest.mark.parametrize("reason", [None, *JobReason, *WorkerReason])
def test_every_reason_keeps_its_kind(journal: Journal, reason: JobReason | WorkerReason | None) -> None:
    journal.claim(SEVEN, "t", None)
    journal.advance(SEVEN, Phase.STAGING_IN)
    journal.running(SEVEN, SHARE, IMAGE)
    journal.exited(SEVEN, Exit(143, stopped_for=reason))
    journal.settling(SEVEN, Outcome(Ending.JOB_FAILED, reason, "x"))
    record = of(journal)
    assert record.exit is not None
    assert record.outcome is not None
    assert record.exit.stopped_for is reason
    assert record.outcome.reason is reason


def test_text_that_no_file_can_hold_is_kept_as_far_as_it_goes(journal: Journal) -> None:
    journal.claim(SEVEN, "t", None)
    journal.settling(SEVEN, Outcome(Ending.JOB_FAILED, JobReason.CANNOT_START, "half \ud800 a pair"))
    outcome = of(journal).outcome
    assert outcome is not None
    assert outcome.message == "half ? a pair"


def test_illegal_moves_are_refused_and_change_nothing(journal: Journal) -> None:
    journal.claim(SEVEN, "t", make_job())
    before = of(journal)
    for phase in (Phase.CLAIMED, Phase.RUNNING, Phase.STAGING_OUT):
        with pytest.raises(IllegalMove):
            journal.advance(SEVEN, phase)
    for illegal in (
        lambda: journal.exited(SEVEN, Exit(0)),
        lambda: journal.running(SEVEN, SHARE, IMAGE),
        lambda: journal.again(SEVEN),
    ):
        with pytest.raises(IllegalMove):
            illegal()
    assert of(journal) == before
    journal.settling(SEVEN, FAILED)
    settled = of(journal)
    for phase in Phase:
        with pytest.raises(IllegalMove):
            journal.advance(SEVEN, phase)
    assert of(journal) == settled


def test_the_first_outcome_counts_and_is_told(tmp_path: Path) -> None:
    wall = Wall()
    with closing(Journal(tmp_path / "journal.db", wall=wall)) as journal:
        journal.claim(SEVEN, "t", make_job())
        assert journal.settling(SEVEN, FAILED) == FAILED
        wall.now += 60
        assert journal.settling(SEVEN, Outcome(Ending.FINISHED, None, "")) == FAILED
        assert (of(journal).outcome, of(journal).decided_at) == (FAILED, wall.now - 60)


@pytest.mark.parametrize(
    "change",
    [
        lambda journal: journal.settling(SEVEN, FAILED),
        lambda journal: journal.advance(SEVEN, Phase.STAGING_IN),
        lambda journal: journal.running(SEVEN, SHARE, IMAGE),
        lambda journal: journal.started(SEVEN, "c"),
        lambda journal: journal.exited(SEVEN, Exit(0)),
        lambda journal: journal.again(SEVEN),
        lambda journal: journal.attempt(SEVEN),
        lambda journal: journal.resuming(SEVEN),
    ],
)
def test_a_job_that_is_not_on_record_cannot_change(journal: Journal, change: Callable[[Journal], object]) -> None:
    with pytest.raises(WorkerFault, match="no sound record of job 7"):
        change(journal)
    assert journal.record(SEVEN) is None


def test_jobs_are_listed_oldest_first_and_one_without_a_spec_is_kept(journal: Journal) -> None:
    journal.claim(EIGHT, "t", None)
    journal.claim(SEVEN, "t", make_job())
    assert [(record.id, record.job is None) for record in journal.records()] == [("8", True), ("7", False)]


def test_a_job_claimed_again_starts_anew(journal: Journal) -> None:
    run_once(journal)
    journal.mark(SEVEN, "in", Stored("a", 1, "d"))
    journal.claim(SEVEN, "t2", make_job())
    record = of(journal)
    assert (record.token, record.phase, record.runs, record.share) == ("t2", Phase.CLAIMED, 0, None)
    assert journal.marked(SEVEN, "in") == {}


@pytest.mark.fault("J1", "A10")
def test_what_the_world_is_told_of_waits_for_the_disk(journal: Journal) -> None:
    """A power cut cannot be made here. SQLite says that a commit at FULL is on the disk (sqlite.org/pragma.html)."""
    levels: dict[str, str] = {}

    def level_after(name: str, write: Callable[[], object]) -> None:
        levels[name] = level_of(journal, write)

    level_after("claim", lambda: journal.claim(SEVEN, "token", make_job()))
    level_after("advance", lambda: journal.advance(SEVEN, Phase.STAGING_IN))
    level_after("running", lambda: journal.running(SEVEN, SHARE, IMAGE))
    level_after("started", lambda: journal.started(SEVEN, "container"))
    level_after("stopping", lambda: journal.stopping(SEVEN))
    level_after("exited", lambda: journal.exited(SEVEN, Exit(0)))
    level_after("settling", lambda: journal.settling(SEVEN, Outcome()))
    level_after("forget", lambda: journal.forget(SEVEN))
    waits = {name for name, level in levels.items() if level == "FULL"}
    assert waits == {"claim", "running", "stopping", "exited", "settling"}


def test_of_the_commits_that_do_not_wait_only_the_last_can_be_lost(journal: Journal) -> None:
    """Of several, a power cut could keep the later and lose the earlier: pages are written in any order."""
    jobs = [JobId(str(number)) for number in range(4)]
    for job in jobs:
        journal.claim(job, "token", None)
    assert [level_of(journal, partial(journal.forget, job)) for job in jobs] == ["NORMAL", "FULL", "NORMAL", "FULL"]


def level_of(journal: Journal, write: Callable[[], object]) -> str:
    """How much the commit of `write` waits for (sqlite.org/pragma.html, synchronous)."""
    said: list[str] = []
    journal._db.set_trace_callback(said.append)
    write()
    journal._db.set_trace_callback(None)
    begun = max(at for at, line in enumerate(said) if line.startswith("BEGIN"))
    return said[begun - 1].removeprefix("PRAGMA synchronous=")


def test_history_is_not_kept(tmp_path: Path, journal: Journal) -> None:
    """What was forgotten leaves nothing to read: the file does not grow with the number of jobs."""
    sizes = []
    for number in range(200):
        journal.claim(JobId(str(number)), "t", make_job(str(number), env={"A": "x" * 3000}))
        journal.forget(JobId(str(number)))
        sizes.append((tmp_path / "journal.db").stat().st_size)
    assert journal.records() == []
    assert max(sizes) < 100_000


# -- runs and resumes -----------------------------------------------------------------------------------------------


def run_once(journal: Journal) -> None:
    journal.claim(SEVEN, "t", make_job())
    journal.advance(SEVEN, Phase.STAGING_IN)
    journal.running(SEVEN, SHARE, IMAGE)


@pytest.mark.fault("A10")
def test_a_run_is_repeated_once(journal: Journal) -> None:
    run_once(journal)
    journal.started(SEVEN, "c1")
    assert journal.again(SEVEN)
    record = of(journal)
    assert (record.phase, record.container, record.exit, record.runs) == (Phase.STAGING_IN, None, None, 1)
    other = replace(IMAGE, id="sha256:9")
    journal.running(SEVEN, replace(SHARE, gpus=()), other)
    journal.started(SEVEN, "c2")
    before = of(journal)
    assert (before.runs, before.share, before.image) == (2, replace(SHARE, gpus=()), other)
    assert not journal.again(SEVEN)
    assert of(journal) == before


@pytest.mark.fault("A3")
def test_each_run_has_a_number_of_its_own_that_a_restart_does_not_change(tmp_path: Path) -> None:
    path, wall, seen = tmp_path / "journal.db", Wall(), []
    for _ in range(2):  # handed out twice, a moment apart
        wall.now += 0.5
        with closing(Journal(path, wall=wall)) as journal:
            run_once(journal)
            first = journal.attempt(SEVEN)
        with closing(Journal(path, wall=wall)) as journal:
            assert journal.attempt(SEVEN) == first
            journal.started(SEVEN, "c")
            assert journal.attempt(SEVEN) == first
            journal.again(SEVEN)
            journal.running(SEVEN, SHARE, IMAGE)
            second = journal.attempt(SEVEN)
        with closing(Journal(path, wall=wall)) as journal:
            assert journal.attempt(SEVEN) == second
        seen += [first, second]
    assert len(set(seen)) == 4


@pytest.mark.fault("A10")
def test_a_reboot_since_the_run_began_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"

    def rebooted(boot_id: str) -> bool:
        with closing(Journal(path, boot_id=boot_id)) as journal:
            return of(journal).rebooted

    with closing(Journal(path, boot_id="first")) as journal:
        journal.claim(SEVEN, "t", make_job())
    assert [rebooted(boot_id) for boot_id in ("first", "second", "")] == [False, True, False]
    with closing(Journal(path, boot_id="second")) as journal:
        journal.advance(SEVEN, Phase.STAGING_IN)
        assert of(journal).rebooted
        journal.running(SEVEN, SHARE, IMAGE)
        assert not of(journal).rebooted
    assert [rebooted(boot_id) for boot_id in ("first", "second", "")] == [True, False, False]
    with closing(Journal(path, boot_id="")) as journal:  # a machine that does not say
        journal.claim(SEVEN, "t", make_job())
    assert not rebooted("first")


def test_this_boot_is_the_kernels(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(Journal(path)) as journal:
        journal.claim(SEVEN, "t", make_job())
    with closing(Journal(path, boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip())) as journal:
        assert not of(journal).rebooted
    with closing(Journal(path, boot_id="other")) as journal:
        assert of(journal).rebooted


@pytest.mark.fault("A9")
def test_resumes_are_counted_through_restarts_for_an_hour(tmp_path: Path) -> None:
    path, wall, counts = tmp_path / "journal.db", Wall(), []
    with closing(Journal(path, wall=wall)) as journal:
        run_once(journal)
        assert of(journal).resumes == 0
    for _ in range(7):
        with closing(Journal(path, wall=wall)) as journal:
            counts.append(journal.resuming(SEVEN))
            assert of(journal).resumes == counts[-1]
        wall.now += 600
    assert counts == [1, 2, 3, 4, 5, 6, 7]
    with closing(Journal(path, wall=wall)) as journal:
        assert journal.resuming(SEVEN) == 7  # the first was 70 minutes ago
        wall.now -= 86_400 * 365  # a clock that jumps makes no crash loop
        assert journal.resuming(SEVEN) == 1


PROGRESS: dict[str, Callable[[Journal], object]] = {
    "a phase": lambda journal: journal.exited(SEVEN, Exit(0)),
    "another run": lambda journal: journal.again(SEVEN),
    "a container": lambda journal: journal.started(SEVEN, "c"),
    "a file": lambda journal: journal.mark(SEVEN, "out", Stored("output:b", 1, "d")),
}


@pytest.mark.fault("A9")
@pytest.mark.parametrize("progress", PROGRESS.values(), ids=PROGRESS.keys())
def test_a_job_that_got_on_begins_to_count_anew(journal: Journal, progress: Callable[[Journal], object]) -> None:
    run_once(journal)
    journal.claim(EIGHT, "t", make_job("8"))
    journal.mark(SEVEN, "in", Stored("a", 1, "d"))
    assert [journal.resuming(SEVEN) for _ in range(3)] == [1, 2, 3]
    assert [journal.resuming(EIGHT) for _ in range(2)] == [1, 2]
    progress(journal)
    assert [journal.resuming(SEVEN) for _ in range(2)] == [1, 2]
    assert journal.resuming(EIGHT) == 3


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


@pytest.mark.fault("A7", "A8")
def test_that_an_end_was_accepted_is_on_record_until_the_job_is_forgotten(tmp_path: Path, journal: Journal) -> None:
    journal.claim(SEVEN, "t", make_job())
    journal.claim(EIGHT, "t", make_job("8"))
    journal.settling(SEVEN, Outcome())
    assert not journal.was_accepted(SEVEN)
    journal.accepted(SEVEN)
    journal.accepted(SEVEN)
    assert journal.was_accepted(SEVEN)
    assert not journal.was_accepted(EIGHT)
    assert journal.marked(SEVEN, "in") == journal.marked(SEVEN, "out") == {}
    with closing(Journal(tmp_path / "journal.db")) as another:
        assert another.was_accepted(SEVEN)
    journal.forget(SEVEN)
    assert not journal.was_accepted(SEVEN)
    journal.claim(SEVEN, "t", make_job())  # handed out again
    assert not journal.was_accepted(SEVEN)
    journal.forget(EIGHT)
    with pytest.raises(WorkerFault):
        journal.accepted(EIGHT)


def test_marks_are_committed_in_groups(tmp_path: Path, journal: Journal) -> None:
    path = tmp_path / "journal.db"
    journal.claim(SEVEN, "t", make_job())
    before = time.monotonic()
    journal.mark(SEVEN, "in", Stored("a", 1, "d"))
    journal.mark(SEVEN, "in", Stored("b", 1, "d"))
    seen = seen_from_outside(path)
    if time.monotonic() - before < 0.5:  # a machine that stood still here may have committed already
        assert seen == 0
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


def test_a_mark_of_no_job_is_refused(journal: Journal) -> None:
    with pytest.raises(WorkerFault, match="the journal cannot be written"):
        journal.mark(SEVEN, "in", Stored("a", 1, "d"))
    journal.claim(SEVEN, "t", make_job())
    assert journal.marked(SEVEN, "in") == {}


# -- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("D7")
def test_only_images_that_this_worker_pulled_are_its_own(tmp_path: Path) -> None:
    path, wall = tmp_path / "journal.db", Wall()
    there = replace(IMAGE, reference="quay.io/lab/there:1", pulled=False)
    second = replace(IMAGE, reference="quay.io/lab/second:1", id="sha256:2", size_bytes=7)
    with closing(Journal(path, wall=wall)) as journal:
        journal.used_image(there)
        assert journal.images() == []
        journal.used_image(IMAGE)
        wall.now += 10
        journal.used_image(second)
    with closing(Journal(path, wall=wall)) as journal:
        first_use = wall.now - 10
        assert journal.images() == [
            KeptImage(IMAGE.reference, "sha256:1", 4_000_000, first_use),
            KeptImage("quay.io/lab/second:1", "sha256:2", 7, wall.now),
        ]
        wall.now += 10
        journal.used_image(replace(IMAGE, pulled=False))  # found here again, by a later job
        assert [kept.reference for kept in journal.images()] == [second.reference, IMAGE.reference]
        journal.used_image(replace(second, id="sha256:3", pulled=False))  # somebody else gave the name to another
        assert journal.images()[0] == KeptImage(second.reference, "sha256:2", 7, wall.now - 10)
        journal.used_image(replace(second, id="sha256:4"))
        moved = KeptImage(second.reference, "sha256:4", 7, wall.now)
        assert journal.images()[-1] == moved
        assert second.id in {kept.id for kept in journal.images()}, "the old image is still here, and ours to remove"
        for kept in journal.images():
            if kept.reference == second.reference:
                journal.dropped_image(kept)
        journal.dropped_image(replace(moved, reference="never heard of"))
        assert [kept.reference for kept in journal.images()] == [IMAGE.reference]


# -- killed at any moment -------------------------------------------------------------------------------------------

STORY = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from jobfetcher.core.job import Job, JobId
    from jobfetcher.core.phases import Phase
    from jobfetcher.core.machine import Share
    from jobfetcher.core.run import Ending, Exit, Image, Outcome, Stored
    from jobfetcher.journal import Journal

    image = Image("sha256:1", "busybox", None, "amd64")
    journal, seven = Journal(Path(sys.argv[1])), JobId("7")
    steps = [
        lambda: journal.claim(seven, "t", Job(id="7", image="i")),
        lambda: journal.advance(seven, Phase.STAGING_IN),
        lambda: (journal.mark(seven, "in", Stored("a", 1, "d")), journal.running(seven, Share(1.0, 1), image)),
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
@pytest.mark.fault("J1")
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


@pytest.fixture
def _no_failpoint_left() -> Iterator[None]:
    yield
    failpoints.ask_for(None)


@pytest.mark.usefixtures("_no_failpoint_left")
@pytest.mark.parametrize("name", ["before:commit", "after:commit"])
def test_the_failpoints_stand_around_the_commit(journal: Journal, tmp_path: Path, name: str) -> None:
    journal.claim(SEVEN, "t", make_job())
    failpoints.ask_for(failpoints.parse_request(f"{name}=fail"))
    with pytest.raises(WorkerFault):
        journal.advance(SEVEN, Phase.STAGING_IN)
    failpoints.ask_for(None)
    phase = Phase.CLAIMED if name == "before:commit" else Phase.STAGING_IN
    assert of(journal).phase is phase
    assert [record.phase for record in reread(tmp_path / "journal.db")] == [phase]


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


@pytest.mark.fault("F12")
def test_a_newer_journal_that_was_killed_is_untouched_as_well(tmp_path: Path) -> None:
    """The version stands in the write-ahead log only, which whoever opens the file would apply to it."""
    path, newer = tmp_path / "journal.db", tmp_path / "newer.db"
    with closing(sqlite3.connect(newer, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode=WAL")
        other.execute("CREATE TABLE job (something TEXT)")
        other.execute(f"PRAGMA user_version={VERSION + 1}")
        for suffix in ("", "-wal"):
            shutil.copy(f"{newer}{suffix}", f"{path}{suffix}")
    before = [path.read_bytes(), path.with_name("journal.db-wal").read_bytes()]
    with pytest.raises(ConfigError, match=f"newer jobfetcher .format {VERSION + 1}"):
        Journal(path)
    assert [path.read_bytes(), path.with_name("journal.db-wal").read_bytes()] == before
    assert [name for name in names_in(tmp_path) if name.startswith("journal")] == ["journal.db", "journal.db-wal"]


def test_a_folder_in_the_journals_place_is_a_clear_refusal(tmp_path: Path) -> None:
    (tmp_path / "journal.db").mkdir()
    with pytest.raises(ConfigError, match="cannot be used"):
        Journal(tmp_path / "journal.db")


@pytest.mark.parametrize("mode", [0o000, 0o200])
def test_a_journal_that_may_not_be_read_is_a_clear_refusal(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "journal.db"
    with closing(Journal(path)) as journal:
        journal.claim(SEVEN, "t", make_job())
    before = path.read_bytes()
    path.chmod(mode)
    opened = as_nobody(tmp_path, path)
    path.chmod(0o600)
    assert "cannot be used: Permission denied" in opened
    assert path.read_bytes() == before
    assert "quarantine" not in names_in(tmp_path)


def as_nobody(folder: Path, path: Path) -> str:
    """What a user without rights hears who opens the journal (root may read everything)."""
    code = (
        "import os, sys; from pathlib import Path; from jobfetcher.journal import Journal\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "Journal(Path(sys.argv[1]))"
    )
    for parent in (folder, *folder.parents):
        if parent.name.startswith(("pytest-", "test_")):
            parent.chmod(0o755)
    return subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True, text=True).stderr


def test_opening_again_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(Journal(path)) as journal:
        journal.claim(SEVEN, "t", make_job())
    assert [record.id for record in reread(path)] == ["7"]


# -- format 1 -------------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of a journal that the format before this one wrote, with a job in each phase."""
    return Path(shutil.copy(GOLDEN, tmp_path / "journal.db"))


@pytest.mark.fault("F12")
def test_a_journal_of_format_1_goes_on_with_every_phase(old: Path) -> None:
    with closing(sqlite3.connect(f"file:{old}?mode=ro&immutable=1", uri=True)) as first:
        columns = "id, token, phase, container, claimed_at FROM job ORDER BY claimed_at"
        before = first.execute(f"SELECT {columns}").fetchall()
    with closing(Journal(old, boot_id="b")) as journal:
        assert journal.damage == ""
        assert journal.unreadable == []
        records = {str(record.id): record for record in journal.records()}
        marks = {name: journal.marked(record.id, "in") for name, record in records.items()}
        assert journal.images() == []
    assert [(r.id, r.token, r.phase, r.container, r.claimed_at) for r in records.values()] == before
    assert {name: record.phase for name, record in records.items()} == {
        "1": Phase.SETTLING,
        "2": Phase.STAGING_IN,
        "3": Phase.RUNNING,
        "4": Phase.STAGING_OUT,
        "5": Phase.CLAIMED,
    }
    assert {name: record.runs for name, record in records.items()} == {"1": 0, "2": 0, "3": 1, "4": 1, "5": 0}
    assert all((r.share, r.image, r.resumes, r.decided_at) == (None, None, 0, None) for r in records.values())
    assert all(record.rebooted for record in records.values())
    assert records["1"].outcome == Outcome(Ending.JOB_FAILED, JobReason.INPUT_MISSING, "input a does not exist")
    assert records["3"].container == "c" * 64
    assert records["4"].exit == Exit(0, started_at="2026-01-01T00:00:00Z", finished_at="2026-01-01T00:00:01Z")
    assert marks["2"] == {"a": Stored("a", 3, "sha256:ab", "e")}
    assert {name for name, record in records.items() if record.job is None} == {"5"}
    job = records["2"].job
    assert job is not None
    assert (job.id, job.image, job.inputs[0].path) == ("2", "busybox", "a")


@pytest.mark.fault("F12")
def test_a_journal_of_format_1_is_changed_once_and_for_good(old: Path) -> None:
    with closing(Journal(old)) as journal:
        first = journal.records()
        assert journal.attempt(JobId("3")) == int(of(journal, JobId("3")).claimed_at * 1000)  # as format 1 named it
        assert journal.settling(JobId("1"), Outcome()) == first[0].outcome
        journal.advance(JobId("5"), Phase.STAGING_IN)
        journal.running(JobId("2"), SHARE, IMAGE)
        journal.exited(JobId("3"), Exit(0))
        journal.settling(JobId("4"), FAILED)
        assert int.from_bytes(old.read_bytes()[60:64], "big") == VERSION  # the file itself, also if it is killed now
    phases = [record.phase for record in reread(old)]
    assert phases == [Phase.SETTLING, Phase.RUNNING, Phase.STAGING_OUT, Phase.SETTLING, Phase.STAGING_IN]


@pytest.mark.fault("F12")
def test_a_change_of_format_that_is_cut_off_is_begun_again(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patched:
        patched.setattr("jobfetcher.journal_file.fill", killed)
        with pytest.raises(ConfigError, match="cannot be used: disk I/O error"):
            Journal(old)
    assert [str(record.id) for record in reread(old)] == ["1", "2", "3", "4", "5"]


def test_a_row_of_format_1_with_unknown_words_does_not_stop_the_others(old: Path) -> None:
    with closing(sqlite3.connect(old)) as first, first:
        first.execute("UPDATE job SET phase = 'dancing' WHERE id = '3'")
        first.execute("""UPDATE job SET exit = '{"code": 0, "stopped_for": "dancing"}' WHERE id = '4'""")
        first.execute("UPDATE job SET outcome = 'no JSON' WHERE id = '1'")
        first.execute("""UPDATE job SET spec = '{"id": "../x", "image": "i"}' WHERE id = '2'""")
    with closing(Journal(old)) as journal:
        assert [(record.id, record.job) for record in journal.records()] == [("2", None), ("5", None)]
        assert journal.unreadable == ["1", "3", "4"]
        assert "2 records were saved" in journal.damage


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
