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
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.own_engine import START_S, OwnEngine, own_directory, processes
from tests.support.services import ensure_busybox_image, require_program, wait_until

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


class PrivatePodman(OwnEngine):
    """A Podman, made by `private_podman`. Its containers run on when its service is stopped or killed.

    `uid`: whose it is; 0 for the rootful one. `shared`: a directory that its user may use, for what containers mount.
    """

    def __init__(self, directory: Path, user: pwd.struct_passwd | None, *, events: str = "file") -> None:
        super().__init__(directory, "podman")
        self.shared = directory / "shared"
        self.uid, self.gid = (user.pw_uid, user.pw_gid) if user else (0, 0)
        self._user = user
        self._events = events
        self._namespaces: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._namespaces is None:
            self._prepare()
            self._namespaces = self._hold_namespaces()
        self._socket.unlink(missing_ok=True)  # of a killed one
        enter = ["nsenter", f"--target={self._namespaces.pid}", "--mount", "--net", "--"]
        # Who enters a mount namespace is at its root, where conmon would leave a mark of each job that lacks memory.
        enter += ["sh", "-c", 'cd "$0" && exec "$@"', str(self.shared)]
        ids = [f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups", "--inh-caps=-all"]
        become = ["setpriv", *ids, "--"] if self._user else []
        service = ["podman", "system", "service", "--time=0", self.url]
        self._serve("service", [*enter, *become, *service], self._env())

    def cpu_s(self) -> float:
        """Processor time that the service has used, in seconds (proc_pid_stat(5), fields 14 and 15)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def conmon_of(self, container_id: str) -> int:
        """The process id of what watches over a container."""
        [pid] = [
            pid for pid, command in processes() if command[0].endswith(b"conmon") and container_id.encode() in command
        ]
        return pid

    def close(self) -> None:
        self._remove_containers_and_stop()
        self._kill_what_is_left()
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
        wait_until(ready.exists, "the namespaces of the private podman", START_S)
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

    def _left_processes(self) -> list[int]:
        """What watches over containers, and its own helpers: all have the directory's name, or are its user's."""
        mine = str(self.directory).encode()
        holder = self._namespaces.pid if self._namespaces else 0
        found = []
        for pid, command in processes():
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
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(own_directory("jf-podman-"))
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
