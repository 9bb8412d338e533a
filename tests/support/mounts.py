"""Filesystems of a test's own, for those who may mount: small ones to fill, and mount points nobody may cross."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a filesystem")


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    """An empty filesystem in memory at `path`, such as `size` "16m"."""
    path.mkdir()
    with _mounted(["-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)], path):
        yield path


@contextmanager
def bind(source: Path, path: Path) -> Iterator[Path]:
    """The folder `source` seen at `path` as well."""
    path.mkdir()
    with _mounted(["--bind", str(source), str(path)], path):
        yield path


@contextmanager
def _mounted(arguments: list[str], path: Path) -> Iterator[None]:
    subprocess.run(["mount", *arguments], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
