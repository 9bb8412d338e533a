"""What an engine of the tests' own is, whichever kind: a server on a socket below a directory, from start to end.

`PrivateEngine` (Docker) and `PrivatePodman` say what they prepare, what they run, and what else they leave.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import docker
from docker.errors import DockerException

from tests.support.services import require, tail, wait_until

START_S = 60.0  # dockerd and podman alone take 1 s; sixty times that when the machine is busy
_STOP_S = 30.0  # dockerd gives its containers 15 s by default before it kills them


class OwnEngine(ABC):
    """An engine at `url`; the methods are for one thread. `kind` names it in errors, and its socket."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory = directory
        self._kind = kind
        self._socket = directory / f"{kind}.sock"
        self._server: subprocess.Popen[bytes] | None = None
        self._clients = contextlib.ExitStack()

    @property
    def url(self) -> str:
        """Its address, for DOCKER_HOST."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int:
        """The process id of its server; AssertionError when it is down."""
        if self._server is None:
            raise AssertionError(f"the private {self._kind} is not running")
        return self._server.pid

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

    @abstractmethod
    def start(self) -> None:
        """Start it, or start it again after `stop` or `kill`; return when it answers."""

    def stop(self) -> None:
        """SIGTERM, as `systemctl stop` does; return when it has ended."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: it has no time to do anything."""
        self._end(signal.SIGKILL)

    @abstractmethod
    def close(self) -> None:
        """End it and everything it started, whatever state it is in. Its files are left to who made the directory."""

    @abstractmethod
    def _left_processes(self) -> list[int]:
        """What the engine started and what outlives it: its containers' processes and those that watch over them."""

    def _serve(self, program: str, command: list[str], env: Mapping[str, str]) -> None:
        """Start the server and wait until it answers. AssertionError with its last words when it does not."""
        self._server = self._spawn(program, command, env)
        try:
            wait_until(self._answers_or_ended, f"the private {self._kind} answers", START_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{tail(self.directory / f'{program}.log')}") from None

    def _spawn(self, program: str, command: list[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own; what it says goes to `program`.log."""
        with (self.directory / f"{program}.log").open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )

    def _answers_or_ended(self) -> bool:
        if self._server is not None and self._server.poll() is not None:
            raise AssertionError(f"the private {self._kind} ended with code {self._server.returncode}")
        return self.answers()

    def _end(self, number: signal.Signals) -> None:
        if self._server is not None:
            end(self._server, number)
            self._server = None

    def _remove_containers_and_stop(self) -> None:
        self._clients.close()
        if self._server is not None:
            self._server.send_signal(signal.SIGCONT)  # a frozen one answers nothing
            if self.answers():
                self._remove_containers()
        self.stop()

    def _remove_containers(self) -> None:
        with contextlib.suppress(DockerException), contextlib.closing(docker.APIClient(self.url, timeout=20)) as client:
            for container in client.containers(all=True):
                client.remove_container(container["Id"], v=True, force=True)

    def _kill_what_is_left(self) -> None:
        deadline = time.monotonic() + _STOP_S
        while left := self._left_processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise AssertionError(f"processes of the private {self._kind} do not die: {left}")
            time.sleep(0.05)


@contextlib.contextmanager
def own_directory(prefix: str) -> Iterator[Path]:
    """A directory for an engine, gone after the block. Skips (in CI fails) where the tests are not root."""
    require("root" if os.geteuid() == 0 else None, "root rights, which an engine of the tests' own needs")
    # a short path: a unix socket's has room for 107 bytes
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def end(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """End a process by that signal, and by SIGKILL if it has not ended after `_STOP_S`."""
    process.send_signal(signal.SIGCONT)  # a frozen process hears nothing but SIGKILL
    process.send_signal(number)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def processes() -> Iterator[tuple[int, list[bytes]]]:
    """The processes of this machine, with their command lines."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().split(b"\0")
                yield int(entry.name), command
