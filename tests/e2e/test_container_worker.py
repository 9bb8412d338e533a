"""The worker itself in a container, built from the Dockerfile, with the engine's socket mounted, as labs run it.

It reads a `.env` of the form that deployed workers have. The mock API listens on the engine's bridge, where the worker
knows it as host.docker.internal.
"""

import base64
import contextlib
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from jobfetcher.core.job import parse_job_id
from jobfetcher.sources.worker_api.signing import sign
from tests.support.mock_server import MockServer
from tests.support.mounts import needs_root
from tests.support.services import answers, free_port, running, wait_until
from tests.support.worker import UNTIL_LET_GO, Lab

pytestmark = pytest.mark.docker

#: The user that the Dockerfile makes, in numbers: as the host sees him.
IMAGES_USER = 10001

INPUT = bytes(range(256)) * 100
COPY = ["cp /files/data/in.bin /files/out/copy.bin"]

# As deployed ones look: remarks behind the values, an empty token, TIMOUT_STATUS spelt as it is.
ENV_FILE = """\
# worker settings
API_URL={api}  # address of the worker-facing API
USERNAME=worker  # account of this worker
PASSWORD=worker-password  # and its password
ACCESS_TOKEN=  # alternatively, a fixed token

PATH_BASE=/data  # where job files are kept, as the worker sees it
{path_host_base}
TIMEOUT_JOB=1  # seconds between two questions for a job
TIMOUT_STATUS=1  # seconds between two signs of life
AWS_ENDPOINT_URL={api}
RESERVE_DISK={reserve_disk}
"""


@dataclass(frozen=True)
class Bay:
    """A mock API on the engine's bridge, and a host directory for a worker in a container."""

    lab: Lab
    worker_image: str
    env_file: Path

    @property
    def api(self) -> str:
        """The API as the worker in the container knows it."""
        return f"http://host.docker.internal:{httpx.URL(self.lab.server.url).port}"

    @contextlib.contextmanager
    def worker(
        self,
        *arguments: str,
        path_host_base: str = "",
        reserve_disk: str = "0",
        mounted: bool = True,
        read_only: bool = False,
        keys: Path | None = None,
        user: str = "",
        groups: list[int] | None = None,
    ) -> Iterator["Contained"]:
        """The worker's container with these arguments, removed at the end of the block. `keys`: JOB_SIGNING_KEYS.

        `user` and `groups`: as whom it runs, as `--user` and `--group-add` say it; empty: as the image says.
        """
        self.env_file.write_text(
            ENV_FILE.format(api=self.api, path_host_base=path_host_base, reserve_disk=reserve_disk)
        )
        engine = self.lab.engine
        binds = ["/var/run/docker.sock:/var/run/docker.sock", f"{self.env_file}:/app/.env:ro"]
        binds += [f"{self.lab.base}:/data"] if mounted else []
        binds += [f"{keys}:/app/keys:ro"] if keys else []
        config = engine.create_host_config(
            binds=binds,
            extra_hosts={"host.docker.internal": "host-gateway"},
            read_only=read_only,
            group_add=groups,
        )
        signing = {"JOB_SIGNING_KEYS": "/app/keys", "JOB_SIGNING_AUDIENCE": "the lab", "JOB_SIGNING_ALLOW": "tags"}
        environment = signing if keys else {}
        container = engine.create_container(
            self.worker_image, list(arguments), user=user, host_config=config, environment=environment
        )["Id"]
        try:
            engine.start(container)
            yield Contained(engine, container)
        except BaseException as error:
            error.add_note(f"the worker printed:\n{engine.logs(container, tail=40).decode(errors='replace')}")
            raise
        finally:
            engine.remove_container(container, force=True)


@dataclass(frozen=True)
class Contained:
    """A worker's container."""

    engine: docker.APIClient
    id: str

    @property
    def printed(self) -> str:
        """All it printed so far."""
        return self.engine.logs(self.id).decode(errors="replace")

    def types(self, *words: str) -> str:
        """What `docker exec` of this prints on standard output; it must succeed."""
        made = self.engine.exec_create(self.id, list(words), stderr=False)["Id"]
        printed: str = self.engine.exec_start(made).decode()
        assert self.engine.exec_inspect(made)["ExitCode"] == 0, printed
        return printed

    def ended(self) -> int:
        """Its exit code, when it ends by itself."""
        return int(self.engine.wait(self.id, timeout=60)["StatusCode"])

    def stop(self, timeout_s: int) -> int:
        """What `docker stop` does: TERM, and KILL after `timeout_s`. Its exit code; 137 when it was killed."""
        self.engine.stop(self.id, timeout=timeout_s)
        return int(self.engine.inspect_container(self.id)["State"]["ExitCode"])


def host_gateway(engine: docker.APIClient, image: str) -> str:
    """The host's address as containers on the bridge know it; the engine itself says it only to them."""
    config = engine.create_host_config(extra_hosts={"the-host": "host-gateway"})
    container = engine.create_container(image, ["grep", "the-host", "/etc/hosts"], host_config=config)["Id"]
    try:
        engine.start(container)
        engine.wait(container)
        return engine.logs(container).decode().split()[0]
    finally:
        engine.remove_container(container, force=True)


@pytest.fixture
def bay(tmp_path: Path, engine: docker.APIClient, busybox: str, worker_image: str) -> Iterator[Bay]:
    """The storage's URLs name the bridge's own, private address; a worker uses it because the API is there, too."""
    bridge = host_gateway(engine, busybox)
    port = free_port()
    url = f"http://{bridge}:{port}"
    command = [sys.executable, "-m", "mock_api", "--host", bridge, "--port", str(port), "--storage-url", url]
    command += ["--data-dir", str(tmp_path / "server")]
    base = tmp_path / "base"
    base.mkdir(mode=0o700)
    with (
        running(command, tmp_path / "server.log", lambda: answers(f"{url}/access_info")),
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        server = MockServer(url, tmp_path / "server", client)
        lab = Lab(server, base, busybox, engine)
        yield Bay(lab, worker_image, tmp_path / "env")
        assert lab.containers() == []
        assert not (base / "jobs").exists() or list((base / "jobs").iterdir()) == []
        assert server.violations() == []


def submit_copy(lab: Lab) -> int:
    file_id = lab.server.put_input("in.bin", INPUT)
    return lab.submit(*COPY, files_down={"data/in.bin": file_id}, files_up={"output": "out"})


def test_a_worker_in_a_container_finds_its_host_path_and_runs_a_job(bay: Bay) -> None:
    job = submit_copy(bay.lab)
    with bay.worker("run", "--once") as worker:
        assert worker.ended() == 0
        assert "worker-password" not in worker.printed
    assert bay.lab.ended(job) == ("finished", "")
    results = bay.lab.server.results(job)
    assert results["output/out/copy.bin"] == INPUT
    assert set(results) == {"output/out/copy.bin", "log/jobfetcher/container.log", "log/jobfetcher/provenance.json"}
    assert [event["note"] for event in bay.lab.server.events("sign_in")] == ["USER_PASSWORD_AUTH"]


@pytest.mark.fault("T15")
def test_the_image_has_what_checks_signatures(bay: Bay, tmp_path: Path) -> None:
    private = bytes(range(32))
    public = Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    keys = tmp_path / "keys"
    keys.write_text(f"lab {base64.b64encode(public).decode()}\n")
    unsigned = bay.lab.submit("true")
    specs: dict[str, Any] = {
        "app": {"cmd": ["true"]},
        "handler": {"image_url": bay.lab.image, "files_up": {}},
        "meta": {},
    }
    specs["meta"]["signature"] = sign(
        private, "lab", parse_job_id(str(unsigned + 1)), specs, audience=["the lab"], expires=int(time.time()) + 3600
    )
    signed = bay.lab.server.submit(specs)
    with bay.worker("run", "--exit-when-idle", "1", keys=keys) as worker:
        assert worker.ended() == 0
    assert [bay.lab.server.state(job) for job in (unsigned, signed)] == ["error", "finished"]


def test_the_right_path_host_base_is_taken(bay: Bay) -> None:
    job = submit_copy(bay.lab)
    with bay.worker("run", "--once", path_host_base=f"PATH_HOST_BASE={bay.lab.base}  # as the host sees it") as worker:
        assert worker.ended() == 0
    assert bay.lab.ended(job) == ("finished", "")
    assert bay.lab.server.results(job)["output/out/copy.bin"] == INPUT


@pytest.mark.fault("E12")
def test_a_wrong_path_host_base_is_refused(bay: Bay) -> None:
    job = submit_copy(bay.lab)
    with bay.worker("run", "--once", path_host_base="PATH_HOST_BASE=/srv/elsewhere  # wrong") as worker:
        assert worker.ended() == 2
        assert worker.printed.splitlines()[-1] == (
            f"jobfetcher: PATH_HOST_BASE is /srv/elsewhere, but PATH_BASE is mounted from {bay.lab.base}; correct it, "
            "or leave it out (the worker finds it by itself)"
        )
    assert bay.lab.server.state(job) == "queued"


def test_without_a_mount_for_its_directory_the_worker_refuses_to_start(bay: Bay) -> None:
    job = submit_copy(bay.lab)
    with bay.worker("run", "--once", mounted=False) as worker:
        assert worker.ended() == 2
        last = worker.printed.splitlines()[-1]
    assert last.startswith("jobfetcher: PATH_BASE /data is not on the engine's host")
    assert "docker run -v HOST_DIRECTORY:/data" in last
    assert bay.lab.server.state(job) == "queued"


@pytest.mark.fault("D1")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("read_only", [False, True], ids=["writable", "read-only"])
def test_the_engines_disk_is_watched_from_inside_a_container(bay: Bay, read_only: bool) -> None:
    """PATH_BASE has room on a disk of its own; the engine's disk, where images go, has not."""
    engines = os.statvfs(bay.lab.engine.info()["DockerRootDir"])
    total, free = engines.f_blocks * engines.f_frsize, engines.f_bavail * engines.f_frsize
    reserve_mib = (free + (total - free) // 2) >> 20  # more than what is free there, and less than all
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"mode=0700,size={4 * total}", "none", str(bay.lab.base)], check=True)
    try:
        job = submit_copy(bay.lab)
        with bay.worker("run", reserve_disk=f"{reserve_mib}MiB", read_only=read_only) as worker:
            wait_until(lambda: "no job can be taken" in worker.printed, "it says that there is no room")
            assert "the engine's disk (as / of the worker's container) has less than" in worker.printed
            assert " GiB free on the engine's disk (as / of the worker's container); engine: " in worker.printed
            record = json.loads(worker.types("jobfetcher", "resources", "--json"))
            assert [(disk["path"], disk["name"]) for disk in record["disks"]] == [
                ("/data", "/data"),
                ("/", "the engine's disk (as / of the worker's container)"),
            ]
            assert "\nPATH_BASE\t/data\t.env (PATH_BASE)\n" in worker.types("jobfetcher", "config")
        assert bay.lab.server.state(job) == "queued"
        with bay.worker("run", "--once", read_only=read_only) as worker:
            assert worker.ended() == 0
        assert bay.lab.ended(job) == ("finished", "")
    finally:
        subprocess.run(["umount", str(bay.lab.base)], check=True)


def test_docker_stop_ends_an_idle_worker_at_once(bay: Bay) -> None:
    with bay.worker("run") as worker:
        wait_until(lambda: len(bay.lab.server.events("poll")) > 1, "the worker asks for jobs")
        began = time.monotonic()
        assert worker.stop(timeout_s=30) == 0
        # F1 allows 2 s, and a poll in flight some more; the engine takes its own time on a busy machine
        assert time.monotonic() - began < 10


def test_docker_stop_lets_a_running_job_end(bay: Bay) -> None:
    job = bay.lab.submit(UNTIL_LET_GO)
    with bay.worker("run") as worker:
        bay.lab.server.wait_for_state(job, "running")
        bay.lab.engine.kill(worker.id, "SIGTERM")
        wait_until(lambda: "finishing job" in worker.printed, "the worker says that it finishes its job")
        assert bay.lab.server.state(job) == "running"
        bay.lab.let_go(job)
        assert worker.ended() == 0
    assert bay.lab.ended(job) == ("finished", "")


@pytest.mark.fault("A11")
def test_a_worker_that_is_removed_and_made_anew_goes_on_with_its_job(bay: Bay) -> None:
    job = bay.lab.submit(UNTIL_LET_GO, "&& echo result > /files/out/result", files_up={"output": "out"})
    with bay.worker("run"):
        bay.lab.server.wait_for_state(job, "running")
        wait_until(lambda: bool(bay.lab.containers()), "the job's container is there")
        [before] = bay.lab.containers()  # removed by force at the end of the block, as an update does
    [after] = bay.lab.containers()
    assert (after["Id"], after["State"]) == (before["Id"], "running")
    with bay.worker("run", "--exit-when-idle", "1") as worker:
        wait_until(lambda: "going on with it" in worker.printed, "the next one takes it over")
        bay.lab.let_go(job)
        assert worker.ended() == 0
    assert bay.lab.ended(job) == ("finished", "")
    assert bay.lab.server.results(job)["output/out/result"] == b"result\n"


@pytest.mark.fault("T24", "E13")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give the directory to another user")
def test_a_worker_that_is_not_root_in_its_container_runs_a_job_of_root(bay: Bay) -> None:
    """As the image's own user, who is let at the socket by its group. The job's files belong to root, and go, too."""
    socket = Path("/var/run/docker.sock").stat()
    if not socket.st_gid or not socket.st_mode & 0o020:
        pytest.skip("the engine's socket belongs to no group that may use it")
    bay.env_file.touch(mode=0o600)
    for path in (bay.lab.base, bay.env_file):
        os.chown(path, IMAGES_USER, IMAGES_USER)
    file_id = bay.lab.server.put_input("in.bin", INPUT)
    commands = [*COPY, "mkdir -m 700 /files/out/deep", "echo deep > /files/out/deep/file", "id -u > /files/out/user"]
    job = bay.lab.submit(" && ".join(commands), files_down={"data/in.bin": file_id}, files_up={"output": "out"})
    with bay.worker("run", "--once", user="jobfetcher", groups=[socket.st_gid]) as worker:
        assert worker.ended() == 0
    assert bay.lab.ended(job) == ("finished", "")
    results = bay.lab.server.results(job)
    assert results["output/out/copy.bin"] == INPUT
    assert results["output/out/deep/file"] == b"deep\n"
    assert results["output/out/user"] == b"0\n"
    assert {path.stat().st_uid for path in bay.lab.base.rglob("*")} == {IMAGES_USER}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give the directory to another user")
def test_a_worker_that_is_not_root_and_not_let_at_the_socket_says_so(bay: Bay) -> None:
    os.chown(bay.lab.base, IMAGES_USER, IMAGES_USER)
    with bay.worker("run", "--once", user="jobfetcher") as worker:
        assert worker.ended() == 2
        last = worker.printed.splitlines()[-1]
    assert last.startswith("jobfetcher: no permission to use the container engine at unix:///var/run/docker.sock; ")
    assert last.endswith("or the socket's group to the worker's container (docker run --group-add GROUP_ID)")


@pytest.mark.fault("T26")
@pytest.mark.fault("T32")
@needs_root
def test_a_directory_of_another_user_with_other_things_in_it_goes_on_working(bay: Bay) -> None:
    """As the reference's own example lies in somebody's home: the worker has a directory of its own there, reached
    through a descriptor, as no second name can be mounted in a container."""
    (bay.lab.base / "thesis.tex").write_text("precious")
    bay.lab.base.chmod(0o755)
    bay.env_file.touch()
    for theirs in (bay.lab.base, bay.env_file):
        os.chown(theirs, 1234, 1234)
    job = submit_copy(bay.lab)
    with bay.worker("run", "--once") as worker:
        assert worker.ended() == 0
        printed = worker.printed
    assert "warning: /app/.env belongs to another user (1234)" in printed
    assert "PATH_BASE: /data belongs to 1234, who could put another directory in its place" in printed
    assert bay.lab.ended(job) == ("finished", "")
    assert bay.lab.server.results(job)["output/out/copy.bin"] == INPUT
    assert sorted(entry.name for entry in bay.lab.base.iterdir()) == ["jobfetcher", "thesis.tex"]
    assert (bay.lab.base.stat().st_uid, stat.S_IMODE(bay.lab.base.stat().st_mode)) == (1234, 0o755)
    assert list((bay.lab.base / "jobfetcher" / "jobs").iterdir()) == []
