"""Trees of very many folders, as a job may leave them: the memory of whoever walks, counts or removes them (N8, T12).

Each act runs in a process of its own, whose peak is read from /proc (proc(5), VmHWM) and compared with what it had when
the tree was made and its modules were loaded. The names are as long as can be, and no UTF-8: such a character takes two
bytes of memory.
"""

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import needs_root, tmpfs
from tests.support.services import REPOSITORY
from tests.support.trees import names_in

pytestmark = [needs_root, pytest.mark.fault("N8", "T12")]

#: Half of FAULTS.md N8, in MiB: a tree is not all that a job has.
MOST_MIB = 32

FOLDERS = 150_000

#: `levels(fd, count, wide)`: a chain of `count` folders, each with `wide` more beside the next one.
PROGRAM = """
    import os, sys, time
    from pathlib import Path
    from jobfetcher import tree
    root, act, levels, wide = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

    def memory(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    def open_folder(name, **where):
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY, **where)

    if act == "make":
        (root / "tree").mkdir()
        here = open_folder(root / "tree")
        for _ in range(levels):
            for number in range(wide):
                os.mkdir(b"%06d" % number + b"\\xff" * 249, dir_fd=here)
            os.mkdir("d", dir_fd=here)
            deeper = open_folder("d", dir_fd=here)
            os.close(here)
            here = deeper
        for number in range(int(sys.argv[5])):
            os.mkdir(b"%06d" % number + b"\\xff" * 249, dir_fd=here)
        sys.exit()
    before = memory("VmRSS")
    if act == "walk":
        found = sum(1 for _ in tree.walk(root, ("tree",)))
    elif act == "usage":
        found = tree.disk_usage(root)
    else:
        tree.remove(root, "tree")
        found = 0
    print(found, memory("VmHWM") - before)
"""


def run(disk: Path, *arguments: object) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(disk), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(word) for word in done.stdout.split()]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with tmpfs(tmp_path / "disk", "1g", "nr_inodes=400000") as disk:
        yield disk


@pytest.mark.parametrize(
    ("levels", "wide", "bottom"),
    [
        pytest.param(0, 0, FOLDERS, id="all in one"),
        pytest.param(100, FOLDERS // 100, 0, id="many on each level"),
        pytest.param(102, 0, FOLDERS, id="all at the bottom"),
        pytest.param(5_000, 0, 10_000, id="many deep down"),
        pytest.param(FOLDERS, 0, 0, id="one in the other"),
    ],
)
def test_very_many_folders_take_little_memory(disk: Path, levels: int, wide: int, bottom: int) -> None:
    run(disk, "make", levels, wide, bottom)
    for act in ("walk", "usage", "remove"):
        _, more = run(disk, act, levels, wide)
        assert more < MOST_MIB, f"{act} takes {more:.0f} MiB"
    assert names_in(disk) == []
