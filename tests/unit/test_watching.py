"""watching: what ends a container besides itself, and what does not, on a fake engine and a clock of the test's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobfetcher.core.errors import JobReason, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.run import Exit
from jobfetcher.watching import Limits, Watcher
from jobfetcher.workspace import Base, Full
from tests.support.jobs import Emitted, FakeClock
from tests.support.services import wait_until

SEVEN = JobId("7")
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
    written: int = 0
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

    def written_bytes(self) -> int:
        return self.written

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

    def watcher(self, max_runtime_s: float | None = None, disk_limit_mib: int | None = None) -> Watcher:
        return Watcher(self.base, Limits(0.01, max_runtime_s, disk_limit_mib), self.emit, clock=self.clock)

    def wait(self, *, max_runtime_s: float | None = None, disk_limit_mib: int | None = None) -> Exit:
        return self.watcher(max_runtime_s, disk_limit_mib).wait(SEVEN, self.container, self.halt, self.asked_to_stop)


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
    assert bench.watcher().wait(SEVEN, bench.container, bench.halt, refuse).code == 143


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


def fills(bench: Bench, monkeypatch: pytest.MonkeyPatch, full: Full, *free: dict[int, int], after_s: float = 0) -> None:
    """Have what is free of two disks go down like this, and one of them full `after_s`."""
    said = iter(free)
    monkeypatch.setattr(bench.base, "free_bytes", lambda: next(said))
    monkeypatch.setattr(bench.base, "find_full", lambda: None if bench.clock.now < after_s else full)
    monkeypatch.setattr(bench.base, "used_on", lambda disk, files, layers: files if disk == HERE else layers)


@pytest.mark.fault("D3")
def test_a_job_that_fills_the_disk_is_stopped_for_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Full("the disk has 3 GiB left", ENGINES)
    fills(bench, monkeypatch, full, {ENGINES: 100 << 30}, {ENGINES: 3 << 30}, after_s=20)
    bench.container.written = 90 << 30
    end = bench.wait()
    assert end.stopped_for is JobReason.DISK_FILLED
    assert "filled the disk (it used 90.0 GiB); the disk has 3 GiB left" in end.error


@pytest.mark.fault("D3")
def test_a_disk_that_others_filled_is_not_the_jobs_fault(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Full("the disk has 3 GiB left", ENGINES)
    fills(bench, monkeypatch, full, {ENGINES: 100 << 30}, {ENGINES: 3 << 30})
    bench.container.written = 1 << 30
    end = bench.wait()
    assert end.stopped_for is WorkerReason.DISK
    assert "the disk ran full while the job ran" in end.error


@pytest.mark.fault("D3")
@pytest.mark.parametrize(("disk", "reason"), [(HERE, WorkerReason.DISK), (ENGINES, JobReason.DISK_FILLED)])
def test_whose_fault_it_is_is_asked_of_the_full_disk_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, disk: int, reason: JobReason | WorkerReason
) -> None:
    """Ours loses 17 GiB to somebody while the job writes 10 GiB to the engine's; or the engine's loses 15."""
    free = {HERE: 20 << 30, ENGINES: 18 << 30}
    later = {HERE: 3 << 30, ENGINES: 8 << 30} if disk == HERE else {HERE: 3 << 30, ENGINES: 3 << 30}
    fills(bench, monkeypatch, Full("it is full", disk), free, later)
    bench.container.written = 10 << 30
    assert bench.wait().stopped_for is reason


@pytest.mark.fault("D6")
def test_a_disk_that_cannot_be_written_is_no_jobs_fault(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    fills(bench, monkeypatch, Full("it is mounted read-only"), {HERE: 20 << 30})
    bench.container.written = 10 << 30
    assert bench.wait().stopped_for is WorkerReason.DISK


@pytest.mark.fault("D3")
def test_the_disk_limit_of_a_job(bench: Bench) -> None:
    def write() -> None:
        with (bench.base.job(SEVEN).files / "big").open("ab") as file:
            file.write(b"x" * (1 << 20))

    bench.container.on_slice = write
    end = bench.wait(disk_limit_mib=5)
    assert end.stopped_for is JobReason.DISK_FILLED
    assert "JOB_DISK_LIMIT is 5 MiB" in end.error


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
        target=lambda: ends.append(watcher.wait(SEVEN, bench.container, bench.halt, bench.asked_to_stop))
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
