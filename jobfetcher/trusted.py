"""The way to PATH_BASE, opened step by step, and who could change it (FAULTS.md T21, T26).

Whoever owns a directory, or may write to it, may rename what is in it and put his own in its place, at any moment. So:

- Each step is opened relative to the one before, no link followed unknowingly; what is missing is made there.
- A link on the way may be root's or the worker's user's own (/home on another disk, say), and is followed once.
- A directory above that everybody or a group may write to is refused, unless it is sticky as the system's temporary
  one is: then nobody but its owner can rename what is ours there.
- A directory above that belongs to another user is named in `Way.foreign`: then PATH_BASE is held open, and called by
  that from then on (pinned.py).
- PATH_BASE itself is ours in the end. Root takes one that is empty or holds nothing but a worker's things; beside other
  things of another user it makes a directory of its own, SUBFOLDER. What lies there of a worker's is ours, or refused.

Used by workspace.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobfetcher.core.errors import ConfigError
from jobfetcher.pinned import names, pinned, shown

_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

#: All that a worker makes in PATH_BASE: a directory with nothing else in it is ours alone.
OURS = {"lock", "jobs", "cache", "proof", "quarantine", "journal.ballast", "refused.json", "refused.json.new"}
OURS |= {"nonces.jsonl", "nonces.jsonl.new", "sign-in.json", "sign-in.json.new"}
OURS |= {f"journal.db{part}" for part in ("", "-wal", "-shm", "-journal", ".new", ".draft")}

#: The directory that root makes in one that is another user's and has other things in it.
SUBFOLDER = "jobfetcher"

#: As many links may lie on the way (path_resolution(7)).
_MOST_LINKS = 40


@dataclass(frozen=True, slots=True)
class Way:
    """A directory that is there: its path without links, and an open descriptor of it, which is the caller's to close.

    `foreign`: a directory above it that belongs to another user, and to whom, for a sentence; else empty.
    """

    real: Path
    descriptor: int
    foreign: str

    @property
    def path(self) -> Path:
        """What leads there whatever others do: the real path where they can do nothing."""
        return pinned(self.descriptor) if self.foreign else self.real


def check(path: Path) -> None:
    """Raise ConfigError where PATH_BASE must not lie. Makes nothing. Raises OSError for what cannot be looked at."""
    steps = _Steps(make=False)
    try:
        is_there = steps.go(path)
    finally:
        steps.close()
    if is_there:
        steps.seen.pop()  # its own mode can be mended
    steps.judge()


def claim(path: Path) -> Way:
    """Make PATH_BASE where it is missing, see to it that it is ours, and open it. Raises ConfigError and OSError."""
    steps = _Steps(make=True)
    try:
        steps.go(path)
        above = steps.seen.pop()
        foreign = steps.judge()
        if above.owner == os.geteuid() or _takes(steps.here, steps.real):
            base = os.open(".", _DIR, dir_fd=steps.here)
            real = steps.real
        else:
            foreign = foreign or f"{steps.real} belongs to {user(above.owner)}"
            _refuse_earlier(steps.here, steps.real, above.owner)
            base, real = _make(SUBFOLDER, steps.here), steps.real / SUBFOLDER
    finally:
        steps.close()
    with _closed_on_error(base):
        _make_private(base, real)
        _check_content(base, real)
        return Way(real, base, foreign)


@contextmanager
def followed(path: Path) -> Iterator[int]:
    """A descriptor of what lies now at a path that has no links: one on the way is refused. Raises OSError."""
    here = os.open("/", _STEP)
    try:
        for part in path.parts[1:]:
            deeper = os.open(part, _STEP | os.O_DIRECTORY, dir_fd=here)
            os.close(here)
            here = deeper
        yield here
    finally:
        os.close(here)


def mounted(descriptor: int) -> str:
    """What is mounted where an open directory lies, as its path on its disk (proc(5), mountinfo, "root"): `/` for a
    plain disk. A bind mount, such as of a container's volume, shows here where its directory is now."""
    with open(f"/proc/self/fdinfo/{descriptor}") as lines:
        number = next(line.split()[1] for line in lines if line.startswith("mnt_id:"))
    with open("/proc/self/mountinfo", errors="replace") as mounts:
        return next((line.split()[3] for line in mounts if line.split(maxsplit=1)[0] == number), "/")


def user(number: int) -> str:
    """A user's name, or the number of one that has none here."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


@dataclass(frozen=True, slots=True)
class _Seen:
    folder: Path
    owner: int
    group: int
    mode: int


class _Steps:
    """A walk from / to a directory; `here` is an O_PATH descriptor of where it is, `seen` what it came through."""

    def __init__(self, *, make: bool) -> None:
        self._make = make
        self._root()

    def _root(self) -> None:
        self.here, self.real, self.seen = os.open("/", _STEP), Path("/"), list[_Seen]()
        self._note()

    def close(self) -> None:
        os.close(self.here)

    def go(self, path: Path) -> bool:
        """Walk there; False where it is not there. Raises ConfigError and OSError."""
        todo = [*reversed(path.absolute().parts[1:])]
        links: list[tuple[int, Path, str]] = []  # how many steps were left behind a link's own
        seen: list[_Seen] = []
        count = 0
        while todo:
            name = todo.pop()
            try:
                deeper = self._open(name)
            except FileNotFoundError:
                for left, link, to in links:
                    if len(todo) >= left:
                        raise ConfigError(f"PATH_BASE: {link} is a link to {to}, which is not there") from None
                if not self._make:
                    self.seen = seen + self.seen
                    return False
                deeper = _make(name, self.here)
            if (target := self._target(deeper, name)) is None:
                self._enter(deeper, name)
                continue
            count += 1
            if count > _MOST_LINKS:
                raise ConfigError(f"PATH_BASE: {path} leads through more than {_MOST_LINKS} links")
            links.append((len(todo), self.real / name, target))
            todo += reversed([part for part in Path(target).parts if part != "/"])
            if target.startswith("/"):
                seen += self.seen
                self.close()
                self._root()
        self.seen = seen + self.seen
        return True

    def _open(self, name: str) -> int:
        return os.open(name, _STEP, dir_fd=self.here)

    def _target(self, deeper: int, name: str) -> str | None:
        """Where a link leads; None for what is none. Closes the link."""
        now = os.fstat(deeper)
        if not stat.S_ISLNK(now.st_mode):
            return None
        try:
            if now.st_uid not in {0, os.geteuid()}:
                raise ConfigError(f"PATH_BASE: {self.real / name} is a link of another user; choose another place")
            return os.readlink("", dir_fd=deeper)
        finally:
            os.close(deeper)

    def _enter(self, deeper: int, name: str) -> None:
        os.close(self.here)
        self.here, self.real = deeper, self.real.parent if name == ".." else self.real / name
        if not stat.S_ISDIR(os.fstat(deeper).st_mode):
            raise NotADirectoryError(20, f"{self.real} is not a directory")
        self._note()

    def _note(self) -> None:
        now = os.fstat(self.here)
        self.seen.append(_Seen(self.real, now.st_uid, now.st_gid, now.st_mode))

    def judge(self) -> str:
        """Of all that it came through: the first that is another user's, for a sentence. Raises ConfigError."""
        foreign = ""
        for one in self.seen:
            if not one.mode & stat.S_ISVTX:
                _check_writers(one.folder, one.mode, one.owner, one.group)
            if one.owner not in {0, os.geteuid()}:
                foreign = foreign or f"{one.folder} belongs to {user(one.owner)}"
        return foreign


def _check_writers(folder: Path, mode: int, owner: int, group: int) -> None:
    """A group that is its owner's alone (same number, as most systems give every user) is the owner."""
    by_group = mode & stat.S_IWGRP and group != owner
    if by_group or mode & stat.S_IWOTH:
        others = "everybody" if mode & stat.S_IWOTH else "its group"
        raise ConfigError(
            f"PATH_BASE: {folder} can be changed by {others}, who could then replace the worker's files; "
            f"run `chmod go-w {folder}` or choose another place"
        )


def _make(name: str, folder: int) -> int:
    """A directory of ours in an open one, made or found there. Raises ConfigError where it is another user's."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=folder)
    made = os.open(name, _DIR, dir_fd=folder)
    with _closed_on_error(made):
        if (owner := os.fstat(made).st_uid) != os.geteuid():
            raise ConfigError(
                f"PATH_BASE: {shown(pinned(made))} belongs to another user ({user(owner)}): either somebody was faster "
                "than the worker, or that disk knows no owners; choose another place"
            )
    return made


def _takes(folder: int, real: Path) -> bool:
    """Make a directory of another user ours, if nothing of his is in it; whether it is ours now."""
    if os.geteuid() != 0:
        raise _of_another(real, os.fstat(folder).st_uid, real)
    with _reopened(folder) as base:
        if not names(base) <= OURS:
            return False
        _check_content(base, real)  # first: a start that is refused takes nothing away
        try:
            os.fchown(base, 0, -1)
            os.fchmod(base, 0o700)
        except OSError as error:
            raise ConfigError(
                f"PATH_BASE: {real} belongs to another user ({user(os.fstat(base).st_uid)}), who could replace the "
                f"worker's files, and cannot be made the worker's own: {error.strerror}; choose another place"
            ) from None
        return True


def _refuse_earlier(folder: int, real: Path, owner: int) -> None:
    """An earlier worker kept its journal there, which must not be lost out of sight."""
    with _reopened(folder) as base:
        if "journal.db" in names(base):
            raise ConfigError(
                f"PATH_BASE: {real} belongs to another user ({user(owner)}), and the journal of an earlier worker lies "
                f"there: run `chown root {real}`, or move what is the worker's (lock, journal.db and what is called "
                f"like it, jobs, cache, quarantine) into {real / SUBFOLDER}, which the worker uses from now on"
            )


def _make_private(base: int, real: Path) -> None:
    """Mode 0700 where the directory is ours alone; one that holds other things keeps its mode (jobs/ is 0700)."""
    now = os.fstat(base)
    if names(base) <= OURS:
        if stat.S_IMODE(now.st_mode) != 0o700:
            os.fchmod(base, 0o700)
    else:
        _check_writers(real, now.st_mode, now.st_uid, now.st_gid)


def _check_content(base: int, real: Path) -> None:
    """What a worker of another user left can neither be trusted nor, without root's rights, be used or deleted; and a
    file with a second name (hard link) might be any file of ours."""
    for name in sorted(OURS & names(base)):
        with contextlib.suppress(FileNotFoundError):
            now = os.stat(name, dir_fd=base, follow_symlinks=False)
            if now.st_uid != os.geteuid():
                raise _of_another(real / name, now.st_uid, real)
            if stat.S_ISREG(now.st_mode) and now.st_nlink > 1:
                raise ConfigError(f"PATH_BASE: {real / name} has another name elsewhere (hard link); remove it there")


def _of_another(place: Path, owner: int, base: Path) -> ConfigError:
    us = user(os.geteuid())
    return ConfigError(
        f"PATH_BASE: {place} belongs to another user ({user(owner)}), perhaps since a worker was run there as that "
        f"user; run `sudo chown -R {us} {base}`, or choose a directory of your own"
    )


@contextmanager
def _reopened(folder: int) -> Iterator[int]:
    """An O_PATH descriptor is good for walking only."""
    base = os.open(".", _DIR, dir_fd=folder)
    try:
        yield base
    finally:
        os.close(base)


@contextmanager
def _closed_on_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise
