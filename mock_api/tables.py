"""The tables of the store. Times are Unix seconds of the server's clock."""

from sqlalchemy import Index
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from mock_api.models import State


class Base(DeclarativeBase):
    """Common root of the tables."""


class Job(Base):
    """One submitted job. Needs are copied out of `spec` into columns so that a pull is one indexed query."""

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(primary_key=True)
    spec: Mapped[str]  # JSON, as handed out
    state: Mapped[State]
    details: Mapped[str] = mapped_column(default="")
    group: Mapped[str | None]
    cpu_cores: Mapped[int | None]
    memory: Mapped[int | None]
    gpu_model: Mapped[str | None]
    gpu_archi: Mapped[str | None]
    gpu_mem: Mapped[int | None]
    created: Mapped[float]
    updated: Mapped[float]
    holder: Mapped[str | None]  # the last account that pulled it; a requeue does not clear it (S5)
    pullers: Mapped[str] = mapped_column(default="")  # every account that ever pulled it, ';'-joined (S3)
    retries: Mapped[int] = mapped_column(default=0)
    max_retries: Mapped[int]
    deleted: Mapped[bool] = mapped_column(default=False)
    deletion_met: Mapped[bool] = mapped_column(default=False)  # an update or the sweep has run into the deletion (S7)

    # the queue in its order; finished jobs, however many, are not in the way of a pull
    __table_args__ = (Index("queue", "state", "id"),)


class Event(Base):
    """One line of the record: who did what to which job, and what the server answered."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[float]
    kind: Mapped[str]
    job_id: Mapped[int | None] = mapped_column(index=True)
    account: Mapped[str | None]
    state: Mapped[str | None]
    details: Mapped[str | None]
    code: Mapped[int | None]
    note: Mapped[str | None]


class Mail(Base):
    """An e-mail to the job's user: HTML with the worker's details unescaped, as deployed servers do it (S11)."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[float]
    job_id: Mapped[int]
    subject: Mapped[str]
    html: Mapped[str]


class AccountRow(Base):
    """Somebody who may sign in; `digest` is scrypt of the password."""

    __tablename__ = "accounts"

    name: Mapped[str] = mapped_column(primary_key=True)
    salt: Mapped[bytes]
    digest: Mapped[bytes]
    groups: Mapped[str]  # JSON list


class TokenRow(Base):
    """A static token."""

    __tablename__ = "tokens"

    token: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str]


class ObjectMark(Base):
    """The MD5 of a stored object, good while size and mtime are those of the file."""

    __tablename__ = "objects"

    key: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    mtime_ns: Mapped[int]
    md5: Mapped[str]
