"""The command as a process of its own: its options, its signals, its exit codes."""

import json
import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.support.services import free_port, wait_until
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Lab, command

pytestmark = pytest.mark.docker

#: A job that does not heed TERM: only KILL, after the grace, ends it.
STUBBORN = "trap '' TERM; touch /files/out/began; while true; do sleep 0.2; done"


def wait_for_poll(lab: Lab) -> None:
    """Until a worker has asked for a job and there was none."""
    wait_until(lambda: len(lab.server.events("poll")) > 0, "the worker asks for a job", DEADLINE_S)


# -- options -----------------------------------------------------------------------------------------------------------


def test_once_runs_one_job_and_leaves_the_others(lab: Lab, tmp_path: Path) -> None:
    jobs = [lab.submit("true"), lab.submit("true")]
    with command(["run", "--once"], lab.env(), tmp_path) as run:
        assert run.wait() == 0
    assert [lab.server.state(job) for job in jobs] == ["finished", "queued"]


def test_a_job_that_nobody_can_read_is_an_answer(lab: Lab, tmp_path: Path) -> None:
    job = lab.server.submit({"app": {}, "handler": {}, "meta": {}}, raw=True)
    with command(["run", "--once"], lab.env(), tmp_path) as run:
        assert run.wait() == 0
    assert lab.server.state(job) == "error"


def test_once_waits_for_its_job(lab: Lab, tmp_path: Path) -> None:
    with command(["run", "--once"], lab.env(), tmp_path) as run:
        wait_for_poll(lab)
        job = lab.submit("exit 1")
        assert run.wait() == 0  # the job's own fault is not the command's
    assert lab.server.state(job) == "error"


def test_once_fails_when_this_machine_could_not_run_the_job(lab: Lab, tmp_path: Path) -> None:
    job = lab.server.submit({"handler": {"image_url": lab.image}, "hardware": {"memory": 10**9}}, raw=True)
    with command(["run", "--once"], lab.env(), tmp_path) as run:
        assert run.wait() == 1
        assert "given back, this machine's fault: the job asks for 1000000000 MiB of memory" in run.errors
    assert lab.server.state(job) == "queued"


def test_exit_when_idle(lab: Lab, tmp_path: Path) -> None:
    jobs = [lab.submit("true") for _ in range(3)]
    with command(["run", "--exit-when-idle", "0.5"], lab.env(), tmp_path) as run:
        assert run.wait() == 0
        assert run.output == ""  # what it says is a log, and goes to standard error
    assert [lab.server.state(job) for job in jobs] == ["finished"] * 3


def test_max_jobs_is_how_many_run_side_by_side(lab: Lab, tmp_path: Path) -> None:
    jobs = [lab.submit(UNTIL_LET_GO, hardware={"memory": 64}) for _ in range(2)]
    with command(["run", "--max-jobs", "2", "--exit-when-idle", "0.5"], lab.env(), tmp_path) as run:
        for job in jobs:
            lab.server.wait_for_state(job, "running")
        for job in jobs:
            lab.let_go(job)
        assert run.wait() == 0
    assert [lab.server.state(job) for job in jobs] == ["finished"] * 2


def test_json_log_lines_are_json(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit("true")
    with command(["run", "--once", "--log-format", "json", "--log-level", "debug"], lab.env(), tmp_path) as run:
        assert run.wait() == 0
        lines = [json.loads(line) for line in run.errors.splitlines()]
    assert all({"time", "level", "event"} <= line.keys() for line in lines)
    (ended,) = [line for line in lines if line["event"] == "job_ended"]
    assert (ended["job"], ended["ending"], ended["message"]) == (str(job), "finished", "finished")


@pytest.mark.parametrize("how", ["closed", "broken"])
def test_a_worker_that_nobody_hears_works_all_the_same(lab: Lab, how: str) -> None:
    """Standard error is closed (`2>&-`), or a pipe that nobody reads any more; a setting that is none has it warn."""
    job = lab.submit("echo heard > /files/out/said", files_up={"output": "out"})
    environment = {"PATH": os.environ["PATH"], **lab.env(), "JOBFETCHER_NO_SUCH": "x"}
    run = [sys.executable, "-m", "jobfetcher", "run", "--once"]
    reader, writer = os.pipe()
    os.close(reader)
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"] if how == "closed" else []
    try:
        done = subprocess.run([*closed, *run], env=environment, stderr=writer, check=False, timeout=DEADLINE_S)
    finally:
        os.close(writer)
    assert done.returncode == 0
    assert lab.ended(job) == ("finished", "")
    assert lab.server.results(job)["output/out/said"] == b"heard\n"


def test_jobs_have_a_network_unless_told_otherwise(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit("ls /sys/class/net > /files/out/interfaces", files_up={"output": "out"})
    with command(["run", "--once"], lab.env(job_network=""), tmp_path) as run:
        assert run.wait() == 0
    assert b"eth0" in lab.server.results(job)["output/out/interfaces"].split()


def test_resources_says_what_would_be_offered(lab: Lab, tmp_path: Path) -> None:
    with command(["resources", "--json"], lab.env(), tmp_path) as run:
        assert run.wait() == 0
        said = json.loads(run.output)
    assert 0 < said["offer"]["memory_mib"] < said["machine"]["memory_mib"]
    assert said["offer"]["gpus"] == []
    assert said["slots"] == 1
    assert said["engine"]["version"]
    assert said["disks"][0]["path"] == str(lab.base)
    assert 0 < said["disks"][0]["free_mib"] <= said["disks"][0]["size_mib"]
    assert not lab.base.exists()
    with command(["run", "--exit-when-idle", "0.3"], lab.env(), tmp_path) as run:
        assert run.wait() == 0
        (line,) = [line for line in run.errors.splitlines() if "for jobs: " in line]
    assert f"for jobs: {said['offer']['cpu_cores']} cores, " in line  # both say the same
    assert ", no GPU, 1 job at a time; " in line
    assert f" GiB free in {lab.base}" in line
    assert f"engine: {said['engine']['name']} {said['engine']['version']}" in line


@pytest.mark.parametrize("arguments", [["resources"], ["resources", "--json"], ["run"]])
def test_without_rights_to_the_engine_there_is_nothing_to_offer(lab: Lab, tmp_path: Path, arguments: list[str]) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    with command(arguments, lab.env(docker_host=f"unix://{folder}/docker.sock"), tmp_path) as run:
        assert run.wait() == 2
        assert run.output == ""
        assert len(run.errors.splitlines()) == 1
    assert not lab.base.exists()


def test_log_lines_carry_date_and_zone(lab: Lab, tmp_path: Path) -> None:
    with command(["run", "--exit-when-idle", "0.3"], lab.env() | {"TZ": "UTC-5:30"}, tmp_path) as run:
        assert run.wait() == 0
        for line in run.errors.splitlines():
            assert datetime.strptime(line[:25], "%Y-%m-%d %H:%M:%S %z").utcoffset() == timedelta(hours=5, minutes=30)


def test_config_says_every_setting_and_no_secret(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("USERNAME=lab\nPASSWORD=planted-password\nTIMOUT_STATUS=7\n")
    with command(["config", "--json"], lab.env(timeout_status="", access_token="planted-token"), tmp_path) as run:
        assert run.wait() == 0
        said = json.loads(run.output)
        assert "planted" not in run.output + run.errors
    assert said["TIMEOUT_STATUS"] == {"value": "7", "from": ".env (TIMOUT_STATUS)"}
    assert said["API_URL"]["from"] == "environment (API_URL)"
    assert said["PASSWORD"] == {"value": "********", "from": ".env (PASSWORD)"}


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("F1")
@pytest.mark.fault("N12")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_worker_leaves_at_once(lab: Lab, tmp_path: Path, number: signal.Signals) -> None:
    with command(["run"], lab.env(timeout_job="60"), tmp_path) as run:
        wait_for_poll(lab)
        run.send(number)
        assert run.wait(2.0) == 0
        assert "stopped; nothing is left running" in run.errors


@pytest.mark.fault("F1")
def test_being_told_to_leave_is_no_failure_even_if_nobody_ever_answered(lab: Lab, tmp_path: Path) -> None:
    with command(["run"], lab.env(timeout_job="60", api_url=f"http://127.0.0.1:{free_port()}"), tmp_path) as run:
        run.wait_for("no job can be taken")
        run.send(signal.SIGTERM)
        assert run.wait(5.0) == 0


@pytest.mark.fault("F1")
def test_a_job_that_a_signal_meets_on_its_way_here_is_not_lost(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit("true")
    lab.server.set_faults({"method": "GET", "path": "^/jobs$", "delay_s": 1.0})
    with command(["run"], lab.env(), tmp_path) as run:
        wait_until(lambda: len(lab.server.events("fault")) > 0, "the question is under way", DEADLINE_S)
        run.send(signal.SIGTERM)
        assert run.wait() == 0
    assert lab.server.state(job) == "finished"


@pytest.mark.fault("F2")
def test_the_first_signal_lets_the_job_end(lab: Lab, tmp_path: Path) -> None:
    jobs = [lab.submit(UNTIL_LET_GO, "; touch /files/out/x", files_up={"output": "out"}), lab.submit("true")]
    with command(["run"], lab.env(), tmp_path) as run:
        lab.server.wait_for_state(jobs[0], "running")
        run.send(signal.SIGINT)
        run.wait_for(f"finishing job {jobs[0]}")
        beaten = len(lab.server.events("update", jobs[0]))
        wait_until(lambda: len(lab.server.events("update", jobs[0])) > beaten + 2, "beats go on", DEADLINE_S)
        lab.let_go(jobs[0])
        assert run.wait() == 0
    assert [lab.server.state(job) for job in jobs] == ["finished", "queued"]
    assert "output/out/x" in lab.server.results(jobs[0])


@pytest.mark.fault("F3")
@pytest.mark.fault("N12")
def test_the_second_signal_gives_the_job_back(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit(STUBBORN, files_up={"output": "out"})
    with command(["run"], lab.env(), tmp_path) as run:
        lab.server.wait_for_state(job, "running")
        run.send(signal.SIGINT)
        run.wait_for("finishing job")
        run.send(signal.SIGTERM)
        assert run.wait(25.0) == 0
    assert lab.server.updates(job) == ["preprocessing", "running", "queued"]
    assert lab.server.events("stored", job) == []
    assert lab.take_as_another_account() == [job]
