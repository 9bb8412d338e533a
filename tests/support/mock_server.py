"""The mock API in this process, on a real socket, with the handles that tests turn.

`running_mock_api` starts `mock_api.app` under uvicorn in a thread and stops it gracefully. End-to-end tests point a
worker at `.url` (account `worker` / `worker-password`, or the token `mock-token`) and watch it through the other
methods. Keyword arguments are the fields of `mock_api.settings.Settings`.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import uvicorn

from mock_api.__main__ import listen
from mock_api.app import create_app
from mock_api.settings import Settings

_START_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 15.0

Json = dict[str, Any]

#: For the `path` of a fault: what a worker asks the API, the sign-in included, and never what a test asks.
API_CALLS = r"^/$|^/access_info$|^/jobs$|^/jobs/\d+/status$|^/jobs/\d+/files/url$|^/files/.*/url$"
#: For the `path` of a fault: what a worker sends to the storage or fetches from it, be it signed or local-disk.
STORAGE_CALLS = r"^/_storage|^/jobs/\d+/files/upload$|^/files/.*/download$"


def job_spec(**changes: Any) -> Json:
    """A small valid job as a user submits it. `changes` replace whole sections (`app`, `hardware`, ...)."""
    spec: Json = {
        "app": {"cmd": ["true"], "env": {}},
        "handler": {"image_url": "busybox:latest", "files_down": {}, "files_up": {}},
        "meta": {},
        "hardware": {},
    }
    return spec | changes


@dataclass(frozen=True)
class MockServer:
    """A running mock API. Methods are HTTP calls to it and raise `httpx.HTTPStatusError` when refused."""

    url: str
    data_dir: Path
    _client: httpx.Client = field(repr=False)

    def submit(
        self,
        spec: Mapping[str, Any],
        *,
        group: str | None = None,
        priority: int | None = None,
        environment: str | None = None,
        retries: int | None = None,
        raw: bool = False,
    ) -> int:
        """Queue a job and return its id in the queue, which is not the user's number of it (S22).

        `raw`: any JSON at all is queued unchecked, to be handed out as it is.
        """
        params = {"group": group, "priority": priority, "environment": environment, "retries": retries}
        params["raw"] = raw or None
        answer = self._call("POST", "/user/jobs", json=spec, params={k: v for k, v in params.items() if v is not None})
        return int(answer["job_id"])

    def put_input(self, path: str, content: bytes) -> str:
        """Store an input and return the file_id that a job's `files_down` names it by."""
        return str(self._call("PUT", f"/user/files/{quote(path)}", content=content)["file_id"])

    def job(self, job_id: int) -> Json:
        """What the job's user sees: state, details, history."""
        return dict(self._call("GET", f"/user/jobs/{job_id}"))

    def state(self, job_id: int) -> str:
        """The job's state as its user sees it."""
        return str(self.job(job_id)["state"])

    def delete(self, job_id: int, *, swept: bool = False) -> None:
        """Delete the job as its user. `swept`: as though the server's sweep had met the deletion first (S7)."""
        self._call("DELETE", f"/user/jobs/{job_id}", params={"swept": swept})

    def results(self, job_id: int) -> dict[str, bytes]:
        """Everything the worker stored for the job: `<kind>/<base_path>/<filename>` to content."""
        names = [str(file["name"]) for file in self._call("GET", f"/user/jobs/{job_id}/files")["files"]]
        return {name: self._fetch(f"/user/jobs/{job_id}/files/{quote(name)}") for name in names}

    def events(self, kind: str | None = None, job_id: int | None = None) -> list[Json]:
        """The record, oldest first, whole or only the events of one kind or one job."""
        params = {"kind": kind, "job_id": job_id}
        return list(self._call("GET", "/_mock/events", params={k: v for k, v in params.items() if v is not None}))

    def updates(self, job_id: int) -> list[str]:
        """The states that were accepted for the job, in order, repeats (heartbeats) left out."""
        states = [event["state"] for event in self.events("update", job_id) if event["code"] == 204]
        return [state for i, state in enumerate(states) if i == 0 or states[i - 1] != state]

    def violations(self) -> list[Json]:
        """What a correct worker never does and this one did; empty is good."""
        return list(self._call("GET", "/_mock/violations"))

    def tally(self) -> list[Json]:
        """Of each account with each job that it pulled: `pulls`, accepted `ends`, `unheard_ends` (committed, then 500),
        `repeats` of an accepted end, and `late_requests` after an end."""
        return list(self._call("GET", "/_mock/tally"))

    def heard(self, job_id: int | None = None) -> list[Json]:
        """Every word that reached the user's side: `job_id`, `account` (None: the sweep), `state`, `details`."""
        return list(self._call("GET", "/_mock/heard", params={} if job_id is None else {"job_id": job_id}))

    def heard_ends(self, job_id: int) -> list[str]:
        """The ends of the job that its user's side accepted, in order; each of them is also an e-mail."""
        return [word["state"] for word in self.heard(job_id) if word["state"] in ("finished", "error")]

    def queue_state(self, job_id: int) -> str | None:
        """The job's state in the queue, which may be ahead of what its user sees (S19); None: the queue forgot it."""
        state = self.job(job_id)["queue_state"]
        return None if state is None else str(state)

    def set_user_side(self, *, away: bool) -> None:
        """Send the user's side away: from now on all that changes a state is committed, then answered 500 (S19)."""
        self._call("PUT", "/_mock/user_side", json={"away": away})

    def outbox(self) -> list[Json]:
        """The e-mails sent to users (PROTOCOL.md S11)."""
        return list(self._call("GET", "/_mock/outbox"))

    def traffic(self) -> dict[str, Json]:
        """For each object: requests that fetched it (`gets`) or got a 304 (`unchanged`), bytes sent (`sent`), times it
        was stored (`puts`)."""
        return dict(self._call("GET", "/_mock/traffic"))

    def set_faults(self, *rules: Mapping[str, Any]) -> None:
        """Replace all fault rules by these (the fields are those of `mock_api.faults.Rule`); none given: no faults."""
        self._call("DELETE", "/_mock/faults")
        self._call("POST", "/_mock/faults", json=list(rules))

    def advance(self, seconds: float) -> None:
        """Set the server's clock forward: leases, tokens, signed URLs and `older_than` all see it."""
        self._call("POST", "/_mock/clock", json={"advance_s": seconds})

    def sweep(self) -> None:
        """Run the requeue sweep now (PROTOCOL.md S4)."""
        self._call("POST", "/_mock/sweep")

    def expire_tokens(self) -> None:
        """Every IdToken handed out so far is refused from now on; refresh tokens and static tokens stay good."""
        self._call("POST", "/_mock/tokens/expire")

    def add_account(
        self, name: str, password: str, *, groups: Sequence[str] = ("workers",), token: str | None = None
    ) -> None:
        """Make an account, with a static token if one is named."""
        account = {"name": name, "password": password, "groups": list(groups), "token": token}
        self._call("POST", "/_mock/accounts", json=account)

    def wait_for_state(self, job_id: int, *states: str, timeout_s: float = 30.0) -> str:
        """Poll until the job is in one of `states` and return it. Raises `TimeoutError`, naming the last state seen."""
        deadline = time.monotonic() + timeout_s
        while (state := self.state(job_id)) not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is {state} after {timeout_s:g} s, not {' or '.join(states)}")
            time.sleep(0.05)
        return state

    def _call(self, method: str, path: str, **request: Any) -> Any:
        answer = self._client.request(method, path, **request).raise_for_status()
        return answer.json() if answer.content else None

    def _fetch(self, path: str) -> bytes:
        return self._client.get(path).raise_for_status().content


@contextmanager
def running_mock_api(data_dir: Path, *, port: int = 0, **settings: Any) -> Iterator[MockServer]:
    """A mock API on 127.0.0.1, up when the block starts and gone after it.

    `port` 0 is a free one; name the port of a server that was stopped to bring it back in its place. `data_dir` keeps
    jobs and files between two such servers.
    """
    app = create_app(Settings(data_dir=data_dir, **settings))
    listener = listen("127.0.0.1", port)
    config = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="mock-api")
    thread.start()
    try:
        _wait_until_started(server, thread)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client:
            yield MockServer(url, data_dir, client)
    finally:
        server.should_exit = True
        thread.join(_STOP_TIMEOUT_S)
        listener.close()
        if thread.is_alive():
            raise RuntimeError("the mock API did not stop")


def _wait_until_started(server: uvicorn.Server, thread: threading.Thread) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise RuntimeError("the mock API did not start; its log says why")
        time.sleep(0.01)
