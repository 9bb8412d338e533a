"""What a job left and this worker may not delete: given back, or put beside, measured and named (FAULTS.md E13, T27).

Immutable files on a disk of the test's own are what not even root may delete.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.job import JobId
from jobfetcher.leftovers import LeftBehind
from jobfetcher.workspace import Base
from tests.support.mounts import ext4, needs_root
from tests.support.services import require_program
from tests.support.trees import names_in

pytestmark = [needs_root, pytest.mark.fault("E13", "T27")]

MIB = 1024**2


def chattr(flag: str, *paths: Path) -> None:
    require_program("chattr", "e2fsprogs")
    subprocess.run(["chattr", flag, *map(str, paths)], check=True)


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Base]:
    with ext4(tmp_path / "disk", 32) as disk, Base(disk / "base", reserve_mib=1) as ready:
        yield ready
        for path in (disk / "base" / "jobs").glob("*/files/*"):
            chattr("-i", path)


def leave(base: Base, name: str, size: int) -> Path:
    """A job's directory with a file of that size that nobody may delete, and one that may go."""
    files = base.path / "jobs" / name / "files"
    files.mkdir(parents=True)
    (files / "goes").touch()
    (files / "stays").write_bytes(b"x" * size)
    chattr("+i", files / "stays")
    return files / "stays"


def test_what_may_not_be_deleted_is_named_with_its_size_and_a_cure(base: Base) -> None:
    stays = leave(base, "7", 3 * MIB)
    with pytest.raises(LeftBehind) as left:
        base.remove("7")
    said = str(left.value)
    assert f"{base.path}/jobs/7 is left, with 3 MiB" in said
    assert f"rm -r {base.path}/jobs/7" in said
    assert "\n" not in said
    assert names_in(stays.parent) == ["stays"], "what may be deleted is"


def test_it_is_given_back_and_then_deleted(base: Base) -> None:
    asked: list[str] = []

    def own(name: str) -> None:
        asked.append(name)
        chattr("-i", base.path / "jobs" / name / "files/stays")

    leave(base, "7", 1)
    base.left.also_own(own)
    base.remove("7")
    assert (asked, names_in(base.path / "jobs"), base.left.words()) == (["7"], [], "")
    base.remove("7")  # and missing is fine
    assert asked == ["7"]


def test_what_cannot_be_given_back_is_asked_for_once_and_says_why(base: Base) -> None:
    asked: list[str] = []

    def own(name: str) -> None:
        asked.append(name)
        raise WorkerFault(WorkerReason.DISK, "stays: Operation not permitted")

    leave(base, "7", 1)
    base.left.also_own(own)
    for _ in range(3):
        with pytest.raises(LeftBehind, match="stays: Operation not permitted"):
            base.remove("7")
    assert asked == ["7"]


def test_an_engine_that_is_away_is_asked_again(base: Base) -> None:
    away = WorkerFault(WorkerReason.ENGINE, "away")

    def own(name: str) -> None:
        raise away

    leave(base, "7", 1)
    base.left.also_own(own)
    for _ in range(2):
        with pytest.raises(WorkerFault, match="away"):
            base.remove("7")
    assert base.left.words() == "", "nobody knows yet whether it stays"


def test_a_link_in_the_place_of_a_directory_is_given_to_nobody(base: Base, tmp_path: Path) -> None:
    """The engine would mount what it leads to."""
    asked: list[str] = []
    base.left.also_own(asked.append)
    (base.path / "jobs/7").symlink_to(tmp_path)
    subprocess.run(["chattr", "+i", str(base.path / "jobs")], check=True)
    try:
        with pytest.raises(LeftBehind):
            base.remove("7")
    finally:
        chattr("-i", base.path / "jobs")
    assert asked == []


def test_put_beside_it_has_a_name_that_no_job_has(base: Base) -> None:
    for number in (1, 2):
        leave(base, "7", MIB)
        with pytest.raises(LeftBehind):
            base.remove("7")
        assert f"{base.path}/jobs/7.left{number} is left, with 1 MiB" in base.left.set_aside("7")
    base.job(JobId("7")).create()
    assert names_in(base.path / "jobs") == ["7", "7.left1", "7.left2"]
    assert base.leftovers(frozenset({JobId("7")})) == ["7.left1", "7.left2"], "the next start tries again"


def test_while_it_lies_there_it_is_named_the_largest_first(base: Base) -> None:
    for name, size in (("1", 1), ("2", 3), ("3", 2), ("4", 0)):
        leave(base, name, size * MIB)
        with pytest.raises(LeftBehind):
            base.remove(name)
        base.left.set_aside(name)
    jobs = base.path / "jobs"
    named = f"{jobs}/2.left1 (3 MiB), {jobs}/3.left1 (2 MiB), {jobs}/1.left1 (1 MiB) and 1 more"
    assert base.left.words() == f"this worker may not delete what jobs left in {named}; delete that as root"
    chattr("-i", *jobs.glob("*/files/stays"))
    subprocess.run(["rm", "-r", *map(str, jobs.glob("*.left1"))], check=True)
    assert base.left.words() == ""
