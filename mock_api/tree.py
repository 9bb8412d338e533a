"""Objects as plain files below one directory, so that people can look at them; stored atomically, with MD5 and traffic.

Empty components of a key (`a//b`) vanish, as they do on any file system. Used by the storages and the storage routes.
"""

import hashlib
import secrets
import stat
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mock_api.storage import StorageError, parts_of
from mock_api.store import Store

PIECE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class StoredObject:
    """An object as it is now."""

    key: str
    path: Path
    size: int
    mtime: float
    md5: str


class Tree:
    """The files below `root/files`, and half-sent ones below `root/parts`. Thread-safe."""

    def __init__(self, root: Path, store: Store) -> None:
        self._files = root / "files"
        self._parts = root / "parts"
        self._store = store
        self._traffic: dict[str, dict[str, int]] = defaultdict(
            lambda: {"gets": 0, "unchanged": 0, "sent": 0, "puts": 0}
        )
        self._lock = threading.Lock()
        self._files.mkdir(parents=True, exist_ok=True)
        self._parts.mkdir(exist_ok=True)
        for left_over in self._parts.iterdir():  # of a server that was killed
            left_over.unlink()

    def new_part(self) -> Path:
        """The name of a file that does not exist yet, on the file system of the objects."""
        return self._parts / secrets.token_hex(16)

    def adopt(self, part: Path, key: str, md5: str) -> None:
        """Move a finished file to its place, over what was there. `StorageError` when it cannot have that name."""
        path = self._path(key)
        status = part.stat()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.replace(path)
        except OSError as error:
            raise StorageError(
                400, "InvalidArgument", f"the key cannot be a file name here: {error.strerror}"
            ) from error
        self._store.put_md5(key, status.st_size, status.st_mtime_ns, md5)
        self.count(key, "puts")

    def known(self, key: str) -> StoredObject | None:
        """The object of that key, at once; None when there is none or it must be hashed first."""
        path = self._path(key)
        try:
            status = path.stat()
        except OSError:  # no such file, or a name too long for a file system
            return None
        md5 = self._store.md5(key, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
        return None if md5 is None else StoredObject(key, path, status.st_size, status.st_mtime, md5)

    def find(self, key: str) -> StoredObject | None:
        """The object of that key, hashed if it was put there by other hands."""
        path = self._path(key)
        try:
            if not path.is_file():
                return None
            status = path.stat()
            with path.open("rb") as file:
                md5 = hashlib.file_digest(file, _md5).hexdigest()
        except OSError:  # a name too long for a file system names nothing
            return None
        self._store.put_md5(key, status.st_size, status.st_mtime_ns, md5)
        return StoredObject(key, path, status.st_size, status.st_mtime, md5)

    def exists(self, key: str) -> bool:
        """Whether there is an object, or a folder, of that very name."""
        try:
            return self._path(key).exists()
        except OSError:  # a name too long for a file system
            return False

    def has_prefix(self, key: str) -> bool:
        """Whether any object's key starts with `key`."""
        try:
            *folder, start = parts_of(key) or [""]
        except StorageError:
            return False
        top = self._files.joinpath(*folder)
        try:
            return (top / start).exists() or any(entry.name.startswith(start) for entry in top.iterdir())
        except OSError:  # no such directory, or a name too long for one
            return False

    def names(self, folder: str) -> list[str]:
        """Every object below `folder`, its name relative to it, sorted."""
        top = self._path(folder)
        return sorted(path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file())

    def place(self, key: str) -> Path:
        """Where the object of that key lies, if there is one."""
        return self._path(key)

    def read(self, key: str) -> Iterator[bytes] | None:
        """The object's content in pieces."""
        try:
            return _pieces(self._path(key).open("rb"))
        except OSError:  # no such file, a directory, or a name too long for one
            return None

    def count(self, key: str, what: str, amount: int = 1) -> None:
        """Add to the traffic of an object: `gets` (requests that got bytes of it), `unchanged` (requests that got a 304
        instead), `sent` (bytes), `puts` (times stored)."""
        with self._lock:
            self._traffic[key][what] += amount

    def traffic(self) -> dict[str, dict[str, int]]:
        """The traffic of every object since the server started."""
        with self._lock:
            return {key: dict(counts) for key, counts in self._traffic.items()}

    def _path(self, key: str) -> Path:
        return self._files.joinpath(*parts_of(key))


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _md5() -> "hashlib._Hash":
    return hashlib.md5(usedforsecurity=False)
