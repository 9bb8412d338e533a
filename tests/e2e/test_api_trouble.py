"""A server that does not answer as it should while jobs are asked for, held and ended: nothing is lost or doubled."""

import json

import httpx
import pytest

from jobfetcher.sources.worker_api import source
from tests.support.services import wait_until
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Lab, running_worker, work

pytestmark = pytest.mark.docker

POLL = {"method": "GET", "path": "^/jobs$"}
UPDATE = {"method": "PUT", "path": "^/jobs/[0-9]+/status$"}
SERVER_ERROR = {"status": 500, "body": "Internal Server Error"}


@pytest.fixture(autouse=True)
def _short_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update without an answer is in doubt for the length of a whole call, 30 s; here for one second."""
    monkeypatch.setattr(source, "IN_DOUBT_S", 1.0)


@pytest.mark.parametrize(
    "trouble",
    [{**SERVER_ERROR, "times": 2}, {"drop": "before", "times": 1}, {"drop": "after", "times": 1}],
    ids=["500", "lost", "reply-lost"],
)
@pytest.mark.fault("B12")
@pytest.mark.fault("B13")
def test_heartbeats_that_fail_are_sent_again(lab: Lab, trouble: dict[str, object]) -> None:
    job = lab.submit(UNTIL_LET_GO)
    lab.server.set_faults({**UPDATE, **trouble, "skip": 2})
    with running_worker(lab.settings(), lambda taken, idle_s: taken == 1) as running:
        running.heard.wait_for("heartbeat_recovered")
        lab.let_go(job)
        running.join()
    assert len(running.heard.all("heartbeat_failed")) == 1  # one line per change of state, not per try (J10)
    assert lab.server.updates(job) == ["preprocessing", "running", "postprocessing", "finished"]


@pytest.mark.fault("B12")
def test_a_job_that_ends_while_heartbeats_fail_ends_in_order(lab: Lab) -> None:
    job = lab.submit("true")
    lab.server.set_faults({**UPDATE, **SERVER_ERROR, "times": 1})
    work(lab.settings())
    assert lab.server.updates(job) == ["preprocessing", "running", "postprocessing", "finished"]


@pytest.mark.fault("A7")
def test_an_end_whose_reply_is_lost_is_told_until_it_is_accepted(lab: Lab) -> None:
    """Preprocessing, running, postprocessing, then the end; the end of job 1 is handled, that of job 2 is not. No state
    that is read back could tell the worker which is which."""
    heard_not_answered, not_heard = lab.submit("true"), lab.submit("exit 7")
    only_the_end = {"method": "PUT", "skip": 3, "times": 1}
    lab.server.set_faults(
        {**only_the_end, "path": f"^/jobs/{heard_not_answered}/", "drop": "after"},
        {**only_the_end, "path": f"^/jobs/{not_heard}/", "drop": "before"},
    )
    lab.told_again.add(heard_not_answered)
    heard = work(lab.settings(timeout_status="30"), jobs=2)
    assert len(heard.all("job_ended")) == 2
    assert [lab.server.updates(job)[-1] for job in (heard_not_answered, not_heard)] == ["finished", "error"]
    tallies = {tally["job_id"]: (tally["ends"], tally["repeats"]) for tally in lab.server.tally()}
    assert tallies == {heard_not_answered: (["finished", "finished"], 1), not_heard: (["error"], 0)}


@pytest.mark.fault("A7")
def test_an_end_that_cannot_be_told_is_told_at_the_next_start(lab: Lab) -> None:
    job = lab.submit("exit 7")
    lab.server.set_faults({**UPDATE, **SERVER_ERROR, "skip": 3, "times": 100})
    heard = work(lab.settings(timeout_status="30"))
    assert heard.all("job_ended") == []
    assert heard.messages("unheard") == [f"job {job} is not wholly ended; the next start goes on"]
    lab.server.set_faults()
    with running_worker(lab.settings()) as running:
        running.heard.wait_for("job_ended")
    assert lab.server.updates(job)[-1] == "error"


@pytest.mark.fault("B4")
def test_a_token_that_expires_in_mid_job_is_replaced(lab: Lab) -> None:
    job = lab.submit(UNTIL_LET_GO, "; touch /files/out/x", files_up={"output": "out"})
    signing_in = lab.settings(username="worker", password="worker-password", aws_endpoint_url=lab.server.url)
    with running_worker(signing_in, lambda taken, idle_s: taken == 1) as running:
        lab.server.wait_for_state(job, "running")
        lab.server.expire_tokens()
        wait_until(lambda: len(lab.server.events("refused")) > 0, "a token is refused", DEADLINE_S)
        accepted = len(lab.server.events("update", job))
        wait_until(lambda: len(lab.server.events("update", job)) > accepted + 2, "beats go on", DEADLINE_S)
        lab.let_go(job)
        running.join()
    assert lab.ended(job)[0] == "finished"
    assert len(lab.server.events("refused")) == 1
    flows = [(event["note"], event["code"]) for event in lab.server.events("sign_in")]
    assert flows == [("USER_PASSWORD_AUTH", 200), ("REFRESH_TOKEN_AUTH", 200)]


@pytest.mark.fault("B4")
@pytest.mark.fault("B6")
@pytest.mark.parametrize("code", [401, 403])
def test_a_refusal_never_cancels_a_running_job(lab: Lab, code: int) -> None:
    job = lab.submit(UNTIL_LET_GO)
    with running_worker(lab.settings(), lambda taken, idle_s: taken == 1) as running:
        lab.server.wait_for_state(job, "running")
        lab.server.set_faults({**UPDATE, "status": code, "times": 1})
        running.heard.wait_for("heartbeat_recovered")
        lab.let_go(job)
        running.join()
    assert lab.ended(job)[0] == "finished"


@pytest.mark.fault("B12")
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"garbage": True}, "text/html; charset=utf-8, it begins: "),
        ({"status": 200, "body": "[]"}, "is not an object"),
        ({"status": 200, "body": '{"1": '}, "is not the JSON expected"),
        ({"status": 502, "body": "bad gateway"}, "something before it answered 502"),
        ({"drop": "before"}, "no answer from 127.0.0.1"),
        ({"status": 404, "body": "{}"}, "something before it answered 404"),
    ],
    ids=["html", "list", "torn", "502", "dropped", "404"],
)
def test_a_bad_answer_to_a_poll_is_not_no_job(lab: Lab, answer: dict[str, object], said: str) -> None:
    job = lab.submit("true")
    lab.server.set_faults({**POLL, **answer, "times": 2})
    heard = work(lab.settings())
    assert lab.ended(job)[0] == "finished"
    (complaint,) = heard.messages("server_away")  # once, though it happened twice
    assert len(heard.messages("server_back")) == 1
    assert complaint.startswith("no job can be taken: ")
    assert said in complaint
    assert heard.all("no_job") == []


@pytest.mark.fault("B11")
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(lab: Lab, status: int) -> None:
    job = lab.submit("true")
    lab.server.set_faults({**POLL, "status": status, "retry_after": 2, "times": 1})
    work(lab.settings())
    assert lab.ended(job)[0] == "finished"
    (refused,) = lab.server.events("fault")
    (pulled,) = lab.server.events("pull")
    assert pulled["time"] - refused["time"] >= 2


@pytest.mark.fault("B16")
def test_of_two_jobs_handed_out_at_once_the_second_goes_back(lab: Lab) -> None:
    jobs = [lab.submit("true"), lab.submit("true")]
    headers = {"Authorization": "Bearer mock-token"}
    offer = {"memory": 10**6, "cpu_cores": 8, "limit": 2}
    both = httpx.get(f"{lab.server.url}/jobs", params=offer, headers=headers, trust_env=False).json()
    assert sorted(map(int, both)) == jobs
    lab.server.set_faults({**POLL, "status": 200, "body": json.dumps(both), "times": 1})
    work(lab.settings())
    assert [lab.server.updates(job)[-1] for job in jobs] == ["finished", "queued"]
    assert lab.take_as_another_account() == jobs[1:]
