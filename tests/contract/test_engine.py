"""What every engine promises (core.ports.Engine), asked of the fake and of the real one with the same words."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from jobfetcher.core.errors import JobFault, JobReason, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.run import Exit, Image, RunSpec
from jobfetcher.engine.flavour import Limit
from jobfetcher.testing.fake_engine import FakeEngine, Script
from tests.support.boxes import LONG_S, DockerBench, FakeBench, docker_bench, no_progress, podman_bench, short_pause
from tests.support.podman import PrivatePodman

Bench = FakeBench | DockerBench

SLEEPS = "sleep 60"
IGNORES_TERM = "trap '' TERM; echo ready; while :; do sleep 1; done"
PRINTS = "echo one; echo two >&2; echo three"
WRITES = "echo out > /files/out"
FILLS = "head -c 3000000 /dev/zero > /layer"


def _write(directory: Path) -> None:
    (directory / "out").write_text("out\n")


SCRIPTS = {
    "exit 3": Script(exit=Exit(3)),
    SLEEPS: Script(held=True),
    IGNORES_TERM: Script(held=True, ignores_term=True, prints="ready\n"),
    PRINTS: Script(prints="one\ntwo\nthree\n"),
    WRITES: Script(acts=_write),
    FILLS: Script(written=3_000_000),
    "true": Script(),
}


def _script(spec: RunSpec) -> Script:
    assert spec.command is not None
    return SCRIPTS[spec.command[-1]]


REAL = [pytest.param(name, marks=pytest.mark.docker) for name in ("docker", "podman", "rootless_podman")]


@pytest.fixture(params=["fake", *REAL])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    files = tmp_path / "files"
    if request.param == "docker":
        with docker_bench(request.getfixturevalue("busybox"), files, sleep=short_pause) as real:
            yield real
    elif request.param != "fake":
        podman: PrivatePodman = request.getfixturevalue(request.param)
        with podman_bench(podman, sleep=short_pause) as real:
            yield real
    else:
        files.mkdir()
        image = Image("sha256:1", "here", None, "amd64")
        yield FakeBench(FakeEngine(_script, {"here": image}), image, files, "fake")


def test_the_exit_code_comes_back(bench: Bench) -> None:
    end, _ = bench.run(bench.spec("exit 3"))
    assert (end.code, end.genuine, end.oom_killed) == (3, True, False)


def test_a_job_writes_into_its_directory(bench: Bench) -> None:
    end, _ = bench.run(bench.spec(WRITES))
    assert end.code == 0
    assert (bench.files / "out").read_text() == "out\n"


def test_wait_says_none_while_it_runs_and_how_it_ended_ever_after(bench: Bench) -> None:
    container = bench.engine.start(bench.spec(SLEEPS))
    assert container.wait(0.2) is None
    container.stop(10)
    first = container.wait(LONG_S)
    assert first is not None
    assert first.code == 143  # 128 + TERM
    assert container.wait(0.2) == first
    container.remove()


def test_a_stop_ends_a_wait_in_another_thread(bench: Bench) -> None:
    container = bench.engine.start(bench.spec(SLEEPS))
    ends: list[tuple[Exit | None, float]] = []
    waiter = threading.Thread(target=lambda: ends.append((container.wait(LONG_S), time.monotonic())))
    waiter.start()
    container.stop(10)
    stopped = time.monotonic()
    waiter.join(LONG_S)
    [(end, noticed)] = ends
    assert end is not None
    assert noticed - stopped < 5
    container.remove()


@pytest.mark.fault("E5")
def test_what_ignores_term_is_killed_after_the_grace(bench: Bench) -> None:
    container = bench.engine.start(bench.spec(IGNORES_TERM))
    deadline = time.monotonic() + LONG_S
    while container.last_lines(1) != "ready":
        assert time.monotonic() < deadline
        assert container.wait(0.05) is None
    started = time.monotonic()
    container.stop(1)
    assert 1 <= time.monotonic() - started < 20
    end = container.wait(LONG_S)
    assert end is not None
    assert end.code == 137  # 128 + KILL
    container.remove()


def test_stop_and_remove_are_safe_at_any_time(bench: Bench) -> None:
    container = bench.engine.start(bench.spec("true"))
    assert container.wait(LONG_S) is not None
    container.stop(0)
    container.remove()
    container.stop(0)
    container.remove()
    assert bench.engine.find(JobId("1")) is None
    assert container.last_lines(5) == ""


@pytest.mark.fault("E11")
def test_a_container_removed_by_somebody_else_is_the_jobs_fault(bench: Bench) -> None:
    container = bench.engine.start(bench.spec(SLEEPS))
    failed: list[JobFault] = []

    def wait() -> None:
        try:
            container.wait(LONG_S)
        except JobFault as fault:
            failed.append(fault)

    waiter = threading.Thread(target=wait)
    waiter.start()
    same = bench.engine.find(JobId("1"))
    assert same is not None
    same.remove()
    waiter.join(LONG_S)
    assert [fault.reason for fault in failed] == [JobReason.REMOVED_OUTSIDE]
    with pytest.raises(JobFault, match="removed from outside"):
        container.wait(1)


@pytest.mark.fault("A3")
@pytest.mark.fault("E10")
@pytest.mark.fault("J2")
def test_starting_the_same_job_again_adopts_its_container(bench: Bench) -> None:
    spec = bench.spec(SLEEPS)
    first, second = bench.engine.start(spec), bench.engine.start(spec)
    assert second.id == first.id
    first.stop(10)
    end = second.wait(LONG_S)
    assert end is not None
    third = bench.engine.start(spec)  # it has run to its end: it must not run again
    assert third.id == first.id
    assert third.wait(LONG_S) == end
    third.remove()


@pytest.mark.fault("A3")
def test_who_starts_a_job_hears_of_it_before(bench: Bench) -> None:
    heard: list[tuple[str, bool]] = []

    def before_start(container_id: str) -> None:
        found = bench.engine.find(JobId("1"))
        assert found is not None
        heard.append((found.id, container_id == found.id))
        end = found.wait(0.1)
        assert end is not None
        assert not end.genuine, "it has not run"

    container = bench.engine.start(bench.spec(WRITES), before_start)
    assert heard == [(container.id, True)]
    assert container.wait(LONG_S) is not None
    container.remove()


@pytest.mark.fault("A3")
def test_what_cannot_be_noted_is_not_started(bench: Bench) -> None:
    def before_start(_container_id: str) -> None:
        raise WorkerFault(WorkerReason.DISK, "the journal cannot be written")

    with pytest.raises(WorkerFault, match="cannot be written"):
        bench.engine.start(bench.spec(WRITES), before_start)
    assert not (bench.files / "out").exists()
    assert bench.engine.find(JobId("1")) is None


def test_a_strangers_container_of_that_name_is_left_alone(bench: Bench) -> None:
    theirs = bench.spec(SLEEPS)
    ours = replace(theirs, labels={"jobfetcher.job": "2"})
    stranger = bench.engine.start(theirs)
    with pytest.raises(WorkerFault, match="not ours") as refused:
        bench.engine.start(ours)
    assert refused.value.reason is WorkerReason.ENGINE
    assert stranger.wait(0.1) is None
    stranger.stop(0)
    stranger.remove()


@pytest.mark.fault("E10")
def test_reap_removes_what_no_journal_knows(bench: Bench) -> None:
    kept, stray = bench.engine.start(bench.spec(SLEEPS)), bench.engine.start(bench.spec(SLEEPS, job_id="2"))
    assert bench.engine.reap(frozenset({JobId("1")})) == [f"jobfetcher-{bench.instance}-2-1"]
    assert bench.engine.find(JobId("2")) is None
    with pytest.raises(JobFault):
        stray.wait(1)
    found = bench.engine.find(JobId("1"))
    assert found is not None
    assert found.id == kept.id
    kept.remove()


@pytest.mark.fault("E10")
def test_reap_leaves_what_is_young(bench: Bench) -> None:
    stray = bench.engine.start(bench.spec(SLEEPS))
    assert bench.engine.reap(frozenset(), older_than_s=300) == []
    assert stray.wait(0.1) is None
    assert bench.engine.reap(frozenset(), older_than_s=0) == [f"jobfetcher-{bench.instance}-1-1"]


def test_a_container_that_ends_while_it_is_removed_is_removed(bench: Bench) -> None:
    """Podman refuses that now and then (tests/unit/test_engine_api.py)."""
    for attempt in range(1, 9):
        bench.engine.start(bench.spec("true", attempt=attempt)).remove()
    assert bench.engine.find(JobId("1")) is None


def test_of_several_attempts_the_newest_is_found(bench: Bench) -> None:
    containers = [bench.engine.start(bench.spec("true", attempt=attempt)) for attempt in (1, 2)]
    for expected in reversed(containers):
        found = bench.engine.find(JobId("1"))
        assert found is not None
        assert found.id == expected.id
        found.remove()
    assert bench.engine.find(JobId("1")) is None


@pytest.mark.fault("E11")
def test_a_pause_by_a_person_is_seen(bench: Bench) -> None:
    container = bench.engine.start(bench.spec(SLEEPS))
    assert not container.is_paused()
    if isinstance(bench, DockerBench) and Limit.MEMORY in bench.engine.flavour().missing:
        with pytest.raises(WorkerFault, match="does not have a cgroup"):
            bench.pause(container)  # nobody can, where a container has no control group of its own
        container.remove()
        return
    bench.pause(container)
    assert container.is_paused()
    assert container.wait(0.1) is None
    container.stop(10)  # works all the same
    end = container.wait(LONG_S)
    assert end is not None
    assert end.code in {137, 143}
    container.remove()
    with pytest.raises(JobFault, match="removed from outside"):
        container.is_paused()


@pytest.mark.fault("D3")
def test_what_it_wrote_to_its_own_layer_is_measured(bench: Bench) -> None:
    container = bench.engine.start(bench.spec(FILLS))
    assert container.wait(LONG_S) is not None
    assert 3_000_000 <= container.written().engine.bytes < 4_000_000
    container.remove()
    with pytest.raises(JobFault, match="removed from outside"):
        container.written()


@pytest.mark.fault("D7")
def test_an_image_is_forgotten_only_when_nobody_else_wants_it(bench: Bench) -> None:
    mine, theirs = (f"jobfetcher-test/{uuid4().hex[:8]}:1" for _ in range(2))
    image = bench.make_image(mine, theirs)
    reference = image.reference
    assert not bench.engine.forget_image(image.id, reference), "somebody gave it another name"
    bench.untag(theirs)
    container = bench.engine.start(bench.spec(SLEEPS, image=image))
    assert not bench.engine.forget_image(image.id, reference), "a container runs on it"
    container.stop(0)
    assert not bench.engine.forget_image(image.id, reference), "a container stands on it"
    container.remove()
    assert bench.engine.forget_image(image.id, reference)
    assert bench.engine.forget_image(image.id, reference), "it is gone already"


def test_what_is_here_is_not_pulled(bench: Bench) -> None:
    assert not bench.engine.prepare(bench.image.reference, Halt(), no_progress).pulled


def test_what_it_printed_can_be_read_and_saved(bench: Bench, tmp_path: Path) -> None:
    container = bench.engine.start(bench.spec(PRINTS))
    assert container.wait(LONG_S) is not None
    container.save_logs(tmp_path / "log")
    printed = (tmp_path / "log").read_text().splitlines()
    assert sorted(printed) == ["one", "three", "two"]
    assert [line for line in printed if line != "two"] == ["one", "three"]  # the other pipe may be seen at any time
    assert container.last_lines(2).splitlines() == printed[-2:]
    container.remove()


def test_prepare_refuses_a_missing_image_and_a_halted_job(bench: Bench) -> None:
    halt = Halt()
    with pytest.raises((JobFault, WorkerFault)) as missing:
        bench.engine.prepare("nowhere.example/no/such:image", halt, no_progress)
    # The real one of this bench may not pull, so it is its owner who says no.
    assert isinstance(missing.value, JobFault | WorkerFault)
    assert missing.value.reason in {JobReason.IMAGE_MISSING, WorkerReason.POLICY}
    halt.set(StopReason.CANCELLED)
    with pytest.raises(Stopped):
        bench.engine.prepare(bench.image.reference, halt, no_progress)


def test_a_box_of_the_workers_own_runs_and_nothing_of_it_is_left(bench: Bench) -> None:
    spec = replace(bench.spec("true"), image_id="")
    bench.engine.prove(spec, bench.files)
    assert list(bench.files.iterdir()) == []
    assert bench.engine.reap(frozenset()) == []
    assert bench.engine.find(JobId("1")) is None


def test_a_directory_that_the_engine_sees_otherwise_is_found_out(bench: Bench, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(WorkerFault, match="is not seen in containers") as seen:
        bench.engine.prove(replace(bench.spec("true"), image_id=""), elsewhere)
    assert seen.value.reason is WorkerReason.DISK
    assert list(elsewhere.iterdir()) == []
