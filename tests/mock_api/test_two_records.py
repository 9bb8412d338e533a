"""The queue and the user's side are two records: one is committed first, and the other may not hear of it."""

import httpx
import pytest

from tests.mock_api.calls import pull, put, run_through
from tests.mock_api.conftest import Workers
from tests.support.mock_server import MockServer, job_spec

LEASE_S = 300
ONCE = {"method": "PUT", "path": "/status$", "unheard": True, "times": 1}


@pytest.mark.fault("S19")
def test_an_end_can_be_committed_and_answered_500_so_that_only_the_queue_knows(
    mock: MockServer, worker: httpx.Client
) -> None:
    job_id = mock.submit(job_spec())
    assert pull(worker) == [job_id]
    for state in ("preprocessing", "running", "postprocessing"):
        assert put(worker, job_id, state) == 204
    mock.set_faults({**ONCE, "times": 2})
    for _ in range(2):
        answer = worker.put(f"/jobs/{job_id}/status", params={"status": "finished", "runtime_details": "done"})
        assert (answer.status_code, answer.text) == (500, "Internal Server Error")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert worker.get(f"/jobs/{job_id}/status").json() == "finished"
    assert mock.queue_state(job_id) == "finished"
    assert (mock.state(job_id), mock.job(job_id)["details"]) == ("postprocessing", "")
    assert (mock.heard_ends(job_id), mock.outbox()) == ([], [])

    assert put(worker, job_id, "finished", "done") == 204
    assert (mock.state(job_id), mock.job(job_id)["details"]) == ("finished", "\ndone")
    assert mock.heard_ends(job_id) == ["finished"]
    assert len(mock.outbox()) == 1
    [tally] = mock.tally()
    assert (tally["ends"], tally["unheard_ends"], tally["repeats"]) == (["finished"], ["finished"] * 2, 0)
    assert mock.violations() == []


def test_a_repeat_of_an_accepted_end_is_a_second_mail(mock: MockServer, worker: httpx.Client) -> None:
    job_id = mock.submit(job_spec())
    assert pull(worker) == [job_id]
    run_through(worker, job_id)
    assert put(worker, job_id, "finished") == 204
    assert mock.heard_ends(job_id) == ["finished", "finished"]
    assert len(mock.outbox()) == 2
    assert mock.tally()[0]["repeats"] == 1


@pytest.mark.fault("S19")
def test_while_the_users_side_is_away_every_update_is_committed_and_a_pull_loses_its_job(
    mock: MockServer, workers: Workers
) -> None:
    one, two = workers("one"), workers("two")
    held, waiting = mock.submit(job_spec()), mock.submit(job_spec())
    assert pull(one) == [held]
    mock.set_user_side(away=True)
    assert [put(one, held, state) for state in ("preprocessing", "preprocessing", "running")] == [500] * 3
    assert two.get("/jobs", params={"memory": 1}).status_code == 500
    assert (mock.queue_state(held), mock.queue_state(waiting)) == ("running", "pulled")
    assert (mock.state(held), mock.state(waiting)) == ("pulled", "queued")
    assert put(two, held, "running") == 404  # whose job it is, the queue knows by itself
    assert two.get(f"/jobs/{held}/status").json() == "running"
    mock.set_user_side(away=False)
    assert put(one, held, "running") == 204
    assert mock.state(held) == "running"
    assert [event["job_id"] for event in mock.events("lost_pull")] == [waiting]
    assert pull(workers("six")) == []  # only the sweep brings it back


@pytest.mark.fault("S24")
def test_a_sweep_that_cannot_reach_the_users_side_ends_with_its_first_job(mock: MockServer, workers: Workers) -> None:
    one = workers("one")
    jobs = [mock.submit(job_spec()) for _ in range(3)]
    assert pull(one, limit=3) == jobs
    mock.advance(LEASE_S + 1)
    mock.set_user_side(away=True)
    mock.sweep()
    assert [mock.queue_state(job) for job in jobs] == ["queued", "pulled", "pulled"]
    assert [mock.state(job) for job in jobs] == ["pulled"] * 3
    assert [mock.job(job)["retries"] for job in jobs] == [0, 0, 0]
    mock.set_user_side(away=False)
    mock.sweep()
    assert [mock.state(job) for job in jobs] == ["pulled", "queued", "queued"]  # nobody ever tells of the first
    assert pull(workers("two"), limit=3) == jobs
    assert [mock.state(job) for job in jobs] == ["pulled"] * 3


@pytest.mark.fault("S7")
def test_a_job_deleted_in_the_queue_is_forgotten_by_the_pull_that_meets_it(
    mock: MockServer, worker: httpx.Client
) -> None:
    deleted, other = mock.submit(job_spec()), mock.submit(job_spec())
    mock.delete(deleted)
    assert worker.get(f"/jobs/{deleted}/status").json() == "queued"
    assert pull(worker) == [other]
    assert worker.get(f"/jobs/{deleted}/status").status_code == 404


def test_what_the_users_side_heard_is_told_whole_and_of_one_job(mock: MockServer, worker: httpx.Client) -> None:
    one, two = mock.submit(job_spec()), mock.submit(job_spec(), retries=0)
    assert pull(worker, limit=2) == [one, two]
    assert put(worker, one, "error", "no such file") == 204
    mock.advance(LEASE_S + 1)
    mock.sweep()
    words = [(word["job_id"], word["account"], word["state"], word["details"]) for word in mock.heard()]
    assert words[:3] == [
        (one, "worker", "pulled", ""),
        (two, "worker", "pulled", ""),
        (one, "worker", "error", "no such file"),
    ]
    assert [(word["account"], word["state"]) for word in mock.heard(two)] == [("worker", "pulled"), (None, "error")]
