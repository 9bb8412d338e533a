"""The worker's side of the API against scripted answers, as fixtures, on a clock that a test sets.

The folders that use them import them in their conftest; some use no more of them than the clock and the events.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from jobfetcher.core.machine import Offer
from jobfetcher.core.urls import UrlPolicy
from jobfetcher.sources.worker_api.auth import StaticToken
from jobfetcher.sources.worker_api.client import Client
from jobfetcher.sources.worker_api.source import ApiLease, Filter, WorkerApi
from tests.support.jobs import Emitted, FakeClock
from tests.support.scripted_api import ScriptedApi, reply, scripted_api

#: A secret to look for where none may be.
TOKEN = "canary-token"


def client_of(url: str, **settings: Any) -> Client:
    """A client of the API at `url` that is signed in with TOKEN; `settings` of Client. The caller closes it."""
    client = Client(url, **settings)
    client.auth = StaticToken(TOKEN)
    return client


@pytest.fixture
def api() -> Iterator[ScriptedApi]:
    """A server that answers as it is told."""
    with scripted_api() as running:
        yield running


@pytest.fixture
def clock() -> FakeClock:
    """What tells the time to whatever is tested."""
    return FakeClock()


@pytest.fixture
def emit() -> Emitted:
    """What keeps the events of whatever is tested."""
    return Emitted()


@pytest.fixture
def client(api: ScriptedApi) -> Iterator[Client]:
    """A client of that server."""
    made = client_of(api.url)
    yield made
    made.close()


@pytest.fixture
def source(client: Client, clock: FakeClock, emit: Emitted) -> WorkerApi:
    """The adapter of the API, on that clock."""
    return WorkerApi(client, UrlPolicy(client.origin), wanted=Filter(), emit=emit, clock=clock)


@pytest.fixture
def lease(api: ScriptedApi, source: WorkerApi) -> ApiLease:
    """The lease of job 7, handed out just now."""
    api.then(reply(200, b'{"7": {"handler": {"image_url": "busybox"}}}', content_type="application/json"))
    claim = source.fetch(Offer(4.0, 4096), 0.0)
    assert claim is not None
    api.asked.clear()
    assert isinstance(claim.lease, ApiLease)
    return claim.lease
