"""The judge of the record, on made-up records: what it flags, and what it must leave alone."""

from dataclasses import asdict

import httpx
import pytest

from mock_api.record import UNHEARD, Entry, Tally, tallies, violations
from tests.mock_api.calls import pull, put, run_through
from tests.support.mock_server import MockServer, job_spec

RUN = ["preprocessing", "running", "postprocessing", "finished"]


def entry(kind: str, state: str | None = None, *, code: int | None = None, who: str = "one", text: str = "") -> Entry:
    return Entry(0, 0.0, kind, 1, who, state, text or None, code, None)


def fault(note: str) -> Entry:
    return Entry(0, 0.0, "fault", None, None, None, None, None, note)


def updates(*states: str, code: int = 204, who: str = "one") -> list[Entry]:
    return [entry("update", state, code=code, who=who) for state in states]


def unheard(state: str, *, who: str = "one") -> Entry:
    return Entry(0, 0.0, "update", 1, who, state, None, 500, UNHEARD)


def rules(*entries: Entry) -> list[str]:
    return [violation.rule for violation in violations([entry("pull"), *entries])]


@pytest.mark.parametrize(
    "states",
    [
        RUN,
        ["pulled", "pulled", *RUN],
        ["preprocessing", "preprocessing", "running", "running", "postprocessing", "postprocessing", "finished"],
        ["preprocessing", "running", "postprocessing", "error"],
        ["error"],
        ["preprocessing", "error"],
        ["queued"],
        ["postprocessing", "finished"],
        ["preprocessing", "postprocessing", "error"],
        ["preprocessing", "running", "queued"],
    ],
)
def test_right_orders(states: list[str]) -> None:
    assert rules(*updates(*states)) == []


@pytest.mark.parametrize(
    ("states", "flagged"),
    [
        (["running", "finished"], "finished before postprocessing"),
        (["preprocessing", "running", "finished"], "finished before postprocessing"),
        (["preprocessing", "running", "preprocessing"], "preprocessing after running: going backwards"),
        ([*RUN, "error"], "error after finished"),
        (["error", "finished"], "finished after error"),
        ([*RUN, "postprocessing"], "postprocessing after finished"),
        (["preprocessing", "queued", "preprocessing"], "preprocessing after the release"),
        (["queued", "error"], "error after the release"),
    ],
)
def test_wrong_orders(states: list[str], flagged: str) -> None:
    assert rules(*updates(*states)) == [flagged]


def test_refused_updates_do_not_count_towards_the_order() -> None:
    assert rules(*updates(*RUN[:3]), *updates("finished", "finished", code=500), *updates("finished")) == []


def test_the_same_end_may_be_told_again_and_nothing_else_may_follow_it() -> None:
    assert rules(*updates(*RUN[:3]), unheard("finished"), unheard("finished"), *updates("finished", "finished")) == []
    assert rules(*updates("error"), *updates("error", code=500), *updates("error")) == []
    assert rules(*updates(*RUN[:3]), unheard("finished"), *updates("running")) == ["running after finished"]
    assert rules(*updates("running"), unheard("error"), *updates("queued")) == ["queued after error"]


def test_an_update_after_a_404_is_flagged_the_one_that_learnt_it_is_not() -> None:
    assert rules(*updates("preprocessing", code=404)) == []
    after = "update after a 404 told the worker to stop"
    assert rules(*updates("preprocessing", "preprocessing", code=404)) == [after]
    assert rules(*updates("preprocessing", code=404), *updates("error", code=500)) == [after]
    assert rules(entry("status", code=404), *updates("preprocessing", code=500)) == [after]
    assert rules(entry("status", "running", code=200), *updates("preprocessing")) == []


def test_a_404_whose_answer_was_lost_told_nobody_to_stop() -> None:
    lost = fault('PUT /jobs/1/status {"drop":"after"}')
    assert rules(lost, *updates("running", code=404), *updates("running", code=500)) == []
    asked = fault('GET /jobs/1/status {"drop":"after"}')
    assert rules(asked, entry("status", code=404), *updates("running", code=404)) == []
    after = "update after a 404 told the worker to stop"
    assert rules(lost, *updates("running", "running", "running", code=404)) == [after]
    for other in (fault('PUT /jobs/11/status {"drop":"after"}'), fault('PUT /jobs/1/status {"drop":"before"}')):
        assert rules(other, *updates("running", "running", code=404)) == [after]


def test_asking_for_the_state_is_right_at_any_time() -> None:
    asked = [entry("status", state, code=200) for state in (*RUN, "queued", "error")]
    assert rules(*asked, *updates(*RUN), *asked) == []
    assert rules(entry("status", code=404), entry("status", code=404)) == []


@pytest.mark.parametrize(
    ("end", "name"), [("finished", "finished"), ("error", "error"), ("queued", "the release")], ids=str
)
def test_asking_where_to_upload_to_after_the_end_is_flagged(end: str, name: str) -> None:
    asks = entry("sign_upload", code=201)
    assert rules(*updates(*RUN[:3]), asks, asks, *updates(end)) == []
    assert rules(*updates(*RUN[:3], end), asks) == [f"asked where to upload to after {name}"]
    assert rules(*updates(*RUN[:3], end), entry("pull"), asks) == []
    assert rules(*updates(*RUN[:3], end), entry("sign_upload", code=500, who="two")) == []


def test_a_tally_counts_pulls_ends_and_what_came_after() -> None:
    asks = entry("sign_upload", code=201)
    record = [
        entry("pull"),
        *updates(*RUN[:3]),
        asks,
        *updates("queued"),
        entry("pull", who="two"),
        *updates("running", who="two"),
        *updates("error", code=500, who="two"),  # not accepted, so no end
        unheard("error", who="two"),
        *updates("error", who="two"),
        entry("status", "error", code=200, who="two"),  # a question is no late request
        *updates("running", code=404),
        entry("pull"),
        *updates(*RUN, "finished", "postprocessing"),
        asks,
        entry("pull", who="three"),
    ]
    assert tallies(record) == [
        Tally(1, "one", 2, ["queued", "finished", "finished"], [], repeats=1, late_requests=3),
        Tally(1, "two", 1, ["error"], ["error"]),
        Tally(1, "three", 1),
    ]


def test_the_server_tells_its_tally(mock: MockServer, worker: httpx.Client) -> None:
    first, second = mock.submit(job_spec()), mock.submit(job_spec())
    assert pull(worker, limit=2) == [first, second]
    run_through(worker, first)
    assert put(worker, first, "running") == 204
    assert mock.tally() == [
        asdict(Tally(first, "worker", 1, ["finished"], late_requests=1)),
        asdict(Tally(second, "worker", 1)),
    ]


def test_another_workers_404_is_not_ours() -> None:
    assert rules(entry("pull", who="two"), *updates("preprocessing", code=404, who="two"), *updates(*RUN)) == []


def test_an_update_by_a_stranger_is_flagged() -> None:
    assert rules(*updates("preprocessing", code=404, who="two")) == ["update by an account that never held the job"]


def test_a_second_pull_starts_afresh() -> None:
    assert rules(*updates("preprocessing", "queued"), entry("pull"), *updates(*RUN)) == []


@pytest.mark.parametrize("text", ["a < b", "a > b", "a & b"])
def test_raw_html_in_details_is_flagged(text: str) -> None:
    assert rules(entry("update", "error", code=204, text=text)) == ["details with a raw <, > or & (S11)"]


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[31m", "a\x85", "a\x7f"])
def test_control_characters_in_details_are_flagged(text: str) -> None:
    assert rules(entry("update", "error", code=204, text=text)) == ["details with control characters (S11)"]


def test_details_are_judged_even_when_the_update_was_refused() -> None:
    long = entry("update", "error", code=500, text="x" * 1501)
    assert rules(long) == ["details of 1501 bytes; at most 1500 (S12)"]
    assert rules(entry("update", "error", code=204, text="ü ok \u2026")) == []
