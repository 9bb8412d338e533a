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
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import docker

from tests.support.own_engine import START_S, OwnEngine, end, own_directory, processes
from tests.support.services import require_program, wait_until

_HOOK = "nvidia-container-runtime-hook"
_CGROUPS = Path("/sys/fs/cgroup")


class PrivateEngine(OwnEngine):
    """A Docker, made by `private_engine`.

    `live_restore`: containers go on while dockerd is away. Without it dockerd ends them when it is stopped, or when it
    is started after a kill: by TERM, and 10 s later by KILL, so one that obeys has the exit code it chooses. It is read
    at each start. `bridge`: with the default network `bridge`, which engines have unless told otherwise. `users`: a
    user whose subordinate ids (subuid(5)) containers get instead of the machine's own (userns-remap).
    """

    def __init__(self, directory: Path, *, live_restore: bool, bridge: bool = False, users: str = "") -> None:
        super().__init__(directory, "engine")
        self.live_restore = live_restore
        self._bridge = bridge
        self._users = users
        self._name = f"jobfetcher-{secrets.token_hex(4)}"
        self._containerd_socket = directory / "containerd.sock"
        self._containerd: subprocess.Popen[bytes] | None = None

    def copy_image(self, source: docker.APIClient, reference: str) -> None:
        """Bring a small image here from another engine, its tag with it. Raises docker.errors.DockerException."""
        with contextlib.closing(docker.DockerClient(self.url)) as client:
            client.images.load(b"".join(source.get_image(reference)))
            client.images.get(reference)

    def start(self) -> None:
        # in a network namespace of their own; unshare(1) becomes the server, so its pid is the server's
        alone = [require_program("unshare", "util-linux"), "--net"]
        env = {**os.environ, "PATH": f"{self.directory / 'bin'}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
        if self._containerd is None:
            containerd = [require_program("containerd", "containerd"), *self._config()]
            self._containerd = self._spawn("containerd", [*alone, *containerd], env)
            wait_until(self._containerd_socket.exists, "the private containerd listens", START_S)
        (self.directory / "engine.pid").unlink(missing_ok=True)  # of a killed one: its number may be another's by now
        self._serve("dockerd", [*alone, require_program("dockerd", "docker.io"), *self._flags()], env)

    def freeze(self) -> None:
        """SIGSTOP: calls are taken by the kernel and not answered, until `thaw`. Returns when every thread stands."""
        os.kill(self.pid, signal.SIGSTOP)
        wait_until(lambda: self._thread_states() == {"T"}, "the private engine is frozen", START_S)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self._remove_containers_and_stop()
        if self._containerd is not None:
            end(self._containerd, signal.SIGTERM)
            self._containerd = None
        self._kill_what_is_left()
        self._unmount()
        # One per controller (cgroup v1), or one (v2); not looked for below others', which come and go.
        for own in (*_CGROUPS.glob(f"*/{self._name}"), _CGROUPS / self._name):
            for group in sorted(own.glob("**/"), reverse=True):
                with contextlib.suppress(OSError):
                    group.rmdir()

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

    def _thread_states(self) -> set[str]:
        """Of dockerd's threads. It is the field after the name in parentheses (proc_pid_stat(5)); T: stopped."""
        threads = Path(f"/proc/{self.pid}/task").iterdir()
        return {(thread / "stat").read_text().rpartition(")")[2].split()[0] for thread in threads}

    def _left_processes(self) -> list[int]:
        """Containers' processes, by their control group, and their shims, by the address of our containerd."""
        found = []
        for pid, command in processes():
            with contextlib.suppress(OSError):
                inside = f"/{self._name}/" in Path(f"/proc/{pid}/cgroup").read_text()
                if inside or (b"containerd-shim" in command[0] and str(self._containerd_socket).encode() in command):
                    found.append(pid)
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
    with own_directory("jf-engine-") as directory:
        if users:
            directory.chmod(0o711)  # root in a container is another user out here, and must come to its files
        engine = PrivateEngine(directory, live_restore=live_restore, bridge=bridge, users=users)
        with contextlib.closing(engine):
            engine.start()
            yield engine
