"""What an image declares with VOLUME, and where it must lie. Pure; used by `images`, `run_spec`, `box` and `docker`.

For each path that an image declares the engine makes an anonymous volume, which goes when its container goes, unless
something else is mounted at that very path. So what is declared below /files, where a job's outputs are, must be a
mount of ours: the folder of that name in the job's own directory. An image is written by a stranger, and what it
declares is a path on this machine once it is mounted: every name is checked here, and nothing is declared that leads
out of /files (FAULTS.md T1, T28). A volume that is declared elsewhere stays the engine's, and is measured there.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable

from jobfetcher.core.errors import JobFault, JobReason
from jobfetcher.core.text import clean

#: Where a job finds its directory (PROTOCOL.md "How a job must be run").
MOUNT_POINT = "/files"

#: More volumes than this are no program's need: each is a mount, and a directory on the engine's disk.
_MOST = 100

#: Linux takes no longer name (NAME_MAX), in bytes.
_LONGEST_NAME = 255

#: Nor a longer path (PATH_MAX).
_LONGEST_PATH = 4096


def inner_folders(declared: Iterable[str]) -> tuple[str, ...]:
    """Folders below /files that must be mounts of their own, relative to it, outer ones first.

    Also the folders that these lie in. What is a mount cannot be renamed from inside its container (rename(2), EBUSY),
    so no job can put a link to the host's files in the way of a mount, for a person to follow with `docker restart`.

    Raises JobFault(CANNOT_START) for what no container can have, or whose files would be lost.
    """
    volumes = tuple(declared)
    if len(volumes) > _MOST:
        raise _refused(f"{len(volumes)} volumes, and a job gets at most {_MOST}")
    if any(len(volume) > _LONGEST_PATH for volume in volumes):
        raise _refused("a volume whose path is longer than Linux takes")
    found: set[tuple[str, ...]] = set()
    for volume in volumes:
        path = cleaned(volume)
        parts = tuple(path.split("/")[1:])
        if path == "/" or parts[0] == "proc":
            raise _refused(f"a volume at {clean(volume, 200)!r}, where none can be")
        if f"/{parts[0]}" != MOUNT_POINT or len(parts) == 1:
            continue
        if not volume.startswith("/"):  # mounted there all the same, but under a name that no mount of ours can have
            raise _refused(f"a volume at {clean(volume, 200)!r}; below {MOUNT_POINT} its path must begin with /")
        if any(_is_hostile(part) for part in parts):
            raise _refused(f"a volume at {clean(volume, 200)!r}, which is no name for a folder of outputs")
        found.update(parts[1:end] for end in range(2, len(parts) + 1))
    if len(found) > _MOST:
        raise _refused(f"volumes that make {len(found)} mounts below {MOUNT_POINT}, and a job gets at most {_MOST}")
    return tuple("/".join(parts) for parts in sorted(found, key=lambda parts: (len(parts), parts)))


def outer_volumes(declared: Iterable[str]) -> tuple[str, ...]:
    """Where the engine makes volumes of its own, because they are declared outside of /files."""
    paths = {cleaned(volume) for volume in declared}
    return tuple(sorted(path for path in paths if path != MOUNT_POINT and not path.startswith(f"{MOUNT_POINT}/")))


def leads_inside(target: str) -> bool:
    """Whether a link in an image with that target, as the engine tells it, leads to /files or below."""
    return cleaned(target) == MOUNT_POINT or cleaned(target).startswith(f"{MOUNT_POINT}/")


def cleaned(path: str) -> str:
    """Where the engine mounts what is declared as `path` (Go's filepath.Clean, then below the container's root)."""
    return posixpath.normpath("/" + path.lstrip("/"))


def _is_hostile(name: str) -> bool:
    """Names that the kernel or an upload would refuse later, in worse words."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return True
    return size > _LONGEST_NAME or not name.isprintable() or "\\" in name


def _refused(what: str) -> JobFault:
    return JobFault(JobReason.CANNOT_START, f"the container cannot start, its image declares {what} (VOLUME)")
