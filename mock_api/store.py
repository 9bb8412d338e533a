"""Jobs, accounts and the ordered record, in SQLite. All the oddities of job states live here.

Two records are kept of each job, as deployed servers do, which consist of two programs: the queue, which is committed
first, and the user's side, which is told afterwards and may be away (S19, S24). `away` is that switch.

Used by the routes. One lock puts all writing transactions in order (one process, one writer), so a change of a job and
its line in the record are one atomic step, and the record's order is the order in which things happened. A method takes
some ten microseconds, so routes call it on the event loop; only `record` and `mails`, which can be long, have a
connection of their own and are called from other threads.
"""

import json
import sqlite3
from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from enum import Enum, auto
from pathlib import Path
from typing import Any

from mock_api.clock import Clock
from mock_api.database import Database
from mock_api.models import HELD, TERMINAL, HardwareSpec, Offer, State, Wishes
from mock_api.record import UNHEARD, Entry

_ENTRY = ", ".join(column.name for column in fields(Entry))

#: The matching rules: models by equality, amounts by at most, null needs match anyone (S18); the caller's environment,
#: or jobs of none that are old enough; then priority, then age (S21).
_FITTING = """
    SELECT * FROM jobs WHERE state = :queued
    AND (cpu_cores IS NULL OR cpu_cores <= :cpu_cores)
    AND (memory IS NULL OR memory <= :memory)
    AND (gpu_mem IS NULL OR gpu_mem <= :gpu_mem)
    AND (gpu_model IS NULL OR gpu_model = :gpu_model)
    AND (gpu_archi IS NULL OR gpu_archi = :gpu_archi)
    AND (environment = :environment OR (environment IS NULL AND created <= :now - :older_than))
    -- a plain substring search: an account whose name contains this one's counts as this one (S3)
    AND (:any_puller OR instr(pullers, :account) = 0)
    {preferred}
    ORDER BY priority DESC, id LIMIT 1
"""
#: Groups are a preference (S21): jobs of the caller's go first, whatever their priority, then any.
_FITTING_GROUP = _FITTING.format(preferred='AND "group" IN (SELECT value FROM json_each(:groups))')
_FITTING_ANY = _FITTING.format(preferred="")


#: A job as its user sees it: state and details are what the user's side heard; the queue may have lost the job.
_SEEN = """
    SELECT queue_id AS job_id, user_jobs.id AS user_job_id, user_jobs.state, details, user_jobs.created,
    user_jobs.updated, "group", priority, environment, holder, retries, jobs.state AS queue_state
    FROM user_jobs LEFT JOIN jobs ON jobs.id = queue_id WHERE NOT deleted
"""


class Heard(Enum):
    """What came of telling the user's side."""

    YES = auto()
    GONE = auto()  # the user deleted the job
    AWAY = auto()


class UserSideAway(Exception):
    """The user's side cannot be told. What the queue was told is committed all the same; the answer is a 500 (S19)."""


class Store(Database):
    """What the server knows. Methods may be called from any thread; `close` when done. Raises as `Database` does."""

    def __init__(self, path: Path, clock: Clock, *, lease_s: float, max_retries: int, retry_different: bool) -> None:
        super().__init__(path)
        self._clock = clock
        self._lease_s = lease_s
        self._max_retries = max_retries
        self._retry_different = retry_different
        self.away = False  # nobody can reach the user's side

    # -- the record -----------------------------------------------------------------------------------------------

    def note(
        self,
        kind: str,
        *,
        job_id: int | None = None,
        account: str | None = None,
        state: str | None = None,
        details: str | None = None,
        code: int | None = None,
        note: str | None = None,
    ) -> None:
        """Add one line to the record."""
        with self._lock:
            self._note(kind, job_id, account, state, details, code, note)

    def record(self, kind: str | None = None, job_id: int | None = None) -> list[Entry]:
        """The record, oldest first, whole or only one kind or one job."""
        query = f"SELECT {_ENTRY} FROM events WHERE (? IS NULL OR kind = ?)"  # noqa: S608 - our own column names
        values: list[object] = [kind, kind]
        if job_id is not None:
            query += " AND job_id = ?"
            values.append(job_id)
        with self._reading:
            return [Entry(*row) for row in self._reader.execute(query + " ORDER BY id", values)]

    def mails(self) -> list[dict[str, Any]]:
        """Every e-mail sent, oldest first."""
        with self._reading:
            return [dict(row) for row in self._reader.execute("SELECT time, job_id, subject, html FROM outbox")]

    # -- the user's side ------------------------------------------------------------------------------------------

    def submit(self, spec: Any, needs: HardwareSpec, wishes: Wishes) -> int:
        """Queue a job; its id in the queue. `spec` is handed out as it is, with `meta.job_id`, which is the user's
        number of the job and another one (S22), and `meta.date_created` filled in."""
        now = self._clock.now()
        values = needs.model_dump(include=set(HardwareSpec.model_fields)) | wishes.model_dump()
        values |= {"now": now, "queued": State.QUEUED}
        values["max_retries"] = self._max_retries if wishes.retries is None else wishes.retries
        with self._writing() as db:
            job_id = db.execute(
                'INSERT INTO jobs (spec, state, "group", priority, environment, cpu_cores, memory, gpu_model,'
                " gpu_archi, gpu_mem, created, updated, max_retries) VALUES ('', :queued, :group, :priority,"
                " :environment, :cpu_cores, :memory, :gpu_model, :gpu_archi, :gpu_mem, :now, :now, :max_retries)",
                values,
            ).lastrowid
            assert job_id is not None  # noqa: S101 - for the type checker: an INSERT has one
            user_id = db.execute(
                "INSERT INTO user_jobs (queue_id, state, created, updated) VALUES (?, ?, ?, ?)",
                (job_id, State.QUEUED, now, now),
            ).lastrowid
            db.execute("UPDATE jobs SET spec = ? WHERE id = ?", (json.dumps(_stamped(spec, user_id, now)), job_id))
            self._note("submit", job_id, state=State.QUEUED)
            return job_id

    def job(self, job_id: int) -> dict[str, Any] | None:
        """The job as its user sees it; None when there is none or it was deleted."""
        with self._lock:
            found = self._db.execute(_SEEN + " AND queue_id = ?", (job_id,)).fetchone()
        return None if found is None else dict(found)

    def jobs(self, limit: int) -> list[dict[str, Any]]:
        """The newest jobs, newest first, deleted ones left out."""
        with self._lock:
            return [dict(job) for job in self._db.execute(_SEEN + " ORDER BY queue_id DESC LIMIT ?", (limit,))]

    def delete(self, job_id: int, *, swept: bool) -> bool:
        """Delete a job as its user; whether there was one. The queue is not told: it learns of it from the next update
        or sweep (S7). `swept`: the sweep met the deletion at once."""
        with self._writing() as db:
            seen = db.execute(_SEEN + " AND queue_id = ?", (job_id,)).fetchone()
            if seen is None:
                return False
            db.execute("UPDATE user_jobs SET deleted = 1 WHERE queue_id = ?", (job_id,))
            if swept:
                self._forget(job_id)
            self._note("delete", job_id, state=seen["state"])
            return True

    # -- the worker's side ----------------------------------------------------------------------------------------

    def pull(
        self, offer: Offer, account: str, environment: str, *, asked: str = "", away: bool = False
    ) -> dict[int, Any]:
        """Hand out up to `offer.limit` jobs that fit, in the queue's order: id to specs. They are `pulled` at once
        (S1). `environment` is the account's; it never sees the jobs of another (S21).

        `asked` is the query that the offer came in, for the record: it shows what the worker called things. `away`: the
        user's side cannot be reached just now. Raises `UserSideAway`: one job is `pulled` then, and nobody knows.
        Raises `OverflowError` for an `older_than` that no date goes back to.
        """
        now = self._clock.now()
        datetime.fromtimestamp(now, UTC) - timedelta(seconds=offer.older_than)
        values = asdict(offer) | {"account": account, "environment": environment}
        values |= {"queued": State.QUEUED, "now": now}
        values |= {"groups": json.dumps(offer.groups), "any_puller": not self._retry_different}
        found: dict[int, Any] = {}
        heard = Heard.YES
        with self._writing() as db:
            while len(found) < offer.limit and heard is not Heard.AWAY:
                job = db.execute(_FITTING_GROUP, values).fetchone() if offer.groups else None
                job = job or db.execute(_FITTING_ANY, values).fetchone()
                if job is None:
                    break
                db.execute(
                    "UPDATE jobs SET state = ?, updated = ?, holder = ?, pullers = pullers || ';' || ? WHERE id = ?",
                    (State.PULLED, now, account, account, job["id"]),
                )
                heard = self._tell(job["id"], account, State.PULLED, "", away=away)
                if heard is Heard.YES:
                    self._note("pull", job["id"], account, State.PULLED, note=asked or None)
                    found[job["id"]] = json.loads(job["spec"])
                elif heard is Heard.AWAY:
                    self._note("lost_pull", job["id"], account, State.PULLED, code=500, note=asked or None)
            if not found and heard is not Heard.AWAY:
                self._note("poll", account=account, note=asked or None)
        if heard is Heard.AWAY:
            raise UserSideAway
        return found

    def state(self, job_id: int, account: str) -> State | None:
        """What `GET status` answers: the queue's word, which says nothing of the user's side (S19). None is a 404."""
        with self._writing():
            job = self._job(job_id)
            found = None if job is None else State(job["state"])
            self._note("status", job_id, account, found, code=404 if found is None else 200)
            return found

    def update(self, job_id: int, account: str, state: State, details: str, *, away: bool = False) -> int:
        """Take a worker's word on a job and return the HTTP status of the answer. No transition is checked (S6).

        The queue is committed first, then the user's side is told: 404 when the user has deleted the job, and 500 when
        nobody can tell it (S19); `away` has that happen to this update.
        """
        with self._writing() as db:
            job = self._job(job_id)
            code = _verdict(job, account)
            heard = Heard.YES
            if job is not None and code == 204:
                db.execute("UPDATE jobs SET state = ?, updated = ? WHERE id = ?", (state, self._clock.now(), job_id))
                heard = self._tell(job_id, account, state, details, away=away)
                code = {Heard.YES: 204, Heard.GONE: 404, Heard.AWAY: 500}[heard]
            note = UNHEARD if heard is Heard.AWAY else None
            self._note("update", job_id, account, state, details or None, code, note)
            return code

    def holds(self, job_id: int, account: str) -> bool:
        """Whether files of the job may be stored by this account: it is the last to have pulled it (S8)."""
        with self._lock:
            return _verdict(self._job(job_id), account) == 204

    def sweep(self) -> list[int]:
        """Put held jobs that were silent for longer than the lease back, or end them as `error` (S4); their ids.

        Where the user's side cannot be told, the round ends with the job that it was to be told of: that job is in the
        queue again, its retry not counted, and the others wait for the next round (S24).
        """
        now = self._clock.now()
        swept: list[int] = []
        with self._writing() as db:
            silent = db.execute(
                "SELECT * FROM jobs WHERE state IN (SELECT value FROM json_each(?)) AND updated < ?"
                " ORDER BY retries >= max_retries, id",
                (json.dumps(HELD), now - self._lease_s),
            ).fetchall()
            for job in silent:
                swept.append(job["id"])
                again = job["retries"] < job["max_retries"]
                state = State.QUEUED if again else State.ERROR
                tried = f"timeout {job['retries'] + 1} (workers tried: {job['pullers']})"
                details = tried if again else "max retries reached"
                db.execute("UPDATE jobs SET state = ?, updated = ? WHERE id = ?", (state, now, job["id"]))
                heard = self._tell(job["id"], None, state, details)
                if heard is Heard.GONE:
                    continue
                self._note("requeue", job["id"], job["holder"], job["state"])
                if heard is Heard.AWAY:
                    break
                if again:
                    db.execute("UPDATE jobs SET retries = retries + 1 WHERE id = ?", (job["id"],))
        return swept

    def heard(self, job_id: int | None = None) -> list[dict[str, Any]]:
        """What the user's side was told, oldest first: of every job or of one."""
        with self._reading:
            rows = self._reader.execute("SELECT * FROM heard WHERE ? IS NULL OR job_id = ? ORDER BY id", (job_id,) * 2)
            return [{name: row[name] for name in ("time", "job_id", "account", "state", "details")} for row in rows]

    def _tell(self, job_id: int, account: str | None, state: State, details: str, *, away: bool = False) -> Heard:
        """Tell the user's side; `account` is None for the server's own sweep. A deletion is met here (S7): the queue
        forgets the job."""
        if away or self.away:
            return Heard.AWAY
        job = self._db.execute("SELECT * FROM user_jobs WHERE queue_id = ? AND NOT deleted", (job_id,)).fetchone()
        if job is None:
            self._forget(job_id)
            return Heard.GONE
        now, known = self._clock.now(), job["details"]
        if details:
            known += f"\n{details}"  # a line break goes before each, the first one included (S22)
        self._db.execute(
            "UPDATE user_jobs SET state = ?, details = ?, updated = ? WHERE queue_id = ?", (state, known, now, job_id)
        )
        self._db.execute(
            "INSERT INTO heard (time, job_id, account, state, details) VALUES (?, ?, ?, ?, ?)",
            (now, job_id, account, state, details),
        )
        if state in TERMINAL:
            self._mail(job["id"], job_id, state, known)
        return Heard.YES

    def _mail(self, user_id: int, job_id: int, state: State, details: str) -> None:
        subject = f"Job {user_id}: {state}"
        html = f"<html><body><h1>{subject}</h1><pre>{details}</pre></body></html>"  # unescaped, as S11 has it
        self._db.execute(
            "INSERT INTO outbox (time, job_id, subject, html) VALUES (?, ?, ?, ?)",
            (self._clock.now(), job_id, subject, html),
        )
        self._note("mail", job_id, state=state)

    def _forget(self, job_id: int) -> None:
        self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    # -- accounts and objects -------------------------------------------------------------------------------------

    def put_account(self, name: str, salt: bytes, digest: bytes, groups: list[str]) -> None:
        """Make or replace an account."""
        with self._lock:
            self._db.execute(
                "INSERT OR REPLACE INTO accounts VALUES (?, ?, ?, ?)", (name, salt, digest, json.dumps(groups))
            )

    def account(self, name: str) -> tuple[bytes, bytes, list[str]] | None:
        """Salt, password digest and groups of an account."""
        with self._lock:
            row = self._db.execute("SELECT salt, digest, groups FROM accounts WHERE name = ?", (name,)).fetchone()
        return None if row is None else (row["salt"], row["digest"], json.loads(row["groups"]))

    def put_token(self, token: str, account: str) -> None:
        """Make or replace a static token."""
        with self._lock:
            self._db.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?)", (token, account))

    def token_account(self, token: str) -> str | None:
        """Whose static token this is."""
        with self._lock:
            row = self._db.execute("SELECT account FROM tokens WHERE token = ?", (token,)).fetchone()
        return None if row is None else str(row["account"])

    def put_md5(self, key: str, size: int, mtime_ns: int, md5: str) -> None:
        """Remember the MD5 of an object as it is now."""
        with self._lock:
            self._db.execute("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?)", (key, size, mtime_ns, md5))

    def md5(self, key: str, size: int, mtime_ns: int) -> str | None:
        """The remembered MD5, if the object is still of that size and time."""
        query = "SELECT md5 FROM objects WHERE key = ? AND size = ? AND mtime_ns = ?"
        with self._lock:
            row = self._db.execute(query, (key, size, mtime_ns)).fetchone()
        return None if row is None else str(row["md5"])

    def _job(self, job_id: int) -> sqlite3.Row | None:
        found: sqlite3.Row | None = self._db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return found

    def _note(
        self,
        kind: str,
        job_id: int | None = None,
        account: str | None = None,
        state: str | None = None,
        details: str | None = None,
        code: int | None = None,
        note: str | None = None,
    ) -> None:
        self._db.execute(
            "INSERT INTO events (time, kind, job_id, account, state, details, code, note)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (self._clock.now(), kind, job_id, account, state, details, code, note),
        )


def _verdict(job: sqlite3.Row | None, account: str) -> int:
    """404 unless the account is the last to have pulled the job (S5); 500 for one that the queue does not know, be it
    that it never did, or that it met the user's deletion (S7)."""
    if job is None:
        return 500
    return 204 if job["holder"] == account else 404


def _stamped(spec: Any, job_id: int | None, now: float) -> Any:
    """`spec` with the id and the date that the server adds; what is no object with a `meta` object stays as it is."""
    if not isinstance(spec, dict) or not isinstance(meta := spec.get("meta", {}), dict):
        return spec
    date = datetime.fromtimestamp(now, UTC).isoformat()
    return {**spec, "meta": {**meta, "job_id": job_id, "date_created": date}}
