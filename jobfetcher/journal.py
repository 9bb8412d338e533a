"""One durable record per open job; also the outbox of outcomes nobody has heard yet.

Write before you speak, forget after you were heard (DESIGN.md, rule 1): every phase is on disk before the world can
notice it, so a worker killed at any moment knows at its next start what it held and how far it came. SQLite with
write-ahead log and synchronous=FULL: a commit that returned survives a power cut. Marks of single files are committed
in groups, at most a second apart, because moving a file twice does no harm (names decide where it goes).
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from jobfetcher.core.errors import ConfigError, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.job import Job, JobId, parse_job_id
from jobfetcher.core.phases import Phase, check_move
from jobfetcher.core.run import Ending, Exit, Outcome, Stored

#: Raised with every change of the tables; a newer journal is refused and left alone (FAULTS.md F12).
VERSION = 1

#: Marks of single files wait at most this long for their commit, in seconds.
_GROUP_S = 1.0

#: Freed when the disk is full, so that the journal can still be written (FAULTS.md D2).
_BALLAST_BYTES = 4 * 1024 * 1024

_TABLES = """
CREATE TABLE job (
    id TEXT PRIMARY KEY,
    token TEXT NOT NULL,
    spec TEXT,              -- Job as JSON; NULL for a job nobody could read
    phase TEXT NOT NULL,
    container TEXT,         -- NULL: not started as far as we know
    exit TEXT,              -- Exit as JSON
    outcome TEXT,           -- Outcome as JSON; set in phase settling
    claimed_at REAL NOT NULL,
    boot_id TEXT NOT NULL
) STRICT;
CREATE TABLE file (
    job TEXT NOT NULL REFERENCES job (id) ON DELETE CASCADE,
    direction TEXT NOT NULL,
    name TEXT NOT NULL,
    size INTEGER NOT NULL,
    digest TEXT NOT NULL,
    etag TEXT NOT NULL,
    PRIMARY KEY (job, direction, name)
) STRICT, WITHOUT ROWID;
"""

Direction = Literal["in", "out"]


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one open job. `job` is None when its specification could not be read."""

    id: JobId
    token: str
    job: Job | None
    phase: Phase
    container: str | None
    exit: Exit | None
    outcome: Outcome | None
    claimed_at: float
    boot_id: str


class Journal:
    """The journal of one worker. Thread-safe. Every method that writes has committed when it returns, but `mark`.

    Raises WorkerFault(DISK) when the disk does not take a write; then nothing has changed.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._ballast = path.with_name("journal.ballast")
        self._group: threading.Timer | None = None  # runs while marks wait for their commit
        self._boot_id = _boot_id()
        unusable = f"the journal {path} cannot be used"
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10.0)
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{unusable}: {error}") from None
        try:
            self._open(path)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ConfigError(f"{unusable}: {error}; move it away to start without it") from None
        except ConfigError:
            self._db.close()
            raise
        self._keep_ballast()

    def _open(self, path: Path) -> None:
        # The version comes first: changing the journal mode writes to the file, and a newer one is not ours to touch.
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in {0, VERSION}:
            raise ConfigError(
                f"the journal {path} was written by a newer jobfetcher (format {version}); upgrade this one"
            )
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA foreign_keys=ON")
        if version == 0:
            self._db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version={VERSION}; COMMIT;")

    def _keep_ballast(self) -> None:
        """Without room for it there is none: the worker must start to bring its open jobs to their end."""
        if self._ballast.exists():
            return
        try:
            self._ballast.write_bytes(b"\0" * _BALLAST_BYTES)
        except OSError:
            self._ballast.unlink(missing_ok=True)

    def claim(self, job_id: JobId, token: str, job: Job | None) -> None:
        """Record a job the moment it was handed out, before anything else is done with it."""
        spec = None if job is None else job.model_dump_json()
        self._write(
            # A record of the same job can only be one that could not be forgotten.
            "INSERT OR REPLACE INTO job (id, token, spec, phase, claimed_at, boot_id) VALUES (?, ?, ?, ?, ?, ?)",
            (job_id, token, spec, Phase.CLAIMED, time.time(), self._boot_id),
        )

    def advance(self, job_id: JobId, phase: Phase) -> None:
        """Move a job to its next phase. Raises IllegalMove for a move that is not in the table of phases."""
        self._move(job_id, phase, "")

    def attempt(self, job_id: JobId) -> int:
        """A number that this handing out of the job has and no other: a container of an earlier one is not its own."""
        with self._lock:
            row = self._db.execute("SELECT claimed_at FROM job WHERE id = ?", (job_id,)).fetchone()
        return int(row[0] * 1000) if row is not None else 0

    def started(self, job_id: JobId, container: str) -> None:
        """Record the id of the container that now runs."""
        self._write("UPDATE job SET container = ? WHERE id = ?", (container, job_id))

    def exited(self, job_id: JobId, exit: Exit) -> None:
        """Record how the container ended and move to STAGING_OUT."""
        self._move(job_id, Phase.STAGING_OUT, ", exit = ?", json.dumps(asdict(exit)))

    def settling(self, job_id: JobId, outcome: Outcome) -> None:
        """Record how the job ended, before the source is told."""
        text = json.dumps(
            {
                "ending": outcome.ending.value,
                "reason": None if outcome.reason is None else str(outcome.reason),
                "message": outcome.message,
            }
        )
        self._move(job_id, Phase.SETTLING, ", outcome = ?", text)

    def forget(self, job_id: JobId) -> None:
        """The source has heard the end and nothing of the job is left here."""
        self._write("DELETE FROM job WHERE id = ?", (job_id,))

    def mark(self, job_id: JobId, direction: Direction, stored: Stored) -> None:
        """Record that one file reached its place. Committed within a second, or with the next change of phase."""
        with self._lock:
            if self._group is None:
                self._run("BEGIN", ())
                self._group = threading.Timer(_GROUP_S, self._end_group)
                self._group.daemon = True
                self._group.start()
            self._run(
                "INSERT OR REPLACE INTO file (job, direction, name, size, digest, etag) VALUES (?, ?, ?, ?, ?, ?)",
                (job_id, direction, stored.name, stored.size, stored.digest, stored.etag),
            )

    def _end_group(self) -> None:
        with self._lock, contextlib.suppress(WorkerFault):  # a lost mark is made again; the next change of phase tells
            self._commit()

    def marked(self, job_id: JobId, direction: Direction) -> dict[str, Stored]:
        """The files of a job that reached their place, by name."""
        with self._lock:
            rows = self._db.execute(
                "SELECT name, size, digest, etag FROM file WHERE job = ? AND direction = ?", (job_id, direction)
            ).fetchall()
        return {name: Stored(name, size, digest, etag) for name, size, digest, etag in rows}

    def records(self) -> list[Record]:
        """All open jobs, oldest first. A spec that cannot be read any more counts as none."""
        with self._lock:
            rows = self._db.execute(
                "SELECT id, token, spec, phase, container, exit, outcome, claimed_at, boot_id FROM job"
                " ORDER BY claimed_at"
            ).fetchall()
        return [_record(*row) for row in rows]

    def record(self, job_id: JobId) -> Record | None:
        """One open job, or None."""
        return next((record for record in self.records() if record.id == job_id), None)

    def close(self) -> None:
        """Commit what is open and close the file."""
        with self._lock:
            self._commit()
            self._db.close()

    def _move(self, job_id: JobId, phase: Phase, more: str, *values: str) -> None:
        with self._lock:
            row = self._db.execute("SELECT phase FROM job WHERE id = ?", (job_id,)).fetchone()
            if row is None:
                raise WorkerFault(WorkerReason.DISK, f"the journal has no record of job {job_id}")
            check_move(Phase(row[0]), phase)
            self._write(f"UPDATE job SET phase = ?{more} WHERE id = ?", (phase, *values, job_id))  # noqa: S608 - `more` is a constant of this file

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        with self._lock:
            self._run(statement, values)
            self._commit()

    def _run(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            self._db.execute(statement, values)
        except sqlite3.OperationalError as error:
            # Full or failing: the ballast makes room for exactly this, once.
            try:
                self._ballast.unlink()
                self._db.execute(statement, values)
            except (OSError, sqlite3.OperationalError):
                if self._db.in_transaction:
                    self._db.rollback()  # marks of single files at most: they are made again
                self._forget_group()
                raise WorkerFault(WorkerReason.DISK, f"the journal cannot be written: {error}") from error

    def _commit(self) -> None:
        if self._db.in_transaction:
            self._run("COMMIT", ())
        self._forget_group()

    def _forget_group(self) -> None:
        if self._group is not None:
            self._group.cancel()
            self._group = None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _record(
    id: str,
    token: str,
    spec: str | None,
    phase: str,
    container: str | None,
    exit: str | None,
    outcome: str | None,
    claimed_at: float,
    boot_id: str,
) -> Record:
    try:
        job = None if spec is None else Job.model_validate_json(spec)
    except ValidationError:
        job = None
    record = Record(parse_job_id(id), token, job, Phase(phase), container, None, None, claimed_at, boot_id)
    if exit is not None:
        record = replace(record, exit=Exit(**json.loads(exit)))
    if outcome is not None:
        record = replace(record, outcome=_outcome(json.loads(outcome)))
    return record


def _outcome(data: dict[str, str]) -> Outcome:
    word = data["reason"]
    reason: JobReason | WorkerReason | None = None
    if word in set(JobReason):
        reason = JobReason(word)
    elif word in set(WorkerReason):
        reason = WorkerReason(word)
    return Outcome(Ending(data["ending"]), reason, data["message"])
