"""Signing in with a name and a password: against the mock API's own Cognito, and against moto_server's.

moto checks passwords and refresh tokens and makes the tokens, as AWS does; the mock API cannot check moto's signatures,
so between worker and moto stands a relay that tells the mock API of every token that moto gave out.
"""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from tests.support.mock_server import MockServer, running_mock_api
from tests.support.services import LOOPBACK, Moto, wait_until
from tests.support.worker import UNTIL_LET_GO, Command, Lab, assert_clean, command

pytestmark = pytest.mark.docker

PASSWORD = "correct-Horse-7-battery"
WRONG = "wrong-Horse-8-battery"


def account(lab: Lab) -> dict[str, str]:
    """Settings of a worker that signs in at the mock API itself."""
    lab.server.add_account("lab-7", PASSWORD)
    return {"username": "lab-7", "password": PASSWORD, "aws_endpoint_url": lab.server.url, "log_level": "debug"}


def flows(server: MockServer, code: int = 200) -> list[str]:
    """The kinds of sign-in that the server answered with `code`, in order."""
    return [event["note"] for event in server.events("sign_in") if event["code"] == code]


def assert_untold(worker: Command, base: Path) -> None:
    """Assert that neither password nor token was printed, nor written where the worker keeps its things."""
    written = [path.read_bytes() for path in base.rglob("*") if path.is_file()]
    for secret in (PASSWORD, WRONG, "eyJ"):  # every JSON Web Token begins like that: {" in base64
        assert secret not in worker.output + worker.errors
        assert not any(secret.encode() in content for content in written)


def assert_refused(worker: Command) -> None:
    """Assert that a person learns, in one last line, whose sign-in was refused and why, and which setting that was;
    and before that, how long it waits."""
    assert worker.wait() == 2
    at_once, last = worker.errors.splitlines()[-2:]
    assert last.startswith("jobfetcher: sign-in as 'lab-7' was refused: ")
    assert "ncorrect username or password" in last
    assert last.endswith("; PASSWORD is from environment (PASSWORD), USERNAME from environment (USERNAME)")
    assert last.removeprefix("jobfetcher: ") in at_once
    assert at_once.endswith("; waiting 5 s before leaving, so that restarts do not lock the account; Ctrl-C: leave now")
    assert "Traceback" not in worker.errors


def test_a_password_buys_a_job(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit("echo done")
    with command(["run", "--once"], lab.env(**account(lab)), tmp_path) as worker:
        assert worker.wait() == 0
        # What is known is said when it is known: who is asked, that the password is good, that the server answers.
        said = [f"asking {lab.server.url} for jobs", "signed in as lab-7", "the server answers; taking jobs", "claimed"]
        places = [worker.errors.index(words) for words in said]
        assert places == sorted(places)
    assert lab.ended(job) == ("finished", "")
    assert flows(lab.server) == ["USER_PASSWORD_AUTH"]
    assert {event["account"] for event in lab.server.events("update", job)} == {"lab-7"}
    assert_untold(worker, lab.base)


def test_a_wrong_password_is_one_clear_line_and_exit_code_2(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit("true")
    settings = account(lab) | {"password": WRONG}
    with command(["run"], lab.env(**settings), tmp_path) as worker:
        assert_refused(worker)
    assert flows(lab.server, 400) == ["USER_PASSWORD_AUTH"]
    assert lab.server.state(job) == "queued"
    assert_untold(worker, lab.base)


def test_a_supervisor_that_starts_it_again_and_again_makes_ever_fewer_sign_ins(lab: Lab, tmp_path: Path) -> None:
    """The wait is remembered, ends at once with a signal, and is forgotten when the password is good."""
    good = account(lab)
    (tmp_path / ".env").write_text(f"USERNAME=lab-7\nPASSWORD={WRONG}\n")
    env = lab.env(**good)
    del env["USERNAME"], env["PASSWORD"]
    for wait_s in (5, 10, 20, 40):
        with command(["run"], env, tmp_path) as worker:
            worker.wait_for(f"waiting {wait_s} s before leaving")
            assert "; PASSWORD is from .env (PASSWORD), USERNAME from .env (USERNAME);" in worker.errors
            worker.send(signal.SIGTERM)
            assert worker.wait(30.0) == 2  # of the 40 s; leaving itself takes a busy machine some seconds
    assert len(flows(lab.server, 400)) == 4
    job = lab.submit("true")
    with command(["run", "--once"], lab.env(**good), tmp_path) as worker:
        assert worker.wait() == 0
    assert lab.server.state(job) == "finished"
    with command(["run"], env, tmp_path) as worker:
        worker.wait_for("waiting 5 s before leaving")
        worker.send(signal.SIGTERM)
        assert worker.wait() == 2


@pytest.mark.parametrize("lab", [{"token_life_s": 10}], indirect=True)
def test_a_token_is_renewed_before_it_ends(lab: Lab, tmp_path: Path) -> None:
    """FAULTS.md B5: at 75 % of its life, by the refresh token, so that the server never has to refuse one."""
    job = lab.submit(UNTIL_LET_GO)
    with command(["run", "--once"], lab.env(**account(lab)), tmp_path) as worker:
        lab.server.wait_for_state(job, "running")
        wait_until(lambda: len(flows(lab.server)) > 1, "the token is renewed")
        lab.let_go(job)
        assert worker.wait() == 0
    assert lab.ended(job) == ("finished", "")
    first, *later = flows(lab.server)
    assert (first, set(later)) == ("USER_PASSWORD_AUTH", {"REFRESH_TOKEN_AUTH"})
    assert lab.server.events("refused") == []
    assert_untold(worker, lab.base)


@pytest.mark.fault("B4")
def test_a_token_that_is_refused_in_the_middle_of_a_job_is_replaced(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit(UNTIL_LET_GO)
    with command(["run", "--once"], lab.env(**account(lab)), tmp_path) as worker:
        lab.server.wait_for_state(job, "running")
        lab.server.expire_tokens()
        wait_until(lambda: len(flows(lab.server)) > 1, "the token is replaced")
        lab.let_go(job)
        assert worker.wait() == 0
    assert lab.ended(job) == ("finished", "")
    assert flows(lab.server) == ["USER_PASSWORD_AUTH", "REFRESH_TOKEN_AUTH"]
    assert [event["code"] for event in lab.server.events("refused")] == [401]
    assert_untold(worker, lab.base)


# -- moto -------------------------------------------------------------------------------------------------------------


class _Relay(ThreadingHTTPServer):
    """Passes sign-ins to moto; a token that moto gives is one of the account `lab-7` of the mock API from then on."""

    daemon_threads = False

    def __init__(self, moto: Moto, server: MockServer) -> None:
        super().__init__((LOOPBACK, 0), _Passing)
        self.moto = moto
        self.mock_api = server
        self.passed: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{LOOPBACK}:{self.server_port}"


class _Passing(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, _Relay)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name: self.headers[name] for name in ("X-Amz-Target", "Content-Type")}
        reply = httpx.post(self.server.moto.url, content=body, headers=headers, trust_env=False, timeout=30)
        self.server.passed.append((json.loads(body)["AuthFlow"], reply.status_code))
        token = reply.json().get("AuthenticationResult", {}).get("IdToken")
        if token:
            self.server.mock_api.add_account("lab-7", PASSWORD, token=token)
        self.send_response(reply.status_code)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(reply.content)))
        self.end_headers()
        self.wfile.write(reply.content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests look at `passed`."""


@contextmanager
def relay(moto: Moto, server: MockServer) -> Iterator[_Relay]:
    with _Relay(moto, server) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), name="relay")
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()


@contextmanager
def moto_lab(
    moto: Moto, tmp_path: Path, engine: docker.APIClient, image: str
) -> Iterator[tuple[Lab, _Relay, dict[str, str]]]:
    """A mock API whose accounts are those of a new pool at moto, and the settings of a worker that has one."""
    user = moto.create_user("lab-7")
    pool: dict[str, Any] = {"user_pool_id": user.user_pool_id, "client_id": user.client_id, "region": moto.region}
    with running_mock_api(tmp_path / "server", **pool) as server, relay(moto, server) as between:
        lab = Lab(server, tmp_path / "base", image, engine)
        before = lab.held()
        settings = {"username": user.username, "password": user.password, "aws_endpoint_url": between.url}
        yield lab, between, {**settings, "log_level": "debug"}
        assert_clean(lab, before)


@pytest.mark.moto
def test_moto_signs_a_worker_in_and_refreshes_its_token(
    tmp_path: Path, moto: Moto, engine: docker.APIClient, busybox: str
) -> None:
    with moto_lab(moto, tmp_path, engine, busybox) as (lab, between, settings):
        job = lab.submit(UNTIL_LET_GO)
        with command(["run", "--once"], lab.env(**settings), tmp_path) as worker:
            lab.server.wait_for_state(job, "running")
            lab.server.set_faults({"method": "PUT", "path": f"/jobs/{job}/status", "status": 401, "times": 1})
            wait_until(lambda: len(between.passed) > 1, "the token is refreshed")
            lab.let_go(job)
            assert worker.wait() == 0
        assert lab.ended(job) == ("finished", "")
        assert between.passed == [("USER_PASSWORD_AUTH", 200), ("REFRESH_TOKEN_AUTH", 200)]
        assert {event["account"] for event in lab.server.events("update", job)} == {"lab-7"}
        assert settings["password"] not in worker.output + worker.errors
        assert_untold(worker, lab.base)


@pytest.mark.moto
def test_moto_refuses_a_wrong_password(tmp_path: Path, moto: Moto, engine: docker.APIClient, busybox: str) -> None:
    with moto_lab(moto, tmp_path, engine, busybox) as (lab, between, settings):
        with command(["run"], lab.env(**settings | {"password": WRONG}), tmp_path) as worker:
            assert_refused(worker)
        assert between.passed == [("USER_PASSWORD_AUTH", 400)]
        assert_untold(worker, lab.base)
