"""Trees that a path cannot name, and what must not have changed."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path


def descend(root: Path, name: str, levels: int, content: bytes | None = None) -> None:
    """Make `levels` folders called `name`, each in the one before, and a file `bottom` with `content` in the last."""
    here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(levels):
            os.mkdir(name, dir_fd=here)
            deeper = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
            os.close(here)
            here = deeper
        if content is not None:
            bottom = os.open("bottom", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=here)
            os.write(bottom, content)
            os.close(bottom)
    finally:
        os.close(here)


def fingerprint(root: Path) -> dict[str, str]:
    """Everything below `root`: name to kind, mode and content. Two equal ones mean that nothing was touched."""
    seen = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder) / name
            mode = path.lstat().st_mode
            content = ""
            if stat.S_ISREG(mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            elif stat.S_ISLNK(mode):
                content = str(path.readlink())
            seen[str(path.relative_to(root))] = f"{mode:o} {content}"
    return seen


def open_descriptors() -> set[str]:
    """The numbers of this process's descriptors (that of the listing itself is among them, each time)."""
    return set(names_in(Path("/proc/self/fd")))


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(entry.name for entry in folder.iterdir())
