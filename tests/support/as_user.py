"""A worker that is not root: the tests' own Python, started as somebody else. Only root can do that."""

import os
import shlex
import sys
from pathlib import Path

from tests.support.services import REPOSITORY


def python_as(directory: Path, uid: int, gid: int, *groups: int) -> Path:
    """A program below `directory` that is Python for that user, with these groups beside its own.

    Checkout, environment and Python itself may lie below a directory that only root may enter (/root, for one). So in
    a mount namespace of its own each such directory is covered by an empty open one, and what is needed put back.
    """
    needed = {REPOSITORY, Path(sys.prefix), Path(sys.base_prefix), Path(os.path.realpath(sys.executable)).parent}
    closed = {path: shut for path in needed if (shut := closed_ancestor(path))}
    lines = ["mount -t tmpfs tmpfs /mnt"]
    for number, path in enumerate(closed):
        lines += [f"mkdir /mnt/{number}", f"mount --bind {shlex.quote(str(path))} /mnt/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(shut))}" for shut in sorted(set(closed.values()))]
    for number, path in enumerate(closed):
        quoted = shlex.quote(str(path))
        lines += [f"mkdir -p {quoted}", f"mount --bind /mnt/{number} {quoted}"]
    beside = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    become = f"setpriv --reuid={uid} --regid={gid} {beside} --"
    inside = "\n".join(["set -e", *(lines if closed else []), f'exec {become} {shlex.quote(sys.executable)} "$@"'])
    program = directory / "python-as-user"
    program.write_text(
        f'#!/bin/sh\nexec unshare --mount --propagation private sh -c {shlex.quote(inside)} python "$@"\n'
    )
    program.chmod(0o755)
    return program


def closed_ancestor(path: Path) -> Path | None:
    """The topmost directory above `path` that others may not enter."""
    return next((folder for folder in reversed(path.parents) if not folder.stat().st_mode & 0o001), None)
