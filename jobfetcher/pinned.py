"""Paths below a directory that is held open, which lead there whatever becomes of the directories above it (T26).

Where somebody else owns a directory above PATH_BASE he may rename it at any moment and put his own in its place. So the
worker opens PATH_BASE once and calls it `/proc/self/fd/N` from then on: the kernel goes from the open directory
(proc(5)) and never through the foreign ones again, in every call that takes a path. Below it lie directories of the
worker's own, of mode 0700, in which nobody else can put anything.

SQLite is the one that would undo this: it follows links itself when it opens a database, and keeps the path that it
found. `connect` gives it a file system layer (a VFS, sqlite.org/vfs.html) that is its own in all but that: a path stays
as it was given, for the database and for the log and the index beside it.

Used by tree, trusted, workspace, journal, staging, self_test, refusals and build.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

_PINNED = re.compile(r"/proc/self/fd/\d+")

#: The name of our file system layer, and what SQLite's functions return (sqlite.org/rescode.html).
_VFS, _OK, _CANTOPEN = b"jobfetcher-pinned", 0, 14

_FullPathname = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_char)
)


class _Vfs(ctypes.Structure):
    """struct sqlite3_vfs (sqlite.org/c3ref/vfs.html), version 3; of later ones this is the beginning."""

    _fields_ = (
        ("iVersion", ctypes.c_int),
        ("szOsFile", ctypes.c_int),
        ("mxPathname", ctypes.c_int),
        ("pNext", ctypes.c_void_p),
        ("zName", ctypes.c_char_p),
        ("pAppData", ctypes.c_void_p),
        ("xOpen", ctypes.c_void_p),
        ("xDelete", ctypes.c_void_p),
        ("xAccess", ctypes.c_void_p),
        ("xFullPathname", _FullPathname),
        ("others", ctypes.c_void_p * 12),
    )


def pinned(descriptor: int) -> Path:
    """The path of an open directory, good for as long as it is open."""
    return Path(f"/proc/self/fd/{descriptor}")


def is_pinned(path: Path) -> bool:
    """Whether a path is that of a directory that is held open, or of something right in it."""
    return any(_PINNED.fullmatch(str(place)) for place in (path, path.parent))


def shown(text: object) -> str:
    """`text` for people: in place of each directory that is held open, where it lies now."""

    def real(found: re.Match[str]) -> str:
        try:
            return str(Path(found[0]).readlink())
        except OSError:
            return found[0]

    return _PINNED.sub(real, str(text))


def connect(path: Path) -> sqlite3.Connection:
    """The database at `path`, pinned or not, for any thread, no transaction begun unasked. Raises sqlite3.Error, and
    OSError where a pinned one cannot be opened without following links."""
    where = f"file:{quote(str(path))}?vfs={_registered()}" if is_pinned(path) else path
    return sqlite3.connect(where, uri=is_pinned(path), isolation_level=None, check_same_thread=False, timeout=10.0)


@functools.cache
def _registered() -> str:
    """The name of our layer, which SQLite knows from now on. Raises OSError where this Python's SQLite is out of
    reach: one that is built into the interpreter, without the names of its functions."""
    import _sqlite3

    library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))  # finds what that module is linked to as well
    try:
        find, register = library.sqlite3_vfs_find, library.sqlite3_vfs_register
    except AttributeError:
        raise OSError("this Python's SQLite cannot be kept from following links") from None
    find.argtypes, find.restype = [ctypes.c_char_p], ctypes.POINTER(_Vfs)
    register.argtypes, register.restype = [ctypes.POINTER(_Vfs), ctypes.c_int], ctypes.c_int
    ours = _Vfs.from_buffer_copy(find(None).contents)
    ours.iVersion = min(ours.iVersion, 3)
    ours.zName, ours.xFullPathname = _VFS, _as_it_is
    if register(ours, 0) != _OK:
        raise OSError("SQLite takes no file system layer of ours")
    _kept.append(ours)
    return _VFS.decode()


def _as_given(_vfs: int, name: bytes, size: int, out: Any) -> int:
    if not name.startswith(b"/") or len(name) >= size:
        return _CANTOPEN
    ctypes.memmove(out, name + b"\0", len(name) + 1)
    return _OK


#: What SQLite holds a pointer to must stay.
_kept: list[_Vfs] = []
_as_it_is = _FullPathname(_as_given)


def names(descriptor: int) -> set[str]:
    """What lies in an open directory."""
    with os.scandir(descriptor) as entries:
        return {entry.name for entry in entries}
