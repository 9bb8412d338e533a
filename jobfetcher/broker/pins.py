"""Mounts that lead where they say, although the worker owns every directory on the way (FAULTS.md T26, T33).

The engine finds the source of a mount by its path, when it starts the container, with root's rights, and follows links.
Whoever took over the worker can put a link in the place of a job's directory at that moment, whatever was checked
before. So the broker opens the directory itself, one name after the other and no link on the way, mounts what it holds
open on a place of its own that nobody else may enter, and names that place to the engine. Once the container runs, with
a mount of its own, the place is taken away again. (The open descriptor itself cannot be named to the engine: runc
mounts in another mount namespace, and the kernel refuses what was opened in ours.)

Used by `rules` and `build`. It takes root's right to mount, and an engine that sees the mount: the broker runs in the
engine's mount namespace, or in a container with the capability SYS_ADMIN whose ROOM is a shared mount of the host's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

from jobfetcher.core.errors import ConfigError

#: Where the places lie: root's alone, and gone with the next start of the machine.
ROOM = Path("/run/jobfetcher-mounts")

#: mount(2) and umount2(2).
_MS_BIND, _MNT_DETACH = 4096, 2

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_LIBC = ctypes.CDLL(None, use_errno=True)

#: A directory below the base, as its names from there.
Way = tuple[str, ...]


class Pins:
    """The places of one broker. `base`: PATH_BASE as this process sees it. Thread-safe."""

    def __init__(self, base: Path, instance: str, room: Path = ROOM) -> None:
        self._base = base
        self._room = room / instance
        self._lock = threading.Lock()

    def open(self) -> None:
        """Make the room, take away what an earlier broker left there, and see that it can be used.

        Raises ConfigError saying what it takes.
        """
        try:
            for folder in (self._room.parent, self._room):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                now = folder.lstat()
                if not stat.S_ISDIR(now.st_mode) or now.st_uid != os.geteuid():
                    raise ConfigError(f"{folder} must be a directory that belongs to the broker's user")
                folder.chmod(0o700)  # an engine that mounts it into the broker's container makes it for all to enter
            for entry in sorted(self._room.iterdir()):
                self.remove(entry.name)
            self.add("check", [()])
            self.remove("check")
        except FileNotFoundError as error:
            raise ConfigError(
                f"PATH_BASE: the broker must see it: {error.filename or self._base} is not there"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"the broker cannot mount below {self._room}: {error.strerror}; it runs as root, and in a container "
                "with the capability SYS_ADMIN (README, the broker)"
            ) from error

    def places(self, name: str, count: int) -> list[str]:
        """The places for the mounts of the container of that name, in their order."""
        return [str(self._room / name / str(number)) for number in range(count)]

    def add(self, name: str, ways: Sequence[Way]) -> None:
        """Mount those directories on their places; what is there is mounted anew. Raises OSError.

        FileNotFoundError for one that is missing, NotADirectoryError (or ELOOP) where a link or a file is in the way.
        """
        with self._lock:
            self._remove(name)
            (self._room / name).mkdir(mode=0o700)
            for place, way in zip(self.places(name, len(ways)), ways, strict=True):
                Path(place).mkdir(mode=0o700)
                self._mount(way, place)

    def remove(self, name: str) -> None:
        """Take the places of that container away; what is mounted in a container stays there."""
        with self._lock:
            self._remove(name)

    def _remove(self, name: str) -> None:
        folder = self._room / name
        with contextlib.suppress(FileNotFoundError):
            for entry in folder.iterdir():
                while _LIBC.umount2(os.fsencode(entry), _MNT_DETACH) == 0:
                    pass
                entry.rmdir()  # never what is in it: a place that is still mounted is busy
            folder.rmdir()

    def _mount(self, way: Way, place: str) -> None:
        opened = os.open("/", _FOLDER)
        try:
            for name in (*self._base.parts[1:], *way):
                inner = os.open(name, _FOLDER, dir_fd=opened)
                os.close(opened)
                opened = inner
            source = os.fsencode(f"/proc/self/fd/{opened}")
            if _LIBC.mount(source, os.fsencode(place), None, _MS_BIND, None):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), place)
            if not os.path.samestat(os.fstat(opened), os.stat(place)):  # noqa: PTH116 - a place, not a path of a person's
                raise OSError(f"{place} is not what was mounted there")
        finally:
            os.close(opened)
