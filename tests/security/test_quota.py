"""The kernel holds a job's directory to JOB_DISK_LIMIT, where a disk has project quotas (D3).

On a kernel that has them, which the one of this machine may not: a second one, as a process, with the product's own
code in it. No container runs there; a process that writes as a job does stands for one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from jobfetcher import quota
from jobfetcher.workspace import Base
from tests.support.mounts import ext4, needs_root
from tests.support.user_mode_linux import run_there

#: An ext4 disk of 64 MiB with project quotas, at /mnt/disk in the second kernel.
DISK = """
import errno, hashlib
from pathlib import Path
sh("mount", "-t", "tmpfs", "tmpfs", "/mnt")
Path("/mnt/disk").mkdir()
sh("truncate", "-s", "64M", "/mnt/image")
sh("mkfs.ext4", "-q", "-m", "0", "-O", "project,quota", "/mnt/image")
sh("mount", "-o", "loop,{options}", "/mnt/image", "/mnt/disk")
from jobfetcher.core.job import JobId
from jobfetcher.core.run import Stored
from jobfetcher.workspace import Base
base = Base(Path("/mnt/disk/base"), reserve_mib=1)

def write(path, mib):
    with path.open("ab", buffering=0) as file:
        for _ in range(mib):
            file.write(bytes(1 << 20))

def as_job(workspace, action):
    "In its /files, without CAP_SYS_RESOURCE, which no job has: with it the kernel lets a quota be exceeded."
    os.chdir(workspace.files)
    os.seteuid(65534)
    try:
        action()
    except OSError as error:
        if error.errno != errno.EDQUOT:
            raise
        return "refused"
    finally:
        os.seteuid(0)
    return "written"
"""

MODULES = ("loop.ko", "quota_tree.ko", "quota_v2.ko")


def there(tmp_path: Path, body: str, options: str = "prjquota") -> None:
    run_there(tmp_path, DISK.format(options=options) + body, *MODULES)


@pytest.mark.fault("D3", "T12")
def test_the_kernel_holds_each_job_to_its_limit_in_bytes_and_inodes(tmp_path: Path) -> None:
    there(
        tmp_path,
        """
assert base.limit_jobs(10)
seven, eight = base.job(JobId("7")), base.job(JobId("8"))
seven.create()
seven.create()  # again: nothing is made anew
eight.create()
assert as_job(seven, lambda: write(Path("big"), 5)) == "written"
write(seven.logs / "container.log", 20)  # what the worker itself has to say does not count
assert as_job(seven, lambda: write(Path("more"), 4)) == "written"
assert as_job(seven, lambda: write(Path("more"), 2)) == "refused"
(seven.files / "big").unlink()
write(seven.parts / "input", 5)
assert as_job(seven, lambda: write(Path("big"), 5)) == "refused"  # what comes in counts for the same job
assert as_job(eight, lambda: write(Path("big"), 9)) == "written"  # another job is not touched
(eight.files / "big").unlink()
with (eight.files / "gone").open("wb", buffering=0) as gone:
    (eight.files / "gone").unlink()
    gone.write(bytes(9 << 20))
    assert as_job(eight, lambda: write(Path("more"), 2)) == "refused"  # deleted files that are open count

def flood():
    Path("many").mkdir()
    for number in range(10 * 256 + 10):
        Path(f"many/{number}").touch()

assert as_job(eight, flood) == "refused"
eight.remove()
nine = base.job(JobId("9"))
nine.create()
assert as_job(nine, lambda: write(Path("big"), 9)) == "written"
""",
    )


@pytest.mark.fault("D3", "A10")
def test_inputs_are_placed_and_kept_within_the_limit(tmp_path: Path) -> None:
    """Files are renamed and linked from folder to folder, which between two projects the kernel refuses."""
    there(
        tmp_path,
        """
assert base.limit_jobs(10)
seven = base.job(JobId("7"))
seven.create()
write(seven.parts / "0", 6)
(seven.parts / "0").rename(seven.files / "a")
stored = Stored("a", 6 << 20, f"sha256:{hashlib.sha256(bytes(6 << 20)).hexdigest()}")
write(seven.files / "left", 1)
inode = (seven.files / "a").stat().st_ino
assert seven.restore({"a": stored}) == {"a": stored}
assert (seven.files / "a").stat().st_ino == inode, "it was linked, not fetched again"
assert not (seven.files / "left").exists()
assert as_job(seven, lambda: write(Path("more"), 5)) == "refused"
base.quarantine("7", "a test")
assert base.leftovers(frozenset()) == []
""",
    )


@pytest.mark.fault("D3")
def test_a_disk_that_only_counts_is_not_taken_for_one_that_enforces(tmp_path: Path) -> None:
    there(tmp_path, "assert not base.limit_jobs(10)\nbase.job(JobId('7')).create()", options="noatime")


@needs_root
@pytest.mark.fault("D3")
def test_a_disk_without_quotas_has_none_and_works(tmp_path: Path) -> None:
    with ext4(tmp_path / "disk") as disk, Base(disk, reserve_mib=1) as base:
        assert not base.limit_jobs(10)
        assert quota.find(disk, 10) is None
