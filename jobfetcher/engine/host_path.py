"""Where a directory of this process lies on the engine's host: what a job's mount must name.

Used by `build.py` at the start. Promises: a wrong PATH_HOST_BASE is refused before any job is taken (FAULTS.md E12). On
bare metal the path is the same; a worker in a container asks the engine for its own mounts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from jobfetcher.core.errors import ConfigError

#: A container's files /etc/hostname, /etc/hosts and /etc/resolv.conf are mounted from the engine's directory for it,
#: which carries its id. Other mount points may show the ids of *other* containers (on the host itself, for one).
_MOUNTED = re.compile(r"/(?:overlay-)?containers/([0-9a-f]{64})/")
_MOUNT_POINTS = {"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"}

#: cgroup v1 (and v2 without a cgroup namespace of its own) shows the id in the path.
_CGROUP = re.compile(r"(?:^|[/-])([0-9a-f]{64})(?:\.scope)?$")

#: Without `--hostname` a container is called by the first 12 digits of its id.
_SHORT_ID = re.compile(r"[0-9a-f]{12}")


class Inspector(Protocol):
    """What this room needs of an engine: `EngineApi.inspect`."""

    def inspect(self, container: str) -> Mapping[str, Any] | None: ...


def own_ids(mountinfo: str, cgroup: str, hostname: str) -> list[str]:
    """Ids that the container this process runs in may have, the likeliest first; none on bare metal.

    Of the texts of /proc/self/mountinfo (proc(5): fields 4 and 5 are root and mount point) and /proc/self/cgroup.
    """
    found: list[str] = []
    for line in mountinfo.splitlines():
        fields = line.split()
        if len(fields) > 4 and fields[4] in _MOUNT_POINTS and (match := _MOUNTED.search(fields[3])):
            found.append(match[1])
    found += [match[1] for line in cgroup.splitlines() if (match := _CGROUP.search(line))]
    if _SHORT_ID.fullmatch(hostname):
        found.append(hostname)
    return list(dict.fromkeys(found))


def find_host_path(api: Inspector, path: str, ids: list[str] | None = None) -> str:
    """Where `path` lies on the engine's host. `ids`: see `own_ids`; None: of this process.

    Raises ConfigError when this process runs in a container and `path` is not on a mount of the host.
    """
    real = os.path.realpath(path)
    me = _own_container(api, _read_ids() if ids is None else ids)
    return real if me is None else _mapped(me, real)


def check_host_path(api: Inspector, given: str, path: str, ids: list[str] | None = None) -> str:
    """`given` (PATH_HOST_BASE) if `path` (PATH_BASE) is mounted from there, else ConfigError saying from where it is.

    In a container that the engine does not know, `given` cannot be checked and is taken.
    """
    candidates = _read_ids() if ids is None else ids
    real = os.path.realpath(path)
    if me := _own_container(api, candidates):
        found = _mapped(me, real)
        same = os.path.normpath(given) == os.path.normpath(found)
    elif candidates:
        return given
    else:
        found = real
        same = Path(given).exists() and Path(given).samefile(real)
    if not same:
        raise ConfigError(
            f"PATH_HOST_BASE is {given}, but PATH_BASE is mounted from {found}; correct it, or leave it out "
            "(the worker finds it by itself)"
        )
    return found


def runs_inside(api: Inspector, ids: list[str] | None = None) -> bool:
    """Whether this process runs in a container of that engine. `ids`: see `own_ids`; None: of this process."""
    return _own_container(api, _read_ids() if ids is None else ids) is not None


def _read_ids() -> list[str]:
    proc = Path("/proc/self")
    return own_ids(
        (proc / "mountinfo").read_text(errors="replace"),
        (proc / "cgroup").read_text(errors="replace"),
        os.uname().nodename,
    )


def _own_container(api: Inspector, ids: list[str]) -> Mapping[str, Any] | None:
    for candidate in ids:
        found = api.inspect(candidate)
        # The engine also looks names up, and some other container may be called like this host.
        if found is not None and str(found["Id"]).startswith(candidate):
            return found
    return None


def _mapped(me: Mapping[str, Any], path: str) -> str:
    def destinations() -> Iterator[tuple[PurePosixPath, Mapping[str, Any]]]:
        for mount in me.get("Mounts") or ():
            destination = PurePosixPath(str(mount["Destination"]))
            if PurePosixPath(path).is_relative_to(destination):
                yield destination, mount

    # The deepest mount hides those above it.
    destination, mount = max(destinations(), key=lambda pair: len(pair[0].parts), default=(PurePosixPath("/"), {}))
    source = str(mount.get("Source") or "")
    if mount.get("Type") not in {"bind", "volume"} or not source:
        raise ConfigError(
            f"PATH_BASE {path} is not on the engine's host: the worker runs in a container, so mount a directory there "
            f"(docker run -v HOST_DIRECTORY:{path})"
        )
    return str(PurePosixPath(source) / PurePosixPath(path).relative_to(destination))
