"""The judge of the record, on made-up records: what it flags, and what it must leave alone."""

import pytest

from mock_api.record import Entry, violations

RUN = ["preprocessing", "running", "postprocessing", "finished"]


def entry(kind: str, state: str | None = None, *, code: int | None = None, who: str = "one", text: str = "") -> Entry:
    return Entry(0, 0.0, kind, 1, who, state, text or None, code, None)


def updates(*states: str, code: int = 204, who: str = "one") -> list[Entry]:
    return [entry("update", state, code=code, who=who) for state in states]


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
        ([*RUN, "finished"], "finished after finished"),
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


def test_an_update_after_a_404_is_flagged_the_one_that_learnt_it_is_not() -> None:
    assert rules(*updates("preprocessing", code=404)) == []
    after = "update after a 404 told the worker to stop"
    assert rules(*updates("preprocessing", "preprocessing", code=404)) == [after]
    assert rules(*updates("preprocessing", code=404), *updates("error", code=500)) == [after]
    assert rules(entry("status", code=404), *updates("preprocessing", code=500)) == [after]
    assert rules(entry("status", "running", code=200), *updates("preprocessing")) == []


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
