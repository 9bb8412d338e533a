"""watching: what ends a container besides itself, and what does not, on a fake engine and a clock of the test's."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from jobfetcher.blame import Turns
from jobfetcher.core.errors import JobReason, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.run import Exit, Taken, Written
from jobfetcher.watching import Limits, Watcher
from jobfetcher.workspace import Base, Full, Workspace
from tests.support.jobs import Emitted, FakeClock
from tests.support.services import wait_until

SEVEN, EIGHT = JobId("7"), JobId("8")
DEADLINE_S = 10.0


@dataclass
class Scripted:
    """A container under a test's control. `on_slice` is called at each wait that ends without an exit.

    Each wait takes `slice_s` seconds of the clock.
    """

    clock: FakeClock
    slice_s: float = 2.0
    end: Exit | None = None
    paused: bool = False
    layer: Written = field(default_factory=Written)
    stop_faults: int = 0
    stopped: list[float] = field(default_factory=list)
    on_slice: Callable[[], None] = lambda: None
    ended: threading.Event = field(default_factory=threading.Event)
    id: str = "c"

    def wait(self, timeout_s: float) -> Exit | None:
        self.on_slice()
        if self.ended.wait(0.005) or self.end is not None:
            return self.end or Exit(143)
        self.clock.now += self.slice_s
        return None

    def is_paused(self) -> bool:
        return self.paused

    def written(self) -> Written:
        return self.layer

    def stop(self, grace_s: float) -> None:
        self.stopped.append(grace_s)
        if self.stop_faults:
            self.stop_faults -= 1
            raise WorkerFault(WorkerReason.ENGINE, "it is still running")
        self.ended.set()

    def save_logs(self, path: Path) -> None:
        raise AssertionError("a watcher reads no logs")

    def last_lines(self, count: int) -> str:
        raise AssertionError("a watcher reads no logs")

    def remove(self) -> None:
        raise AssertionError("a watcher removes nothing")


class Bench:
    def __init__(self, path: Path) -> None:
        self.base = Base(path, reserve_mib=0)
        self.base.job(SEVEN).create()
        self.clock, self.emit, self.halt = FakeClock(0.0), Emitted(), Halt()
        self.container = Scripted(self.clock)
        self.stops_noted: list[int] = []

    def asked_to_stop(self) -> None:
        self.stops_noted.append(len(self.container.stopped))

    def watcher(
        self,
        max_runtime_s: float | None = None,
        disk_limit_mib: int | None = None,
        sleep: Callable[[float], None] = lambda _: None,
    ) -> Watcher:
        limits = Limits(0.01, max_runtime_s, disk_limit_mib)
        return Watcher(self.base, limits, self.emit, clock=self.clock, sleep=sleep)

    def wait(
        self,
        *,
        max_runtime_s: float | None = None,
        disk_limit_mib: int | None = None,
        remove: Callable[[], None] = lambda: None,
        sleep: Callable[[float], None] = lambda _: None,
    ) -> Exit:
        watcher = self.watcher(max_runtime_s, disk_limit_mib, sleep)
        return watcher.wait(SEVEN, self.container, self.halt, self.asked_to_stop, remove)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "base")
    yield bench
    bench.base.close()


def test_an_end_is_returned_as_it_is(bench: Bench) -> None:
    bench.container.end = Exit(3)
    assert bench.wait() == Exit(3)
    assert bench.container.stopped == []


@pytest.mark.parametrize("reason", [reason for reason in StopReason if reason is not StopReason.DETACH])
def test_a_halt_stops_it(bench: Bench, reason: StopReason) -> None:
    bench.container.on_slice = lambda: bench.halt.set(reason)
    assert bench.wait().code == 143
    assert bench.container.stopped == [0.01]
    assert bench.stops_noted == [0], "noted once, and before the engine was asked"


@pytest.mark.fault("J1")
def test_a_note_that_cannot_be_made_does_not_save_the_job(bench: Bench) -> None:
    def refuse() -> None:
        raise WorkerFault(WorkerReason.DISK, "the disk is full")

    bench.halt.set(StopReason.CANCELLED)
    assert bench.watcher().wait(SEVEN, bench.container, bench.halt, refuse, lambda: None).code == 143


@pytest.mark.fault("F2")
def test_a_detach_leaves_it_running(bench: Bench) -> None:
    bench.container.on_slice = lambda: bench.halt.set(StopReason.DETACH)
    with pytest.raises(Stopped):
        bench.wait()
    assert bench.container.stopped == []
    assert bench.clock.now <= 2 * bench.container.slice_s


def test_the_time_limit_stops_it_and_is_named(bench: Bench) -> None:
    end = bench.wait(max_runtime_s=7.0)
    assert (end.code, end.stopped_for) == (143, JobReason.TIME_LIMIT)
    assert "time limit of this worker, 7 s" in end.error
    assert bench.clock.now >= 7.0  # and more: this clock runs on while the stop takes its time
    assert bench.container.stopped == [0.01]


HERE, ENGINES = 1, 2  # two disks, by their numbers
GIB = 1 << 30


class Disks:
    """Two disks under a test's control: what is free of them, which is full, and what the job's directory takes."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = {HERE: Taken(100 * GIB, 10**6), ENGINES: Taken(100 * GIB, 10**6)}
        self.full: Full | None = None
        self.files = Taken()
        self.settled = 0
        self._base = bench.base
        monkeypatch.setattr(bench.base, "free", lambda: dict(self.free))
        monkeypatch.setattr(bench.base, "find_full", lambda: self.full)
        monkeypatch.setattr(bench.base, "settle", self._settle)
        monkeypatch.setattr(bench.base, "used_on", self._used_on)
        monkeypatch.setattr(Workspace, "taken", lambda workspace, within_s=0.0: self.files)

    def _settle(self) -> None:
        self.settled += 1

    def _used_on(self, disk: int, files: Taken, layers: Taken) -> Taken:
        return files if disk == HERE else layers

    def fill(self, disk: int, left: Taken, *, why: str = "the disk has 3 GiB left") -> None:
        """So much is left of a disk, and that is too little."""
        self.free[disk] = left
        self.full = Full(why, disk, "inodes" if left.inodes < 1000 else "bytes", 5 * GIB if left.inodes >= 1000 else 0)

    def gives_back(self, disk: int, back: Taken) -> Callable[[], None]:
        """A removal of the container that frees so much."""

        def remove() -> None:
            self.free[disk] += back
            self.full = None

        return remove


@pytest.fixture
def disks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Disks:
    return Disks(bench, monkeypatch)


@pytest.mark.fault("D3")
def test_a_job_with_whose_container_the_room_comes_back_has_filled_the_disk(bench: Bench, disks: Disks) -> None:
    """Nothing of it can be counted: it holds files open that have no name, and this worker may not look."""
    bench.container.on_slice = lambda: disks.fill(ENGINES, Taken(3 * GIB, 10**6)) if bench.clock.now > 20 else None
    end = bench.wait(remove=disks.gives_back(ENGINES, Taken(90 * GIB)))
    assert end.stopped_for is JobReason.DISK_FILLED
    said = (
        "stopped: the job filled the disk (it used 90.0 GiB, of which 90.0 GiB came back when its container was gone)"
    )
    assert end.error == f"{said}; the disk has 3 GiB left"


@pytest.mark.fault("D3")
def test_a_flood_of_inodes_is_the_jobs_doing_too(bench: Bench, disks: Disks) -> None:
    def flood() -> None:
        disks.fill(HERE, Taken(90 * GIB, 100), why="hardly any inodes left")
        disks.files = Taken(0, 600_000)

    bench.container.on_slice = flood
    end = bench.wait(remove=disks.gives_back(HERE, Taken(0, 300_000)))
    assert end.stopped_for is JobReason.DISK_FILLED
    assert "(it used 900,000 inodes, of which 300,000 inodes came back" in end.error


@pytest.mark.fault("D3")
def test_what_was_in_its_directory_before_it_ran_does_not_count(bench: Bench, disks: Disks) -> None:
    """Inputs of 50 GiB: they took none of what was lost since."""
    disks.files = Taken(50 * GIB, 1)
    bench.container.on_slice = lambda: disks.fill(HERE, Taken(3 * GIB, 10**6))
    assert bench.wait(remove=disks.gives_back(HERE, Taken(1 * GIB))).stopped_for is WorkerReason.DISK
    assert disks.settled == 1  # it was looked again, for a disk may say late what is free


@pytest.mark.fault("D3")
def test_a_disk_that_says_late_what_is_free_is_waited_for(bench: Bench, disks: Disks) -> None:
    bench.container.on_slice = lambda: disks.fill(ENGINES, Taken(3 * GIB, 10**6))
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            disks.free[ENGINES] += Taken(80 * GIB)

    assert bench.wait(sleep=sleep).stopped_for is JobReason.DISK_FILLED
    assert len(pauses) == 4


@pytest.mark.fault("D3")
def test_a_disk_that_others_filled_is_not_the_jobs_fault(bench: Bench, disks: Disks) -> None:
    bench.container.on_slice = lambda: disks.fill(ENGINES, Taken(3 * GIB, 10**6))
    end = bench.wait(remove=disks.gives_back(ENGINES, Taken(1 * GIB)))
    assert end.stopped_for is WorkerReason.DISK
    assert "the disk ran full while the job ran" in end.error


@pytest.mark.fault("D3")
@pytest.mark.parametrize(("seen", "reason"), [(Taken(), WorkerReason.DISK), (Taken(80 * GIB), JobReason.DISK_FILLED)])
def test_room_that_another_job_leaves_meanwhile_is_not_this_ones(
    bench: Bench, disks: Disks, seen: Taken, reason: JobReason | WorkerReason
) -> None:
    """The one that filled the disk ended by itself, and its container goes while this one is being stopped: then only
    what can be seen of this one counts."""
    bench.container.on_slice = lambda: disks.fill(ENGINES, Taken(3 * GIB, 10**6))
    bench.container.layer = Written(engine=seen)

    def remove() -> None:
        with bench.base.making_room():
            disks.gives_back(ENGINES, Taken(97 * GIB))()

    assert bench.wait(remove=remove).stopped_for is reason


@pytest.mark.fault("D3")
def test_a_run_that_an_earlier_process_began_is_guilty_only_of_half_of_the_whole_disk(
    bench: Bench, disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what was free when it began: others may have filled the disk before this process came."""
    monkeypatch.setattr(bench.base, "sizes", lambda: {ENGINES: Taken(100 * GIB, 10**6)})
    disks.free[ENGINES] = Taken(6 * GIB, 10**6)
    bench.container.on_slice = lambda: disks.fill(ENGINES, Taken(4 * GIB, 10**6))
    for back, reason in ((1 * GIB, WorkerReason.DISK), (60 * GIB, JobReason.DISK_FILLED)):
        bench.container.ended.clear()
        watcher = bench.watcher()
        remove = disks.gives_back(ENGINES, Taken(back))
        end = watcher.wait(SEVEN, bench.container, bench.halt, bench.asked_to_stop, remove, began_before=True)
        assert end.stopped_for is reason


@pytest.mark.fault("D3")
def test_a_disk_that_was_as_good_as_full_was_not_filled_by_a_handful(bench: Bench, disks: Disks) -> None:
    """Three MiB were gone in all and the job had two of them: less than a twentieth of the reserve is no crime."""
    disks.free[ENGINES] = Taken(5 * GIB + (1 << 20), 10**6)
    bench.container.on_slice = lambda: disks.fill(ENGINES, Taken(5 * GIB - (2 << 20), 10**6))
    assert bench.wait(remove=disks.gives_back(ENGINES, Taken(2 << 20))).stopped_for is WorkerReason.DISK


@pytest.mark.fault("D3")
@pytest.mark.parametrize(("disk", "reason"), [(HERE, WorkerReason.DISK), (ENGINES, JobReason.DISK_FILLED)])
def test_whose_fault_it_is_is_asked_of_the_full_disk_alone(
    bench: Bench, disks: Disks, disk: int, reason: JobReason | WorkerReason
) -> None:
    """The job held 10 GiB of the engine's disk; ours loses 17 GiB to somebody, or the engine's 15."""
    disks.free = {HERE: Taken(20 * GIB, 10**6), ENGINES: Taken(18 * GIB, 10**6)}
    bench.container.on_slice = lambda: disks.fill(disk, Taken(3 * GIB, 10**6))
    assert bench.wait(remove=disks.gives_back(ENGINES, Taken(10 * GIB))).stopped_for is reason


@pytest.mark.fault("D6")
def test_a_disk_that_cannot_be_written_is_no_jobs_fault(bench: Bench, disks: Disks) -> None:
    disks.full = Full("it is mounted read-only")
    end = bench.wait(remove=lambda: pytest.fail("it is the runner's to remove"))
    assert end.stopped_for is WorkerReason.DISK


@pytest.mark.fault("D3")
def test_the_disk_limit_of_a_job(bench: Bench) -> None:
    def write() -> None:
        with (bench.base.job(SEVEN).files / "big").open("ab") as file:
            file.write(b"x" * (1 << 20))

    bench.container.on_slice = write
    end = bench.wait(disk_limit_mib=5)
    assert end.stopped_for is JobReason.DISK_FILLED
    assert re.fullmatch(r"stopped: the job used [678] MiB of disk, and JOB_DISK_LIMIT is 5 MiB", end.error)


@pytest.mark.fault("D3")
def test_the_disk_limit_counts_layer_and_deleted_files(bench: Bench) -> None:
    bench.container.layer = Written(Taken(3 << 20), Taken(3 << 20))
    end = bench.wait(disk_limit_mib=5)
    assert end.stopped_for is JobReason.DISK_FILLED


@pytest.mark.fault("D3", "J5")
@pytest.mark.parametrize("fault", ["the job's", "another's", "no full disk"])
def test_a_fault_of_the_disk_after_the_run_is_the_jobs_where_it_filled_it(
    bench: Bench, disks: Disks, fault: str
) -> None:
    """It ended before anybody looked, and the worker had no room for its log."""
    bench.container.end = Exit(0)
    watcher = bench.watcher()
    removed: list[int] = []
    assert watcher.wait(SEVEN, bench.container, bench.halt, bench.asked_to_stop, lambda: None) == Exit(0)
    disks.files = Taken(60 * GIB if fault == "the job's" else 1 * GIB, 1)
    if fault != "no full disk":
        disks.fill(HERE, Taken(0, 10**6))
    found = watcher.blame.of_a_fault(SEVEN, lambda: removed.append(1))
    if fault == "the job's":
        assert found is not None
        assert found.reason is JobReason.DISK_FILLED
        again = watcher.blame.of_a_fault(SEVEN, lambda: removed.append(1))
        assert str(again) == str(found), "the verdict stands"
    else:
        assert found is None
    assert removed == ([] if fault == "no full disk" else [1])
    watcher.blame.close(SEVEN)
    assert watcher.blame.of_a_fault(SEVEN, lambda: removed.append(1)) is None


# -- several jobs ------------------------------------------------------------------------------------------------------


class TwoJobs:
    """Seven and eight run at once. Each look at `called` is one slice of the watching of both."""

    def __init__(self, bench: Bench, seven: int, eight: int) -> None:
        self.measured: list[JobId] = []
        self.stuck: set[JobId] = set()
        self.turns = Turns(bench.base, lambda job_id: job_id in self.stuck)
        self.holds = {SEVEN: seven, EIGHT: eight}
        self.leave: dict[JobId, ExitStack] = {}
        for job_id in self.holds:
            bench.base.job(job_id).create()
            self.leave[job_id] = ExitStack()
            self.leave[job_id].enter_context(self.turns.running(job_id, partial(self._measure, job_id)))

    def _measure(self, job_id: JobId, full: Full) -> int:
        assert full.disk == HERE
        self.measured.append(job_id)
        return self.holds[job_id]

    def called(self) -> list[JobId]:
        return [job_id for job_id in self.holds if self.turns.called(job_id) is not None]


@pytest.mark.fault("D3")
def test_of_two_jobs_the_one_that_holds_most_is_stopped_first_and_the_other_only_if_that_did_not_help(
    bench: Bench, disks: Disks
) -> None:
    disks.fill(HERE, Taken(3 * GIB, 10**6))
    full = disks.full
    assert full is not None
    two = TwoJobs(bench, seven=1, eight=2)
    two.turns.take(full)  # whoever sees it first
    assert two.called() == [EIGHT]
    two.turns.take(full)
    assert two.called() == [EIGHT], "one at a time"
    two.leave[EIGHT].close()
    assert two.called() == []
    two.turns.take(full)  # still full: what eight left is on its way out, or being deleted
    assert two.called() == []
    disks.free[HERE] = Taken(1 * GIB, 10**6)  # but somebody goes on filling it
    two.turns.take(full)
    assert two.called() == [SEVEN]
    two.leave[SEVEN].close()
    assert two.measured == [SEVEN, EIGHT], "the last one need not be measured"


@pytest.mark.fault("D3")
def test_when_the_last_one_is_gone_with_all_it_left_it_is_the_turn_of_the_next(bench: Bench, disks: Disks) -> None:
    disks.fill(HERE, Taken(3 * GIB, 10**6))
    assert disks.full is not None
    two = TwoJobs(bench, seven=2, eight=1)
    two.turns.take(disks.full)
    assert two.called() == [SEVEN]
    two.leave[SEVEN].close()
    bench.base.job(SEVEN).remove()
    two.turns.take(disks.full)
    assert two.called() == [EIGHT]
    two.leave[EIGHT].close()


@pytest.mark.fault("D3", "E5")
def test_one_that_cannot_be_killed_does_not_keep_its_turn(bench: Bench, disks: Disks) -> None:
    disks.fill(HERE, Taken(3 * GIB, 10**6))
    assert disks.full is not None
    two = TwoJobs(bench, seven=2, eight=1)
    two.turns.take(disks.full)
    two.stuck.add(SEVEN)
    two.turns.take(disks.full)
    assert two.called() == [EIGHT]
    for leave in two.leave.values():
        leave.close()


@pytest.mark.fault("D3")
def test_a_job_whose_turn_it_is_is_stopped_at_its_next_slice(bench: Bench, disks: Disks) -> None:
    """Another job saw that the disk is full. This one holds most, and looks at the disk only every five seconds."""
    watcher = bench.watcher()
    looks: list[float] = []

    def other_sees() -> None:
        disks.full = Full("full", HERE, "bytes", 5 * GIB)
        watcher._turns.take(disks.full)
        disks.full = None
        looks.append(bench.clock.now)

    bench.container.on_slice = other_sees
    end = watcher.wait(SEVEN, bench.container, bench.halt, bench.asked_to_stop, lambda: None)
    assert end.stopped_for is WorkerReason.DISK
    assert len(bench.container.stopped) == 1
    assert bench.stops_noted == [0]


@pytest.mark.fault("E11")
def test_a_pause_is_told_after_ten_minutes_once(bench: Bench) -> None:
    bench.container.paused = True

    def end() -> None:
        if bench.clock.now > 3000:
            bench.container.end = Exit(0)

    bench.container.slice_s, bench.container.on_slice = 10.0, end
    assert bench.wait() == Exit(0)
    [told] = bench.emit.named("paused")
    assert "docker unpause" in str(told["message"])


@pytest.mark.fault("E5")
def test_what_cannot_be_killed_is_stuck_until_it_is_gone(bench: Bench) -> None:
    bench.container.stop_faults = 10**9
    watcher = bench.watcher()
    bench.halt.set(StopReason.CANCELLED)
    ends: list[Exit] = []
    thread = threading.Thread(
        target=lambda: ends.append(watcher.wait(SEVEN, bench.container, bench.halt, bench.asked_to_stop, lambda: None))
    )
    thread.start()
    try:
        wait_until(lambda: bench.emit.levels("stuck") == ["error"], "it is told that it is stuck", DEADLINE_S)
        assert SEVEN in watcher.stuck
    finally:
        bench.container.end = Exit(137)
        thread.join(DEADLINE_S)
    assert ends == [Exit(137)]
    assert watcher.stuck == {}
    assert bench.container.stopped
