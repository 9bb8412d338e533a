"""A page of somebody else instead of the API's word: each kind of page, to each call, in each phase (B21, B22).

No result is lost, no cancel is believed, no lease is renewed. Against scripted answers; with a whole worker in
tests/e2e/test_pages.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobfetcher import build
from jobfetcher.core.errors import SourceError, SourceUnavailable
from jobfetcher.core.job import OutputKind, parse_file_ref, parse_job_id
from jobfetcher.core.machine import Offer
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Standing
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.settings import Settings
from jobfetcher.sources.worker_api.source import ApiLease, WorkerApi
from tests.support.jobs import Emitted, FakeClock
from tests.support.scripted_api import Answer, ScriptedApi, reply

pytestmark = pytest.mark.fault("B21", "B22")

SEVEN = parse_job_id("7")
OFFER = Offer(4.0, 4096)
FINISHED = Outcome(Ending.FINISHED, None, "")
FAILED = Outcome(Ending.JOB_FAILED, None, "exit code 3")
HELD = (Phase.CLAIMED, Phase.STAGING_IN, Phase.RUNNING, Phase.STAGING_OUT)
WORDS = dict(zip(HELD, ("preprocessing", "preprocessing", "running", "postprocessing"), strict=True))
PORTAL = "http://portal.example/login"


def html(status: int, title: str, **headers: str) -> Answer:
    return reply(status, f"<html><title>{title}</title>".encode(), content_type="text/html", **headers)


#: Each page, and what of it a person must hear.
PAGES: dict[str, tuple[Answer, tuple[str, ...]]] = {
    "nginx-404": (html(404, "404 Not Found nginx"), ("404", "text/html", "404 Not Found nginx")),
    "filter-403": (html(403, "Blocked by policy"), ("403", "text/html", "Blocked by policy")),
    "portal-302": (html(302, "Found", location=PORTAL), ("302", "text/html", f"Location {PORTAL}", "Found")),
    "login-200": (html(200, "Please sign in"), ("200", "text/html", "Please sign in")),
    "gateway-502": (html(502, "Bad Gateway"), ("502", "text/html", "Bad Gateway")),
    "gateway-503": (html(503, "Unavailable"), ("503", "text/html", "Unavailable")),
    "plain-200": (reply(200, b"OK\n", content_type="text/plain"), ("200", "text/plain", "OK")),
    "json-404": (
        reply(404, b'{"message": "no Route matched"}', content_type="application/json"),
        ("404", "application/json", "no Route matched"),
    ),
    "auth-401": (html(401, "Authorization Required"), ("401", "text/html", "Authorization Required")),
}

#: Where JSON is expected, nothing is a page, too. To an update it is an acceptance (PROTOCOL.md S20).
EMPTY: dict[str, tuple[Answer, tuple[str, ...]]] = {"empty-200": (reply(200), ("200", "no content type", "no body"))}


@pytest.fixture(params=PAGES)
def page(request: pytest.FixtureRequest) -> tuple[Answer, tuple[str, ...]]:
    return PAGES[request.param]


@pytest.fixture(params=PAGES | EMPTY)
def page_or_nothing(request: pytest.FixtureRequest) -> tuple[Answer, tuple[str, ...]]:
    return (PAGES | EMPTY)[request.param]


def json_of(value: Any, status: int = 200) -> Answer:
    return reply(status, json.dumps(value).encode(), content_type="application/json")


def form() -> Answer:
    return json_of({"method": "post", "url": "https://storage.example/x", "headers": {}, "data": {"key": "x"}}, 201)


def link() -> Answer:
    return json_of({"method": "get", "url": "https://storage.example/x", "headers": {}, "data": {}})


def meets(page: tuple[Answer, tuple[str, ...]], api: ScriptedApi, call: Callable[[], object], times: int = 3) -> None:
    """The call meets the page several times, and nothing is decided by it."""
    answer, words = page
    for _ in range(times):
        api.then(answer)
        with pytest.raises(SourceUnavailable) as error:
            call()
        assert not api.answers, "one request each time"
        for word in words:
            assert word in str(error.value)


def test_a_question_for_a_job(
    page_or_nothing: tuple[Answer, tuple[str, ...]], api: ScriptedApi, source: WorkerApi
) -> None:
    meets(page_or_nothing, api, lambda: source.fetch(OFFER, 0.0))
    api.then(json_of({}))
    assert source.fetch(OFFER, 0.0) is None


@pytest.mark.parametrize("phase", HELD)
def test_a_keep_alive(
    page: tuple[Answer, tuple[str, ...]], api: ScriptedApi, lease: ApiLease, clock: FakeClock, phase: Phase
) -> None:
    lease.beat(phase)
    clock.now += 200
    status = int(page[1][0])
    for number in range(5):
        api.then(page[0])
        if status >= 500 and number:
            api.then(page[0])  # S7: after the second 5xx in a row the state is asked for
        with pytest.raises(SourceUnavailable):
            lease.beat(phase)
    clock.now += 101  # the lease counts from the beat before all of them
    api.asked.clear()
    api.then(json_of(WORDS[phase]), 204)
    assert lease.beat(phase) is Standing.KEEP
    assert api.said == ["GET", WORDS[phase]]


@pytest.mark.parametrize("phase", HELD)
def test_the_question_how_a_job_stands(
    page_or_nothing: tuple[Answer, tuple[str, ...]], api: ScriptedApi, lease: ApiLease, clock: FakeClock, phase: Phase
) -> None:
    lease.beat(phase)
    clock.now += 301
    meets(page_or_nothing, api, lambda: lease.beat(phase))
    api.then(json_of(WORDS[phase]), 204)
    assert lease.beat(phase) is Standing.KEEP


@pytest.mark.parametrize("cut_off", list(Phase))
def test_the_question_how_a_job_stands_after_a_crash(
    page_or_nothing: tuple[Answer, tuple[str, ...]],
    api: ScriptedApi,
    source: WorkerApi,
    clock: FakeClock,
    cut_off: Phase,
) -> None:
    lease = source.resume(api.url, SEVEN, cut_off=cut_off)
    clock.now += 31
    meets(page_or_nothing, api, lambda: lease.settle(FAILED))
    api.then(json_of("postprocessing"), 204)
    assert lease.settle(FAILED) is Standing.KEEP


@pytest.mark.fault("A7")
@pytest.mark.parametrize("end", ["finished", "error", "queued"])
@pytest.mark.parametrize("committed", [True, False])
def test_an_end(
    page: tuple[Answer, tuple[str, ...]], api: ScriptedApi, lease: ApiLease, clock: FakeClock, end: str, committed: bool
) -> None:
    """It is told until the API itself accepts it. Who answers with the page may have passed the request on before."""
    lease.beat(Phase.STAGING_OUT)
    api.asked.clear()
    ways: dict[str, Callable[[], Standing]] = {
        "finished": lambda: lease.settle(FINISHED),
        "error": lambda: lease.settle(Outcome(Ending.JOB_FAILED, None, "")),
        "queued": lambda: lease.release(""),
    }
    tell = ways[end]
    for number in range(4):
        if number:
            api.then(json_of(end if committed else "postprocessing"))
        api.then(page[0])
        if number and int(page[1][0]) >= 500:
            api.then(json_of(end if committed else "postprocessing"))
        with pytest.raises(SourceUnavailable) as error:
            tell()
        assert page[1][-1] in str(error.value)
        assert not api.answers
        clock.now += 31
    api.then(json_of(end if committed else "postprocessing"), 204)
    assert [tell(), tell()] == [Standing.KEEP] * 2
    assert set(api.said) == {"GET", end}
    assert api.said.count(end) == 5


@pytest.mark.fault("C7")
def test_where_an_input_is(page_or_nothing: tuple[Answer, tuple[str, ...]], api: ScriptedApi, lease: ApiLease) -> None:
    """No input is missing because a page says 404."""
    meets(page_or_nothing, api, lambda: lease.sign_input(parse_file_ref("s3://b/k")))
    api.then(link())
    assert lease.sign_input(parse_file_ref("s3://b/k")).url == "https://storage.example/x"


@pytest.mark.fault("S8")
def test_where_an_output_goes(
    page_or_nothing: tuple[Answer, tuple[str, ...]], api: ScriptedApi, lease: ApiLease
) -> None:
    meets(page_or_nothing, api, lambda: lease.sign_output(OutputKind.OUTPUT, "out", "a"))
    api.then(form())
    lease.sign_output(OutputKind.OUTPUT, "out", "a")
    assert lease.beat(Phase.STAGING_OUT) is Standing.KEEP


# -- signing in -------------------------------------------------------------------------------------------------------


def signing_in(api: ScriptedApi, tmp_path: Path) -> WorkerApi:
    """A source as the command has it, which signs in with a password at the same scripted server."""
    settings = Settings(
        api_url=api.url, path_base=tmp_path, username="lab", password="pass-word", aws_endpoint_url=api.url
    )
    return build.make_source(settings, Emitted())


POOL = {"cognito": {"user_pool_id": "p", "client_id": "c", "region": "eu-central-1"}}


def tokens(number: int) -> Answer:
    return json_of({"AuthenticationResult": {"IdToken": f"t{number}", "RefreshToken": "r", "ExpiresIn": 3600}})


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between two tries to sign in."""
    monkeypatch.setattr("jobfetcher.sources.worker_api.auth._PAUSE_S", 0.0)


@pytest.mark.usefixtures("hasty")
def test_where_to_sign_in(page_or_nothing: tuple[Answer, tuple[str, ...]], api: ScriptedApi, tmp_path: Path) -> None:
    """At the start: a worker that a portal keeps from the server waits, and does not exit."""
    source = signing_in(api, tmp_path)
    meets(page_or_nothing, api, lambda: source.fetch(OFFER, 0.0))
    api.then(json_of(POOL), tokens(1), json_of({}))
    assert source.fetch(OFFER, 0.0) is None
    source.close()


@pytest.mark.fault("B24")
@pytest.mark.usefixtures("hasty")
def test_a_sign_in(page_or_nothing: tuple[Answer, tuple[str, ...]], api: ScriptedApi, tmp_path: Path) -> None:
    source = signing_in(api, tmp_path)
    api.then(json_of(POOL))
    meets(page_or_nothing, api, lambda: source.fetch(OFFER, 0.0))
    api.then(tokens(1), json_of({}))
    assert source.fetch(OFFER, 0.0) is None
    source.close()


@pytest.mark.fault("B5")
@pytest.mark.usefixtures("hasty")
def test_a_refresh(page_or_nothing: tuple[Answer, tuple[str, ...]], api: ScriptedApi, tmp_path: Path) -> None:
    """The refresh token is kept: no password is asked for because of a page."""
    source = signing_in(api, tmp_path)
    api.then(json_of(POOL), tokens(1), json_of({}))
    source.fetch(OFFER, 0.0)
    lease = source.resume(api.url, SEVEN)
    for _ in range(3):
        api.then(401, page_or_nothing[0])
        with pytest.raises(SourceError):
            lease.beat(Phase.RUNNING)
    api.asked.clear()
    api.then(401, tokens(2), 204)
    assert lease.beat(Phase.RUNNING) is Standing.KEEP
    assert api.said == ["running", "POST", "running"]
    source.close()
