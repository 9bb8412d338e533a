"""A Podman of a test's own behind its Docker-compatible socket, rootful or rootless: Debian's, with crun and catatonit.

It lies below a temporary directory: storage, locks, events, configuration. Its service and its containers run in a
mount namespace that outlives the service, where two things are as on a lab's machine that are not so on every machine
of tests: no control groups v2 with controllers of their own beside those of v1, which crun refuses, and a /dev/net/tun
that is open to users, which slirp4netns needs. The rootful one has a network namespace as well, so that its bridges and
firewall rules are no business of the machine's. The rootless one is a user's of its own, made for it and removed again,
with the subordinate ids that `useradd` gives on Debian. Only root can do all that.
"""

import contextlib
import json
import os
import pwd
import resource
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import docker
from docker.errors import DockerException

from tests.support.services import ensure_busybox_image, require, require_program, tail, wait_until

#: Programs without which Podman runs no container like ours, and the packages that have them.
_PROGRAMS = {
    "podman": "podman",
    "crun": "crun",
    "catatonit": "catatonit",
    "newuidmap": "uidmap",
    "slirp4netns": "slirp4netns",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
_START_S = 60.0
_STOP_S = 30.0

#: Before a service: what the machine has otherwise is put right, in this mount namespace only.
_PREPARE = """
if mountpoint --quiet /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
mknod {tun} c 10 200 && chmod 666 {tun} && {{ [ ! -e /dev/net/tun ] || mount --bind {tun} /dev/net/tun; }}
echo ready > {ready}
exec sleep infinity
"""


#: Reads a container's configuration and writes it with this process's own limits (proc_pid_limits(5)).
_LIMITS_HOOK = r"""#!/bin/sh
most() { sed -nE "s/^Max $1 +\S+ +(\S+) .*/\\1/p" /proc/self/limits | sed s/unlimited/18446744073709551615/; }
files=$(most 'open files') processes=$(most processes)
exec sed -E "s/(RLIMIT_NOFILE\",\"hard\":)[0-9]+,\"soft\":[0-9]+/\\1$files,\"soft\":$files/
s/(RLIMIT_NPROC\",\"hard\":)[0-9]+,\"soft\":[0-9]+/\\1$processes,\"soft\":$processes/"
"""


class PrivatePodman:
    """A Podman at `url`, made by `private_podman`; the methods are for one thread.

    `uid`: whose it is; 0 for the rootful one. `shared`: a directory that its user may use, for what containers mount.
    """

    def __init__(self, directory: Path, user: pwd.struct_passwd | None, *, events: str = "file") -> None:
        self.directory = directory
        self.shared = directory / "shared"
        self.uid, self.gid = (user.pw_uid, user.pw_gid) if user else (0, 0)
        self._user = user
        self._events = events
        self._socket = directory / "podman.sock"
        self._namespaces: subprocess.Popen[bytes] | None = None
        self._service: subprocess.Popen[bytes] | None = None
        self._clients = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """Its address, for DOCKER_HOST."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """The process id of its service; AssertionError when it is down."""
        if self._service is None:
            raise AssertionError("the private podman is not running")
        return self._service.pid

    def client(self) -> docker.APIClient:
        """A client of it, closed at the end."""
        client = docker.APIClient(self.url, version="auto", timeout=60)
        self._clients.callback(client.close)
        return client

    def start(self) -> None:
        """Start its service, or start it again after `stop` or `kill`; return when it answers."""
        if self._namespaces is None:
            self._prepare()
            self._namespaces = self._hold_namespaces()
        self._socket.unlink(missing_ok=True)  # of a killed one
        enter = ["nsenter", f"--target={self._namespaces.pid}", "--mount", "--net", "--"]
        # Who enters a mount namespace is at its root, where conmon would leave a mark of each job that lacks memory.
        enter += ["sh", "-c", 'cd "$0" && exec "$@"', str(self.shared)]
        ids = [f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups", "--inh-caps=-all"]
        become = ["setpriv", *ids, "--"] if self._user else []
        with (self.directory / "service.log").open("ab") as log:
            self._service = subprocess.Popen(
                [*enter, *become, "podman", "system", "service", "--time=0", self.url],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env(),
                start_new_session=True,
            )
        try:
            wait_until(self._answers_or_ended, "the private podman answers", _START_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{tail(self.directory / 'service.log')}") from None

    def stop(self) -> None:
        """SIGTERM, as `systemctl stop podman` does; return when it has ended. Its containers run on."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the service. Its containers run on."""
        self._end(signal.SIGKILL)

    def cpu_s(self) -> float:
        """Processor time that the service has used, in seconds (proc_pid_stat(5), fields 14 and 15)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def conmon_of(self, container_id: str) -> int:
        """The process id of what watches over a container."""
        [pid] = [
            pid for pid, command in _processes() if command[0].endswith(b"conmon") and container_id.encode() in command
        ]
        return pid

    def close(self) -> None:
        """Stop it and remove all that it left: containers, processes, mounts, its user."""
        if self._service is not None:
            self._remove_containers()
        self._clients.close()
        self.stop()
        deadline = time.monotonic() + _STOP_S
        while left := self._left_processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise AssertionError(f"processes of the private podman do not die: {left}")
            time.sleep(0.05)
        if self._namespaces is not None:
            self._namespaces.kill()  # and with it go the mounts
            self._namespaces.wait()

    def _prepare(self) -> None:
        for folder in (self.shared, self.directory / "home", self.directory / "run"):
            folder.mkdir(mode=0o700)
        self._lower_limits()
        (self.directory / "containers.conf").write_text(
            f'[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "{self._events}"\nlock_type = "file"\n'
            f'tmp_dir = "{self.directory}/run/tmp"\nstatic_dir = "{self.directory}/home/libpod"\n'
            f'hooks_dir = ["{self.directory}/hooks"]\n'
            f'[network]\nnetwork_config_dir = "{self.directory}/home/net"\n'
        )
        (self.directory / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.directory}/home/storage"\n'
            f'runroot = "{self.directory}/run/storage"\nrootless_storage_path = "{self.directory}/home/storage"\n'
        )
        (self.directory / "registries.conf").write_text('[[registry]]\nlocation = "127.0.0.1"\ninsecure = true\n')
        for path in (self.directory, *self.directory.rglob("*")):
            os.chown(path, self.uid, self.gid)

    def _lower_limits(self) -> None:
        """Podman gives containers as many open files and processes as the kernel allows, where root may have more.

        The root of a machine of tests may lack the right to that (CAP_SYS_RESOURCE). Then a hook makes it what we have.
        """
        folder = self.directory / "hooks"
        folder.mkdir()
        hook = folder / "limits"
        hook.write_text(_LIMITS_HOOK)
        hook.chmod(0o755)
        if not self._user and resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 1048576:
            wanted = {
                "version": "1.0.0",
                "hook": {"path": str(hook)},
                "when": {"always": True},
                "stages": ["precreate"],
            }
            (folder / "limits.json").write_text(json.dumps(wanted))

    def _hold_namespaces(self) -> subprocess.Popen[bytes]:
        ready = self.directory / "ready"
        script = _PREPARE.format(tun=shlex.quote(str(self.directory / "tun")), ready=shlex.quote(str(ready)))
        # Without root rights the network is the machine's: its containers have namespaces of their own user's.
        kinds = ["--mount", "--propagation", "private", *([] if self._user else ["--net"])]
        holder = subprocess.Popen(
            ["unshare", *kinds, "sh", "-c", script], stdin=subprocess.DEVNULL, start_new_session=True
        )
        wait_until(ready.exists, "the namespaces of the private podman", _START_S)
        return holder

    def _env(self) -> dict[str, str]:
        return {
            "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin",
            "HOME": str(self.directory / "home"),
            "XDG_RUNTIME_DIR": str(self.directory / "run"),
            "CONTAINERS_CONF": str(self.directory / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.directory / "storage.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(self.directory / "registries.conf"),
        }

    def _answers_or_ended(self) -> bool:
        if self._service is not None and self._service.poll() is not None:
            raise AssertionError(f"the private podman ended with code {self._service.returncode}")
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(5)
            try:
                line.connect(str(self._socket))
                line.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
                return line.recv(64).split(b" ")[1:2] == [b"200"]
            except OSError:
                return False

    def _end(self, number: signal.Signals) -> None:
        if self._service is not None:
            self._service.send_signal(number)
            try:
                self._service.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._service.kill()
                self._service.wait()
            self._service = None

    def _remove_containers(self) -> None:
        with contextlib.suppress(DockerException), contextlib.closing(docker.APIClient(self.url, timeout=20)) as client:
            for container in client.containers(all=True):
                client.remove_container(container["Id"], v=True, force=True)

    def _left_processes(self) -> list[int]:
        """What watches over containers, and its own helpers: all have the directory's name, or are its user's."""
        mine = str(self.directory).encode()
        holder = self._namespaces.pid if self._namespaces else 0
        found = []
        for pid, command in _processes():
            with contextlib.suppress(OSError):
                own = self._user is not None and Path(f"/proc/{pid}").stat().st_uid == self.uid
                if pid not in {holder, os.getpid()} and (own or any(mine in word for word in command[1:])):
                    found.append(pid)
        return found


@contextlib.contextmanager
def private_podman(*, rootless: bool = False, events: str = "file") -> Iterator[PrivatePodman]:
    """A Podman with the busybox image, up when the block begins; nothing of it is left after it.

    `events`: where it keeps its events (containers.conf, events_logger). Skips (in CI fails) where Podman or one of the
    programs that it needs is missing, and where the tests are not root.
    """
    for program, package in _PROGRAMS.items():
        require_program(program, package)
    require("root" if os.geteuid() == 0 else None, "root rights, which a podman of the tests' own needs")
    # a short path: a unix socket's has room for 107 bytes
    directory = Path(tempfile.mkdtemp(prefix="jf-podman-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        user = stack.enter_context(_new_user(directory)) if rootless else None
        podman = PrivatePodman(directory, user, events=events)
        stack.callback(podman.close)
        podman.start()
        ensure_busybox_image(podman.client())
        yield podman


@contextlib.contextmanager
def _new_user(directory: Path) -> Iterator[pwd.struct_passwd]:
    """A user with subordinate ids (subuid(5)), as Debian's useradd gives them to everybody who is no system's user."""
    name = f"jf-{secrets.token_hex(4)}"
    command = ["useradd", "--no-create-home", "--home-dir", str(directory / "home"), "--shell", "/bin/sh", name]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", name], check=True, capture_output=True)


def _processes() -> Iterator[tuple[int, list[bytes]]]:
    """The processes of this machine, with their command lines."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().split(b"\0")
                yield int(entry.name), command
