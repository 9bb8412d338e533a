"""Pages of gateways, filters and portals thrown at a whole worker, and a server that commits and answers 500.

Each kind of page meets each call of one job's way (B21, B22): where to sign in, the sign-in, the question for a job,
keep-alives and phases, links, the question how the job stands, and the end. The job ends as if nothing had been.
"""

import pytest

from jobfetcher.sources.worker_api import auth, source
from mock_api.gateway import Page
from tests.support.services import wait_until
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Lab, running_worker, work

pytestmark = pytest.mark.docker

STATUS = "^/jobs/[0-9]+/status$"
UPDATE = {"method": "PUT", "path": STATUS}
CALLS = (
    {"method": "GET", "path": "^/access_info$"},
    {"method": "POST", "path": "^/$"},  # the sign-in
    {"method": "GET", "path": "^/jobs$"},
    {"method": "GET", "path": "^/files/.*/url$"},
    {"method": "POST", "path": "^/jobs/[0-9]+/files/url$"},
    {"method": "GET", "path": STATUS},
    UPDATE,
)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that may be on its way is waited for 30 s, and a sign-in that failed 30 s; here for a moment."""
    monkeypatch.setattr(source, "IN_DOUBT_S", 0.5)
    monkeypatch.setattr(auth, "_PAUSE_S", 0.2)


def signing_in(lab: Lab) -> dict[str, str]:
    return {"username": "worker", "password": "worker-password", "aws_endpoint_url": lab.server.url}


@pytest.mark.fault("B21", "B22", "S20")
@pytest.mark.parametrize("page", list(Page))
def test_pages_to_every_call_cost_nothing_but_time(lab: Lab, page: Page) -> None:
    """From the start on: nobody has spoken to the worker before the first page."""
    given = lab.server.put_input("in", b"input")
    job = lab.submit("cp /files/in /files/out/copy", files_down={"in": given}, files_up={"output": "out"})
    lab.server.set_faults(*({**call, "page": page, "times": 2} for call in CALLS))
    heard = work(lab.settings(**signing_in(lab)))
    assert lab.server.heard_ends(job) == ["finished"]
    assert lab.server.results(job)["output/out/copy"] == b"input"
    met = {str(event["note"]).split()[0] + " " + str(event["note"]).split()[1] for event in lab.server.events("fault")}
    assert {"GET /access_info", "GET /jobs", f"PUT /jobs/{job}/status", f"POST /jobs/{job}/files/url"} <= met
    first = heard.messages("server_away")[0]
    assert first.startswith("no job can be taken: ")
    assert "text/" in first
    assert ("Location" in first) is (page is Page.REDIRECT)


@pytest.mark.fault("B21", "B22", "A7")
@pytest.mark.parametrize("page", list(Page))
@pytest.mark.parametrize(("command", "end"), [("true", "finished"), ("exit 3", "error")])
def test_an_end_is_told_until_it_is_accepted_whatever_pages_come(lab: Lab, page: Page, command: str, end: str) -> None:
    """Preprocessing, running, postprocessing, then the end."""
    job = lab.submit(command)
    lab.server.set_faults({**UPDATE, "skip": 3, "times": 3, "page": page})
    work(lab.settings(timeout_status="30"))
    assert lab.server.heard_ends(job) == [end]
    assert len(lab.server.outbox()) == 1


@pytest.mark.fault("B21", "B7")
@pytest.mark.parametrize("page", [Page.NO_BACKEND, Page.LOGIN])
def test_a_job_in_hand_outlives_a_page_that_answers_everything(lab: Lab, page: Page) -> None:
    """The container goes on, and the end is told when the page is gone."""
    job = lab.submit(UNTIL_LET_GO)
    with running_worker(lab.settings(), lambda taken, idle_s: taken == 1) as running:
        lab.server.wait_for_state(job, "running")
        [container] = lab.containers()
        lab.server.set_faults({"path": "", "page": page})
        wait_until(lambda: len(lab.server.events("fault")) >= 4, "pages answer", DEADLINE_S)
        assert [one["Id"] for one in lab.containers()] == [container["Id"]]
        lab.let_go(job)
        pages = len(lab.server.events("fault"))
        wait_until(lambda: len(lab.server.events("fault")) > pages + 1, "they go on as it ends", DEADLINE_S)
        lab.server.set_faults()
        running.join()
    assert lab.server.heard_ends(job) == ["finished"]
    assert len(running.heard.messages("server_away")) >= 1
    assert len(running.heard.messages("server_back")) == 1


@pytest.mark.fault("B23", "S19", "A7")
@pytest.mark.parametrize(("command", "end"), [("true", "finished"), ("exit 3", "error")])
def test_an_end_that_was_committed_and_answered_500_reaches_the_user(lab: Lab, command: str, end: str) -> None:
    """The queue says that it is over from the first try on; the user's side hears of it when it is back."""
    job = lab.submit(command)
    lab.server.set_faults({**UPDATE, "skip": 3, "times": 3, "unheard": True})
    work(lab.settings(timeout_status="30"))
    assert lab.server.queue_state(job) == end
    assert lab.server.heard_ends(job) == [end]
    [tally] = lab.server.tally()
    assert (len(tally["unheard_ends"]), tally["ends"], tally["late_requests"]) == (3, [end], 0)


@pytest.mark.fault("B24", "B6")
def test_a_403_for_a_while_costs_no_result(lab: Lab) -> None:
    """The API's own: it does not let the account in, for all of its life with this job but the question for it."""
    job = lab.submit("true")
    own = {"status": 403, "body": '{"detail": "Not a member of the \'workers\' group"}'}
    lab.server.set_faults({**UPDATE, **own, "times": 6})
    work(lab.settings(**signing_in(lab)))
    assert lab.server.heard_ends(job) == ["finished"]
    flows = [event["note"] for event in lab.server.events("sign_in")]
    assert flows == ["USER_PASSWORD_AUTH", "REFRESH_TOKEN_AUTH"]


@pytest.mark.fault("B23", "S19")
def test_a_users_side_that_is_away_costs_no_job_that_nobody_has_taken_yet(lab: Lab) -> None:
    """A question for a job would be answered 500, and the job be handed out all the same: this account never got it."""
    ends, waits = lab.submit(UNTIL_LET_GO), lab.submit("true")
    settings = lab.settings(timeout_job="2", timeout_status="0.3")
    with running_worker(settings, lambda taken, idle_s: taken == 2) as running:
        lab.server.wait_for_state(ends, "running")
        lab.server.set_user_side(away=True)
        running.heard.wait_for("server_away")
        lab.let_go(ends)
        running.heard.wait_for("settle_failed")
        assert lab.server.queue_state(ends) == "finished"
        assert lab.server.heard_ends(ends) == []
        lab.server.set_user_side(away=False)
        running.join()
    assert [lab.server.heard_ends(job) for job in (ends, waits)] == [["finished"], ["finished"]]
    assert lab.server.events("lost_pull") == []
