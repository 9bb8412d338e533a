"""auth: signing in, renewing in time and once, and keeping the old token until it is really refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from jobfetcher.core.errors import ConfigError, SourceRefused, SourceUnavailable
from jobfetcher.sources.worker_api.auth import CognitoAuth, CognitoPool, StaticToken
from jobfetcher.sources.worker_api.reply import Reply

POOL = CognitoPool(client_id="client", region="eu-central-1")


@dataclass
class Service:
    """A sign-in service; `fault` answers instead while it is set. `now` is the clock of all."""

    life_s: float = 3600.0
    now: float = 1000.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    fault: Callable[[dict[str, Any]], tuple[int, bytes]] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    pools: int = 0
    told: list[str] = field(default_factory=list)

    def post(self, url: str, headers: dict[str, str], body: bytes) -> Reply:
        assert headers["X-Amz-Target"] == "AWSCognitoIdentityProviderService.InitiateAuth"
        question = json.loads(body)
        self.asked.append(question)
        self.urls.append(url)
        if self.fault is not None:
            status, answer = self.fault(question)
            return Reply(status, answer, self.headers)
        result = {"IdToken": f"token-{len(self.asked)}", "ExpiresIn": self.life_s}
        if question["AuthFlow"] == "USER_PASSWORD_AUTH":
            result["RefreshToken"] = "refresh"
        return Reply(200, json.dumps({"AuthenticationResult": result}).encode(), {})

    def pool(self) -> CognitoPool:
        self.pools += 1
        return POOL

    def auth(self, **changes: Any) -> CognitoAuth:
        return CognitoAuth(
            "lab",
            "pass-word",
            pool=self.pool,
            post=self.post,
            on_token=self.told.append,
            clock=lambda: self.now,
            **changes,
        )

    @property
    def flows(self) -> list[str]:
        return [question["AuthFlow"] for question in self.asked]


def down(question: dict[str, Any]) -> tuple[int, bytes]:
    raise SourceUnavailable("the sign-in service is away")


def refusal(kind: str) -> Callable[[dict[str, Any]], tuple[int, bytes]]:
    return lambda question: (400, json.dumps({"__type": kind, "message": "no <b>"}).encode())


def test_a_token_is_had_once_and_used_until_three_quarters_of_its_life() -> None:
    service = Service()
    auth = service.auth()
    assert auth.token() == "token-1"
    service.now += 0.74 * 3600
    assert auth.token() == "token-1"
    service.now += 0.02 * 3600
    assert auth.token() == "token-2"
    assert service.flows == ["USER_PASSWORD_AUTH", "REFRESH_TOKEN_AUTH"]
    assert service.asked[0]["AuthParameters"] == {"USERNAME": "lab", "PASSWORD": "pass-word"}
    assert service.asked[1]["AuthParameters"] == {"REFRESH_TOKEN": "refresh"}
    assert service.urls[0] == "https://cognito-idp.eu-central-1.amazonaws.com/"
    assert service.pools == 1
    assert service.told == ["token-1", "token-2"]


def test_the_endpoint_may_be_another() -> None:
    service = Service()
    service.auth(endpoint="http://127.0.0.1:5/").token()
    assert service.urls == ["http://127.0.0.1:5/"]


@pytest.mark.fault("B5")
def test_while_the_service_is_down_the_old_token_is_kept_and_few_tries_are_made() -> None:
    service = Service()
    auth = service.auth()
    auth.token()
    service.now += 0.8 * 3600
    service.fault = down
    for _ in range(100):
        assert auth.token() == "token-1"
        service.now += 1
    assert len(service.asked) == 1 + 4  # one try each 30 s
    service.fault = None
    service.now += 30
    assert auth.token() == "token-6"


@pytest.mark.fault("B5")
def test_a_service_that_hangs_is_not_asked_again_at_once() -> None:
    """Else every heartbeat of a job would wait for it."""
    service = Service()
    auth = service.auth()
    auth.token()
    service.now += 0.8 * 3600

    def hang(question: dict[str, Any]) -> tuple[int, bytes]:
        service.now += 31
        raise SourceUnavailable("no answer in time")

    service.fault = hang
    for _ in range(29):
        assert auth.token() == "token-1"
        service.now += 1
    assert len(service.asked) == 2


@pytest.mark.fault("B4")
def test_a_refused_token_is_replaced_once_however_many_notice() -> None:
    service = Service()
    auth = service.auth()
    old = auth.token()
    start = threading.Barrier(8)
    got: list[str] = []

    def notice() -> None:
        start.wait()
        got.append(auth.renew(old))

    threads = [threading.Thread(target=notice) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == ["token-2"] * 8
    assert len(service.asked) == 2


@pytest.mark.fault("B4")
def test_many_threads_without_a_token_sign_in_once() -> None:
    service = Service()
    auth = service.auth()
    start = threading.Barrier(8)
    got: list[str] = []

    def need() -> None:
        start.wait()
        got.append(auth.token())

    threads = [threading.Thread(target=need) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == ["token-1"] * 8
    assert len(service.asked) == 1


@pytest.mark.fault("B5")
def test_while_one_thread_renews_the_others_go_on_with_the_old_token() -> None:
    service = Service()
    auth = service.auth()
    auth.token()
    service.now += 0.8 * 3600
    inside, go_on = threading.Event(), threading.Event()

    def slow(question: dict[str, Any]) -> tuple[int, bytes]:
        inside.set()
        go_on.wait(10)
        return 200, b'{"AuthenticationResult": {"IdToken": "slow", "ExpiresIn": 3600}}'

    service.fault = slow
    thread = threading.Thread(target=auth.token)
    thread.start()
    assert inside.wait(10)
    assert auth.token() == "token-1"  # does not wait
    go_on.set()
    thread.join()
    assert auth.token() == "slow"
    assert len(service.asked) == 2


@pytest.mark.fault("B4")
def test_a_server_that_refuses_every_token_causes_no_storm() -> None:
    service = Service()
    auth = service.auth()
    token = auth.token()
    service.now += 1
    token = auth.renew(token)
    for _ in range(20):
        with pytest.raises(SourceRefused, match="refuses the token that sign-in just gave"):
            auth.renew(token)
    assert len(service.asked) == 2
    service.now += 31
    assert auth.renew(token) == "token-3"


def test_a_refused_refresh_token_means_the_password_again() -> None:
    service = Service()
    auth = service.auth()
    auth.token()
    service.now += 3600

    def only_password(question: dict[str, Any]) -> tuple[int, bytes]:
        if question["AuthFlow"] == "REFRESH_TOKEN_AUTH":
            return refusal("NotAuthorizedException")(question)
        return 200, b'{"AuthenticationResult": {"IdToken": "fresh"}}'

    service.fault = only_password
    assert auth.token() == "fresh"
    assert service.flows[1:] == ["REFRESH_TOKEN_AUTH", "USER_PASSWORD_AUTH"]


@pytest.mark.parametrize(
    "kind", ["NotAuthorizedException", "com.amazonaws.cognito#UserNotFoundException", "PasswordResetRequiredException"]
)
def test_a_refused_password_is_said_without_the_password(kind: str) -> None:
    service = Service(fault=refusal(kind))
    with pytest.raises(SourceRefused, match="sign-in as 'lab' was refused: no <b>") as refused:
        service.auth().token()
    assert "pass-word" not in str(refused.value)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"oops"),
        (400, b'{"__type": "TooManyRequestsException"}'),
        (302, b""),
        (200, b""),
        (200, b"<html>"),
        (200, b"[]"),
        (200, b'{"AuthenticationResult": {}}'),
        (200, b'{"AuthenticationResult": {"IdToken": ""}}'),
        (200, b'{"AuthenticationResult": {"IdToken": "a b"}}'),
        (200, b'{"AuthenticationResult": {"IdToken": "a\\r\\nX-Evil: 1"}}'),
        (200, '{"AuthenticationResult": {"IdToken": "tök"}}'.encode()),
        (200, b'{"AuthenticationResult": {"IdToken": "a", "ExpiresIn": 0}}'),
        (200, b'{"AuthenticationResult": {"IdToken": "a", "ExpiresIn": -1}}'),
        (200, b'{"AuthenticationResult": {"IdToken": "a", "ExpiresIn": NaN}}'),
        (200, b'{"AuthenticationResult": {"IdToken": "a", "ExpiresIn": Infinity}}'),
        (400, b"[" * 100_000),
        (500, b'{"__type": ["x"]}'),
    ],
)
@pytest.mark.fault("T22")
def test_an_answer_that_makes_no_sense_is_a_reason_to_try_later(status: int, body: bytes) -> None:
    service = Service(fault=lambda question: (status, body))
    auth = service.auth()
    with pytest.raises(SourceUnavailable, match="sign-in service"):
        auth.token()
    with pytest.raises(SourceUnavailable):
        auth.token()
    assert len(service.asked) == 1  # and not at once


def test_a_challenge_needs_a_person() -> None:
    service = Service(fault=lambda question: (200, b'{"ChallengeName": "NEW_PASSWORD_REQUIRED"}'))
    with pytest.raises(SourceRefused, match=r"needs a person first \(NEW_PASSWORD_REQUIRED\)"):
        service.auth().token()


@pytest.mark.parametrize("region", ["", "EU", "eu/../x", "evil.example.org#", "a" * 41])
def test_a_region_cannot_name_another_host(region: str) -> None:
    with pytest.raises(ValueError, match="region"):
        CognitoPool(client_id="c", region=region)


def test_a_fixed_token_has_no_successor() -> None:
    auth = StaticToken("fixed")
    assert auth.token() == "fixed"
    with pytest.raises(SourceRefused, match="ACCESS_TOKEN"):
        auth.renew("fixed")


# -- refused with 403, locked, rotated (B24) --------------------------------------------------------------------------


@pytest.mark.fault("B24")
def test_a_403_renews_a_token_once_and_not_the_one_that_came_of_it() -> None:
    service = Service()
    auth = service.auth()
    first = auth.token()
    second = auth.renew(first, 403)
    assert second == "token-2"
    for _ in range(29):  # the account is not in the group: that does not become better by signing in again and again
        service.now += 10
        with pytest.raises(SourceRefused, match="403"):
            auth.renew(second, 403)
    assert len(service.asked) == 2
    service.now += 11
    assert auth.renew(second, 403) == "token-3"  # it may have been let in meanwhile, which only a new token says
    assert auth.renew(first, 403) == "token-3"


@pytest.mark.fault("B24")
def test_a_401_is_met_with_a_new_token_also_where_the_old_one_came_of_a_403() -> None:
    service = Service()
    auth = service.auth()
    second = auth.renew(auth.token(), 403)
    service.now += 31
    assert auth.renew(second, 401) == "token-3"


@pytest.mark.fault("B24")
@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (400, "NotAuthorizedException", "Password attempts exceeded"),
        (400, "TooManyRequestsException", "Rate exceeded"),
        (429, "TooManyRequestsException", "Rate exceeded"),
        (400, "LimitExceededException", "Attempt limit exceeded, please try after some time"),
        (400, "InternalErrorException", "no"),
        (403, "ForbiddenException", "Request not allowed due to WAF block"),
        (500, "NotAuthorizedException", "no"),
    ],
)
def test_a_sign_in_that_is_locked_or_limited_is_waited_for(status: int, kind: str, words: str) -> None:
    service = Service(fault=lambda question: (status, json.dumps({"__type": kind, "message": words}).encode()))
    auth = service.auth()
    with pytest.raises(SourceUnavailable, match=words):
        auth.token()
    for _ in range(29):
        service.now += 1
        with pytest.raises(SourceUnavailable):
            auth.token()
    assert len(service.asked) == 1
    service.now += 32
    service.fault = None
    assert auth.token() == "token-2"


@pytest.mark.fault("B24")
def test_a_locked_account_is_asked_about_once_a_minute_and_keeps_its_token() -> None:
    service = Service()
    auth = service.auth()
    auth.token()
    service.now += 0.8 * 3600
    locked = json.dumps({"__type": "NotAuthorizedException", "message": "Password attempts exceeded"}).encode()
    service.fault = lambda question: (400, locked)
    for _ in range(601):
        assert auth.token() == "token-1"
        service.now += 1
    assert service.flows[1:3] == ["REFRESH_TOKEN_AUTH", "USER_PASSWORD_AUTH"]
    assert 10 <= len(service.flows) - 2 <= 12


@pytest.mark.fault("B21", "B24")
@pytest.mark.parametrize("status", [200, 302, 401, 403, 404, 502])
def test_a_page_instead_of_the_sign_in_service_refuses_nobody_and_is_named(status: int) -> None:
    service = Service(fault=lambda question: (status, b"<html><title>Guest network</title>"))
    service.headers = {"Content-Type": "text/html", "Location": "http://portal.example/"}
    with pytest.raises(SourceUnavailable, match="sign-in service") as error:
        service.auth().token()
    for named in (str(status), "text/html", "Location http://portal.example/", "Guest network"):
        assert named in str(error.value)


@pytest.mark.fault("B22", "T10")
def test_an_answer_that_is_nearly_a_token_is_not_shown() -> None:
    service = Service(fault=lambda question: (200, b'{"AuthenticationResult": {"IdToken": "canary token"}}'))
    with pytest.raises(SourceUnavailable) as error:
        service.auth().token()
    assert "canary" not in str(error.value)


@pytest.mark.fault("B24")
@pytest.mark.parametrize("status", [401, 403])
def test_a_token_file_is_read_again_when_its_token_is_refused(status: int) -> None:
    found, told = ["old"], list[str]()

    def read_again() -> str:
        if not found[0]:
            raise ConfigError("ACCESS_TOKEN_FILE: /run/token is empty")
        return found[0]

    auth = StaticToken("old", read_again, on_token=told.append)
    for content, words in (("old", "still holds the same"), ("", "/run/token is empty")):
        found[0] = content
        with pytest.raises(SourceRefused, match=f"refused ACCESS_TOKEN \\({status}\\).*{words}"):
            auth.renew("old", status)
        assert auth.token() == "old"
    found[0] = "new"
    assert auth.renew("old", status) == auth.token() == "new"
    assert auth.renew("old", status) == "new"  # another thread that noticed later
    found[0] = "newer"
    assert auth.renew("new", status) == "newer"
    assert told == ["new", "newer"]
