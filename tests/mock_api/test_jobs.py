"""Jobs and their states: the endpoints and the rows S1 to S12, S17 and S18 of PROTOCOL.md."""

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.mock_api.calls import pull, put, run_through, worker_client
from tests.mock_api.conftest import Workers
from tests.support.mock_server import MockServer, job_spec, running_mock_api
from tests.support.services import wait_until

LEASE_S = 300


@pytest.mark.fault("S1")
def test_a_pull_hands_a_job_out_once_and_marks_it_at_once(mock: MockServer, workers: Workers) -> None:
    job_id = mock.submit(job_spec())
    assert pull(workers("one")) == [job_id]
    assert mock.state(job_id) == "pulled"
    assert pull(workers("two")) == []


def test_specs_carry_id_date_and_what_the_user_wrote(mock: MockServer, worker: httpx.Client) -> None:
    spec = job_spec(app={"cmd": ["a &&", "b"], "env": {"K": "v"}}, meta={"mine": [1]}, extra={"kept": True})
    job_id = mock.submit(spec)
    answer = worker.get("/jobs", params={"memory": 1}).json()
    assert list(answer) == [str(job_id)]
    handed = answer[str(job_id)]
    assert handed["app"] == spec["app"]
    assert handed["extra"] == {"kept": True}
    assert handed["meta"]["job_id"] == mock.job(job_id)["user_job_id"] != job_id  # S22
    assert handed["meta"]["mine"] == [1]
    assert handed["meta"]["date_created"].startswith("20")
    assert set(handed["hardware"]) == {"cpu_cores", "memory", "gpu_model", "gpu_archi", "gpu_mem"}


def test_a_raw_submission_is_handed_out_unchecked(mock: MockServer, worker: httpx.Client) -> None:
    job_id = mock.submit({"handler": {"image_url": 7}}, raw=True)
    handed = worker.get("/jobs", params={"memory": 1}).json()[str(job_id)]
    assert handed["handler"] == {"image_url": 7}
    assert handed["meta"]["job_id"] == mock.job(job_id)["user_job_id"]


@pytest.mark.fault("S3")
def test_an_account_never_gets_a_job_again_nor_one_whose_name_is_part_of_a_pullers(
    mock: MockServer, workers: Workers
) -> None:
    lab1, lab10, other = workers("lab1"), workers("lab10"), workers("other")
    job_id = mock.submit(job_spec())
    assert pull(lab10) == [job_id]
    assert put(lab10, job_id, "queued") == 204
    assert pull(lab10) == []
    assert pull(lab1) == []  # "lab1" is in "lab10"
    assert pull(other) == [job_id]


@pytest.mark.fault("S3")
def test_the_rule_does_not_work_the_other_way_round(mock: MockServer, workers: Workers) -> None:
    lab1, lab10 = workers("lab1"), workers("lab10")
    job_id = mock.submit(job_spec())
    assert pull(lab1) == [job_id]
    assert put(lab1, job_id, "queued") == 204
    assert pull(lab10) == [job_id]


@pytest.mark.fault("S3")
def test_retry_different_off_gives_a_job_again(tmp_path: Path) -> None:
    with running_mock_api(tmp_path, retry_different=False) as mock, worker_client(mock) as worker:
        job_id = mock.submit(job_spec())
        for _ in range(2):
            assert pull(worker) == [job_id]
            assert put(worker, job_id, "queued") == 204
        assert mock.violations() == []


@pytest.mark.fault("S2")
def test_the_account_is_the_identity_whatever_the_connection(mock: MockServer) -> None:
    job_id = mock.submit(job_spec())
    with worker_client(mock) as one_host, worker_client(mock) as another_host:
        assert pull(one_host) == [job_id]
        assert put(another_host, job_id, "preprocessing") == 204


@pytest.mark.fault("S4")
@pytest.mark.parametrize("reached", ["pulled", "preprocessing", "running", "postprocessing"])
def test_silent_jobs_go_back_after_the_lease_and_not_before(
    mock: MockServer, worker: httpx.Client, reached: str
) -> None:
    job_id = mock.submit(job_spec())
    assert pull(worker) == [job_id]
    if reached != "pulled":
        assert put(worker, job_id, reached) == 204
    mock.advance(LEASE_S - 10)
    mock.sweep()
    assert mock.state(job_id) == reached
    mock.advance(20)
    mock.sweep()
    assert mock.state(job_id) == "queued"


@pytest.mark.fault("S4")
def test_the_third_silence_is_an_error(mock: MockServer, workers: Workers) -> None:
    job_id = mock.submit(job_spec())
    for name, then in (("one", "queued"), ("two", "queued"), ("six", "error")):
        assert pull(workers(name)) == [job_id]
        mock.advance(LEASE_S + 1)
        mock.sweep()
        assert mock.state(job_id) == then
    assert [mail["subject"] for mail in mock.outbox()] == [f"Job {mock.job(job_id)['user_job_id']}: error"]
    assert mock.job(job_id)["details"] == (
        "\ntimeout 1 (workers tried: ;one)\ntimeout 2 (workers tried: ;one;two)\nmax retries reached"
    )


@pytest.mark.fault("S4")
def test_the_server_sweeps_by_itself(tmp_path: Path) -> None:
    with running_mock_api(tmp_path, sweep_period_s=0.05, lease_s=0.2) as mock, worker_client(mock) as worker:
        job_id = mock.submit(job_spec(), retries=0)
        assert pull(worker) == [job_id]
        assert mock.wait_for_state(job_id, "error", timeout_s=10) == "error"


@pytest.mark.fault("S5")
def test_after_a_requeue_the_holders_heartbeat_takes_the_job_back(mock: MockServer, workers: Workers) -> None:
    one, two = workers("one"), workers("two")
    job_id = mock.submit(job_spec())
    assert pull(one) == [job_id]
    mock.advance(LEASE_S + 1)
    mock.sweep()
    assert put(one, job_id, "running") == 204
    assert mock.state(job_id) == "running"
    assert pull(two) == []


@pytest.mark.fault("S5")
def test_once_another_has_it_the_old_holder_gets_404_and_the_new_one_is_not_disturbed(
    mock: MockServer, workers: Workers
) -> None:
    one, two = workers("one"), workers("two")
    job_id = mock.submit(job_spec())
    assert pull(one) == [job_id]
    mock.advance(LEASE_S + 1)
    mock.sweep()
    assert pull(two) == [job_id]
    assert put(two, job_id, "preprocessing") == 204
    assert put(one, job_id, "running") == 404
    assert one.get(f"/jobs/{job_id}/status").json() == "preprocessing"


@pytest.mark.fault("S6")
def test_a_late_update_reopens_a_finished_job_and_it_is_run_again(mock: MockServer, workers: Workers) -> None:
    one, two = workers("one"), workers("two")
    job_id = mock.submit(job_spec())
    assert pull(one) == [job_id]
    run_through(one, job_id)
    assert put(one, job_id, "running") == 204
    assert mock.state(job_id) == "running"
    mock.advance(LEASE_S + 1)
    mock.sweep()
    assert pull(two) == [job_id]
    assert [found["rule"] for found in mock.violations()] == ["running after finished"]


@pytest.mark.fault("S7")
def test_of_a_deleted_job_the_first_update_gets_404_and_every_later_one_500(
    mock: MockServer, worker: httpx.Client
) -> None:
    job_id = mock.submit(job_spec())
    assert pull(worker) == [job_id]
    mock.delete(job_id)
    assert worker.get(f"/jobs/{job_id}/status").json() == "pulled"  # nobody has told the queue yet
    assert [put(worker, job_id, "running") for _ in range(4)] == [404, 500, 500, 500]
    assert worker.get(f"/jobs/{job_id}/status").status_code == 404


@pytest.mark.fault("S7")
@pytest.mark.parametrize("by_sweep", [True, False])
def test_when_the_sweep_met_the_deletion_first_no_update_ever_gets_404(
    mock: MockServer, worker: httpx.Client, by_sweep: bool
) -> None:
    job_id = mock.submit(job_spec())
    assert pull(worker) == [job_id]
    mock.delete(job_id, swept=not by_sweep)
    if by_sweep:
        mock.advance(LEASE_S + 1)
        mock.sweep()
    assert [put(worker, job_id, "running") for _ in range(3)] == [500, 500, 500]
    assert worker.get(f"/jobs/{job_id}/status").status_code == 404


def test_a_job_deleted_in_the_queue_is_not_handed_out(mock: MockServer, worker: httpx.Client) -> None:
    mock.delete(mock.submit(job_spec()))
    assert pull(worker) == []


@pytest.mark.fault("S8")
@pytest.mark.parametrize("lost_by", ["deletion", "another's pull", "never pulled"])
def test_an_upload_url_for_a_lost_job_is_a_500(mock: MockServer, workers: Workers, lost_by: str) -> None:
    one, two = workers("one"), workers("two")
    job_id = mock.submit(job_spec())
    where = {"type": "output", "base_path": "out"}
    if lost_by != "never pulled":
        assert pull(one) == [job_id]
        assert one.post(f"/jobs/{job_id}/files/url", params=where).status_code == 201
    if lost_by == "deletion":
        mock.delete(job_id)
        assert one.post(f"/jobs/{job_id}/files/url", params=where).status_code == 201  # the queue does not know yet
        assert put(one, job_id, "running") == 404
    if lost_by == "another's pull":
        mock.advance(LEASE_S + 1)
        mock.sweep()
        assert pull(two) == [job_id]
    assert one.post(f"/jobs/{job_id}/files/url", params=where).status_code == 500


@pytest.mark.fault("S9")
def test_of_two_simultaneous_updates_the_second_fails(tmp_path: Path) -> None:
    with running_mock_api(tmp_path, conflict_500=True) as mock, worker_client(mock) as worker:
        job_id = mock.submit(job_spec())
        assert pull(worker) == [job_id]
        # the first is held up in the server until the second has been answered
        mock.set_faults({"method": "PUT", "path": "/status", "times": 1, "delay_s": 5})
        codes: list[int] = []
        first = threading.Thread(target=lambda: codes.append(put(worker, job_id, "preprocessing")))
        first.start()
        wait_until(lambda: bool(mock.events("fault")), "the first update to arrive")
        codes.append(put(worker, job_id, "preprocessing"))
        first.join()
        assert codes == [500, 204]
        assert [event["job_id"] for event in mock.events("overlap")] == [job_id]


@pytest.mark.fault("S10")
def test_a_release_puts_the_job_back_at_once_and_costs_no_retry(mock: MockServer, workers: Workers) -> None:
    job_id = mock.submit(job_spec(), retries=0)
    for name in ("one", "two", "six"):
        client = workers(name)
        assert pull(client) == [job_id]
        assert put(client, job_id, "preprocessing") == 204
        assert put(client, job_id, "queued") == 204
        assert mock.state(job_id) == "queued"
    assert mock.job(job_id)["retries"] == 0
    assert mock.violations() == []


@pytest.mark.fault("S11")
def test_every_end_is_a_mail_and_details_are_appended_unescaped(mock: MockServer, worker: httpx.Client) -> None:
    job_id = mock.submit(job_spec())
    assert pull(worker) == [job_id]
    assert put(worker, job_id, "preprocessing", "one") == 204
    assert put(worker, job_id, "preprocessing") == 204
    assert put(worker, job_id, "error", "<b>two</b>") == 204
    assert put(worker, job_id, "error") == 204
    assert mock.job(job_id)["details"] == "\none\n<b>two</b>"
    mails = mock.outbox()
    assert [mail["subject"] for mail in mails] == [f"Job {mock.job(job_id)['user_job_id']}: error"] * 2
    assert all("one\n<b>two</b>" in mail["html"] for mail in mails)


@pytest.mark.fault("S12")
def test_details_travel_in_the_query_and_too_long_ones_are_flagged(mock: MockServer, worker: httpx.Client) -> None:
    job_id = mock.submit(job_spec())
    assert pull(worker) == [job_id]
    assert put(worker, job_id, "preprocessing", "é" * 750) == 204  # 1,500 bytes
    assert mock.violations() == []
    assert put(worker, job_id, "running", "é" * 751) == 204
    assert [found["rule"] for found in mock.violations()] == ["details of 1502 bytes; at most 1500 (S12)"]


@pytest.mark.fault("S17")
def test_error_is_final(mock: MockServer, workers: Workers) -> None:
    job_id = mock.submit(job_spec())
    one = workers("one")
    assert pull(one) == [job_id]
    assert put(one, job_id, "error", "no such file") == 204
    mock.advance(10 * LEASE_S)
    mock.sweep()
    assert mock.state(job_id) == "error"
    assert pull(workers("two")) == []


@pytest.mark.fault("S18")
@pytest.mark.parametrize(
    ("needs", "offer", "fits"),
    [
        ({}, {"memory": 0, "cpu_cores": 0, "gpu_mem": 0}, True),
        ({"memory": 1000}, {"memory": 1000}, True),
        ({"memory": 1001}, {"memory": 1000}, False),
        ({"cpu_cores": 4}, {"cpu_cores": 4}, True),
        ({"cpu_cores": 5}, {"cpu_cores": 4}, False),
        ({"gpu_mem": 8000}, {"gpu_mem": 8000}, True),
        ({"gpu_mem": 8001}, {"gpu_mem": 8000}, False),
        ({"gpu_model": "A"}, {"gpu_model": "A"}, True),
        ({"gpu_model": "A"}, {"gpu_model": "AA"}, False),
        ({"gpu_model": "A"}, {}, False),
        ({"gpu_archi": "ampere"}, {"gpu_archi": "ampere"}, True),
        ({"gpu_archi": "ampere"}, {"gpu_archi": "Ampere"}, False),
        ({"gpu_model": None, "memory": None}, {"gpu_model": "A"}, True),
    ],
)
def test_models_are_compared_for_equality_amounts_by_at_most(
    mock: MockServer, worker: httpx.Client, needs: dict[str, Any], offer: dict[str, Any], fits: bool
) -> None:
    job_id = mock.submit(job_spec(hardware=needs))
    assert pull(worker, **offer) == ([job_id] if fits else [])


def test_defaults_of_an_offer_are_one_core_and_no_gpu(mock: MockServer, worker: httpx.Client) -> None:
    mock.submit(job_spec(hardware={"cpu_cores": 2}))
    mock.submit(job_spec(hardware={"gpu_mem": 1}))
    small = mock.submit(job_spec(hardware={"cpu_cores": 1, "gpu_mem": 0}))
    answer = worker.get("/jobs", params={"memory": 1, "limit": 9})
    assert list(answer.json()) == [str(small)]
    assert worker.get("/jobs").status_code == 422  # memory is required


@pytest.mark.fault("S21")
def test_groups_are_a_preference_then_comes_priority_then_age(mock: MockServer, worker: httpx.Client) -> None:
    first, urgent, second = (mock.submit(job_spec(), priority=priority) for priority in (0, 5, 0))
    red, blue = mock.submit(job_spec(), group="red"), mock.submit(job_spec(), group="blue", priority=1)
    assert pull(worker, groups=["red", "green"]) == [red]
    assert pull(worker, limit=9) == [urgent, blue, first, second]


@pytest.mark.fault("S21")
def test_an_account_sees_the_jobs_of_its_environment_and_those_of_none(mock: MockServer, workers: Workers) -> None:
    here, cloud = workers("here"), workers("there", groups=("workers", "cloud"))
    anywhere, of_cloud, of_local = (mock.submit(job_spec(), environment=name) for name in (None, "cloud", "local"))
    assert pull(cloud, older_than=60, limit=9) == [of_cloud]  # the age is asked only of jobs for anywhere
    assert pull(here, older_than=60, limit=9) == [of_local]
    mock.advance(61)
    assert pull(here, older_than=60, limit=9) == [anywhere]


def test_a_priority_is_0_to_5(mock: MockServer) -> None:
    for priority in (-1, 6):
        with pytest.raises(httpx.HTTPStatusError, match="422"):
            mock.submit(job_spec(), priority=priority)


def test_no_limit_below_one_hands_anything_out(mock: MockServer, worker: httpx.Client) -> None:
    job_id = mock.submit(job_spec())
    assert pull(worker, limit=0) == pull(worker, limit=-1) == []
    assert pull(worker, limit=1) == [job_id]


@pytest.mark.fault("S22")
def test_every_job_has_labels_and_two_numbers(mock: MockServer, worker: httpx.Client) -> None:
    one = mock.submit(job_spec(handler={"image_url": "busybox", "entrypoint": "train"}))
    two = mock.submit(job_spec())
    handed = worker.get("/jobs", params={"memory": 1, "limit": 2}).json()
    labels = [
        [handed[str(job)]["handler"][name] for name in ("image_name", "image_version", "entrypoint")]
        for job in (one, two)
    ]
    assert labels == [["decode", "latest", "train"], ["decode", "latest", "fit"]]
    assert [handed[str(job)]["meta"]["job_id"] for job in (one, two)] == [1001, 1002]


@pytest.mark.fault("S23")
def test_an_account_with_a_semicolon_never_pulls_and_the_welcome_needs_no_sign_in(
    mock: MockServer, workers: Workers
) -> None:
    job_id = mock.submit(job_spec())
    answer = workers("lab;1").get("/jobs", params={"memory": 1})
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/json")
    assert "';'" in answer.json()["detail"]
    assert mock.state(job_id) == "queued"
    with httpx.Client(base_url=mock.url, trust_env=False) as nobody:
        assert list(nobody.get("/").json()) == ["message"]
        assert nobody.get("/docs").status_code == 200


def test_of_a_job_that_never_was_the_status_is_404_and_an_update_500(worker: httpx.Client) -> None:
    assert worker.get("/jobs/99/status").status_code == 404
    assert put(worker, 99, "running") == 500


def test_an_unknown_state_is_refused(mock: MockServer, worker: httpx.Client) -> None:
    job_id = mock.submit(job_spec())
    assert pull(worker) == [job_id]
    assert put(worker, job_id, "sleeping") == 422


def test_many_workers_at_once_share_no_job(mock: MockServer) -> None:
    jobs = {mock.submit(job_spec()) for _ in range(40)}
    got: list[int] = []

    def take() -> None:
        with worker_client(mock) as client:
            while found := pull(client):
                got.extend(found)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(jobs)


def test_jobs_and_record_outlive_a_restart(tmp_path: Path) -> None:
    with running_mock_api(tmp_path) as mock, worker_client(mock) as worker:
        job_id = mock.submit(job_spec())
        assert pull(worker) == [job_id]
        port = int(mock.url.rpartition(":")[2])
    with running_mock_api(tmp_path, port=port) as mock, worker_client(mock) as worker:
        assert put(worker, job_id, "preprocessing") == 204
        assert mock.updates(job_id) == ["preprocessing"]
        assert [event["kind"] for event in mock.events(job_id=job_id)] == ["submit", "pull", "update"]
