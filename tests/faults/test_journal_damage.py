"""J1, N9: a damaged journal never stops the worker, and never says what was not written.

The sweep: a journal cut off at any byte, or with any byte changed, is opened; nothing that was never written comes out.

The journal under test has jobs in every phase, some of its commits in the database and some in the write-ahead log. Its
two files are damaged in copies that lie in memory (/dev/shm). Each case must hold:

- opening and reading raises nothing, but ConfigError where the byte that says the version now says a newer one;
- every record, mark and image that comes out was on record once, exactly so: token, specification, exit, outcome, ...;
- where nothing was said to be damaged, the whole is a state that was committed: the last one, or, where the end of the
  log is gone (which looks like a commit that a crash cut off), an earlier one;
- where damage was found, the next opening finds none, and the same records; where none was, another job can be written.

By default every 101st byte of the files and every byte of their headers is tried; with JOBFETCHER_TESTS_FULL=1 all are.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from jobfetcher import journal as journal_room
from jobfetcher import journal_file
from jobfetcher.core.errors import ConfigError, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.job import JobId
from jobfetcher.core.machine import Gpu, Share
from jobfetcher.core.phases import Phase
from jobfetcher.core.run import Ending, Exit, Image, Outcome, Stored
from jobfetcher.journal import Journal, KeptImage, Record
from tests.support.jobs import make_job
from tests.support.mounts import needs_root, tmpfs
from tests.support.trees import names_in

FULL = os.environ.get("JOBFETCHER_TESTS_FULL") == "1"
STEP = 1 if FULL else 101

SHARE = Share(1.5, 4096, (Gpu("GPU-0", "stub", 8000, "8.6"),))
IMAGE = Image("sha256:" + "a" * 64, "docker.io/library/busybox:latest", None, "amd64", 4_000_000, pulled=True)

#: A job whose row, with this token, needs pages of its own.
ANOTHER, LONG = make_job("another"), "t" * 9000

State = tuple[tuple[Record, ...], tuple[tuple[str, str, Stored], ...], tuple[KeptImage, ...]]


@dataclass
class History:
    """A journal's files and all states that were committed to it; the first of them is the one before the log."""

    database: bytes = b""
    log: bytes = b""
    states: list[State] = field(default_factory=list)

    @property
    def last(self) -> State:
        return self.states[-1]


def state_of(journal: Journal) -> State:
    records = tuple(journal.records())
    marks = tuple(
        (record.id, direction, stored)
        for record in records
        for direction in ("in", "out")
        for stored in sorted(journal.marked(record.id, direction).values(), key=lambda stored: stored.name)
    )
    return records, marks, tuple(journal.images())


def tell(journal: Journal, after_each: Callable[[], None]) -> None:
    """Jobs on their way: one in each phase at the end, one forgotten, one of nobody could read the specification."""

    def job(name: str, *steps: Callable[[JobId], object]) -> None:
        job_id = JobId(name)
        spec = make_job(name, inputs={"in/a": "s3://b/a"}, outputs={"output": "out"}, env={"NAME": name * 20})
        journal.claim(job_id, f"https://{name}.example.org", spec)
        after_each()
        for step in steps:
            step(job_id)
            after_each()

    def stage_in(job_id: JobId) -> None:
        journal.mark(job_id, "in", Stored("in/a", 3, f"sha256:{job_id}", "e"))
        journal.advance(job_id, Phase.STAGING_IN)

    def run(job_id: JobId) -> None:
        journal.running(job_id, SHARE, IMAGE)

    def start(job_id: JobId) -> None:
        journal.started(job_id, "c" * 60 + job_id)

    def exit(job_id: JobId) -> None:
        journal.exited(job_id, Exit(1 if job_id == "5" else 0, started_at="s", finished_at=job_id))

    def settle(job_id: JobId) -> None:
        journal.mark(job_id, "out", Stored("output:a", 9, "md5:1", "tag"))
        journal.settling(job_id, Outcome(Ending.JOB_FAILED, JobReason.EXIT_CODE, "exit code 1"))

    job("1")
    job("2", stage_in)
    job("3", stage_in, run, start, journal.resuming)
    job("4", stage_in, run, start, exit)
    job("5", stage_in, run, start, exit, settle)
    job("6", stage_in, run, journal.again, run, start, exit, settle, journal.forget)
    journal.claim(JobId("7"), "t", None)
    after_each()
    journal.settling(JobId("7"), Outcome(Ending.WORKER_FAILED, WorkerReason.DISK, "ü"))
    journal.used_image(IMAGE)
    after_each()


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A folder in memory where the machine has one: tens of thousands of journals are opened."""
    place = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="journal-", dir=place if os.access(place, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def history(memory: Path) -> History:
    """Two thirds of the commits in the database itself, the others in the log."""
    return make_history(memory / "whole", log=True)


@pytest.fixture(scope="module", params=[True, False], ids=["with a log", "all in the database"])
def either(request: pytest.FixtureRequest, memory: Path) -> History:
    return make_history(memory / f"whole-{request.param}", log=request.param)


def make_history(folder: Path, *, log: bool) -> History:
    path = folder / "journal.db"
    folder.mkdir()
    seen = History()
    clock = iter(float(second) for second in range(1_800_000_000, 1_900_000_000))
    with closing(Journal(path, boot_id="b", wall=lambda: next(clock))) as journal:
        tell(journal, lambda: None)
        journal.forget(JobId("4"))
        seen.states.append(state_of(journal))
    with closing(Journal(path, boot_id="b", wall=lambda: next(clock))) as journal:
        steps: list[Callable[[], object]] = [
            lambda: journal.claim(JobId("1"), "https://1.example.org", make_job("1", env={"NAME": "again"})),
            lambda: journal.exited(JobId("3"), Exit(137, oom_killed=True, error="e")),
            lambda: journal.mark(JobId("3"), "out", Stored("output:a", 9, "md5:1")),
            lambda: journal.forget(JobId("5")),
            lambda: journal.claim(JobId("8"), "t8" * 3000, make_job("8")),
            lambda: journal.settling(JobId("3"), Outcome(Ending.JOB_FAILED, JobReason.OUT_OF_MEMORY, "out of memory")),
            lambda: journal.settling(JobId("8"), Outcome(Ending.DROPPED, None, "lost")),
        ]
        for step in steps:
            step()
            seen.states.append(state_of(journal))
        seen.database, seen.log = path.read_bytes(), path.with_name("journal.db-wal").read_bytes()
    assert len(seen.log) > 6 * 4096, "the log has no commits to lose"
    assert seen.database[:20] in seen.log, "the log has no page 1, with the header that SQLite takes from the file"
    if not log:
        seen.database, seen.log = path.read_bytes(), b""
        del seen.states[:-1]
    return seen


class Bench:
    """Damaged copies of one journal, each opened and judged; a folder that is used again for all of them."""

    def __init__(self, history: History, folder: Path) -> None:
        self.history = history
        self.path = folder / "journal.db"
        self.folder = folder
        self.records = {record for records, _, _ in history.states for record in map(repr, records)}
        self.marks = {mark for _, marks, _ in history.states for mark in marks}
        self.images = {image for _, _, images in history.states for image in images}
        self.damaged = self.newer = self.earlier = 0

    def judge(self, database: bytes, log: bytes, *, may_be_newer: bool = False, may_be_earlier: bool) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        (self.folder / "journal.ballast").touch()
        self.path.write_bytes(database)
        self.path.with_name("journal.db-wal").write_bytes(log)
        try:
            journal = Journal(self.path, boot_id="b")
        except ConfigError:
            if not may_be_newer:
                raise
            self.newer += 1
            return
        with closing(journal):
            found, damage = state_of(journal), journal.damage
            if not damage:
                journal.claim(ANOTHER.id, LONG, ANOTHER)
                assert [r.job for r in journal.records() if r.token == LONG] == [ANOTHER]
        records, marks, images = found
        assert {repr(record) for record in records} <= self.records
        assert set(marks) <= self.marks
        assert set(images) <= self.images
        if damage:
            self.damaged += 1
            self.check_it_is_mended(found)
        elif found != self.history.last:
            assert may_be_earlier
            assert found in self.history.states
            self.earlier += 1

    def check_it_is_mended(self, found: State) -> None:
        [old] = (self.folder / "quarantine").iterdir()
        assert (old / "journal.db").exists()
        with closing(Journal(self.path, boot_id="b")) as journal:
            assert journal.damage == ""
            assert state_of(journal) == found


@pytest.fixture(autouse=True)
def _no_ballast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_room, "_BALLAST_BYTES", 0)  # 4 MiB for each case would take longer than all the rest


@pytest.fixture
def bench(history: History, memory: Path) -> Bench:
    return Bench(history, memory / "copy")


@pytest.fixture
def either_bench(either: History, memory: Path) -> Bench:
    return Bench(either, memory / "copy")


def places(content: bytes, header: int) -> Iterator[int]:
    yield from range(header)
    yield from range(header, len(content), STEP)


def flipped(content: bytes, place: int, bits: int) -> bytes:
    return content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]


def changes(place: int) -> tuple[int, int]:
    """All bits of a byte, and one alone, another one at each place."""
    return 0xFF, 1 << place % 8


HEADER, LOG_HEADER = 100, 32 + 24  # the log's with that of its first frame
VERSION_AT = range(60, 64)
SWEEP = pytest.mark.timeout(7200 if FULL else 180)


def test_the_whole_journal_gives_its_last_state(bench: Bench) -> None:
    bench.judge(bench.history.database, bench.history.log, may_be_earlier=False)
    assert (bench.damaged, bench.newer, bench.earlier) == (0, 0, 0)
    phases = {record.phase for records, _, _ in bench.history.states for record in records}
    assert phases == set(Phase)


@SWEEP
@pytest.mark.fault("N9")
@pytest.mark.fault("J1")
def test_every_byte_of_the_database_changed(either_bench: Bench) -> None:
    bench = either_bench
    database, log = bench.history.database, bench.history.log
    for place in places(database, HEADER):
        for bits in range(1, 256) if place in VERSION_AT and not log else changes(place):
            bench.judge(flipped(database, place, bits), log, may_be_newer=place in VERSION_AT, may_be_earlier=False)
    print(f"database changed: {bench.damaged} found damaged, {bench.newer} newer")
    assert bench.damaged > 0


@SWEEP
@pytest.mark.fault("N9")
@pytest.mark.fault("J1")
def test_every_byte_of_the_log_changed(bench: Bench) -> None:
    database, log = bench.history.database, bench.history.log
    for place in places(log, LOG_HEADER):
        bench.judge(database, flipped(log, place, 1 << place % 8), may_be_earlier=True)
    print(f"log changed: {bench.damaged} found damaged, {bench.earlier} an earlier state")
    assert bench.damaged > 0


@SWEEP
@pytest.mark.fault("N9")
@pytest.mark.fault("A10")
def test_the_database_cut_off_at_every_byte(either_bench: Bench) -> None:
    bench = either_bench
    database, log = bench.history.database, bench.history.log
    for length in places(database, HEADER):
        bench.judge(database[:length], log, may_be_earlier=False)
    print(f"database cut off: {bench.damaged} found damaged")
    assert bench.damaged > 0


@SWEEP
@pytest.mark.fault("N9")
@pytest.mark.fault("A10")
def test_the_log_cut_off_at_every_byte(bench: Bench) -> None:
    database, log = bench.history.database, bench.history.log
    for length in places(log, LOG_HEADER):
        bench.judge(database, log[:length], may_be_earlier=True)
    print(f"log cut off: {bench.damaged} found damaged, {bench.earlier} an earlier state")
    assert bench.earlier > 0
    assert bench.damaged == 0  # it looks like a commit that a crash cut off, and is taken as one


# -- what becomes of a damaged one -----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed journal with the jobs 1 to 5 and 7, and one image."""
    path = tmp_path / "base" / "journal.db"
    path.parent.mkdir(mode=0o700)
    with closing(Journal(path)) as journal:
        tell(journal, lambda: None)
    return path


def change(path: Path, statement: str) -> None:
    """A change that SQLite itself made: the file is sound, only the check sum of the row says otherwise."""
    with closing(sqlite3.connect(path)) as other, other:
        assert other.execute(statement).rowcount == 1


def ids(journal: Journal) -> list[str]:
    return [str(record.id) for record in journal.records()]


@pytest.mark.fault("J1")
@pytest.mark.parametrize(
    "content",
    [b"not a database at all" * 300, journal_file._MAGIC + b"\xff" * 4096, b"\0" * 8192, b"x"],
    ids=["text", "header only", "zeros", "one byte"],
)
def test_a_file_that_is_no_journal_goes_to_quarantine_as_it_is(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.with_name("journal.db-wal").write_bytes(b"a log" * 100)
    with closing(Journal(path)) as journal:
        assert ids(journal) == []
        journal.claim(JobId("9"), "t", make_job("9"))
    [old] = (path.parent / "quarantine").iterdir()
    assert f"0 records were saved, and the old file is in {old}" in journal.damage
    assert "\n" not in journal.damage
    assert (old / "journal.db").read_bytes() == content
    assert (old / "journal.db-wal").read_bytes() == b"a log" * 100
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (old, old.parent)] == [0o700, 0o700]
    assert old.name.startswith("journal-2")
    assert old.name.endswith("Z")
    with closing(Journal(path)) as journal:
        assert (journal.damage, ids(journal)) == ("", ["9"])
    assert names_in(path.parent) == ["journal.ballast", "journal.db", "quarantine"]


@pytest.mark.fault("J1")
@pytest.mark.fault("J6")
@pytest.mark.parametrize(
    "statement",
    [
        """UPDATE job SET exit = replace(exit, '"code": 1', '"code": 0') WHERE id = '5'""",
        "UPDATE job SET exit = NULL WHERE id = '5'",
        "UPDATE job SET outcome = replace(outcome, 'job failed', 'finished') WHERE id = '5'",
        "UPDATE job SET phase = 'running' WHERE id = '5'",
        "UPDATE job SET token = 'https://6.example.org' WHERE id = '5'",
        "UPDATE job SET spec = (SELECT spec FROM job WHERE id = '4') WHERE id = '5'",
        "UPDATE job SET claimed_at = claimed_at + 1 WHERE id = '5'",
        "UPDATE job SET runs = runs + 1 WHERE id = '5'",
        "UPDATE job SET sum = '' WHERE id = '5'",
    ],
)
def test_a_record_that_was_changed_is_lost_and_no_other(path: Path, statement: str) -> None:
    change(path, statement)
    changed = path.read_bytes()
    with closing(Journal(path)) as journal:
        assert journal.unreadable == ["5"]
        assert ids(journal) == ["1", "2", "3", "4", "7"]
        assert journal.marked(JobId("2"), "in") == {"in/a": Stored("in/a", 3, "sha256:2", "e")}
        assert [kept.reference for kept in journal.images()] == [IMAGE.reference]
    [old] = (path.parent / "quarantine").iterdir()
    assert "5 records were saved" in journal.damage
    assert (old / "journal.db").read_bytes() == changed


@pytest.mark.fault("J1")
@pytest.mark.parametrize("other", ["6", "8"])
def test_a_record_whose_name_was_changed_is_no_other_jobs(path: Path, other: str) -> None:
    change(path, "UPDATE job SET id = '6' WHERE id = '1'".replace("6", other))
    with closing(Journal(path)) as journal:
        assert journal.unreadable == [other]
        assert ids(journal) == ["2", "3", "4", "5", "7"]


@pytest.mark.fault("J1")
def test_a_file_that_lost_its_end_loses_what_was_there(path: Path) -> None:
    """SQLite itself reads nothing of a file that is shorter than its header says."""
    path.write_bytes(path.read_bytes()[:-4096])
    with closing(Journal(path)) as journal:
        assert "malformed" in journal.damage
        assert ids(journal) == ["1", "2", "3", "4", "5", "7"]


@pytest.mark.fault("J1")
def test_tables_that_are_not_ours_are_made_anew(path: Path) -> None:
    """A check that SQLite does not make before the first mark is written."""
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("PRAGMA writable_schema=ON")
        other.execute("UPDATE sqlite_master SET sql = replace(sql, 'REFERENCES job', 'REFERENCES jnb')")
    with closing(Journal(path)) as journal:
        assert "its tables are damaged" in journal.damage
        assert ids(journal) == ["1", "2", "3", "4", "5", "7"]
        journal.mark(JobId("7"), "in", Stored("a", 1, "d"))


@pytest.mark.fault("J1")
def test_damaged_marks_and_notes_of_images_are_forgotten(path: Path) -> None:
    change(path, "UPDATE file SET name = 'in/b' WHERE job = '2'")
    change(path, "UPDATE image SET id = 'sha256:0'")
    with closing(Journal(path)) as journal:
        assert "a row fails its check" in journal.damage
        assert ids(journal) == ["1", "2", "3", "4", "5", "7"]
        assert journal.marked(JobId("2"), "in") == {}
        assert journal.marked(JobId("3"), "in") != {}
        assert journal.images() == []


@pytest.mark.fault("J1")
def test_damage_of_a_journal_in_use_costs_the_job_that_it_hit(path: Path) -> None:
    with closing(Journal(path)) as journal:
        change(path, "UPDATE job SET phase = 'settling' WHERE id = '4'")
        change(path, "UPDATE file SET size = 4 WHERE job = '3'")
        change(path, "UPDATE image SET reference = 'other'")
        assert ids(journal) == ["1", "2", "3", "5", "7"]
        assert journal.record(JobId("4")) is None
        assert journal.unreadable == ["4"]
        with pytest.raises(WorkerFault, match="no sound record of job 4"):
            journal.settling(JobId("4"), Outcome())
        assert journal.marked(JobId("3"), "in") == {}
        assert journal.images() == []
        journal.advance(JobId("1"), Phase.STAGING_IN)


@pytest.mark.fault("J1")
def test_a_journal_that_cannot_be_read_any_more_is_a_worker_fault(path: Path) -> None:
    with closing(Journal(path)) as journal:
        with path.open("r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
        for attempt in (
            journal.records,
            journal.images,
            lambda: journal.marked(JobId("2"), "in"),
            lambda: journal.advance(JobId("1"), Phase.STAGING_IN),
        ):
            with pytest.raises(WorkerFault) as fault:
                attempt()
            assert fault.value.reason is WorkerReason.DISK


@pytest.mark.fault("J1")
def test_a_journal_cut_off_to_nothing_is_damaged_and_a_new_one_is_not(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"")
    with closing(Journal(path)) as journal:
        assert "it is empty" in journal.damage
        assert ids(journal) == []
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "journal.db").touch()  # killed before its first write
    for _ in range(2):
        with closing(Journal(tmp_path / "new" / "journal.db")) as journal:
            assert journal.damage == ""


@pytest.mark.fault("J1")
def test_the_index_of_the_log_may_hold_anything(path: Path) -> None:
    path.with_name("journal.db-shm").write_bytes(b"\xff" * 32768)
    with closing(Journal(path)) as journal:
        assert (journal.damage, ids(journal)) == ("", ["1", "2", "3", "4", "5", "7"])


@pytest.mark.fault("J1")
@pytest.mark.parametrize("words", [{"phase": "dancing"}, {"exit": '{"code": 0, "stopped_for": "dancing"}'}])
def test_a_record_with_words_that_are_not_ours_is_lost_with_its_marks(path: Path, words: dict[str, str]) -> None:
    rewrite(path, "2", **words)
    with closing(Journal(path)) as journal:
        assert journal.unreadable == ["2"]
        assert "words that this version does not know" in journal.damage
        assert ids(journal) == ["1", "3", "4", "5", "7"]
        journal.claim(JobId("2"), "t", make_job("2"))
        assert journal.marked(JobId("2"), "in") == {}


def rewrite(path: Path, job: str, **changes: Any) -> None:
    """Change a job's row, check sum and all, as another version may have written it."""
    with closing(sqlite3.connect(path)) as other, other:
        query = journal_file.select(journal_file.JobRow, "WHERE id = ?")
        [values] = other.execute(query, (job,)).fetchall()
        other.execute(*journal_file.put(replace(journal_file.JobRow(*values[:-1]), **changes)))


@pytest.mark.fault("F12")
def test_a_specification_that_this_version_cannot_read_counts_as_none(path: Path) -> None:
    rewrite(path, "2", spec='{"id": "2", "image": "i", "wings": 2}')
    with closing(Journal(path)) as journal:
        assert journal.damage == ""
        record = journal.record(JobId("2"))
    assert record is not None
    assert (record.job, record.phase) == (None, Phase.STAGING_IN)


@pytest.mark.fault("J1")
@pytest.mark.fault("D5")
@needs_root
def test_a_damaged_journal_on_a_full_disk_is_replaced(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # with a ballast
    with tmpfs(tmp_path / "disk", "16m") as disk:
        with closing(Journal(disk / "journal.db")) as journal:
            tell(journal, lambda: None)
        change(disk / "journal.db", "UPDATE job SET runs = 9 WHERE id = '5'")
        with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"x" * 4096)
        assert os.statvfs(disk).f_bavail == 0
        with closing(Journal(disk / "journal.db")) as journal:
            assert ids(journal) == ["1", "2", "3", "4", "7"]
            journal.advance(JobId("1"), Phase.STAGING_IN)


# -- killed while it is replaced -------------------------------------------------------------------------------------

KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from jobfetcher.journal import Journal

    left = int(sys.argv[2])
    def counted(change):
        def changing(*arguments, **options):
            global left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)
        return changing

    Path.rename, Path.replace = counted(Path.rename), counted(Path.replace)
    Path.mkdir, os.fsync = counted(Path.mkdir), counted(os.fsync)
    Journal(Path(sys.argv[1])).close()
    print("done")
    """
)


@pytest.mark.fault("J1")
@pytest.mark.fault("A10")
def test_a_replacement_that_is_killed_at_any_step_is_made_good(path: Path, tmp_path: Path) -> None:
    change(path, "UPDATE job SET runs = 9 WHERE id = '5'")
    for step in range(30):
        base = tmp_path / str(step)
        shutil.copytree(path.parent, base)
        base.joinpath("journal.db-wal").write_bytes(b"")  # one more file to move away
        command = [sys.executable, "-c", KILLED, str(base / "journal.db"), str(step)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode == 0:
            assert done.stdout == "done\n"
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        in_place = (base / "quarantine").exists() and not (base / "journal.db.new").exists()
        with closing(Journal(base / "journal.db")) as journal:
            assert ids(journal) == ["1", "2", "3", "4", "7"]
            assert bool(journal.damage) is not in_place
        with closing(Journal(base / "journal.db")) as journal:
            assert (journal.damage, journal.unreadable) == ("", [])
            assert ids(journal) == ["1", "2", "3", "4", "7"]
        assert not {"journal.db.draft", "journal.db.new"} & set(names_in(base))
    assert step == 12, "the steps of a replacement"
