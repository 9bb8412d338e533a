"""The API is away for a minute, an hour, a day, in each phase of a job; or the worker is, frozen or asleep.

The worker is the command on the real engine, its API behind a proxy that refuses, its clock sped up while it has
nothing to do but wait. The server's clock goes along, so leases, links and forms run out as they would.
"""

import signal

import psutil
import pytest

from tests.support.fault_proxy import Fault
from tests.support.services import wait_until
from tests.support.wired import BRISK, LATE_S, RETRY_S, WRITES, WRITTEN, AnotherWorker, Wired
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Command

pytestmark = pytest.mark.docker

#: A day and some minutes, since a day is also the default of STOP_AFTER_SILENCE.
MINUTE, HOUR, DAY = 60.0, 3600.0, 87_000.0

#: How fast time passes for the worker where the time that it takes is measured.
SLOW = 10.0

#: FAULTS.md B3: so much may a worker's memory and log grow in a whole day without a server.
RSS_BYTES, LOG_LINES = 10 * 1024**2, 200

#: FAULTS.md A12: from the server's word that the job is another's to the container gone, in seconds.
GONE_WITHIN_S = 10.0

#: How long the worker was frozen or asleep, in seconds: longer than its lease.
AWAY_S = 400.0


class Phase:
    """One phase of a job: `begin` before the worker starts, `reach` leaves the job there and the API gone.

    `changes` is what the worker is started with. Here: nothing holds the job up.
    """

    def __init__(self, wire: Wired, outage_s: float) -> None:
        self.wire = wire
        self.job = 0
        self.changes: dict[str, str] = {}
        self.outage_s = outage_s

    def begin(self) -> None:
        self.job = self.wire.submit(WRITES)

    def reach(self) -> None:
        wait_until(lambda: not self.wire.api.is_listening, "the API is gone", DEADLINE_S)

    def let_go(self) -> None:
        """The API is back."""


class Polling(Phase):
    """P0."""

    def begin(self) -> None:
        pass

    def reach(self) -> None:
        wait_until(lambda: bool(self.wire.server.events("poll")), "the worker asks for a job", DEADLINE_S)
        self.wire.api.refuse()
        self.job = self.wire.submit(WRITES)


class Claimed(Phase):
    """P1: the API goes with its answer. The job runs to its end meanwhile, and nobody has heard of it so far."""

    def begin(self) -> None:
        super().begin()
        self.wire.api.on_answer(b'"handler"', self.wire.api.refuse)


class Downloading(Phase):
    """P2: the first input is here; the link to the second cannot be had."""

    def begin(self) -> None:
        inputs = {f"in/{name}": self.wire.server.put_input(name, b"result\n") for name in ("first", "second")}
        self.job = self.wire.submit("cat /files/in/second > /files/out/result", files_down=inputs)
        self.wire.server.set_faults({"method": "GET", "path": "second/url$", "status": 503})

    def reach(self) -> None:
        inputs = self.wire.lab.files(self.job) / "in"
        wait_until((inputs / "first").exists, "the first input is here", DEADLINE_S)
        self.wire.api.refuse()
        self.wire.server.set_faults()
        assert not (inputs / "second").exists()


class Preparing(Phase):
    """P3: the image takes as long as the outage."""

    failpoint = "after:prepare"

    def begin(self) -> None:
        super().begin()
        self.changes = {"JOBFETCHER_FAILPOINT": f"{self.failpoint}=sleep{self.outage_s:.0f}"}

    def reach(self) -> None:
        self.wire.server.wait_for_state(self.job, "preprocessing")
        wait_until(lambda: self.wire.clock.sleeping > 0, f"the worker is {self.failpoint}", DEADLINE_S)
        self.wire.api.refuse()


class Starting(Preparing):
    """P4."""

    failpoint = "before:start"


class Running(Phase):
    """P5."""

    def begin(self) -> None:
        self.job = self.wire.submit(WRITES, ";", UNTIL_LET_GO)
        self.changes = {"stop_after_silence": "0"}

    def reach(self) -> None:
        self.wire.server.wait_for_state(self.job, "running")
        self.wire.api.refuse()

    def let_go(self) -> None:
        heard_after_s = self.wire.wait_for_word(self.job, SLOW)
        assert heard_after_s <= RETRY_S + SLOW * LATE_S
        self.wire.lab.let_go(self.job)


class Uploading(Phase):
    """P6: no form to upload with can be had."""

    def begin(self) -> None:
        super().begin()
        self.wire.api.on_request(b"/files/url?", self.wire.api.refuse)


class Settling(Phase):
    """P7: everything is stored, and the end cannot be told."""

    def begin(self) -> None:
        super().begin()
        self.wire.api.on_request(b"status=finished", self.wire.api.refuse)


PHASES = (Polling, Claimed, Downloading, Preparing, Starting, Running, Uploading, Settling)


@pytest.mark.fault("N5")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "outage_s",
    [
        pytest.param(MINUTE, id="minute", marks=pytest.mark.fault("B1")),
        pytest.param(HOUR, id="hour", marks=pytest.mark.fault("B2")),
        pytest.param(DAY, id="day", marks=pytest.mark.fault("B3")),
    ],
)
def test_an_outage_costs_nothing_but_time(wire: Wired, phase: type[Phase], outage_s: float) -> None:
    at = phase(wire, outage_s)
    at.begin()
    with wire.running(**at.changes) as worker:
        at.reach()
        rss, lines = psutil.Process(worker.pid).memory_info().rss, len(worker.errors.splitlines())
        containers = [container["Id"] for container in wire.lab.containers()]
        wire.outage(outage_s)
        assert psutil.Process(worker.pid).memory_info().rss - rss <= RSS_BYTES
        assert len(worker.errors.splitlines()) - lines <= LOG_LINES
        assert len(wire.server.events("requeue")) == (outage_s > MINUTE and phase is not Polling)
        if phase is Running:
            assert [container["Id"] for container in wire.lab.containers()] == containers
        wire.api.listen()
        at.let_go()
        assert wire.ends(at.job) == "finished"
    assert wire.results(at.job) == WRITTEN


@pytest.mark.fault("B2", "B18")
@pytest.mark.parametrize("phase", [Downloading, Running, Uploading, Settling])
def test_after_an_outage_another_account_has_the_job(wire: Wired, phase: type[Phase]) -> None:
    """It is stopped and deleted here, and nothing of it is stored any more."""
    at = phase(wire, HOUR)
    at.begin()
    with wire.running(**at.changes) as worker:
        at.reach()
        stored = wire.server.events("stored", at.job)
        wire.outage(HOUR)
        another = AnotherWorker(wire.server)
        assert another.take() == at.job
        since = len(wire.server.events())
        wire.api.listen()
        _is_dropped(wire, at.job, worker, since)
        assert wire.server.events("stored", at.job) == stored
        another.finish(at.job)


@pytest.mark.fault("B3")
def test_a_running_job_is_stopped_after_a_day_of_silence(wire: Wired) -> None:
    """By default. It goes back to the queue, where the server had put it long before."""
    at = Running(wire, DAY)
    at.begin()
    with wire.running() as worker:
        at.reach()
        wire.outage(DAY)
        wait_until(lambda: wire.lab.containers() == [], "its container is stopped and removed", DEADLINE_S)
        wire.api.listen()
        assert wire.ends(at.job, "queued") == "queued"
    assert "STOP_AFTER_SILENCE" in worker.errors
    another = AnotherWorker(wire.server)
    assert another.take() == at.job
    another.finish(at.job)


@pytest.mark.fault("A12", "J4")
@pytest.mark.parametrize("how", ["frozen", "asleep"])
@pytest.mark.parametrize("taken", [False, True], ids=["ours", "taken"])
def test_away_for_longer_than_the_lease(wire: Wired, how: str, taken: bool) -> None:
    """The worker is stopped (SIGSTOP), or its machine is suspended. Then the server is asked before it is told."""
    job = wire.submit(WRITES, ";", UNTIL_LET_GO)
    with wire.running() as worker:
        wire.server.wait_for_state(job, "running")
        if how == "frozen":
            worker.send(signal.SIGSTOP)
            wire.clock.skip(AWAY_S)
        else:
            wire.clock.suspend(AWAY_S)
        wire.server.advance(AWAY_S)
        wire.server.sweep()
        assert wire.server.state(job) == "queued"
        another = AnotherWorker(wire.server)
        if taken:
            assert another.take() == job
        before = len(wire.server.events())
        if how == "frozen":
            worker.send(signal.SIGCONT)
        if taken:
            _is_dropped(wire, job, worker, before)
            assert wire.server.events("stored", job) == []
            another.finish(job)
        else:
            wire.wait_for_word(job)
            assert wire.server.state(job) == "running"
            wire.lab.let_go(job)
            assert wire.ends(job) == "finished"
            assert wire.results(job) == WRITTEN
    spoken = [event["kind"] for event in wire.server.events()[before:] if event["job_id"] == job]
    assert spoken[0] == "status"


@pytest.mark.fault("B5")
@pytest.mark.parametrize("wire", [{"token_life_s": 60}], indirect=True)
def test_the_sign_in_service_is_away_while_tokens_run_out(wire: Wired) -> None:
    """For five minutes. No token is good meanwhile; the job goes on, the service is not hammered, nothing is lost."""
    job = wire.submit(WRITES, ";", UNTIL_LET_GO)
    with wire.running(username="worker", password="worker-password") as worker:
        wire.server.wait_for_state(job, "running")
        containers = [container["Id"] for container in wire.lab.containers()]
        wire.sign_in.always(Fault(reset=True))
        asked = len(wire.sign_in.connections)
        wire.pass_time(300, 2 * BRISK)
        assert [container["Id"] for container in wire.lab.containers()] == containers
        assert 3 <= len(wire.sign_in.connections) - asked <= 15  # one try in thirty seconds, while a token is needed
        refused = len(wire.server.events("refused"))
        assert 3 <= refused <= 40  # the keep-alives go on trying with the old token
        wire.sign_in.always()
        wire.wait_for_word(job)
        wire.lab.let_go(job)
        assert wire.ends(job) == "finished"
    assert wire.results(job) == WRITTEN
    assert len(worker.errors.splitlines()) <= 20


def _is_dropped(wire: Wired, job: int, worker: Command, since: int) -> None:
    """Wait until the server has told the worker that the job is not its own, and see everything of it gone in time.

    `since`: how many events there were when it could not be told yet.
    """

    def was_told() -> bool:
        return any(event["kind"] in {"status", "update"} for event in wire.server.events()[since:])

    with wire.at(BRISK):
        wait_until(was_told, "the server is asked", DEADLINE_S)
    wait_until(lambda: not wire.has_traces(job), f"nothing of job {job} is left", GONE_WITHIN_S)
    worker.wait_for("taken back by the server")
