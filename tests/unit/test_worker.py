"""worker: the outer loop with fakes at all seams: what it takes, when it waits, how it leaves, what it remembers."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import pytest

from jobfetcher.core.errors import (
    ConfigError,
    SourceError,
    SourceRefused,
    SourceUnavailable,
    StopReason,
    UnreadableJob,
    WorkerFault,
    WorkerReason,
)
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import Job, JobId
from jobfetcher.core.machine import Inventory, Offer, Share
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Claim, Standing
from jobfetcher.core.run import Ending, Exit, Outcome, RunSpec
from jobfetcher.engine.run_spec import BoxPolicy, build_proof_spec, build_run_spec
from jobfetcher.housekeeping import Housekeeper
from jobfetcher.journal import Journal
from jobfetcher.resources.budget import Budget
from jobfetcher.runner import Rules, Runner
from jobfetcher.self_test import FOLDER, SelfTest
from jobfetcher.testing.fake_engine import FakeEngine, Script
from jobfetcher.testing.fake_source import FakeSource
from jobfetcher.testing.fake_transfer import FakeTransfer
from jobfetcher.watching import Limits
from jobfetcher.worker import Leaving, Polling, Worker
from jobfetcher.workspace import Base
from tests.support.gpus import ListedGpus
from tests.support.jobs import Emitted, make_job
from tests.support.trees import names_in

URL = "http://files.invalid"
BEATS = {"claimed", "staging_in", "running", "staging_out"}


class WaitingBudget(Budget):
    """A budget that notes how long the loop meant to wait, and waits a moment only."""

    waits: list[float]
    #: Seconds that waits were cut short by: the worker's clock is that much ahead.
    skipped = 0.0
    #: While this is true something is about to change, and a wait for it is a real one.
    is_busy: Callable[[], bool] = staticmethod(lambda: False)

    def wait_for_change(self, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        changed = super().wait_for_change(min(timeout_s, 20.0 if self.is_busy() else 0.002))
        if not changed:
            self.skipped += timeout_s
        return changed

    def clock(self) -> float:
        return time.monotonic() + self.skipped


class ScriptedSource(FakeSource):
    """Raises or answers what was put into `replies` before it looks at its queue."""

    def __init__(self) -> None:
        super().__init__(URL)
        self.replies: list[SourceError | UnreadableJob | ConfigError] = []
        self.asked = 0

    def fetch(self, offer: Offer, wait_s: float) -> Claim | None:
        self.asked += 1
        if self.replies:
            raise self.replies.pop(0)
        return super().fetch(offer, wait_s)


class Bench:
    def __init__(self, path: Path, *, slots: int = 1, prefetch: int = 0) -> None:
        self.source, self.transfer, self.emit = ScriptedSource(), FakeTransfer(), Emitted()
        self.scripts: dict[str, Script] = {}
        self.engine = FakeEngine(self._script)
        self.base = Base(path / "base", reserve_mib=0)
        self.journal = Journal(self.base.path / "journal.db")
        self.budget = WaitingBudget(
            Inventory(8.0, 8192),
            slots=slots,
            memory_in_use_mib=lambda: 0,
            read_gpus=lambda: (),
            reserve_memory_mib=0,
            prefetch=prefetch,
        )
        self.budget.waits = []
        self.jobs = 0
        self.rules = Rules(beat_interval_s=3600.0, limits=Limits(stop_grace_s=0.1))
        self.stop_when: Callable[[int, float], bool] = lambda taken, idle_s: taken >= self.jobs
        self.worker = self.make_worker()

    def _script(self, spec: RunSpec) -> Script:
        return self.scripts.get(spec.job_id, Script())

    def make_worker(self, journal: Journal | None = None, *, idle_limit_s: float | None = None) -> Worker:
        journal = journal or self.journal
        runner = Runner(
            base=self.base,
            host_base=PurePosixPath(self.base.path),
            journal=journal,
            transfer=self.transfer,
            engine=self.engine,
            build_spec=partial(build_run_spec, attempt=1, instance="i", policy=BoxPolicy()),
            rules=self.rules,
            emit=self.emit,
            sleep=lambda _: None,
        )
        return Worker(
            source=self.source,
            engine=self.engine,
            budget=self.budget,
            base=self.base,
            journal=journal,
            runner=runner,
            housekeeper=Housekeeper(self.engine, self.base, journal, self.emit),
            self_test=SelfTest(
                engine=self.engine,
                make_spec=lambda held: build_proof_spec(
                    Share(1.0, 64, tuple(held)), files_host_path=str(self.base.path / FOLDER), policy=BoxPolicy()
                ),
                base=self.base.path,
                gpus=ListedGpus(),
                clock=self.budget.clock,
            ),
            polling=Polling(30.0, lambda taken, idle_s: self.stop_when(taken, idle_s), idle_limit_s),
            emit=self.emit,
            clock=self.budget.clock,
            jitter=lambda: 1.0,
        )

    def put(self, *jobs: Job) -> None:
        for job in jobs:
            self.source.put(job)
            self.jobs += 1

    def words(self, job_id: str) -> list[str]:
        return self.source.said[JobId(job_id)].words

    def ends(self, job_id: str) -> list[str]:
        return [word for word in self.words(job_id) if word not in BEATS]

    def waiting(self) -> list[object]:
        """The jobs that have waited for a share, with all their inputs here."""
        return [event["job"] for event in self.emit.named("wait")]

    def close(self) -> None:
        self.journal.close()
        self.base.close()

    def nothing_is_left(self) -> bool:
        return (
            self.engine.containers == []
            and names_in(self.base.path / "jobs") == []
            and self.journal.records() == []
            and self.worker.running == []
        )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, slots=2)
    yield made
    made.close()


@pytest.fixture
def ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """One slot, and PREFETCH=1; a container that runs is looked at often, so that a detach is quick."""
    monkeypatch.setattr("jobfetcher.watching._SLICE_S", 0.05)
    made = Bench(tmp_path, prefetch=1)
    yield made
    made.close()


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def beside(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


# -- taking jobs ------------------------------------------------------------------------------------------------------


def test_jobs_are_taken_one_after_the_other_and_each_ends_once(bench: Bench) -> None:
    bench.put(*(make_job(str(number)) for number in range(5)))
    bench.scripts["3"] = Script(exit=Exit(1))
    bench.worker.run()
    assert [bench.ends(str(number)) for number in range(5)] == [
        ["finished"],
        ["finished"],
        ["finished"],
        ["error"],
        ["finished"],
    ]
    assert bench.nothing_is_left()
    assert bench.worker.worker_faults == 0


def test_two_slots_run_two_jobs_at_once(two: Bench) -> None:
    two.scripts = {"1": Script(held=True), "2": Script(held=True)}
    two.put(make_job("1"), make_job("2"))
    thread = beside(two.worker.run)
    until(lambda: len(two.engine.containers) == 2)
    assert sorted(two.worker.running) == ["1", "2"]
    assert two.budget.offer() is None
    for container in two.engine.containers:
        container.release()
    thread.join(20)
    assert two.ends("1") == two.ends("2") == ["finished"]
    assert two.nothing_is_left()


def test_the_next_job_starts_while_the_last_one_uploads_but_not_without_end(bench: Bench) -> None:
    def write_out(files: Path) -> None:
        (files / "out" / "a").write_bytes(b"a")

    jobs = [make_job(str(number), outputs={"output": "out"}) for number in range(3)]
    bench.scripts = dict.fromkeys(["0", "1", "2"], Script(acts=write_out))
    bench.transfer.stall.add("output:out/a")
    bench.put(*jobs)
    thread = beside(bench.worker.run)
    until(lambda: len(bench.worker.running) == 2)
    until(lambda: {record.phase for record in bench.journal.records()} == {Phase.STAGING_OUT})
    asked = bench.source.asked
    waits = len(bench.budget.waits)
    until(lambda: len(bench.budget.waits) > waits + 5)
    assert bench.source.asked == asked  # two are uploading where one may compute: no third is taken
    bench.transfer.stall.clear()
    thread.join(20)
    assert bench.ends("2") == ["finished"]
    assert bench.nothing_is_left()


def test_an_idle_worker_asks_at_its_interval(bench: Bench) -> None:
    bench.stop_when = lambda taken, idle_s: bench.source.asked >= 4
    bench.worker.run()
    assert bench.budget.waits == [30.0] * 4


def test_a_job_that_does_not_fit_is_given_back_at_once(bench: Bench) -> None:
    bench.put(make_job("1", needs={"memory_mib": 10**9}), make_job("2"))
    bench.worker.run()
    assert bench.words("1") == ["released"]
    assert "memory" in bench.source.said[JobId("1")].details[0]
    assert bench.ends("2") == ["finished"]
    assert bench.worker.worker_faults == 1
    assert bench.nothing_is_left()


@pytest.mark.fault("B16")
def test_an_unreadable_job_is_reported_and_the_next_one_run(bench: Bench) -> None:
    lease = bench.source.resume("t", JobId("1"))
    bench.source.replies.append(UnreadableJob(lease, "handler.image_url: field required"))
    bench.put(make_job("2"))
    bench.jobs += 1
    bench.worker.run()
    assert bench.words("1") == ["error"]
    assert bench.source.said[JobId("1")].details == ["worker cannot read the job: handler.image_url: field required"]
    assert bench.ends("2") == ["finished"]
    assert bench.nothing_is_left()


def test_a_job_handed_out_again_goes_on_as_it_is(bench: Bench) -> None:
    bench.scripts["1"] = Script(held=True)
    bench.put(make_job("1"), make_job("1"))
    bench.jobs = 1
    bench.stop_when = lambda taken, idle_s: bench.source.asked >= 2 and bench.ends("1") != []
    bench.budget.slots = 2
    thread = beside(bench.worker.run)
    until(lambda: bench.emit.named("job_again") != [] and bench.engine.containers != [])
    bench.engine.containers[0].release()
    thread.join(20)
    assert len(bench.engine.specs) == 1
    assert bench.ends("1") == ["finished"]


# -- jobs ahead (PREFETCH) --------------------------------------------------------------------------------------------


def prefetched(bench: Bench, *more: Job) -> threading.Thread:
    """The worker, where job 1 computes until it is let go and job 2 has all its inputs here and waits."""
    bench.scripts["1"] = Script(held=True)
    bench.transfer.objects[f"{URL}/b/in"] = b"input"
    bench.put(make_job("1"), make_job("2", inputs={"in": "b/in"}), *more)
    bench.stop_when = lambda taken, idle_s: False
    thread = beside(bench.worker.run)
    until(lambda: bench.waiting() == ["2"])
    until(lambda: bench.budget.offer() is None and bench.engine.containers != [])
    until(lambda: bench.words("2") != [])  # said by a thread of its own
    assert (bench.base.path / "jobs" / "2" / "files" / "in").read_bytes() == b"input"
    assert [spec.job_id for spec in bench.engine.specs] == ["1"]
    assert set(bench.words("2")) == {"claimed"}
    return thread


def test_a_prefetched_job_is_brought_while_another_one_computes_and_starts_when_that_has_ended(ahead: Bench) -> None:
    ahead.scripts["2"] = Script(held=True)
    thread = prefetched(ahead, make_job("3"))
    asked = ahead.source.asked
    waits = len(ahead.budget.waits)
    until(lambda: len(ahead.budget.waits) > waits + 5)
    assert ahead.source.asked == asked, "one is enough"
    ahead.engine.containers[0].release()
    until(lambda: [spec.job_id for spec in ahead.engine.specs] == ["1", "2"])
    until(lambda: ahead.waiting() == ["2", "3"])
    ahead.worker.leave(Leaving.DRAIN)
    until(lambda: ahead.ends("3") == ["released"])
    ahead.engine.containers[-1].release()
    thread.join(20)
    assert ahead.ends("1") == ahead.ends("2") == ["finished"]
    assert ahead.nothing_is_left()


def test_one_job_is_one_job_with_prefetch_as_well(ahead: Bench) -> None:
    ahead.scripts["1"] = Script(held=True)
    ahead.put(make_job("1"), make_job("2"))
    ahead.stop_when = lambda taken, idle_s: taken > 0  # --once
    thread = beside(ahead.worker.run)
    until(lambda: ahead.engine.containers != [])
    waits = len(ahead.budget.waits)
    until(lambda: len(ahead.budget.waits) > waits + 5)
    ahead.engine.containers[0].release()
    thread.join(20)
    assert ahead.ends("1") == ["finished"]
    assert ahead.source.asked == 1
    assert ahead.nothing_is_left()


def test_a_worker_that_had_enough_finishes_what_waits_as_well(ahead: Bench) -> None:
    ahead.scripts["1"] = Script(held=True)
    ahead.put(make_job("1"), make_job("2"))
    thread = beside(ahead.worker.run)
    until(lambda: ahead.waiting() == ["2"])
    until(lambda: ahead.engine.containers != [])
    ahead.engine.containers[0].release()
    thread.join(20)
    assert ahead.ends("1") == ahead.ends("2") == ["finished"]
    assert ahead.nothing_is_left()


@pytest.mark.fault("F2")
def test_a_drain_gives_the_one_that_waits_back_at_once(ahead: Bench) -> None:
    thread = prefetched(ahead)
    ahead.worker.leave(Leaving.DRAIN)
    until(lambda: ahead.ends("2") == ["released"])
    until(lambda: ahead.worker.running == ["1"])
    assert ahead.ends("1") == []
    said = [str(event["message"]) for event in ahead.emit.named("draining")]
    assert said[0].startswith("finishing job 1; ")
    assert said[1:] == ["giving it back: it waits for one that computes"]
    ahead.engine.containers[0].release()
    thread.join(20)
    assert ahead.ends("1") == ["finished"]
    assert ahead.worker.worker_faults == 0
    assert ahead.nothing_is_left()


@pytest.mark.fault("F2")
def test_a_drain_gives_back_what_is_still_downloading_for_its_turn(ahead: Bench) -> None:
    ahead.scripts["1"] = Script(held=True)
    ahead.transfer.stall.add("in")
    ahead.put(make_job("1"), make_job("2", inputs={"in": "b/in"}))
    thread = beside(ahead.worker.run)
    until(lambda: [event["job"] for event in ahead.emit.named("stage_in")] == ["2"])
    ahead.worker.leave(Leaving.DRAIN)
    until(lambda: ahead.ends("2") == ["released"])
    ahead.engine.containers[0].release()
    thread.join(20)
    assert ahead.ends("1") == ["finished"]
    assert ahead.nothing_is_left()


@pytest.mark.fault("F2")
def test_where_nothing_is_given_back_a_drain_finishes_both(ahead: Bench) -> None:
    ahead.rules = Rules(beat_interval_s=3600.0, worker_fault_is_error=True, prefetch_hold_s=None)
    ahead.worker = ahead.make_worker()
    thread = prefetched(ahead)
    ahead.worker.leave(Leaving.DRAIN)
    until(lambda: ahead.emit.named("draining") != [])
    assert "finishing job 1, 2" in str(ahead.emit.named("draining")[0]["message"])
    ahead.engine.containers[0].release()
    thread.join(20)
    assert ahead.ends("1") == ahead.ends("2") == ["finished"]
    assert ahead.nothing_is_left()


@pytest.mark.fault("F3")
def test_the_second_signal_gives_back_both(ahead: Bench) -> None:
    thread = prefetched(ahead)
    ahead.worker.leave(Leaving.STOP_JOBS)
    thread.join(20)
    assert ahead.ends("1") == ahead.ends("2") == ["released"]
    assert ahead.worker.worker_faults == 0
    assert ahead.nothing_is_left()


@pytest.mark.fault("F3")
def test_nothing_begins_with_what_a_job_gives_back_that_is_stopped_a_moment_earlier(
    ahead: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = prefetched(ahead)
    halt = Halt.set

    def slowly(self: Halt, reason: StopReason) -> None:
        halt(self, reason)
        until(lambda: len(ahead.worker.running) < 2)

    monkeypatch.setattr(Halt, "set", slowly)
    ahead.worker.leave(Leaving.STOP_JOBS)
    thread.join(20)
    assert [spec.job_id for spec in ahead.engine.specs] == ["1"]
    assert ahead.ends("1") == ahead.ends("2") == ["released"]


@pytest.mark.fault("F2")
def test_detached_from_both_the_next_start_goes_on_in_the_same_order(ahead: Bench) -> None:
    thread = prefetched(ahead)
    ahead.worker.leave(Leaving.DETACH)
    thread.join(20)
    until(lambda: ahead.worker.running == [])  # the command would have left without
    assert ahead.worker.detached
    assert {record.id: record.phase for record in ahead.journal.records()} == {
        "1": Phase.RUNNING,
        "2": Phase.STAGING_IN,
    }
    assert ahead.budget.free() == Offer(8.0 - 0.1, 8192)
    again = ahead.make_worker()
    ahead.stop_when = lambda taken, idle_s: ahead.ends("2") != []
    ahead.transfer.objects.clear()  # the input is here, and not fetched again
    thread = beside(again.run)
    until(lambda: ahead.waiting() == ["2", "2"])
    assert [spec.job_id for spec in ahead.engine.specs] == ["1"]
    ahead.engine.containers[0].release()
    thread.join(20)
    assert ahead.ends("1") == ahead.ends("2") == ["finished"]
    assert [spec.job_id for spec in ahead.engine.specs] == ["1", "2"]
    assert ahead.nothing_is_left()


@pytest.mark.fault("A2")
def test_without_prefetch_at_the_next_start_the_one_that_waited_goes_on_waiting(ahead: Bench) -> None:
    thread = prefetched(ahead)
    ahead.worker.leave(Leaving.DETACH)
    thread.join(20)
    until(lambda: ahead.worker.running == [])  # the command would have left without
    ahead.budget.prefetch = 0
    again = ahead.make_worker()
    ahead.stop_when = lambda taken, idle_s: ahead.ends("1") != []
    thread = beside(again.run)
    until(lambda: ahead.waiting() == ["2", "2"])
    assert ahead.ends("2") == []
    ahead.engine.containers[0].release()
    thread.join(20)
    assert ahead.ends("1") == ahead.ends("2") == ["finished"]
    assert ahead.nothing_is_left()


@pytest.mark.parametrize("standing", [Standing.CANCEL, Standing.LOST])
@pytest.mark.fault("B17")
def test_one_that_is_taken_back_while_it_waits_makes_room_for_another(ahead: Bench, standing: Standing) -> None:
    ahead.rules = Rules(beat_interval_s=0.01, limits=Limits(stop_grace_s=0.1))
    ahead.worker = ahead.make_worker()
    thread = prefetched(ahead, make_job("3"))
    ahead.source.said[JobId("2")].answers.append(standing)
    until(lambda: ahead.waiting() == ["2", "3"])
    assert set(ahead.words("2")) == {"claimed"}
    ahead.stop_when = lambda taken, idle_s: ahead.ends("3") != []
    ahead.engine.containers[0].release()
    thread.join(20)
    assert ahead.ends("1") == ahead.ends("3") == ["finished"]
    assert ahead.nothing_is_left()


def test_one_that_waits_for_too_long_is_given_back_without_a_fault_and_none_follows_it(ahead: Bench) -> None:
    ahead.rules = Rules(beat_interval_s=3600.0, limits=Limits(stop_grace_s=0.1), prefetch_hold_s=0.05)
    ahead.worker = ahead.make_worker()
    ahead.scripts["1"] = Script(held=True)
    ahead.put(*(make_job(str(number)) for number in range(1, 9)))
    ahead.stop_when = lambda taken, idle_s: False
    thread = beside(ahead.worker.run)
    until(lambda: ahead.ends("2") == ["released"])
    until(lambda: ahead.worker.running == ["1"])
    assert ahead.source.said[JobId("2")].details[-1] == "another job computed here for longer than PREFETCH_HOLD"
    waits = len(ahead.budget.waits)
    until(lambda: len(ahead.budget.waits) > waits + 5)
    assert ahead.source.asked == 2
    assert ahead.emit.levels("job_ended") == ["info"]
    ahead.budget.prefetch = 0  # the others are not prefetched, so none of them is given back on a slow machine
    ahead.stop_when = lambda taken, idle_s: ahead.ends("8") != []
    ahead.engine.containers[0].release()
    thread.join(20)
    assert [ahead.ends(str(number)) for number in (1, *range(3, 9))] == [["finished"]] * 7
    assert ahead.worker.worker_faults == 0
    assert ahead.emit.named("many_failures") == []
    assert ahead.nothing_is_left()


def test_many_jobs_with_slots_and_prefetch_each_end_exactly_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, slots=3, prefetch=2)
    for number in range(40):
        bench.put(make_job(str(number), needs={"cpu_cores": 1 + number % 7}))
        if number % 3 == 0:
            bench.source.said[JobId(str(number))].answers += [SourceUnavailable("x")] * (number % 7)
        if number % 5 == 0:
            bench.scripts[str(number)] = Script(exit=Exit(number % 2))
    bench.stop_when = lambda taken, idle_s: taken >= 40 and all(bench.ends(str(number)) for number in range(40))
    bench.worker.run()
    for number in range(40):
        assert bench.ends(str(number)) == ["error" if number % 5 == 0 and number % 2 else "finished"]
    assert bench.nothing_is_left()
    assert bench.budget.free() == Offer(8.0 - 0.1, 8192)
    bench.close()


# -- this machine shows that it can run a job (T23) --------------------------------------------------------------------

BROKEN = WorkerFault(WorkerReason.ENGINE, "the engine's init cannot be run in a container")


@pytest.mark.fault("T23")
def test_no_job_is_asked_for_before_the_machine_has_run_a_box(bench: Bench) -> None:
    bench.put(make_job("1"))
    asked_before: list[int] = []

    def unfit(spec: RunSpec) -> WorkerFault | None:
        asked_before.append(bench.source.asked)
        return BROKEN if len(asked_before) < 4 else None

    bench.engine.unfit = unfit
    bench.worker.run()
    assert asked_before == [0, 0, 0, 0]
    assert bench.ends("1") == ["finished"]
    assert [fields["message"] for fields in bench.emit.named("not_polling")] == [f"no job can be taken: {BROKEN}"]
    assert len(bench.emit.named("polling_again")) == 1


@pytest.mark.fault("T23")
def test_a_setting_that_no_box_can_have_ends_the_start(bench: Bench) -> None:
    bench.put(make_job("1"))
    bench.engine.unfit = lambda spec: ConfigError("JOB_NETWORK=brigde: no such network")
    with pytest.raises(ConfigError, match="JOB_NETWORK=brigde"):
        bench.worker.run()
    assert bench.source.asked == 0


@pytest.mark.fault("T23", "S3")
@pytest.mark.parametrize("slots", [1, 2])
def test_a_runtime_that_breaks_costs_at_most_five_jobs(tmp_path: Path, slots: int) -> None:
    """Every start fails, and so does the machine's own box; mended after a while, the rest is run.

    What is in hand when it breaks is two jobs a slot at most, and it is lost with more slots, too.
    """
    bench = Bench(tmp_path, slots=slots)
    for number in range(20):
        bench.put(make_job(str(number)))
        bench.scripts[str(number)] = Script(start_error=BROKEN)
    broken_tests = 0

    def unfit(spec: RunSpec) -> WorkerFault | None:
        nonlocal broken_tests
        broken_tests += bool(bench.engine.specs)
        if broken_tests > 10:
            bench.scripts.clear()  # mended
        return BROKEN if 0 < broken_tests <= 10 else None

    bench.engine.unfit = unfit
    bench.stop_when = lambda taken, idle_s: broken_tests > 10 and idle_s > 60
    bench.budget.is_busy = lambda: bool(bench.worker.running)
    bench.worker.run()
    ends = [bench.ends(str(number)) for number in range(20)]
    assert broken_tests > 10
    assert 1 <= ends.count(["released"]) <= 5
    assert ends.count(["finished"]) == 20 - ends.count(["released"])
    assert bench.nothing_is_left()
    bench.close()


@pytest.mark.fault("T23")
def test_two_hundred_bad_jobs_hold_up_a_good_one_for_less_than_five_minutes(bench: Bench) -> None:
    for number in range(200):
        bench.put(make_job(str(number)))
        bench.scripts[str(number)] = Script(exit=Exit(1))
    bench.put(make_job("good"))
    bench.budget.is_busy = lambda: bool(bench.worker.running)
    bench.worker.run()
    assert bench.ends("good") == ["finished"]
    assert bench.budget.skipped <= 200  # seconds that it paused, of the 300 that the good one may wait
    # Tested at the start and after each five, or four where one more is in hand; no good end is between.
    assert 1 + 200 // 6 <= len(bench.engine.proved) <= 1 + 200 // 3
    told = bench.emit.named("many_failures")
    assert len(told) == 1
    assert "jobs in a row ended badly; this machine has tested itself and is well" in str(told[0]["message"])
    assert bench.emit.named("not_polling") == []


@pytest.mark.fault("T23")
def test_five_bad_ends_on_a_machine_that_fails_its_test_are_the_last(bench: Bench) -> None:
    """Its boxes start, and every program in them fails: another directory is mounted, say."""
    for number in range(12):
        bench.put(make_job(str(number)))
        bench.scripts[str(number)] = Script(exit=Exit(1))
    wrong = WorkerFault(WorkerReason.DISK, "a file that the worker writes is not seen in containers")
    bench.engine.unfit = lambda spec: wrong if bench.engine.specs else None
    bench.budget.is_busy = lambda: bool(bench.worker.running)
    bench.stop_when = lambda taken, idle_s: idle_s > 3600
    bench.worker.run()
    assert sum(bench.ends(str(number)) == ["error"] for number in range(12)) in {4, 5}
    assert bench.emit.named("many_failures") == []
    assert [fields["message"] for fields in bench.emit.named("not_polling")] == [f"no job can be taken: {wrong}"]


@pytest.mark.fault("T23", "S3")
@pytest.mark.parametrize("error", [True, False], ids=["reported", "given back"])
def test_a_machine_that_cannot_use_the_storage_does_not_eat_the_queue(bench: Bench, error: bool) -> None:
    why = "storage host s has the internal address 10.0.0.1; if that storage is yours, add the host to STORAGE_ALLOW"
    fault = WorkerFault(WorkerReason.STORAGE, why)
    bench.rules = Rules(beat_interval_s=3600.0, limits=Limits(stop_grace_s=0.1), worker_fault_is_error=error)
    bench.worker = bench.make_worker()
    for number in range(100):
        bench.transfer.failures[str(number)] = [fault]
        bench.put(make_job(str(number), inputs={str(number): "b/in"}))
    bench.budget.is_busy = lambda: bool(bench.worker.running)
    bench.stop_when = lambda taken, idle_s: bench.budget.skipped > 3600
    bench.worker.run()
    spoilt = sum(bool(bench.ends(str(number))) for number in range(100))
    assert 5 <= spoilt <= 15, "five, and then ever more rarely one, in an hour"
    [said] = bench.emit.named("giving_back")
    assert why in str(said["message"])
    bench.transfer.failures.clear()
    bench.transfer.objects[f"{URL}/b/in"] = b"input"  # its owner mended it
    bench.stop_when = lambda taken, idle_s: idle_s > 60
    bench.worker = bench.make_worker()
    bench.worker.run()
    assert sum(bench.ends(str(number)) == ["finished"] for number in range(100)) == 100 - spoilt


@pytest.mark.fault("T23")
def test_an_idle_machine_is_tested_every_ten_minutes(bench: Bench) -> None:
    bench.stop_when = lambda taken, idle_s: idle_s > 3600
    bench.worker.run()
    assert 6 <= len(bench.engine.proved) <= 7
    assert len(bench.budget.waits) >= 100


# -- trouble ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("B12")
def test_a_server_that_does_not_answer_is_asked_ever_more_rarely_and_told_once(bench: Bench) -> None:
    bench.source.replies += [SourceUnavailable("down")] * 30
    bench.put(make_job("1"))
    bench.worker.run()
    waits = bench.budget.waits[:30]
    assert all(1.0 <= wait <= 300.0 for wait in waits)
    assert max(waits[:1]) <= 60.0
    assert len(set(waits)) > 20  # spread, so that a thousand workers do not come back together
    first, *reminders = bench.emit.named("server_away")
    assert str(first["message"]).startswith("no job can be taken: down; trying again in ")
    assert all(str(event["message"]).startswith("for ") for event in reminders)
    assert len(bench.emit.named("server_back")) == 1
    assert set(bench.emit.levels("not_polling")) == {"debug"}
    assert bench.ends("1") == ["finished"]


@pytest.mark.fault("B11")
@pytest.mark.parametrize(("asked_s", "least"), [(600.0, 600.0), (0.0, 1.0), (None, 1.0)])
def test_retry_after_is_honoured_and_never_makes_a_busy_loop(bench: Bench, asked_s: float | None, least: float) -> None:
    bench.source.replies += [SourceUnavailable("busy", retry_after_s=asked_s)] * 5
    bench.put(make_job("1"))
    asked_at: list[float] = []
    real = bench.source.fetch

    def fetch(offer: Offer, wait_s: float) -> Claim | None:
        asked_at.append(bench.budget.clock())
        return real(offer, wait_s)

    bench.source.fetch = fetch  # type: ignore[method-assign]  # what is measured is when it is asked
    bench.worker.run()
    pauses = [after - before for before, after in itertools.pairwise(asked_at[:6])]
    assert len(pauses) == 5
    assert all(pause >= least for pause in pauses)


@pytest.mark.fault("B11")
def test_a_job_that_ends_meanwhile_does_not_cut_the_servers_patience_short(tmp_path: Path) -> None:
    two = Bench(tmp_path, slots=2)
    two.scripts["1"] = Script(held=True)
    two.put(make_job("1", needs={"cpu_cores": 1, "memory_mib": 64}))
    asked_at: list[float] = []
    real = two.source.fetch

    def fetch(offer: Offer, wait_s: float) -> Claim | None:
        asked_at.append(two.budget.clock())
        if len(asked_at) == 2:
            until(lambda: two.engine.containers != [])
            two.engine.containers[0].release()
            raise SourceUnavailable("busy", retry_after_s=500)
        return real(offer, wait_s)

    two.source.fetch = fetch  # type: ignore[method-assign]  # the fake's own seam, watched
    two.stop_when = lambda taken, idle_s: len(asked_at) >= 3
    two.worker.run()
    assert asked_at[2] - asked_at[1] >= 500
    two.close()


def test_nobody_is_idle_who_has_not_asked_since_the_last_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that was ago: the machine may have been asleep, and there may be a job."""
    later = [make_job("2"), make_job("3")]
    wake = bench.budget.wake

    def late() -> None:
        if not bench.worker.running and later:
            bench.put(later.pop(0))
            bench.budget.skipped += 1000.0
        wake()

    monkeypatch.setattr(bench.budget, "wake", late)
    bench.stop_when = lambda taken, idle_s: idle_s >= 3
    bench.worker = bench.make_worker(idle_limit_s=3)
    bench.put(make_job("1"))
    bench.worker.run()
    assert [bench.ends(job) for job in ("1", "2", "3")] == [["finished"]] * 3


def test_no_wait_is_longer_than_what_is_left_of_idleness(bench: Bench) -> None:
    bench.stop_when = lambda taken, idle_s: idle_s >= 3
    bench.worker = bench.make_worker(idle_limit_s=3)
    bench.worker.run()
    assert max(bench.budget.waits) <= 3


def test_a_slot_that_cannot_start_gives_job_and_share_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put(make_job("1"), make_job("2"))
    real = threading.Thread.start
    refused = iter([True])

    def start(thread: threading.Thread) -> None:
        if thread.name == "job-1" and next(refused, False):
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    bench.worker.run()
    assert bench.ends("1") == ["released"]
    assert bench.ends("2") == ["finished"]
    assert bench.nothing_is_left()


@pytest.mark.fault("B6")
def test_refused_at_the_first_question_is_for_a_person(bench: Bench) -> None:
    bench.source.replies.append(SourceRefused("403: not in the group 'workers'"))
    bench.jobs = 1
    with pytest.raises(ConfigError, match="workers"):
        bench.worker.run()


@pytest.mark.fault("B6")
def test_refused_later_is_waited_out(bench: Bench) -> None:
    bench.put(make_job("1"))
    real = bench.source.fetch
    answers = iter([None, SourceRefused("401"), SourceRefused("401")])

    def fetch(offer: Offer, wait_s: float) -> Claim | None:
        error = next(answers, None)
        if error is not None:
            raise error
        return real(offer, wait_s)

    bench.source.fetch = fetch  # type: ignore[method-assign]  # one good answer, then two refusals
    bench.put(make_job("2"))
    bench.worker.run()
    assert bench.ends("2") == ["finished"]


@pytest.mark.fault("E3")
def test_while_the_engine_is_away_nothing_is_taken(bench: Bench) -> None:
    bench.put(make_job("1"))
    bench.engine.fault = WorkerFault(WorkerReason.ENGINE, "the engine is away")
    thread = beside(bench.worker.run)
    until(lambda: len(bench.budget.waits) > 5)
    assert bench.source.asked == 0
    bench.engine.fault = None
    thread.join(20)
    assert bench.ends("1") == ["finished"]


@pytest.mark.fault("E1")
def test_an_engine_that_is_restarted_does_not_end_a_worker_that_was_well(bench: Bench) -> None:
    bench.put(make_job("1"))
    bench.jobs = 2
    thread = beside(bench.worker.run)
    until(lambda: bench.ends("1") == ["finished"] and bench.worker.running == [])
    bench.engine.fault = ConfigError("there is no socket")
    until(lambda: bench.emit.named("not_polling") != [])
    bench.source.put(make_job("2"))
    bench.engine.fault = None
    thread.join(20)
    assert bench.ends("2") == ["finished"]


def test_a_setup_that_only_a_person_can_mend_ends_the_worker_at_once(bench: Bench) -> None:
    bench.engine.fault = ConfigError("there is no container engine")
    bench.jobs = 1
    with pytest.raises(ConfigError, match="no container engine"):
        bench.worker.run()


@pytest.mark.fault("D5")
@pytest.mark.parametrize("readable", [True, False])
def test_a_job_that_cannot_be_journaled_is_not_run_and_the_worker_lives(bench: Bench, readable: bool) -> None:
    class FullDisk(Journal):
        full = 1

        def claim(self, job_id: JobId, token: str, job: Job | None) -> None:
            if FullDisk.full:
                FullDisk.full -= 1
                raise WorkerFault(WorkerReason.DISK, "the journal cannot be written: disk full")
            super().claim(job_id, token, job)

    journal = FullDisk(bench.base.path / "full.db")
    bench.worker = bench.make_worker(journal)
    if readable:
        bench.put(make_job("1"))
    else:
        bench.source.replies.append(UnreadableJob(bench.source.resume("t", JobId("1")), "x"))
        bench.jobs += 1
    bench.put(make_job("2"))
    bench.worker.run()
    assert bench.words("1") == ["released" if readable else "error"]
    assert bench.ends("2") == ["finished"]
    journal.close()


def test_no_room_on_the_disk_stops_polling_and_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put(make_job("1"))
    asked = iter(range(8))  # twice a round: is it full, and is it still full after making room
    monkeypatch.setattr(Base, "is_full", lambda self: "make room" if next(asked, None) is not None else "")
    bench.worker.run()
    assert [event["message"] for event in bench.emit.named("not_polling")] == ["no job can be taken: make room"]
    assert bench.ends("1") == ["finished"]


# -- the outbox -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("B2")
def test_an_end_that_nobody_heard_is_told_later_exactly_once(bench: Bench) -> None:
    bench.put(make_job("1"), make_job("2"))
    said = bench.source.said[JobId("1")]
    said.answers += [Standing.KEEP] * 3 + [SourceUnavailable("down")] * 5
    bench.stop_when = lambda taken, idle_s: taken >= 2 and bench.ends("1") != []
    bench.worker.run()
    assert bench.ends("1") == ["finished"]
    assert bench.ends("2") == ["finished"]
    assert bench.nothing_is_left()


@pytest.mark.fault("B3")
def test_an_end_that_stays_unheard_is_kept_for_the_next_start(bench: Bench) -> None:
    bench.put(make_job("1"))
    said = bench.source.said[JobId("1")]
    said.answers += [Standing.KEEP] * 3 + [SourceUnavailable("down")] * 1000
    bench.worker.run()
    assert bench.emit.levels("unheard") == ["warning"]
    [record] = bench.journal.records()
    assert record.outcome == Outcome(Ending.FINISHED, None, "")
    said.answers.clear()
    again = bench.make_worker()
    bench.jobs = 0
    again.run()
    assert bench.ends("1") == ["finished"]
    assert bench.nothing_is_left()


@pytest.mark.fault("B3")
def test_an_end_may_stay_unheard_for_longer_than_a_day(bench: Bench) -> None:
    """At a minute each, more rounds than a power of two has room for."""
    bench.put(make_job("1"))
    said = bench.source.said[JobId("1")]
    said.answers += [Standing.KEEP] * 3 + [SourceUnavailable("down")] * 1200
    bench.worker.run()
    for _ in range(1100):
        bench.worker._outbox.flush(now=True)
    assert 0 < bench.worker._outbox.due_in_s() <= 66
    said.answers.clear()
    bench.worker._outbox.flush(now=True)
    assert bench.ends("1") == ["finished"]
    assert bench.nothing_is_left()


# -- starting again ---------------------------------------------------------------------------------------------------


@pytest.mark.fault("A7")
def test_an_end_on_record_is_told_and_not_decided_anew(bench: Bench) -> None:
    job = make_job("1")
    bench.journal.claim(job.id, "t", job)
    bench.journal.settling(job.id, Outcome(Ending.FINISHED, None, ""))
    bench.worker.run()
    assert bench.words("1") == ["finished"]
    assert bench.nothing_is_left()


@pytest.mark.fault("D7")
@pytest.mark.fault("E10")
def test_what_no_record_knows_is_cleared_at_the_start(bench: Bench) -> None:
    stray = make_job("9")
    hold = bench.budget.reserve(stray.needs)
    spec = build_run_spec(
        stray,
        hold.share,
        image=bench.engine.prepare("busybox", Halt(), lambda done, total: None),
        files_host_path=str(bench.base.path),
        attempt=1,
        instance="i",
        policy=BoxPolicy(),
    )
    hold.release()
    bench.engine.start(spec)
    (bench.base.path / "jobs" / "9" / "files").mkdir(parents=True)
    bench.worker.run()
    assert bench.emit.levels("container_reaped") == ["warning"]
    assert JobId("9") not in bench.source.said  # nothing is said of a job that is not ours any more
    assert bench.nothing_is_left()


@pytest.mark.fault("E10")
def test_strays_are_looked_for_every_five_minutes_and_young_ones_left_alone(bench: Bench) -> None:
    """A create whose answer was lost, or a removal that failed: nobody else would clear them away."""
    bench.engine = FakeEngine(bench._script, clock=bench.budget.clock)
    bench.worker = bench.make_worker()
    bench.stop_when = lambda taken, idle_s: len(bench.emit.named("container_reaped")) > 0 or idle_s > 2000
    image = bench.engine.prepare("busybox", Halt(), lambda done, total: None)
    share = Share(cpu_cores=1.0, memory_mib=64)
    spec = build_run_spec(
        make_job("9"), share, image=image, files_host_path="/x", attempt=1, instance="i", policy=BoxPolicy()
    )
    real = bench.source.fetch
    born: list[float] = []

    def fetch(offer: Offer, wait_s: float) -> Claim | None:
        if not born:  # it appears once the worker has looked around at its start
            bench.engine.start(spec)
            born.append(bench.budget.clock())
        return real(offer, wait_s)

    bench.source.fetch = fetch  # type: ignore[method-assign]  # brings the stray
    bench.worker.run()
    assert bench.emit.levels("container_reaped") == ["warning"]
    assert 300 <= bench.budget.clock() - born[0] <= 700
    assert bench.engine.containers == []


# -- leaving ----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F1")
def test_an_idle_worker_leaves_at_once(bench: Bench) -> None:
    bench.stop_when = lambda taken, idle_s: False
    thread = beside(bench.worker.run)
    until(lambda: bench.source.asked > 0)
    bench.worker.leave(Leaving.DRAIN)
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.fault("F2")
def test_the_first_signal_lets_jobs_end_and_takes_no_other(bench: Bench) -> None:
    bench.scripts["1"] = Script(held=True)
    bench.put(make_job("1"), make_job("2"))
    thread = beside(bench.worker.run)
    until(lambda: bench.engine.containers != [])
    bench.worker.leave(Leaving.DRAIN)
    until(lambda: bench.emit.named("draining") != [])
    assert "finishing job 1" in str(bench.emit.named("draining")[0]["message"])
    bench.engine.containers[0].release()
    thread.join(20)
    assert bench.ends("1") == ["finished"]
    assert bench.words("2") == []
    assert bench.nothing_is_left()


def stuck(bench: Bench, where: str, *, waits: bool = True) -> None:
    """Job 1 waits for what may be away for hours, or is slow."""
    if where == "pull":
        bench.engine.pull_waits = [("the registry does not answer", 1800.0)] if waits else []
        bench.engine.pull_stalls = True
    else:
        bench.transfer.troubles = {"in": "the storage answers HTTP 503"} if waits else {}
        bench.transfer.stall.add("in")
    bench.transfer.objects[f"{URL}/b/in"] = b"input"
    bench.put(make_job("1", inputs={"in": "b/in"}))


WHAT_WAITS = {
    "pull": "giving it back: the pull of busybox:latest has to wait: the registry does not answer",
    "download": "giving it back: the download of in has to wait: the storage answers HTTP 503",
}


@pytest.mark.fault("F2", "C21")
@pytest.mark.parametrize("where", WHAT_WAITS)
def test_the_first_signal_gives_back_what_waits_in_trouble_and_has_not_run(two: Bench, where: str) -> None:
    stuck(two, where)
    two.stop_when = lambda taken, idle_s: False
    thread = beside(two.worker.run)
    until(lambda: two.emit.named("transfer_retrying") != [])
    two.worker.leave(Leaving.DRAIN)
    thread.join(20)
    assert not thread.is_alive()
    assert two.ends("1") == ["released"]
    assert two.worker.worker_faults == 0
    assert [event["message"] for event in two.emit.named("draining") if event.get("job") == "1"] == [WHAT_WAITS[where]]
    assert two.nothing_is_left()


@pytest.mark.fault("F2", "C21")
@pytest.mark.parametrize("where", WHAT_WAITS)
def test_what_is_slow_is_finished_and_given_back_when_it_begins_to_wait(
    two: Bench, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck(two, where, waits=False)
    halts: list[Halt] = []
    made = Halt.__init__

    def keep(self: Halt, **how: Callable[[str, str], None]) -> None:
        made(self, **how)
        halts.append(self)

    monkeypatch.setattr(Halt, "__init__", keep)
    two.stop_when = lambda taken, idle_s: False
    thread = beside(two.worker.run)
    until(lambda: two.emit.named("stage_in") != [] and len(halts) == 2)
    two.worker.leave(Leaving.DRAIN)
    until(lambda: two.emit.named("draining") != [])
    waits = len(two.budget.waits)
    until(lambda: len(two.budget.waits) > waits + 5)
    assert "finishing job 1" in str(two.emit.named("draining")[0]["message"])
    assert two.ends("1") == []
    two.budget.is_busy = lambda: True  # a drain that would only look again after its interval would take 20 s here
    halts[1].waits_for(where, "the storage is away")
    thread.join(10)
    assert not thread.is_alive()
    assert two.ends("1") == ["released"]
    assert two.nothing_is_left()


@pytest.mark.fault("F2", "C21")
@pytest.mark.parametrize("where", WHAT_WAITS)
def test_a_job_whose_trouble_is_over_is_finished(two: Bench, where: str) -> None:
    stuck(two, where)
    two.engine.pull_stalls = False
    two.transfer.stall.clear()
    two.scripts["1"] = Script(held=True)
    two.stop_when = lambda taken, idle_s: False
    thread = beside(two.worker.run)
    until(lambda: two.engine.containers != [])
    assert len(two.emit.named("transfer_retrying")) == len(two.emit.named("transfer_recovered")) == 1
    two.worker.leave(Leaving.DRAIN)
    until(lambda: two.emit.named("draining") != [])
    waits = len(two.budget.waits)
    until(lambda: len(two.budget.waits) > waits + 5)
    two.engine.containers[0].release()
    thread.join(20)
    assert two.ends("1") == ["finished"]
    assert two.nothing_is_left()


@pytest.mark.fault("F2", "C21")
@pytest.mark.parametrize("error", [True, False], ids=["nothing is given back", "it had enough"])
def test_what_waits_in_trouble_is_not_given_back_otherwise(two: Bench, error: bool) -> None:
    two.rules = Rules(beat_interval_s=3600.0, worker_fault_is_error=error)
    two.worker = two.make_worker()
    stuck(two, "pull")
    if error:
        two.stop_when = lambda taken, idle_s: False
    thread = beside(two.worker.run)
    until(lambda: two.emit.named("transfer_retrying") != [])
    if error:
        two.worker.leave(Leaving.DRAIN)
        until(lambda: two.emit.named("draining") != [])
    waits = len(two.budget.waits)
    until(lambda: len(two.budget.waits) > waits + 5)
    assert two.ends("1") == []
    two.engine.pull_stalls = False
    thread.join(20)
    assert two.ends("1") == ["finished"]
    assert two.nothing_is_left()


@pytest.mark.fault("F3")
def test_the_second_signal_stops_the_jobs_and_gives_them_back(two: Bench) -> None:
    two.scripts = {"1": Script(held=True), "2": Script(held=True, ignores_term=True)}
    two.put(make_job("1"), make_job("2"))
    thread = beside(two.worker.run)
    until(lambda: len(two.engine.containers) == 2)
    two.worker.leave(Leaving.DRAIN)
    two.worker.leave(Leaving.STOP_JOBS)
    two.worker.leave(Leaving.DRAIN)  # never back
    thread.join(20)
    assert two.ends("1") == two.ends("2") == ["released"]
    assert two.worker.worker_faults == 0
    assert two.nothing_is_left()


def test_what_only_a_person_can_mend_waits_for_jobs_of_an_earlier_process(two: Bench) -> None:
    """A wrong password at the restart must not cost the job that runs on."""
    two.scripts["1"] = Script(held=True)
    job = make_job("1")
    two.journal.claim(job.id, "t", job)
    two.source.replies = [ConfigError("a person must look")] * 100_000
    two.stop_when = lambda taken, idle_s: False
    raised: list[ConfigError] = []

    def run() -> None:
        try:
            two.worker.run()
        except ConfigError as error:
            raised.append(error)

    thread = beside(run)
    until(lambda: two.engine.containers != [] and two.emit.named("not_polling") != [])
    assert raised == []
    two.engine.containers[0].release()
    thread.join(20)
    assert [str(error) for error in raised] == ["a person must look"]
    assert two.ends("1") == ["finished"]
    assert two.nothing_is_left()


def test_many_jobs_in_two_slots_with_outages_each_end_exactly_once(two: Bench) -> None:
    for number in range(40):
        two.put(make_job(str(number)))
        if number % 3 == 0:
            two.source.said[JobId(str(number))].answers += [SourceUnavailable("x")] * (number % 7)
        if number % 5 == 0:
            two.scripts[str(number)] = Script(exit=Exit(number % 2))
    two.stop_when = lambda taken, idle_s: taken >= 40 and all(two.ends(str(number)) for number in range(40))
    two.worker.run()
    for number in range(40):
        assert two.ends(str(number)) == ["error" if number % 5 == 0 and number % 2 else "finished"]
        assert two.words(str(number))[-1] == two.ends(str(number))[0]
    assert two.nothing_is_left()
