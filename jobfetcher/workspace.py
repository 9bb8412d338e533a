"""The worker's own directory, and one job's part of it.

    PATH_BASE/            0700: what is below is nobody else's business (FAULTS.md T21)
        lock              one worker per directory
        journal.db
        jobs/<job>/files  mounted into the container at /files; writable for any user, since the job may run as any
        jobs/<job>/parts  downloads that are not whole yet; never visible to the job
        jobs/<job>/logs   what the worker itself adds to the job's logs
        proof/            what the machine tests itself with (self_test); only during a test
        quarantine/       what nobody could make sense of, kept for a person; never read or deleted by the worker

Imported by worker, runner and build. Knows no engine: where the directory lies on the engine's host is told to it.
How PATH_BASE is reached, and who might lead us elsewhere: `trusted`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from jobfetcher import quota, tree, trusted
from jobfetcher.core.errors import ConfigError, JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.failpoints import failpoint
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import Job, JobId
from jobfetcher.core.run import Scarce, Stored, Taken
from jobfetcher.core.text import clean
from jobfetcher.leftovers import Leftovers
from jobfetcher.pinned import shown
from jobfetcher.quota import Quota

_MIB, _GIB = 1024**2, 1024**3

#: Room that is always kept free: the larger of the two, at most half the disk (a small one must be usable at all).
_RESERVE_BYTES, _RESERVE_SHARE = 5 * _GIB, 0.05

#: How the lock file begins while it is held, and what its holder puts over that when it leaves in order.
_HELD, _LEFT = b"process ", b"left by "

#: Inodes that are always kept free.
_RESERVE_INODES = 0.05

#: Read at once when a file is hashed, in bytes.
_PIECE = 1024**2

_LIBC = ctypes.CDLL(None, use_errno=True)  # Python has no syncfs(2)


@dataclass(frozen=True, slots=True)
class Watched:
    """A place on a disk on which the reserve is kept free, and its name for people. `sealed`: it need not be writable
    by itself."""

    path: Path
    name: str
    sealed: bool = False


@dataclass(frozen=True, slots=True)
class Full:
    """Why nothing more may be written, in one sentence, and which disk has no room; None: that is not why.

    `scarce`: of what there is too little, and `least` how much of it must stay free.
    """

    why: str
    disk: int | None = None
    scarce: Scarce = "bytes"
    least: int = 0


def check_base(path: Path, *, reserve_mib: int | None, cache_mib: int) -> None:
    """Raise ConfigError where PATH_BASE must not lie, or its disk has less than RESERVE_DISK (None: auto) or, beside
    that, less than CACHE_SIZE. Makes nothing."""
    try:
        trusted.check(path)  # where it must not lie, nothing is made
        check_reserve(path, reserve_mib, cache_mib)
    except OSError as error:
        raise _unusable(path, error) from None


def check_reserve(path: Path, reserve_mib: int | None, cache_mib: int = 0) -> None:
    """Raise ConfigError where RESERVE_DISK leaves nothing of the disk of `path`, which need not be there yet, or
    CACHE_SIZE is more than it leaves."""
    disk = _disk(_there(path))
    total = disk.f_blocks * disk.f_frsize
    left = total - _reserve_bytes(total, reserve_mib)
    if left <= 0:
        raise ConfigError(
            f"RESERVE_DISK={reserve_mib}MiB is more than all of the disk of {path}, {total / _GIB:.3g} GiB: "
            "no job would ever be taken; lower it"
        )
    if cache_mib << 20 > left:
        raise ConfigError(
            f"CACHE_SIZE={cache_mib}MiB is more than the disk of {path} has beside RESERVE_DISK, "
            f"{left / _GIB:.3g} GiB; lower it"
        )


def engines_disk(root_dir: Path | None) -> Watched | None:
    """Where an engine keeps its images, if that directory is on this machine.

    Of one that this user may not look into, the disk of the nearest folder above it that can be looked at is taken: an
    engine's directory is seldom a mount point of its own.
    """
    while root_dir is not None:
        try:
            return Watched(root_dir, str(root_dir)) if root_dir.is_dir() else None
        except PermissionError:
            root_dir = root_dir.parent
    return None


def own_root(base: Path, root: Path = Path("/")) -> Watched | None:
    """For a worker in a container: its own root lies on the engine's disk, whose directory it does not see.

    An overlay says of its disk what the one below it says that is written to (Linux, fs/overlayfs/super.c, ovl_statfs),
    so what is free there is what the engine has for images and layers. Whether the container's root may be written to
    says nothing (`docker run --read-only`). None where it is the disk of PATH_BASE, `base`: that is watched already,
    and counting it twice would be wrong.
    """
    if _is_one_disk(root, _there(base)):
        return None
    return Watched(root, "the engine's disk (as / of the worker's container)", sealed=True)


class Base:
    """PATH_BASE, held by this process until `close`. Raises ConfigError when it cannot be had, and before it is made
    where its disk has less than RESERVE_DISK or, beside that, less than CACHE_SIZE.

    `crashed`: the process that held it last did not `say_goodbye` (FAULTS.md A9).
    """

    def __init__(self, path: Path, *, reserve_mib: int | None = None, cache_mib: int = 0) -> None:
        self._reserve_mib = reserve_mib
        #: Bytes that open jobs still expect, so that two that download at once do not count on the same free space.
        self._awaited: dict[JobId, int] = {}
        self._awaited_lock = threading.Lock()
        self._spare: Callable[[int], None] | None = None
        self._quota: Quota | None = None
        #: How often this worker took something away that took room, and how much of that is under way (`making_room`).
        self.made_room = self._making_room = 0
        self._making_lock = threading.Lock()
        #: Whether the engine's mounts name the real path though others might lead it elsewhere; and that it was led.
        self.watches_way = False
        self._moved = ""
        check_base(path, reserve_mib=reserve_mib, cache_mib=cache_mib)
        try:
            way = trusted.claim(path)
        except OSError as error:
            raise _unusable(path, error) from None
        #: PATH_BASE for the kernel, and for people and the engine: another one where somebody else might lead the real
        #: path elsewhere, who is named in `foreign`.
        self.path, self.real, self.foreign = way.path, way.real, way.foreign
        self.descriptor = way.descriptor
        self._watched = [Watched(self.path, str(self.real))]
        #: What this worker could not delete there.
        self.left = Leftovers(self.path / "jobs")
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir("jobs", 0o700, dir_fd=self.descriptor)
            with tree.opened(self.path, ["jobs"]) as jobs:  # a link in its place is refused
                os.fchmod(jobs, 0o700)
            #: For a worker in a container: which directory of the host is mounted here.
            self._mounted = trusted.mounted(self.descriptor)
            self._lock, before = _lock(self.descriptor, self.real)
            self.crashed = bool(before) and not before.startswith(_LEFT)
        except BaseException as error:
            os.close(self.descriptor)
            if isinstance(error, OSError):
                raise _unusable(path, error) from None
            raise

    def job(self, job_id: JobId) -> Workspace:
        """Where one job lives; nothing is made yet."""
        return Workspace(self.path / "jobs" / job_id, self._quota)

    @contextmanager
    def making_room(self) -> Iterator[None]:
        """Around the removal of what took room: a job's container, or its directory, or an image. Who is asked whether
        room that came back was another job's must know of it (`blame`)."""
        with self._making_lock:
            self._making_room += 1
        try:
            yield
        finally:
            with self._making_lock:
                self.made_room += 1
                self._making_room -= 1

    def has_made_room(self, since: int) -> bool:
        """Whether anything was taken away since `made_room` was that, or is being."""
        with self._making_lock:
            return self._making_room > 0 or self.made_room != since

    def leftovers(self, known: frozenset[JobId]) -> list[str]:
        """Names below jobs/ that belong to no open job."""
        return sorted(entry.name for entry in (self.path / "jobs").iterdir() if entry.name not in known)

    def remove(self, name: str) -> None:
        """Delete what `leftovers` named, or a job's directory: see `Leftovers.remove`."""
        with self.making_room():
            self.left.remove(name)

    def quarantine(self, name: str, why: str) -> Path:
        """Move jobs/`name` to quarantine/, for a person to look at, with a WHY.txt beside it; returns where it is now.

        It is on disk when this returns. Where nothing is to be moved, the WHY.txt alone is made. Raises OSError, and
        ValueError for a `name` that is more than one name.
        """
        if name in {"", ".", ".."} or "/" in name:
            raise ValueError(f"not the name of something in {self.real / 'jobs'}: {name[:80]!r}")
        (self.path / "quarantine").mkdir(mode=0o700, exist_ok=True)
        with tree.opened(self.path, ["jobs"]) as jobs, tree.opened(self.path, ["quarantine"]) as shelf:
            os.fchmod(shelf, 0o700)
            moved = _label(shelf, name, why)
            with contextlib.suppress(FileNotFoundError):  # moved by a process that died here, or never made
                os.rename(name, moved, src_dir_fd=jobs, dst_dir_fd=shelf)
            for folder in (shelf, jobs):  # or it would be deleted as a leftover after a power cut
                os.fsync(folder)
        return self.real / "quarantine" / moved

    @property
    def filesystem(self) -> str:
        """The type of its file system, as mountinfo names it (proc(5)); empty where that does not say."""
        device = self.path.stat().st_dev
        ours = f"{os.major(device)}:{os.minor(device)}"
        with open("/proc/self/mountinfo", errors="replace") as mounts:
            return next((line.rpartition(" - ")[2].split()[0] for line in mounts if line.split()[2] == ours), "")

    @property
    def is_noexec(self) -> bool:
        """Whether no program that lies there can be run, which is then so in /files as well."""
        return bool(os.statvfs(self.path).f_flag & os.ST_NOEXEC)

    def also_watch(self, place: Watched | None) -> None:
        """Keep the reserve free there as well: on the engine's disk, if there is one to be seen (`engines_disk`,
        `own_root`). Raises ConfigError where that disk has less."""
        if place is not None:
            check_reserve(place.path, self._reserve_mib)
            self._watched.append(place)

    def also_spare(self, make_room: Callable[[int], None]) -> None:
        """Before the disk counts as full, `make_room(size)` may delete what only saves time, until `room_for(size)` is
        content; it raises what that raises. For the cache of inputs."""
        self._spare = make_room

    def check_room(self) -> None:
        """Raise WorkerFault(DISK) when less is free than must always be kept free, with what open jobs await, or when
        PATH_BASE was led elsewhere once (`unmoved`)."""
        if self._moved:
            raise WorkerFault(WorkerReason.DISK, self._moved)
        if full := self.is_full() or self._is_promised():
            raise WorkerFault(WorkerReason.DISK, full)

    def is_full(self) -> str:
        """One sentence on the first watched disk where nothing more may be written, or nothing.

        It has no number that changes, so that it is said once while it stays so (FAULTS.md J10).
        """
        full = self.find_full()
        return full.why if full else ""

    def find_full(self) -> Full | None:
        """`is_full`, with the disk that has no room, as `free_bytes` names it."""
        with contextlib.suppress(WorkerFault):  # then the disk itself says below what is wrong
            self._make_room(0)
        for watched in self._watched:
            try:
                disk, device = _disk(watched.path), _device(watched.path)
            except WorkerFault as fault:
                return Full(str(fault))
            free, least = disk.f_bavail * disk.f_frsize, self.reserve_bytes(disk.f_blocks * disk.f_frsize)
            if disk.f_flag & os.ST_RDONLY and not watched.sealed:
                return Full(f"{watched.name} is mounted read-only")
            if free < least:
                why = f"{watched.name} has less than {least / _GIB:.2g} GiB free (RESERVE_DISK); make room there"
                return Full(why, device, "bytes", least)
            if disk.f_files and disk.f_favail < (few := int(disk.f_files * _RESERVE_INODES)):
                why = f"{watched.name} has hardly any inodes left; delete small files on that disk"
                return Full(why, device, "inodes", few)
        return Full(why) if (why := self._unwritable()) else None

    def _unwritable(self) -> str:
        """A disk that went read-only after an error does not show it since Linux 6.12; one that fails never does."""
        try:
            os.pwrite(self._lock, os.pread(self._lock, 200, 0), 0)
            os.fdatasync(self._lock)
        except OSError as error:
            return f"{self.real} cannot be written: {error.strerror}; look for disk errors (dmesg)"
        return ""

    def _is_promised(self) -> str:
        """Room that a running job may still use; but no other job may be taken that would count on it."""
        if not (awaited := self._awaited_bytes()):
            return ""
        disk = _disk(self.path)
        free, least = disk.f_bavail * disk.f_frsize, self.reserve_bytes(disk.f_blocks * disk.f_frsize)
        return f"what is free in {self.real} is promised to inputs on their way" if free - awaited < least else ""

    def awaits(self, job_id: JobId, size: int) -> None:
        """`size` more bytes will come for a job: reserved until it says less; 0 when all is there.

        Raises WorkerFault(DISK) when that is more than it said before, and they do not fit beside what others await.
        """
        with self._awaited_lock:
            before = self._awaited.pop(job_id, 0)
            if size > before:
                self._make_room(size)
            if size > 0:
                self._awaited[job_id] = size

    def _awaited_bytes(self) -> int:
        return sum(list(self._awaited.values()))

    def room_for(self, size: int) -> None:
        """Raise WorkerFault(DISK) when `size` more bytes in PATH_BASE would not leave the reserve free, with what jobs
        await."""
        disk = _disk(self.path)
        free, least = disk.f_bavail * disk.f_frsize, self.reserve_bytes(disk.f_blocks * disk.f_frsize)
        free -= self._awaited_bytes()
        if free - size < least:
            raise WorkerFault(
                WorkerReason.DISK,
                f"{size / _MIB:.0f} MiB more do not fit into {self.real}: {free / _MIB:.0f} MiB are free and "
                f"{least / _MIB:.0f} MiB must stay free (RESERVE_DISK)",
            )

    def _make_room(self, size: int) -> None:
        try:
            self.room_for(size)
        except WorkerFault:
            if self._spare is None:
                raise
            self._spare(size)

    def free_bytes(self) -> dict[int, int]:
        """Bytes free on each watched disk, by its device number (stat(2)). Raises WorkerFault(DISK)."""
        return {device: free.bytes for device, free in self.free().items()}

    def free(self) -> dict[int, Taken]:
        """What is free on each watched disk, by its device number (stat(2)). Raises WorkerFault(DISK)."""
        disks = {_device(watched.path): _disk(watched.path) for watched in self._watched}
        return {device: Taken(disk.f_bavail * disk.f_frsize, disk.f_favail) for device, disk in disks.items()}

    def sizes(self) -> dict[int, Taken]:
        """How much each watched disk can hold, by its device number. Raises WorkerFault(DISK)."""
        disks = {_device(watched.path): _disk(watched.path) for watched in self._watched}
        return {device: Taken(disk.f_blocks * disk.f_frsize, disk.f_files) for device, disk in disks.items()}

    def used_on(self, disk: int, files: Taken, layers: Taken) -> Taken:
        """How much a job takes of `disk`, of its directory and of what the engine keeps for it: as far as we see it,
        that is where the engine's images are. Raises WorkerFault(DISK)."""
        here, engines = _device(self.path), _device(self._watched[-1].path)
        return files * (disk == here) + layers * (disk == engines)

    def limit_jobs(self, limit_mib: int) -> bool:
        """Have the kernel hold the directory of each job that is made from now on to that size; False: it cannot."""
        self._quota = quota.find(self.path, limit_mib)
        return self._quota is not None

    def settle(self) -> None:
        """Have each watched disk note what was deleted: XFS and btrfs say that room is free some time after it is."""
        for watched in self._watched:
            with contextlib.suppress(OSError), tree.opened(watched.path) as folder:
                _LIBC.syncfs(folder)

    def fullness(self) -> float:
        """The part in use (0 to 1, as df counts it) of the disk that holds the engine's images, as far as we see it.

        Raises WorkerFault(DISK).
        """
        disk = _disk(self._watched[-1].path)
        used = disk.f_blocks - disk.f_bfree
        return used / max(1, used + disk.f_bavail)

    def reserve_bytes(self, total: int) -> int:
        """Bytes that must stay free of a disk of `total` bytes."""
        return _reserve_bytes(total, self._reserve_mib)

    @contextmanager
    def unmoved(self, job_id: JobId, undo: Callable[[], object]) -> Iterator[None]:
        """Around the start of a container whose mount names the real path: where that does not lead to this job's
        directory, before or right after, `undo` is called and no job is taken any more (FAULTS.md T26). In a container
        the host's directories above are not seen, but that the one which is mounted was moved is.

        Raises WorkerFault(DISK). Does nothing where nobody else can lead it elsewhere.
        """
        self._check_way(job_id)
        yield
        try:
            self._check_way(job_id)
        except WorkerFault:
            undo()
            raise

    def _check_way(self, job_id: JobId) -> None:
        # A plain disk is not asked for: its root is its root.
        if self._mounted != "/" and (now := trusted.mounted(self.descriptor)) != self._mounted:
            self._moved = (
                f"the host's directory that is mounted at {self.real} was moved from {clean(self._mounted, 200)} to "
                f"{clean(now, 200)} while the worker runs, and the engine may be led to another one; no job is taken "
                "any more. Start the worker anew"
            )
            raise WorkerFault(WorkerReason.DISK, self._moved)
        if not self.watches_way:
            return
        try:
            held = self.job(job_id).files.stat()
        except OSError as error:
            raise WorkerFault(WorkerReason.DISK, f"the job's directory is gone: {error.strerror}") from error
        # What is not there, a link, or not for us to enter is another one as well.
        with contextlib.suppress(OSError), trusted.followed(self.real / "jobs" / job_id / "files") as found:
            if os.path.samestat(held, os.fstat(found)):
                return
        self._moved = (
            f"another directory was put in the place of {self.real} while the worker runs: {self.foreign}, who can do "
            "that; no job is taken any more. Choose a PATH_BASE below directories of root's, and start the worker anew"
        )
        raise WorkerFault(WorkerReason.DISK, self._moved)

    def cannot_own(self) -> str:
        """Why nothing here may be given to this worker's user by a helper with root's rights; nothing where it may.

        The helper changes whatever lies at the path, and does so before anybody could look at it once more (T26).
        """
        if not self.watches_way:
            return ""
        return (
            f"{self.foreign}, who could have the files of anybody given to this worker; choose a PATH_BASE below "
            "directories of root's, or of this worker's user"
        )

    def say_goodbye(self) -> None:
        """Note that this process leaves because it was told to, however abruptly. One write; raises OSError."""
        os.pwrite(self._lock, _LEFT, 0)

    def close(self) -> None:
        """Let go of the directory."""
        os.close(self._lock)
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Workspace:
    """One job's directory. `quota`: what the kernel holds the job's own part of it to, `files` and `parts`; what the
    worker adds does not count, or a job at its limit could not even be told of."""

    path: Path
    quota: Quota | None = None

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
            self._enclose(self.parts, self.files)
            self.files.chmod(0o777)  # 0700 above; the job may run as any user
        except OSError as error:
            raise WorkerFault(WorkerReason.DISK, f"{shown(self.path)} cannot be made: {error.strerror}") from error

    def _enclose(self, first: Path, second: Path) -> None:
        """One limit for both: files are moved, and linked, from one to the other."""
        if self.quota is not None:
            self.quota.enclose(first, like=second)
            self.quota.enclose(second, like=first)

    def restore(self, kept: Mapping[str, Stored], halt: Halt | None = None) -> dict[str, Stored]:
        """Make it as new for another run, but for the inputs that are what they were; returns those (FAULTS.md A10).

        `kept`: inputs that were placed once, by path. The run may have changed them, so each is hashed again; one that
        differs or cannot be read is dropped. Nothing else of the run is left. The container must be gone. May be called
        again after dying anywhere in it. Raises Stopped and WorkerFault(DISK).
        """
        failpoint("before:restore")
        old, new = self.path / "files.old", self.path / "files.new"
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            if old.is_dir() and not self.files.is_dir():
                old.rename(self.files)  # it died between the two renames below
            for name in (old.name, new.name, self.parts.name, self.logs.name):
                tree.remove(self.path, name)
            self.create()
            new.mkdir(mode=0o700)
            self._enclose(new, self.parts)
            new.chmod(0o777)
            # Linked and not moved: until the swap, the old tree is whole and this can begin again.
            same = {name: stored for name, stored in kept.items() if self._relink(name, stored, new, halt or Halt())}
            self.files.rename(old)
            failpoint("during:restore")
            new.rename(self.files)
            tree.remove(self.path, old.name)
        except OSError as error:
            raise WorkerFault(
                WorkerReason.DISK, shown(f"what an earlier run left in {self.path} cannot be cleared away: {error}")
            ) from error
        return same

    def _relink(self, name: str, stored: Stored, new: Path, halt: Halt) -> bool:
        parts = tuple(name.split("/"))
        try:
            with tree.open_file(self.files, parts) as file:
                if not _is_same(file, stored, halt):
                    return False
                tree.link(file, new, parts)
        except OSError:
            return False  # gone, not a file any more, a bad disk, or no hard links there: it is fetched again
        return True

    def taken(self, within_s: float = math.inf) -> Taken:
        """What the job takes on its disk now, its container's own layer not counted: all of it, which takes long for
        many files, or what can be counted in `within_s` seconds."""
        return tree.taken(self.path, within_s)

    def sync(self) -> None:
        """Wait until everything written to this disk so far is on it. Raises WorkerFault(DISK) when it cannot be."""
        try:
            with tree.opened(self.path) as folder:
                if _LIBC.syncfs(folder):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        except OSError as error:
            raise WorkerFault(
                WorkerReason.DISK, f"the disk of {shown(self.path)} takes no writes: {error.strerror}"
            ) from error

    def make_folders(self, paths: Iterable[str]) -> None:
        """Before a container is made: the folders that are to be mounted in it, which its image's author named.

        Never through a link: what is there already was made by this worker for this run.
        """
        for path in paths:
            try:
                with tree.opened(self.files, path.split("/"), create=True):
                    pass
            except (NotADirectoryError, FileExistsError):
                raise JobFault(
                    JobReason.CANNOT_START,
                    f"the image declares a folder {clean(path, 200)!r} (VOLUME), which is an input file of the job",
                ) from None
            except OSError as error:
                raise WorkerFault(WorkerReason.DISK, f"{path!r} cannot be made: {error.strerror}") from error

    def make_output_folders(self, job: Job) -> None:
        """Create the folders that the job writes its outputs to, empty, as deployed jobs expect."""
        for output in job.outputs:
            try:
                with tree.opened(self.files, output.parts, create=True):
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


def _there(path: Path) -> Path:
    """The nearest of it and the folders above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _reserve_bytes(total: int, reserve_mib: int | None) -> int:
    if reserve_mib is not None:
        return reserve_mib << 20
    return min(max(_RESERVE_BYTES, int(total * _RESERVE_SHARE)), total // 2)


def _unusable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"PATH_BASE: {path} cannot be used: {error.strerror or error}")


def _device(path: Path) -> int:
    try:
        return path.stat().st_dev
    except OSError as error:
        raise WorkerFault(WorkerReason.DISK, f"the disk of {shown(path)} does not answer: {error.strerror}") from error


def _disk(path: Path) -> os.statvfs_result:
    try:
        return os.statvfs(path)
    except OSError as error:
        raise WorkerFault(WorkerReason.DISK, f"the disk of {shown(path)} does not answer: {error.strerror}") from error


def _is_one_disk(one: Path, other: Path) -> bool:
    """Whether two places are on one disk, by its numbers: an overlay has a device number of its own.

    Sizes are the same on two disks of a kind, but not what is free, to the block and at the same moment. Somebody may
    write between the two looks, so it is looked more than once.
    """
    for _ in range(5):
        a, b = _disk(one), _disk(other)
        if (a.f_blocks, a.f_frsize, a.f_files) != (b.f_blocks, b.f_frsize, b.f_files):
            return False
        if (a.f_bfree, a.f_ffree) == (b.f_bfree, b.f_ffree):
            return True
    return False


def _is_same(file: BinaryIO, stored: Stored, halt: Halt) -> bool:
    """Whether a file still has the size and the digest that it had when it was stored."""
    algorithm, _, digest = stored.digest.partition(":")
    if algorithm not in {"sha256", "md5"} or os.fstat(file.fileno()).st_size != stored.size:
        return False
    hasher = hashlib.new(algorithm, usedforsecurity=False)
    while piece := file.read(_PIECE):
        halt.check()
        hasher.update(piece)
    return hasher.hexdigest() == digest


def _label(shelf: int, name: str, why: str) -> str:
    """A name in quarantine/ that nothing has yet, taken by the WHY.txt of that name."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    short = os.fsdecode(os.fsencode(name)[:200])  # with the rest it must stay below 256 bytes
    number = 1
    while True:
        moved = f"{short}-{stamp}" if number == 1 else f"{short}-{stamp}-{number}"
        try:
            file = os.open(f"{moved}.WHY.txt", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=shelf)
        except FileExistsError:
            number += 1
            continue
        except OSError:  # a full disk: what is moved matters more than why
            return moved
        kept = f"{clean(why, 2000)}\n\nKept for you; the worker does not look at it again. Delete it at will.\n"
        with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as text:
            text.write(kept)
            text.flush()
            os.fsync(text.fileno())
        return moved


def _lock(folder: int, real: Path) -> tuple[int, bytes]:
    """A lock, and what its last holder wrote.

    It ends with this process, however that ends; a file left behind does not block (FAULTS.md F7).
    """
    descriptor = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise ConfigError(
            f"PATH_BASE: {real} is in use by another worker ({holder}); stop it or choose another directory"
        ) from None
    before = os.pread(descriptor, 200, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    words = f"{_HELD.decode()}{os.getpid()} on {socket.gethostname()} since {since}\n".encode()
    os.pwrite(descriptor, words, 0)  # over the old words, which also a full disk allows; then the rest is cut off
    os.ftruncate(descriptor, len(words))
    return descriptor, before
