"""Calls that a worker makes, for the tests of the mock API."""

import httpx

from tests.support.mock_server import MockServer

MOCK_TOKEN = "mock-token"


def worker_client(mock: MockServer, token: str = MOCK_TOKEN) -> httpx.Client:
    """A client of `mock` that sends `token`."""
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=mock.url, headers=headers, timeout=30, trust_env=False)


def pull(client: httpx.Client, **offer: int | float | str | list[str]) -> list[int]:
    """The ids of the jobs that one `GET /jobs` hands out; a large machine asks unless `offer` says otherwise."""
    params = {"memory": 64000, "cpu_cores": 16, "gpu_mem": 24000, **offer}
    return [int(job_id) for job_id in client.get("/jobs", params=params).raise_for_status().json()]


def put(client: httpx.Client, job_id: int, state: str, details: str | None = None) -> int:
    """The HTTP status that one update is answered with."""
    params = {"status": state} if details is None else {"status": state, "runtime_details": details}
    return client.put(f"/jobs/{job_id}/status", params=params).status_code


def run_through(client: httpx.Client, job_id: int, end: str = "finished") -> None:
    """Report a pulled job through all its states."""
    for state in ("preprocessing", "running", "postprocessing", end):
        assert put(client, job_id, state) == 204
