"""The program that gives a job's files back, run here as it runs in its box: on trees that somebody hostile left.

Each committed file is tried: that of this machine as it is, that of the other one under qemu. And each is what its
source says: whoever has the compiler that made it gets the same bytes.
"""

import os
import platform
import re
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mounts import bind, ext4, tmpfs
from tests.support.services import REPOSITORY, require, require_program

HELPER = REPOSITORY / "jobfetcher/engine/helper"
MACHINES = ("x86_64", "aarch64")
US, THEM = 4321, 1234

pytestmark = [
    pytest.mark.fault("E13", "T27"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away"),
]

Give = Callable[..., tuple[int, list[str]]]


def runner(machine: str) -> list[str]:
    return [] if machine == platform.machine() else [require_program(f"qemu-{machine}-static", "qemu-user-static")]


def run(program: Path, machine: str, *arguments: str) -> tuple[int, list[str]]:
    command = [*runner(machine), str(program), *arguments]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.stderr == b""
    return done.returncode, done.stdout.decode("ascii").splitlines()


@pytest.fixture(params=MACHINES)
def give(request: pytest.FixtureRequest) -> Give:
    """`give(DIR)`: its exit code, and the lines that it printed."""
    machine = str(request.param)

    def start(folder: Path) -> tuple[int, list[str]]:
        return run(HELPER / f"give_back-{machine}", machine, f"{US}:{US + 1}", str(folder))

    return start


def owners(folder: Path) -> set[tuple[int, int]]:
    """Of all in a folder, itself included, by what Python's own walk sees."""
    found = [folder.lstat()]
    for _, folders, files, at in os.fwalk(folder):
        found += [os.stat(name, dir_fd=at, follow_symlinks=False) for name in [*folders, *files]]
    return {(seen.st_uid, seen.st_gid) for seen in found}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


def test_everything_is_the_users_and_open_to_the_user(give: Give, tree: Path) -> None:
    (tree / "a/b").mkdir(parents=True)
    for name, mode in (("a/b/none", 0), ("a/b/run", 0o055), ("a/setuid", 0o6755), ("a/sticky", 0o1000)):
        (tree / name).touch()
        (tree / name).chmod(mode)
    (tree / "a/b").chmod(0o3070)
    (tree / "a").chmod(0)
    assert give(tree) == (0, [])
    assert owners(tree) == {(US, US + 1)}
    modes = {str(path.relative_to(tree)): stat.S_IMODE(path.lstat().st_mode) for path in tree.rglob("*")}
    expected = {"a": 0o700, "a/b": 0o770, "a/b/none": 0o600, "a/b/run": 0o755, "a/setuid": 0o755, "a/sticky": 0o600}
    assert modes == expected


def test_what_links_lead_to_stays_as_it_is(give: Give, tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "shadow").write_text("secret")
    (outside / "shadow").chmod(0o400)
    outside.chmod(0o500)
    (tree / "file").symlink_to(outside / "shadow")
    (tree / "folder").symlink_to(outside)
    (tree / "root").symlink_to("/")
    (tree / "loop").symlink_to("loop")
    (tree / "up").symlink_to("..")
    assert give(tree) == (0, [])
    assert {path.lstat().st_uid for path in tree.iterdir()} == {US}
    assert [(path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) for path in (outside, outside / "shadow")] == [
        (0, 0o500),
        (0, 0o400),
    ]
    assert tmp_path.stat().st_uid == 0
    assert Path("/").stat().st_uid == 0


def test_pipes_sockets_devices_and_names_of_any_bytes(give: Give, tree: Path) -> None:
    os.mkfifo(tree / "pipe", 0)
    os.mknod(tree / "null", stat.S_IFCHR | 0o000, os.makedev(1, 3))
    os.mknod(tree / "socket", stat.S_IFSOCK | 0o000)
    odd = [b"a\nb", b"\xff\xfe", b"-rf", b"...", b" ", b"\x1b[2J", b"x" * 255]
    for name in odd:
        (Path(os.fsdecode(os.fsencode(tree) + b"/" + name))).mkdir(mode=0)
    assert give(tree) == (0, [])
    assert owners(tree) == {(US, US + 1)}
    assert stat.S_IMODE((tree / "null").lstat().st_mode) == 0, "no device is opened, and none gets another mode"


def test_two_names_of_one_file(give: Give, tree: Path) -> None:
    (tree / "one").touch(mode=0o400)
    (tree / "two").hardlink_to(tree / "one")
    assert give(tree) == (0, [])
    assert (tree / "two").stat().st_uid == US


def test_five_thousand_levels_with_folders_beside_on_each(give: Give, tree: Path) -> None:
    """Deeper than a path may be long, and than a process may have open files."""
    here = os.open(tree, os.O_RDONLY)
    for level in range(5000):
        os.mkdir("d", 0o700, dir_fd=here)
        for beside in range(level % 3):
            os.mkdir(f"e{beside}", 0, dir_fd=here)
        os.close(os.open("z", os.O_CREAT | os.O_WRONLY, 0, dir_fd=here))
        deeper = os.open("d", os.O_RDONLY, dir_fd=here)
        os.fchmod(deeper, 0o000 if level % 2 else 0o500)
        os.close(here)
        here = deeper
    os.close(here)
    assert give(tree) == (0, [])
    kinds = ["find", str(tree), "-printf", "%U:%G %m %y\n"]
    found = subprocess.run(kinds, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(found) == 1 + 5000 + 5000 + sum(level % 3 for level in range(5000))
    assert set(found) == {f"{US}:{US + 1} {mode} {kind}" for mode, kind in (("700", "d"), ("600", "f"))} | {
        f"{US}:{US + 1} 755 d"  # the first one
    }
    subprocess.run(["rm", "-r", str(tree)], check=True)  # what pytest could not


def test_many_files_and_folders_in_one(give: Give, tree: Path) -> None:
    for number in range(3000):
        (tree / f"file{number}").touch(mode=0)
        (tree / f"folder{number}").mkdir(mode=0)
    assert give(tree) == (0, [])
    assert owners(tree) == {(US, US + 1)}


def test_another_disk_inside_is_left_alone(give: Give, tree: Path) -> None:
    (tree / "deep").mkdir()
    (tree / "deep/mine").touch()
    with tmpfs(tree / "other", "1m") as other:
        (other / "secret").touch(mode=0o400)
        assert give(tree) == (1, ["other: errno 18", "1 could not be given back"])  # EXDEV
        assert (other.stat().st_uid, (other / "secret").stat().st_uid) == (0, 0)
    assert (tree / "deep/mine").stat().st_uid == US


def test_the_same_disk_mounted_once_more_inside_is_left_alone(tree: Path, tmp_path: Path) -> None:
    """It has the same number as a device, and another one as a mount, which qemu does not pass on from statx(2)."""
    same = tmp_path / "same"
    same.mkdir()
    (same / "secret").touch(mode=0o400)
    (tree / "deep").mkdir()
    machine = require(platform.machine() if platform.machine() in MACHINES else None, "a machine with a program")
    with bind(same, tree / "deep/again"):
        code, lines = run(HELPER / f"give_back-{machine}", machine, f"{US}:{US}", str(tree))
    assert (code, lines) == (1, ["deep/again: errno 18", "1 could not be given back"])
    assert (same.stat().st_uid, (same / "secret").stat().st_uid) == (0, 0)


def test_one_failure_does_not_end_it_and_the_first_few_are_named(give: Give, tmp_path: Path) -> None:
    with ext4(tmp_path / "disk", 8) as disk:
        tree = disk / "files"
        for number in range(8):
            (tree / f"f{number}").mkdir(parents=True)
            (tree / f"f{number}" / "a\nb\\").touch()
            (tree / f"f{number}" / "z").touch()
        stuck = [str(path) for path in tree.glob("f*/a*")]
        require_program("chattr", "e2fsprogs")
        subprocess.run(["chattr", "+i", *stuck], check=True)
        try:
            code, lines = give(tree)
        finally:
            subprocess.run(["chattr", "-i", *stuck], check=True)
        assert code == 1
        assert [bool(re.fullmatch(r"f\d/a\\x0ab\\x5c: errno 1", one)) for one in lines] == [True] * 5 + [False]
        assert lines[5] == "8 could not be given back"
        assert {path.stat().st_uid for path in tree.glob("f*/z")} == {US}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    "words",
    [
        *("", "1:1", "1 DIR", "1: DIR", ":1 DIR", "1:1:1 DIR", "-1:1 DIR", "0x1:1 DIR"),
        *("4294967295:1 DIR", "1:99999999999999999999 DIR", "1:1 DIR more"),
    ],
)
def test_a_wrong_call_does_nothing(machine: str, words: str, tree: Path) -> None:
    given = [word.replace("DIR", str(tree)) for word in words.split()]
    assert run(HELPER / f"give_back-{machine}", machine, *given) == (2, ["usage: give_back UID:GID DIR"])
    assert tree.stat().st_uid == 0


def test_a_link_in_the_directorys_place_is_not_followed(give: Give, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tree)
    assert give(tmp_path / "link") == (1, [".: errno 20", "1 could not be given back"])  # ENOTDIR
    assert give(tmp_path / "none") == (1, [".: errno 2", "1 could not be given back"])
    assert tree.stat().st_uid == 0


@pytest.mark.parametrize("machine", MACHINES)
def test_it_is_what_its_source_says(machine: str, tmp_path: Path) -> None:
    cross = "gcc" if machine == platform.machine() else f"{machine}-linux-gnu-gcc"
    require_program(cross, "gcc" if cross == "gcc" else f"gcc-{machine.replace('_', '-')}-linux-gnu")
    build = [str(REPOSITORY / "scripts/build-helper"), "--only", machine, str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True)
    built, committed = tmp_path / f"give_back-{machine}", HELPER / f"give_back-{machine}"
    with_this = (tmp_path / "built-with.txt").read_text().strip()
    if with_this in (HELPER / "built-with.txt").read_text().splitlines():
        assert built.read_bytes() == committed.read_bytes(), "run scripts/build-helper and commit what it makes"
    tree = tmp_path / "files"
    (tree / "a").mkdir(parents=True, mode=0o500)
    assert run(built, machine, f"{US}:{US}", str(tree)) == (0, [])
    assert owners(tree) == {(US, US)}


@pytest.mark.parametrize("machine", MACHINES)
def test_it_needs_nothing_and_is_small(machine: str) -> None:
    program = (HELPER / f"give_back-{machine}").read_bytes()
    assert program[:5] == b"\x7fELF\x02"
    assert len(program) < 16 * 1024
    assert b"/lib" not in program, "no dynamic loader"


def test_the_wheel_has_it(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(REPOSITORY)], check=True, capture_output=True)
    [made] = tmp_path.glob("jobfetcher-*.whl")
    with zipfile.ZipFile(made) as packed:
        for machine in MACHINES:
            name = f"give_back-{machine}"
            assert packed.read(f"jobfetcher/engine/helper/{name}") == (HELPER / name).read_bytes()
