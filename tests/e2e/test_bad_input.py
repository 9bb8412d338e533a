"""What people, jobs and servers get wrong: each is said in one clear line, nothing is lost, and the worker lives on."""

import hashlib
import io
import json
import os
import socket
import stat
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import docker
import pytest

from tests.support.services import free_port, require, require_program, wait_until
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Lab, command, running_worker, work

pytestmark = pytest.mark.docker

NOBODY = 65534

#: Of the machine that runs the tests, and so of the worker under test.
CORES = len(os.sched_getaffinity(0))


def complaint(lab: Lab, cwd: Path, name: str = "run", **changes: str) -> str:
    """Run that command with these settings: it must end with code 2 and one line on standard error, returned."""
    with command([name], lab.env(**changes), cwd) as run:
        assert run.wait() == 2
        (line,) = [line for line in run.errors.splitlines() if line.startswith("jobfetcher: ")]
        assert "Traceback" not in run.errors
    return line.removeprefix("jobfetcher: ")


# -- settings and the machine ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"api_url": ""}, "API_URL: must be set"),
        ({"api_url": "jobs.example.org"}, "API_URL: is not an http or https URL"),
        ({"api_url": "http://192.0.2.1"}, "API_URL: http://192.0.2.1 would send the token unencrypted"),
        ({"access_token": ""}, "ACCESS_TOKEN, or USERNAME and PASSWORD: one of the two must be set"),
        ({"timeout_job": "soon"}, "TIMEOUT_JOB: must be a time such as 30, 90s, 5m or 24h (it is 'soon')"),
        ({"timeout_status": "-1"}, "TIMEOUT_STATUS: must be a time such as"),
        ({"max_jobs": "many"}, "MAX_JOBS: "),
        ({"docker_host": "ssh://host"}, "ssh://host is not an engine on this machine"),
        ({"docker_host": "unix:///nowhere/docker.sock"}, "no container engine answers at unix:///nowhere/docker.sock"),
        ({"gpus": "GPU-none-such"}, "GPUS names GPU-none-such, not on this machine"),
        ({"gpus": "1"}, "GPUS: takes UUIDs such as GPU-8f2c4f0e-... and no numbers; `nvidia-smi -L` lists them"),
        ({"job_signing_keys": "/etc/hostname"}, "JOB_SIGNING_KEYS"),
        ({"storage_allow": "minio.lab/bucket"}, "STORAGE_ALLOW: 'minio.lab/bucket' is neither a host nor a network"),
        ({"ca_file": "/dev/null"}, "CA_FILE: /dev/null is empty"),
        ({"https_proxy": "socks5://proxy.lab:1080"}, "HTTPS_PROXY: is no HTTP proxy"),
        ({"job_network": "host"}, "JOB_NETWORK=host would put jobs into another network namespace"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_setting_is_named_and_exits_2(lab: Lab, tmp_path: Path, changes: dict[str, str], said: str) -> None:
    job = lab.submit("true")
    assert said in complaint(lab, tmp_path, **changes)
    assert lab.server.state(job) == "queued"
    assert not lab.base.exists()  # nothing is made before the settings are accepted


@pytest.mark.fault("T23")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"job_user": "labuser"}, "JOB_USER=labuser: images need not know the user labuser; write numbers"),
        ({"job_network": "brigde"}, "JOB_NETWORK=brigde: the engine has no such network"),
        ({"job_runtime": "rnuc"}, "JOB_RUNTIME=rnuc: the engine has no such runtime"),
        ({"job_cap_add": "SYS_FOO"}, "JOB_CAP_ADD: the engine knows no such capability"),
        ({"job_shm_size": "100TiB"}, "JOB_SHM_SIZE=104857600MiB is more than this machine's memory"),
        ({"allowed_images": "docker.io/library/.*"}, "ALLOWED_IMAGES: docker.io/library/.* looks like a regular expr"),
        ({"allowed_images": "ghcr.io/*, ^docker.io/"}, "ALLOWED_IMAGES: ^docker.io/ looks like a regular expression"),
        ({"cache_size": "100000TiB"}, "CACHE_SIZE=104857600000MiB is more than "),
        ({"reserve_disk": "100000TiB"}, "RESERVE_DISK=104857600000MiB is more than all of "),
        ({"reserve_memory": "100TiB"}, "RESERVE_MEMORY=104857600MiB leaves less than 64 of "),
        ({"reserve_cpus": "4096"}, "RESERVE_CPUS=4096 leaves less than 0.5 of "),
        # 256 of these would have 0.003 cores each, whatever this machine has
        ({"max_jobs": "256", "reserve_cpus": str(CORES - 0.8)}, "MAX_JOBS=256 gives each job 0.0031 of 0.8 cores"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_this_machine_or_its_engine_does_not_have_is_named_and_costs_no_job(
    lab: Lab, tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    job = lab.submit("true")
    assert said in complaint(lab, tmp_path, **changes)
    assert lab.server.state(job) == "queued"
    assert lab.server.events("pull") == []
    if not changes.keys() & {"job_user", "job_network", "job_runtime", "job_cap_add"}:  # those only a container shows
        assert said in complaint(lab, tmp_path, "resources", **changes), "what run refuses is not offered either"
        assert not lab.base.exists(), "nothing is made before the settings are accepted"


def test_run_and_resources_refuse_the_same_in_the_same_words(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/nowhere/jobs")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for changes in (
        {"gpus": "GPU-none-such"},
        {"job_network": "host"},
        {"path_base": str(tmp_path / "link")},
        {"path_base": str(tmp_path / "open" / "jobs")},
    ):
        assert complaint(lab, tmp_path, "resources", **changes) == complaint(lab, tmp_path, **changes)


def test_run_and_resources_say_the_same_of_what_is_odd(lab: Lab, tmp_path: Path) -> None:
    settings = lab.env(max_jobs=str(CORES + 1))
    with command(["resources", "--json"], settings, tmp_path) as run:
        assert run.wait() == 0
        [note] = [note for note in json.loads(run.output)["notes"] if note.startswith("MAX_JOBS=")]
    with command(["run", "--exit-when-idle", "0.1"], settings, tmp_path) as run:
        assert run.wait() == 0
        assert note in run.errors


@pytest.mark.fault("E12")
def test_a_path_host_base_that_is_not_the_mount_is_refused(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for wrong in (tmp_path / "elsewhere", tmp_path / "missing"):
        said = complaint(lab, tmp_path, path_host_base=str(wrong))
        assert said.startswith(f"PATH_HOST_BASE is {wrong}, but PATH_BASE is mounted from {lab.base}")
    assert lab.server.events("pull") == []


def test_a_path_host_base_that_is_the_mount_is_taken(lab: Lab) -> None:
    job = lab.submit("true")
    lab.base.mkdir(mode=0o700)
    work(lab.settings(path_host_base=str(lab.base)))
    assert lab.ended(job)[0] == "finished"


def test_an_engine_without_permission_says_what_to_do(lab: Lab, tmp_path: Path) -> None:
    require("root" if os.geteuid() == 0 else None, "root rights, to make a socket of somebody else")
    # Root without the capabilities that let it pass over permissions: the interpreter may be root's alone to read.
    prefix = [require_program("setpriv", "util-linux"), "--bounding-set=-dac_override,-dac_read_search"]
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as engine:
        path = Path(folder) / "docker.sock"
        engine.bind(str(path))
        engine.listen()
        path.chmod(0o600)
        os.chown(path, NOBODY, NOBODY)
        with command(["run"], lab.env(docker_host=f"unix://{path}"), tmp_path, prefix=prefix) as run:
            assert run.wait() == 2
            assert f"jobfetcher: no permission to use the container engine at unix://{path}" in run.errors
            assert "add the user to the group docker" in run.errors


@pytest.mark.fault("F7")
def test_a_second_worker_on_one_path_base_names_the_first(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit(UNTIL_LET_GO)
    with running_worker(lab.settings(), lambda taken, idle_s: taken == 1) as running:
        lab.server.wait_for_state(job, "running")
        began = time.monotonic()
        said = complaint(lab, tmp_path)
        assert time.monotonic() - began < DEADLINE_S / 2  # at once: the other one's job has no end
        assert f"{lab.base} is in use by another worker (process {os.getpid()} on {socket.gethostname()}" in said
        lab.let_go(job)
        running.join()
    assert lab.ended(job)[0] == "finished"


# -- the server --------------------------------------------------------------------------------------------------------


def says(lab: Lab, cwd: Path, said: str, **changes: str) -> None:
    """Run the command, which must not end by itself, until it says `said` in one line that is not repeated."""
    with command(["run", "--exit-when-idle", "1"], lab.env(timeout_job="0.1", **changes), cwd) as run:
        assert run.wait() == 1  # nobody ever answered, which cron and CI must see
        lines = [line for line in run.errors.splitlines() if "no job can be taken" in line]
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.fault("B9")
def test_an_api_url_that_is_no_worker_api_is_said(lab: Lab, tmp_path: Path) -> None:
    wrong = f"{lab.server.url}/nowhere"
    says(lab, tmp_path, f"{wrong} has no /jobs (404): is API_URL the address of a worker API?", api_url=wrong)


@pytest.mark.fault("B13")
def test_an_api_that_refuses_connections_is_said(lab: Lab, tmp_path: Path) -> None:
    port = free_port()
    says(lab, tmp_path, f"no answer from 127.0.0.1:{port}", api_url=f"http://127.0.0.1:{port}")


def test_credentials_that_are_refused_exit_2(lab: Lab, tmp_path: Path) -> None:
    lab.server.add_account("guest", "guest-password", groups=["guests"], token="guest-token")
    signing_in = {"username": "worker", "aws_endpoint_url": lab.server.url}
    assert complaint(lab, tmp_path, access_token="wrong-token").startswith("the server refused ACCESS_TOKEN (401)")
    said = complaint(lab, tmp_path, password="wrong-password", **signing_in)
    assert said == (
        "sign-in as 'worker' was refused: Incorrect username or password; PASSWORD is from environment (PASSWORD), "
        "USERNAME from environment (USERNAME)"
    )
    said = complaint(lab, tmp_path, access_token="guest-token")
    assert said.startswith("the server does not let this account do that")
    assert "group 'workers'" in said


# -- specifications ----------------------------------------------------------------------------------------------------


@pytest.mark.fault("B16")
@pytest.mark.fault("T1")
@pytest.mark.fault("T2")
@pytest.mark.fault("T9")
def test_unreadable_specifications_are_errors_and_the_worker_lives_on(lab: Lab) -> None:
    def handler(**fields: object) -> dict[str, object]:
        return {"handler": {"image_url": lab.image, **fields}}

    cannot_read = "worker cannot read the job: "
    specs: list[tuple[object, str]] = [
        ({"handler": {}}, "handler.image_url: Field required"),
        ({"app": {"cmd": ["true"]}}, "handler: Field required"),
        ("not even an object", ""),
        ([], ""),
        ({"handler": {"image_url": ["busybox"]}}, "handler.image_url: "),
        ({"app": {"cmd": "true"}, **handler()}, "app.cmd: "),
        ({"app": {"cmd": ["true", 1]}, **handler()}, "app.cmd.1: "),
        ({"app": {"env": ["A=1"]}, **handler()}, "app.env: "),
        ({"app": {"env": {"A=B": "1"}}, **handler()}, "not an environment variable name"),
        (handler(files_down=["a"]), "handler.files_down: "),
        (handler(files_down={"../../canary": "s3://mock-api/a"}), "must lie inside the job directory"),
        (handler(files_down={"/etc/cron.d/x": "s3://mock-api/a"}), "is absolute"),
        (handler(files_down={"a": "s3://mock-api/a", "a/b": "s3://mock-api/b"}), "is a file and a directory"),
        (handler(files_down={"a": "s3://mock-api/../../jobs/1/status"}), "has a '.' or '..' segment"),
        (handler(files_down={"a": ""}), "file id '' is empty"),
        (handler(files_up={"output": "../../../etc"}), "must lie inside the job directory"),
        (handler(files_up={"output": "/etc"}), "is absolute"),
        (handler(files_up={"model": "out"}), "outputs.0.kind: "),
        ({**handler(), "hardware": {"memory": -1}}, "hardware.memory: "),
        ({**handler(), "hardware": {"cpu_cores": "two"}}, "hardware.cpu_cores: "),
    ]
    jobs: dict[int, str] = {}
    for number, (spec, said) in enumerate(specs):
        if number % 4 == 0:  # five bad ones in a row make a worker test itself (T23)
            good = lab.submit("true")
        jobs[lab.server.submit(spec, raw=True)] = said  # type: ignore[arg-type]  # any JSON is the point
    good = lab.submit("true")
    heard = work(lab.settings(), jobs=len(jobs) + 1 + len(specs) // 4)
    for job, said in jobs.items():
        state, details = lab.ended(job)
        assert (state, details[: len(cannot_read)]) == ("error", cannot_read)
        assert said in details
        assert lab.server.updates(job) == ["error"]
    assert lab.ended(good)[0] == "finished"
    assert len(heard.all("run")) == 1 + len(specs) // 4
    assert lab.server.events("sign_download") == []


def test_an_output_folder_that_is_an_input_file_is_an_error(lab: Lab) -> None:
    file_id = lab.server.put_input("x", b"x")
    jobs = [
        lab.submit("true", files_down={"out": file_id}, files_up={"output": "out"}),
        lab.submit("true", files_down={"out": file_id}, files_up={"output": "out/deeper"}),
    ]
    work(lab.settings(), jobs=2)
    for job, folder in zip(jobs, ("out", "out/deeper"), strict=True):
        assert lab.ended(job) == ("error", f"output folder {folder!r} is an input file of the same job")


@pytest.mark.fault("C7")
def test_a_missing_input_is_an_error_and_no_cancel(lab: Lab) -> None:
    near = lab.server.put_input("data/a.tif.bak", b"x").removesuffix(".bak")  # S14: a URL is given for its beginning
    far = near.replace("a.tif", "nothing-like-it")
    on_storage, on_server = (lab.submit("true", files_down={"in/a.tif": file_id}) for file_id in (near, far))
    good = lab.submit("true")
    work(lab.settings(), jobs=3)
    state, details = lab.ended(on_storage)
    assert state == "error"
    assert "in/a.tif" in details
    assert "not found" in details or "does not exist" in details
    assert lab.ended(on_server) == ("error", f"input {far} does not exist on the server")
    assert lab.ended(good)[0] == "finished"
    assert lab.server.events("missing") != []


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def load_image(engine: docker.APIClient) -> Iterator[Callable[..., str]]:
    """Load an image made by hand (image-spec v1 as `docker save` writes it), removed at the end: its reference."""
    loaded: list[str] = []
    client: Any = engine  # its stubs do not know `load_image`

    def load(files: Mapping[str, bytes], architecture: str = "") -> str:
        reference = f"jobfetcher-test/made-{uuid4().hex[:8]}:1"
        layer = _tar(files)
        config = {
            "os": "linux",
            "architecture": architecture or engine.version()["Arch"],
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        }
        manifest = [{"Config": "config.json", "RepoTags": [reference], "Layers": ["layer.tar"]}]
        content = {"config.json": json.dumps(config).encode(), "layer.tar": layer}
        loaded.append(reference)
        list(client.load_image(_tar({**content, "manifest.json": json.dumps(manifest).encode()})))
        return reference

    yield load
    for reference in loaded:
        engine.remove_image(reference, force=True)


def _tar(files: Mapping[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.mode, entry.size = 0o755, len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


@pytest.mark.fault("T14")
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"pull_policy": "never"}, "is not on this machine, and PULL_POLICY=never"),
        ({"allowed_images": "docker.io/library/*"}, "is not among the ALLOWED_IMAGES of this worker"),
    ],
)
def test_what_this_machines_owner_does_not_allow_is_left_to_others(
    lab: Lab, setting: dict[str, str], said: str
) -> None:
    job = lab.submit("true", image="jobfetcher-test/none-such:1")
    work(lab.settings(**setting))
    state, details = lab.ended(job)
    assert state == "queued"
    assert said in details


@pytest.mark.fault("E6")
@pytest.mark.fault("E8")
def test_images_that_cannot_be_run_are_errors_and_the_worker_lives_on(lab: Lab, load_image: Callable[..., str]) -> None:
    foreign = load_image({"bin/sh": b"not for here"}, architecture="s390x")
    no_shell = load_image({"program": Path("/bin/busybox").read_bytes()})
    here = lab.engine.version()["Arch"]
    jobs = {
        lab.submit("true", image="Not A Reference"): "'Not A Reference' is not an image reference",
        lab.submit("true", image=foreign): f"image is s390x, this worker is {here}",
        lab.submit("true", image=no_shell): "the image has no /bin/sh",
        lab.submit(image=no_shell): "neither the job nor the image says what to run",
    }
    good = lab.submit("true")
    work(lab.settings(), jobs=len(jobs) + 1)
    for job, said in jobs.items():
        state, details = lab.ended(job)
        assert state == "error", details
        assert said in details
    assert lab.ended(good)[0] == "finished"


# -- outputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("T4")
@pytest.mark.fault("F11")
def test_outputs_that_are_no_files_are_named_and_never_stored(lab: Lab, tmp_path: Path) -> None:
    require("root" if os.geteuid() == 0 else None, "root rights, to make a device")
    canary = tmp_path / "canary"
    canary.write_text("canary of the host")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner").write_text("canary of the host")
    job = lab.submit(
        "cd /files/out; echo good > good; mkfifo fifo;",
        f"ln -s /etc/shadow shadow; ln -s {canary} file; ln -s {tmp_path}/folder folder; ln -s / root;",
        "ln -s loop loop; ln -s good inside; ln -s /dev/zero zero;",
        "rm -r /files/logs; ln -s /etc /files/logs;",
        UNTIL_LET_GO,
        files_up={"output": "out", "log": "logs", "artifact": "logs/apt"},
    )
    with running_worker(lab.settings(), lambda taken, idle_s: taken == 1) as running:
        out = lab.files(job) / "out"
        wait_until((out / "good").exists, "the job began", DEADLINE_S)
        wait_until((out.parent / "logs").is_symlink, "the links are there", DEADLINE_S)
        _plant_socket(out)
        os.mknod(out / "device", stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero: endless where it is read
        began = time.monotonic()
        lab.let_go(job)
        running.join()
        assert time.monotonic() - began < DEADLINE_S / 2  # nothing waited for a writer of the FIFO
    state, details = lab.ended(job)
    assert state == "finished"
    assert details.startswith("not uploaded: ")
    assert details.endswith("; and 7 more")  # of 12 things 5 are named
    stored = lab.server.results(job)
    assert stored.keys() == {"output/out/good", "log/jobfetcher/container.log", "log/jobfetcher/provenance.json"}
    assert all(b"canary of the host" not in content and b"root:" not in content for content in stored.values())
    assert canary.read_text() == "canary of the host"


@pytest.mark.fault("T4")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        ("ln -s /etc/shadow /files/out/x", "out/x is a link, not a file"),
        ("mkfifo /files/out/x", "out/x is a FIFO, not a file"),
        ("rmdir /files/out; ln -s /etc /files/out", "out is a link, not a file"),
    ],
    ids=["link", "fifo", "folder"],
)
def test_what_was_not_uploaded_is_told(lab: Lab, make: str, said: str) -> None:
    job = lab.submit(make, files_up={"output": "out"})
    work(lab.settings())
    assert lab.ended(job) == ("finished", f"not uploaded: {said}")


@pytest.mark.fault("C15")
def test_a_name_that_cannot_be_sent_fails_the_job_after_all_else_was_sent(lab: Lab) -> None:
    job = lab.submit(
        r"cd /files/out; touch good; touch \"$(printf 'new\nline')\" \"$(printf 'latin\351')\"".replace('\\"', '"'),
        files_up={"output": "out"},
    )
    work(lab.settings())
    state, details = lab.ended(job)
    assert state == "error"
    assert "and 1 more was not uploaded: its name is not UTF-8 text or has control characters" in details
    assert "output/out/good" in lab.server.results(job)


def _plant_socket(folder: Path) -> None:
    """A socket in `folder`, by way of /proc: the path of a socket has room for 107 bytes."""
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as planted:
            planted.bind(f"/proc/self/fd/{descriptor}/socket")
    finally:
        os.close(descriptor)
