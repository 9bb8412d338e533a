"""What an engine does to a job and to the worker that waits for it, on engines that are really stopped, killed, frozen.

The rows of the truth table of `jobfetcher.engine.vouch` are tried one by one: never may an exit be called genuine that
an engine's restart caused, and seldom may one that it did not cause be called anything else.
"""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import docker
import pytest

from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.run import Exit
from jobfetcher.engine.box import box
from jobfetcher.engine.docker import DockerContainer, DockerEngine
from tests.support.boxes import LOCAL, LONG_S, DockerBench, docker_bench, no_progress, short_pause
from tests.support.engine_proxy import EngineProxy, engine_proxy
from tests.support.private_engine import PrivateEngine, private_engine
from tests.support.services import wait_until

pytestmark = [pytest.mark.docker, pytest.mark.slow]

TERMINATED, KILLED = 128 + signal.SIGTERM, 128 + signal.SIGKILL

#: Jobs. What traps TERM says so once it does; it is ended by TERM only, and then looks like a success.
TRAPS = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done"
TRAPS_SLOWLY = "trap 'sleep 2; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
OBEYS = "echo ready; sleep 600"
ENDS_WHEN_TOLD = "echo ready; until [ -e /files/{job} ]; do sleep 0.05; done; exit {code}"

IMPATIENT: dict[str, Any] = {"look_up_s": 0.5, "work_s": 1.0}


class Attended:
    """A worker that is there and waits for a container's end, as a runner does: in short calls."""

    def __init__(self, container: DockerContainer) -> None:
        self._end: Exit | None = None
        self._error: Exception | None = None
        self._container = container
        self._give_up = time.monotonic() + LONG_S
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def end(self) -> Exit:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._end is not None, f"no end within {LONG_S:g} s"
        return self._end

    def _wait(self) -> None:
        try:
            while self._end is None and time.monotonic() < self._give_up:
                self._end = self._container.wait(1.0)
        except Exception as error:
            self._error = error


class Bed:
    """One engine, a worker on it that starts jobs, and others that come later: after a restart of the worker."""

    def __init__(self, bench: DockerBench, url: str) -> None:
        self.bench = bench
        self._url = url

    def start(self, job: str, script: str, code: int = 0) -> DockerContainer:
        """Start a job, and return when its program runs."""
        spec = self.bench.spec(script.replace("{job}", job).replace("{code}", str(code)), job_id=job)
        container = self.bench.engine.start(spec)
        wait_until(lambda: container.last_lines(1) == "ready", f"job {job} runs", LONG_S)
        return container

    def tell_to_end(self, *jobs: str) -> None:
        for job in jobs:
            (self.bench.files / job).touch()

    def come_back(self, job: str) -> Exit:
        """How a worker that knew nothing of it until now finds that the job ended."""
        engine = DockerEngine(self.bench.instance, url=self._url, images=LOCAL, sleep=short_pause)
        try:
            found = engine.find(JobId(job))
            assert found is not None
            end = found.wait(LONG_S)
            assert end is not None
            return end
        finally:
            engine.close()

    def state(self, container: DockerContainer) -> dict[str, Any]:
        found = self.bench.engine.api.inspect(container.id)
        assert found is not None
        return dict(found["State"])

    def wait_until_ended(self, container: DockerContainer) -> None:
        """Until its engine says so."""
        wait_until(lambda: not self.state(container)["Running"], "it has ended", LONG_S)

    def wait_until_dead(self, pid: int) -> None:
        """Until the job's program has ended, whatever its engine knows of it."""
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"process {pid} has ended", LONG_S)

    def flood(self) -> None:
        """Make the engine forget what was before: its memory holds 256 events."""
        repository = f"jobfetcher-test/flood-{uuid4().hex[:8]}"
        with closing(docker.APIClient(self._url)) as client:
            for _ in range(130):
                client.tag(self.bench.image.id, repository, "1")
                client.remove_image(f"{repository}:1")


@contextmanager
def bed(
    engine: docker.APIClient,
    busybox: str,
    files: Path,
    *,
    live_restore: bool = False,
    bridge: bool = False,
    **options: Any,
) -> Iterator[tuple[PrivateEngine, Bed]]:
    with private_engine(live_restore=live_restore, bridge=bridge) as private:
        private.copy_image(engine, busybox)
        with docker_bench(busybox, files, url=private.url, **{"sleep": short_pause, **options}) as bench:
            yield private, Bed(bench, private.url)


@pytest.fixture
def make_bed(engine: docker.APIClient, busybox: str, tmp_path: Path) -> Callable[..., Any]:
    """`bed` for this test; its keywords."""
    return lambda **options: bed(engine, busybox, tmp_path / "files", **options)


@pytest.fixture
def here(busybox: str, tmp_path: Path) -> Iterator[Bed]:
    """The engine of this machine, which nobody stops."""
    with docker_bench(busybox, tmp_path / "files", sleep=short_pause) as bench:
        yield Bed(bench, bench.engine.api.url)


@pytest.fixture
def proxy() -> Iterator[EngineProxy]:
    with engine_proxy() as running:
        yield running


def seen(end: Exit) -> tuple[int, bool]:
    return end.code, end.genuine


# -- an engine that is stopped, killed, restarted (E1) -----------------------------------------------------------------


@pytest.mark.fault("E1", "J6")
@pytest.mark.parametrize("bridge", [True, False])
def test_an_engine_that_is_stopped_in_order_makes_no_success(make_bed: Callable[..., Any], bridge: bool) -> None:
    """It serves old connections while it ends containers, and the job that traps TERM exits 0."""
    with make_bed(bridge=bridge) as (private, bed):
        traps, obeys = bed.start("1", TRAPS), bed.start("2", OBEYS)
        bed.start("3", TRAPS_SLOWLY)  # so that the engine is there for a while after it has ended the others
        attended = [Attended(traps), Attended(obeys)]
        private.stop()
        private.start()
        assert [seen(one.end()) for one in attended] == [(0, False), (TERMINATED, False)]
        assert [seen(bed.come_back(job)) for job in "123"] == [(0, False), (TERMINATED, False), (0, False)]


@pytest.mark.fault("E1", "J6")
@pytest.mark.parametrize("bridge", [True, False])
def test_an_engine_that_was_killed_ends_jobs_at_its_next_start_and_that_is_no_success(
    make_bed: Callable[..., Any], bridge: bool
) -> None:
    with make_bed(bridge=bridge) as (private, bed):
        traps, obeys = bed.start("1", TRAPS), bed.start("2", OBEYS)
        meanwhile = bed.start("3", ENDS_WHEN_TOLD)
        attended = [Attended(one) for one in (traps, obeys, meanwhile)]
        pid = bed.state(meanwhile)["Pid"]
        private.kill()
        bed.tell_to_end("3")
        bed.wait_until_dead(pid)
        private.start()
        ends = [(0, False), (TERMINATED, False), (0, False)]
        assert [seen(one.end()) for one in attended] == ends
        bed.start("4", OBEYS)  # a create after the end proves nothing
        assert [seen(bed.come_back(job)) for job in "123"] == ends


@pytest.mark.fault("E2", "E1")
def test_with_live_restore_jobs_outlive_the_engine_and_their_ends_count(make_bed: Callable[..., Any]) -> None:
    with make_bed(live_restore=True, bridge=True) as (private, bed):
        first, second, third = (bed.start(str(job), ENDS_WHEN_TOLD, code=job) for job in (1, 2, 3))
        attended = {job: Attended(container) for job, container in (("1", first), ("3", third))}
        started, pid = bed.state(first)["StartedAt"], bed.state(third)["Pid"]
        private.stop()
        bed.tell_to_end("3")
        bed.wait_until_dead(pid)
        private.start()
        assert seen(attended["3"].end()) == (3, False), "nobody was there to see it end"
        bed.tell_to_end("1", "2")
        end = attended["1"].end()
        assert (seen(end), end.started_at) == ((1, True), started)
        bed.wait_until_ended(second)
        assert seen(bed.come_back("2")) == (2, False), "no create before it: it could be the engine's start"

        fourth = bed.start("4", ENDS_WHEN_TOLD)
        private.kill()
        private.start()
        bed.start("5", OBEYS)
        bed.tell_to_end("4")
        bed.wait_until_ended(fourth)
        assert seen(bed.come_back("4")) == (0, True), "the create before it says that the engine's API was open"


@pytest.mark.fault("E1")
def test_live_restore_that_is_turned_on_and_off_makes_no_success_either(make_bed: Callable[..., Any]) -> None:
    with make_bed(bridge=True) as (private, bed):
        container = bed.start("1", TRAPS)
        attended = Attended(container)
        private.kill()
        private.live_restore = True
        private.start()
        assert bed.state(container)["Running"]
        private.kill()
        private.live_restore = False
        private.start()
        assert seen(attended.end()) == (0, False)
        assert seen(bed.come_back("1")) == (0, False)


@pytest.mark.fault("E3", "E1")
def test_a_frozen_engine_that_thaws_has_seen_the_end_and_one_that_is_killed_has_not(
    make_bed: Callable[..., Any],
) -> None:
    with make_bed(**IMPATIENT) as (private, bed):
        for job, thaws in (("1", True), ("2", False)):
            container = bed.start(job, ENDS_WHEN_TOLD)
            pid = bed.state(container)["Pid"]
            attended = Attended(container)
            private.freeze()
            bed.tell_to_end(job)
            bed.wait_until_dead(pid)
            if thaws:
                private.thaw()
            else:
                private.kill()
                private.start()
            assert attended.end().genuine is thaws
            assert bed.come_back(job).genuine is thaws


# -- a worker that was away (A4, A5) -----------------------------------------------------------------------------------


@pytest.mark.fault("A4")
def test_a_worker_that_comes_back_goes_on_waiting_for_the_same_run(here: Bed) -> None:
    container = here.start("1", ENDS_WHEN_TOLD, code=7)
    started = here.state(container)["StartedAt"]
    later = DockerEngine(here.bench.instance, images=LOCAL)
    found = later.find(JobId("1"))
    assert found is not None
    assert found.wait(0.2) is None
    here.tell_to_end("1")
    end = Attended(found).end()
    assert (seen(end), end.started_at, found.id) == ((7, True), started, container.id)
    later.close()


@pytest.mark.fault("A5")
def test_an_end_while_no_worker_was_there_counts(here: Bed) -> None:
    here.tell_to_end("1")
    container = here.start("1", ENDS_WHEN_TOLD)
    here.wait_until_ended(container)
    assert seen(here.come_back("1")) == (0, True)


@pytest.mark.fault("A5")
@pytest.mark.parametrize("bridge", [True, False])
def test_an_end_that_the_engine_has_forgotten_counts_where_the_engine_is_older(
    make_bed: Callable[..., Any], bridge: bool
) -> None:
    with make_bed(bridge=bridge) as (_, bed):
        bed.tell_to_end("1", "2")
        containers = [bed.start("1", ENDS_WHEN_TOLD), bed.start("2", ENDS_WHEN_TOLD, code=5)]
        for container in containers:
            bed.wait_until_ended(container)
        bed.flood()
        # Without the network `bridge` nothing says how old the engine is: better run again than trust.
        assert [seen(bed.come_back(job)) for job in "12"] == [(0, bridge), (5, bridge)]


@pytest.mark.fault("E1")
def test_an_end_that_was_waited_for_counts_however_much_the_engine_forgot_before(
    make_bed: Callable[..., Any],
) -> None:
    with make_bed(bridge=False) as (_, bed):
        container = bed.start("1", ENDS_WHEN_TOLD)
        assert container.wait(0.1) is None
        bed.flood()
        bed.tell_to_end("1")
        end = container.wait(LONG_S)
        assert end is not None
        assert seen(end) == (0, True)


@pytest.mark.fault("A3")
def test_a_container_that_was_only_created_is_started_once(here: Bed, engine: docker.APIClient) -> None:
    spec = here.bench.spec("echo once >> /files/out")
    created = here.bench.engine.api.create(box(spec, "none"), spec.name)
    found = here.bench.engine.find(JobId("1"))
    assert found is not None
    never = found.wait(1)
    assert never is not None
    assert not never.genuine, "it never ran, and the engine says exit code 0"
    containers = [here.bench.engine.start(spec) for _ in range(2)]
    assert {container.id for container in containers} == {created}
    end = Attended(containers[0]).end()
    again = here.bench.engine.start(spec)
    assert seen(end) == (0, True)
    assert here.state(again)["StartedAt"] == end.started_at
    assert (here.bench.files / "out").read_text() == "once\n"
    filters = {"container": created, "event": "start"}
    assert len(list(engine.events(since=0, until=int(time.time() + 1), filters=filters, decode=True))) == 1


# -- an engine that forgets what it started (A3) ----------------------------------------------------------------------


def forget_start(private: PrivateEngine, container: DockerContainer) -> None:
    """Kill the engine, and take from its disk what it noted of the start: as if it had been killed just before that."""
    private.kill()
    [record] = private.directory.rglob(f"{container.id}/config.v2.json")
    noted = json.loads(record.read_text())
    noted["State"].update(Running=False, Pid=0, StartedAt="0001-01-01T00:00:00Z")
    record.write_text(json.dumps(noted))
    private.start()


@pytest.mark.fault("A3", "N2")
def test_a_start_that_the_engine_forgot_is_no_end_and_its_program_is_ended_with_the_container(
    make_bed: Callable[..., Any],
) -> None:
    with make_bed() as (private, bed):
        container = bed.start("1", ENDS_WHEN_TOLD)
        pid = bed.state(container)["Pid"]
        forget_start(private, container)
        assert bed.state(container)["Status"] == "created", "the engine calls it new"
        assert Path(f"/proc/{pid}").exists(), "and it runs"
        assert not bed.come_back("1").genuine
        found = bed.bench.engine.find(JobId("1"))
        assert found is not None
        found.remove()
        bed.wait_until_dead(pid)
        assert bed.bench.engine.find(JobId("1")) is None


@pytest.mark.fault("A3", "E1")
def test_an_engine_that_is_lost_while_it_starts_a_job_does_not_start_it_twice(make_bed: Callable[..., Any]) -> None:
    """It is killed while it answers, and forgets that it started the container."""
    with make_bed() as (private, bed), engine_proxy(private.url) as cut:
        asked: list[str] = []

        def lose_engine(_pause: float) -> None:
            if len(asked) == 1:
                asked.append("again")
                started = bed.bench.engine.find(JobId("1"))
                assert started is not None
                wait_until(lambda: started.last_lines(1) == "began", "the program runs", LONG_S)
                forget_start(private, started)

        worker = DockerEngine(bed.bench.instance, url=cut.url, images=LOCAL, sleep=lose_engine)
        worker.describe()

        def before_start(container_id: str) -> None:
            asked.append(container_id)
            cut.lose(f"POST /v{worker.api.version.api}/containers/{container_id}/start")

        with pytest.raises(WorkerFault, match="lost while it started the job") as lost:
            worker.start(bed.bench.spec("echo began >> /files/out; echo began; sleep 600"), before_start)
        worker.close()
        assert lost.value.reason is WorkerReason.INTERRUPTED
        assert len(asked) == 2
        assert (bed.bench.files / "out").read_text() == "began\n"
        assert bed.bench.engine.find(JobId("1")) is None


@pytest.mark.fault("A3")
def test_a_container_that_is_removed_before_its_start_interrupts_the_run(here: Bed, engine: docker.APIClient) -> None:
    """`docker container prune` takes the new ones as well."""
    spec = here.bench.spec("true")
    with pytest.raises(WorkerFault, match="removed before it was started") as fault:
        here.bench.engine.start(spec, lambda container: engine.remove_container(container))
    assert fault.value.reason is WorkerReason.INTERRUPTED


# -- an engine that does not answer (E2, E3) ---------------------------------------------------------------------------


@pytest.mark.fault("E2", "E3")
def test_a_frozen_engine_blocks_no_thread_for_longer_than_its_deadline(
    make_bed: Callable[..., Any], tmp_path: Path
) -> None:
    with make_bed(**IMPATIENT, sleep=lambda _: None) as (private, bed):
        container = bed.start("1", OBEYS)
        new = DockerEngine("new", url=private.url, **IMPATIENT)  # has never asked this engine for its version
        engine, image, files = bed.bench.engine, bed.bench.image, bed.bench.files
        calls: dict[str, Callable[[], object]] = {
            "check": engine.check,
            "describe": engine.describe,
            "prepare": lambda: engine.prepare(image.reference, Halt(), no_progress),
            "start": lambda: engine.start(bed.bench.spec("true", job_id="2")),
            "find": lambda: engine.find(JobId("1")),
            "reap": lambda: engine.reap(frozenset()),
            "own": lambda: engine.own(str(files)),
            "forget_image": lambda: engine.forget_image(image.id, image.reference),
            "is_paused": container.is_paused,
            "written": container.written,
            "stop": lambda: container.stop(1),
            "last_lines": lambda: container.last_lines(1),
            "save_logs": lambda: container.save_logs(tmp_path / "log"),
            "remove": container.remove,
            **{f"new {number}": lambda: new.find(JobId("1")) for number in range(4)},
        }
        took: dict[str, float] = {}
        faults: dict[str, WorkerFault] = {}

        def call(name: str) -> None:
            began = time.monotonic()
            try:
                calls[name]()
            except WorkerFault as fault:
                faults[name] = fault
            took[name] = time.monotonic() - began

        private.freeze()
        began = time.monotonic()
        assert container.wait(0.1) is None
        assert time.monotonic() - began < 10, "one look-up"
        threads = [threading.Thread(target=call, args=(name,)) for name in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        private.thaw()
        assert set(faults) == set(calls)
        assert {fault.reason for fault in faults.values()} == {WorkerReason.ENGINE}
        # create is tried four times of 1 s; stop has 1 s of grace, 1 s of work and then a look-up
        assert {name for name, seconds in took.items() if seconds > 10} == set(), took
        new.close()


class Turned:
    """A clock that pauses turn ahead: they take no time here."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return time.monotonic() + self._ahead

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self._ahead += seconds


@pytest.mark.fault("E3", "E1")
def test_a_job_waits_half_an_hour_for_its_engine_and_not_longer(here: Bed, proxy: EngineProxy) -> None:
    turned = Turned()
    through = DockerEngine(here.bench.instance, url=proxy.url, images=LOCAL, clock=turned, sleep=turned.sleep)
    here.start("1", ENDS_WHEN_TOLD, code=4)
    container = through.find(JobId("1"))
    assert container is not None
    proxy.away()
    began = turned()
    while turned() - began < 1700:
        assert container.wait(2.0) is None
    proxy.back()
    turned.sleep(15)
    assert container.wait(0.5) is None  # it is there again: the half hour begins anew with the next absence
    proxy.away()
    turned.pauses.clear()
    began = turned()
    with pytest.raises(WorkerFault, match="no container engine answers") as away:
        container.wait(10_000)
    assert away.value.reason is WorkerReason.ENGINE
    assert 1800 <= turned() - began < 1800 + 20
    assert [round(pause, 1) for pause in turned.pauses[:6]] == [1, 2, 4, 8, 15, 15]
    proxy.back()
    here.tell_to_end("1")
    assert seen(Attended(container).end()) == (4, True), "the worker was cut off, not the engine"
    through.close()


# -- a container that cannot be ended (E5) -----------------------------------------------------------------------------


@pytest.mark.fault("E5")
def test_a_container_that_runs_on_after_kill_is_the_workers_fault(
    here: Bed, proxy: EngineProxy, engine: docker.APIClient
) -> None:
    """An engine that cannot kill a process (state D) does not answer; here its socket swallows the order."""
    through = DockerEngine(here.bench.instance, url=proxy.url, images=LOCAL, **IMPATIENT)
    here.start("1", OBEYS)
    container = through.find(JobId("1"))
    assert container is not None
    proxy.swallow(f"POST /v{engine.api_version}/containers/{container.id}/stop")
    began = time.monotonic()
    with pytest.raises(WorkerFault, match="was told to end and still runs") as stuck:
        container.stop(1)
    assert stuck.value.reason is WorkerReason.ENGINE
    assert time.monotonic() - began < 15
    assert container.wait(0.1) is None
    proxy.swallow(None)
    container.stop(1)
    end = container.wait(LONG_S)
    assert end is not None
    assert end.code == TERMINATED
    through.close()


# -- people (E11) ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("E11", "J6")
def test_a_job_that_a_person_stops_has_not_succeeded_and_one_that_we_stop_has_its_own_end(
    here: Bed, engine: docker.APIClient
) -> None:
    theirs, ours = here.start("1", TRAPS), here.start("2", TRAPS)
    attended = [Attended(theirs), Attended(ours)]
    engine.stop(theirs.id)
    ours.stop(10)
    assert [seen(one.end()) for one in attended] == [(0, False), (0, True)]


@pytest.mark.fault("E11")
def test_a_job_that_a_person_kills_ended_with_137(here: Bed, engine: docker.APIClient) -> None:
    container = here.start("1", TRAPS)
    attended = Attended(container)
    engine.kill(container.id)
    assert seen(attended.end()) == (KILLED, True)
    assert seen(here.come_back("1")) == (KILLED, True)


@pytest.mark.fault("E11")
@pytest.mark.parametrize(("script", "code"), [(TRAPS, 0), (OBEYS, TERMINATED)])
def test_a_job_that_a_person_restarts_is_interrupted(
    here: Bed, engine: docker.APIClient, script: str, code: int
) -> None:
    here.start("1", script)
    patient = DockerEngine(here.bench.instance, images=LOCAL)  # its pauses are real: the restart happens in one
    container = patient.find(JobId("1"))
    assert container is not None
    attended = Attended(container)
    assert container.wait(0.1) is None
    engine.restart(container.id)
    end = attended.end()
    assert not end.genuine
    assert end.code == code
    assert here.state(container)["Running"], "the second run; nobody waits for it"
    again = container.wait(0.2)
    assert again is not None
    assert not again.genuine
    patient.close()


@pytest.mark.fault("E11")
def test_a_job_that_a_person_removes_says_so(here: Bed, engine: docker.APIClient) -> None:
    container = here.start("1", OBEYS)
    attended = Attended(container)
    engine.remove_container(container.id, force=True)
    with pytest.raises(JobFault) as removed:
        attended.end()
    assert removed.value.reason is JobReason.REMOVED_OUTSIDE


@pytest.mark.fault("E11")
def test_a_job_that_a_person_pauses_goes_on_after_it(here: Bed, engine: docker.APIClient) -> None:
    container = here.start("1", ENDS_WHEN_TOLD)
    attended = Attended(container)
    engine.pause(container.id)
    here.tell_to_end("1")
    assert container.is_paused()
    engine.unpause(container.id)
    assert seen(attended.end()) == (0, True)


# -- whose containers (E10) --------------------------------------------------------------------------------------------


@pytest.mark.fault("E10")
def test_only_what_has_our_label_and_our_name_is_ever_removed(here: Bed, engine: docker.APIClient) -> None:
    instance = here.bench.instance
    ours = {"jobfetcher.instance": instance, "jobfetcher.job": "1"}
    strangers = {
        f"somebody-{instance}": ours,  # of an image with our label
        f"jobfetcher-{instance}x-1-1": ours,
        f"jobfetcher-{instance}-1-1": {"jobfetcher.instance": f"{instance}-x", "jobfetcher.job": "1"},
        f"jobfetcher-{instance}-2-1": {},
    }
    made = [
        engine.create_container(here.bench.image.id, ["true"], name=name, labels=labels)["Id"]
        for name, labels in strangers.items()
    ]
    try:
        assert here.bench.engine.find(JobId("1")) is None
        assert here.bench.engine.reap(frozenset()) == []
        assert {engine.inspect_container(container)["State"]["Status"] for container in made} == {"created"}
    finally:
        for container in made:
            engine.remove_container(container)


@pytest.mark.fault("E10")
def test_age_is_counted_from_the_creation(here: Bed) -> None:
    later = DockerEngine(here.bench.instance, images=LOCAL, now=lambda: time.time() + 301)
    container = here.start("1", OBEYS)
    assert here.bench.engine.reap(frozenset(), older_than_s=300) == []
    assert later.reap(frozenset({JobId("1")}), older_than_s=300) == []
    assert later.reap(frozenset(), older_than_s=300) == [f"jobfetcher-{here.bench.instance}-1-1"]
    with pytest.raises(JobFault):
        container.wait(1)
    later.close()


@pytest.mark.fault("E10", "E13")
def test_a_helper_at_work_is_no_leftover(here: Bed) -> None:
    reaped: list[str] = []
    busy = threading.Event()

    def reap() -> None:
        while not busy.is_set():
            reaped.extend(here.bench.engine.reap(frozenset()))

    reaper = threading.Thread(target=reap)
    reaper.start()
    try:
        here.bench.engine.own(str(here.bench.files))
    finally:
        busy.set()
        reaper.join()
    assert reaped == []
