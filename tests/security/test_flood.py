"""A job that prints without end costs its own time, not the machine's (FAULTS.md T29)."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from demo.busybox_image import IMAGE
from jobfetcher.core.ports import Container
from jobfetcher.engine.api import Answer
from jobfetcher.engine.docker import DockerContainer, put_before
from jobfetcher.engine.flood import HOLD_S, SPAN_S, Restraint
from tests.support.boxes import LONG_S, DockerBench, docker_bench
from tests.support.private_engine import PrivateEngine, private_engine
from tests.support.services import wait_until

pytestmark = pytest.mark.fault("T29")

#: Of the row: a minute of flood beside a job takes less of the engine's processor time than this, in cores.
FLOOD_S, BAR_CORES = 60.0, 0.3

ONE_LETTER, LONG_LINE = "yes", f"yes {'0123456789' * 10}"


@pytest.fixture(scope="module")
def own_engine(engine: docker.APIClient, busybox: str) -> Iterator[PrivateEngine]:
    """An engine whose processor time is this test's alone."""
    with private_engine() as own:
        own.copy_image(engine, IMAGE)
        yield own


@pytest.fixture
def own_bench(own_engine: PrivateEngine, tmp_path: Path) -> Iterator[DockerBench]:
    with docker_bench(IMAGE, tmp_path / "files", url=own_engine.url) as ready:
        yield ready


def cpu_s(pid: int) -> float:
    """Processor time that a process has used, in seconds (proc_pid_stat(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def paused(bench: DockerBench, container: Container) -> bool:
    """What the engine says of it; `is_paused` speaks of what a person did."""
    found = bench.engine.api.inspect(container.id)
    return found is not None and bool(found["State"]["Paused"])


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.parametrize("command", [ONE_LETTER, LONG_LINE], ids=["one-letter", "long-line"])
def test_a_minute_of_flood_costs_the_engine_a_part_of_a_core(
    own_engine: PrivateEngine, own_bench: DockerBench, command: str
) -> None:
    container = own_bench.engine.start(own_bench.spec(command))
    try:
        before, began = cpu_s(own_engine.pid), time.monotonic()
        while time.monotonic() - began < FLOOD_S:
            assert container.wait(2.0) is None
        assert (cpu_s(own_engine.pid) - before) / (time.monotonic() - began) < BAR_CORES
    finally:
        container.remove()


@pytest.mark.docker
def test_a_job_that_floods_is_paused_and_told_of_and_ends_when_it_is_told_to(
    own_bench: DockerBench, tmp_path: Path
) -> None:
    heard: list[str] = []
    own_bench.engine.emit = lambda name, **fields: heard.append(name)
    container = own_bench.engine.start(own_bench.spec("trap 'echo was asked; exit 3' TERM; yes & wait"))
    try:
        wait_until(lambda: container.wait(0.5) is not None or paused(own_bench, container), "it is paused", LONG_S)
        assert heard == ["held_back"]
        assert not container.is_paused()  # so nobody is told to unpause it
        assert container.wait(0.1) is None
        container.stop(10)
        end = container.wait(LONG_S)
        assert end is not None
        assert end.code == 3  # it heard the TERM, which what is paused does not
        container.save_logs(tmp_path / "log")
        with (tmp_path / "log").open() as log:
            assert log.readline().startswith("[jobfetcher] this job was paused for 30 s, because it printed")
    finally:
        container.remove()


@pytest.mark.docker
def test_a_worker_that_leaves_lets_go_of_what_it_holds(own_bench: DockerBench) -> None:
    container = own_bench.engine.start(own_bench.spec(ONE_LETTER))
    wait_until(lambda: container.wait(0.5) is not None or paused(own_bench, container), "it is paused", LONG_S)
    own_bench.engine.close()
    assert not paused(own_bench, container)
    container.remove()


@pytest.mark.docker
@pytest.mark.fault("A4")
def test_the_next_start_lets_go_of_what_a_killed_one_held(own_bench: DockerBench) -> None:
    started = own_bench.engine.start(own_bench.spec(ONE_LETTER))
    wait_until(lambda: started.wait(0.5) is not None or paused(own_bench, started), "it is paused", LONG_S)
    found = DockerContainer(own_bench.engine, started.id)  # by a worker that comes later
    assert found.wait(0.1) is None
    assert not paused(own_bench, found)
    found.remove()


@pytest.mark.docker
@pytest.mark.fault("E2")
def test_one_that_is_paused_while_the_answer_is_lost_is_let_go(
    own_bench: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, ask = own_bench.engine.api, own_bench.engine.api.ask

    def lose_answers(method: str, path: str, /, **more: Any) -> Answer:
        answer = ask(method, path, **more)
        if path.endswith("/pause"):
            raise TimeoutError("the answer is lost")
        return answer

    monkeypatch.setattr(api, "ask", lose_answers)
    container = own_bench.engine.start(own_bench.spec(ONE_LETTER))
    wait_until(lambda: container.wait(0.5) is not None or paused(own_bench, container), "it is paused", LONG_S)
    assert not container.is_paused()  # so nobody is told that a person did it
    own_bench.engine.close()
    assert not paused(own_bench, container)
    container.remove()


@pytest.mark.docker
@pytest.mark.fault("A4", "E2")
def test_the_next_start_asks_again_where_the_log_could_not_be_read(
    own_bench: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = own_bench.engine.start(own_bench.spec(ONE_LETTER))
    wait_until(lambda: started.wait(0.5) is not None or paused(own_bench, started), "it is paused", LONG_S)
    found = DockerContainer(own_bench.engine, started.id)

    def refuse(*_: object, **__: object) -> Any:
        raise ConnectionResetError("the engine is busy")

    with monkeypatch.context() as away:
        away.setattr(own_bench.engine.api, "reading", refuse)
        assert found.wait(0.1) is None
    assert paused(own_bench, found)
    clock = own_bench.engine.clock
    monkeypatch.setattr(own_bench.engine, "clock", lambda: clock() + 60)  # whether it runs is asked anew by then
    assert found.wait(0.1) is None
    assert not paused(own_bench, found)
    found.remove()


def test_a_log_stays_whole_where_there_is_no_room_for_its_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "container.log"
    log.write_text("all that it printed")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    put_before(log, "a note\n")
    assert log.read_text() == "all that it printed"
    assert [path.name for path in tmp_path.iterdir()] == ["container.log"]


@pytest.mark.docker
@pytest.mark.fault("E11")
def test_the_next_start_leaves_what_a_person_paused(own_bench: DockerBench) -> None:
    started = own_bench.engine.start(own_bench.spec("echo ready; sleep 600"))
    wait_until(lambda: started.last_lines(1) == "ready", "it has printed", LONG_S)
    own_bench.pause(started)
    found = DockerContainer(own_bench.engine, started.id)
    assert found.wait(0.1) is None
    assert paused(own_bench, found)
    assert found.is_paused()
    found.remove()


@pytest.mark.docker
@pytest.mark.fault("D4")
def test_a_burst_that_is_over_is_no_flood(own_bench: DockerBench) -> None:
    """More than the engine keeps, at once: half a second later there is nothing to hold back."""
    heard: list[str] = []
    own_bench.engine.emit = lambda name, **fields: heard.append(name)
    container = own_bench.engine.start(own_bench.spec(f"{LONG_LINE} | head -c 40000000; sleep 7"))
    try:
        assert container.wait(LONG_S) is not None
        assert heard == []
    finally:
        container.remove()


# -- without an engine -------------------------------------------------------------------------------------------------


class Log:
    """The times of what an engine keeps of a log: at most 30 MiB, three files, of a job that prints `rate` MiB/s."""

    def __init__(self, rate: float) -> None:
        self.rate, self.now, self.printed_mib, self.held_until = rate, 0.0, 0.0, 0.0
        self.files = [0.0]
        self.last = 0.0

    def to(self, now: float) -> None:
        """Time passes; it prints."""
        step = 0.01
        while self.now < now:
            self.now += step
            if self.now < self.held_until or not self.rate:
                continue
            before, self.printed_mib, self.last = self.printed_mib, self.printed_mib + self.rate * step, self.now
            if self.printed_mib // 10 > before // 10:
                self.files = [*self.files, self.now][-3:]

    def time(self, at: float) -> str:
        return f"2026-11-29T12:{int(at // 60):02}:{at % 60:09.6f}Z"

    def run(self, seconds: float) -> Restraint:
        """With a restraint that is looked at when it is due."""
        restraint = Restraint(0.0)
        while restraint.due < seconds:
            now = restraint.due
            self.to(now)
            if restraint.held:
                restraint.let_go(now)
            elif restraint.floods(self.time(self.last), lambda: self.time(self.files[0]), now):
                restraint.hold(now)
                self.held_until = now + HOLD_S
        return restraint


@pytest.mark.parametrize("rate", [2.0, 5.0, 8.7, 60.0, 400.0])
def test_whatever_it_prints_in_a_second_it_prints_little_in_a_while(rate: float) -> None:
    log = Log(rate)
    restraint = log.run(600)
    assert restraint.times > 0
    assert log.printed_mib / 600 <= max(20 / SPAN_S + 0.6, rate * 6 / 36)


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.1, 1.0])
def test_a_job_that_prints_much_is_left_alone(rate: float) -> None:
    log = Log(rate)
    assert log.run(600).times == 0
    assert log.printed_mib == pytest.approx(rate * 600, rel=0.02)


def test_an_engine_with_times_of_its_own_holds_nobody_back() -> None:
    restraint = Restraint(0.0)
    for now in range(100):
        assert not restraint.floods(f"never {now}", lambda now=now: f"ever {now}", float(now))  # type: ignore[misc]
    assert restraint.note() == ""
