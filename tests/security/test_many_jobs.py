"""A server that hands out thousands of jobs where one was asked for wastes little time of its worker (T23, B16)."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from jobfetcher.core.errors import SourceUnavailable
from jobfetcher.core.machine import Offer
from jobfetcher.core.ports import Claim
from jobfetcher.core.urls import UrlPolicy, parse_origin
from jobfetcher.sources.worker_api import source as room
from jobfetcher.sources.worker_api.auth import StaticToken
from jobfetcher.sources.worker_api.client import Client
from jobfetcher.sources.worker_api.source import Filter, WorkerApi
from tests.support.jobs import Emitted, FakeClock
from tests.support.scripted_api import ScriptedApi, reply, scripted_api

pytestmark = pytest.mark.fault("T23", "B16")

MANY = 20_000
SPEC = {"handler": {"image_url": "busybox"}}


@pytest.fixture
def api() -> Iterator[ScriptedApi]:
    with scripted_api() as running:
        yield running


def make(api: ScriptedApi, emit: Emitted) -> WorkerApi:
    client = Client(api.url)
    client.auth = StaticToken("token")
    policy = UrlPolicy(parse_origin(api.url))
    return WorkerApi(client, policy, wanted=Filter(), emit=emit, clock=FakeClock())


def fetch(source: WorkerApi) -> Claim:
    claim = source.fetch(Offer(1.0, 1000), 0.0)
    assert claim is not None
    return claim


def test_of_twenty_thousand_jobs_one_is_taken_and_a_few_are_given_back(api: ScriptedApi) -> None:
    emit = Emitted()
    api.then(reply(200, json.dumps({"1": SPEC} | {str(number): {} for number in range(2, MANY + 1)}).encode()))
    with closing(make(api, emit)) as source:
        assert fetch(source).job.id == "1"
        assert fetch_is_over(api)
    assert [(asked.method, asked.path) for asked in api.asked[1:]] == [
        ("PUT", f"/jobs/{number}/status") for number in (2, 3, 4)
    ]
    [said] = emit.named("too_many_jobs")
    assert "handed out 20000 jobs where one was asked for" in str(said["message"])


def fetch_is_over(api: ScriptedApi) -> bool:
    """Whether no word comes any more: the thread that says them is gone."""
    for thread in threading.enumerate():
        if thread.name == "give-back":
            thread.join(60)
            return not thread.is_alive()
    return bool(api.asked)


def test_a_server_that_does_not_answer_to_them_holds_up_nothing(
    api: ScriptedApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_GIVE_BACK_S", 0.1, raising=False)
    hung, done = threading.Event(), threading.Event()

    def hang(connection: socket.socket) -> None:
        hung.set()
        done.wait(60)

    api.then(reply(200, json.dumps({str(number): SPEC for number in range(1, 50)}).encode()))
    api.default = hang
    emit = Emitted()
    began = time.monotonic()
    try:
        with closing(make(api, emit)) as source:
            assert fetch(source).job.id == "1"
            assert hung.wait(60)
        assert time.monotonic() - began < 25, "neither the job that was taken nor the end of the worker waits for it"
    finally:
        done.set()
    assert fetch_is_over(api)
    assert len([asked for asked in api.asked if asked.method == "PUT"]) == 1


def test_a_server_that_refuses_one_hears_of_no_other(api: ScriptedApi) -> None:
    api.then(reply(200, json.dumps({str(number): SPEC for number in range(1, 5)}).encode()), 500)
    emit = Emitted()
    with closing(make(api, emit)) as source:
        assert fetch(source).job.id == "1"
        assert fetch_is_over(api)
    assert len(api.asked) == 2
    assert len(emit.named("release_failed")) == 1


def test_where_no_thread_can_be_started_the_job_is_taken_all_the_same(
    api: ScriptedApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.then(reply(200, json.dumps({"1": SPEC, "2": SPEC}).encode()))
    with closing(make(api, Emitted())) as source:
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "give-back":
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert fetch(source).job.id == "1"
    assert len(api.asked) == 1


def test_thousands_of_bad_ids_are_a_few_lines(api: ScriptedApi) -> None:
    emit = Emitted()
    api.then(reply(200, json.dumps({f"../{number}": {} for number in range(MANY)}).encode()))
    with closing(make(api, emit)) as source, pytest.raises(SourceUnavailable, match="without a usable id"):
        source.fetch(Offer(1.0, 1000), 0.0)
    assert 0 < len(emit.named("job_unnameable")) <= 16
    assert len(api.asked) == 1
