"""The SQLite file: its connections, its transactions, and whether it is one of ours. `store` is what is in it."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mock_api.tables import TABLES, VERSION


class Database:
    """The database at `path`, made if there is none. One connection writes, another reads what may be long.

    Raises `ValueError` when the file was made by something else, or by another version of this server.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = _connect(path)
        self._reading = threading.Lock()
        self._reader = _connect(path)
        try:
            [version] = self._db.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError as error:
            self.close()
            raise ValueError(f"{path} is no database of this server: {error}") from None
        if version != VERSION and self._db.execute("SELECT * FROM sqlite_master").fetchone():
            self.close()
            raise ValueError(f"{path} was made by another version of this server: delete it, or name another data_dir")
        for connection in (self._db, self._reader):
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=OFF")
        self._db.executescript(f"{TABLES} PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        """Close all connections."""
        with self._reading:
            self._reader.close()
        with self._lock:
            self._db.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, with the lock held. A single statement needs none: it is one by itself."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


def _connect(path: Path) -> sqlite3.Connection:
    """Survive a kill of the server, not a power cut: that is what a test server needs, and it commits in 0.03 ms."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    return connection
