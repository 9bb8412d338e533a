"""The worker's own directory, and one job's part of it.

    PATH_BASE/            0700: what is below is nobody else's business (FAULTS.md T21)
        lock              one worker per directory
        journal.db
        jobs/<job>/files  mounted into the container at /files; writable for any user, since the job may run as any
        jobs/<job>/parts  downloads that are not whole yet; never visible to the job
        jobs/<job>/logs   what the worker itself adds to the job's logs

Imported by worker, runner and build. Knows no engine: where the directory lies on the engine's host is told to it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from jobfetcher import tree
from jobfetcher.core.errors import ConfigError, JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.job import Job, JobId

_GIB = 1024**3

#: Room that is always kept free: the larger of the two, at most half the disk (a small one must be usable at all).
_RESERVE_BYTES, _RESERVE_SHARE = 5 * _GIB, 0.05

#: All that a worker makes in PATH_BASE: a directory with nothing else in it is ours alone.
_OURS = {"lock", "jobs", "cache", "journal.db", "journal.db-wal", "journal.db-shm", "journal.ballast"}

#: Inodes that are always kept free.
_RESERVE_INODES = 0.05


class Base:
    """PATH_BASE, held by this process until `close`. Raises ConfigError when it cannot be had."""

    def __init__(self, path: Path, *, reserve_mib: int | None = None) -> None:
        self.path = path
        self._reserve_mib = reserve_mib
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            _make_private(path)
            _check_owners(path)
            (path / "jobs").mkdir(mode=0o700, exist_ok=True)
            with tree.opened(path, ["jobs"]) as jobs:  # a link in its place is refused
                os.fchmod(jobs, 0o700)
            self._lock = _lock(path / "lock")
        except OSError as error:
            raise ConfigError(f"PATH_BASE: {path} cannot be used: {error.strerror or error}") from None

    def job(self, job_id: JobId) -> Workspace:
        """Where one job lives; nothing is made yet."""
        return Workspace(self.path / "jobs" / job_id)

    def leftovers(self, known: frozenset[JobId]) -> list[str]:
        """Names below jobs/ that belong to no open job."""
        return sorted(entry.name for entry in (self.path / "jobs").iterdir() if entry.name not in known)

    def remove(self, name: str) -> None:
        """Delete what `leftovers` named. Raises OSError for what could not be deleted."""
        tree.remove(self.path / "jobs", name)

    def check_room(self) -> None:
        """Raise WorkerFault(DISK) when less is free than must always be kept free."""
        disk = os.statvfs(self.path)
        free = disk.f_bavail * disk.f_frsize
        total = disk.f_blocks * disk.f_frsize
        least = self.reserve_bytes(total)
        if free < least:
            raise WorkerFault(
                WorkerReason.DISK,
                f"{self.path} has {free / _GIB:.1f} GiB free and {least / _GIB:.1f} GiB must stay free (RESERVE_DISK); "
                "make room there",
            )
        if disk.f_files and disk.f_favail < disk.f_files * _RESERVE_INODES:
            raise WorkerFault(
                WorkerReason.DISK, f"{self.path} has only {disk.f_favail} inodes left; delete small files on that disk"
            )

    def reserve_bytes(self, total: int) -> int:
        """Bytes that must stay free of a disk of `total` bytes."""
        if self._reserve_mib is not None:
            return self._reserve_mib << 20
        return min(max(_RESERVE_BYTES, int(total * _RESERVE_SHARE)), total // 2)

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Workspace:
    """One job's directory."""

    path: Path

    @property
    def files(self) -> Path:
        """What the container sees as /files."""
        return self.path / "files"

    @property
    def parts(self) -> Path:
        """Downloads that are not whole yet."""
        return self.path / "parts"

    @property
    def logs(self) -> Path:
        """What the worker adds to the job's logs."""
        return self.path / "logs"

    def create(self) -> None:
        """Make the directories; what is there already stays. Raises WorkerFault(DISK)."""
        try:
            for folder in (self.path, self.parts, self.logs, self.files):
                folder.mkdir(mode=0o700, exist_ok=True)
            self.files.chmod(0o777)  # 0700 above; the job may run as any user
        except OSError as error:
            raise WorkerFault(WorkerReason.DISK, f"{self.path} cannot be made: {error.strerror}") from error

    def make_output_folders(self, job: Job) -> None:
        """Create the folders that the job writes its outputs to, empty, as deployed jobs expect."""
        for output in job.outputs:
            try:
                with tree.opened(self.files, output.path.split("/"), create=True):
                    pass
            except (NotADirectoryError, FileExistsError):
                raise JobFault(
                    JobReason.UNREADABLE_SPEC, f"output folder {output.path!r} is an input file of the same job"
                ) from None
            except OSError as error:
                raise WorkerFault(WorkerReason.DISK, f"{output.path!r} cannot be made: {error.strerror}") from error

    def remove(self) -> None:
        """Delete everything. Raises OSError for what could not be deleted."""
        tree.remove(self.path.parent, self.path.name)


def _make_private(path: Path) -> None:
    """Mode 0700 where the directory is ours alone; one that holds other things keeps its mode (jobs/ is 0700)."""
    seen = path.stat()
    if os.geteuid() not in {0, seen.st_uid}:
        raise ConfigError(f"PATH_BASE: {path} belongs to another user; choose a directory of your own")
    names = {entry.name for entry in path.iterdir()}
    if stat.S_IMODE(seen.st_mode) != 0o700 and names <= _OURS:
        path.chmod(0o700)


def _check_owners(path: Path) -> None:
    """Whoever may rename a directory may replace what is below it (FAULTS.md T21); a sticky one prevents that.

    A group that is its owner's alone (same number, as most systems give every user) is the owner.
    """
    for folder in (path.resolve(), *path.resolve().parents):
        seen = folder.stat()
        if seen.st_mode & stat.S_ISVTX and folder != path.resolve():
            continue  # but in PATH_BASE itself, others could put their own `jobs` before ours
        by_group = seen.st_mode & stat.S_IWGRP and seen.st_gid != seen.st_uid
        if by_group or seen.st_mode & stat.S_IWOTH:
            others = "everybody" if seen.st_mode & stat.S_IWOTH else "its group"
            raise ConfigError(
                f"PATH_BASE: {folder} can be changed by {others}, who could then replace the worker's files; "
                f"run `chmod go-w {folder}` or choose another place"
            )


def _lock(path: Path) -> int:
    """A lock that ends with this process, however it ends; a file left behind does not block (FAULTS.md F7)."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise ConfigError(
            f"PATH_BASE: {path.parent} is in use by another worker ({holder}); stop it or choose another directory"
        ) from None
    os.ftruncate(descriptor, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
    return descriptor
