"""Promises of the contract in full where other tests carry a part: every phase, every byte, the whole figure.

A1 no word without a claim, and how long that window is; A2 and A6 counted in bytes and requests; B17 and N6 in the
phases between download, run and upload; E4 a process of a job that lives on; E5 no job while one cannot be ended; E14
whose fault a lost GPU is; F3 and N12 in each phase with the ordinary grace; F7 the warning; N8 as many outputs as it
says.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from jobfetcher.core import failpoints
from jobfetcher.core.failpoints import Request
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import Job, JobId
from jobfetcher.core.ports import Download, Standing, Upload, Watch
from jobfetcher.core.run import Exit, Stored
from jobfetcher.journal import Journal
from jobfetcher.staging import Progress, stage_out
from jobfetcher.testing.fake_engine import Script
from jobfetcher.testing.fake_source import FakeSource
from jobfetcher.workspace import Base
from tests.support.fault_proxy import Fault
from tests.support.jobs import make_job
from tests.support.mock_server import running_mock_api
from tests.support.mounts import ext4, needs_root, tmpfs
from tests.support.private_engine import private_engine
from tests.support.services import GpuStub, ensure_busybox_image, wait_until
from tests.support.wired import Wired
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Lab, assert_clean, command, running_worker, work
from tests.unit.test_worker import Bench, beside, until

OUT = {"output": "out"}
MIB = 1 << 20


# -- A1 ---------------------------------------------------------------------------------------------------------------

#: FAULTS.md A1: from the server's handing out of a job to the record of it here, in seconds.
WINDOW_S = 0.05


@pytest.mark.docker
@pytest.mark.fault("A1")
@pytest.mark.parametrize("at", ["after:fetch", "before:claim"])
def test_a_job_that_was_not_journaled_is_not_spoken_of_and_goes_to_others(lab: Lab, tmp_path: Path, at: str) -> None:
    job = lab.submit("true")
    with command(["run"], lab.env() | {"JOBFETCHER_FAILPOINT": at}, tmp_path) as run:
        assert run.wait() == -signal.SIGKILL
    with command(["run", "--exit-when-idle", "0.5"], lab.env(), tmp_path) as run:
        assert run.wait() == 0
    assert len(lab.server.events("pull", job)) == 1
    for kind in ("update", "status", "sign_upload", "stored"):
        assert lab.server.events(kind, job) == []
    lab.server.advance(301)
    lab.server.sweep()
    assert lab.take_as_another_account() == [job]


@pytest.mark.docker
@pytest.mark.fault("A1")
def test_a_job_is_on_record_within_the_window(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third quickest of seven: a busy machine may hold up some of them, but not make any quicker than it can be."""
    recorded: dict[int, float] = {}
    claim = Journal.claim

    def timed(journal: Journal, job_id: JobId, token: str, job: Job | None) -> None:
        claim(journal, job_id, token, job)
        recorded[int(job_id)] = time.time()

    monkeypatch.setattr(Journal, "claim", timed)
    jobs = [lab.submit("true") for _ in range(7)]
    with running_worker(lab.settings(), lambda taken, idle_s: taken >= len(jobs)) as worker:
        worker.join()
    took = [recorded[int(event["job_id"])] - float(event["time"]) for event in lab.server.events("pull")]
    print(f"from handed out to on record: {[round(1000 * seconds) for seconds in took]} ms")
    assert len(took) == len(jobs)
    assert 0 < sorted(took)[2] <= WINDOW_S


# -- A2, A6: killed in a transfer -------------------------------------------------------------------------------------

INPUT_BYTES = 8 * MIB

#: FAULTS.md A2: so much may come twice; and the heads of the store's answers come beside it.
TWICE_BYTES, HEADS_BYTES = 64 * 1024, 8 * 1024


@pytest.mark.docker
@pytest.mark.fault("A2")
@pytest.mark.parametrize("percent", [0, 50, 99])
def test_a_download_that_was_killed_goes_on_at_the_byte_it_had_reached(
    wire: Wired, tmp_path: Path, percent: int
) -> None:
    lab, content = wire.lab, os.urandom(INPUT_BYTES)
    job = wire.submit("cp /files/in /files/out/copy", files_down={"in": lab.server.put_input("in", content)})
    reached = INPUT_BYTES * percent // 100
    wire.storage.always(Fault(drip_from=reached + 1000, drip_s=2.0))  # the head of the answer comes first
    part = lab.base / "jobs" / str(job) / "parts" / "0"
    env = lab.env(api_url=wire.api.url)
    with command(["run"], env, tmp_path) as run:
        wait_until(lambda: _answered(wire) >= reached + 1000, "the store has sent so much", DEADLINE_S)
        wait_until(lambda: part.exists() and part.stat().st_size >= reached - TWICE_BYTES, "it is here", DEADLINE_S)
        run.send(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    wire.storage.always()
    with command(["run", "--exit-when-idle", "0.5"], env, tmp_path) as run:
        lab.server.wait_for_state(job, "postprocessing", "finished", timeout_s=DEADLINE_S)
        wait_until(lambda: _answered(wire) >= INPUT_BYTES, "what was passed on is counted, a moment later")
        fetched = _answered(wire)
        assert run.wait() == 0
    assert wire.results(job)["output/out/copy"] == content
    assert INPUT_BYTES <= fetched <= INPUT_BYTES + TWICE_BYTES + HEADS_BYTES


def _answered(wire: Wired) -> int:
    return sum(connection.answered for connection in wire.storage.connections)


@pytest.mark.docker
@pytest.mark.fault("A6")
def test_an_upload_that_was_killed_sends_again_only_what_was_on_its_way(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit("for n in 0 1 2 3 4 5; do echo $n > /files/out/$n; done", files_up=OUT)
    lab.server.set_faults({"method": "POST", "path": "^/_storage", "skip": 4, "delay_s": 20})
    with command(["run"], lab.env(transfers="1"), tmp_path) as run:
        wait_until(lambda: len(lab.server.events("stored", job)) >= 4, "four outputs are stored", DEADLINE_S)
        wait_until(lambda: _marks(lab) >= 4, "and are marked", DEADLINE_S)
        run.send(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
    before = _times_stored(lab)
    assert sorted(before.values()) == [1] * 4
    lab.server.set_faults()
    with command(["run", "--exit-when-idle", "0.5"], lab.env(), tmp_path) as run:
        assert run.wait() == 0
    assert lab.server.state(job) == "finished"
    after = _times_stored(lab)
    assert {name: after[name] for name in before} == before
    assert set(after.values()) <= {1, 2}
    assert len(after) == 6 + len({"container.log", "provenance.json"})


def _marks(lab: Lab) -> int:
    with closing(sqlite3.connect(f"file:{lab.base}/journal.db?mode=ro", uri=True)) as journal:
        return int(journal.execute("SELECT count(*) FROM file WHERE direction = 'out'").fetchone()[0])


def _times_stored(lab: Lab) -> dict[str, int]:
    return {name: int(counts["puts"]) for name, counts in lab.server.traffic().items() if counts["puts"]}


# -- B17, N6: cancelled between the phases that take long -------------------------------------------------------------

#: FAULTS.md N6: from the word of the cancel to container and directory gone, in seconds.
GONE_WITHIN_S = 15.0


@pytest.fixture
def held_at() -> Iterator[Callable[[str], None]]:
    """Arms a failpoint of this process at which a worker stays for four seconds: the cancel comes meanwhile."""
    yield lambda name: failpoints.ask_for(Request(name, "sleep4"))
    failpoints.ask_for(None)


@pytest.mark.docker
@pytest.mark.parametrize(
    "swept",
    [pytest.param(False, marks=pytest.mark.fault("B7")), pytest.param(True, marks=pytest.mark.fault("B8"))],
    ids=["404", "500-then-GET"],
)
@pytest.mark.fault("B17", "N6")
@pytest.mark.parametrize(
    ("phase", "at"),
    [("P1", "after:reserve"), ("P3", "after:prepare"), ("P4", "before:start"), ("P7", "before:settling")],
)
def test_cancelled_between(lab: Lab, held_at: Callable[[str], None], phase: str, at: str, swept: bool) -> None:
    job = lab.submit("echo result > /files/out/a", files_up=OUT)
    held_at(at)
    with running_worker(lab.settings(), lambda taken, idle_s: taken >= 2) as worker:
        wait_until(lambda: failpoints._passed > 0, f"the job is in {phase}", DEADLINE_S)
        lab.server.delete(job, swept=swept)
        deleted_at = time.monotonic()
        worker.heard.wait_for("job_ended")
        assert time.monotonic() - deleted_at < GONE_WITHIN_S
        assert not [one for one in lab.containers() if one["Labels"]["jobfetcher.job"] == str(job)]
        assert not (lab.base / "jobs" / str(job)).exists()
        following = lab.submit("true")
        worker.join()
    assert [(end["job"], end["ending"]) for end in worker.heard.all("job_ended")] == [
        (str(job), "dropped"),
        (str(following), "finished"),
    ]
    assert not {"finished", "error", "queued"} & {
        event["state"] for event in lab.server.events("update", job) if event["code"] == 204
    }
    assert bool(lab.server.events("stored", job)) == (phase == "P7")


# -- E4 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.docker
@pytest.mark.fault("E4")
def test_a_job_that_outlives_a_process_killed_for_memory_says_so(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit("(tail /dev/zero); echo alive > /files/out/a", hardware={"memory": 64}, files_up=OUT)
    with command(["run", "--once"], lab.env(), tmp_path) as run:
        assert run.wait() == 0
    assert lab.ended(job) == ("finished", "a process of the job was killed for memory (limit 64 MiB)")
    assert lab.server.results(job)["output/out/a"] == b"alive\n"


# -- E5 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("E5")
def test_no_job_is_taken_while_a_container_cannot_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobfetcher.watching._STUCK_S", 0.0)
    monkeypatch.setattr("jobfetcher.watching._STUCK_RETRY_S", 0.01)
    with closing(Bench(tmp_path, slots=2)) as bench:
        bench.scripts["1"] = Script(held=True, stuck=True)
        bench.put(make_job("1"))
        bench.jobs = 2
        bench.source.said[JobId("1")].answers += [Standing.KEEP, Standing.CANCEL]
        thread = beside(bench.worker.run)
        try:
            until(lambda: bench.emit.named("stuck") != [] and bench.worker._pace.in_trouble)
            assert "container of job 1 cannot be killed" in str(bench.emit.named("not_polling")[-1]["message"])
            bench.source.put(make_job("2"))
            asked, waits = bench.source.asked, len(bench.budget.waits)
            until(lambda: len(bench.budget.waits) > waits + 5)
            assert bench.source.asked == asked
            [container] = bench.engine.containers
            assert len(container.stopped_with) >= 2  # it is tried again and again
        finally:
            for container in bench.engine.containers:
                container.release(Exit(137))
            thread.join(20)
        assert bench.ends("1") == []
        assert bench.ends("2") == ["finished"]
        assert bench.nothing_is_left()


# -- E14 --------------------------------------------------------------------------------------------------------------


@pytest.mark.docker
@pytest.mark.fault("E14", "J5")
@pytest.mark.parametrize("lost", [True, False])
def test_a_job_that_fails_on_a_gpu_that_is_gone_is_given_back(gpus: GpuStub, tmp_path: Path, lost: bool) -> None:
    """Beside it: one that fails on a sound GPU, whose fault that is. The GPU is a stub below the real bindings."""
    control = tmp_path / "control"
    with private_engine() as own, running_mock_api(tmp_path / "server") as server:
        lab = Lab(server, tmp_path / "base", ensure_busybox_image(own.client()), own.client())
        before = lab.held()
        job = lab.submit(UNTIL_LET_GO, "; exit 3", hardware={"gpu_mem": 1}, files_up=OUT)
        stub = {**gpus.env("NVIDIA RTX A4000:16376:8.6"), "JF_STUB_CONTROL": str(control)}
        machine = {name: stub[name] for name in ("LD_LIBRARY_PATH", "JF_STUB_GPUS", "JF_STUB_CONTROL")}
        # Else it would ask for nothing without a GPU: tests/e2e/test_gpu.py.
        env = {**lab.env(gpus="all", docker_host=own.url, gpu_unasked="none"), **machine}
        with command(["run", "--exit-when-idle", "1"], env, tmp_path) as run:
            server.wait_for_state(job, "running", timeout_s=DEADLINE_S)
            if lost:
                control.write_text("lost 0\n")
            lab.let_go(job)
            assert run.wait() == 0
        state, details = lab.ended(job)
        assert state == ("queued" if lost else "error")
        assert ("a GPU failed while the job ran" if lost else "exit code 3") in details
        question = parse_qs(server.events("poll")[-1]["note"])
        assert ("gpu_mem" in question) != lost  # none is offered any more
        assert_clean(lab, before)


# -- F3, N12 ----------------------------------------------------------------------------------------------------------

#: FAULTS.md F3: from the second signal to the end of the worker, with the ordinary 10 s that a job is given to end.
LEAVES_WITHIN_S = 25.0

OBSTINATE = "trap '' TERM; touch /files/out/began; while :; do sleep 0.1; done"


@pytest.mark.docker
@pytest.mark.fault("F3", "N12")
@pytest.mark.parametrize("phase", ["download", "run", "upload"])
def test_a_second_signal_ends_it_in_time_in_each_phase(wire: Wired, tmp_path: Path, phase: str) -> None:
    lab = wire.lab
    if phase == "download":
        wire.storage.always(Fault(black_hole=True))
    inputs = {"in": lab.server.put_input("a", b"input")} if phase == "download" else {}
    act = OBSTINATE if phase == "run" else "echo result > /files/out/a"
    job = wire.submit(act, files_down=inputs)
    if phase == "upload":
        wire.storage.always(Fault(black_hole=True))
    with command(["run"], lab.env(stop_grace="10"), tmp_path) as run:
        if phase == "run":
            wait_until((lab.files(job) / "out/began").exists, "the job began", DEADLINE_S)
            lab.server.wait_for_state(job, "running")
        else:
            wait_until(lambda: bool(wire.storage.connections), f"the {phase} hangs", DEADLINE_S)
        run.send(signal.SIGTERM)
        run.wait_for("finishing job")
        began = time.monotonic()
        run.send(signal.SIGTERM)
        assert run.wait(LEAVES_WITHIN_S) == 0
        print(f"left {time.monotonic() - began:.1f} s after the second signal")
    assert lab.server.updates(job)[-1] == "queued"
    assert lab.server.outbox() == []
    assert lab.take_as_another_account() == [job]


# -- F7 ---------------------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.fault("F7")
def test_the_filesystem_of_path_base_is_known(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "memory", "16m") as memory, Base(memory / "base") as base:
        assert base.filesystem == "tmpfs"
    with ext4(tmp_path / "disk") as disk, Base(disk / "base") as base:
        assert base.filesystem == "ext4"


@pytest.mark.docker
@pytest.mark.fault("F7")
@pytest.mark.parametrize("kind", ["nfs4", "ext4"])
def test_a_path_base_on_a_network_is_told_and_used(lab: Lab, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """No NFS server is set up: what kind of file system it is is put in, how that is found is the test before."""
    monkeypatch.setattr(Base, "filesystem", kind)
    job = lab.submit("true")
    heard = work(lab.settings())
    assert lab.server.state(job) == "finished"
    assert len(heard.messages("network_disk")) == (kind == "nfs4")


# -- N8 ---------------------------------------------------------------------------------------------------------------

OUTPUTS = 100_000

#: FAULTS.md N8: more than when idle, in bytes.
GROWTH_BYTES = 64 * MIB


class Storing:
    """A transfer that takes every file for stored; what is looked at is what comes before and after it."""

    def __init__(self) -> None:
        self.stored = 0
        self.most = 0

    def upload(self, items: Iterable[Upload], watch: Watch) -> None:
        for item in items:
            watch.expect(item.size)
            watch.moved(item.size)
            watch.done(item, Stored(item.name, item.size, f"md5:{self.stored:032x}", f"{self.stored:032x}"))
            self.stored += 1
            if self.stored % 1000 == 0:
                self.most = max(self.most, _resident())

    def download(self, items: Iterable[Download], watch: Watch) -> None:
        raise AssertionError("nothing is fetched here")

    def close(self) -> None:
        """It holds nothing."""


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.fault("N8", "C12")
def test_a_hundred_thousand_outputs_take_little_memory(tmp_path: Path) -> None:
    """From the walk to the journal's marks; twice, since a worker that was killed goes on with the marks in hand."""
    job = make_job(outputs={"output": "out"})
    with Base(tmp_path / "base", reserve_mib=0) as base, closing(Journal(base.path / "journal.db")) as journal:
        workspace = base.job(job.id)
        workspace.create()
        workspace.make_output_folders(job)
        for number in range(OUTPUTS):
            folder = workspace.files / "out" / f"{number // 1000}"
            if number % 1000 == 0:
                folder.mkdir()
            (folder / f"{number}").touch()
        source = FakeSource("http://files.invalid")
        source.put(job)
        lease = source.resume("t", job.id)
        journal.claim(job.id, lease.token, job)
        idle = _resident()
        for stored in (OUTPUTS, 0):
            transfer = Storing()
            stage_out(
                job,
                lease,
                workspace,
                transfer,
                halt=Halt(),
                have=journal.marked(job.id, "out"),
                mark=lambda one: journal.mark(job.id, "out", one),
                progress=Progress(),
            )
            assert transfer.stored == stored
            grown = max(transfer.most, _resident()) - idle
            print(f"{stored} of {OUTPUTS} outputs sent: {grown / MIB:.0f} MiB more than idle")
            assert grown <= GROWTH_BYTES
        workspace.remove()
        journal.forget(job.id)
