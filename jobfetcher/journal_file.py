"""The journal's file: its tables, a check sum for every row, and what to do with one that was damaged (FAULTS.md J1).

Used by `journal` only. A database that is found at start is first read as plain bytes, its write-ahead log applied by
`_apply_log`, and looked at in memory: nothing on disk is touched before it is known to be sound, damaged or newer.
SQLite's pages carry no check sums, so one flipped bit could turn an exit code of 1 into 0: every row has its own.
A damaged file goes to quarantine and a new one with all sound rows takes its place; a kill in between is made good
by the next start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobfetcher.core.phases import Phase
from jobfetcher.core.text import clean

#: Raised with every change of the tables; a newer journal is refused and left alone (FAULTS.md F12).
VERSION = 2

#: SQLite keeps this text in the file, word for word, and a file with another one counts as damaged: any change here,
#: were it one space, is a new VERSION. NULL `spec`: a job nobody could read; NULL `container`: not started as far as we
#: know. `share`, `image`, `exit` and `outcome` are JSON of the dataclass of that name, `resumed` of a list of times.
_TABLES = {
    "job": """CREATE TABLE job (
    id TEXT NOT NULL PRIMARY KEY,
    token TEXT NOT NULL,
    spec TEXT,
    phase TEXT NOT NULL,
    claimed_at REAL NOT NULL,
    boot_id TEXT NOT NULL,
    share TEXT,
    image TEXT,
    runs INTEGER NOT NULL,
    container TEXT,
    exit TEXT,
    outcome TEXT,
    decided_at REAL,
    resumed TEXT NOT NULL,
    resumed_marks INTEGER NOT NULL,
    stopping INTEGER NOT NULL,
    sum TEXT NOT NULL
) STRICT, WITHOUT ROWID""",
    "file": """CREATE TABLE file (
    job TEXT NOT NULL REFERENCES job (id) ON DELETE CASCADE,
    direction TEXT NOT NULL,
    name TEXT NOT NULL,
    size INTEGER NOT NULL,
    digest TEXT NOT NULL,
    etag TEXT NOT NULL,
    sum TEXT NOT NULL,
    PRIMARY KEY (job, direction, name)
) STRICT, WITHOUT ROWID""",
    "image": """CREATE TABLE image (
    reference TEXT NOT NULL,
    id TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    used_at REAL NOT NULL,
    sum TEXT NOT NULL,
    PRIMARY KEY (reference, id)
) STRICT, WITHOUT ROWID""",
}

#: Queries for rows of format 1, in the order of today's columns; it had no check sums, shares, images and runs.
_JOB_1 = (
    "SELECT id, token, spec, phase, claimed_at, boot_id, NULL AS share, NULL AS image, 0 AS runs, container, exit,"
    " outcome FROM job"
)
_FILE_1 = "SELECT job, direction, name, size, digest, etag FROM file"

#: A database and what SQLite may lay beside it; none may be left next to a new one, which it would spoil.
_PARTS = ("", "-wal", "-shm", "-journal")

#: How a database begins, how its log does, and the bytes before a log's first frame and before each frame's page.
_MAGIC, _LOG_MAGIC = b"SQLite format 3\0", 0x377F0682
_LOG_HEADER, _FRAME = 32, 24


#: What a damaged database raises when it is read; SQLite's own message may be no text any more.
UNREADABLE = (sqlite3.DatabaseError, UnicodeError)


@dataclass(frozen=True, slots=True)
class JobRow:
    """One row of `job`, in the order of its columns, as it is stored."""

    id: str
    token: str
    spec: str | None
    phase: str
    claimed_at: float
    boot_id: str
    share: str | None = None
    image: str | None = None
    runs: int = 0
    container: str | None = None
    exit: str | None = None
    outcome: str | None = None
    decided_at: float | None = None
    resumed: str = "[]"
    resumed_marks: int = 0
    stopping: int = 0


@dataclass(frozen=True, slots=True)
class FileRow:
    """One row of `file`: a file that reached its place."""

    job: str
    direction: str
    name: str
    size: int
    digest: str
    etag: str


@dataclass(frozen=True, slots=True)
class KeptImage:
    """One row of `image`: an image that this worker pulled. `used_at`: wall clock of its last use.

    A tag that moved to another image leaves the old one behind, which is still ours to remove (FAULTS.md D7).
    """

    reference: str
    id: str
    size_bytes: int
    used_at: float


Row = JobRow | FileRow | KeptImage

_NAMES: dict[type[Row], str] = {JobRow: "job", FileRow: "file", KeptImage: "image"}
_COLUMNS = {kind: tuple(column.name for column in fields(kind)) for kind in _NAMES}
_KEYS = {"job": "id", "file": "job, direction, name", "image": "reference, id"}

#: What check sums are made of. repr: damage can make a value one that JSON does not have.
_JSON = json.JSONEncoder(default=repr)

Statement = tuple[str, tuple[object, ...]]


@dataclass(slots=True)
class Found:
    """What a journal's file held. `version` 0: nothing yet; `damage`: what was wrong with it, as a clause, or ""."""

    version: int = 0
    damage: str = ""
    jobs: list[JobRow] = field(default_factory=list)
    files: list[FileRow] = field(default_factory=list)
    images: list[KeptImage] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def put(row: Row) -> Statement:
    """The statement that stores a row whole, new or not, with its check sum."""
    kind = type(row)
    values = tuple(getattr(row, column) for column in _COLUMNS[kind])
    return _INSERTS[kind], (*values, _sum(_NAMES[kind], values))


def _insert(kind: type[Row]) -> str:
    name, columns = _NAMES[kind], [*_COLUMNS[kind], "sum"]
    changes = ", ".join(f"{column} = excluded.{column}" for column in columns)
    marks = ", ".join("?" * len(columns))
    return (
        f"INSERT INTO {name} ({', '.join(columns)}) VALUES ({marks})"  # noqa: S608 - names of this file, values bound
        f" ON CONFLICT ({_KEYS[name]}) DO UPDATE SET {changes}"
    )


#: Made once: a job writes a dozen rows.
_INSERTS = {kind: _insert(kind) for kind in _NAMES}


def select(kind: type[Row], condition: str = "") -> str:
    """The query for whole rows of a kind with their check sums, for `is_whole`."""
    columns = ", ".join(_COLUMNS[kind])
    return f"SELECT {columns}, sum FROM {_NAMES[kind]} {condition}"  # noqa: S608 - names of this file, values bound


def is_whole(kind: type[Row], values: tuple[Any, ...]) -> bool:
    """Whether what `select` gave is what `put` stored; then `kind(*values[:-1])` is the row."""
    return bool(values[-1] == _sum(_NAMES[kind], values[:-1]))


def _sum(table: str, values: Iterable[object]) -> str:
    text = _JSON.encode([table, *values])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# -- what is there -------------------------------------------------------------------------------------------------


def read(path: Path) -> Found:
    """What lies at `path`, sound or not, and nothing touched. Raises OSError when it cannot be read at all."""
    database, log = _content(path), _content(_beside(path, "-wal"))
    found = Found()
    image, found.damage = _apply_log(database, log)
    if not image:
        return found
    if not image.startswith(_MAGIC):
        found.damage = found.damage or "it is no database"
        return found
    found.version = int.from_bytes(image[60:64], "big", signed=True)
    if found.version > VERSION:
        return found
    # The part of the header that no write ever changes; SQLite takes it from the file and not from the log.
    if database[:20] != image[:20] or bytes(image[18:20]) not in {b"\1\1", b"\2\2"}:
        found.damage = found.damage or "its header is damaged"
    image[18:20] = b"\1\1"  # in memory there is no log; it is applied already
    with contextlib.closing(sqlite3.connect(":memory:")) as memory:
        memory.text_factory = lambda text: text.decode(errors="replace")
        memory.deserialize(bytes(image))
        problems = _look(memory, found)
    if problems:
        found.damage = found.damage or clean(problems[0], 200)
    return found


def _look(memory: sqlite3.Connection, found: Found) -> list[str]:
    """Read into `found` all rows that can be read; returns what is wrong."""
    problems: list[str] = []
    problems += [said for (said,) in _rows(memory, "PRAGMA integrity_check(1)", problems) if said != "ok"]
    if problems:
        memory.execute("PRAGMA writable_schema=ON")  # read on where SQLite gives up: shorter than its header says, ...
    tables = dict(_rows(memory, "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL", problems))
    if found.version == 0 and not tables:
        return problems  # made, but killed before it had tables
    old = found.version == 1 and tables != _TABLES
    if (found.version == VERSION) != (tables == _TABLES):
        problems.append("its tables are damaged")
    # The ids first, from both ends: they stand at the start of a row and are read where the rest is out of reach.
    ids = [*_rows(memory, "SELECT id FROM job ORDER BY id", problems)]
    ids += _rows(memory, "SELECT id FROM job ORDER BY id DESC", problems)
    for (id,) in dict.fromkeys(ids):
        row = _job(memory, id, old)
        if row is None:
            found.unreadable.append(clean(str(id), 80))
        else:
            found.jobs.append(row)
    known = {row.id for row in found.jobs}
    files = _rows(memory, _FILE_1 if old else select(FileRow), problems)
    images = [] if old else _rows(memory, select(KeptImage), problems)
    whole = [FileRow(*values[:6]) for values in files if old or is_whole(FileRow, values)]
    found.files = [row for row in whole if row.job in known]
    found.images = [KeptImage(*values[:-1]) for values in images if is_whole(KeptImage, values)]
    if found.unreadable or len(whole) < len(files) or len(found.images) < len(images):
        problems.append("a row fails its check")
    return problems


def _rows(memory: sqlite3.Connection, query: str, problems: list[str]) -> list[tuple[Any, ...]]:
    """What a query gives until it meets something that cannot be read, which is added to `problems`."""
    rows = []
    try:
        for values in memory.execute(query):
            rows.append(values)  # one by one, because those before an error count
    except UNREADABLE as error:
        problems.append(str(error))
    return rows


def _job(memory: sqlite3.Connection, id: str, old: bool) -> JobRow | None:
    query = _JOB_1 if old else select(JobRow)
    try:
        values = memory.execute(f"{query} WHERE id = ?", (id,)).fetchone()
    except UNREADABLE:
        return None
    if values is None:
        return None
    if old:
        row = JobRow(*values)
        return replace(row, runs=1) if row.phase in {Phase.RUNNING, Phase.STAGING_OUT} else row
    return JobRow(*values[:-1]) if is_whole(JobRow, values) else None


def _apply_log(database: bytes, log: bytes) -> tuple[bytearray, str]:
    """The database with all commits of its write-ahead log, and what is wrong with the log or "".

    As SQLite does it (sqlite.org/fileformat2.html, section 4): frames count up to the first that does not fit its check
    sum. A log that a crash cut off ends in one commit at most that nobody was told of; more of them behind a broken
    frame were durable once, and SQLite itself would pass over them in silence.
    """
    if len(log) < _LOG_HEADER:
        return bytearray(database), ""
    magic, _, size, _, _, _, *expected = struct.unpack(">8I", log[:_LOG_HEADER])
    order = ">" if magic & 1 else "<"
    sums = _log_sum(order, log[: _LOG_HEADER - 8], (0, 0))
    if magic & ~1 != _LOG_MAGIC or sums != tuple(expected):
        return bytearray(database), "the header of its log is damaged"
    salt = log[16:24]
    pages: dict[int, bytes] = {}
    waiting: dict[int, bytes] = {}
    length, sound, lost = 0, True, 0
    for start in range(_LOG_HEADER, len(log) - _FRAME - size + 1, _FRAME + size):
        head, page = log[start : start + _FRAME], log[start + _FRAME : start + _FRAME + size]
        number, commit, _, _, *expected = struct.unpack(">6I", head)
        if sound and head[8:16] == salt:
            sums = _log_sum(order, page, _log_sum(order, head[:8], sums))
        sound = sound and head[8:16] == salt and sums == tuple(expected)
        if not sound:
            lost += bool(commit) and head[8:16] == salt
            continue
        waiting[number] = page
        if commit:
            pages |= waiting
            waiting, length = {}, commit * size
    image = bytearray(database)
    if pages:
        image = image[:length].ljust(length, b"\0")
        for number, page in pages.items():
            image[(number - 1) * size : number * size] = page
        del image[length:]
    return image, "a part of its log is damaged" if lost > 1 else ""


def _log_sum(order: str, data: bytes, sums: tuple[int, int]) -> tuple[int, int]:
    first, second = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second


# -- a new one in its place ----------------------------------------------------------------------------------------


def fill(database: sqlite3.Connection, found: Found) -> None:
    """Make the tables of this version in an empty database, with all of `found`. The caller commits."""
    for table in _TABLES.values():
        database.execute(table)
    rows: list[Row] = [*found.jobs, *found.files, *found.images]
    for row in rows:
        database.execute(*put(row))
    database.execute(f"PRAGMA user_version={VERSION}")


def replace_with(path: Path, found: Found) -> Path:
    """Move the database at `path` to quarantine and put one with all of `found` in its place; returns the folder.

    The new one is complete on disk before the old one is moved. Raises OSError; then the old one may be tried again.
    """
    with contextlib.closing(sqlite3.connect(":memory:")) as memory:
        fill(memory, found)
        memory.commit()
        image = memory.serialize()
    draft = _beside(path, ".draft")
    with draft.open("wb") as file:
        file.write(image)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(_beside(path, ".new"))
    _sync(path.parent)
    quarantined = finish_replacing(path)
    assert quarantined is not None  # noqa: S101 - there is a new one: it was made just now
    return quarantined


def finish_replacing(path: Path) -> Path | None:
    """Carry out a replacement whose new file is complete; returns where the old one lies, or None: there was none."""
    new = _beside(path, ".new")
    if not new.exists():
        return None
    folder = path.parent / "quarantine"
    folder.mkdir(mode=0o700, exist_ok=True)
    folder /= f"journal-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    folder.mkdir(mode=0o700)
    for part in _PARTS:
        with contextlib.suppress(FileNotFoundError):
            _beside(path, part).rename(folder / f"{path.name}{part}")
    _sync(folder)
    new.rename(path)
    _sync(path.parent)
    return folder


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
