"""Filesystems of a test's own, for those who may mount: small ones to fill, and mount points nobody may cross."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a filesystem")


@contextlib.contextmanager
def tmpfs(path: Path, size: str, *options: str) -> Iterator[Path]:
    """An empty filesystem in memory at `path`, such as `size` "16m"; `options` of its mount."""
    path.mkdir()
    with _mounted(["-t", "tmpfs", "-o", ",".join([f"size={size},mode=0700", *options]), "tmpfs", str(path)], path):
        yield path


@contextlib.contextmanager
def bind(source: Path, path: Path) -> Iterator[Path]:
    """The folder `source` seen at `path` as well."""
    path.mkdir()
    with _mounted(["--bind", str(source), str(path)], path):
        yield path


@contextlib.contextmanager
def overlay(disk: Path, path: Path, *, read_only: bool = False) -> Iterator[Path]:
    """At `path`, an overlay that writes to `disk`, as the root of a container does to its engine's disk."""
    for name in ("lower", "upper", "work"):
        (disk / name).mkdir(parents=True)
    path.mkdir()
    options = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work{',ro' if read_only else ''}"
    with _mounted(["-t", "overlay", "-o", options, "overlay", str(path)], path):
        yield path


@contextlib.contextmanager
def ext4(path: Path, mib: int = 64) -> Iterator[Path]:
    """An empty ext4 disk of `mib` MiB at `path`, in memory, as fast as that."""
    backing = path.with_name(f"{path.name}.backing")
    with tmpfs(backing, f"{mib + 8}m"), mounted_ext4(make_ext4(backing / "image", mib), path):
        yield path


@contextlib.contextmanager
def failing_ext4(path: Path, good_mib: int = 16) -> Iterator[Path]:
    """An ext4 disk that says it has 64 MiB and has `good_mib`: the rest fails with EIO when it is really written."""
    backing = path.with_name(f"{path.name}.backing")
    with tmpfs(backing, f"{good_mib}m"), mounted_ext4(make_ext4(backing / "image"), path):
        yield path


def make_ext4(image: Path, mib: int = 64) -> Path:
    """A file with an ext4 filesystem of `mib` MiB, nothing of it kept for root; it takes room as it is written to."""
    with image.open("wb") as file:
        file.truncate(mib << 20)
    lazily = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-m", "0", "-E", lazily, str(image)], check=True)
    return image


@contextlib.contextmanager
def mounted_ext4(image: Path, path: Path) -> Iterator[Path]:
    """That filesystem at `path`; as on most machines, an error makes it read-only."""
    path.mkdir(exist_ok=True)
    with _mounted(["-o", "loop,errors=remount-ro", str(image), str(path)], path):
        yield path


def break_ext4(path: Path) -> None:
    """Make the kernel believe that the disk at `path` failed: it is read-only until it is mounted again (ext4(5))."""
    device = path.stat().st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a test")


def fill(folder: Path, leave: int = 0) -> Path:
    """Write a file that takes all of the disk of `folder` but about `leave` bytes; returns it."""
    file = folder / f"filler-{time.monotonic_ns()}"
    with file.open("wb", buffering=0) as filler:
        for piece in (1 << 20, 4096):
            with contextlib.suppress(OSError):  # full to the last block
                while _free(folder) - leave >= piece:
                    filler.write(bytes(piece))
    return file


def _free(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


@contextlib.contextmanager
def _mounted(arguments: list[str], path: Path) -> Iterator[None]:
    subprocess.run(["mount", *arguments], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
