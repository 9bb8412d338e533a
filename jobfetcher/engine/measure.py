"""How much of disks a container takes beside what has a name in its job's directory (FAULTS.md D3); used by `docker`.

That is its own layer, the anonymous volumes that the engine makes for what an image declares outside of /files, the
three files that the engine mounts into every container and that a job may write to without end (/etc/hosts,
/etc/hostname and /etc/resolv.conf lie in the engine's own directory, and are in no layer), and files that were deleted
and are still open. /dev/shm and other file systems in memory count as the job's memory, and not here.

Where the engine's directories can be read (a worker with root rights on the engine's own machine), all of this is
counted in blocks and inodes, as the disk does. Else the engine is asked: for the layer (`inspect` with sizes), for
volumes (all that it has), and for each of the three files; of inodes it says nothing, and of open files neither. What
stays unseen shows when the disk gets full: then it is judged by what comes back (`jobfetcher.blame`).
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobfetcher import tree
from jobfetcher.core.run import Taken, Written
from jobfetcher.engine.api import EngineApi
from jobfetcher.engine.unseen import processes_of
from jobfetcher.engine.volumes import MOUNT_POINT

#: From this version on an engine can be asked for its volumes alone (Docker Engine API, GET /system/df, `type`).
_VOLUMES_ALONE = (1, 42)

#: What `inspect` calls the files of the engine's own directory that a container has, and where they are in it.
_ENGINES_FILES = {"HostsPath": "/etc/hosts", "HostnamePath": "/etc/hostname", "ResolvConfPath": "/etc/resolv.conf"}

#: Looking through a container's descriptors ends after so many seconds: 100,000 of them take half a second.
_LOOK_S = 2.0

#: File systems whose files are memory, as proc(5) names them in mountinfo.
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "mqueue"})

_BLOCK = 512  # the unit of st_blocks, whatever the disk's own blocks are (stat(3type))


def written(api: EngineApi, container: str) -> Written:
    """See `core.ports.Container.written`. For use inside `calling`; raises NotFound."""
    path = f"/containers/{container}/json"
    found = api.ask("GET", path).json()
    upper = str(((found.get("GraphDriver") or {}).get("Data") or {}).get("UpperDir") or "")
    if _readable(upper):
        layer = tree.taken(Path(upper))
    else:
        sized = api.ask("GET", path, timeout_s=api.work_s, size="1").json()
        layer = Taken(int(sized.get("SizeRw") or 0))
    elsewhere, here = deleted(processes_of(container))
    engine = layer + _volumes(api, found.get("Mounts") or ()) + _engines_files(api, container, found) + elsewhere
    return Written(engine, here)


def deleted(processes: Sequence[int], clock: Callable[[], float] = time.monotonic) -> tuple[Taken, Taken]:
    """What files take that these processes have open and that have no name any more: those that lie elsewhere, and
    those in the job's directory. Each counts once, however often it is open.

    Not seen: one that is only mapped, on its way through a socket, or open in a thread with descriptors of its own. And
    nothing where this process may not look into /proc/PID/fd. Ends after two seconds with what was seen so far.
    """
    until = clock() + _LOOK_S
    seen: set[tuple[int, int]] = set()
    elsewhere, here = Taken(), Taken()
    for pid in processes:
        mounts: Mapping[str, tuple[str, str]] | None = None
        try:
            with os.scandir(f"/proc/{pid}/fd") as entries:
                for entry in entries:
                    if clock() > until:
                        return elsewhere, here
                    try:
                        file = entry.stat()  # of what is open, wherever it was
                    except OSError:
                        continue  # closed meanwhile
                    if file.st_nlink or not stat.S_ISREG(file.st_mode) or (file.st_dev, file.st_ino) in seen:
                        continue
                    mounts = _mounts(pid) if mounts is None else mounts
                    point, kind = mounts.get(_mount_of(pid, entry.name), ("", ""))
                    if not kind or kind in _IN_MEMORY:
                        continue  # of no mount at all: memory, such as memfd_create(2)
                    seen.add((file.st_dev, file.st_ino))
                    held = Taken(file.st_blocks * _BLOCK, 1)
                    if f"{point}/".startswith(f"{MOUNT_POINT}/"):
                        here += held
                    else:
                        elsewhere += held
        except OSError:
            continue  # it has ended, or is another user's
    return elsewhere, here


def _mount_of(pid: int, descriptor: str) -> str:
    """The id of the mount that an open file lies on (proc(5))."""
    try:
        lines = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split()[1] for line in lines if line.startswith("mnt_id:")), "")


def _mounts(pid: int) -> dict[str, tuple[str, str]]:
    """What that process sees mounted: mount id to mount point and type (proc(5))."""
    found = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text(errors="replace").splitlines():
        place, _, source = line.partition(" - ")
        fields = place.split()
        found[fields[0]] = fields[4], source.split()[0]
    return found


def _engines_files(api: EngineApi, container: str, found: Mapping[str, Any]) -> Taken:
    """Of the engine's own files in a container; without their inodes, which are there whatever the job does."""
    total = 0
    for field, inside in _ENGINES_FILES.items():
        path = str(found.get(field) or "")
        if not path:
            continue  # it has no network, so the engine made none
        try:
            file = os.lstat(path)
        except OSError:  # not for us to see, or on another machine
            total += api.file_size(container, inside)
        else:
            total += file.st_blocks * _BLOCK if stat.S_ISREG(file.st_mode) else 0
    return Taken(total)


def _volumes(api: EngineApi, mounts: Sequence[Mapping[str, Any]]) -> Taken:
    """Of the volumes among `mounts` (of an inspect)."""
    volumes = {str(mount["Name"]): str(mount.get("Source") or "") for mount in mounts if mount.get("Type") == "volume"}
    if not volumes:
        return Taken()
    if all(_readable(source) for source in volumes.values()):
        return sum((tree.taken(Path(source)) for source in volumes.values()), Taken())
    path = "/system/df?type=volume" if tuple(map(int, api.version.api.split("."))) >= _VOLUMES_ALONE else "/system/df"
    known = api.ask("GET", path, timeout_s=api.work_s).json().get("Volumes") or ()
    sizes = {str(volume["Name"]): int((volume.get("UsageData") or {}).get("Size") or 0) for volume in known}
    return Taken(sum(max(0, sizes.get(name, 0)) for name in volumes))  # -1: not known


def _readable(folder: str) -> bool:
    return bool(folder) and os.access(folder, os.R_OK | os.X_OK)
