"""One durable record per open job; also the outbox of outcomes nobody has heard yet.

Write before you speak, forget after you were heard (DESIGN.md, rule 1): every phase is on disk before the world can
notice it, so a worker killed at any moment knows at its next start what it held and how far it came. SQLite with
write-ahead log and synchronous=FULL: a commit that returned survives a power cut. Marks of single files are committed
in groups, at most a second apart, because moving a file twice does no harm (names decide where it goes). A damaged
file never stops the worker (FAULTS.md J1; how: journal_file.py).

Four commits do not wait for the disk: `advance`, `started`, `accepted` and `forget`. They survive whatever ends this
process, and a power cut from the next commit that does wait on (the log is in order). After a power cut the machine is
in another boot, in which files and container of a job are looked at anew (FAULTS.md A10), and an end of which it is not
on record that it was accepted is told again, which costs a second mail at most.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from jobfetcher import journal_file
from jobfetcher.core.errors import ConfigError, WorkerFault, WorkerReason
from jobfetcher.core.failpoints import failpoint
from jobfetcher.core.job import Job, JobId, parse_job_id
from jobfetcher.core.machine import Share
from jobfetcher.core.phases import IllegalMove, Phase, check_move
from jobfetcher.core.run import Exit, Image, Outcome, Stored
from jobfetcher.journal_file import VERSION, FileRow, Found, JobRow, KeptImage, Statement
from jobfetcher.pinned import connect, shown

__all__ = ["MAX_RUNS", "VERSION", "Direction", "Journal", "KeptImage", "Record"]

#: How often a job is run here at most: a run that this machine interrupted is repeated once (FAULTS.md J5).
MAX_RUNS = 2

#: Resumes count for this long, in seconds (FAULTS.md A9).
_RESUMES_S = 3600.0

#: Marks of single files wait at most this long for their commit, in seconds.
_GROUP_S = 1.0

#: Freed when the disk is full, so that the journal can still be written (FAULTS.md D2).
_BALLAST_BYTES = 4 * 1024 * 1024

Direction = Literal["in", "out"]

#: The mark of an end that the source accepted: it lies beside those of files, under a direction that none of them has.
_END = "end"

_SHARE, _IMAGE, _EXIT, _OUTCOME = TypeAdapter(Share), TypeAdapter(Image), TypeAdapter(Exit), TypeAdapter(Outcome)


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one open job. `job` is None when its specification could not be read.

    `share`, `image`: what its last run got, and `runs` how many runs were begun. `resumes`: how often it was resumed
    within an hour without getting on. Times are wall clock; `decided_at`: when its outcome was. `stopping`: this worker
    began to stop its container. `rebooted`: the machine started anew since the job was claimed or its last run began.
    """

    id: JobId
    token: str
    job: Job | None
    phase: Phase
    container: str | None
    exit: Exit | None
    outcome: Outcome | None
    claimed_at: float
    share: Share | None
    image: Image | None
    runs: int
    resumes: int
    decided_at: float | None
    stopping: bool
    rebooted: bool


class Journal:
    """The journal of one worker. Thread-safe. Every method that writes has committed when it returns, but `mark`.

    `damage` is one sentence on what was wrong with the file found at start, or "": then a new one with all sound
    records took its place, and the old one is in quarantine. `unreadable` names the jobs, as far as can be told, whose
    records were lost with it; of others not even the name is known.

    Raises ConfigError when the file cannot be used, or is a newer jobfetcher's; WorkerFault(DISK) when the disk does
    not take a write (then nothing has changed) or a record is not there or damaged.
    """

    def __init__(self, path: Path, *, boot_id: str | None = None, wall: Callable[[], float] = time.time) -> None:
        self.damage = ""
        self.unreadable: list[str] = []
        self._lock = threading.RLock()
        self._ballast = path.with_name("journal.ballast")
        self._group: threading.Timer | None = None  # runs while marks wait for their commit
        #: Whether the last commit waited for the disk. One that did not is the only one: of several, a power cut may
        #: keep the later and lose the earlier, which looks like damage (journal_file.read).
        self._synced = True
        self._syncing = True
        self._boot_id = _boot_id() if boot_id is None else boot_id
        self._wall = wall
        unusable = f"the journal {shown(path)} cannot be used"
        try:
            try:
                self._db = self._connected(path)
            except sqlite3.OperationalError as error:
                if not self._ballast.exists():
                    raise ConfigError(f"{unusable}: {error}; is the disk full?") from None
                self._ballast.unlink()  # on a full disk SQLite cannot even open: room for that, once
                self._db = self._connected(path)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{unusable}: {getattr(error, 'strerror', None) or error}") from None
        self._keep_ballast()

    def _connected(self, path: Path) -> sqlite3.Connection:
        found = self._find(path)
        self._db = connect(path)
        try:
            self._open(found)
        except BaseException:
            self._db.close()
            raise
        return self._db

    def _find(self, path: Path) -> Found:
        """What the file at `path` holds; a damaged one is replaced by what could be saved of it."""
        if (earlier := journal_file.finish_replacing(path)) is not None:
            place = shown(earlier)
            self.damage = f"the journal was damaged and an earlier start was cut off; the old file is in {place}"
        found = journal_file.read(path)
        if found.version > VERSION:
            raise ConfigError(
                f"the journal {shown(path)} was written by a newer jobfetcher (format {found.version}); "
                "upgrade this one"
            )
        for row in list(found.jobs):
            try:
                _record(row, "")
            except (TypeError, ValueError):
                found.jobs.remove(row)
                found.files = [file for file in found.files if file.job != row.id]
                found.unreadable.append(row.id)
        self.unreadable = found.unreadable
        damage = found.damage or ("a record has words that this version does not know" if found.unreadable else "")
        if found.version == 0 and path.exists() and self._ballast.exists():
            damage = damage or "it is empty"  # the ballast is made after the tables
        if damage or found.version == 1:
            self._ballast.unlink(missing_ok=True)  # room for what is written now; a new ballast follows
        if damage:
            place = shown(journal_file.replace_with(path, found))
            found.version = VERSION
            saved = f"{len(found.jobs)} {'record was' if len(found.jobs) == 1 else 'records were'} saved"
            self.damage = f"the journal was damaged ({damage}); {saved}, and the old file is in {place}"
        return found

    def _open(self, found: Found) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        if found.version < VERSION:
            self._db.execute("BEGIN IMMEDIATE")
            if found.version == 1:
                self._db.execute("DROP TABLE file")
                self._db.execute("DROP TABLE job")
            journal_file.fill(self._db, found)
            self._db.execute("COMMIT")
            # Out of the log, so that the file itself says from now on which version it is and has its tables.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.execute("PRAGMA foreign_keys=ON")

    def _keep_ballast(self) -> None:
        """Without room for it there is none: the worker must start to bring its open jobs to their end."""
        if self._ballast.exists():
            return
        try:
            self._ballast.write_bytes(b"\0" * _BALLAST_BYTES)
        except OSError:
            self._ballast.unlink(missing_ok=True)

    # -- one job's way -------------------------------------------------------------------------------------------------

    def claim(self, job_id: JobId, token: str, job: Job | None) -> None:
        """Record a job the moment it was handed out, before anything else is done with it."""
        spec = None if job is None else job.model_dump_json()
        row = JobRow(job_id, token, spec, Phase.CLAIMED.value, float(self._wall()), self._boot_id)
        # A record of the same job can only be one that could not be forgotten.
        self._write(("DELETE FROM job WHERE id = ?", (job_id,)), journal_file.put(row))

    def advance(self, job_id: JobId, phase: Phase) -> None:
        """Move a job to its next phase. Raises IllegalMove for a move that is not in the table of phases."""
        self._change(job_id, phase, durable=False)

    def running(self, job_id: JobId, share: Share, image: Image) -> None:
        """Record, before anything is asked of the engine, that a run with this share and image begins in this boot."""
        with self._lock:
            runs = self._row(job_id).runs + 1
            begun: dict[str, Any] = {"share": _text(share), "image": _text(image), "runs": runs, "stopping": 0}
            self._change(job_id, Phase.RUNNING, boot_id=self._boot_id, **begun)

    def attempt(self, job_id: JobId) -> int:
        """A number that the run begun last has and no other run of any handing out of the job, so that a container can
        be told from an earlier one. Ask after `running`; the same number again after a restart."""
        row = self._row(job_id)
        return int(row.claimed_at * 1000) + row.runs - 1

    def started(self, job_id: JobId, container: str) -> None:
        """Record the id of the container before the engine is asked to start it: from here on it may have run."""
        self._change(job_id, durable=False, container=container)

    def stopping(self, job_id: JobId) -> None:
        """Record, before the engine is asked, that this worker stops the container: its exit is not the job's own."""
        with self._lock:
            self._write(journal_file.put(replace(self._row(job_id), stopping=1)))  # no progress (A9)

    def exited(self, job_id: JobId, exit: Exit) -> None:
        """Record how the container ended and move to STAGING_OUT."""
        self._change(job_id, Phase.STAGING_OUT, exit=_text(exit))

    def last_records(self, within_s: float = 0.4) -> list[Record]:
        """All records, which no other thread can change any more: for who ends the process at once and says what
        becomes of each, within a second (FAULTS.md F4). Empty where the journal is busy for longer than `within_s`
        seconds."""
        if not self._lock.acquire(timeout=within_s):
            return []
        return self.records()

    def again(self, job_id: JobId) -> bool:
        """Move from RUNNING back to STAGING_IN for another run; False, and nothing changed, after MAX_RUNS runs."""
        with self._lock:
            row = self._row(job_id)
            if row.phase != Phase.RUNNING.value:
                raise IllegalMove(f"{row.phase} is no run that could be repeated")
            if row.runs >= MAX_RUNS:
                return False
            self._change(job_id, Phase.STAGING_IN, container=None, exit=None)
            return True

    def settling(self, job_id: JobId, outcome: Outcome) -> Outcome:
        """Record how the job ended, before the source is told. Returns what is on record: the first one said counts."""
        with self._lock:
            row = self._row(job_id)
            if row.outcome is not None:
                return _OUTCOME.validate_json(row.outcome, strict=True)
            self._change(job_id, Phase.SETTLING, outcome=_text(outcome), decided_at=float(self._wall()))
            return outcome

    def accepted(self, job_id: JobId) -> None:
        """Record that the source accepted the end: what is left to do is to clean up."""
        self._write(journal_file.put(FileRow(job_id, _END, "accepted", 0, "", "")), durable=False)

    def was_accepted(self, job_id: JobId) -> bool:
        """Whether that is on record. A damaged mark is none: the end is told again (FAULTS.md A7)."""
        return bool(self._marks(job_id, _END))

    def forget(self, job_id: JobId) -> None:
        """The source has heard the end and nothing of the job is left here."""
        self._write(("DELETE FROM job WHERE id = ?", (job_id,)), durable=False)

    def resuming(self, job_id: JobId) -> int:
        """Count that a process goes on with an earlier one's job; how often that was, this time included, within the
        last hour and since it last got on: a phase, a container or a file further (FAULTS.md A9)."""
        with self._lock:
            row, now = self._row(job_id), float(self._wall())
            [(marks,)] = self._select("SELECT count(*) FROM file WHERE job = ?", job_id)
            before: list[float] = json.loads(row.resumed) if marks == row.resumed_marks else []
            resumed = [*(at for at in before if abs(now - at) <= _RESUMES_S), now]
            self._write(journal_file.put(replace(row, resumed=json.dumps(resumed), resumed_marks=marks)))
            return len(resumed)

    def acquit(self, job_id: JobId) -> None:
        """What was counted against a job by `resuming` may have been another one's doing: count anew. On a full disk,
        or of a job that has ended meanwhile, the count stays."""
        with contextlib.suppress(WorkerFault):
            self._change(job_id)

    # -- its files -----------------------------------------------------------------------------------------------------

    def mark(self, job_id: JobId, direction: Direction, stored: Stored) -> None:
        """Record that one file reached its place. Committed within a second, or with the next change of a job."""
        row = FileRow(job_id, direction, stored.name, stored.size, stored.digest, stored.etag)
        self._write(journal_file.put(row), commit=False)

    def marked(self, job_id: JobId, direction: Direction) -> dict[str, Stored]:
        """The files of a job that reached their place, by name. One whose mark is damaged is not: it moves again."""
        rows = self._marks(job_id, direction)
        return {row.name: Stored(row.name, row.size, row.digest, row.etag) for row in rows}

    def _marks(self, job_id: JobId, direction: str) -> list[FileRow]:
        query = journal_file.select(FileRow, "WHERE job = ? AND direction = ?")
        found = self._select(query, job_id, direction)
        return [FileRow(*values[:-1]) for values in found if journal_file.is_whole(FileRow, values)]

    # -- what is on record ---------------------------------------------------------------------------------------------

    def records(self) -> list[Record]:
        """All open jobs, oldest first. A spec that cannot be read any more counts as none."""
        return [_record(row, self._boot_id) for row in self._rows()]

    def record(self, job_id: JobId) -> Record | None:
        """One open job, or None."""
        rows = self._rows("WHERE id = ?", job_id)
        return _record(rows[0], self._boot_id) if rows else None

    # -- images that this worker pulled (FAULTS.md D7) -----------------------------------------------------------------

    def used_image(self, image: Image) -> None:
        """A job uses an image: a pulled one is ours from now on, and one that is ours already was used just now."""
        with self._lock:
            known = any((kept.reference, kept.id) == (image.reference, image.id) for kept in self.images())
            if image.pulled or known:
                kept = KeptImage(image.reference, image.id, image.size_bytes, float(self._wall()))
                self._write(journal_file.put(kept))

    def images(self) -> list[KeptImage]:
        """The images that this worker pulled, those first that were not used for longest."""
        query = journal_file.select(KeptImage, "ORDER BY used_at, reference")
        return [KeptImage(*values[:-1]) for values in self._select(query) if journal_file.is_whole(KeptImage, values)]

    def dropped_image(self, image: KeptImage) -> None:
        """An image is gone from this machine, or is not ours any more."""
        self._write(("DELETE FROM image WHERE reference = ? AND id = ?", (image.reference, image.id)))

    # -- reading and writing -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Commit what is open and close the file."""
        with self._lock:
            try:
                self._write()
            finally:
                self._db.close()

    def _change(self, job_id: JobId, phase: Phase | None = None, *, durable: bool = True, **values: Any) -> None:
        """Change a job's row: read whole, checked, written whole. A move of phase or a container is progress."""
        with self._lock:
            row = self._row(job_id)
            if phase is not None:
                check_move(Phase(row.phase), phase)
                row = replace(row, phase=phase.value)
            self._write(journal_file.put(replace(row, resumed="[]", **values)), durable=durable)

    def _row(self, job_id: JobId) -> JobRow:
        rows = self._rows("WHERE id = ?", job_id)
        if not rows:
            raise WorkerFault(WorkerReason.DISK, f"the journal has no sound record of job {job_id}")
        return rows[0]

    def _rows(self, condition: str = "ORDER BY claimed_at", *values: object) -> list[JobRow]:
        """Rows that are whole. One that was damaged since the start is as good as lost, and named in `unreadable`."""
        rows = []
        for found in self._select(journal_file.select(JobRow, condition), *values):
            if journal_file.is_whole(JobRow, found):
                rows.append(JobRow(*found[:-1]))
            elif found[0] not in self.unreadable:
                self.unreadable.append(found[0])
        return rows

    def _select(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._db.execute(query, values).fetchall()
        except journal_file.UNREADABLE as error:
            raise WorkerFault(WorkerReason.DISK, f"the journal cannot be read: {error}") from error

    def _write(self, *statements: Statement, commit: bool = True, durable: bool = True) -> None:
        """All of the statements, or WorkerFault(DISK) and none of them (nor the marks that waited for a commit).

        `durable`: a power cut right after it does not undo it.
        """
        with self._lock:
            try:
                self._carry_out(statements, commit, durable)
            except sqlite3.OperationalError as error:
                # Full or failing: the ballast makes room for exactly this, once.
                try:
                    self._ballast.unlink()
                    self._carry_out(statements, commit, durable)
                except (OSError, sqlite3.DatabaseError):
                    raise _unwritable(error) from error
            except sqlite3.DatabaseError as error:
                raise _unwritable(error) from error

    def _carry_out(self, statements: tuple[Statement, ...], commit: bool, durable: bool) -> None:
        try:
            if statements and not self._db.in_transaction:  # inside one the level cannot be changed: marks keep FULL
                self._syncing = durable or not self._synced
                self._db.execute(f"PRAGMA synchronous={'FULL' if self._syncing else 'NORMAL'}")
                self._db.execute("BEGIN IMMEDIATE")
            for statement, values in statements:
                self._db.execute(statement, values)
            if not commit:
                self._await_group()
            elif self._db.in_transaction:
                failpoint("before:commit")
                self._db.execute("COMMIT")
                self._synced = self._syncing
                self._forget_group()
                failpoint("after:commit")
        except BaseException:
            if self._db.in_transaction:
                self._db.rollback()  # marks of single files are lost with it at most: those files move again
            self._forget_group()
            raise

    def _await_group(self) -> None:
        if self._group is None:
            self._group = threading.Timer(_GROUP_S, self._end_group)
            self._group.daemon = True
            self._group.start()

    def _end_group(self) -> None:
        with self._lock, contextlib.suppress(WorkerFault):  # a lost mark is made again; the next change of phase tells
            if self._group is not None:
                self._write()

    def _forget_group(self) -> None:
        if self._group is not None:
            self._group.cancel()
            self._group = None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _unwritable(error: sqlite3.DatabaseError) -> WorkerFault:
    return WorkerFault(WorkerReason.DISK, f"the journal cannot be written: {error}")


def _text(value: Share | Image | Exit | Outcome) -> str:
    """As JSON, words for enums. Half a surrogate pair, which no file can hold, becomes a question mark."""

    def word(member: Enum) -> Any:
        return member.value

    return json.dumps(asdict(value), default=word, ensure_ascii=False).encode(errors="replace").decode()


def _record(row: JobRow, boot_id: str) -> Record:
    """What a row says; `boot_id` is this boot's. Raises ValueError or TypeError for words that are not ours."""
    try:
        job = None if row.spec is None else Job.model_validate_json(row.spec)
    except ValidationError:
        job = None
    return Record(
        id=parse_job_id(row.id),
        token=row.token,
        job=job,
        phase=Phase(row.phase),
        container=row.container,
        exit=None if row.exit is None else _EXIT.validate_json(row.exit, strict=True),
        outcome=None if row.outcome is None else _OUTCOME.validate_json(row.outcome, strict=True),
        claimed_at=row.claimed_at,
        share=None if row.share is None else _SHARE.validate_json(row.share, strict=True),
        image=None if row.image is None else _IMAGE.validate_json(row.image, strict=True),
        runs=row.runs,
        resumes=len(json.loads(row.resumed)),
        decided_at=row.decided_at,
        stopping=bool(row.stopping),
        rebooted=bool(row.boot_id and boot_id and row.boot_id != boot_id),
    )
