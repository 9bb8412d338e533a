"""What a job left and the worker's user may not delete: given back first, else put beside, measured and named.

Used by workspace, which has one (`Base.left`), and by who deletes there: outbox, recovery and housekeeping. A worker
without root rights can delete what a job's root wrote only after it was given back (`Engine.own`). Where that fails for
good (a file that root of this machine made immutable, an engine on a machine that there is no helper for), the job is
over all the same, and the worker goes on taking jobs for as long as there is room (FAULTS.md E13): the directory gets a
name that no job has, so that the same job may come again; it is said once which one it is, how much it holds and what
to do; and as long as it lies there it is named wherever the disk is called full. It is tried again at the next start.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from jobfetcher import tree
from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.text import clean
from jobfetcher.pinned import shown

_MIB = 1024**2

#: So many are named in one sentence.
_NAMED = 3


class LeftBehind(OSError):
    """Something that this worker may not delete, and cannot have given back. Its message names it and what to do."""


@dataclass(frozen=True, slots=True)
class _Left:
    path: Path
    why: str
    size: int

    def sentence(self) -> str:
        where = shown(self.path)
        held = f"{where} is left, with {self.size / _MIB:.0f} MiB that this worker may not delete"
        return f"{held} ({self.why}); delete it as root (rm -r {where}), or the next start tries again"


class Leftovers:
    """Deletes what lies in `jobs`, the directory of jobs' directories, and remembers what it could not. Thread-safe."""

    def __init__(self, jobs: Path) -> None:
        self._jobs = jobs
        self._own: Callable[[str], None] | None = None
        self._left: dict[str, _Left] = {}

    def also_own(self, own: Callable[[str], None]) -> None:
        """For a worker without root rights: `own(name)` makes everything in `jobs/name` its user's (`Engine.own`)."""
        self._own = own

    def remove(self, name: str) -> None:
        """Delete `jobs/name`, after it was given back if need be. Missing is fine.

        Raises LeftBehind for what this user may not delete, OSError for other trouble, WorkerFault(ENGINE) where the
        engine cannot give it back now. What could not be given back is not asked for again by this process.
        """
        try:
            tree.remove(self._jobs, name)
        except PermissionError as error:
            why = self._given_back(name) if name not in self._left else self._left[name].why
            try:
                tree.remove(self._jobs, name)
            except PermissionError:
                path = self._jobs / name
                self._left[name] = left = _Left(path, clean(why or str(error), 300), tree.disk_usage(path))
                raise LeftBehind(left.sentence()) from error
        self._left.pop(name, None)

    def set_aside(self, name: str) -> str:
        """Give what `remove` left behind a name that no job has; a sentence about it, for people. Raises OSError."""
        with tree.opened(self._jobs) as jobs:
            number = 1
            while _exists(jobs, aside := f"{name}.left{number}"):
                number += 1
            os.rename(name, aside, src_dir_fd=jobs, dst_dir_fd=jobs)
        left = replace(self._left.pop(name), path=self._jobs / aside)
        self._left[aside] = left
        return left.sentence()

    def words(self) -> str:
        """What still lies there, for who has no room; nothing where nothing does."""
        left = [one for one in sorted(self._left.values(), key=lambda one: -one.size) if one.path.exists()]
        if not left:
            return ""
        named = ", ".join(f"{shown(one.path)} ({one.size / _MIB:.0f} MiB)" for one in left[:_NAMED])
        more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
        return f"this worker may not delete what jobs left in {named}{more}; delete that as root"

    def _given_back(self, name: str) -> str:
        """Have it given back; why that is not possible, if it is not."""
        with tree.opened(self._jobs) as jobs:
            is_folder = stat.S_ISDIR(os.stat(name, dir_fd=jobs, follow_symlinks=False).st_mode)
        if self._own is None or not is_folder:
            return ""
        try:
            self._own(name)
        except WorkerFault as fault:
            if fault.reason is not WorkerReason.DISK:
                raise
            return str(fault)
        return ""


def _exists(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
