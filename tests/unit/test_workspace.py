"""workspace: the directory is ours alone, there is room, and one job's part of it comes and goes."""

import ctypes
import hashlib
import os
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobfetcher.core.errors import ConfigError, JobFault, JobReason, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.run import Stored, Taken
from jobfetcher.workspace import Base, Workspace, engines_disk, own_root
from tests.support.jobs import make_job
from tests.support.mounts import needs_root, overlay, tmpfs
from tests.support.trees import fingerprint, names_in, open_descriptors


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
    disk = os.statvfs(tmp_path)
    all_but_one = (disk.f_blocks * disk.f_frsize >> 20) - 1
    with (
        Base(tmp_path / "b", reserve_mib=all_but_one) as base,
        pytest.raises(WorkerFault, match="RESERVE_DISK") as fault,
    ):
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


@pytest.mark.fault("D1")
def test_the_engines_disk_is_watched_where_it_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = tmp_path / "engine"
    engines.mkdir()
    with Base(tmp_path / "base", reserve_mib=1) as base:
        both = base.free_bytes()
        base.also_watch(engines_disk(tmp_path / "of another machine"))
        base.also_watch(engines_disk(engines))
        assert base.is_full() == ""
        assert base.free_bytes().keys() == both.keys()  # the same disk is counted once
        engines.rmdir()
        assert base.is_full() == f"the disk of {engines} does not answer: No such file or directory"
        with pytest.raises(WorkerFault, match="does not answer") as fault:
            base.check_room()
        assert fault.value.reason is WorkerReason.DISK


@pytest.mark.fault("D1")
@needs_root
def test_of_an_engines_directory_that_is_closed_to_us_the_disk_is_watched(tmp_path: Path) -> None:
    """Another user's engine, or one below /root: no traceback, and the disk of what we may look at."""
    engines = tmp_path / "closed" / "engine"
    engines.mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    tmp_path.chmod(0o755)
    with Base(tmp_path / "base", reserve_mib=1) as base:
        os.seteuid(65534)
        try:
            base.also_watch(engines_disk(engines))
            assert base.fullness() > 0
        finally:
            os.seteuid(0)


@needs_root
@pytest.mark.fault("D1")
@pytest.mark.parametrize("read_only", [False, True])
def test_the_root_of_a_workers_container_stands_for_the_engines_disk(tmp_path: Path, read_only: bool) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    with (
        tmpfs(here, "64m"),
        tmpfs(there, "32m"),
        overlay(there / "x", tmp_path / "root", read_only=read_only) as root,
        Base(here / "base", reserve_mib=16) as base,
    ):
        alone = base.free_bytes()
        base.also_watch(own_root(base.path, root))
        [engines] = base.free_bytes().keys() - alone.keys()
        assert base.free_bytes()[engines] == pytest.approx(32 << 20, rel=0.01)
        assert [base.used_on(disk, Taken(1), Taken(10)).bytes for disk in (*alone, engines)] == [1, 10]
        assert base.is_full() == ""
        with (there / "images").open("wb") as images:
            os.posix_fallocate(images.fileno(), 0, 20 << 20)
        said = "the engine's disk (as / of the worker's container) has less than 0.016 GiB free (RESERVE_DISK)"
        assert base.is_full().startswith(said)
        assert base.fullness() > 0.6


@needs_root
@pytest.mark.fault("D1")
def test_the_disk_of_path_base_is_not_counted_twice_for_a_worker_in_a_container(tmp_path: Path) -> None:
    with (
        tmpfs(tmp_path / "disk", "64m") as disk,
        overlay(disk / "x", tmp_path / "root") as root,
        Base(disk / "base", reserve_mib=1) as base,
    ):
        alone = base.free_bytes()
        base.also_watch(own_root(base.path, root))
        assert base.free_bytes() == alone
        assert [base.used_on(disk, Taken(1), Taken(10)).bytes for disk in alone] == [11]


@needs_root
def test_a_reserve_or_a_cache_beyond_the_disk_is_refused(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "here", "64m") as here, tmpfs(tmp_path / "there", "32m") as there:
        refused = r"CACHE_SIZE=2MiB is more than the disk of .*/here/a/b has beside RESERVE_DISK, 0\.000977 GiB"
        with pytest.raises(ConfigError, match=refused):
            Base(here / "a" / "b", reserve_mib=63, cache_mib=2)
        with pytest.raises(ConfigError, match=r"RESERVE_DISK=64MiB is more than all of the disk of .*/here/a"):
            Base(here / "a", reserve_mib=64)
        assert list(here.iterdir()) == [], "nothing is made before"
        with Base(here / "a", reserve_mib=63, cache_mib=1) as base:
            with pytest.raises(ConfigError, match=r"RESERVE_DISK=63MiB is more than all of .*/there, 0\.0312 GiB"):
                base.also_watch(engines_disk(there))
            with pytest.raises(ConfigError, match="RESERVE_DISK=63MiB"):
                base.also_watch(own_root(base.path, there))
        with Base(here / "c", cache_mib=31):
            """auto: half of a small disk"""


@pytest.mark.fault("D2")
def test_what_would_not_leave_the_reserve_is_refused_before_it_comes(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    free_mib = disk.f_bavail * disk.f_frsize >> 20
    with Base(tmp_path / "base", reserve_mib=free_mib // 2) as base:
        base.room_for(0)
        base.room_for((free_mib // 4) << 20)
        with pytest.raises(WorkerFault, match=r"MiB more do not fit .* must stay free \(RESERVE_DISK\)") as fault:
            base.room_for((free_mib * 3 // 4) << 20)
        assert fault.value.reason is WorkerReason.DISK


@pytest.mark.fault("D2")
def test_what_is_free_is_promised_to_one_job_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs whose inputs each fit, and do not fit together."""
    free = [100]

    def disk(path: Path) -> os.statvfs_result:
        return os.statvfs_result((1 << 20, 1 << 20, 200, free[0], free[0], 0, 0, 0, 0, 255))  # blocks of 1 MiB

    monkeypatch.setattr("jobfetcher.workspace._disk", disk)
    one, two, mib = JobId("1"), JobId("2"), 1 << 20
    with Base(tmp_path / "base", reserve_mib=10) as base:
        base.awaits(one, 60 * mib)
        base.check_room()
        with pytest.raises(WorkerFault, match=r"60 MiB more do not fit into .*: 40 MiB are free and 10 MiB") as fault:
            base.awaits(two, 60 * mib)
        assert fault.value.reason is WorkerReason.DISK
        base.awaits(two, 30 * mib)
        free[0] -= 50  # so much has come of the first
        base.awaits(one, 10 * mib)
        base.awaits(two, 30 * mib)
        free[0] -= 5  # somebody else's
        with pytest.raises(WorkerFault, match="promised to inputs on their way"):
            base.check_room()
        assert base.is_full() == "", "a job that runs is not stopped for what may come"
        base.awaits(two, 29 * mib)  # less than before is never refused
        base.awaits(two, 0)
        base.check_room()
        base.awaits(one, 0)
        base.awaits(two, 35 * mib)


# -- quarantine -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("J9")
def test_what_is_put_aside_is_kept_with_the_reason_beside_it(tmp_path: Path) -> None:
    with Base(tmp_path / "base") as base:
        kept = []
        for content in ("first", "second"):
            workspace = base.job(JobId("7"))
            workspace.create()
            (workspace.files / "output").write_text(content)
            kept.append(base.quarantine("7", f"its end was not heard\n\x1b[31m({content})"))
        assert names_in(base.path / "jobs") == []
        assert [(path / "files/output").read_text() for path in kept] == ["first", "second"]  # none replaced the other
        assert {path.parent for path in kept} == {base.path / "quarantine"}
        assert all(path.name.startswith("7-2") for path in kept)
        assert [mode(path) for path in (base.path / "quarantine", *kept)] == [0o700] * 3
        whys = [path.with_name(f"{path.name}.WHY.txt") for path in kept]
        assert names_in(base.path / "quarantine") == sorted(path.name for path in (*kept, *whys))
        assert whys[0].read_text().startswith("its end was not heard\\x0a\\x1b[31m(first)\n")
        assert mode(whys[0]) == 0o600
    with Base(tmp_path / "base") as base:  # it is one of ours, and no job's leftover
        assert base.leftovers(frozenset()) == []
        assert mode(base.path) == 0o700


def test_putting_aside_what_is_gone_keeps_the_reason(tmp_path: Path) -> None:
    with Base(tmp_path / "base") as base:
        kept = base.quarantine("7", "a process died after it had moved it")
        assert names_in(base.path / "quarantine") == [f"{kept.name}.WHY.txt"]


@pytest.mark.parametrize("name", ["", ".", "..", "../jobs", "/etc", "a/b"])
def test_only_a_name_below_jobs_is_put_aside(tmp_path: Path, name: str) -> None:
    with Base(tmp_path / "base") as base:
        (base.path / "jobs/a/b").mkdir(parents=True)
        before = fingerprint(tmp_path)
        with pytest.raises(ValueError, match="not the name"):
            base.quarantine(name, "why")
        assert fingerprint(tmp_path) == before


@pytest.mark.parametrize("name", ["n" * 255, "ö" * 127, os.fsdecode(b"\xff\n-name")])
def test_odd_names_are_put_aside_as_well(tmp_path: Path, name: str) -> None:
    with Base(tmp_path / "base") as base:
        (base.path / "jobs" / name).mkdir()
        (base.path / "jobs" / name / "x").touch()
        assert names_in(base.quarantine(name, "why")) == ["x"]


@pytest.mark.fault("T21")
def test_nothing_is_put_aside_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    with Base(tmp_path / "base") as base:
        base.job(JobId("7")).create()
        (base.path / "quarantine").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(OSError, match="Not a directory"):
            base.quarantine("7", "why")
        assert names_in(base.path / "jobs") == ["7"]
    assert names_in(tmp_path / "elsewhere") == []


# -- another run ------------------------------------------------------------------------------------------------------


def stored(name: str, content: bytes, algorithm: str = "sha256") -> Stored:
    return Stored(name, len(content), f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}")


INPUTS = {"a": b"first", "deep/er/b": b"second" * 1000, "c": b"third", "empty": b""}


def after_a_run(path: Path) -> tuple[Workspace, dict[str, Stored]]:
    """A job directory in which a run changed the input `c`, wrote outputs, linked an input and left a half download."""
    workspace = Workspace(path)
    workspace.create()
    for name, content in INPUTS.items():
        (workspace.files / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace.files / name).write_bytes(content)
    kept = {name: stored(name, content, "md5" if name == "a" else "sha256") for name, content in INPUTS.items()}
    (workspace.files / "c").write_bytes(b"THIRD")
    (workspace.files / "out/deep").mkdir(parents=True)
    (workspace.files / "out/deep/result").write_text("half a result")
    (workspace.files / "deep/scratch").write_text("left by the run")
    (workspace.files / "a").chmod(0o4711)
    os.link(workspace.files / "a", workspace.files / "out/a")
    (workspace.parts / "3").write_text("half a download")
    (workspace.logs / "container.log").write_text("of the first run")
    return workspace, kept


def check_as_new(workspace: Workspace) -> None:
    assert names_in(workspace.path) == ["files", "logs", "parts"]
    assert names_in(workspace.parts) == names_in(workspace.logs) == []
    assert mode(workspace.files) == 0o777
    left = {str(path.relative_to(workspace.files)): path for path in workspace.files.rglob("*") if not path.is_dir()}
    assert {name: path.read_bytes() for name, path in left.items()} == {
        name: content for name, content in INPUTS.items() if name != "c"
    }
    assert {mode(path) for path in left.values()} == {0o666}
    assert {path.stat().st_nlink for path in left.values()} == {1}  # no other name leads to an input
    folders = {
        str(path.relative_to(workspace.files)): mode(path) for path in workspace.files.rglob("*") if path.is_dir()
    }
    assert folders == {"deep": 0o777, "deep/er": 0o777}


@pytest.mark.fault("A10")
@pytest.mark.fault("E1")
def test_another_run_finds_its_inputs_and_nothing_else(tmp_path: Path) -> None:
    workspace, kept = after_a_run(tmp_path / "7")
    before = open_descriptors()
    same = workspace.restore(kept)
    assert same == {name: one for name, one in kept.items() if name != "c"}
    check_as_new(workspace)
    assert workspace.restore(same) == same  # and again
    check_as_new(workspace)
    assert open_descriptors() == before


@pytest.mark.fault("A10")
def test_a_job_directory_that_is_gone_is_made_anew(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "7")
    assert workspace.restore({"a": stored("a", b"first")}) == {}
    assert names_in(workspace.path) == ["files", "logs", "parts"]


class Died(BaseException):
    """The process ends here, as far as the code under test can tell."""


def dying_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all calls that change a directory work, but for the one after `steps` of them."""
    left = [steps]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if not left[0]:
                raise Died
            left[0] -= 1
            return real(*arguments, **named)

        return call

    for name in ("rename", "mkdir", "rmdir", "unlink", "link", "chmod", "fchmod"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


@pytest.mark.fault("A10")
def test_a_restore_that_died_at_any_step_is_done_again(tmp_path: Path) -> None:
    steps = died = 0
    while True:
        workspace, kept = after_a_run(tmp_path / str(steps))
        with pytest.MonkeyPatch.context() as patch:
            dying_after(steps, patch)
            try:
                workspace.restore(kept)
                done = True
            except Died:
                done = False
        # The next process looks for its inputs first, and may die a second time at the same step.
        with pytest.MonkeyPatch.context() as patch:
            dying_after(steps, patch)
            try:
                workspace.restore(kept)
            except Died:
                died += 1
        assert workspace.restore(kept) == {name: one for name, one in kept.items() if name != "c"}, steps
        check_as_new(workspace)
        if done:
            break
        steps += 1
    assert steps > 25  # it has as many steps at least
    assert died > 20


@pytest.mark.fault("A10")
def test_a_run_after_a_restore_that_died_leaves_nothing_behind_either(tmp_path: Path) -> None:
    """Between the two renames there is no files/: the next start makes it and fetches everything again."""
    workspace, kept = after_a_run(tmp_path / "7")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jobfetcher.workspace.failpoint", lambda name: die() if name == "during:restore" else None)
        with pytest.raises(Died):
            workspace.restore(kept)
    assert names_in(workspace.path) == ["files.new", "files.old", "logs", "parts"]
    workspace.create()
    (workspace.files / "a").write_bytes(INPUTS["a"])
    (workspace.files / "out").write_text("of the second run")
    assert list(workspace.restore(kept)) == ["a"]
    assert names_in(workspace.files) == ["a"]
    assert names_in(workspace.path) == ["files", "logs", "parts"]


def die() -> None:
    raise Died


@pytest.mark.fault("A10")
@pytest.mark.fault("T4")
def test_nothing_a_job_left_in_an_inputs_place_is_followed_or_kept(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "7")
    workspace.create()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    before = fingerprint(outside)
    files = workspace.files
    (files / "link").symlink_to(outside / "secret")
    (files / "folder").symlink_to(outside)
    (files / "is-a-folder").mkdir()
    os.mkfifo(files / "fifo")
    with (files / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 40)
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(files)  # the address of a socket has room for 107 bytes
        listener.bind("socket")
        os.chdir(here)
    (files / "good").write_bytes(b"secret")
    names = ["link", "folder/secret", "is-a-folder", "fifo", "sparse", "socket", "missing", "good/below", "good"]
    assert list(workspace.restore({name: stored(name, b"secret") for name in names})) == ["good"]
    assert names_in(files) == ["good"]
    assert fingerprint(outside) == before


@pytest.mark.parametrize("digest", ["", "sha256:", "sha1:da39a3ee5e6b4b0d3255bfef95601890afd80709", "shake_128:00"])
def test_an_input_without_a_digest_to_trust_is_fetched_again(tmp_path: Path, digest: str) -> None:
    workspace = Workspace(tmp_path / "7")
    workspace.create()
    (workspace.files / "a").touch()
    assert workspace.restore({"a": Stored("a", 0, digest)}) == {}
    assert names_in(workspace.files) == []


def test_inputs_are_fetched_again_where_a_filesystem_knows_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **named: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    workspace, kept = after_a_run(tmp_path / "7")
    monkeypatch.setattr(os, "link", refused)
    assert workspace.restore(kept) == {}
    assert [path for path in workspace.files.rglob("*") if not path.is_dir()] == []


def test_a_job_that_is_cancelled_is_not_hashed_to_the_end(tmp_path: Path) -> None:
    workspace, kept = after_a_run(tmp_path / "7")
    halt = Halt()
    halt.set(StopReason.CANCELLED)
    with pytest.raises(Stopped):
        workspace.restore(kept, halt)
    assert list(workspace.restore(kept)) == ["a", "deep/er/b", "empty"]


@pytest.mark.fault("A10")
@needs_root
def test_a_worker_without_root_restores_what_is_its_own() -> None:
    """After `Engine.own`, that is: every file belongs to the worker, with the mode that the job gave it."""
    script = f"""
        import hashlib, os, sys
        sys.path[:0] = {sys.path!r}
        from pathlib import Path
        from jobfetcher.core.run import Stored
        from jobfetcher.workspace import Workspace
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        workspace = Workspace(Path(sys.argv[1]) / "7")
        workspace.create()
        kept = {{}}
        for name, mode in (("plain", 0o644), ("closed", 0o400), ("unreadable", 0o000)):
            (workspace.files / name).write_bytes(b"x")
            (workspace.files / name).chmod(mode)
            kept[name] = Stored(name, 1, "sha256:" + hashlib.sha256(b"x").hexdigest())
        (workspace.files / "out").mkdir(mode=0o755)
        (workspace.files / "out" / "result").touch()
        print(*workspace.restore(kept), *(path.name for path in workspace.files.iterdir() if path.name not in kept))
    """
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 65534, 65534)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), folder], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "plain closed\n"


@needs_root
def test_an_input_that_the_job_gave_away_is_the_workers_again(tmp_path: Path) -> None:
    workspace, kept = after_a_run(tmp_path / "7")
    os.chown(workspace.files / "a", 1000, 1000)
    workspace.restore(kept)
    seen = (workspace.files / "a").stat()
    assert (seen.st_uid, seen.st_gid) == (os.geteuid(), os.getegid())


# -- disk -------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("D3")
def test_what_a_job_takes_is_counted(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "7")
    assert workspace.taken() == Taken()
    workspace.create()
    empty = workspace.taken().bytes
    for folder in (workspace.files, workspace.parts, workspace.logs):
        (folder / "file").write_bytes(b"x" * 1_000_000)
    assert 3_000_000 < workspace.taken().bytes - empty < 3_100_000


def test_what_was_written_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(tmp_path / "7")
    with pytest.raises(WorkerFault, match="takes no writes: No such file or directory"):
        workspace.sync()
    workspace.create()
    before = open_descriptors()
    workspace.sync()
    assert open_descriptors() == before

    class BadDisk:
        """syncfs(2) of a disk that has failed; tests/faults/test_disk.py has a real one."""

        def syncfs(self, descriptor: int) -> int:
            assert stat.S_ISDIR(os.fstat(descriptor).st_mode)
            ctypes.set_errno(5)
            return -1

    monkeypatch.setattr("jobfetcher.workspace._LIBC", BadDisk())
    with pytest.raises(WorkerFault, match="takes no writes: Input/output error") as fault:
        workspace.sync()
    assert fault.value.reason is WorkerReason.DISK


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
