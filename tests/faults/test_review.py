"""What an independent review of the fault paths found: a test for each, so that none of it comes back.

Small and direct: each looks at the one decision that was wrong, with fakes at the other seams.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from jobfetcher import recovery
from jobfetcher.core.errors import (
    ConfigError,
    JobReason,
    SourceUnavailable,
    StopReason,
    WorkerFault,
    WorkerReason,
)
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.machine import Inventory, Share
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Lease, Standing
from jobfetcher.core.run import Ending, Exit, Image, Outcome
from jobfetcher.housekeeping import Housekeeper
from jobfetcher.journal import Journal
from jobfetcher.resources.budget import Budget
from jobfetcher.sources.worker_api.source import WorkerApi
from jobfetcher.staging import Progress, stage_out
from jobfetcher.testing.fake_engine import FakeEngine, Script
from jobfetcher.testing.fake_source import FakeSource
from jobfetcher.testing.fake_transfer import FakeTransfer
from jobfetcher.watching import Limits, Watcher
from jobfetcher.worker import Leaving
from jobfetcher.workspace import Base, Workspace
from tests.faults.test_lease import OFFER, state
from tests.support.jobs import Emitted, FakeClock, make_job
from tests.support.mounts import fill, needs_root, tmpfs
from tests.support.scripted_api import ScriptedApi, reply
from tests.support.services import wait_until
from tests.support.trees import names_in
from tests.support.worker import UNTIL_LET_GO, Lab, command
from tests.unit import test_runner, test_watching, test_worker

SEVEN, EIGHT = JobId("7"), JobId("8")
SHARE = Share(1.0, 100)
IMAGE = Image("sha256:x", "busybox:latest", None, "amd64", size_bytes=1)
DISK_FULL = WorkerFault(WorkerReason.DISK, "the journal cannot be written: disk full")
DEADLINE_S = 10.0


@pytest.fixture
def one(tmp_path: Path) -> Iterator[test_runner.Bench]:
    """A runner and what it needs."""
    bench = test_runner.Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[test_worker.Bench]:
    """A worker that runs two jobs at once."""
    bench = test_worker.Bench(tmp_path, slots=2)
    yield bench
    bench.close()


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Base]:
    with Base(tmp_path / "base", reserve_mib=0) as made:
        yield made


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path / "journal.db")) as made:
        yield made


def claimed(journal: Journal, job_id: JobId, phase: Phase = Phase.STAGING_IN) -> None:
    """On record, as far as `phase`."""
    journal.claim(job_id, "t", make_job(job_id))
    journal.advance(job_id, Phase.STAGING_IN)
    if phase is Phase.RUNNING:
        journal.running(job_id, SHARE, IMAGE)


# -- results that cannot be put aside are not thrown away -------------------------------------------------------------


@pytest.mark.fault("D2")
@pytest.mark.fault("J9")
def test_results_that_find_no_room_in_quarantine_stay_until_they_do(
    one: test_runner.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    one.script = Script(acts=test_runner.writes("out/result"))
    one.transfer.failures["output:out/result"] = [WorkerFault(WorkerReason.STORAGE, "the store is away")]
    real, full = Base.quarantine, [True]

    def quarantine(base: Base, name: str, why: str) -> Path:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(base, name, why)

    monkeypatch.setattr(Base, "quarantine", quarantine)
    outcome = one.run()
    result = one.base.job(SEVEN).files / "out/result"
    assert result.read_bytes() == b"result"
    assert [(record.id, record.outcome) for record in one.journal.records()] == [("7", outcome)]
    assert one.words.count("released") == 1
    assert one.runner.outbox.waiting == ["7"]
    assert one.emit.named("job_ended") == []

    one.runner.outbox.flush(now=True)
    assert result.read_bytes() == b"result"  # still full

    full.clear()
    one.runner.outbox.flush(now=True)
    [kept] = [path for path in (one.base.path / "quarantine").iterdir() if path.is_dir()]
    assert (kept / "files/out/result").read_bytes() == b"result"
    assert one.words.count("released") == 1
    assert one.words[-1] == "released"
    assert one.emit.levels("results_kept") == ["error"]
    assert one.runner.outbox.waiting == []
    assert one.nothing_is_left()


@pytest.mark.fault("D2")
@pytest.mark.fault("D6")
@needs_root
@pytest.mark.parametrize("short_of", ["room", "inodes"])
def test_what_is_put_aside_on_a_full_disk_is_moved_even_if_the_reason_cannot_be_written(
    tmp_path: Path, short_of: str
) -> None:
    with tmpfs(tmp_path / "disk", "4m,nr_inodes=60") as disk, Base(disk, reserve_mib=0) as base:
        (base.path / "quarantine").mkdir(mode=0o700)
        base.job(SEVEN).create()
        (base.job(SEVEN).files / "result").write_bytes(b"result")
        if short_of == "room":
            fill(disk)
        else:
            for number in range(os.statvfs(disk).f_ffree):
                (disk / f"small{number}").touch()
        kept = base.quarantine(SEVEN, "nobody took its results")
        assert (kept / "files/result").read_bytes() == b"result"
        assert not base.job(SEVEN).path.exists()


# -- a worker that crashes again and again: whose fault is it? --------------------------------------------------------


class Restarts:
    """One journal over many starts of a worker."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.source, self.emit = journal, FakeSource(), Emitted()
        self.budget = Budget(
            Inventory(8.0, 8192), slots=4, memory_in_use_mib=lambda: 0, read_gpus=lambda: (), reserve_memory_mib=0
        )

    def start(self, *, crashed: bool = True) -> dict[str, Outcome | None]:
        """How each job stands at a start: with an outcome, or (None) going on."""
        found = recovery.open_jobs(self.journal, self.source, self.budget, self.emit, crashed=crashed)
        for job in found:
            if job.hold is not None:
                job.hold.release()
        assert all((job.hold is None) == (job.outcome is not None) for job in found)
        return {job.lease.job_id: job.outcome for job in found}


@pytest.fixture
def restarts(journal: Journal) -> Restarts:
    return Restarts(journal)


def ends(found: dict[str, Outcome | None]) -> dict[str, tuple[Ending, object] | None]:
    return {job: None if outcome is None else (outcome.ending, outcome.reason) for job, outcome in found.items()}


@pytest.mark.fault("A9")
@pytest.mark.parametrize("phase", [Phase.STAGING_IN, Phase.RUNNING])
def test_a_lone_job_is_reported_at_the_sixth_crash(journal: Journal, restarts: Restarts, phase: Phase) -> None:
    claimed(journal, SEVEN, phase)
    claimed(journal, EIGHT)
    journal.settling(EIGHT, Outcome(Ending.FINISHED, None, ""))  # one that only waits to be told crashes nobody
    for _ in range(5):
        assert restarts.start()["7"] is None
    assert ends(restarts.start()) == {
        "7": (Ending.JOB_FAILED, JobReason.CRASHES_WORKER),
        "8": (Ending.FINISHED, None),
    }


@pytest.mark.fault("A9")
def test_of_two_jobs_neither_is_blamed_and_the_one_that_runs_goes_on(journal: Journal, restarts: Restarts) -> None:
    claimed(journal, SEVEN, Phase.RUNNING)
    claimed(journal, EIGHT)
    for _ in range(5):
        assert restarts.start() == {"7": None, "8": None}
    given_back = (Ending.WORKER_FAILED, WorkerReason.RESTARTED)
    sixth = restarts.start()
    assert ends(sixth) == {"7": None, "8": given_back}
    assert sixth["8"] is not None
    assert "crashed 6 times in phase staging in of this job, or of another one" in sixth["8"].message
    journal.settling(EIGHT, sixth["8"])
    journal.forget(EIGHT)
    for _ in range(5):  # what was counted may have been the other one's doing
        assert restarts.start() == {"7": None}
    assert ends(restarts.start()) == {"7": (Ending.JOB_FAILED, JobReason.CRASHES_WORKER)}


@pytest.mark.fault("A9")
def test_of_two_that_run_neither_is_blamed(journal: Journal, restarts: Restarts) -> None:
    claimed(journal, SEVEN, Phase.RUNNING)
    claimed(journal, EIGHT, Phase.RUNNING)
    for _ in range(10):
        assert restarts.start() == {"7": None, "8": None}
    given_back = (Ending.WORKER_FAILED, WorkerReason.RESTARTED)
    assert ends(restarts.start()) == {"7": given_back, "8": given_back}


@pytest.mark.fault("A9")
def test_a_process_that_said_goodbye_did_not_crash(journal: Journal, restarts: Restarts, tmp_path: Path) -> None:
    claimed(journal, SEVEN)
    for _ in range(8):
        with Base(tmp_path / "base", reserve_mib=0) as base:
            assert not base.crashed
            assert restarts.start(crashed=base.crashed) == {"7": None}
            base.say_goodbye()
    with Base(tmp_path / "base", reserve_mib=0):
        pass  # this one says nothing
    with Base(tmp_path / "base", reserve_mib=0) as base:
        assert base.crashed


@pytest.mark.fault("A9")
@pytest.mark.fault("F2")
def test_a_worker_that_was_told_to_leave_says_goodbye_at_once(two: test_worker.Bench, tmp_path: Path) -> None:
    """Whatever kills it while it still brings a job to its end, as `docker stop` does after 10 s."""
    two.scripts["1"] = Script(held=True)
    two.put(make_job("1"))
    copy = tmp_path / "copy"
    copy.mkdir(mode=0o700)

    def would_be_a_crash() -> bool:
        shutil.copy(two.base.path / "lock", copy / "lock")
        with Base(copy, reserve_mib=0) as found:
            return found.crashed

    thread = test_worker.beside(two.worker.run)
    try:
        wait_until(lambda: two.engine.containers != [], "the job runs", DEADLINE_S)
        assert would_be_a_crash()
        two.worker.leave(Leaving.DRAIN)
        assert not would_be_a_crash()
        assert two.worker.running == ["1"]
    finally:
        release_all(two.engine)
        thread.join(DEADLINE_S)
    assert two.ends("1") == ["finished"]


@pytest.mark.fault("D5")
@pytest.mark.fault("A9")
def test_a_journal_that_cannot_count_does_not_stop_the_recovery(journal: Journal) -> None:
    claimed(journal, SEVEN)
    claimed(journal, EIGHT, Phase.RUNNING)
    restarts = Restarts(test_runner.Failing(journal, "resuming", DISK_FULL))  # type: ignore[arg-type]  # a journal but for that
    for _ in range(7):
        assert restarts.start() == {"7": None, "8": None}
    assert set(restarts.emit.levels("journal_failed")) == {"error"}


# -- the journal on a full disk ---------------------------------------------------------------------------------------


@pytest.mark.fault("D5")
@needs_root
def test_a_closed_journal_opens_on_a_disk_that_is_full_to_the_last_byte(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "16m") as disk:
        with closing(Journal(disk / "journal.db")) as journal:
            journal.claim(SEVEN, "t", make_job())
        assert (disk / "journal.ballast").exists()
        fill(disk)
        with closing(Journal(disk / "journal.db")) as journal:
            assert [record.id for record in journal.records()] == ["7"]
            assert journal.damage == ""
            journal.settling(SEVEN, Outcome(Ending.FINISHED, None, ""))  # and how the job ended can be written
        assert not (disk / "journal.ballast").exists()


@pytest.mark.fault("D5")
@needs_root
def test_without_a_ballast_to_give_up_a_person_is_told_of_the_disk(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "16m") as disk:
        with closing(Journal(disk / "journal.db")) as journal:
            journal.claim(SEVEN, "t", make_job())
        (disk / "journal.ballast").unlink()
        filler = fill(disk)
        with pytest.raises(ConfigError, match=r"journal\.db cannot be used: .*is the disk full\?"):
            Journal(disk / "journal.db")
        filler.unlink()
        with closing(Journal(disk / "journal.db")) as journal:
            assert [record.id for record in journal.records()] == ["7"]


# -- what is not there is no success ----------------------------------------------------------------------------------


@pytest.mark.fault("J6")
def test_a_directory_that_is_gone_is_not_nothing_to_send(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "7")
    workspace.create()
    job = make_job(outputs={"output": "out"})
    send = partial(
        stage_out,
        job,
        FakeSource().resume("t", SEVEN),
        workspace,
        FakeTransfer(),
        halt=Halt(),
        have={},
        mark=lambda stored: None,
        progress=Progress(),
    )
    assert send().stored == {}
    workspace.files.rmdir()
    with pytest.raises(WorkerFault, match="is gone; did somebody delete it") as fault:
        send()
    assert fault.value.reason is WorkerReason.DISK


@pytest.mark.fault("J6")
def test_a_job_whose_directory_somebody_deleted_is_given_back(one: test_runner.Bench) -> None:
    one.script = Script(acts=shutil.rmtree)
    outcome = one.run()
    assert (outcome.ending, outcome.reason) == (Ending.WORKER_FAILED, WorkerReason.DISK)
    assert one.last[0] == "released"
    assert "finished" not in one.words
    assert one.nothing_is_left()


# -- a journal that fails where nobody expected it --------------------------------------------------------------------


@pytest.mark.fault("D5")
@pytest.mark.fault("E10")
@pytest.mark.parametrize("older_than_s", [0.0, 300.0])
def test_strays_are_left_alone_while_the_journal_cannot_be_read(
    base: Base, journal: Journal, older_than_s: float
) -> None:
    class Spared(FakeEngine):
        def reap(self, known: frozenset[JobId], *, older_than_s: float = 0.0) -> list[str]:
            raise AssertionError("it is not known what is a stray")

    base.job(SEVEN).create()
    emit, engine = Emitted(), Spared()
    broken = test_runner.Failing(journal, "records", WorkerFault(WorkerReason.DISK, "the journal cannot be read: x"))
    recovery.clear_strays(broken, engine, base, emit, older_than_s=older_than_s)  # type: ignore[arg-type]  # a journal but for that
    assert emit.levels("reap_failed") == ["warning"]
    assert "the journal cannot be read: x" in str(emit.named("reap_failed")[0]["message"])
    assert names_in(base.path / "jobs") == ["7"]


@pytest.mark.fault("D5")
@pytest.mark.fault("J1")
def test_a_job_without_a_record_is_given_back_and_its_share_is_free(one: test_runner.Bench) -> None:
    job = make_job()
    one.source.put(job)
    hold = one.budget.reserve(job.needs)
    assert one.budget.offer() is None
    outcome = one.runner.run(one.source.resume("t", SEVEN), job, hold, one.halt)
    assert outcome is not None
    assert (outcome.ending, outcome.reason) == (Ending.WORKER_FAILED, WorkerReason.DISK)
    assert one.words == ["released"]
    assert one.nothing_is_left()  # budget included


# -- stopping a container ---------------------------------------------------------------------------------------------


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[test_watching.Bench]:
    bench = test_watching.Bench(tmp_path / "base")

    def end() -> None:
        if bench.clock.now > 200:  # so that a test of a container that nobody stops ends, too
            bench.container.end = Exit(0)

    bench.container.on_slice = end
    yield bench
    bench.base.close()


@pytest.mark.fault("F10")
@pytest.mark.fault("B7")
def test_a_stop_that_finds_no_thread_is_begun_again(
    watched: test_watching.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = threading.Thread.start, iter([True, True])

    def start(thread: threading.Thread) -> None:
        if thread.name != "stop-7" or not next(refused, False):
            return real(thread)
        threading.stack_size(1 << 46)  # more than there is: the kernel refuses it, as it does at a limit of threads
        try:
            real(thread)
        finally:
            threading.stack_size(0)

    monkeypatch.setattr(threading.Thread, "start", start)
    watched.halt.set(StopReason.CANCELLED)
    assert watched.wait() == Exit(143)
    assert watched.container.stopped == [0.01]
    assert watched.stops_noted == [0]
    assert watched.clock.now <= 2 * watched.container.slice_s  # at the next look
    assert watched.emit.levels("stop_failed") == ["error"] * 2


@pytest.mark.fault("J1")
@pytest.mark.fault("F10")
def test_no_error_of_the_note_saves_the_container(watched: test_watching.Bench) -> None:
    def broken() -> None:
        raise RuntimeError("can't start new thread")

    watched.halt.set(StopReason.CANCELLED)
    watcher = Watcher(watched.base, Limits(0.01), watched.emit, clock=watched.clock)
    assert watcher.wait(SEVEN, watched.container, watched.halt, broken, lambda: None) == Exit(143)
    assert watched.container.stopped == [0.01]
    assert watched.emit.levels("journal_failed") == ["error"]


# -- making room ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("J1")
@pytest.mark.fault("D7")
def test_making_room_spares_the_container_of_a_record_that_was_damaged_meanwhile(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.db"
    monkeypatch.setattr(Base, "is_full", lambda self: "the disk is full")

    class Asked(FakeEngine):
        known: frozenset[JobId] = frozenset()

        def reap(self, known: frozenset[JobId], *, older_than_s: float = 0.0) -> list[str]:
            self.known = known
            return super().reap(known, older_than_s=older_than_s)

    engine = Asked()
    with closing(Journal(path)) as journal:
        claimed(journal, SEVEN, Phase.RUNNING)
        claimed(journal, EIGHT, Phase.RUNNING)
        base.job(SEVEN).create()
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("UPDATE job SET runs = runs + 1 WHERE id = '7'")  # its sum is wrong now
        assert not Housekeeper(engine, base, journal, Emitted()).make_room()
        assert journal.unreadable == ["7"]
    assert engine.known == {"7", "8"}
    assert names_in(base.path / "jobs") == ["7"]


# -- a job that is handed out again while it is in hand ---------------------------------------------------------------


def take(api: ScriptedApi, source: WorkerApi, *ids: str) -> Lease:
    """The lease that comes of an answer with these jobs."""
    api.then(reply(200, json.dumps({id: {"handler": {"image_url": "busybox"}} for id in ids}).encode()))
    claim = source.fetch(OFFER, 0.0)
    assert claim is not None
    return claim.lease


@pytest.mark.fault("B19")
@pytest.mark.fault("S2")
def test_a_job_that_is_handed_out_again_after_a_silence_goes_on(
    api: ScriptedApi, source: WorkerApi, clock: FakeClock
) -> None:
    """The server put it back to `pulled`, which looks like another worker of our account; but it was we who asked."""
    held = take(api, source, "7")
    assert held.beat(Phase.RUNNING) is Standing.KEEP
    clock.now += 400
    again = take(api, source, "7")
    api.asked.clear()
    assert held.beat(Phase.RUNNING) is Standing.KEEP
    assert api.said == ["running"]
    clock.now += 301  # and counts from then on as any other: it may be somebody else's after another silence
    api.then(state("pulled"))
    assert held.beat(Phase.RUNNING) is Standing.LOST
    assert again.job_id == SEVEN


@pytest.mark.fault("S2")
def test_the_end_of_a_job_that_was_handed_out_again_is_told_from_where_the_server_sees_it(
    api: ScriptedApi, source: WorkerApi, clock: FakeClock
) -> None:
    held = take(api, source, "7")
    assert held.beat(Phase.STAGING_OUT) is Standing.KEEP
    clock.now += 400
    take(api, source, "7")
    api.asked.clear()
    assert held.settle(Outcome(Ending.FINISHED, None, "")) is Standing.KEEP
    assert api.said == ["postprocessing", "finished"]


@pytest.mark.fault("B16")
def test_of_several_jobs_the_one_in_hand_is_not_given_back(api: ScriptedApi, source: WorkerApi) -> None:
    held = take(api, source, "7")
    api.asked.clear()
    first = take(api, source, "8", "7", "9")
    assert first.job_id == EIGHT
    assert [(asked.method, asked.path) for asked in api.asked] == [("GET", "/jobs"), ("PUT", "/jobs/9/status")]
    assert held.beat(Phase.RUNNING) is Standing.KEEP


# -- on the way out ---------------------------------------------------------------------------------------------------


def release_all(engine: FakeEngine) -> None:
    for container in engine.containers:
        container.release()


@pytest.mark.fault("B1")
@pytest.mark.fault("F2")
def test_an_end_that_was_not_heard_is_told_while_another_job_is_still_finished(two: test_worker.Bench) -> None:
    """Nothing beats for a job that ended: its lease would run out while the worker waits for the other one."""
    two.scripts = {"1": Script(held=True), "2": Script(held=True)}
    two.put(make_job("1"), make_job("2"))
    thread = test_worker.beside(two.worker.run)
    try:
        wait_until(lambda: "running" in two.words("1") and "running" in two.words("2"), "both run", DEADLINE_S)
        two.worker.leave(Leaving.DRAIN)
        wait_until(lambda: two.emit.named("draining") != [], "it drains", DEADLINE_S)
        answers = two.source.said[JobId("1")].answers
        answers += [Standing.KEEP, *[SourceUnavailable("down")] * 4]  # staging_out, and as often as it is told at once
        [first] = [found for found in two.engine.containers if found.spec.job_id == "1"]
        first.release()
        wait_until(lambda: two.emit.named("settle_failed") != [], "nobody heard the end", DEADLINE_S)
        wait_until(lambda: two.ends("1") == ["finished"], "it is told", 10.0)
        assert two.worker.running == ["2"]
        assert two.ends("2") == []
    finally:
        release_all(two.engine)
        thread.join(DEADLINE_S)
    assert (two.ends("1"), two.ends("2")) == (["finished"], ["finished"])
    assert two.nothing_is_left()


@pytest.mark.docker
@pytest.mark.fault("F2")
def test_what_is_said_last_after_a_detach_is_true(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit(UNTIL_LET_GO)
    run = ["run", "--exit-when-idle", "0.3"]
    with command(run, lab.env(stop_mode="detach"), tmp_path) as first:
        lab.server.wait_for_state(job, "running")
        wait_until(lambda: bool(lab.containers()), "its container is there", DEADLINE_S)
        first.send(signal.SIGTERM)
        assert first.wait() == 0
    [last] = first.errors.splitlines()[-1:]
    assert "stopped; the next start goes on with the jobs in hand" in last
    assert "nothing is left running" not in first.errors
    with command(run, lab.env(), tmp_path) as second:
        lab.let_go(job)
        assert second.wait() == 0
    assert "stopped; nothing is left running" in second.errors.splitlines()[-1]
    assert lab.server.state(job) == "finished"
