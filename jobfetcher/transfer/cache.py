"""Inputs that are kept for later jobs: bytes on this disk, used again when the store says that they are still right.

Used by `download`: it asks the store with the ETag of what `find` found; at a 304 `take` delivers the bytes, and a file
that had to be fetched is given to `keep`. Who may read an object is decided by the store each time, with the request
that the server signed for this job; the cache only spares the bytes.

One entry is one file, `<sha256 of the key>`: the bytes, and behind them a note of a fixed size (`_Note`). It is written
under another name and renamed, so that bytes and note appear together whatever moment the process is killed at. It is
not synced: after a power cut it may be torn, and is then found out like every damage, since whatever is delivered is
hashed first. When an entry was used last is its mtime. Jobs get a clone or a copy, never a link, since they may write
to what they get; and no job sees the directory itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.ports import Emit
from jobfetcher.core.run import Stored
from jobfetcher.core.urls import SignedRequest, parse_origin
from jobfetcher.pinned import shown

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

#: ioctl_ficlone(2): `_IOW(0x94, 9, int)` as x86 and Arm count it; elsewhere the call fails, and bytes are copied.
_FICLONE = 0x40049409
_BLOCK = 256 * 1024  # so that what was read is still in the processor when it is hashed and written

#: Bytes behind the content. A note has at most 625: 404 of ETag (each `"` and `\\` is two in JSON), 71 of digest, 64 of
#: name, 19 of size, and the field names.
_NOTE_SIZE = 1024

#: Blocks that a filesystem counts for one file that we write, at least; for what is not yet written.
_GRAIN = 4096

#: An entry in the index takes about 200 bytes of memory, so that all of them take 20 MiB at most.
_MOST_ENTRIES = 100_000

#: Evicted at once when the disk is full, at least, in bytes: some filesystems say only after a sync that there is room
#: again, and that is dear.
_EVICT_AT_ONCE = 64 * 1024**2

_NAME = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = "new-"

#: Query parameters that are a signature, if all of the first kind are there; the names are matched as a whole. AWS
#: (Signature Version 4 and 2), Google (V4 and V2), Azure (SAS), and a server that signs by itself, as the mock API.
#: Whatever else is in a query may name another object, so it stays in the key: at worst a file is not found again.
_SIGNATURES: tuple[tuple[frozenset[str], re.Pattern[str]], ...] = tuple(
    (frozenset(marks.split()), re.compile(names))
    for marks, names in (
        ("X-Amz-Signature", r"X-Amz-.+"),
        ("X-Goog-Signature", r"X-Goog-.+"),
        ("AWSAccessKeyId Expires Signature", r"AWSAccessKeyId|Expires|Signature|x-amz-security-token"),
        ("GoogleAccessId Expires Signature", r"GoogleAccessId|Expires|Signature"),
        ("sig sv", r"sig|se|st|sp|sv|sr|sks|skoid|sktid|ske|skt|skv"),
        ("expires signature", r"expires|signature"),
    )
)

_LIBC = ctypes.CDLL(None, use_errno=True)  # Python has no syncfs(2)


class _Note(BaseModel):
    """What is known of the bytes before it. `name` is the entry's own, so that no other entry's note is believed.

    No address is in it, and no part of a signed request but what a hash keeps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    name: str = Field(pattern=r"^[0-9a-f]{64}$")
    etag: str = Field(max_length=202, pattern=r'^"[!#-~]+"$')
    size: int = Field(ge=0, lt=2**63)
    digest: str = Field(pattern=r"^(sha256:[0-9a-f]{64}|md5:[0-9a-f]{32})$")


@dataclass(frozen=True, slots=True)
class Entry:
    """What `find` found: the strong ETag to ask the store with, and how many bytes are here."""

    _note: _Note

    @property
    def etag(self) -> str:
        return self._note.etag

    @property
    def size(self) -> int:
        """In bytes."""
        return self._note.size


class Cache:
    """The entries below `path`, at most `limit_bytes` of disk. May be used from any thread, of one process at a time.

    Nothing is looked at before it is needed; a directory that cannot be used is an empty cache. `room_for(size)` raises
    WorkerFault when so many bytes more would not leave the disk's reserve free. `emit` hears why nothing is kept, once
    while it stays so.
    """

    def __init__(self, path: Path, limit_bytes: int, emit: Emit, *, room_for: Callable[[int], None]) -> None:
        self._path, self._limit, self._emit, self._room_for = path, limit_bytes, emit, room_for
        self._lock = threading.Lock()
        self._sizes: dict[str, int] | None = None  # bytes of disk by name, the one used last at the end
        self._used = 0  # their sum, and what is being written
        self._said: set[str] = set()

    def name(self, request: SignedRequest) -> str:
        """What the object that `request` fetches is called here; empty where it cannot be told."""
        try:
            return _name(request)
        except ValueError:
            return ""

    def takes(self, etag: str, size: int | None) -> bool:
        """Whether an object of that strong ETag (empty: it has none) and size in bytes, as far as known, may be
        kept."""
        return bool(etag) and (size is None or _needed(size) <= self._limit)

    def find(self, request: SignedRequest) -> Entry | None:
        """What is kept of the object that `request` fetches; the store must still say whether it is the same today."""
        try:
            name = _name(request)
            with self._folder() as folder, _opened(name, _FILE, folder) as file:
                note = _read_note(file, name)
        except (OSError, ValueError):
            return None
        return None if note is None else Entry(note)

    def take(
        self, entry: Entry, fd: int, check: Callable[[], None], moved: Callable[[int], None] = lambda _: None
    ) -> str:
        """Put the bytes into the open, empty file `fd`; returns their digest, which was computed from them just now.

        Empty when they are not what was kept, or not there any more: then `fd` is empty again, and a damaged entry is
        gone. `check` is called between blocks and may raise; `fd` is empty then, too. `moved` hears the size of each
        block that is there. Raises WorkerFault(DISK) when `fd` cannot be written.
        """
        note = entry._note
        try:
            with self._folder() as folder, _opened(note.name, _FILE, folder) as file:
                found = _read_note(file, note.name)
                if found == note and _deliver(file, fd, note, check, moved):
                    with contextlib.suppress(OSError):
                        os.utime(file)
                    self._touch(note.name)
                    return note.digest
                if found in {note, None}:  # else another one has taken its place meanwhile
                    self._drop(note.name, file)
        except OSError:
            pass  # evicted meanwhile
        _empty(fd)
        return ""

    def keep(
        self, request: SignedRequest, part: Path, stored: Stored, *, check: Callable[[], None] = lambda: None
    ) -> None:
        """Store a verified file that no job can write to yet. Never raises, but for what `check` raises.

        The job goes on whatever happens here. `check` is called between blocks of a copy.
        """
        try:
            note = _Note(name=_name(request), etag=stored.etag, size=stored.size, digest=stored.digest)
        except ValueError:  # no strong ETag: nothing to ask the store with
            return
        try:
            with self._folder(create=True) as folder:
                if not self._has(note, folder):
                    self._store(note, part, folder, check)
        except OSError as error:
            self._say("disk", f"inputs are not kept for later jobs: {shown(self._path)}: {error.strerror}")
        except WorkerFault as fault:
            self._say("room", f"inputs are not kept for later jobs: {fault}")

    def make_room(self, size: int) -> None:
        """Let entries go, the longest unused first, until `room_for(size)` is content; else raise what it raises."""
        while (fault := self._lacks(size)) is not None:
            if not self._evict(max(size // 8, _EVICT_AT_ONCE)):
                raise fault
            if self._lacks(size) is not None:
                with contextlib.suppress(OSError), self._folder() as folder:
                    _LIBC.syncfs(folder)  # btrfs counts the blocks as free only now

    # -- files ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _folder(self, *, create: bool = False) -> Iterator[int]:
        if create:
            self._path.mkdir(mode=0o700, exist_ok=True)
        with _opened(self._path, _DIR) as folder:
            if create:
                os.fchmod(folder, 0o700)
            yield folder

    def _has(self, note: _Note, folder: int) -> bool:
        """Whether the very same is kept already, perhaps by a job that fetched it at the same time."""
        try:
            with _opened(note.name, _FILE, folder) as file:
                return _read_note(file, note.name) == note
        except OSError:
            return False

    def _store(self, note: _Note, part: Path, folder: int, check: Callable[[], None]) -> None:
        needed = _needed(note.size)
        if needed > self._limit:
            message = f"an input of {note.size / 2**20:.0f} MiB is larger than CACHE_SIZE and not kept for later jobs"
            return self._say("large", message)
        if not self._reserve(needed, folder):
            return None
        unfinished = _UNFINISHED + secrets.token_hex(16)
        try:
            with _opened(part, _FILE) as source, _opened(unfinished, _NEW, folder) as file:
                if os.fstat(source).st_size != note.size:
                    raise OSError(errno.EIO, f"{part.name} is not as long as it was")
                if not _clone(source, file):
                    self.make_room(needed)  # a clone takes no room
                    for at, block in _blocks(source, note.size, check):
                        _write(file, block, at)
                _write(file, note.model_dump_json().encode().ljust(_NOTE_SIZE), note.size)
                self._put(note.name, unfinished, _taken(os.fstat(file)), folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished, dir_fd=folder)
            raise
        finally:
            self._give_back(needed)
        with self._lock:
            self._said -= {"disk", "room"}
        return None

    def _say(self, what: str, message: str) -> None:
        with self._lock:
            new = what not in self._said
            self._said.add(what)
        if new:
            self._emit("cache_not_used", level="warning", message=message)

    # -- how much there is ---------------------------------------------------------------------------------------------

    def _index(self, folder: int) -> dict[str, int]:
        """The entries by last use. Read once, with the lock held; what a killed process left is cleared away."""
        if self._sizes is None:
            found: list[tuple[int, str, int]] = []
            with os.scandir(folder) as names:
                for name in names:
                    if name.name.startswith(_UNFINISHED):
                        with contextlib.suppress(OSError):
                            os.unlink(name.name, dir_fd=folder)
                    elif _NAME.fullmatch(name.name):
                        seen = name.stat(follow_symlinks=False)
                        found.append((seen.st_mtime_ns, name.name, _taken(seen)))
            self._sizes = {name: size for _, name, size in sorted(found)}
            self._used += sum(self._sizes.values())
        return self._sizes

    def _reserve(self, size: int, folder: int) -> bool:
        """Count `size` bytes as used, and let others go for them; whether there was room for them."""
        with self._lock:
            sizes = self._index(folder)
            while sizes and (self._used + size > self._limit or len(sizes) >= _MOST_ENTRIES):
                self._remove_oldest(sizes, folder)
            if self._used + size > self._limit:
                return False  # all of it is being written by others
            self._used += size
            return True

    def _give_back(self, size: int) -> None:
        with self._lock:
            self._used -= size

    def _put(self, name: str, unfinished: str, taken: int, folder: int) -> None:
        with self._lock:
            sizes = self._index(folder)
            os.rename(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
            self._used += taken - sizes.pop(name, 0)
            sizes[name] = taken

    def _touch(self, name: str) -> None:
        with self._lock:
            if self._sizes is not None and name in self._sizes:
                self._sizes[name] = self._sizes.pop(name)

    def _drop(self, name: str, file: int) -> None:
        """Remove an entry, if the open `file` is still it."""
        with self._lock, self._folder() as folder:
            if os.path.samestat(os.stat(name, dir_fd=folder, follow_symlinks=False), os.fstat(file)):
                os.unlink(name, dir_fd=folder)
                if self._sizes is not None:
                    self._used -= self._sizes.pop(name, 0)

    def _lacks(self, size: int) -> WorkerFault | None:
        try:
            self._room_for(size)
        except WorkerFault as fault:
            return fault
        return None

    def _evict(self, size: int) -> bool:
        """Remove entries of so many bytes, or all; whether there was any."""
        try:
            with self._lock, self._folder() as folder:
                sizes = self._index(folder)
                before, least = len(sizes), self._used - size
                while sizes and self._used > least:
                    self._remove_oldest(sizes, folder)
                return bool(before)
        except OSError:
            return False

    def _remove_oldest(self, sizes: dict[str, int], folder: int) -> None:
        # A job that is just taking it has it open, and reads on.
        name = next(iter(sizes))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        self._used -= sizes.pop(name)


def clear(path: Path) -> None:
    """Remove what a worker with a cache left at `path`, for one that has none (CACHE_SIZE=0); errors are left be."""
    with contextlib.suppress(OSError):
        with _opened(path, _DIR) as folder, os.scandir(folder) as names:
            for name in names:
                if _NAME.fullmatch(name.name) or name.name.startswith(_UNFINISHED):
                    os.unlink(name.name, dir_fd=folder)
        path.rmdir()


def _name(request: SignedRequest) -> str:
    """The name of the entry of an object: a hash of its address without the signature. ValueError if it has none.

    Headers are not in it: what another header would select at the same address has another strong ETag (RFC 9110,
    8.8.3), and so is not taken for this one.
    """
    origin, parts = parse_origin(request.url), urlsplit(request.url)
    pairs = parts.query.split("&")
    names = [unquote(pair.partition("=")[0]) for pair in pairs]
    signed = [pattern for marks, pattern in _SIGNATURES if marks <= set(names)]
    kept = [
        pair for pair, name in zip(pairs, names, strict=True) if not any(pattern.fullmatch(name) for pattern in signed)
    ]
    key = f"{origin.scheme}://{origin.host}:{origin.port}{parts.path}?{'&'.join(kept)}"
    return hashlib.sha256(key.encode()).hexdigest()


@contextlib.contextmanager
def _opened(name: str | Path, flags: int, folder: int | None = None) -> Iterator[int]:
    descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_note(file: int, name: str) -> _Note | None:
    """The note of an entry; None if it is no sound one of that name."""
    seen = os.fstat(file)
    if not stat.S_ISREG(seen.st_mode) or seen.st_size < _NOTE_SIZE:
        return None
    try:
        note = _Note.model_validate_json(os.pread(file, _NOTE_SIZE, seen.st_size - _NOTE_SIZE))
    except ValidationError:
        return None
    return note if note.name == name and note.size == seen.st_size - _NOTE_SIZE else None


def _deliver(file: int, fd: int, note: _Note, check: Callable[[], None], moved: Callable[[int], None]) -> bool:
    """Bring the bytes into `fd` and hash them on the way; whether they are what was kept."""
    hasher = hashlib.new(note.digest.partition(":")[0], usedforsecurity=False)
    try:
        cloned = _clone(file, fd)
        if cloned:
            _cut(fd, note.size)
        try:
            for at, block in _blocks(fd if cloned else file, note.size, check):
                hasher.update(block)
                if not cloned:
                    _write_part(fd, block, at)
                moved(len(block))
        except OSError:  # the entry cannot be read
            return False
    except BaseException:
        _empty(fd)
        raise
    return hasher.hexdigest() == note.digest.partition(":")[2]


def _blocks(file: int, size: int, check: Callable[[], None]) -> Iterator[tuple[int, memoryview]]:
    """The first `size` bytes in pieces, each with its offset; a piece is good until the next. OSError if they end."""
    buffer = memoryview(bytearray(min(_BLOCK, max(size, 1))))
    at = 0
    while at < size:
        check()
        count = os.preadv(file, [buffer[: min(_BLOCK, size - at)]], at)
        if not count:
            raise OSError(errno.EIO, "the file is shorter than it was")
        yield at, buffer[:count]
        at += count


def _clone(source: int, target: int) -> bool:
    """Let `target` share the blocks of `source` until one is written to; False where that cannot be had."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _write(file: int, data: bytes | memoryview, at: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(file, left, at)
        left, at = left[written:], at + written


def _write_part(fd: int, data: memoryview, at: int) -> None:
    try:
        _write(fd, data, at)
    except OSError as error:
        raise _disk(error) from error


def _cut(fd: int, size: int) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise _disk(error) from error


def _empty(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)


def _disk(error: OSError) -> WorkerFault:
    return WorkerFault(WorkerReason.DISK, f"an input from the cache could not be written: {error.strerror}")


def _needed(size: int) -> int:
    """Bytes of disk for an entry of that size, at least."""
    return -(-(size + _NOTE_SIZE) // _GRAIN) * _GRAIN


def _taken(seen: os.stat_result) -> int:
    return seen.st_blocks * 512  # the unit of st_blocks, whatever the filesystem's own (stat(3type))
