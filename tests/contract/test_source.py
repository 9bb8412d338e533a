"""The contract of `core.ports.JobSource`: the same tests for the fake, and for the worker API on the mock server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from jobfetcher.core.errors import JobFault, JobReason, SourceUnavailable, Stopped
from jobfetcher.core.job import JobId, OutputKind, parse_file_ref
from jobfetcher.core.machine import Offer
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Claim, JobSource, Standing
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.core.urls import Method, UrlPolicy, parse_origin
from jobfetcher.sources.worker_api.auth import StaticToken
from jobfetcher.sources.worker_api.client import Client
from jobfetcher.sources.worker_api.source import Filter, WorkerApi
from jobfetcher.sources.worker_api.wire import STATUS_OF_PHASE
from jobfetcher.testing.fake_source import FakeSource
from tests.support.jobs import Emitted, make_job
from tests.support.mock_server import MockServer, job_spec, running_mock_api

OFFER = Offer(4.0, 4096)
FINISHED = Outcome(Ending.FINISHED, None, "")
FAILED = Outcome(Ending.JOB_FAILED, JobReason.EXIT_CODE, "exit code 3 <b>")
PHASES = (Phase.CLAIMED, Phase.STAGING_IN, Phase.RUNNING, Phase.STAGING_OUT)
PATH = ["preprocessing", "running", "postprocessing"]


class World(Protocol):
    """A source with jobs in it, and what their users see."""

    @property
    def source(self) -> JobSource: ...

    def submit(self) -> JobId:
        """Queue a job with one input, `ref`, that exists."""
        ...

    @property
    def ref(self) -> str: ...

    def heard(self, job_id: JobId) -> list[str]:
        """What was accepted, in the server's words, repeats left out."""
        ...

    def cancel(self, job_id: JobId) -> None:
        """The job's user takes it back."""
        ...

    def break_once(self, job_id: JobId) -> None:
        """The next update is not delivered."""
        ...

    def wait(self, seconds: float) -> None:
        """Let time pass for the source."""
        ...


class FakeWorld:
    ref = "s3://bucket/known"

    def __init__(self) -> None:
        self.source = FakeSource()
        self.source.known_refs = {self.ref}
        self._ids = itertools.count(1)

    def submit(self) -> JobId:
        job = make_job(str(next(self._ids)), inputs={"in": self.ref})
        self.source.put(job)
        return job.id

    def heard(self, job_id: JobId) -> list[str]:
        phases = {phase.value: word for phase, word in STATUS_OF_PHASE.items()}
        words = [phases.get(word, "queued" if word == "released" else word) for word in self.source.said[job_id].words]
        return [word for word, _ in itertools.groupby(words)]

    def cancel(self, job_id: JobId) -> None:
        self.source.said[job_id].answers.append(Standing.CANCEL)

    def break_once(self, job_id: JobId) -> None:
        self.source.said[job_id].answers.append(SourceUnavailable("down"))

    def wait(self, seconds: float) -> None:
        """It has no clock."""


class ApiWorld:
    def __init__(self, server: MockServer, client: Client) -> None:
        self.server = server
        self.now = 10_000.0
        policy = UrlPolicy(parse_origin(server.url))
        self.source = WorkerApi(client, policy, wanted=Filter(), emit=Emitted(), clock=lambda: self.now)
        self.ref = server.put_input("known", b"content")

    def submit(self) -> JobId:
        handler = {"image_url": "busybox", "files_down": {"in": self.ref}, "files_up": {}}
        return JobId(str(self.server.submit(job_spec(handler=handler))))

    def heard(self, job_id: JobId) -> list[str]:
        return self.server.updates(int(job_id))

    def cancel(self, job_id: JobId) -> None:
        self.server.delete(int(job_id))

    def break_once(self, job_id: JobId) -> None:
        self.server.set_faults({"method": "PUT", "path": f"/jobs/{job_id}/status", "drop": "before", "times": 1})

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(params=["fake", "worker_api"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param == "fake":
        yield FakeWorld()
        return
    with running_mock_api(tmp_path) as server:
        client = Client(server.url)
        client.auth = StaticToken("mock-token")
        made = ApiWorld(server, client)
        yield made
        made.source.close()
        assert server.violations() == []


def claim(world: World) -> Claim:
    claimed = world.source.fetch(OFFER, 0.0)
    assert claimed is not None
    return claimed


def test_without_a_job_there_is_none(world: World) -> None:
    assert world.source.fetch(OFFER, 0.0) is None


def test_jobs_come_in_their_order_whole_and_once(world: World) -> None:
    ids = [world.submit(), world.submit()]
    claims = [claim(world), claim(world)]
    assert [claimed.job.id for claimed in claims] == ids
    assert [claimed.lease.job_id for claimed in claims] == ids
    assert claims[0].job.command == ("true",)
    assert [(file.path, file.ref) for file in claims[0].job.inputs] == [("in", world.ref)]
    assert world.source.fetch(OFFER, 0.0) is None


def test_the_hold_is_long_enough_for_ten_beats(world: World) -> None:
    assert world.source.max_hold_s >= 300


@pytest.mark.parametrize(("outcome", "word"), [(FINISHED, "finished"), (FAILED, "error"), (Outcome(), "error")])
def test_a_job_goes_through_its_phases_to_one_end(world: World, outcome: Outcome, word: str) -> None:
    job_id = world.submit()
    lease = claim(world).lease
    for phase in PHASES:
        for _ in range(2):
            assert lease.beat(phase) is Standing.KEEP
    for _ in range(3):
        assert lease.settle(outcome) is Standing.KEEP
    assert world.heard(job_id) == [*PATH, word]


def test_a_job_given_back_is_given_back_once(world: World) -> None:
    job_id = world.submit()
    lease = claim(world).lease
    lease.beat(Phase.CLAIMED)
    for _ in range(2):
        assert lease.release("the worker is shutting down") is Standing.KEEP
    assert lease.settle(FINISHED) is Standing.KEEP  # nothing more is said
    assert world.heard(job_id) == ["preprocessing", "queued"]


@pytest.mark.fault("B7")
@pytest.mark.parametrize("how", ["beat", "settle", "release"])
def test_a_job_taken_back_is_never_spoken_of_again(world: World, how: str) -> None:
    job_id = world.submit()
    lease = claim(world).lease
    lease.beat(Phase.CLAIMED)
    world.cancel(job_id)
    if how == "beat":
        assert lease.beat(Phase.RUNNING) is Standing.CANCEL
    elif how == "settle":
        assert lease.settle(FINISHED) is Standing.CANCEL
    else:
        assert lease.release("x") is Standing.CANCEL
    assert [lease.beat(Phase.RUNNING), lease.settle(FINISHED), lease.release("x")] == [Standing.CANCEL] * 3
    assert world.heard(job_id) == ["preprocessing"]


def test_what_could_not_be_told_is_told_by_the_next_try(world: World) -> None:
    job_id = world.submit()
    lease = claim(world).lease
    world.break_once(job_id)
    with pytest.raises(SourceUnavailable):
        lease.beat(Phase.CLAIMED)
    assert lease.beat(Phase.CLAIMED) is Standing.KEEP
    assert world.heard(job_id) == ["preprocessing"]


@pytest.mark.fault("A7")
def test_a_lease_can_be_rebuilt_from_its_token(world: World) -> None:
    job_id = world.submit()
    first = claim(world).lease
    for phase in PHASES:
        first.beat(phase)
    again = world.source.resume(first.token, job_id)
    assert (again.job_id, again.token) == (job_id, first.token)
    assert again.settle(FINISHED) is Standing.KEEP
    third = world.source.resume(first.token, job_id)
    assert third.settle(FINISHED) is Standing.KEEP
    assert world.heard(job_id) == [*PATH, "finished"]


def patiently(world: World, tell: Callable[[], Standing]) -> Standing:
    """What `tell` returns, once the source does not ask to wait any more."""
    while True:
        try:
            return tell()
        except SourceUnavailable as error:
            if not error.retry_after_s:
                raise
            world.wait(error.retry_after_s)


@pytest.mark.fault("A2")
@pytest.mark.parametrize("cut_off", PHASES)
def test_a_job_goes_on_where_a_process_died(world: World, cut_off: Phase) -> None:
    job_id = world.submit()
    first = claim(world).lease
    done = PHASES.index(cut_off) + 1
    for phase in PHASES[:done]:
        first.beat(phase)
    again = world.source.resume(first.token, job_id, cut_off=cut_off)
    for phase in PHASES[done - 1 :]:
        assert again.beat(phase) is Standing.KEEP
    assert patiently(world, lambda: again.settle(FINISHED)) is Standing.KEEP
    assert world.heard(job_id) == [*PATH, "finished"]


@pytest.mark.fault("A7")
@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("end", ["settle", "release"])
def test_an_end_cut_off_is_told_unless_it_was_heard(world: World, end: str, heard: bool) -> None:
    job_id = world.submit()
    first = claim(world).lease
    for phase in PHASES:
        first.beat(phase)
    if heard:
        assert (first.settle(FAILED) if end == "settle" else first.release("x")) is Standing.KEEP
    again = world.source.resume(first.token, job_id, cut_off=Phase.SETTLING)
    told = patiently(world, lambda: again.settle(FAILED) if end == "settle" else again.release("x"))
    assert told is Standing.KEEP
    assert world.heard(job_id) == [*PATH, "error" if end == "settle" else "queued"]


@pytest.mark.parametrize("how", ["beat", "settle", "release"])
def test_a_job_that_ended_while_no_process_was_there_is_lost(world: World, how: str) -> None:
    job_id = world.submit()
    first = claim(world).lease
    first.beat(Phase.RUNNING)
    first.settle(FAILED)
    again = world.source.resume(first.token, job_id, cut_off=Phase.RUNNING)
    tell = {
        "beat": lambda: again.beat(Phase.RUNNING),
        "settle": lambda: again.settle(FINISHED),
        "release": lambda: again.release("x"),
    }
    for word in (how, *tell):
        assert patiently(world, tell[word]) is Standing.LOST
    with pytest.raises(Stopped):
        again.sign_output(OutputKind.OUTPUT, "out", "result.csv")
    assert world.heard(job_id) == ["running", "error"]


def test_a_job_taken_back_while_no_process_was_there_is_cancelled(world: World) -> None:
    job_id = world.submit()
    first = claim(world).lease
    first.beat(Phase.RUNNING)
    world.cancel(job_id)
    again = world.source.resume(first.token, job_id, cut_off=Phase.RUNNING)
    for _ in range(2):
        assert again.beat(Phase.RUNNING) is Standing.CANCEL
    with pytest.raises(Stopped):
        again.sign_output(OutputKind.OUTPUT, "out", "result.csv")
    assert world.heard(job_id) == ["running"]


def test_a_job_that_is_run_again_does_not_go_backwards(world: World) -> None:
    job_id = world.submit()
    lease = claim(world).lease
    for phase in (Phase.STAGING_IN, Phase.RUNNING, Phase.STAGING_IN):
        lease.beat(phase)
    again = world.source.resume(lease.token, job_id, cut_off=Phase.STAGING_IN)
    for phase in (Phase.STAGING_IN, Phase.RUNNING, Phase.STAGING_OUT):
        assert again.beat(phase) is Standing.KEEP
    assert world.heard(job_id) == PATH


def test_an_input_is_signed_and_an_unknown_one_is_the_jobs_fault(world: World) -> None:
    world.submit()
    lease = claim(world).lease
    request = lease.sign_input(parse_file_ref(world.ref))
    assert request.method is Method.GET
    assert request.url.startswith("http://")
    with pytest.raises(JobFault) as fault:
        lease.sign_input(parse_file_ref("s3://nowhere/at/all"))
    assert fault.value.reason is JobReason.INPUT_MISSING


@pytest.mark.parametrize("kind", list(OutputKind))
@pytest.mark.parametrize("folder", ["", "out", "out/deep ä"])
def test_an_output_is_signed_whatever_its_kind_and_folder(world: World, kind: OutputKind, folder: str) -> None:
    world.submit()
    lease = claim(world).lease
    for renew in (False, True):
        request = lease.sign_output(kind, folder, "result.csv", renew=renew)
        assert request.method in {Method.PUT, Method.POST}
