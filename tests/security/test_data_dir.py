"""PATH_BASE belongs to one worker and one user, whatever other users and other workers try (T21, F7)."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobfetcher.core.errors import ConfigError
from jobfetcher.core.job import JobId
from jobfetcher.journal import Journal
from jobfetcher.workspace import Base
from tests.support.jobs import make_job
from tests.support.mounts import needs_root, tmpfs

NOBODY = 65534

HOLD = "import sys, time; from pathlib import Path; from jobfetcher.workspace import Base\n" + textwrap.dedent(
    """
    with Base(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
    """
)


@contextlib.contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the directory."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A directory that another user can reach, as the system's temporary folder is."""
    chain = [tmp_path, *tmp_path.parents]
    modes = {folder: folder.stat().st_mode for folder in chain if folder.stat().st_uid == os.geteuid()}
    opened = [folder for folder in chain if folder in modes and not modes[folder] & 0o001]
    for folder in opened:
        folder.chmod(modes[folder] | 0o011)
    yield tmp_path
    for folder in opened:
        folder.chmod(modes[folder])


# -- two workers (F7) -------------------------------------------------------------------------------------------------


@pytest.mark.fault("F7")
def test_a_second_worker_is_refused_at_once_and_told_who_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path / "base") as process:
        started = time.monotonic()
        with pytest.raises(ConfigError) as refused:
            Base(tmp_path / "base")
        assert time.monotonic() - started < 2
        said = str(refused.value)
        assert re.search(rf"in use by another worker \(process {process.pid} on \S+ since \d{{4}}-\d\d-\d\d", said)
        assert len(said.splitlines()) == 1


@pytest.mark.fault("F7")
def test_a_worker_that_was_killed_does_not_block_the_next(tmp_path: Path) -> None:
    with holder(tmp_path / "base") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "base" / "lock").read_text().startswith(f"process {process.pid} ")
    with Base(tmp_path / "base"):
        assert (tmp_path / "base" / "lock").read_text().startswith(f"process {os.getpid()} ")


@pytest.mark.fault("F7")
def test_a_lock_is_given_back_with_the_directory(tmp_path: Path) -> None:
    for _ in range(3):
        with Base(tmp_path / "base"):
            pass
    with Base(tmp_path / "base"), pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        Base(tmp_path / "base")


@pytest.mark.fault("F7")
def test_a_link_in_the_locks_place_is_not_written_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    (tmp_path / "base").mkdir(mode=0o700)
    (tmp_path / "base" / "lock").symlink_to(precious)
    with pytest.raises(ConfigError, match="cannot be used"):
        Base(tmp_path / "base")
    assert precious.read_text() == "keep me"


# -- other users (T21) ------------------------------------------------------------------------------------------------


def as_nobody(script: str, *arguments: str) -> str:
    """Run a Python script as another user and return what it printed."""

    def become() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    done = subprocess.run(
        ["/usr/bin/python3", "-c", textwrap.dedent(script), *arguments],
        preexec_fn=become,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


ATTACKS = """
    import errno, os, sys
    base = sys.argv[1]
    attempts = {
        "list": lambda: os.listdir(base),
        "read journal": lambda: open(base + "/journal.db").read(),
        "read lock": lambda: open(base + "/lock").read(),
        "list jobs": lambda: os.listdir(base + "/jobs"),
        "read input": lambda: open(base + "/jobs/7/files/input").read(),
        "write output": lambda: open(base + "/jobs/7/files/evil", "w"),
        "plant a link": lambda: os.symlink("/etc", base + "/jobs/8"),
        "plant in files": lambda: os.symlink("/etc/passwd", base + "/jobs/7/files/link"),
        "rename": lambda: os.rename(base + "/jobs", base + "/other"),
        "delete": lambda: os.unlink(base + "/journal.db"),
        "enter": lambda: os.chdir(base),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            print(name, "worked")
        except (PermissionError, FileNotFoundError) as error:
            print(name, errno.errorcode[error.errno])
    """


@pytest.mark.fault("T21")
@needs_root
@pytest.mark.parametrize("before", ["missing", "empty and open", "left by an earlier worker"])
def test_another_user_reaches_nothing(shared: Path, before: str) -> None:
    path = shared / "base"
    if before == "empty and open":
        path.mkdir(mode=0o777)
        path.chmod(0o777)
    if before == "left by an earlier worker":
        with Base(path):
            pass
        path.chmod(0o755)
    mask = os.umask(0o022)
    try:
        with Base(path) as base, contextlib.closing(Journal(path / "journal.db")) as journal:
            journal.claim(JobId("7"), "t", make_job())
            workspace = base.job(JobId("7"))
            workspace.create()
            (workspace.files / "input").write_text("secret")
            said = as_nobody(ATTACKS, str(path)).splitlines()
    finally:
        os.umask(mask)
    assert len(said) == 11
    assert [line for line in said if not line.endswith("EACCES")] == []


@pytest.mark.fault("T21")
@needs_root
def test_beside_other_things_the_jobs_are_private_all_the_same(shared: Path) -> None:
    path = shared / "data"
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    (path / "somebody's").touch()
    with Base(path) as base:
        assert path.stat().st_mode & 0o777 == 0o755  # not ours alone, so not ours to close
        base.job(JobId("7")).create()
        (base.job(JobId("7")).files / "input").write_text("secret")
        said = as_nobody(ATTACKS, str(path))
    for attempt in ("list jobs", "read input", "write output", "plant a link", "plant in files", "rename", "read lock"):
        assert f"{attempt} EACCES" in said


@pytest.mark.fault("T21")
@pytest.mark.parametrize("mode", [0o777, 0o757, 0o722])
def test_a_parent_that_everybody_may_change_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/open can be changed by everybody.*chmod go-w"):
        Base(tmp_path / "open" / "base")


@pytest.mark.fault("T21")
@needs_root
def test_a_parent_that_a_group_may_change_is_refused_unless_it_is_its_owners_own(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o775)
    with Base(tmp_path / "open" / "fine"):
        pass
    os.chown(tmp_path / "open", 0, 100)
    with pytest.raises(ConfigError, match="its group"):
        Base(tmp_path / "open" / "refused")


@pytest.mark.fault("T21")
def test_a_sticky_parent_is_fine_but_a_shared_base_is_not(tmp_path: Path) -> None:
    """In a folder like the system's temporary one, anybody could put their own `jobs` or `lock` before ours."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "theirs").touch()
    shared.chmod(0o1777)
    with Base(shared / "ours"):
        pass
    with pytest.raises(ConfigError, match="can be changed by everybody"):
        Base(shared)


@pytest.mark.fault("T21")
def test_a_link_in_the_place_of_jobs_is_refused_and_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    elsewhere.chmod(0o755)
    (tmp_path / "base").mkdir(mode=0o700)
    (tmp_path / "base" / "jobs").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="cannot be used"):
        Base(tmp_path / "base")
    assert elsewhere.stat().st_mode & 0o777 == 0o755


@pytest.mark.fault("T21")
def test_a_link_of_ones_own_is_followed_once(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir(mode=0o700)
    (tmp_path / "home").symlink_to(disk)
    (tmp_path / "base").symlink_to(disk / "base")
    (disk / "base").mkdir(mode=0o700)
    for path in (tmp_path / "base", tmp_path / "home" / "base"):
        with Base(path) as base:
            assert base.path == disk / "base"
            base.job(JobId("7")).create()
            base.job(JobId("7")).remove()
            assert all(base.free_bytes().values())
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=f"lost is a link to {tmp_path}/nowhere, which is not there"):
        Base(tmp_path / "lost")


@pytest.mark.fault("T21")
@needs_root
def test_a_link_of_another_user_is_refused(shared: Path) -> None:
    (shared / "mine").mkdir(mode=0o700)
    (shared / "theirs").symlink_to(shared / "mine")
    os.chown(shared / "theirs", 1000, 1000, follow_symlinks=False)
    with pytest.raises(ConfigError, match="theirs is a link of another user"):
        Base(shared / "theirs")


@pytest.mark.fault("T21")
@needs_root
def test_what_root_used_first_says_how_to_get_it_back(shared: Path) -> None:
    path = shared / "base"
    with Base(path):
        pass
    os.chown(path, NOBODY, NOBODY)
    said = in_child_as_nobody(REFUSED, str(path))
    assert re.search(rf"PATH_BASE: {path}/jobs belongs to another user \(root\).* `sudo chown -R \S+ {path}`", said), (
        said
    )


@needs_root
def test_a_disk_without_exec_is_seen(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "16m", "noexec") as disk, Base(disk / "base") as base:
        assert base.is_noexec
    with Base(tmp_path / "base") as base:
        assert not base.is_noexec


REFUSED = f"""
    import sys
    sys.path[:0] = {sys.path!r}
    from pathlib import Path
    from jobfetcher.core.errors import ConfigError
    from jobfetcher.workspace import Base
    try:
        Base(Path(sys.argv[1]))
    except ConfigError as error:
        print(error)
"""


@pytest.mark.fault("T21")
@needs_root
def test_another_users_directory_is_refused(shared: Path) -> None:
    theirs = shared / "theirs"
    theirs.mkdir(mode=0o755)
    os.chown(theirs, 1000, 1000)
    said = in_child_as_nobody(REFUSED, str(theirs))
    assert "belongs to another user" in said


def in_child_as_nobody(script: str, *arguments: str) -> str:
    """As `as_nobody`, with this project's modules imported before the privileges go (they may lie out of reach)."""
    prelude = "import os, sys\n" + textwrap.dedent(script).replace(
        "try:", f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\ntry:", 1
    )
    done = subprocess.run(
        [sys.executable, "-c", prelude, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.fault("T21")
def test_where_a_directory_must_not_lie_none_is_made(shared: Path) -> None:
    loose = shared / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    with pytest.raises(ConfigError, match="can be changed by everybody"):
        Base(loose / "deep" / "base")
    assert list(loose.iterdir()) == []
