"""A worker that is not root, on the machine itself: all it has is the group of the engine's socket.

What a job's root user leaves, closed to everybody else, must still be sent and deleted (FAULTS.md E13).
"""

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from uuid import uuid4

import docker
import pytest

from tests.support.as_user import python_as
from tests.support.mock_server import running_mock_api
from tests.support.mounts import ext4
from tests.support.services import REPOSITORY, require, require_program, wait_until
from tests.support.worker import UNTIL_LET_GO, Lab, assert_clean, command

pytestmark = pytest.mark.docker

USER = 64123  # nobody's number, on Debian: above those of users, below nobody's (Debian policy, 9.2.2)
SOCKET = Path("/var/run/docker.sock")

CLOSED = (
    "cd /files/out && mkdir -p deep/er && echo secret > closed && echo deep > deep/er/closed && echo open > open &&"
    "chmod 000 closed deep/er/closed deep/er deep && chmod 700 . && chown 1234:1234 open && mkdir /files/elsewhere &&"
    "touch /files/elsewhere/x && chmod 000 /files/elsewhere"
)


#: A shell that obeys a job and lies to whoever else calls it: it says that all is well and leaves a word of its own.
VILLAIN = b"""#!/bin/busybox sh
case $2 in
*chown*-Rh*) for folder in /files /jobfetcher-*; do echo villain >$folder/out/canary; done; exit 0 ;;
esac
exec /bin/busybox sh "$@"
"""


@pytest.fixture
def make_image(engine: docker.APIClient) -> Iterator[Callable[..., str]]:
    """Make an image of these programs and changes, and nothing else; gone at the end."""
    made: list[str] = []

    def make(programs: Mapping[str, bytes], *changes: str) -> str:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, content in programs.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode = len(content), 0o755
                archive.addfile(entry, io.BytesIO(content))
        repository = f"jobfetcher-test/made-{uuid4().hex[:8]}"
        engine.import_image_from_data(packed.getvalue(), repository, "1", changes=list(changes))
        made.append(f"{repository}:1")
        return made[-1]

    yield make
    for reference in made:
        engine.remove_image(reference, force=True)


@pytest.fixture
def own_lab(engine: docker.APIClient, busybox: str) -> Iterator[Lab]:
    """A mock API, and a directory that belongs to USER; pytest's own ones are closed to all but root."""
    require("root" if os.geteuid() == 0 else None, "root rights, without which nobody else can be played")
    require("socket" if SOCKET.is_socket() else None, f"an engine at {SOCKET}")
    home = Path(tempfile.mkdtemp(prefix="jobfetcher-user-"))
    os.chown(home, USER, USER)
    try:
        with running_mock_api(home / "server") as server:
            lab = Lab(server, home / "base", busybox, engine)
            before = lab.held()
            yield lab
            assert_clean(lab, before)
    finally:
        shutil.rmtree(home)


def as_user(directory: Path) -> Path:
    """A program that is Python for USER with the socket's group."""
    return python_as(directory, USER, USER, SOCKET.stat().st_gid)


@pytest.mark.fault("E13")
def test_what_a_jobs_root_user_leaves_is_sent_and_deleted(own_lab: Lab, tmp_path: Path) -> None:
    lab = own_lab
    for program in ("setpriv", "unshare"):
        require_program(program, "util-linux")
    job = lab.submit(CLOSED, files_up={"output": "out"})
    home = lab.base.parent
    env = {**lab.env(), "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    with command(["run", "--once"], env, home, executable=as_user(tmp_path)) as worker:
        assert worker.wait() == 0, worker.errors
    assert lab.base.stat().st_uid == USER, "the worker was not the user that it should have been"
    assert lab.ended(job) == ("finished", "")
    results = lab.server.results(job)
    assert {name: content for name, content in results.items() if name.startswith("output/")} == {
        "output/out/closed": b"secret\n",
        "output/out/deep/er/closed": b"deep\n",
        "output/out/open": b"open\n",
    }


@pytest.mark.fault("E13", "T27")
def test_nothing_of_the_jobs_image_runs_to_give_its_files_back(
    own_lab: Lab, make_image: Callable[..., str], tmp_path: Path
) -> None:
    lab = own_lab
    busybox = Path("/bin/busybox").read_bytes()
    commands = dict.fromkeys(("bin/busybox", "bin/mkdir", "bin/chmod", "bin/chown", "bin/touch"), busybox)
    villain = make_image({**commands, "bin/sh": VILLAIN}, "ENV PATH=/bin")
    job = lab.submit(CLOSED, image=villain, files_up={"output": "out"})
    home = lab.base.parent
    env = {**lab.env(), "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    with command(["run", "--once"], env, home, executable=as_user(tmp_path)) as worker:
        assert worker.wait() == 0, worker.errors
    assert lab.ended(job) == ("finished", "")
    names = {name for name in lab.server.results(job) if name.startswith("output/")}
    assert names == {"output/out/closed", "output/out/deep/er/closed", "output/out/open"}


@pytest.mark.fault("E13", "T27")
def test_what_a_job_on_an_image_without_a_shell_leaves_is_sent(
    own_lab: Lab, make_image: Callable[..., str], tmp_path: Path
) -> None:
    lab = own_lab
    does = "cd /files/out && /busybox mkdir deep && echo deep >deep/closed && /busybox chmod 000 deep/closed deep"
    busybox = Path("/bin/busybox").read_bytes()
    image = make_image({"busybox": busybox}, f'ENTRYPOINT ["/busybox", "sh", "-c", "{does}"]')
    job = lab.submit(image=image, files_up={"output": "out"})
    home = lab.base.parent
    env = {**lab.env(), "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    with command(["run", "--once"], env, home, executable=as_user(tmp_path)) as worker:
        assert worker.wait() == 0, worker.errors
    assert lab.ended(job) == ("finished", "")
    assert lab.server.results(job)["output/out/deep/closed"] == b"deep\n"


@pytest.mark.fault("E13")
def test_what_a_failed_job_leaves_is_deleted(own_lab: Lab, tmp_path: Path) -> None:
    lab = own_lab
    job = lab.submit(f"{CLOSED}; exit 3", files_up={"output": "out"})
    home = lab.base.parent
    env = {**lab.env(), "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    with command(["run", "--once"], env, home, executable=as_user(tmp_path)) as worker:
        assert worker.wait() == 0, worker.errors
    state, details = lab.ended(job)
    assert (state, details.startswith("exit code 3")) == ("error", True), details
    assert "output/out/closed" in lab.server.results(job)


def test_an_engine_without_permission_is_refused(own_lab: Lab, tmp_path: Path) -> None:
    job = own_lab.submit("true")
    program = as_user(tmp_path)
    program.write_text(program.read_text().replace(f"--groups={SOCKET.stat().st_gid}", f"--groups={USER}"))
    home = own_lab.base.parent
    with command(["run"], {**own_lab.env(), "PYTHONPATH": str(REPOSITORY)}, home, executable=program) as worker:
        assert worker.wait() == 2, worker.errors
    last = worker.errors.splitlines()[-1]
    assert last.startswith("jobfetcher: no permission to use the container engine")
    assert "usermod -aG docker" in last
    assert own_lab.server.state(job) == "queued"


@pytest.mark.fault("E13")
def test_what_a_cancelled_job_leaves_is_deleted(own_lab: Lab, tmp_path: Path) -> None:
    lab = own_lab
    job = lab.submit(f"{CLOSED}; {UNTIL_LET_GO}", files_up={"output": "out"})
    home = lab.base.parent
    env = {**lab.env(), "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    with command(["run", "--once"], env, home, executable=as_user(tmp_path)) as worker:
        wait_until(lambda: (lab.files(job) / "elsewhere/x").exists(), "the job has written its files")
        lab.server.delete(job)
        assert worker.wait() == 0, worker.errors


@pytest.mark.fault("E13", "T27")
def test_what_nobody_may_delete_is_named_and_the_worker_goes_on(own_lab: Lab, tmp_path: Path) -> None:
    """Root of this machine made a file immutable: no helper can give it back. Later root thinks better of it."""
    lab = own_lab
    chattr = require_program("chattr", "e2fsprogs")
    home, program = lab.base.parent, as_user(tmp_path)
    env = {**lab.env(reserve_disk="1MiB"), "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    with ext4(lab.base) as disk:
        shutil.rmtree(disk / "lost+found")
        os.chown(disk, USER, USER)
        with command(["run", "--exit-when-idle", "1"], env, home, executable=program) as worker:
            big = "cd /files/out && dd if=/dev/zero of=big bs=1M count=3 && mkdir x && touch x/y && chmod 000 x"
            job = lab.submit(f"{big} && {UNTIL_LET_GO}", files_up={"output": "out"})
            wait_until(lambda: (lab.files(job) / "out/x").exists(), "the job has written its files")
            subprocess.run([chattr, "+i", str(lab.files(job) / "out/big")], check=True)
            lab.let_go(job)
            assert worker.wait() == 0, worker.errors
        assert lab.ended(job) == ("finished", "")
        left = disk / "jobs" / f"{job}.left1"
        said = [line for line in worker.errors.splitlines() if f"{left} is left, with 3 MiB" in line]
        assert len(said) == 1
        assert "out/big: Operation not permitted" in said[0]
        assert f"rm -r {left}" in said[0]
        assert [path.name for path in (left / "files/out").iterdir()] == ["big"]

        other = lab.submit("true")
        with command(["run", "--once"], env, home, executable=program) as worker:
            assert worker.wait() == 0, worker.errors
        assert lab.ended(other) == ("finished", "")
        assert worker.errors.count(f"{left} is left, with 3 MiB") == 1

        subprocess.run([chattr, "-i", str(left / "files/out/big")], check=True)
        another = lab.submit("true")
        with command(["run", "--once"], env, home, executable=program) as worker:
            assert worker.wait() == 0, worker.errors
        assert lab.ended(another) == ("finished", "")
        assert str(left) not in worker.errors
        assert not left.exists()
