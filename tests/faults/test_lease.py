"""Whose job is it? A lease after a crash, a long silence, a suspended machine, and beside a twin of the same account.

Against scripted answers where the order of the requests matters, and against the mock server, with a second worker,
where it matters what becomes of the job. Time is a number in these tests, the server's as well as the worker's.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from jobfetcher.core.errors import SourceError, SourceUnavailable, Stopped, StopReason
from jobfetcher.core.job import OutputKind, parse_job_id
from jobfetcher.core.machine import Offer
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Lease, Standing
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.core.urls import SignedRequest, UrlPolicy, parse_origin
from jobfetcher.sources.worker_api.auth import StaticToken
from jobfetcher.sources.worker_api.client import Client
from jobfetcher.sources.worker_api.source import ApiLease, Filter, WorkerApi
from tests.support.jobs import Emitted, FakeClock
from tests.support.mock_server import MockServer, job_spec, running_mock_api
from tests.support.scripted_api import Answer, ScriptedApi, hang_up, reply
from tests.support.transfers import Recorder, produced, transfer

SEVEN = parse_job_id("7")
FINISHED = Outcome(Ending.FINISHED, None, "")
FAILED = Outcome(Ending.JOB_FAILED, None, "exit code 3")
OFFER = Offer(4.0, 4096)
HELD = (Phase.CLAIMED, Phase.STAGING_IN, Phase.RUNNING, Phase.STAGING_OUT)
WORDS = dict(zip(HELD, ("preprocessing", "preprocessing", "running", "postprocessing"), strict=True))


# -- against scripted answers: which requests, in which order ---------------------------------------------------------


def state(word: str) -> Answer:
    return reply(200, json.dumps(word).encode())


def form() -> Answer:
    signed = {"method": "post", "url": "https://storage.example/x", "headers": {}, "data": {"key": "x"}}
    return reply(201, json.dumps(signed).encode())


@pytest.mark.fault("A2")
@pytest.mark.parametrize("cut_off", HELD)
@pytest.mark.parametrize("known", ["pulled", "preprocessing"])
def test_after_a_crash_the_server_is_asked_before_anything_is_said(
    api: ScriptedApi, source: WorkerApi, cut_off: Phase, known: str
) -> None:
    lease = source.resume(api.url, SEVEN, cut_off=cut_off)
    assert api.asked == []
    api.then(state(known), 204)
    assert lease.beat(cut_off) is Standing.KEEP
    assert lease.beat(cut_off) is Standing.KEEP  # and once is enough
    assert api.said == ["GET", WORDS[cut_off], WORDS[cut_off]]


@pytest.mark.fault("A2")
@pytest.mark.fault("A7")
@pytest.mark.parametrize("cut_off", list(Phase))
def test_after_a_crash_a_job_that_is_gone_is_not_spoken_of(
    api: ScriptedApi, source: WorkerApi, clock: FakeClock, cut_off: Phase
) -> None:
    lease = source.resume(api.url, SEVEN, cut_off=cut_off)
    clock.now += 31
    api.then(404)
    first = lease.settle(FINISHED) if cut_off is Phase.SETTLING else lease.beat(cut_off)
    assert [first, lease.beat(Phase.RUNNING), lease.settle(FINISHED), lease.release("x")] == [Standing.CANCEL] * 4
    with pytest.raises(Stopped):
        lease.sign_output(OutputKind.OUTPUT, "out", "a")
    assert api.said == ["GET"]


@pytest.mark.fault("A2")
@pytest.mark.parametrize("cut_off", HELD)
@pytest.mark.parametrize("ended", ["finished", "error"])
def test_after_a_crash_a_job_that_ended_without_us_is_lost(
    api: ScriptedApi, source: WorkerApi, cut_off: Phase, ended: str
) -> None:
    """A word of ours would open it again (S6)."""
    lease = source.resume(api.url, SEVEN, cut_off=cut_off)
    api.then(state(ended))
    assert [lease.beat(cut_off), lease.settle(FINISHED), lease.release("x")] == [Standing.LOST] * 3
    with pytest.raises(Stopped) as stopped:
        lease.sign_output(OutputKind.OUTPUT, "out", "a")
    assert stopped.value.reason is StopReason.LOST
    assert api.said == ["GET"]


@pytest.mark.fault("A7")
@pytest.mark.parametrize("ended", ["finished", "error"])
def test_an_end_that_a_dead_process_told_is_told_again_for_no_state_proves_that_it_was_heard(
    api: ScriptedApi, source: WorkerApi, clock: FakeClock, ended: str
) -> None:
    lease = source.resume(api.url, SEVEN, cut_off=Phase.SETTLING)
    clock.now += 31
    api.then(state(ended))
    assert [lease.settle(FINISHED), lease.settle(FINISHED), lease.beat(Phase.STAGING_OUT)] == [Standing.KEEP] * 3
    assert api.said == ["GET", "finished"]


@pytest.mark.fault("A7")
@pytest.mark.fault("S6")
@pytest.mark.parametrize("cut_off", list(Phase))
def test_no_end_is_told_while_a_word_of_a_dead_process_may_arrive(
    api: ScriptedApi, source: WorkerApi, clock: FakeClock, cut_off: Phase
) -> None:
    """The end itself had 30 s for its call, a heartbeat 10."""
    doubt_s = 30.0 if cut_off is Phase.SETTLING else 10.0
    lease = source.resume(api.url, SEVEN, cut_off=cut_off)
    for passed_s in (0.0, doubt_s - 0.1):
        clock.now = 10_000.0 + passed_s
        for tell in (partial(lease.settle, FAILED), partial(lease.release, "x")):
            with pytest.raises(SourceUnavailable, match="on its way") as wait:
                tell()
            assert wait.value.retry_after_s == pytest.approx(doubt_s - passed_s)
    assert api.asked == []
    if cut_off is not Phase.SETTLING:
        api.then(state("running"), 204)
        assert lease.beat(cut_off) is Standing.KEEP  # the job is kept meanwhile
        api.asked.clear()
    clock.now = 10_000.0 + doubt_s
    api.then(*([state("postprocessing")] if cut_off is Phase.SETTLING else []), 204)
    assert lease.settle(FAILED) is Standing.KEEP
    assert api.said == (["GET", "error"] if cut_off is Phase.SETTLING else ["error"])


@pytest.mark.fault("S5")
@pytest.mark.fault("A4")
def test_after_a_crash_a_job_in_the_queue_is_taken_back(api: ScriptedApi, source: WorkerApi) -> None:
    lease = source.resume(api.url, SEVEN, cut_off=Phase.RUNNING)
    api.then(state("queued"), 204)
    assert lease.beat(Phase.RUNNING) is Standing.KEEP
    assert api.said == ["GET", "running"]


@pytest.mark.fault("S5")
def test_after_a_crash_a_job_that_another_account_has_is_let_go(api: ScriptedApi, source: WorkerApi) -> None:
    lease = source.resume(api.url, SEVEN, cut_off=Phase.RUNNING)
    api.then(state("preprocessing"), 404)  # anyone may ask for the state; who speaks of it must have it
    assert [lease.beat(Phase.RUNNING), lease.settle(FINISHED)] == [Standing.CANCEL] * 2
    assert api.said == ["GET", "running"]


def test_what_the_server_knows_of_a_job_that_is_run_again_is_kept(api: ScriptedApi, source: WorkerApi) -> None:
    lease = source.resume(api.url, SEVEN, cut_off=Phase.STAGING_IN)
    api.then(state("running"))
    for phase in (Phase.STAGING_IN, Phase.RUNNING, Phase.STAGING_OUT):
        lease.beat(phase)
    assert api.said == ["GET", "running", "running", "postprocessing"]


@pytest.mark.parametrize("answer", [b"5", b"null", b'{"state": "running"}', b"<html>", b""])
def test_what_is_no_state_decides_nothing(api: ScriptedApi, source: WorkerApi, answer: bytes) -> None:
    lease = source.resume(api.url, SEVEN, cut_off=Phase.RUNNING)
    api.then(reply(200, answer))
    with pytest.raises(SourceUnavailable):
        lease.beat(Phase.RUNNING)
    api.then(state("running"))
    assert lease.beat(Phase.RUNNING) is Standing.KEEP
    assert api.said == ["GET", "GET", "running"]


def test_without_a_crash_only_the_end_is_asked_for_first(api: ScriptedApi, source: WorkerApi) -> None:
    """Steps in processes of their own: others speak of the job, too."""
    lease = source.resume(api.url, SEVEN)
    api.then(204, form(), state("postprocessing"))
    lease.beat(Phase.RUNNING)
    lease = source.resume(api.url, SEVEN)
    lease.sign_output(OutputKind.OUTPUT, "out", "a")
    lease = source.resume(api.url, SEVEN)
    assert lease.settle(FAILED) is Standing.KEEP
    assert api.said == ["running", "POST", "GET", "error"]


@pytest.mark.fault("J4")
@pytest.mark.parametrize(("age_s", "first"), [(300.0, []), (301.0, ["GET"])])
def test_a_beat_after_a_long_silence_asks_first(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock, age_s: float, first: list[str]
) -> None:
    lease.beat(Phase.RUNNING)
    clock.now += age_s
    api.then(*[state("queued") for _ in first])
    assert lease.beat(Phase.RUNNING) is Standing.KEEP
    lease.beat(Phase.RUNNING)
    assert api.said == ["running", *first, "running", "running"]


@pytest.mark.fault("J4")
def test_a_question_without_an_answer_decides_nothing(api: ScriptedApi, lease: ApiLease, clock: FakeClock) -> None:
    clock.now += 400
    for trouble in (hang_up, reply(500), reply(403), reply(200, b"<html>")):
        api.then(trouble)
        with pytest.raises(SourceError):
            lease.beat(Phase.RUNNING)
    assert api.said == ["GET"] * 4
    api.then(state("pulled"))
    assert lease.beat(Phase.RUNNING) is Standing.KEEP


@pytest.mark.fault("J4")
@pytest.mark.fault("B18")
def test_a_file_of_an_old_lease_is_not_sent_before_the_job_is_confirmed(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock
) -> None:
    lease.beat(Phase.STAGING_OUT)
    clock.now += 100
    api.then(form())
    kept = lease.sign_output(OutputKind.OUTPUT, "out", "a")
    clock.now += 201
    api.then(state("queued"), 204)
    assert lease.sign_output(OutputKind.OUTPUT, "out", "b") is kept  # the form at hand is good, the lease was not
    assert api.said == ["postprocessing", "POST", "GET", "postprocessing"]
    clock.now += 250
    api.then(form())
    lease.sign_output(OutputKind.OUTPUT, "out", "c", renew=True)
    assert api.said[4:] == ["POST"]  # the confirmation was a beat like any other


@pytest.mark.fault("J4")
@pytest.mark.fault("B18")
@pytest.mark.parametrize(
    "answers", [(404,), (state("queued"), 404), (state("postprocessing"), 404), (state("error"),), (state("pulled"),)]
)
def test_a_file_of_a_lost_lease_is_never_sent(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock, answers: tuple[Answer | int, ...]
) -> None:
    lease.beat(Phase.STAGING_OUT)
    clock.now += 100
    api.then(form())
    lease.sign_output(OutputKind.OUTPUT, "out", "a")
    clock.now += 250
    api.asked.clear()
    api.then(*answers)
    for name, renew in (("a", False), ("b", False), ("a", True)):
        with pytest.raises(Stopped) as stopped:
            lease.sign_output(OutputKind.OUTPUT, "out", name, renew=renew)
        assert stopped.value.reason in {StopReason.CANCELLED, StopReason.LOST}
    assert lease.settle(FINISHED) is not Standing.KEEP
    assert "POST" not in api.said
    assert len(api.asked) == len(answers)


@pytest.mark.fault("B2")
def test_a_heartbeat_that_hangs_stops_no_upload(api: ScriptedApi, lease: ApiLease) -> None:
    api.then(form())
    lease.sign_output(OutputKind.OUTPUT, "out", "a")
    asked, go_on = threading.Event(), threading.Event()

    def hang(connection: socket.socket) -> None:
        asked.set()
        go_on.wait(10)
        reply(204)(connection)

    api.then(hang)
    beat = threading.Thread(target=lease.beat, args=(Phase.STAGING_OUT,))
    beat.start()
    try:
        assert asked.wait(10)
        lease.sign_output(OutputKind.OUTPUT, "out", "b")
        assert beat.is_alive()
    finally:
        go_on.set()
        beat.join()


@pytest.mark.fault("J4")
def test_many_files_of_an_old_lease_confirm_it_once(api: ScriptedApi, lease: ApiLease, clock: FakeClock) -> None:
    lease.beat(Phase.STAGING_OUT)
    clock.now += 100
    api.then(form())
    lease.sign_output(OutputKind.OUTPUT, "out", "a")
    clock.now += 250
    api.asked.clear()
    api.then(state("postprocessing"))
    start = threading.Barrier(8)

    def sign() -> None:
        start.wait()
        lease.sign_output(OutputKind.OUTPUT, "out", "a")

    threads = [threading.Thread(target=sign) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert api.said == ["GET", "postprocessing"]


# -- against the mock server, with a second worker --------------------------------------------------------------------


class Lab:
    """One mock server whose time goes with the workers' clock, and workers of any account on it."""

    def __init__(self, server: MockServer, clock: FakeClock, opened: ExitStack) -> None:
        self.server = server
        self._clock = clock
        self._opened = opened

    def worker(self, account: str = "mock") -> WorkerApi:
        client = Client(self.server.url)
        client.auth = StaticToken(f"{account}-token")
        policy = UrlPolicy(parse_origin(self.server.url))
        made = WorkerApi(client, policy, wanted=Filter(), emit=Emitted(), clock=self._clock)
        self._opened.callback(made.close)
        return made

    def other_account(self) -> WorkerApi:
        self.server.add_account("another", "another-password", token="another-token")
        return self.worker("another")

    def pass_time(self, seconds: float) -> None:
        """For all, and the server looks for silent jobs."""
        self._clock.now += seconds
        self.server.advance(seconds)
        self.server.sweep()

    def accepted_of(self, job_id: int, account: str) -> list[str]:
        events = self.server.events("update", job_id)
        return [event["state"] for event in events if event["account"] == account and event["code"] == 204]


@pytest.fixture
def lab(tmp_path: Path, clock: FakeClock, request: pytest.FixtureRequest) -> Iterator[Lab]:
    with ExitStack() as opened:
        server = opened.enter_context(running_mock_api(tmp_path / "mock", **getattr(request, "param", {})))
        yield Lab(server, clock, opened)
        assert server.violations() == []
        assert [one["late_requests"] for one in server.tally() if one["late_requests"]] == []


def taken(worker: WorkerApi) -> Lease:
    claim = worker.fetch(OFFER, 0.0)
    assert claim is not None
    return claim.lease


def beat_through(lease: Lease, last: Phase) -> None:
    for phase in HELD[: HELD.index(last) + 1]:
        assert lease.beat(phase) is Standing.KEEP


def upload(lease: Lease, folder: Path, *names: str, content: str) -> None:
    """Send files as `output` of the job, by the real transfer."""
    for name in names:
        (folder / name).write_text(content)
    moving = transfer()
    try:
        moving.upload([produced(folder / name, signing(lease, name)) for name in names], Recorder())
    finally:
        moving.close()


def signing(lease: Lease, name: str) -> Callable[[bool], SignedRequest]:
    return lambda renew: lease.sign_output(OutputKind.OUTPUT, "out", name, renew=renew)


@pytest.mark.fault("B18")
@pytest.mark.fault("J4")
def test_what_the_next_holder_stored_survives_byte_for_byte(lab: Lab, tmp_path: Path) -> None:
    job_id = lab.server.submit(job_spec())
    old = taken(lab.worker())
    beat_through(old, Phase.STAGING_OUT)
    upload(old, tmp_path, "a", content="of the first holder")
    lab.pass_time(400)  # the form in the first one's hands is good for 600 s
    new = taken(lab.other_account())
    beat_through(new, Phase.STAGING_OUT)
    upload(new, tmp_path, "a", "b", content="of the second holder")
    stored = lab.server.results(job_id)
    assert set(stored.values()) == {b"of the second holder"}
    puts = lab.server.traffic()

    with pytest.raises(Stopped):
        upload(old, tmp_path, "a", "b", "c", content="of the first holder again")
    assert old.settle(FINISHED) is not Standing.KEEP
    assert old.beat(Phase.STAGING_OUT) is not Standing.KEEP
    assert lab.server.results(job_id) == stored
    assert lab.server.traffic() == puts
    assert new.settle(FINISHED) is Standing.KEEP
    assert lab.server.state(job_id) == "finished"
    assert len(lab.server.outbox()) == 1


@pytest.mark.fault("A12")
@pytest.mark.fault("S5")
@pytest.mark.parametrize("phase", HELD)
def test_a_machine_that_slept_takes_its_job_back(lab: Lab, tmp_path: Path, phase: Phase) -> None:
    job_id = lab.server.submit(job_spec())
    lease = taken(lab.worker())
    beat_through(lease, phase)
    lab.pass_time(400)
    assert lab.server.state(job_id) == "queued"
    assert lease.beat(phase) is Standing.KEEP
    assert lab.server.state(job_id) == WORDS[phase]
    assert lab.other_account().fetch(OFFER, 0.0) is None
    for later in HELD[HELD.index(phase) :]:
        assert lease.beat(later) is Standing.KEEP
    upload(lease, tmp_path, "a", content="x")
    assert lease.settle(FINISHED) is Standing.KEEP
    assert lab.server.state(job_id) == "finished"


@pytest.mark.fault("A12")
@pytest.mark.parametrize("phase", HELD)
@pytest.mark.parametrize("how", ["beat", "settle", "release", "upload"])
def test_a_machine_that_slept_too_long_says_nothing_of_anothers_job(
    lab: Lab, tmp_path: Path, phase: Phase, how: str
) -> None:
    job_id = lab.server.submit(job_spec())
    old = taken(lab.worker())
    beat_through(old, phase)
    said = lab.accepted_of(job_id, "worker")
    lab.pass_time(400)
    new = taken(lab.other_account())
    beat_through(new, Phase.RUNNING)
    if how == "upload":
        with pytest.raises(Stopped):
            upload(old, tmp_path, "a", content="x")
    else:
        tell = {
            "beat": lambda: old.beat(phase),
            "settle": lambda: old.settle(FINISHED),
            "release": lambda: old.release("x"),
        }
        assert tell[how]() is not Standing.KEEP
    assert lab.accepted_of(job_id, "worker") == said
    assert lab.server.state(job_id) == "running"
    assert lab.server.results(job_id) == {}


@pytest.mark.fault("A2")
@pytest.mark.fault("S3")
def test_a_worker_that_was_restarted_goes_on_with_what_it_never_gets_again(lab: Lab) -> None:
    job_id = lab.server.submit(job_spec())
    dead = taken(lab.worker())
    beat_through(dead, Phase.RUNNING)
    lab.pass_time(400)
    restarted = lab.worker()
    assert restarted.fetch(OFFER, 0.0) is None  # it lies in the queue, but not for this account
    lease = restarted.resume(dead.token, dead.job_id, cut_off=Phase.RUNNING)
    assert lease.beat(Phase.RUNNING) is Standing.KEEP
    assert lab.server.state(job_id) == "running"


@pytest.mark.fault("B19")
@pytest.mark.fault("S2")
@pytest.mark.parametrize("lab", [{"retry_different": False}], indirect=True)
@pytest.mark.parametrize("how", ["beat", "settle", "release", "upload"])
def test_a_job_that_went_backwards_is_in_the_hands_of_a_twin(lab: Lab, tmp_path: Path, how: str) -> None:
    """Two machines with one account, and a server that gives an account a job again."""
    job_id = lab.server.submit(job_spec())
    old = taken(lab.worker())
    beat_through(old, Phase.RUNNING)
    lab.pass_time(400)
    new = taken(lab.worker())
    assert new.job_id == old.job_id
    beat_through(new, Phase.STAGING_IN)
    before = lab.accepted_of(job_id, "worker")
    if how == "upload":
        with pytest.raises(Stopped) as stopped:
            upload(old, tmp_path, "a", content="x")
        assert stopped.value.reason is StopReason.LOST
    else:
        tell = {
            "beat": lambda: old.beat(Phase.RUNNING),
            "settle": lambda: old.settle(FINISHED),
            "release": lambda: old.release("x"),
        }
        assert [tell[how](), tell[how]()] == [Standing.LOST] * 2
    assert lab.accepted_of(job_id, "worker") == before
    beat_through(new, Phase.STAGING_OUT)
    assert new.settle(FINISHED) is Standing.KEEP


@pytest.mark.fault("B19")
@pytest.mark.parametrize("lab", [{"retry_different": False}], indirect=True)
def test_a_job_that_a_twin_has_ended_is_not_opened_again(lab: Lab) -> None:
    job_id = lab.server.submit(job_spec())
    old = taken(lab.worker())
    beat_through(old, Phase.RUNNING)
    lab.pass_time(400)
    new = taken(lab.worker())
    beat_through(new, Phase.STAGING_OUT)
    new.settle(FINISHED)
    assert [old.beat(Phase.RUNNING), old.settle(FINISHED)] == [Standing.LOST] * 2
    assert lab.server.state(job_id) == "finished"
    assert len(lab.server.outbox()) == 1


@pytest.mark.fault("B8")
@pytest.mark.fault("S7")
@pytest.mark.parametrize("swept", [False, True])
def test_a_deleted_job_of_which_no_404_came_is_found_out(lab: Lab, swept: bool) -> None:
    """The one 404 is lost on its way, or the server's own sweep met the deletion first."""
    job_id = lab.server.submit(job_spec())
    lease = taken(lab.worker())
    beat_through(lease, Phase.RUNNING)
    lab.server.delete(job_id, swept=swept)
    if not swept:
        lab.server.set_faults({"method": "PUT", "path": f"^/jobs/{job_id}/status$", "drop": "after", "times": 1})
        with pytest.raises(SourceUnavailable, match="no answer"):
            lease.beat(Phase.RUNNING)
    with pytest.raises(SourceUnavailable, match="500"):
        lease.beat(Phase.RUNNING)
    assert [lease.beat(Phase.RUNNING), lease.settle(FINISHED)] == [Standing.CANCEL] * 2
    answers = [event["code"] for event in lab.server.events("update", job_id)][-3:]
    assert answers == ([204, 500, 500] if swept else [404, 500, 500])
