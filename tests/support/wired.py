"""A lab whose worker is the command, behind fault proxies and on a clock that the test turns.

The API, the sign-in service and the storage are the one mock API, each behind a proxy of its own, so that each can fail
alone; the test itself speaks to the server past them. `pass_time` lets time pass for the worker and for the server.
"""

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from tests.support.clock import Clock, shim
from tests.support.fault_proxy import FaultProxy
from tests.support.mock_server import MockServer, running_mock_api
from tests.support.services import wait_until
from tests.support.worker import DEADLINE_S, Command, Lab, assert_clean, command

#: How fast time passes while the worker waits for nobody but a clock, and while it speaks to the server now and then:
#: there a call of 10 ms, which is long on loopback, takes 0.4 s of the worker's ten or thirty.
FAST, BRISK = 40_000.0, 40.0

#: FAULTS.md J3: the longest pause between two tries of a keep-alive, with its jitter.
RETRY_S = 15.0 * 1.1

#: What a deadline may be overrun by, in seconds here: a busy machine may not look for so long.
LATE_S = 1.0

#: A job that leaves one file, at once; and what the server has of it then, its own two logs left out.
WRITES, WRITTEN = "echo result > /files/out/result", {"output/out/result": b"result\n"}


@dataclass(frozen=True)
class Wired:
    """One lab and what stands between its worker and the world."""

    lab: Lab
    clock: Clock
    api: FaultProxy
    sign_in: FaultProxy
    storage: FaultProxy
    directory: Path

    @contextlib.contextmanager
    def running(self, **changes: str) -> Iterator[Command]:
        """A worker with the ordinary keep-alive and polling of 30 s for the length of the block; then it leaves well.

        `changes`: settings by field name, and other variables of its environment in capitals.
        """
        variables = {name: changes.pop(name) for name in list(changes) if name.isupper()}
        ordinary = {
            "api_url": self.api.url,
            "aws_endpoint_url": self.sign_in.url,
            "timeout_job": "30",
            "timeout_status": "30",
        }
        env = {**self.lab.env(**{**ordinary, **changes}), **variables, **self.clock.env()}
        with command(["run"], env, self.directory) as worker:
            yield worker
            worker.send(signal.SIGTERM)
            with self.at(BRISK):
                code = worker.wait()
            assert code == 0, f"exit code {code}; it said:\n{worker.errors}"

    @property
    def server(self) -> MockServer:
        """The mock API, past all proxies."""
        return self.lab.server

    def submit(self, *cmd: str, **parts: Any) -> int:
        """Submit a job with an output folder."""
        return self.lab.submit(*cmd, files_up={"output": "out"}, **parts)

    @contextlib.contextmanager
    def at(self, factor: float) -> Iterator[None]:
        """Time passes so fast for the worker while inside. The server's clock goes on as ever."""
        self.clock.rate(factor)
        try:
            yield
        finally:
            self.clock.rate(1.0)

    def pass_time(self, seconds: float, factor: float = FAST) -> None:
        """Let time pass for the worker and the server alike."""
        began, began_there, told = time.monotonic(), self.clock.now(), 0.0

        def tell() -> None:
            nonlocal told
            ahead = (self.clock.now() - began_there) - (time.monotonic() - began)
            self.server.advance(ahead - told)
            told = ahead

        self.clock.run(seconds, factor, tell)
        tell()

    def outage(self, seconds: float) -> None:
        """The API, which refuses or swallows already, stays away; the server notices who was silent for too long."""
        self.pass_time(seconds, FAST if seconds > 3600 else seconds)
        self.server.sweep()

    def ends(self, job: int, *states: str) -> str:
        """Wait, briskly, until the job is in one of `states` (finished or error) and the worker has removed it all."""
        with self.at(BRISK):
            state = self.server.wait_for_state(job, *(states or ("finished", "error")), timeout_s=DEADLINE_S)
            wait_until(lambda: not self.has_traces(job), f"nothing of job {job} is left", DEADLINE_S)
        return state

    def has_traces(self, job: int) -> bool:
        """Whether a container or a directory of the job is here."""
        labels = (container["Labels"] for container in self.lab.containers())
        return (self.lab.base / "jobs" / str(job)).exists() or str(job) in {
            label["jobfetcher.job"] for label in labels if "jobfetcher.job" in label
        }

    def accepted(self, job: int) -> int:
        """How many updates of the job the server has accepted."""
        return sum(event["code"] == 204 for event in self.server.events("update", job))

    def wait_for_word(self, job: int, factor: float = BRISK) -> float:
        """Wait until the server accepts another update; how long that took, in the worker's seconds.

        What a busy machine adds counts `factor` times.
        """
        heard, began = self.accepted(job), self.clock.now()
        with self.at(factor):
            wait_until(lambda: self.accepted(job) > heard, f"the worker speaks of job {job} again", DEADLINE_S)
            return self.clock.now() - began

    def results(self, job: int) -> Mapping[str, bytes]:
        """What was stored for the job, without the worker's own two logs."""
        stored = self.server.results(job)
        return {name: content for name, content in stored.items() if not name.startswith("log/jobfetcher/")}


class AnotherWorker:
    """A worker of another account: it takes a job that lies in the queue, and holds it until `finish`."""

    def __init__(self, server: MockServer) -> None:
        server.add_account("another", "another-password", token="another-token")
        self._server = server

    def take(self) -> int:
        """Take the one job that there is."""
        with self._client() as client:
            offer = {"memory": 10**12, "cpu_cores": 1000}
            (job,) = client.get("/jobs", params=offer).raise_for_status().json()
        return int(job)

    def finish(self, job: int) -> None:
        """Bring it to its end."""
        with self._client() as client:
            for state in ("preprocessing", "running", "postprocessing", "finished"):
                client.put(f"/jobs/{job}/status", params={"status": state}).raise_for_status()

    def _client(self) -> httpx.Client:
        headers = {"Authorization": "Bearer another-token"}
        return httpx.Client(base_url=self._server.url, headers=headers, trust_env=False)


@contextlib.contextmanager
def wired(directory: Path, engine: docker.APIClient, image: str, **server: Any) -> Iterator[Wired]:
    """All of it, with the oracle (`assert_clean`) at the end of the block. `server`: settings of the mock API."""
    with FaultProxy() as api, FaultProxy() as sign_in, FaultProxy() as storage, shim(directory) as clock:
        asked = {"storage_url": storage.url, "sweep_period_s": 3600, **server}
        with running_mock_api(directory / "server", **asked) as mock:
            for proxy in (api, sign_in, storage):
                proxy.target = mock.url
            lab = Lab(mock, directory / "base", image, engine)
            before = lab.held()
            yield Wired(lab, clock, api, sign_in, storage, directory)
            assert_clean(lab, before)


@pytest.fixture
def wire(request: pytest.FixtureRequest, tmp_path: Path, engine: docker.APIClient, busybox: str) -> Iterator[Wired]:
    """A wired lab. With `@pytest.mark.parametrize("wire", [...], indirect=True)`, each value is a mapping of the mock
    API's settings."""
    with wired(tmp_path, engine, busybox, **getattr(request, "param", {})) as lab:
        yield lab
