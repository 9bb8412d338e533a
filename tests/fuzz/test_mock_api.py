"""The mock API against its own OpenAPI description, by schemathesis: no crash, and replies as described.

Over a real socket, as workers call it. `/_mock` is left out: those are the switches of tests, and some of them make the
server hang or lie on request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from schemathesis.specs.openapi.checks import response_schema_conformance

from mock_api.app import create_app
from tests.fuzz.hostile import fuzz
from tests.support.mock_server import MockServer, job_spec, running_mock_api

schema = schemathesis.openapi.from_dict(create_app().openapi()).exclude(path_regex="^/_mock")

#: Where the deployed servers crash (PROTOCOL.md S7, S8; a number that SQLite or a date cannot hold; a folder to fetch),
#: and the mock API answers as they do then.
ODD = {
    "/jobs",
    "/jobs/{job_id}/status",
    "/jobs/{job_id}/files/url",
    "/jobs/{job_id}/files/upload",
    "/files/{file_id}/download",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MockServer]:
    """A server with jobs in every state that a small number may hit upon."""
    with running_mock_api(tmp_path_factory.mktemp("mock")) as mock:
        for _ in range(8):
            mock.submit(job_spec(handler={"image_url": "i", "files_up": {"output": "out"}}))
        yield mock


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    """Kept-alive connections, no proxy of the environment."""
    with requests.Session() as found:
        found.trust_env = False
        yield found


@schema.parametrize()
@fuzz(60)
def test_any_request_gets_an_answer_of_the_described_form(
    case: schemathesis.Case[Any], server: MockServer, session: requests.Session
) -> None:
    response = case.call(base_url=server.url, session=session, headers={"Authorization": "Bearer mock-token"})
    if response.status_code >= 500:
        assert case.operation.path in ODD
        assert response.text == "Internal Server Error", "the mock crashed, not the server that it stands for"
        return
    case.validate_response(response, checks=[response_schema_conformance])
