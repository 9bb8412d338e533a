"""Files below a directory that somebody hostile may have filled, touched through directory descriptors only.

A job writes what it likes into its directory: links to /etc/shadow, FIFOs, devices, a million folders. So no path is
ever given to the kernel as a whole: each step opens one name relative to an open directory, never following a link
(FAULTS.md T1, T4, T5), and nothing but regular files on the same filesystem is read. Used by workspace and staging.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from jobfetcher.core.run import Taken
from jobfetcher.pinned import is_pinned

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: O_NONBLOCK: opening a FIFO must not wait for a writer (FAULTS.md F11).
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

#: What opening says where something else is now: a folder on the way that is none, a link, a socket.
_REPLACED = frozenset({errno.ENOTDIR, errno.ELOOP, errno.ENXIO})

#: Deeper folders are reported and not entered: every level costs a descriptor.
MAX_DEPTH = 100

#: Unit of st_blocks in bytes, whatever the filesystem's own blocks are (stat(3type)).
_BLOCK = 512

#: A walk keeps the names of so many folders of one folder; where there are more, it reads that folder twice. With
#: names of 255 bytes, which take 600 bytes of memory at most, on MAX_DEPTH levels that is 30 MB.
_FEW = 500

#: Of so many folders that lie a multiple of MAX_DEPTH deep the size of what is below is found out, at 1.5 KB each; and
#: so many steps are gone in all to open them again, of some microseconds each. Both are bounds against a tree that was
#: made to be dear.
_MOST_WAITING, _MOST_STEPS = 10_000, 1_000_000


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file: its path below the root, and what the walk saw of it."""

    parts: tuple[str, ...]
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that is not sent, and why."""

    parts: tuple[str, ...]
    why: str


class Changed(OSError):
    """Something else is where a file was, or the file is not what it was."""

    def __init__(self, parts: Sequence[str], why: str) -> None:
        super().__init__(errno.ESTALE, f"{'/'.join(parts)} {why}")


@contextmanager
def opened(root: Path, parts: Sequence[str] = (), *, create: bool = False) -> Iterator[int]:
    """A descriptor of the directory `root/parts...`; `create` makes the missing ones (mode 0777, see workspace)."""
    here = _open_root(root)
    try:
        for part in parts:
            made = create and _make(here, part)
            deeper = os.open(part, _DIR, dir_fd=here)
            os.close(here)
            here = deeper
            if made:
                # The umask cut the mode; the job may run as any user and must be able to write here.
                os.fchmod(here, 0o777)
        yield here
    finally:
        os.close(here)


def _open_root(root: Path) -> int:
    try:
        return os.open(root, _DIR)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENOTDIR} and is_pinned(root):
            return os.open(f"{root}/.", _DIR)  # the name of an open directory is a link, if one that is like no other
        raise


def place(source: Path, root: Path, parts: Sequence[str]) -> None:
    """Move the file `source` to `root/parts...`, making folders; atomic, never through a link."""
    source.chmod(0o666)  # below the worker's own 0700 directory; the job may run as any user
    with opened(root, parts[:-1], create=True) as folder:
        os.rename(source, parts[-1], dst_dir_fd=folder)


def link(file: BinaryIO, root: Path, parts: Sequence[str]) -> None:
    """Give an open file one more name, `root/parts...`, and the owner and mode that `place` leaves it with.

    By descriptor, so that it is the file that was read. Raises OSError, also where a filesystem knows no hard links.
    """
    os.fchown(file.fileno(), os.geteuid(), os.getegid())  # the job may have given it away
    os.fchmod(file.fileno(), 0o666)
    with opened(root, parts[:-1], create=True) as folder:
        os.link(f"/proc/self/fd/{file.fileno()}", parts[-1], dst_dir_fd=folder, follow_symlinks=True)


def open_file(root: Path, parts: Sequence[str]) -> BinaryIO:
    """The regular file `root/parts...`, for reading. Raises Changed if that is something else, or OSError."""
    with Reader(root) as reader:
        return os.fdopen(reader.open(parts), "rb", buffering=0)


class Reader:
    """Opens files below `root`; a context manager. From any thread.

    The folder of the last one stays open: a walk finds folder after folder, and two more system calls for each step of
    the path are as much work as the rest of a small file's reading. To leave waits for nobody, not even for one who
    hangs on a disk.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._parts: Sequence[str] = ()
        self._folder = -1
        self._closed = False

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._tidy()

    def open(self, parts: Sequence[str]) -> int:
        """A descriptor of the regular file `root/parts...`. Raises Changed if that is something else, or OSError."""
        return self._open(parts, None)

    def reopen(self, found: Found) -> int:
        """A descriptor of what a walk found. Raises Changed if it is not that any more, or OSError."""
        return self._open(found.parts, found)

    def _open(self, parts: Sequence[str], found: Found | None) -> int:
        try:
            with self._lock:
                file = self._open_in_folder(parts)
        except OSError as error:
            if error.errno in _REPLACED:
                raise Changed(parts, "is not a file any more") from error
            raise
        finally:
            if self._closed:
                self._tidy()
        try:
            now = os.fstat(file)
            if not stat.S_ISREG(now.st_mode):
                raise Changed(parts, "is not a file any more")
            if found is not None and (now.st_size != found.size or now.st_mtime_ns != found.mtime_ns):
                raise Changed(parts, "was written to")
        except BaseException:
            os.close(file)
            raise
        return file

    def _open_in_folder(self, parts: Sequence[str]) -> int:
        if self._closed:  # a number that was closed may be another folder's by now
            raise OSError(errno.EBADF, "nothing is read there any more")
        if self._folder >= 0 and parts[:-1] == self._parts:
            with contextlib.suppress(OSError):  # there may be another folder of that name by now
                return os.open(parts[-1], _FILE, dir_fd=self._folder)
        self._leave()
        with opened(self._root, parts[:-1]) as folder:
            self._folder, self._parts = os.dup(folder), parts[:-1]
        return os.open(parts[-1], _FILE, dir_fd=self._folder)

    def _tidy(self) -> None:
        """Close the folder, unless somebody is just opening a file in it: who does it then."""
        if self._lock.acquire(blocking=False):
            try:
                self._leave()
            finally:
                self._lock.release()

    def _leave(self) -> None:
        folder, self._folder = self._folder, -1
        if folder >= 0:
            os.close(folder)


def walk(root: Path, start: Sequence[str]) -> Iterator[Found | Skipped]:
    """Every regular file below `root/start`, folder by folder, and what was skipped with the reason.

    Streams: one open directory and a few names of its subfolders per level, never a list of files. A start that is
    missing yields nothing; a start that is itself a regular file yields that file. Raises PermissionError where we may
    not look.
    """
    if not start:
        with opened(root) as folder:
            yield from _walk(folder, (), os.fstat(folder).st_dev)
        return
    try:
        with opened(root, start[:-1]) as parent:
            device = os.fstat(parent).st_dev
            os.stat(start[-1], dir_fd=parent, follow_symlinks=False)  # only a missing start may end the walk
            yield from _entry(parent, start[-1], tuple(start[:-1]), device)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        yield Skipped(tuple(start), "one of its folders is a link or a file")


def is_there(root: Path, parts: Sequence[str]) -> bool:
    """Whether something is at `root/parts...`, whatever it is; also where a folder on the way is something else."""
    try:
        with opened(root, parts[:-1]) as folder:
            os.stat(parts[-1] if parts else ".", dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _walk(folder: int, parts: tuple[str, ...], device: int) -> Iterator[Found | Skipped]:
    folders: list[str] = []
    count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                yield from _entry(folder, entry.name, parts, device)
                continue
            count += 1
            if count <= _FEW:
                folders.append(entry.name)
    if count <= _FEW:
        for name in folders:
            yield from _entry(folder, name, parts, device)
        return
    folders.clear()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _entry(folder, entry.name, parts, device)


def _entry(folder: int, name: str, parts: tuple[str, ...], device: int) -> Iterator[Found | Skipped]:
    here = (*parts, name)
    try:
        seen = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        yield Skipped(here, "disappeared while its folder was read")
        return
    mode = seen.st_mode
    if seen.st_dev != device:
        yield Skipped(here, "is on another filesystem")
    elif stat.S_ISREG(mode):
        yield Found(here, seen.st_size, seen.st_mtime_ns)
    elif stat.S_ISDIR(mode):
        if len(here) > MAX_DEPTH:
            yield Skipped(here, f"is more than {MAX_DEPTH} folders deep")
            return
        try:
            inner = os.open(name, _DIR, dir_fd=folder)
        except (NotADirectoryError, FileNotFoundError):
            yield Skipped(here, "changed while it was read")
            return
        try:
            yield from _walk(inner, here, device)
        finally:
            os.close(inner)
    else:
        yield Skipped(here, f"is a {_kind(mode)}, not a file")


def disk_usage(root: Path) -> int:
    """The bytes of `taken`."""
    return taken(root).bytes


def taken(root: Path, within_s: float = math.inf) -> Taken:
    """What everything below `root` takes on its disk; nothing if it is not there.

    A hard-linked file counts once, because each of its names counts in part. For a tree that changes meanwhile it is
    what was seen. Not seen: what only its owner may look into, unless we are root, files without any name, and what
    lies deeper than anybody needs (_MOST_STEPS). After `within_s` seconds it is what was counted so far.
    """
    usage, steps = _Usage(time.monotonic() + within_s), 0
    while usage.waiting and steps <= _MOST_STEPS and not usage.over:
        start = usage.waiting.pop()
        steps += start.depth
        try:
            with opened(root, start.path()) as folder:
                _count(folder, start, (), os.fstat(folder).st_dev, usage)
        except OSError:
            continue  # gone, or something else by now
    return Taken(round(usage.bytes), round(usage.inodes))


@dataclass(frozen=True, slots=True)
class _Deep:
    """A folder that lies a multiple of MAX_DEPTH deep: the way to it from the last one of that kind, which all that lie
    below that one share."""

    above: _Deep | None
    parts: tuple[str, ...]
    depth: int

    def path(self) -> list[str]:
        """The way from the root."""
        ways: list[tuple[str, ...]] = []
        here: _Deep | None = self
        while here is not None:
            ways.append(here.parts)
            here = here.above
        return [part for parts in reversed(ways) for part in parts]


@dataclass(slots=True)
class _Usage:
    """A count on its way: its deadline, what it has, and the folders that wait to be opened from the root."""

    deadline: float
    bytes: float = 0.0
    inodes: float = 0.0
    waiting: list[_Deep] = field(default_factory=lambda: [_Deep(None, (), 0)])

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline


def _count(folder: int, start: _Deep, parts: tuple[str, ...], device: int, usage: _Usage) -> None:
    """Count the folder at `parts` below `start`; every MAX_DEPTH levels its subfolders wait to be opened from the root,
    to save descriptors."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if usage.over:
                return
            try:
                seen = entry.stat(follow_symlinks=False)
                if seen.st_dev != device:
                    continue
                is_folder = stat.S_ISDIR(seen.st_mode)
                names = 1 if is_folder else max(1, seen.st_nlink)
                usage.bytes += seen.st_blocks * _BLOCK / names
                usage.inodes += 1 / names
                if not is_folder:
                    continue
                here = (*parts, entry.name)
                if len(here) < MAX_DEPTH:
                    inner = os.open(entry.name, _DIR, dir_fd=folder)
                    try:
                        _count(inner, start, here, device, usage)
                    finally:
                        os.close(inner)
                elif len(usage.waiting) < _MOST_WAITING:
                    usage.waiting.append(_Deep(start, here, start.depth + len(here)))
            except OSError:
                continue


def remove(parent: Path, name: str) -> None:
    """Delete `parent/name` and everything below it, never following a link or entering a mount point.

    Missing is fine. Raises OSError for what could not be deleted, after deleting all that could, and ValueError for a
    `name` that is more than one name: the kernel would take `/etc` or `..` for a place outside `parent`.
    """
    if name in {"", ".", ".."} or "/" in name:
        raise ValueError(f"not the name of something in {parent}: {name[:80]!r}")
    with opened(parent) as folder:
        mount = _mount_id(folder)
        removal = _Removal(folder, name, mount)
        problem = _remove(folder, name, 0, removal)
        while removal.has_moved:  # found by their names: a list of them might be long
            removal.has_moved = False
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(removal.moved):
                        problem = _remove(folder, entry.name, 0, removal) or problem
    if problem is not None:
        raise problem


@dataclass(slots=True)
class _Removal:
    """One removal of `name` in `top`. Folders nested too deeply are moved to `top`, under names that begin with
    `moved`, and `has_moved` says that there may be such."""

    top: int
    name: str
    mount: int
    has_moved: bool = False

    @property
    def moved(self) -> str:
        return f"{self.name}.deep"


def _remove(folder: int, name: str, depth: int, removal: _Removal) -> OSError | None:
    """The first problem met, or None. One descriptor per level, MAX_DEPTH levels at once."""
    try:
        seen = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISDIR(seen.st_mode):
            os.unlink(name, dir_fd=folder)
            return None
        if depth > MAX_DEPTH:
            os.rename(name, f"{removal.moved}{seen.st_ino}", src_dir_fd=folder, dst_dir_fd=removal.top)
            removal.has_moved = True
            return None
        inner = os.open(name, _DIR, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    problem: OSError | None = None
    try:
        if _mount_id(inner) != removal.mount:
            return OSError(f"{name} is a mount point; it is left alone")
        with os.scandir(inner) as entries:
            for entry in entries:
                problem = _remove(inner, entry.name, depth + 1, removal) or problem
    except OSError as error:
        problem = error
    finally:
        os.close(inner)
    try:
        os.rmdir(name, dir_fd=folder)
    except OSError as error:
        return problem or error
    return problem


def _mount_id(descriptor: int) -> int:
    """The mount that an open file lies on (proc(5)). Unlike st_dev it tells a bind mount of the same disk, too."""
    with open(f"/proc/self/fdinfo/{descriptor}") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))


def _make(folder: int, name: str) -> bool:
    """Make a folder; False if something of that name is there already."""
    try:
        os.mkdir(name, dir_fd=folder)
    except FileExistsError:
        return False
    return True


def _kind(mode: int) -> str:
    for test, word in (
        (stat.S_ISLNK, "link"),
        (stat.S_ISFIFO, "FIFO"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISCHR, "character device"),
        (stat.S_ISBLK, "block device"),
    ):
        if test(mode):
            return word
    return "special file"
