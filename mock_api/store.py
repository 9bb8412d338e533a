"""Jobs, accounts and the ordered record, in SQLite. All the oddities of job states live here.

Used by the routes. One lock puts all writing transactions in order (one process, one writer), so a change of a job and
its line in the record are one atomic step, and the record's order is the order in which things happened. Readers need
no lock: SQLite's WAL shows them the last committed state.
"""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, create_engine, event, func, or_, select
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.orm import InstrumentedAttribute, Session

from mock_api.clock import Clock
from mock_api.models import HELD, TERMINAL, HardwareSpec, Offer, State
from mock_api.record import Entry
from mock_api.tables import AccountRow, Base, Event, Job, Mail, ObjectMark, TokenRow


class Store:
    """The database below `path`. Methods may be called from any thread; `close` when done."""

    def __init__(self, path: Path, clock: Clock, *, lease_s: float, max_retries: int, retry_different: bool) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._max_retries = max_retries
        self._retry_different = retry_different
        self._lock = threading.Lock()
        self._engine = create_engine(f"sqlite:///{path}")
        event.listen(self._engine, "connect", _tune)
        Base.metadata.create_all(self._engine)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    # -- the record -----------------------------------------------------------------------------------------------

    def note(self, kind: str, **columns: Any) -> None:
        """Add one line to the record; `columns` are those of `tables.Event`."""
        with self._session() as session:
            self._note(session, kind, **columns)

    def record(self, kind: str | None = None, job_id: int | None = None) -> list[Entry]:
        """The record, oldest first, whole or only one kind or one job."""
        columns = [getattr(Event, column.name) for column in fields(Entry)]  # rows, not objects: the record can be long
        query = select(*columns).order_by(Event.id)
        if kind is not None:
            query = query.where(Event.kind == kind)
        if job_id is not None:
            query = query.where(Event.job_id == job_id)
        with Session(self._engine) as session:
            return [Entry(*row) for row in session.execute(query)]

    def mails(self) -> list[dict[str, Any]]:
        """Every e-mail sent, oldest first."""
        with Session(self._engine) as session:
            return [
                {"time": mail.time, "job_id": mail.job_id, "subject": mail.subject, "html": mail.html}
                for mail in session.scalars(select(Mail).order_by(Mail.id))
            ]

    # -- the user's side ------------------------------------------------------------------------------------------

    def submit(self, spec: Any, needs: HardwareSpec, group: str | None, retries: int | None) -> int:
        """Queue a job. `spec` is handed out as it is, with `meta.job_id` and `meta.date_created` filled in."""
        now = self._clock.now()
        with self._session() as session:
            job = Job(spec="", state=State.QUEUED, group=group, created=now, updated=now, **_columns(needs))
            job.max_retries = self._max_retries if retries is None else retries
            session.add(job)
            session.flush()
            job.spec = json.dumps(_stamped(spec, job.id, now))
            self._note(session, "submit", job_id=job.id, state=State.QUEUED)
            return job.id

    def job(self, job_id: int) -> dict[str, Any] | None:
        """The job as its user sees it; None when there is none or it was deleted."""
        with Session(self._engine) as session:
            job = session.get(Job, job_id)
            return None if job is None or job.deleted else _public(job)

    def jobs(self, limit: int) -> list[dict[str, Any]]:
        """The newest jobs, newest first, deleted ones left out."""
        query = select(Job).where(~Job.deleted).order_by(Job.id.desc()).limit(limit)
        with Session(self._engine) as session:
            return [_public(job) for job in session.scalars(query)]

    def delete(self, job_id: int, *, swept: bool) -> bool:
        """Delete a job as its user; whether there was one. `swept`: the sweep met the deletion at once (S7)."""
        with self._session() as session:
            job = session.get(Job, job_id)
            if job is None or job.deleted:
                return False
            job.deleted = True
            job.deletion_met = swept
            self._note(session, "delete", job_id=job_id, state=job.state)
            return True

    # -- the worker's side ----------------------------------------------------------------------------------------

    def pull(self, offer: Offer, account: str, *, asked: str = "") -> dict[int, Any]:
        """Hand out up to `offer.limit` jobs that fit, oldest first: id to specs. They are `pulled` at once (S1).

        `asked` is the query that the offer came in, for the record: it shows what the worker called things.
        """
        now = self._clock.now()
        query = select(Job).where(Job.state == State.QUEUED, ~Job.deleted, *_fits(offer, now))
        if self._retry_different:
            # a plain substring search: an account whose name contains this one's counts as this one (S3)
            query = query.where(func.instr(Job.pullers, account) == 0)
        with self._session() as session:
            jobs = session.scalars(query.order_by(Job.id).limit(offer.limit)).all()
            for job in jobs:
                job.state = State.PULLED
                job.updated = now
                job.holder = account
                job.pullers = f"{job.pullers}{account};"
                self._note(session, "pull", job_id=job.id, account=account, state=State.PULLED, note=asked or None)
            if not jobs:
                self._note(session, "poll", account=account, note=asked or None)
            return {job.id: json.loads(job.spec) for job in jobs}

    def state(self, job_id: int, account: str) -> State | None:
        """What `GET status` answers; None is a 404."""
        with self._session() as session:
            job = session.get(Job, job_id)
            found = None if job is None or job.deleted else job.state
            self._note(
                session, "status", job_id=job_id, account=account, state=found, code=404 if found is None else 200
            )
            return found

    def update(self, job_id: int, account: str, state: State, details: str) -> int:
        """Take a worker's word on a job and return the HTTP status of the answer. No transition is checked (S6)."""
        with self._session() as session:
            job = session.get(Job, job_id)
            code = _verdict(job, account)
            self._note(
                session, "update", job_id=job_id, account=account, state=state, details=details or None, code=code
            )
            if job is not None and job.deleted and job.holder == account:
                job.deletion_met = True
            if job is not None and code == 204:
                job.updated = self._clock.now()
                self._enter(session, job, state, details)
            return code

    def holds(self, job_id: int, account: str) -> bool:
        """Whether files of the job may be stored by this account: it pulled the job last and nobody deleted it (S8)."""
        with Session(self._engine) as session:
            return _verdict(session.get(Job, job_id), account) == 204

    def sweep(self) -> list[int]:
        """Put held jobs that were silent for longer than the lease back, or end them as `error` (S4); their ids."""
        now = self._clock.now()
        query = select(Job).where(Job.state.in_(HELD), Job.updated < now - self._lease_s, ~Job.deletion_met)
        with self._session() as session:
            silent = session.scalars(query.order_by(Job.id)).all()
            for job in silent:
                if job.deleted:
                    job.deletion_met = True  # from now on the worker's updates get 500, never the 404 (S7)
                    continue
                job.updated = now
                self._note(session, "requeue", job_id=job.id, account=job.holder, state=job.state)
                if job.retries < job.max_retries:
                    job.retries += 1
                    job.state = State.QUEUED
                else:
                    self._enter(session, job, State.ERROR, f"no sign of life for {self._lease_s:g} s")
            return [job.id for job in silent]

    def _enter(self, session: Session, job: Job, state: State, details: str) -> None:
        job.state = state
        if details:
            job.details = f"{job.details}\n{details}" if job.details else details
        if state in TERMINAL:
            subject = f"Job {job.id}: {state}"
            html = f"<html><body><h1>{subject}</h1><pre>{job.details}</pre></body></html>"  # unescaped, as S11 has it
            session.add(Mail(time=self._clock.now(), job_id=job.id, subject=subject, html=html))
            self._note(session, "mail", job_id=job.id, state=state)

    # -- accounts and objects -------------------------------------------------------------------------------------

    def put_account(self, name: str, salt: bytes, digest: bytes, groups: list[str]) -> None:
        """Make or replace an account."""
        with self._session() as session:
            session.merge(AccountRow(name=name, salt=salt, digest=digest, groups=json.dumps(groups)))

    def account(self, name: str) -> tuple[bytes, bytes, list[str]] | None:
        """Salt, password digest and groups of an account."""
        with Session(self._engine) as session:
            row = session.get(AccountRow, name)
            return None if row is None else (row.salt, row.digest, json.loads(row.groups))

    def put_token(self, token: str, account: str) -> None:
        """Make or replace a static token."""
        with self._session() as session:
            session.merge(TokenRow(token=token, account=account))

    def token_account(self, token: str) -> str | None:
        """Whose static token this is."""
        with Session(self._engine) as session:
            row = session.get(TokenRow, token)
            return None if row is None else row.account

    def put_md5(self, key: str, size: int, mtime_ns: int, md5: str) -> None:
        """Remember the MD5 of an object as it is now."""
        with self._session() as session:
            session.merge(ObjectMark(key=key, size=size, mtime_ns=mtime_ns, md5=md5))

    def md5(self, key: str, size: int, mtime_ns: int) -> str | None:
        """The remembered MD5, if the object is still of that size and time."""
        with Session(self._engine) as session:
            row = session.get(ObjectMark, key)
            return None if row is None or (row.size, row.mtime_ns) != (size, mtime_ns) else row.md5

    def _note(self, session: Session, kind: str, **columns: Any) -> None:
        session.add(Event(time=self._clock.now(), kind=kind, **columns))

    @contextmanager
    def _session(self) -> Iterator[Session]:
        with self._lock, Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session


def _tune(connection: DBAPIConnection, _record: object) -> None:
    """Survive a kill of the server, not a power cut: that is what a test server needs, and it commits in 0.1 ms."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _fits(offer: Offer, now: float) -> list[ColumnElement[bool]]:
    """The matching rules (S18): models by equality, amounts by at most, null needs match anyone."""
    conditions = [
        *(_at_most(column, amount) for column, amount in _amounts(offer)),
        or_(Job.gpu_model.is_(None), Job.gpu_model == offer.gpu_model),
        or_(Job.gpu_archi.is_(None), Job.gpu_archi == offer.gpu_archi),
        or_(Job.group.is_(None), Job.group.in_(offer.groups)),
    ]
    if offer.older_than > 0:
        conditions.append(Job.created <= now - offer.older_than)
    return conditions


def _amounts(offer: Offer) -> list[tuple[InstrumentedAttribute[int | None], int]]:
    return [(Job.cpu_cores, offer.cpu_cores), (Job.memory, offer.memory), (Job.gpu_mem, offer.gpu_mem)]


def _at_most(column: InstrumentedAttribute[int | None], amount: int) -> ColumnElement[bool]:
    return or_(column.is_(None), column <= amount)


def _verdict(job: Job | None, account: str) -> int:
    """404 unless the account is the last to have pulled the job (S5); of a deleted one 404 once, then 500 (S7)."""
    if job is None or job.holder != account:
        return 404
    if job.deleted:
        return 500 if job.deletion_met else 404
    return 204


def _columns(needs: HardwareSpec) -> Mapping[str, Any]:
    return {name: getattr(needs, name) for name in HardwareSpec.model_fields}


def _stamped(spec: Any, job_id: int, now: float) -> Any:
    """`spec` with the id and the date that the server adds; what is no object with a `meta` object stays as it is."""
    if not isinstance(spec, dict) or not isinstance(meta := spec.get("meta", {}), dict):
        return spec
    date = datetime.fromtimestamp(now, UTC).isoformat()
    return {**spec, "meta": {**meta, "job_id": job_id, "date_created": date}}


def _public(job: Job) -> dict[str, Any]:
    return {
        "job_id": job.id,
        "state": str(job.state),
        "details": job.details,
        "created": job.created,
        "updated": job.updated,
        "group": job.group,
        "holder": job.holder,
        "retries": job.retries,
    }
