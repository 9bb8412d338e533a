"""workspace: the directory is ours alone, there is room, and one job's part of it comes and goes."""

import os
import stat
from pathlib import Path

import pytest

from jobfetcher.core.errors import ConfigError, JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.job import JobId
from jobfetcher.workspace import Base, Workspace
from tests.support.jobs import make_job
from tests.support.mounts import needs_root, tmpfs
from tests.support.trees import names_in


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_layout_is_private_and_the_jobs_part_open(tmp_path: Path) -> None:
    with Base(tmp_path / "new" / "base") as base:
        workspace = base.job(JobId("7"))
        mask = os.umask(0o077)
        try:
            workspace.create()
            workspace.create()  # what is there stays
        finally:
            os.umask(mask)
        assert workspace.path == base.path / "jobs" / "7"
        assert [mode(path) for path in (base.path, base.path / "jobs", workspace.path)] == [0o700] * 3
        assert [mode(path) for path in (workspace.parts, workspace.logs)] == [0o700] * 2
        assert mode(workspace.files) == 0o777
        workspace.remove()
        assert names_in(base.path / "jobs") == []


def test_leftovers_are_what_no_open_job_knows(tmp_path: Path) -> None:
    with Base(tmp_path / "base") as base:
        for name in ("7", "8", "8.deep99", "stray"):
            (base.path / "jobs" / name / "files").mkdir(parents=True)
        assert base.leftovers(frozenset({JobId("7")})) == ["8", "8.deep99", "stray"]
        for name in base.leftovers(frozenset({JobId("7")})):
            base.remove(name)
        assert names_in(base.path / "jobs") == ["7"]


def test_output_folders_are_made_for_any_user(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "7")
    workspace.create()
    mask = os.umask(0o077)
    try:
        workspace.make_output_folders(make_job(outputs={"output": "out/deep", "log": "logs", "artifact": "out"}))
    finally:
        os.umask(mask)
    assert [mode(workspace.files / name) for name in ("out", "out/deep", "logs")] == [0o777] * 3


@pytest.mark.fault("T2")
def test_an_output_folder_that_is_an_input_file_is_the_jobs_fault(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "7")
    workspace.create()
    (workspace.files / "data").touch()
    for path in ("data", "data/out"):
        with pytest.raises(JobFault, match="is an input file") as fault:
            workspace.make_output_folders(make_job(outputs={"output": path}))
        assert fault.value.reason is JobReason.UNREADABLE_SPEC


def test_an_output_folder_is_never_made_through_a_link(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "7")
    workspace.create()
    (tmp_path / "outside").mkdir()
    (workspace.files / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(JobFault):
        workspace.make_output_folders(make_job(outputs={"output": "link/out"}))
    assert names_in(tmp_path / "outside") == []


def test_too_little_room_names_the_setting(tmp_path: Path) -> None:
    with Base(tmp_path / "a", reserve_mib=1) as base:
        base.check_room()
    with Base(tmp_path / "b", reserve_mib=1 << 30) as base, pytest.raises(WorkerFault, match="RESERVE_DISK") as fault:
        base.check_room()
    assert fault.value.reason is WorkerReason.DISK


@pytest.mark.parametrize(
    ("total_gib", "reserve_gib"), [(4, 2), (8, 4), (10, 5), (50, 5), (100, 5), (200, 10), (1000, 50)]
)
def test_the_reserve_is_five_gib_or_five_percent_and_at_most_half(
    tmp_path: Path, total_gib: int, reserve_gib: int
) -> None:
    with Base(tmp_path / "base") as base:
        assert base.reserve_bytes(total_gib << 30) == reserve_gib << 30


@pytest.mark.fault("D6")
@needs_root
def test_a_disk_without_inodes_takes_no_job(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "16m,nr_inodes=100") as disk, Base(disk, reserve_mib=1) as base:
        base.check_room()
        for number in range(os.statvfs(disk).f_favail - 4):
            (disk / f"{number}").touch()
        with pytest.raises(WorkerFault, match="inodes"):
            base.check_room()


@pytest.mark.fault("D6")
@needs_root
def test_a_full_disk_is_the_workers_fault(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "1m,nr_inodes=10") as disk, Base(disk, reserve_mib=0) as base:
        base.job(JobId("7")).create()  # four folders
        with pytest.raises(WorkerFault, match="cannot be made: No space left on device") as fault:
            base.job(JobId("8")).create()
        assert fault.value.reason is WorkerReason.DISK


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_base_that_cannot_be_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"PATH_BASE: .* cannot be used") as refused:
        Base(tmp_path / place)
    assert len(str(refused.value).splitlines()) == 1
