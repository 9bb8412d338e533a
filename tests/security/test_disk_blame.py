"""Jobs that fill a disk where nobody counts, on the real engine and small real disks (D3): whoever did it is told so.

Each of them was given back before, and went on to fill the next machine: what it held had no name (deleted and still
open), or was no bytes (inodes), or lay in the engine's own directory (volumes aside: tests/docker/test_volumes.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobfetcher.core.run import Taken, Written
from jobfetcher.engine import measure
from jobfetcher.engine.flavour import docker_flavour
from jobfetcher.engine.run_spec import BoxPolicy
from jobfetcher.engine.unseen import processes_of
from tests.support.boxes import LONG_S, DockerBench
from tests.support.jobs import Emitted
from tests.support.mounts import ext4, fill, needs_root
from tests.support.services import wait_until
from tests.support.trees import names_in
from tests.support.worker import Lab, running_worker

pytestmark = [pytest.mark.docker, needs_root]

MIB = 1 << 20


def zeros(mib: int) -> str:
    """A command that prints so much."""
    return f"head -c {mib * MIB} /dev/zero"


def unlinked(mib: int) -> str:
    """A shell that writes so much to a file without a name, and keeps it open."""
    return f"exec 3>/files/gone; rm /files/gone; {zeros(mib)} >&3; touch /files/done; sleep 600"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with ext4(tmp_path / "disk") as mounted:
        yield mounted


def ends(lab: Lab, *jobs: int, **settings: str) -> list[tuple[str, str]]:
    """How jobs end that are taken by one worker."""
    with running_worker(lab.settings(**settings), lambda taken, idle_s: taken >= len(jobs)) as worker:
        wait_until(lambda: len(worker.heard.all("job_ended")) == len(jobs), "the jobs' ends", LONG_S)
        worker.join()
    return [lab.ended(job) for job in jobs]


@pytest.mark.fault("D3")
def test_a_job_that_fills_the_disk_with_deleted_files_is_told_that_it_did(lab: Lab, disk: Path) -> None:
    here = replace(lab, base=disk / "base")
    job = here.submit(unlinked(33), files_up={"output": "out"})
    [(state, details)] = ends(here, job, reserve_disk="20")
    assert state == "error"
    assert "stopped: the job filled the disk (it used 33 MiB, of which 33 MiB came back" in details
    assert "RESERVE_DISK" in details
    assert names_in(here.base / "jobs") == []


@pytest.mark.fault("D3", "T12")
def test_a_job_that_fills_the_disk_with_inodes_is_told_that_it_did(lab: Lab, disk: Path) -> None:
    here = replace(lab, base=disk / "base")
    most = os.statvfs(disk).f_files
    floods = f"mkdir /files/d; cd /files/d; seq 1 {int(most * 0.97)} | xargs touch; sleep 600"
    job = here.submit(floods, files_up={"output": "out"})
    [(state, details)] = ends(here, job, reserve_disk="5")
    assert state == "error"
    assert "stopped: the job filled the disk (it used " in details
    assert " inodes, of which " in details
    assert names_in(here.base / "jobs") == []


@pytest.mark.fault("D3", "T12")
def test_a_job_that_fills_the_disk_to_its_end_and_leaves_before_anybody_looks_is_not_given_back(
    lab: Lab, disk: Path
) -> None:
    """It says itself that all is well. Where the journal's ballast makes room for its log it has finished; else not
    even that can be written, and it is told why."""
    here = replace(lab, base=disk / "base")
    fills = f"for round in 1 2 3; do {zeros(100)} > /files/big$round; sync; done; seq 1 1000; true"
    job = here.submit(fills, files_up={"output": "out"})
    [(state, details)] = ends(here, job, reserve_disk="5")
    assert state in {"error", "finished"}
    assert state == "finished" or "stopped: the job filled the disk" in details
    assert names_in(here.base / "jobs") == []


@pytest.mark.fault("D3")
def test_a_job_on_a_disk_that_somebody_else_fills_is_given_back(lab: Lab, disk: Path) -> None:
    here = replace(lab, base=disk / "base")
    job = here.submit(unlinked(2), files_up={"output": "out"})
    with running_worker(here.settings(reserve_disk="20"), lambda taken, idle_s: taken >= 1) as worker:
        wait_until((here.files(job) / "done").exists, "the job has what it wants", LONG_S)
        filler = fill(disk, leave=15 * MIB)
        wait_until(lambda: bool(worker.heard.all("job_ended")), "the job's end", LONG_S)
        filler.unlink()
        worker.join()
    [ended] = worker.heard.all("job_ended")
    assert ended["ending"] == "worker failed"
    assert here.ended(job)[0] == "queued"


@pytest.mark.fault("D3")
def test_of_two_jobs_only_the_one_that_fills_the_disk_is_stopped(lab: Lab, disk: Path) -> None:
    here = replace(lab, base=disk / "base")
    patient = "until test -e /files/go; do sleep 0.1; done; echo well > /files/out/word"
    hardware = {"cpu_cores": 1, "memory": 128, "gpu_mem": 0}
    innocent = here.submit(patient, files_up={"output": "out"}, hardware=hardware)
    guilty = here.submit(unlinked(40), files_up={"output": "out"}, hardware=hardware)
    settings = here.settings(reserve_disk="20", max_jobs="2")
    with running_worker(settings, lambda taken, idle_s: taken >= 2) as worker:
        wait_until(lambda: bool(worker.heard.all("job_ended")), "the end of the one that fills", LONG_S)
        assert here.ended(innocent)[0] == "running"
        here.let_go(innocent)
        worker.join()
    assert here.ended(guilty)[0] == "error"
    assert "it used 40 MiB, of which 40 MiB came back" in here.ended(guilty)[1]
    assert here.ended(innocent) == ("finished", "")


# -- what can be counted -----------------------------------------------------------------------------------------------


@pytest.mark.fault("D3")
@pytest.mark.parametrize("place", ["/files", "/tmp"])
def test_deleted_files_are_counted_while_they_are_open(bench: DockerBench, place: str) -> None:
    """Once each, however often they are open; those in the job's directory and those elsewhere apart."""
    held = f"exec 3>{place}/x; rm {place}/x; exec 4>&3; {zeros(20)} >&3; touch /files/done; sleep 600"
    container = bench.engine.start(bench.spec(held))
    wait_until((bench.files / "done").exists, "it is written", LONG_S)
    written = container.written()
    there, elsewhere = (written.files, written.engine) if place == "/files" else (written.engine, written.files)
    assert 20 * MIB <= there.bytes < 22 * MIB
    assert there.inodes >= 1
    assert elsewhere.bytes < MIB
    container.remove()


@pytest.mark.fault("D3")
def test_files_in_memory_are_memory_and_no_disk(bench: DockerBench) -> None:
    held = f"exec 3>/dev/shm/x; rm /dev/shm/x; {zeros(10)} >&3; touch /files/done; sleep 600"
    container = bench.engine.start(bench.spec(held))
    wait_until((bench.files / "done").exists, "it is written", LONG_S)
    written = container.written()
    assert (written.engine + written.files).bytes < MIB
    container.remove()


@pytest.mark.fault("D3")
@pytest.mark.parametrize("who", ["the worker", "the engine"])
def test_the_engines_own_files_in_a_container_are_counted(
    bench: DockerBench, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """A job may write gigabytes into them; they lie in the engine's directory and in no layer."""
    fills = f"for name in hosts hostname resolv.conf; do {zeros(5)} > /etc/$name; done; touch /files/done"
    container = bench.engine.start(bench.spec(f"{fills}; sleep 600"))
    wait_until((bench.files / "done").exists, "they are written", LONG_S)
    if who == "the engine":

        def refuse(path: object) -> os.stat_result:
            raise PermissionError(path)

        monkeypatch.setattr("jobfetcher.engine.measure.os.lstat", refuse)
    assert 15 * MIB <= container.written().engine.bytes < 17 * MIB
    container.remove()


@pytest.mark.fault("D3", "T12")
def test_a_job_with_a_hundred_thousand_descriptors_is_measured_in_bounded_time(bench: DockerBench) -> None:
    """The tests' image has no program that opens so many, so one descriptor stands for each moment of the clock."""
    held = "exec 3>/files/x; rm /files/x; exec 4>/files/y; rm /files/y; touch /files/done; sleep 600"
    container = bench.engine.start(bench.spec(held))
    wait_until((bench.files / "done").exists, "they are open", LONG_S)
    looked = 0

    def clock() -> float:
        nonlocal looked
        looked += 1
        return float(looked)

    assert measure.deleted(processes_of(container.id), clock) == (Taken(), Taken())
    assert looked <= 20
    container.remove()


@pytest.mark.fault("D3")
def test_the_limit_of_a_job_holds_for_what_has_no_name(lab: Lab) -> None:
    job = lab.submit(unlinked(60))
    [(state, details)] = ends(lab, job, job_disk_limit="40MiB")
    assert state == "error"
    assert "stopped: the job used 60 MiB of disk, and JOB_DISK_LIMIT is 40 MiB" in details


@pytest.mark.fault("D3")
def test_the_limit_of_a_job_holds_for_the_engines_own_files(lab: Lab) -> None:
    job = lab.submit(f"{zeros(60)} > /etc/hosts; sleep 600")
    [(state, details)] = ends(lab, job, job_disk_limit="40MiB")
    assert state == "error"
    assert "stopped: the job used 60 MiB of disk, and JOB_DISK_LIMIT is 40 MiB" in details


def test_a_container_that_holds_nothing_takes_next_to_nothing(bench: DockerBench) -> None:
    container = bench.engine.start(bench.spec("sleep 600"))
    written = container.written()
    assert written.files == Written().files
    assert written.engine.bytes < MIB // 4
    container.remove()


@pytest.mark.fault("D3")
def test_an_engine_that_cannot_hold_a_layer_to_a_size_runs_jobs_all_the_same(
    bench: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one's disk is no XFS with pquota. Asked for a limit it refuses the container; it is asked once."""
    limiting = "jobfetcher.engine.docker.docker_flavour"
    monkeypatch.setattr(limiting, lambda info: replace(docker_flavour(info), limits_layers=True))
    emitted = Emitted()
    bench.engine.emit = emitted
    for number in ("1", "2"):
        spec = bench.spec("true", job_id=number, policy=BoxPolicy(network=None, layer_mib=100))
        assert bench.run(spec)[0].code == 0
    [told] = emitted.named("no_layer_limit")
    assert "pquota" in str(told["message"])
