"""Sign-in as Cognito has it, and what tokens open: row S16."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.mock_api.calls import worker_client
from tests.mock_api.conftest import Workers
from tests.support.mock_server import MockServer, running_mock_api

PASSWORD = {"USERNAME": "worker", "PASSWORD": "worker-password"}


def initiate(
    mock: MockServer, flow: str, parameters: dict[str, str], client: str = "mock-client", target: str = "InitiateAuth"
) -> httpx.Response:
    headers = {
        "X-Amz-Target": f"AWSCognitoIdentityProviderService.{target}",
        "Content-Type": "application/x-amz-json-1.1",
    }
    body = {"AuthFlow": flow, "ClientId": client, "AuthParameters": parameters}
    return httpx.post(mock.url, json=body, headers=headers, trust_env=False)


def sign_in(mock: MockServer) -> dict[str, Any]:
    answer = initiate(mock, "USER_PASSWORD_AUTH", PASSWORD)
    assert answer.status_code == 200
    return dict(answer.json()["AuthenticationResult"])


def status_with(mock: MockServer, token: str) -> int:
    with worker_client(mock, token) as client:
        return client.get("/jobs", params={"memory": 1}).status_code


def test_access_info_needs_no_token(mock: MockServer) -> None:
    answer = httpx.get(f"{mock.url}/access_info", trust_env=False).json()
    assert answer == {
        "cognito": {"user_pool_id": "eu-central-1_mock", "client_id": "mock-client", "region": "eu-central-1"}
    }


def test_a_password_buys_an_id_token_and_a_refresh_token(mock: MockServer) -> None:
    result = sign_in(mock)
    assert result["ExpiresIn"] == 3600
    assert result["TokenType"] == "Bearer"
    assert status_with(mock, result["IdToken"]) == 200
    assert status_with(mock, result["AccessToken"]) == 401
    assert status_with(mock, result["RefreshToken"]) == 401


@pytest.mark.parametrize("flow", ["REFRESH_TOKEN_AUTH", "REFRESH_TOKEN"])
def test_a_refresh_token_buys_a_new_id_token(mock: MockServer, flow: str) -> None:
    first = sign_in(mock)
    mock.expire_tokens()
    answer = initiate(mock, flow, {"REFRESH_TOKEN": first["RefreshToken"]}).json()["AuthenticationResult"]
    assert "RefreshToken" not in answer
    assert status_with(mock, first["IdToken"]) == 401
    assert status_with(mock, answer["IdToken"]) == 200


@pytest.mark.parametrize(
    ("flow", "parameters", "kind"),
    [
        ("USER_PASSWORD_AUTH", PASSWORD | {"PASSWORD": "wrong"}, "NotAuthorizedException"),
        ("USER_PASSWORD_AUTH", PASSWORD | {"USERNAME": "nobody"}, "NotAuthorizedException"),
        ("USER_PASSWORD_AUTH", {"USERNAME": "worker"}, "InvalidParameterException"),
        ("REFRESH_TOKEN_AUTH", {"REFRESH_TOKEN": "wrong"}, "NotAuthorizedException"),
        ("REFRESH_TOKEN_AUTH", {"REFRESH_TOKEN": "é.é.é"}, "NotAuthorizedException"),
        ("USER_SRP_AUTH", PASSWORD, "InvalidParameterException"),
    ],
)
def test_refusals_are_shaped_as_cognitos(mock: MockServer, flow: str, parameters: dict[str, str], kind: str) -> None:
    answer = initiate(mock, flow, parameters)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/x-amz-json-1.1"
    assert answer.json()["__type"] == kind
    assert answer.json()["message"]


def test_wrong_client_and_wrong_target(mock: MockServer) -> None:
    wrong_client = initiate(mock, "USER_PASSWORD_AUTH", PASSWORD, client="other")
    assert (wrong_client.status_code, wrong_client.json()["__type"]) == (400, "ResourceNotFoundException")
    wrong_target = initiate(mock, "USER_PASSWORD_AUTH", PASSWORD, target="SignUp")
    assert (wrong_target.status_code, wrong_target.json()["__type"]) == (400, "UnknownOperationException")


@pytest.mark.fault("S16")
def test_an_expired_token_is_401(tmp_path: Path) -> None:
    with running_mock_api(tmp_path, token_life_s=60) as mock:
        token = sign_in(mock)["IdToken"]
        mock.advance(55)
        assert status_with(mock, token) == 200
        mock.advance(10)
        assert status_with(mock, token) == 401
        assert [(event["code"], event["note"]) for event in mock.events("refused")] == [(401, "GET /jobs")]


@pytest.mark.fault("S16")
def test_an_account_outside_the_workers_is_403(mock: MockServer, workers: Workers) -> None:
    outsider = workers("outsider", groups=("users",))
    assert outsider.get("/jobs", params={"memory": 1}).status_code == 403
    assert outsider.put("/jobs/1/status", params={"status": "running"}).status_code == 403
    assert [(event["code"], event["account"]) for event in mock.events("refused")] == [(403, "outsider")] * 2


@pytest.mark.fault("S16")
@pytest.mark.parametrize("header", [{}, {"Authorization": "mock-token"}, {"Authorization": "Basic mock-token"}])
def test_every_worker_endpoint_wants_a_bearer_token(mock: MockServer, header: dict[str, str]) -> None:
    calls = [
        ("GET", "/jobs?memory=1"),
        ("GET", "/jobs/1/status"),
        ("PUT", "/jobs/1/status?status=running"),
        ("GET", "/files/a/url"),
        ("POST", "/jobs/1/files/url?type=output&base_path="),
        ("POST", "/jobs/1/files/upload?type=output&base_path="),
        ("GET", "/files/a/download"),
    ]
    with httpx.Client(base_url=mock.url, headers=header, trust_env=False) as client:
        assert [client.request(method, path).status_code for method, path in calls] == [401] * len(calls)


def test_a_token_of_another_server_is_refused(mock: MockServer, tmp_path: Path) -> None:
    with running_mock_api(tmp_path / "other") as other:
        token = sign_in(other)["IdToken"]
        assert status_with(other, token) == 200
    assert status_with(mock, token) == 401


def test_tokens_outlive_a_restart_and_passwords_are_not_kept(tmp_path: Path) -> None:
    with running_mock_api(tmp_path) as mock:
        token = sign_in(mock)["IdToken"]
    with running_mock_api(tmp_path) as mock:
        assert status_with(mock, token) == 200
    assert b"worker-password" not in (tmp_path / "mock.db").read_bytes()
