"""A container engine of a test's own, which may be stopped, killed and frozen: containerd and dockerd, both real.

Both run without a network (`unshare -n`: `--bridge=none` alone would delete the first engine's docker0), below a
temporary directory and a control group of their own, so that whatever is left of them is known and ended. Root only.

dockerd has a containerd that it did not start itself: only such a one, and the containers with it, outlives it.
GPU requests are accepted: an executable `nvidia-container-runtime-hook` is on dockerd's PATH, which does nothing. So
containers see NVIDIA_VISIBLE_DEVICES as they would on a real GPU machine, and no device.
"""

import contextlib
import os
import secrets
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

from tests.support.services import require, require_program, tail, wait_until

_HOOK = "nvidia-container-runtime-hook"
_START_S = 60.0  # dockerd alone takes 1 s; sixty times that when the machine is busy
_STOP_S = 30.0  # dockerd gives its containers 15 s by default before it kills them
_CGROUPS = Path("/sys/fs/cgroup")


class PrivateEngine:
    """An engine at `url`. Made by `private_engine`; the methods are for one thread.

    `live_restore`: containers go on while dockerd is away. Without it dockerd ends them when it is stopped, or when it
    is started after a kill: by TERM, and 10 s later by KILL, so one that obeys has the exit code it chooses. It is read
    at each start. `bridge`: with the default network `bridge`, which engines have unless told otherwise. `users`: a
    user whose subordinate ids (subuid(5)) containers get instead of the machine's own (userns-remap).
    """

    def __init__(self, directory: Path, *, live_restore: bool, bridge: bool = False, users: str = "") -> None:
        self.directory = directory
        self.live_restore = live_restore
        self._bridge = bridge
        self._users = users
        self._name = f"jobfetcher-{secrets.token_hex(4)}"
        self._socket = directory / "engine.sock"
        self._containerd_socket = directory / "containerd.sock"
        self._containerd: subprocess.Popen[bytes] | None = None
        self._dockerd: subprocess.Popen[bytes] | None = None
        self._clients = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """Its address, for DOCKER_HOST."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """The process id of dockerd; AssertionError when it is down."""
        if self._dockerd is None:
            raise AssertionError("the private engine is not running")
        return self._dockerd.pid

    def answers(self) -> bool:
        """Whether it answers within 5 s."""
        # not by the SDK, nor by httpx: where nobody listens they leave their socket open
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(5)
            try:
                line.connect(str(self._socket))
                line.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
                return line.recv(64).split(b" ")[1:2] == [b"200"]
            except OSError:
                return False

    def client(self) -> docker.APIClient:
        """A client of it, closed at the end."""
        client = docker.APIClient(self.url, version="auto", timeout=60)
        self._clients.callback(client.close)
        return client

    def copy_image(self, source: docker.APIClient, reference: str) -> None:
        """Bring a small image here from another engine, its tag with it. Raises docker.errors.DockerException."""
        with contextlib.closing(docker.DockerClient(self.url)) as client:
            client.images.load(b"".join(source.get_image(reference)))
            client.images.get(reference)

    def start(self) -> None:
        """Start it, or start it again after `stop` or `kill`; return when it answers."""
        if self._containerd is None:
            self._containerd = self._spawn("containerd", [require_program("containerd", "containerd"), *self._config()])
            wait_until(self._containerd_socket.exists, "the private containerd listens", _START_S)
        (self.directory / "engine.pid").unlink(missing_ok=True)  # of a killed one: its number may be another's by now
        self._dockerd = self._spawn("dockerd", [require_program("dockerd", "docker.io"), *self._flags()])
        try:
            wait_until(self._answers_or_ended, "the private engine answers", _START_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{tail(self.directory / 'dockerd.log')}") from None

    def stop(self) -> None:
        """SIGTERM, as `systemctl stop docker` does; return when it has ended."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: it has no time to do anything."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: calls are taken by the kernel and not answered, until `thaw`. Returns when every thread stands."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: self._thread_states() == {"T"}, "the private engine is frozen", _START_S)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it and everything it started, whatever state it is in. Its files are left to who made the directory."""
        self._clients.close()
        if self._dockerd is not None:
            self.thaw()
            self._remove_containers()
            self._end(signal.SIGTERM)
        if self._containerd is not None:
            _end(self._containerd, signal.SIGTERM)
            self._containerd = None
        deadline = time.monotonic() + _STOP_S
        while left := self._left_processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise AssertionError(f"processes of the private engine do not die: {left}")
            time.sleep(0.05)
        self._unmount()
        # One per controller (cgroup v1), or one (v2); not looked for below others', which come and go.
        for own in (*_CGROUPS.glob(f"*/{self._name}"), _CGROUPS / self._name):
            for group in sorted(own.glob("**/"), reverse=True):
                with contextlib.suppress(OSError):
                    group.rmdir()

    def _spawn(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        """Start a server in a network namespace of its own; unshare(1) becomes it, so its pid is the server's."""
        unshare = require_program("unshare", "util-linux")
        path = f"{self.directory / 'bin'}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        with (self.directory / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [unshare, "--net", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PATH": path},
                start_new_session=True,
            )

    def _config(self) -> list[str]:
        config = self.directory / "containerd.toml"
        config.write_text(
            "version = 2\n"
            f'root = "{self.directory}/containerd"\n'
            f'state = "{self.directory}/containerd-state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{self._containerd_socket}"\n'
        )
        hook = self.directory / "bin" / _HOOK
        hook.parent.mkdir(exist_ok=True)
        hook.write_text("#!/bin/sh\nexit 0\n")
        hook.chmod(0o755)
        return ["--config", str(config)]

    def _flags(self) -> list[str]:
        flags = {
            "host": self.url,
            "containerd": self._containerd_socket,
            "data-root": self.directory / "data",
            "exec-root": self.directory / "exec",
            "pidfile": self.directory / "engine.pid",
            "bridge": "" if self._bridge else "none",
            "ip-forward": "false",
            "ip-masq": "false",
            "iptables": "false",
            "ip6tables": "false",
            "cgroup-parent": f"/{self._name}",
            "add-runtime": f"kata={require_program('runc', 'runc')}",
            "config-file": self.directory / "daemon.json",  # not the machine's own
            "live-restore": str(self.live_restore).lower(),
        }
        (self.directory / "daemon.json").write_text("{}")
        if self._users:
            flags["userns-remap"] = self._users
        return [f"--{name}={value}" for name, value in flags.items()]

    def _answers_or_ended(self) -> bool:
        if self._dockerd is not None and self._dockerd.poll() is not None:
            raise AssertionError(f"the private dockerd ended with code {self._dockerd.returncode}")
        return self.answers()

    def _thread_states(self) -> set[str]:
        """Of dockerd's threads. It is the field after the name in parentheses (proc_pid_stat(5)); T: stopped."""
        threads = Path(f"/proc/{self.pid}/task").iterdir()
        return {(thread / "stat").read_text().rpartition(")")[2].split()[0] for thread in threads}

    def _end(self, number: signal.Signals) -> None:
        if self._dockerd is not None:
            self.thaw()  # a frozen process hears nothing but SIGKILL
            _end(self._dockerd, number)
            self._dockerd = None

    def _remove_containers(self) -> None:
        with contextlib.suppress(DockerException), contextlib.closing(docker.APIClient(self.url, timeout=20)) as client:
            for container in client.containers(all=True):
                client.remove_container(container["Id"], v=True, force=True)

    def _left_processes(self) -> list[int]:
        """Containers' processes, by their control group, and their shims, by the address of our containerd."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            with contextlib.suppress(OSError):
                inside = f"/{self._name}/" in (entry / "cgroup").read_text()
                command = (entry / "cmdline").read_bytes().split(b"\0")
                if inside or (b"containerd-shim" in command[0] and str(self._containerd_socket).encode() in command):
                    found.append(int(entry.name))
        return found

    def _unmount(self) -> None:
        """Let go of what a killed engine left mounted below its directory, the deepest first."""
        mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for point in sorted(mounted, reverse=True):
            if point.startswith(f"{self.directory}/"):
                subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)


@contextlib.contextmanager
def private_engine(*, live_restore: bool = False, bridge: bool = False, users: str = "") -> Iterator[PrivateEngine]:
    """An engine without images and without a way out, up when the block begins; nothing of it is left after it.

    Jobs on it need JOB_NETWORK=none; images come by `copy_image`. Skips (in CI fails) where the tests are not root.
    """
    require("root" if os.geteuid() == 0 else None, "root rights, which an engine of the tests' own needs")
    # a short path: a unix socket's has room for 107 bytes
    directory = Path(tempfile.mkdtemp(prefix="jf-engine-"))
    if users:
        directory.chmod(0o711)  # root in a container is another user out here, and must come to its files
    engine = PrivateEngine(directory, live_restore=live_restore, bridge=bridge, users=users)
    try:
        engine.start()
        yield engine
    finally:
        engine.close()
        shutil.rmtree(directory)


def _end(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    process.send_signal(number)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
