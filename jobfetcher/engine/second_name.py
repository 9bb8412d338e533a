"""A second name for PATH_BASE, below root's own /run, for the engine's mounts (FAULTS.md T26).

The engine finds the directory of a job anew for each container, by a path, and follows links on the way: whoever owns a
directory above PATH_BASE could have it mount another one into a job, were it for the moment of the start. To name it
by the worker's open descriptor (`/proc/PID/fd/N`) does not help: runc mounts in the container's mount namespace, and
the kernel mounts nothing there that was opened in another one (EINVAL, with runc 1.1). So root mounts the open
directory itself on /run/jobfetcher/NAME, once, which nobody else can lead elsewhere; NAME is the same at every start,
so that one that was left by a worker that was killed is found, and mounts are called the same in each run.

That takes the right to mount, and an engine that sees the mount: `sees` looks through its process. A unit with a mount
namespace of its own (PrivateTmp=, ProtectSystem= and the like of systemd) hides it from the engine; there, and in a
container, the caller must look after the real path (workspace.Base.unmoved).

Used by build.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobfetcher.pinned import pinned

#: Where second names lie: a directory of root's, and gone with the next start of the machine.
ROOM = Path("/run/jobfetcher")

#: mount(2) and umount2(2): what is mounted below comes along, and what is in use goes when it is not any more.
_MS_BIND, _MS_REC, _MNT_DETACH = 4096, 16384, 2

_LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def second_name(descriptor: int, name: str, room: Path = ROOM) -> Iterator[Path | None]:
    """`room/name`, with the open directory mounted there for the length of the block; None where that cannot be."""
    place = room / name
    try:
        _mount(descriptor, place, room)
    except OSError:
        yield None
        return
    try:
        yield place
    finally:
        with contextlib.suppress(OSError):
            _unmount(place)
            place.rmdir()


def sees(url: str, place: Path) -> bool:
    """Whether the engine at `url` sees the directory at `place` that we see there. False where that cannot be told."""
    path = url.removeprefix("unix://")
    if path == url:
        return False
    try:
        with socket.socket(socket.AF_UNIX) as engine:
            engine.settimeout(5.0)
            engine.connect(path)
            size = struct.calcsize("3i")
            pid, _, _ = struct.unpack("3i", engine.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        return pid > 0 and os.path.samestat(place.stat(), Path(f"/proc/{pid}/root{place}").stat())
    except OSError:
        return False


def _mount(descriptor: int, place: Path, room: Path) -> None:
    room.mkdir(mode=0o700, exist_ok=True)
    for folder in (room.parent, room):
        now = folder.lstat()
        if not stat.S_ISDIR(now.st_mode) or now.st_uid != 0 or now.st_mode & 0o022:
            raise PermissionError(1, f"{folder} is not root's alone")
    place.mkdir(mode=0o700, exist_ok=True)
    while os.path.ismount(place):  # left by a worker that was killed
        if _is_there(descriptor, place):
            return
        _unmount(place)
    if _LIBC.mount(os.fsencode(pinned(descriptor)), os.fsencode(place), None, _MS_BIND | _MS_REC, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if not _is_there(descriptor, place):
        raise OSError(f"{place} is not what was mounted there")


def _unmount(place: Path) -> None:
    if _LIBC.umount2(os.fsencode(place), _MNT_DETACH):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _is_there(descriptor: int, place: Path) -> bool:
    return os.path.samestat(os.fstat(descriptor), place.stat())
