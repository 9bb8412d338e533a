"""Having the kernel hold a job's directory to JOB_DISK_LIMIT, by project quotas (ext4, XFS); used by `workspace`.

A project is a number that files have beside their owner; new ones take it from their folder, and the kernel counts and
limits what all of one project take, in bytes and inodes, deleted files that are open included. So a job gets an error
from its own write (EDQUOT) at once, where the worker would have looked some seconds later, and no disk gets full.

It takes a disk that is mounted with `prjquota` (ext4 made with `-O quota,project`, or XFS), root's rights in the first
user namespace, and Linux 5.14. Where any of it is missing the worker counts by itself, as it does for all that does not
lie in the directory (layer, volumes). It counts and looks for full disks in any case: that a job
gives its files another number the worker's filter of system calls refuses (FS_IOC_FSSETXATTR), but a folder can still
be told not to hand its number on (FS_IOC_SETFLAGS, outside of a user namespace), and an engine may have a filter of its
own. So a quota stops a mistake and slows down a villain. The worker itself, as root, is not held to it
(CAP_SYS_RESOURCE): what it brings in only counts.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

#: linux/fs.h: struct fsxattr (flags, extent size, extents, project, hint, padding), how it is read and set, and the
#: flag by which what is made in a folder takes its project.
_FSXATTR = struct.Struct("=5I8s")
_GET_XATTR, _SET_XATTR = 0x801C581F, 0x401C5820
_INHERIT = 0x200

#: linux/quota.h: struct if_dqblk (limits and use of blocks of 1 KiB and of inodes, two times, what is valid).
_DQBLK = struct.Struct("=8QI4x")
_Q_GET, _Q_SET, _OF_PROJECTS = 0x800007, 0x800008, 2
_LIMITS_VALID = 1 | 4

#: quotactl_fd(2), the same number on all machines that we know of.
_QUOTACTL_FD = 443

#: Project numbers of jobs: a range that nobody else is likely to use; people begin at 1.
_FIRST, _COUNT = 0x6A66_0000, 0x10000

#: A file of any content takes a block of 4 KiB, so no job that only writes bytes comes to the limit of inodes first.
_INODES_PER_MIB = 256

_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Quota:
    """A limit for each job of one disk, in MiB."""

    limit_mib: int

    def enclose(self, folder: Path, like: Path | None = None) -> None:
        """Have what is made in `folder`, which is empty, count for a project of its own, or for that of `like`. Done
        already: nothing. Raises OSError."""
        descriptor = _open(folder)
        try:
            if _is_ours(_project(descriptor)):
                return
            number = 0 if like is None else _project_of(like)
            if not _is_ours(number):
                number = _unused(descriptor, folder)
                limits = (self.limit_mib * 1024, 0, 0, self.limit_mib * _INODES_PER_MIB, 0, 0, 0, 0, _LIMITS_VALID)
                _quotactl(descriptor, _Q_SET, number, bytearray(_DQBLK.pack(*limits)))
            flags, *more = _FSXATTR.unpack(_xattr(descriptor))
            more[2] = number
            fcntl.ioctl(descriptor, _SET_XATTR, _FSXATTR.pack(flags | _INHERIT, *more))
        finally:
            os.close(descriptor)


def find(folder: Path, limit_mib: int) -> Quota | None:
    """Limits of so much on the disk of `folder`; None where they would not be enforced, or not by us."""
    if not _is_enforced(folder):
        return None
    try:
        descriptor = _open(folder)
    except OSError:
        return None
    try:
        _xattr(descriptor)
        _used(descriptor, _FIRST)  # without the rights, or before Linux 5.14, this says so
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return Quota(limit_mib)


def _is_enforced(folder: Path) -> bool:
    """Whether the disk is mounted with project quotas, as mountinfo says it (proc(5)): without, it may only count."""
    device = folder.stat().st_dev
    ours = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", errors="replace") as mounts:
        for line in mounts:
            options = line.rpartition(" - ")[2].split()[-1].split(",")
            if line.split()[2] == ours and {"prjquota", "pquota"} & set(options):
                return True
    return False


def _unused(descriptor: int, folder: Path) -> int:
    """A project of which there is no file. Two workers that look at the same moment begin at different numbers."""
    start = zlib.crc32(os.fsencode(folder.absolute()))
    for step in range(_COUNT):
        number = _FIRST + (start + step) % _COUNT
        if _used(descriptor, number) == 0:
            return number
    raise OSError(errno.EDQUOT, "all project numbers are in use")


def _used(descriptor: int, number: int) -> int:
    """Inodes of a project."""
    block = bytearray(_DQBLK.size)
    try:
        _quotactl(descriptor, _Q_GET, number, block)
    except FileNotFoundError:  # nobody has asked for it yet
        return 0
    return int(_DQBLK.unpack(block)[5])


def _quotactl(descriptor: int, command: int, number: int, block: bytearray) -> None:
    shared = (ctypes.c_char * len(block)).from_buffer(block)
    what = ctypes.c_uint(command << 8 | _OF_PROJECTS)
    if _LIBC.syscall(ctypes.c_long(_QUOTACTL_FD), ctypes.c_uint(descriptor), what, ctypes.c_uint(number), shared):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _xattr(descriptor: int) -> bytes:
    return fcntl.ioctl(descriptor, _GET_XATTR, bytes(_FSXATTR.size))


def _project(descriptor: int) -> int:
    return int(_FSXATTR.unpack(_xattr(descriptor))[3])


def _project_of(folder: Path) -> int:
    descriptor = _open(folder)
    try:
        return _project(descriptor)
    finally:
        os.close(descriptor)


def _is_ours(number: int) -> bool:
    return _FIRST <= number < _FIRST + _COUNT


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
