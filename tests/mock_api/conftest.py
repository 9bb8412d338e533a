"""A fresh mock API for each test, and workers to call it as."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import httpx
import pytest

from tests.mock_api.calls import worker_client
from tests.support.mock_server import MockServer, running_mock_api


class Workers(Protocol):
    """Makes HTTP clients that call as a worker."""

    def __call__(self, name: str, *, groups: tuple[str, ...] = ("workers",)) -> httpx.Client: ...


@pytest.fixture
def mock(tmp_path: Path) -> Iterator[MockServer]:
    """A mock API with its default settings."""
    with running_mock_api(tmp_path / "mock") as server:
        yield server


@pytest.fixture
def workers(mock: MockServer) -> Iterator[Workers]:
    """Clients with a new account each, by name."""
    with ExitStack() as clients:

        def make(name: str, *, groups: tuple[str, ...] = ("workers",)) -> httpx.Client:
            mock.add_account(name, "a-password", groups=groups, token=f"token-of-{name}")
            return clients.enter_context(worker_client(mock, f"token-of-{name}"))

        yield make


@pytest.fixture
def worker(mock: MockServer) -> Iterator[httpx.Client]:
    """The built-in account, by its static token."""
    with worker_client(mock) as client:
        yield client
