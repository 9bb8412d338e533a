"""A whole worker and a server that means it no good: bad ids (T3), jobs that only fail (T23), a false name (T20)."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import docker
import pytest

from jobfetcher.core.errors import JobReason, SourceUnavailable, WorkerReason
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.pace import Pace
from jobfetcher.settings import Settings
from jobfetcher.sources.worker_api.auth import StaticToken
from jobfetcher.sources.worker_api.client import Client
from tests.security.impostors import IMPOSTORS
from tests.support.jobs import Emitted, FakeClock
from tests.support.scripted_api import reply, scripted_api
from tests.support.services import wait_until
from tests.support.transfers import Authority
from tests.support.trees import fingerprint
from tests.support.worker import DEADLINE_S, Lab, running_worker

BAD_IDS = ["../x", "/etc", ".", "..", "", "a/b", "x" * 10_240, "\u0661", "7\n", "7?status=finished", "-1", "%2e%2e"]


@pytest.mark.docker
@pytest.mark.fault("T3")
def test_a_worker_that_is_handed_bad_ids_touches_and_says_nothing(
    tmp_path: Path, busybox: str, engine: docker.APIClient
) -> None:
    canary = tmp_path / "x"  # what `jobs/../../x` would be
    canary.mkdir()
    (canary / "keep").write_text("canary")
    spec = {"handler": {"image_url": busybox}, "app": {"cmd": ["true"]}}
    with scripted_api() as api:
        api.default = reply(200, b"{}")
        one_by_one = [{name: spec} for name in BAD_IDS[:3]]
        api.then(*(reply(200, json.dumps(jobs).encode()) for jobs in [dict.fromkeys(BAD_IDS, spec), *one_by_one]))
        settings = Settings.model_validate(
            {
                "api_url": api.url,
                "access_token": "a-token",
                "path_base": str(tmp_path / "base"),
                "timeout_job": "0.01",
                "reserve_disk": "0",
                "gpus": "none",
            }
        )
        with running_worker(settings) as running:
            running.heard.wait_for("job_unnameable", len(BAD_IDS) + 3)
            wait_until(lambda: len(api.asked) > 5, "it goes on asking", DEADLINE_S)
        assert {asked.path for asked in api.asked} == {"/jobs"}  # never a word about such a job
        assert all(len(message) < 600 for message in running.heard.messages("job_unnameable"))
    assert fingerprint(canary).keys() == {"keep"}
    assert list((tmp_path / "base" / "jobs").iterdir()) == []


# -- T23 --------------------------------------------------------------------------------------------------------------

BAD, GOOD = Outcome(Ending.JOB_FAILED, JobReason.EXIT_CODE, "exit code 1"), Outcome(Ending.FINISHED, None, "")


@pytest.mark.fault("T23")
def test_a_few_bad_jobs_a_day_slow_nothing_down() -> None:
    clock, emit = FakeClock(), Emitted()
    pace = Pace(30, emit, clock=clock)
    for _ in range(20):
        pace.ended(BAD)
        clock.now += 200
    assert pace.left_s() == 0
    # nor does the end of the worker itself, however many jobs it gives back
    for _ in range(20):
        pace.ended(Outcome(Ending.WORKER_FAILED, WorkerReason.SHUTDOWN, "told to leave"))
    assert emit.named("many_failures") == []


@pytest.mark.docker
@pytest.mark.fault("T23")
def test_poison_jobs_of_one_user_do_not_hold_up_the_good_one_of_another(lab: Lab) -> None:
    """The real box of the worker's own passes, so the worker goes on, at most one job a second."""
    poison = [lab.submit("exit 1") for _ in range(9)]
    good = lab.submit("true")
    began = time.monotonic()
    with running_worker(lab.settings(), lambda taken, idle_s: taken >= 10) as running:
        wait_until(lambda: lab.server.state(good) == "finished", "the good one is finished", DEADLINE_S)
        took = time.monotonic() - began
    assert [lab.server.state(job) for job in poison] == ["error"] * 9
    assert took < 60  # 10 jobs of 1 s, 5 pauses of 1 s and two tests here; it was 150 s and more, by sleeping
    messages = running.heard.messages("many_failures")
    assert len(messages) == 1
    assert "this machine has tested itself and is well" in messages[0]
    assert running.heard.all("not_polling") == []


# -- T20 --------------------------------------------------------------------------------------------------------------


class _Answering(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(str(self.headers["Authorization"]))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """The test's output is not the place."""


@contextmanager
def secure_api(context: ssl.SSLContext) -> Iterator[tuple[str, list[str]]]:
    """An HTTPS server on loopback: its URL, and the Authorization of each request it got to read."""
    heard: list[str] = []
    handler = type("Handler", (_Answering,), {"asked": heard})

    class Server(HTTPServer):
        def handle_error(self, *_: object) -> None:
            """A handshake that fails is what these tests are about."""

    server = Server(("127.0.0.1", 0), handler)
    # the handshake is left to the first read, in `handle_error`'s care
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}", heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(url: str, ca_file: Path | None) -> bytes:
    with closing(Client(url, ca_file=None if ca_file is None else str(ca_file))) as client:
        client.auth = StaticToken("planted-token")
        return client.request("GET", "/jobs", within_s=10).body


@pytest.mark.fault("T20")
def test_an_api_with_a_certificate_of_ca_file_gets_the_token(authority: Authority) -> None:
    with secure_api(authority.server()) as (url, heard):
        assert ask(url, authority.file) == b"{}"
        assert heard == ["Bearer planted-token"]


@pytest.mark.fault("T20", "N11")
@IMPOSTORS
def test_an_api_that_is_not_who_it_says_gets_no_token(
    authority: Authority, made: Callable[[Authority], ssl.SSLContext], trusted: bool
) -> None:
    with secure_api(made(authority)) as (url, heard):
        with pytest.raises(SourceUnavailable) as refused:
            ask(url, authority.file if trusted else None)
        assert "planted-token" not in str(refused.value)
        assert heard == []
