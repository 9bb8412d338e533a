"""The one door to the container engine: a client with deadlines, and foreign exceptions turned into our own.

Used by the other rooms of `engine`. Promises: nothing from the docker SDK, requests or urllib3 leaves a `calling`
block, and every call that does not stream ends within its deadline, whatever other threads wait for (FAULTS.md E2,
E3). One client serves all threads: it is a `requests.Session` whose only state that changes after construction is the
connection pools, which lock. `one_line` is for questions whose answers must come from one and the same engine process.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import urlencode

import docker
import requests
import urllib3
from docker.errors import APIError, DockerException, NotFound, create_api_error_from_http_exception

from jobfetcher.core.errors import ConfigError, WorkerFault, WorkerReason
from jobfetcher.core.text import clean

DEFAULT_URL = "unix:///var/run/docker.sock"

#: Longest wait for what an engine only has to look up, in seconds (FAULTS.md E2).
LOOK_UP_S = 15.0

#: Longest wait for what an engine has to do (create, start, remove), in seconds: the docker client's usual one.
WORK_S = 60.0

#: Longest answer that a `Line` reads, in bytes. The longest it asks for is 256 events, each with a container's labels.
_ANSWER_MAX = 16 * 1024 * 1024

#: Longest complaint that is read out of one, in bytes.
_SAID_MAX = 2000

#: What can come out of the SDK and the libraries below it when the engine does not answer properly.
#: ValueError: an answer that is not the JSON it should be.
_FOREIGN = (
    DockerException,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    ValueError,
)


class Unreachable(WorkerFault):
    """The engine did not answer. `setup` is True where only a person can change that (no socket, no permission)."""

    def __init__(self, message: str, *, setup: bool = False) -> None:
        super().__init__(WorkerReason.ENGINE, message)
        self.setup = setup


class EngineApi:
    """The engine at `url`: `unix:///path` or `tcp://host:port`. Connects on first use. Thread-safe.

    `look_up_s` and `work_s`: see LOOK_UP_S and WORK_S; the SDK's own calls have the first one.

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
        self._client: docker.APIClient | None = None

    @property
    def client(self) -> docker.APIClient:
        """The SDK's client, speaking the engine's own API version. Use it inside `calling` only."""
        if (client := self._client) is not None:
            return client
        # It asks the engine for its version: not under the lock, where a frozen engine would make threads queue.
        # The SDK hands its timeout, which it calls an int of seconds, on to requests, which takes a fraction.
        made = docker.APIClient(self.url, version="auto", timeout=self.look_up_s)  # type: ignore[arg-type]
        with self._lock:
            client = self._client = self._client or made
        if client is not made:
            made.close()
        return client

    @contextmanager
    def calling(self, doing: str) -> Iterator[docker.APIClient]:
        """Inside, the client may be used; what fails leaves as WorkerFault(ENGINE), saying what we were `doing`.

        Raises Unreachable when there was no answer. Errors of our own tree pass unchanged.
        """
        try:
            self.line(self.look_up_s).close()  # the SDK forgets to close the socket of a connection that was refused
            yield self.client
        except APIError as error:
            raise WorkerFault(
                WorkerReason.ENGINE, f"the container engine could not {doing}: {clean(words(error), 300)}"
            ) from error
        except _FOREIGN as error:
            raise self._unreachable(error, doing) from error

    def check(self) -> None:
        """Raise ConfigError when a person must act before an engine answers here, WorkerFault if it may come back."""
        try:
            with self.calling("say its version") as client:
                system = client.version().get("Os")
        except Unreachable as error:
            if error.setup:
                raise ConfigError(str(error)) from error
            raise
        if system != "linux":
            raise ConfigError(f"the engine at {self.url} runs {clean(str(system))} containers; jobs need linux ones")

    def inspect(self, container: str) -> Mapping[str, Any] | None:
        """What the engine knows of a container, by id or name; None if it knows none."""
        with self.calling("inspect a container") as client:
            try:
                found: Mapping[str, Any] = client.inspect_container(container)
            except NotFound:
                return None
            return found

    @contextmanager
    def one_line(self, doing: str) -> Iterator[Line]:
        """`calling`, with a connection made now and kept for the block: one engine process gives all its answers."""
        with self.calling(doing) as client, closing(self.line(self.look_up_s)) as connection:
            yield Line(connection, client.api_version, self.look_up_s)

    def ask(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float | None = None,
        body: Mapping[str, Any] | None = None,
        stream: bool = False,
        **params: str,
    ) -> requests.Response:
        """One call that the SDK has no deadline or no types for. For use inside `calling`.

        `timeout_s` bounds each read; None: `look_up_s`. Raises what the SDK raises (NotFound, APIError).
        """
        client = self.client
        answer = client.request(
            method,
            f"{client.base_url}/v{client.api_version}{path}",
            params=params,
            json=body,
            stream=stream,
            timeout=(self.look_up_s, timeout_s or self.look_up_s),
        )
        try:
            answer.raise_for_status()
        except requests.HTTPError as error:
            raise create_api_error_from_http_exception(error) from error
        return answer

    def create(self, config: Mapping[str, Any], name: str) -> str:
        """Create a container, of the API's own words (`box`); its id. For use inside `calling`."""
        answer = self.ask("POST", "/containers/create", timeout_s=self.work_s, body=config, name=name)
        return str(answer.json()["Id"])

    def line(self, timeout_s: float) -> http.client.HTTPConnection:
        """A connection of its own, connected: for a long call that another thread must be able to cut (by its `sock`).

        requests does not show its socket before the answer's headers have come, which for a pull may take minutes.
        """
        scheme, _, rest = self.url.partition("://")
        line = (
            _UnixConnection(rest, timeout_s) if scheme == "unix" else http.client.HTTPConnection(rest, None, timeout_s)
        )
        line.connect()
        return line

    def close(self) -> None:
        """Close idle connections. The door opens again on next use."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _unreachable(self, error: BaseException, doing: str) -> Unreachable:
        for cause in _chain(error):
            if isinstance(cause, PermissionError):
                return Unreachable(
                    f"no permission to use the container engine at {self.url}; add the user to the group docker "
                    "(usermod -aG docker USER) and log in again",
                    setup=True,
                )
            if isinstance(cause, FileNotFoundError):
                return Unreachable(
                    f"no container engine answers at {self.url}: there is no such socket; install Docker, or start it "
                    "(systemctl start docker), or mount the socket into the worker's container",
                    setup=True,
                )
            if isinstance(cause, ConnectionRefusedError):
                return Unreachable(
                    f"no container engine answers at {self.url}: connection refused; start it (systemctl start docker)"
                )
        if timed_out(error):
            return Unreachable(f"the container engine at {self.url} did not {doing} in time; is it frozen?")
        return Unreachable(f"the container engine at {self.url} did not {doing}: {clean(str(error), 300)}")


class Line:
    """One connection to one engine process. Use it inside `EngineApi.one_line` only, which also turns its errors."""

    def __init__(self, connection: http.client.HTTPConnection, api_version: str, look_up_s: float) -> None:
        connection.auto_open = 0  # a connection that the engine closed must not become one to the next engine
        self._connection = connection
        self._api_version = api_version
        self._look_up_s = look_up_s

    def get(self, path: str, **query: str) -> Any | None:
        """The JSON that the engine answers; None for 404."""
        body = self._ask("GET", path, self._look_up_s, query)
        return None if body is None else json.loads(body)

    def events(self, **query: str) -> list[dict[str, Any]]:
        """What the engine remembers of that kind (GET /events), oldest first; nothing if it is too much to read."""
        body = self._ask("GET", "/events", self._look_up_s, query) or b""
        return [json.loads(line) for line in body.splitlines()] if len(body) < _ANSWER_MAX else []

    def wait(self, container: str, timeout_s: float) -> int | None:
        """The exit code of a container when it is not running (any more); None: for so long it was.

        After None the line is of no more use. Raises NotFound when there is no such container.
        """
        try:
            body = self._ask("POST", f"/containers/{container}/wait", timeout_s, {})
        except TimeoutError:
            return None
        if body is None:
            raise NotFound("no such container")
        return int(json.loads(body)["StatusCode"])

    def _ask(self, method: str, path: str, timeout_s: float, query: Mapping[str, str]) -> bytes | None:
        self._connection.sock.settimeout(timeout_s)
        self._connection.request(method, f"/v{self._api_version}{path}?{urlencode(query)}")
        with self._connection.getresponse() as answer:
            body = answer.read(_ANSWER_MAX)
            if answer.status == http.client.NOT_FOUND:
                return None
            if answer.status != http.client.OK:
                raise APIError(
                    f"{answer.status} {answer.reason}", explanation=body[:_SAID_MAX].decode(errors="replace")
                )
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


def timed_out(error: BaseException) -> bool:
    """Whether this came of a read that took too long.

    While the body of an answer is read, requests wraps the time-out into a ConnectionError, so the chain is searched.
    """
    slow = (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError, TimeoutError)
    return any(isinstance(cause, slow) for cause in _chain(error))


def words(error: APIError) -> str:
    """What the engine itself said, without the SDK's frame."""
    return str(error.explanation or error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
