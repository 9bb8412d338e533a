"""What one job may use, and jobs side by side: limits seen from inside, out of memory, overlap, the queue behind."""

import pytest

from jobfetcher.worker import Leaving
from tests.support.services import wait_until
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Lab, running_worker, work

pytestmark = pytest.mark.docker

#: What a container sees of its own limits, cgroup v2 first, then v1: quota and period in microseconds, bytes.
SHOW_LIMITS = (
    "cd /sys/fs/cgroup;"
    "(cat cpu.max || echo $(cat cpu/cpu.cfs_quota_us) $(cat cpu/cpu.cfs_period_us)) > /files/out/cpu 2> /dev/null;"
    "(cat memory.max || cat memory/memory.limit_in_bytes) > /files/out/memory 2> /dev/null"
)


@pytest.mark.fault("E15")
def test_a_job_sees_the_limits_it_asked_for(lab: Lab) -> None:
    job = lab.submit(SHOW_LIMITS, hardware={"cpu_cores": 1, "memory": 64}, files_up={"output": "out"})
    work(lab.settings())
    assert lab.ended(job)[0] == "finished"
    stored = lab.server.results(job)
    quota, period = map(int, stored["output/out/cpu"].split())
    assert quota == period  # one core
    assert int(stored["output/out/memory"]) == 64 * 1024**2


@pytest.mark.fault("E15")
def test_a_job_that_asks_for_nothing_gets_its_share(lab: Lab) -> None:
    jobs = [lab.submit(SHOW_LIMITS, files_up={"output": "out"}) for _ in range(2)]
    work(lab.settings(max_jobs="1"), jobs=1)
    work(lab.settings(max_jobs="2"), jobs=1)
    quotas, memories = [], []
    for job in jobs:
        stored = lab.server.results(job)
        quota, period = map(int, stored["output/out/cpu"].split())
        quotas.append(quota / period)
        memories.append(int(stored["output/out/memory"]))
    assert quotas[1] == pytest.approx(quotas[0] / 2, rel=0.01)
    assert memories[1] == pytest.approx(memories[0] / 2, rel=0.4)  # other programs come and go between the two


@pytest.mark.fault("E4")
def test_out_of_memory_names_the_limit(lab: Lab) -> None:
    job = lab.submit("tail /dev/zero", hardware={"memory": 64})
    work(lab.settings())
    state, details = lab.ended(job)
    assert state == "error"
    assert details == "out of memory (limit 64 MiB), exit code 137"
    assert b'"out_of_memory"' in lab.server.results(job)["log/jobfetcher/provenance.json"]


def test_two_jobs_run_side_by_side_and_a_third_waits_at_the_server(lab: Lab) -> None:
    jobs = [lab.submit(UNTIL_LET_GO, hardware={"memory": 64}) for _ in range(3)]
    with running_worker(lab.settings(max_jobs="2"), lambda taken, idle_s: taken == 3) as running:
        for job in jobs[:2]:
            lab.server.wait_for_state(job, "running")
        offered = len(lab.server.events("poll"))
        beaten = len(lab.server.events("update"))
        wait_until(lambda: len(lab.server.events("update")) > beaten + 6, "some heartbeats of both", DEADLINE_S)
        assert [lab.server.state(job) for job in jobs] == ["running", "running", "queued"]
        assert len(lab.server.events("poll")) == offered  # with nothing free there is no question
        lab.let_go(jobs[0])
        lab.server.wait_for_state(jobs[2], "running")
        assert lab.server.state(jobs[1]) == "running"
        for job in jobs[1:]:
            lab.let_go(job)
        running.join()
    assert [lab.ended(job)[0] for job in jobs] == ["finished"] * 3


def test_the_next_job_starts_while_the_last_one_uploads(lab: Lab) -> None:
    uploading = lab.submit("touch /files/out/1 /files/out/2 /files/out/3 /files/out/4", files_up={"output": "out"})
    following = lab.submit("true")
    lab.server.set_faults({"method": "POST", "path": "^/_storage", "times": 4, "delay_s": 5})
    work(lab.settings(max_jobs="1", transfers="1"), jobs=2)
    said = [(event["job_id"], event["state"]) for event in lab.server.events("update")]
    assert lab.computed(uploading)[1] <= lab.computed(following)[0]
    assert said.index((following, "running")) < said.index((uploading, "finished"))


def test_a_job_that_does_not_fit_goes_back_and_another_account_can_take_it(lab: Lab) -> None:
    spec = {"handler": {"image_url": lab.image}, "hardware": {"memory": 10**9}}
    job = lab.server.submit(spec, raw=True)  # handed out to anyone, as a server with other rules would
    following = lab.submit("true")
    heard = work(lab.settings(), jobs=2)
    assert lab.server.updates(job) == ["queued"]
    assert lab.server.state(job) == "queued"
    (details,) = [event["details"] for event in lab.server.events("update", job)]
    assert "the job asks for 1000000000 MiB of memory" in details
    assert [event["reason"] for event in heard.all("job_ended")] == ["does_not_fit", None]
    assert lab.ended(following)[0] == "finished"
    assert lab.take_as_another_account() == [job]


@pytest.mark.fault("F3")
@pytest.mark.fault("N12")
def test_stopped_jobs_go_back_and_another_account_can_take_them(lab: Lab) -> None:
    jobs = [lab.submit("sleep 120", hardware={"memory": 64}) for _ in range(2)]
    with running_worker(lab.settings(max_jobs="2")) as running:
        for job in jobs:
            lab.server.wait_for_state(job, "running")
        running.leave(Leaving.STOP_JOBS)
        running.join()
    for job in jobs:
        assert lab.server.updates(job) == ["preprocessing", "running", "queued"]
        assert lab.server.state(job) == "queued"
        assert lab.ended(job)[1] == "the worker was shut down"
    assert lab.take_as_another_account() == jobs
