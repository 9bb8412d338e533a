"""The one door to the container engine: its HTTP API with deadlines, and foreign exceptions turned into our own.

Used by the other rooms of `engine`. Promises: nothing of http.client, sockets or JSON leaves a `calling` block but our
own errors, and every call that does not stream ends within its deadline, whatever other threads wait for (FAULTS.md
E2, E3). One `EngineApi` serves all threads: a call has its connection to itself, and kept-alive ones wait in a pool.
`one_line` is for questions whose answers must come from one and the same engine process.

The docker SDK is not used here: over requests it takes 1.3 ms of processor time for a call that takes 0.2 ms this way,
a job makes some ten of them, and the two libraries take 15 MiB of memory.
"""

from __future__ import annotations

import base64
import http.client
import json
import select
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlencode

from jobfetcher.core.errors import ConfigError, WorkerFault, WorkerReason
from jobfetcher.core.text import clean

DEFAULT_URL = "unix:///var/run/docker.sock"

#: Longest wait for what an engine only has to look up, in seconds (FAULTS.md E2).
LOOK_UP_S = 15.0

#: Longest wait for what an engine has to do (create, start, remove), in seconds: the docker client's usual one.
WORK_S = 60.0

#: Longest answer that is read as a whole, in bytes. The longest asked for is 256 events, each with all labels of a
#: container, or the list of all containers of this worker.
_ANSWER_MAX = 16 * 1024 * 1024

#: Longest complaint that is read out of one, in bytes.
_SAID_MAX = 2000

#: Idle connections kept: four jobs at a time make a call each.
_KEPT = 4

#: How often a container is told to be gone that ended while it was told so.
_REMOVE_TRIES = 4

#: What can come out of the libraries below when the engine does not answer properly.
#: ValueError: an answer that is not the JSON it should be.
_FOREIGN = (http.client.HTTPException, OSError, ValueError)


class Refused(Exception):
    """The engine answered with a status that is no success. `said`: its own words."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"{status}: {said}")
        self.status = status
        self.said = said


class NotFound(Refused):
    """404: it knows nothing of that name or id."""


class Unreachable(WorkerFault):
    """The engine did not answer. `setup` is True where only a person can change that (no socket, no permission)."""

    def __init__(self, message: str, *, setup: bool = False) -> None:
        super().__init__(WorkerReason.ENGINE, message)
        self.setup = setup


class Version(NamedTuple):
    """What an engine says of itself once: the version of its API, its architecture and operating system.

    `podman`: the version of Podman, if the engine is that; else nothing.
    """

    api: str
    architecture: str
    system: str
    podman: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer that was a success."""

    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        """The body as JSON. Raises ValueError."""
        return json.loads(self.body)


class EngineApi:
    """The engine at `url`: `unix:///path` or `tcp://host:port`. Connects on first use. Thread-safe.

    `look_up_s` and `work_s`: see LOOK_UP_S and WORK_S.

    Raises ConfigError for another kind of address. An engine on another host (ssh://, TLS) is no use: a job's
    directory is mounted from the engine's own disk.
    """

    def __init__(self, url: str = DEFAULT_URL, *, look_up_s: float = LOOK_UP_S, work_s: float = WORK_S) -> None:
        if not url.startswith(("unix:///", "tcp://")):
            raise ConfigError(
                f"{clean(url)} is not an engine on this machine: unix:///PATH or tcp://HOST:PORT is needed"
            )
        self.url = url
        self.look_up_s = look_up_s
        self.work_s = work_s
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._version: Version | None = None

    @contextmanager
    def calling(self, doing: str) -> Iterator[None]:
        """Inside, the engine may be asked; what fails leaves as WorkerFault(ENGINE), saying what we were `doing`.

        Raises Unreachable when there was no answer. Errors of our own tree pass unchanged.
        """
        try:
            yield
        except Refused as error:
            raise WorkerFault(
                WorkerReason.ENGINE, f"the container engine could not {doing}: {clean(error.said, 300)}"
            ) from error
        except _FOREIGN as error:
            raise self._unreachable(error, doing) from error

    def check(self) -> None:
        """Raise ConfigError when a person must act before an engine answers here, WorkerFault if it may come back.

        GET /_ping: an engine runs three programs to answer /version, some 20 ms of processor time each time.
        """
        try:
            with self.calling("say its version"):
                headers = self._exchange("GET", "/_ping", self.look_up_s).headers
                if headers.get("Api-Version") not in {None, self.version.api}:
                    self._version = None  # another engine since then
                system = self.version.system
        except Unreachable as error:
            if error.setup:
                raise ConfigError(str(error)) from error
            raise
        if system != "linux":
            raise ConfigError(f"the engine at {self.url} runs {clean(system)} containers; jobs need linux ones")

    @property
    def version(self) -> Version:
        """What the engine said of itself when it was first asked. For use inside `calling`."""
        if (version := self._version) is None:
            said = self._exchange("GET", "/version", self.look_up_s).json()
            parts = {str(part.get("Name")): str(part.get("Version")) for part in said.get("Components") or ()}
            podman = parts.get("Podman Engine", "")
            version = self._version = Version(str(said["ApiVersion"]), str(said["Arch"]), str(said.get("Os")), podman)
        return version

    def inspect(self, container: str) -> Mapping[str, Any] | None:
        """What the engine knows of a container, by id or name; None if it knows none."""
        with self.calling("inspect a container"):
            try:
                found: Mapping[str, Any] = self.ask("GET", f"/containers/{container}/json").json()
            except NotFound:
                return None
            return found

    @contextmanager
    def one_line(self, doing: str) -> Iterator[Line]:
        """`calling`, with a connection made now and kept for the block: one engine process gives all its answers."""
        with self.calling(doing), closing(self.new_line()) as line:
            yield line

    def new_line(self, kind: type[Line] | None = None) -> Line:
        """A connection made now, for questions to one engine process. For use inside `calling`; close it.

        `kind`: how it waits for an end (`flavour`); None: the engine's own way.
        """
        version = self.version.api
        return (kind or Line)(self.line(self.look_up_s), version, self.look_up_s)

    def ask(
        self,
        method: str,
        path: str,
        /,
        *,
        timeout_s: float | None = None,
        body: Mapping[str, Any] | None = None,
        **params: str,
    ) -> Answer:
        """One call below the API's version. For use inside `calling`.

        `timeout_s` bounds each read; None: `look_up_s`. Raises NotFound and Refused.
        """
        return self._exchange(method, self._target(path, params), timeout_s or self.look_up_s, body)

    @contextmanager
    def reading(self, path: str, *, timeout_s: float, **params: str) -> Iterator[http.client.HTTPResponse]:
        """A GET whose answer is too long to be held: the block reads it. For use inside `calling`. Raises as `ask`."""
        target = self._target(path, params)
        with closing(self.line(self.look_up_s)) as connection:
            connection.sock.settimeout(timeout_s)
            connection.request("GET", target)
            with connection.getresponse() as answer:
                if answer.status >= 300:
                    raise _refused(answer.status, answer.read(_SAID_MAX))
                yield answer

    def create(self, config: Mapping[str, Any], name: str) -> str:
        """Create a container, of the API's own words (`box`); its id. For use inside `calling`."""
        answer = self.ask("POST", "/containers/create", timeout_s=self.work_s, body=config, name=name)
        return str(answer.json()["Id"])

    def remove(self, container: str) -> None:
        """Remove a container with its anonymous volumes, whatever it does; gone already: nothing. For use inside
        `calling`.

        Podman ends it with a KILL first, and refuses the whole where it ended by itself between its own look and that
        KILL ("container state improper", libpod/container_internal.go). It knows the end when it is asked again.
        """
        for left in reversed(range(_REMOVE_TRIES)):
            try:
                self.ask("DELETE", f"/containers/{container}", timeout_s=self.work_s, v="1", force="1")
                return
            except NotFound:
                return
            except Refused as error:
                if error.status == http.client.CONFLICT:  # somebody else is removing it: see it gone
                    with suppress(NotFound):
                        self.ask("POST", f"/containers/{container}/wait", timeout_s=self.work_s, condition="removed")
                    return
                if not left or "container state improper" not in error.said:
                    raise

    def link_target(self, container: str, path: str) -> str:
        """Where `path` in a container leads if it is a link, as a path there; empty if it is none, or not there."""
        with self.calling("look at a container's files"):
            return str(self._path_stat(container, path).get("linkTarget") or "")

    def file_size(self, container: str, path: str) -> int:
        """Bytes of the file at `path` in a container; 0 if it is not there. For use inside `calling`."""
        return int(self._path_stat(container, path).get("size") or 0)

    def _path_stat(self, container: str, path: str) -> Mapping[str, Any]:
        try:
            headers = self.ask("HEAD", f"/containers/{container}/archive", path=path).headers
        except Refused:
            return {}
        said: Mapping[str, Any] = json.loads(base64.b64decode(headers.get("X-Docker-Container-Path-Stat") or "e30="))
        return said

    def line(self, timeout_s: float) -> http.client.HTTPConnection:
        """A connection of its own, connected, such as for a long call that another thread may cut by its `sock`."""
        scheme, _, rest = self.url.partition("://")
        line = (
            _UnixConnection(rest, timeout_s) if scheme == "unix" else http.client.HTTPConnection(rest, None, timeout_s)
        )
        line.connect()
        return line

    def close(self) -> None:
        """Close idle connections. The door opens again on next use."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._version = None
        for connection in idle:
            connection.close()

    def _target(self, path: str, params: Mapping[str, str]) -> str:
        return f"/v{self.version.api}{path}" + (f"?{urlencode(params)}" if params else "")

    def _exchange(self, method: str, target: str, timeout_s: float, body: Mapping[str, Any] | None = None) -> Answer:
        connection = self._connection()
        try:
            connection.sock.settimeout(timeout_s)
            content = None if body is None else json.dumps(body).encode()
            headers = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, target, content, headers)
            with connection.getresponse() as answer:
                said = answer.read(_ANSWER_MAX)
                whole, stays = answer.isclosed(), not answer.will_close
        except BaseException:
            connection.close()
            raise
        if whole and stays:
            self._keep(connection)
        else:
            connection.close()
        if not whole:
            raise ValueError(f"its answer has more than {_ANSWER_MAX} bytes")
        if answer.status >= 400:
            raise _refused(answer.status, said)
        return Answer(answer.headers, said)

    def _connection(self) -> http.client.HTTPConnection:
        """An idle connection that the engine has not closed meanwhile, or a new one."""
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self.line(self.look_up_s)
            if not _readable(connection.sock, 0):  # nobody has asked: what is there to read is its end
                return connection
            connection.close()

    def _keep(self, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if len(self._idle) < _KEPT:
                self._idle.append(connection)
                return
        connection.close()

    @property
    def _is_podmans(self) -> bool:
        return self.url.endswith("/podman.sock")

    @property
    def _start_it(self) -> str:
        """What a person does who finds no engine there."""
        if not self._is_podmans:
            return "install Docker, or start it (systemctl start docker), or set DOCKER_HOST for Podman"
        if "/user/" in self.url:
            return "start it (systemctl --user enable --now podman.socket)"
        return "start it (systemctl enable --now podman.socket)"

    def _unreachable(self, error: BaseException, doing: str) -> Unreachable:
        for cause in _chain(error):
            if isinstance(cause, PermissionError):
                cure = (
                    "it is root's; your own is at unix:///run/user/$(id -u)/podman/podman.sock (DOCKER_HOST)"
                    if self._is_podmans
                    else "add the user to the group docker (usermod -aG docker USER) and log in again, or the socket's "
                    "group to the worker's container (docker run --group-add GROUP_ID)"
                )
                return Unreachable(f"no permission to use the container engine at {self.url}; {cure}", setup=True)
            if isinstance(cause, FileNotFoundError):
                why = f"there is no such socket; {self._start_it}, or mount the socket into the worker's container"
                return Unreachable(f"no container engine answers at {self.url}: {why}", setup=True)
            if isinstance(cause, ConnectionRefusedError):
                why = f"connection refused; {self._start_it}"
                return Unreachable(f"no container engine answers at {self.url}: {why}")
        if isinstance(error, TimeoutError):
            return Unreachable(f"the container engine at {self.url} did not {doing} in time; is it frozen?")
        return Unreachable(f"the container engine at {self.url} did not {doing}: {clean(str(error), 300)}")


class Line:
    """One connection to one engine process. Use it inside `EngineApi.calling`, which turns its errors; close it."""

    def __init__(self, connection: http.client.HTTPConnection, api_version: str, look_up_s: float) -> None:
        connection.auto_open = 0  # a connection that the engine closed must not become one to the next engine
        self._connection = connection
        self._api_version = api_version
        self._look_up_s = look_up_s
        self._waiting: http.client.HTTPResponse | None = None

    def get(self, path: str, **query: str) -> Any | None:
        """The JSON that the engine answers; None for 404."""
        body = self._ask(path, query)
        return None if body is None else json.loads(body)

    def events(self, **query: str) -> list[dict[str, Any]]:
        """What the engine remembers of that kind (GET /events), oldest first; nothing if it is too much to read."""
        body = self._ask("/events", query) or b""
        return [json.loads(line) for line in body.splitlines()] if len(body) < _ANSWER_MAX else []

    def begin_wait(self, container: str, condition: str) -> None:
        """Have the engine say when a container has come to `condition`: `not-running`, or `next-exit` for one that is
        not started yet. When this returns, the engine is watching. Raises NotFound when there is no such container.

        Afterwards this line is good for `ended` only.
        """
        self._request("POST", f"/containers/{container}/wait", {"condition": condition})
        # Its headers come at once, its body with the end (moby, api/server/router/container, postContainersWait).
        answer = self._connection.getresponse()
        if answer.status != http.client.OK:
            with answer:
                raise _refused(answer.status, answer.read(_SAID_MAX))
        self._waiting = answer

    def ended(self, timeout_s: float) -> int | None:
        """After `begin_wait`: the container's exit code; None: for so long there was none, ask again."""
        answer = self._waiting
        if answer is None:
            raise ValueError("nothing is waited for")
        sock = self._connection.sock
        sock.settimeout(0)  # http.client may have read the body with the headers; a read that times out spoils it
        if not answer.fp.peek(1) and not _readable(sock, timeout_s):
            return None
        sock.settimeout(self._look_up_s)
        return int(json.loads(answer.read(_ANSWER_MAX))["StatusCode"])

    def close(self) -> None:
        """Close the connection."""
        if self._waiting is not None:
            self._waiting.close()
        self._connection.close()

    def _request(self, method: str, path: str, query: Mapping[str, str]) -> None:
        self._connection.sock.settimeout(self._look_up_s)
        self._connection.request(method, f"/v{self._api_version}{path}?{urlencode(query)}")

    def _ask(self, path: str, query: Mapping[str, str]) -> bytes | None:
        self._request("GET", path, query)
        with self._connection.getresponse() as answer:
            body = answer.read(_ANSWER_MAX)
            if answer.status == http.client.NOT_FOUND:
                return None
            if answer.status != http.client.OK:
                raise _refused(answer.status, body)
            return body


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._path)
        except OSError:
            self.close()
            raise


def _readable(sock: socket.socket, timeout_s: float) -> bool:
    """Whether there is something to read, or the end, within that time. By poll: select has no room for descriptors
    above 1023."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _refused(status: int, body: bytes) -> Refused:
    """The engine's complaint: JSON with a `message`, or whatever it says instead."""
    said = body[:_SAID_MAX].decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        said = str(json.loads(body)["message"])[:_SAID_MAX]
    return (NotFound if status == http.client.NOT_FOUND else Refused)(status, said)


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
