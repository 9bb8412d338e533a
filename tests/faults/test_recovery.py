"""The worker is killed, or the machine restarts, and the next start goes on with what it finds (FAULTS.md A).

The worker is the command, killed with SIGKILL; the engine is the real one. A restarted machine is simulated: the next
start sees another boot id (a file mounted over the kernel's, in a mount namespace of its own). After each test the
oracle sees that every job had one end, and that nothing is left.
"""

import json
import signal
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.services import wait_until
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Command, Lab, command, wait_until_running

pytestmark = pytest.mark.docker

RESULT = "echo result > /files/out/result"
OUT = {"output": "out"}


@contextmanager
def worker(lab: Lab, tmp_path: Path, *, boot_id: Path | None = None, **changes: str) -> Iterator[Command]:
    """The command, with a mount namespace of its own where it is to see another boot id."""
    mount = f"mount --bind {boot_id} /proc/sys/kernel/random/boot_id"
    prefix = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"] if boot_id else []
    with command(["run", "--exit-when-idle", "1"], lab.env(**changes), tmp_path, prefix=prefix) as running:
        yield running


def kill(running: Command) -> None:
    running.send(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL


def container_of(lab: Lab) -> dict[str, Any]:
    [found] = lab.containers()
    return dict(lab.engine.inspect_container(found["Id"]))


def ran_since(lab: Lab, job: int) -> str:
    """When the run began whose results were uploaded, as their record says."""
    return str(json.loads(lab.server.results(job)["log/jobfetcher/provenance.json"])["exit"]["started_at"])


@pytest.mark.fault("A4")
@pytest.mark.fault("N3")
def test_a_running_container_is_adopted(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit(UNTIL_LET_GO, f"&& {RESULT}", files_up=OUT)
    with worker(lab, tmp_path) as first:
        wait_until_running(lab, job)
        before = container_of(lab)
        kill(first)
    heard = len(lab.server.events("update", job))
    with worker(lab, tmp_path) as second:
        wait_until(lambda: len(lab.server.events("update", job)) > heard, "the next start beats", 10.0)
        after = container_of(lab)
        assert (after["Id"], after["State"]["StartedAt"]) == (before["Id"], before["State"]["StartedAt"])
        lab.let_go(job)
        assert second.wait() == 0
    assert lab.server.state(job) == "finished"
    assert lab.server.results(job)["output/out/result"] == b"result\n"


@pytest.mark.fault("A5")
def test_a_container_that_ended_meanwhile_is_uploaded(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit(UNTIL_LET_GO, f"&& {RESULT}", files_up=OUT)
    with worker(lab, tmp_path) as first:
        wait_until_running(lab, job)
        kill(first)
    lab.let_go(job)
    wait_until(lambda: container_of(lab)["State"]["Status"] == "exited", "the container ends", DEADLINE_S)
    started = container_of(lab)["State"]["StartedAt"]
    with worker(lab, tmp_path) as second:
        assert second.wait() == 0
    assert lab.server.state(job) == "finished"
    assert lab.server.results(job)["output/out/result"] == b"result\n"
    assert ran_since(lab, job) == started  # what ran before the kill is what was uploaded


@pytest.mark.fault("A4")
def test_a_failing_job_fails_with_its_own_words_after_a_restart(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit(UNTIL_LET_GO, "; echo the reason >&2; exit 3")
    with worker(lab, tmp_path) as first:
        wait_until_running(lab, job)
        kill(first)
    lab.let_go(job)
    with worker(lab, tmp_path) as second:
        assert second.wait() == 0
    state, details = lab.ended(job)
    assert state == "error"
    assert "exit code 3" in details
    assert "the reason" in details


@pytest.mark.fault("A2")
def test_finished_inputs_are_not_fetched_again(lab: Lab, tmp_path: Path) -> None:
    names = [f"in/{number}" for number in range(6)]
    inputs = {name: lab.server.put_input(name, name.encode() * 1000) for name in names}
    job = lab.submit("cat /files/in/* > /files/out/all", files_down=inputs, files_up=OUT)
    lab.server.set_faults({"method": "GET", "path": "/in/4$", "delay_s": 60})
    with worker(lab, tmp_path, transfers="1") as first:
        wait_until(lambda: (lab.files(job) / "in/3").exists(), "four inputs are there", DEADLINE_S)
        wait_until(lambda: marks(lab) >= set(names[:4]), "and are marked", DEADLINE_S)
        kill(first)
    lab.server.set_faults()
    with worker(lab, tmp_path) as second:
        assert second.wait() == 0
    assert lab.server.state(job) == "finished"
    assert lab.server.results(job)["output/out/all"] == b"".join(name.encode() * 1000 for name in names)
    fetched = lab.server.traffic()
    assert [count(fetched, name) for name in names[:4]] == [1] * 4


def marks(lab: Lab) -> set[str]:
    with sqlite3.connect(f"file:{lab.base}/journal.db?mode=ro", uri=True) as db:
        found = db.execute("SELECT name FROM file WHERE direction = 'in'").fetchall()
    db.close()
    return {str(name) for (name,) in found}


def count(traffic: dict[str, Any], name: str) -> int:
    return sum(entry["gets"] for path, entry in traffic.items() if path.endswith(name))


@pytest.mark.fault("A10")
@pytest.mark.parametrize("code", [0, 3])
def test_after_a_reboot_a_job_that_ran_is_run_again_from_a_clean_state(lab: Lab, tmp_path: Path, code: int) -> None:
    """Its exit code means nothing: nobody saw it end. Its container's files are from before the power cut."""
    source = lab.server.put_input("a", b"input")
    tick = "cat /files/a >> /files/out/seen; echo spoilt >> /files/a"
    job = lab.submit(tick, f"; {UNTIL_LET_GO}; exit {code}", files_down={"a": source}, files_up=OUT)
    with worker(lab, tmp_path) as first:
        wait_until_running(lab, job)
        wait_until(lambda: (lab.files(job) / "out/seen").exists(), "it wrote", DEADLINE_S)
        old = container_of(lab)["Id"]
        kill(first)
    lab.engine.kill(old)
    boot_id = tmp_path / "boot_id"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    with worker(lab, tmp_path, boot_id=boot_id) as second:
        wait_until(lambda: [one["Id"] != old for one in lab.containers()] == [True], "it is run again", DEADLINE_S)
        wait_until(lambda: (lab.files(job) / "out/seen").exists(), "it wrote again", DEADLINE_S)
        lab.let_go(job)
        assert second.wait() == 0
    assert lab.server.state(job) == ("finished" if code == 0 else "error")
    assert lab.server.results(job)["output/out/seen"] == b"input"  # once, and of the input as it was
    assert lab.server.updates(job).count("preprocessing") >= 1
    order = [state for state in lab.server.updates(job) if state != "preprocessing"]
    assert order[0] == "running"  # the server's view never goes back


@pytest.mark.fault("A10")
def test_a_job_interrupted_twice_is_given_back(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit(UNTIL_LET_GO)
    old = ""
    for _ in range(2):
        boot_id = tmp_path / f"boot_id{uuid.uuid4()}"
        boot_id.write_text(f"{uuid.uuid4()}\n")
        with worker(lab, tmp_path, boot_id=boot_id) as running:
            wait_until_running(lab, job)

            def is_another(old: str = old) -> bool:
                return [one["State"] == "running" and one["Id"] != old for one in lab.containers()] == [True]

            wait_until(is_another, "it runs", DEADLINE_S)
            old = container_of(lab)["Id"]
            kill(running)
        lab.engine.kill(old)
    boot_id = tmp_path / "boot_id"
    boot_id.write_text(f"{uuid.uuid4()}\n")
    with worker(lab, tmp_path, boot_id=boot_id) as last:
        assert last.wait() == 0
    assert lab.server.state(job) == "queued"


@pytest.mark.fault("A6", "A9")
@pytest.mark.parametrize("company", [0, 1])
def test_however_often_a_worker_is_killed_while_results_wait_for_their_storage_they_stay(
    lab: Lab, tmp_path: Path, company: int
) -> None:
    """They wait for somebody else, so it is not they that crash the worker."""
    jobs = [lab.submit(UNTIL_LET_GO, f"&& {RESULT}", files_up=OUT) for _ in range(1 + company)]
    lab.server.set_faults({"method": "POST", "path": "^/_storage", "status": 503})
    for attempt in range(8):
        with worker(lab, tmp_path, max_jobs=str(len(jobs))) as running:
            if attempt == 0:
                for job in jobs:
                    lab.server.wait_for_state(job, "running")
                    lab.let_go(job)
            for job in jobs:
                running.wait_for(f"job {job}  warning: upload of ")
            kill(running)
    lab.server.set_faults()
    with worker(lab, tmp_path, max_jobs=str(len(jobs))) as last:
        assert last.wait() == 0
    for job in jobs:
        assert lab.ended(job)[0] == "finished"
        assert lab.server.results(job)["output/out/result"] == b"result\n"


@pytest.mark.fault("A9")
def test_a_job_that_crashes_the_worker_again_and_again_is_reported(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit("true")
    for _ in range(6):
        with worker(lab, tmp_path, jobfetcher_failpoint="after:prepare") as running:
            assert running.wait() == -signal.SIGKILL
    other = lab.submit("true")
    with worker(lab, tmp_path, jobfetcher_failpoint="after:prepare@2") as running:
        assert running.wait() == 0
    state, details = lab.ended(job)
    assert state == "error"
    assert "the worker crashed 6 times in phase staging in of this job" in details
    assert lab.server.state(other) == "finished"


@pytest.mark.fault("F4")
@pytest.mark.fault("N12")
def test_three_signals_end_the_worker_at_once_and_the_next_start_has_the_job(lab: Lab, tmp_path: Path) -> None:
    """It was being stopped, so that run counts for nothing; the job does."""
    job = lab.submit(f"trap 'touch /files/asked' TERM; {UNTIL_LET_GO}")
    with worker(lab, tmp_path, stop_grace="30") as first:
        wait_until_running(lab, job)
        first.send(signal.SIGTERM)
        first.wait_for("finishing job")
        first.send(signal.SIGTERM)
        first.wait_for("stopping and giving back")
        # Before that nothing is on record, and the next start would take a job over that was never stopped.
        wait_until(lambda: (lab.files(job) / "asked").exists(), "the job was asked to end", DEADLINE_S)
        first.send(signal.SIGTERM)
        assert first.wait(1.0) == 128 + signal.SIGTERM
        told = f"job {job} was being stopped, and what it computed is lost; the next start runs it once more"
        assert told in first.errors  # at the moment of the third signal
    [old] = lab.containers()
    with worker(lab, tmp_path) as second:
        second.wait_for("running it once more")
        wait_until(lambda: [one["Id"] != old["Id"] for one in lab.containers()] == [True], "it runs again", DEADLINE_S)
        lab.let_go(job)
        assert second.wait() == 0
    assert lab.server.state(job) == "finished"


@pytest.mark.fault("A9")
def test_leaving_in_haste_is_no_crash(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit("true")
    for _ in range(7):  # each start comes no further than the pull, and is told to leave at once
        with worker(lab, tmp_path, jobfetcher_failpoint="after:prepare=sleep60") as running:
            running.wait_for("waiting at after:prepare")  # any sooner, it would stop the job in time and give it back
            for said in ("finishing job", "stopping and giving back", ""):
                running.send(signal.SIGTERM)
                running.wait_for(said)  # of two signals that come together the kernel makes one
            assert running.wait() == 128 + signal.SIGTERM
    with worker(lab, tmp_path) as last:
        assert last.wait() == 0
    assert lab.server.state(job) == "finished"


@pytest.mark.fault("F2")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_detached_the_container_runs_on_and_the_next_start_adopts_it(
    lab: Lab, tmp_path: Path, number: signal.Signals
) -> None:
    job = lab.submit(UNTIL_LET_GO, f"&& {RESULT}", files_up=OUT)
    with worker(lab, tmp_path, stop_mode="detach") as first:
        wait_until_running(lab, job)
        before = container_of(lab)
        first.send(number)
        assert first.wait(10.0) == 0
        assert "letting go of job" in first.errors
    assert container_of(lab)["State"]["Running"]
    with worker(lab, tmp_path, stop_mode="detach") as second:
        lab.let_go(job)
        assert second.wait() == 0
    assert lab.server.state(job) == "finished"
    assert ran_since(lab, job) == before["State"]["StartedAt"]
    assert lab.server.results(job)["output/out/result"] == b"result\n"


@pytest.mark.fault("F2")
def test_detached_from_a_download_and_from_an_upload(lab: Lab, tmp_path: Path) -> None:
    source = lab.server.put_input("a", b"input")
    job = lab.submit("cp /files/a /files/out/b", files_down={"a": source}, files_up=OUT)
    lab.server.set_faults(
        {"method": "GET", "path": "^/_storage/", "delay_s": 30}, {"method": "POST", "path": "^/_storage", "delay_s": 30}
    )
    for said in ("downloading 1 file", "uploading after exit code 0"):
        with worker(lab, tmp_path, stop_mode="detach") as running:
            running.wait_for(said)
            running.send(signal.SIGTERM)
            assert running.wait(10.0) == 0
        if said.startswith("downloading"):
            lab.server.set_faults({"method": "POST", "path": "^/_storage", "delay_s": 30})
    lab.server.set_faults()
    with worker(lab, tmp_path) as last:
        assert last.wait() == 0
    assert lab.server.state(job) == "finished"
    assert lab.server.results(job)["output/out/b"] == b"input"


@pytest.mark.fault("A2")
@pytest.mark.fault("B18")
def test_a_job_that_another_account_took_meanwhile_is_dropped(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit(UNTIL_LET_GO)
    with worker(lab, tmp_path) as first:
        wait_until_running(lab, job)
        kill(first)
    lab.server.advance(400)
    lab.server.sweep()
    taken = lab.take_as_another_account()
    assert taken == [job]
    with worker(lab, tmp_path) as second:
        assert second.wait() == 0
    assert lab.containers() == []
    assert not lab.files(job).exists()
