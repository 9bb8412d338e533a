"""Kills at random times: a short campaign each time the tests run (N1 to N3), and the judge of campaigns judged.

Longer ones by hand: `python -m tests.chaos --kills 1000`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.campaign import Options, run
from tests.chaos.jobs import CONTAINER_LOG, FAILS, PROVENANCE, UNCLEAN, Planned
from tests.chaos.oracle import Life, Seen, Verdict, judge

SEED = 20


def report(options: Options, verdict: Verdict) -> str:
    """What a person needs to see of a campaign that went wrong, and how to do it again."""
    switches = "".join(f" --{name}" for name in ("engine", "cache", "pages") if getattr(options, name))
    switches += f" --max-jobs {options.max_jobs} --prefetch {options.prefetch}"
    again = f"again: python -m tests.chaos --kills {options.kills} --seed {options.seed}{switches} --keep"
    wrong = [f"{'campaign' if job is None else f'job {job}'}: {'; '.join(why)}" for job, why in verdict.wrong.items()]
    return "\n".join([again, str(verdict.numbers()), *wrong])


@pytest.mark.slow
@pytest.mark.docker
@pytest.mark.timeout(900)
@pytest.mark.fault("N1", "N3", "A2", "A4", "A5", "A6", "A7", "A8")
def test_fifty_kills_lose_nothing(tmp_path: Path) -> None:
    options = Options(kills=50, seed=SEED)
    verdict = run(options, tmp_path)
    print(report(options, verdict))
    assert verdict.good, report(options, verdict)
    assert verdict.kills >= 50
    assert verdict.jobs >= 20
    assert verdict.restart_to_beat_p99_s is not None
    assert verdict.restart_to_beat_p99_s <= 10.0


@pytest.mark.slow
@pytest.mark.docker
@pytest.mark.timeout(900)
@pytest.mark.fault("N1", "A2", "A4", "A6")
def test_kills_lose_nothing_with_jobs_ahead_and_inputs_kept(tmp_path: Path) -> None:
    options = Options(kills=12, seed=SEED, jobs=24, max_jobs=3, prefetch=1, cache=True)
    verdict = run(options, tmp_path)
    print(report(options, verdict))
    assert verdict.good, report(options, verdict)
    assert verdict.kills >= 12


@pytest.mark.slow
@pytest.mark.docker
@pytest.mark.timeout(900)
@pytest.mark.fault("B21", "B22", "B23", "C16", "S19", "S24")
def test_kills_lose_nothing_while_strangers_answer_and_the_users_side_comes_and_goes(tmp_path: Path) -> None:
    options = Options(kills=10, seed=SEED, max_jobs=3, pages=True)
    verdict = run(options, tmp_path)
    print(report(options, verdict))
    assert verdict.good, report(options, verdict)
    assert verdict.kills >= 10


@pytest.mark.slow
@pytest.mark.docker
@pytest.mark.timeout(900)
@pytest.mark.fault("N2", "E1", "A10")
def test_kills_of_the_engine_make_no_false_finished(tmp_path: Path) -> None:
    options = Options(kills=16, seed=SEED, engine=True, max_jobs=4)
    verdict = run(options, tmp_path)
    print(report(options, verdict))
    assert verdict.good, report(options, verdict)
    assert verdict.kills >= 16


# -- the judge ---------------------------------------------------------------------------------------------------------

_OUTPUT = "output/out/x"
PLANNED = {
    1: Planned("good", "true", {_OUTPUT: "aa", CONTAINER_LOG: "bb"}),
    2: Planned("fails", "false", {CONTAINER_LOG: "cc"}, exit_code=FAILS),
}


def event(kind: str, job: int, state: str | None = None, code: int = 204, time: float = 0.0) -> Mapping[str, Any]:
    return {"kind": kind, "job_id": job, "state": state, "code": code, "time": time, "note": None}


GOOD = Seen(
    kills=3,
    events=[
        event("pull", 1, "pulled"),
        event("pull", 2, "pulled"),
        event("update", 1, "running", time=12.0),
        event("sign_upload", 1),
        event("stored", 1),
        event("update", 1, "finished"),
        event("update", 2, "error"),
        event("status", 1),  # asking does no harm
    ],
    states={1: "finished", 2: "error"},
    details={1: "", 2: f"exit code {FAILS}"},
    objects={1: {_OUTPUT: "aa", CONTAINER_LOG: "bb", PROVENANCE: "-"}, 2: {CONTAINER_LOG: "cc", PROVENANCE: "-"}},
    heard={1: [(14.0, "finished")], 2: [(15.0, "error")]},
    mails={1: 1, 2: 1},
    starts=[1, 2],
)


def test_a_good_campaign_is_good() -> None:
    verdict = judge(PLANNED, GOOD)
    assert verdict.good, verdict.wrong
    assert verdict.numbers() == {
        "kills": 3,
        "jobs": 2,
        "lost": 0,
        "duplicate_terminals": 0,
        "repeats": 0,
        "late_requests": 0,
        "orphans": 0,
        "extra_starts": 0,
        "second_starts": 0,
        "violations": 0,
        "crashes": 0,
        "restart_to_beat_p99_s": None,
    }


def test_a_start_in_a_used_directory_is_seen_by_the_jobs_own_mark() -> None:
    """However few starts the engine remembers."""
    seen = replace(GOOD, states={1: "error", 2: "error"}, details={**GOOD.details, 1: f"exit code {UNCLEAN}"})
    verdict = judge(PLANNED, seen)
    assert verdict.second_starts == 1
    assert "started in a directory in which it had run before" in verdict.wrong[1]


def with_objects(**changes: str) -> Mapping[int, Mapping[str, str]]:
    changed = {**GOOD.objects[1], **{_OUTPUT if name == "output" else name: digest for name, digest in changes.items()}}
    return {**GOOD.objects, 1: {name: digest for name, digest in changed.items() if digest}}


RELEASED = [event("pull", 1), event("update", 1, "queued"), *GOOD.events]


def heard(*ends: str) -> Mapping[int, Sequence[tuple[float, str]]]:
    """The ends of job 1 that its user's side heard, two seconds apart."""
    return {**GOOD.heard, 1: [(14.0 + 2 * number, end) for number, end in enumerate(ends)]}


#: A process that ended between two ends of job 1.
KILLED = [Life(1.0, 15.0, frozenset())]


@pytest.mark.fault("A7")
def test_an_end_that_the_next_process_tells_again_is_counted_apart() -> None:
    twice = replace(GOOD, heard=heard("finished", "finished"), mails={1: 2, 2: 1})
    told_again = judge(PLANNED, replace(twice, lives=KILLED, events=[*GOOD.events, event("update", 1, "finished")]))
    assert told_again.good, told_again.wrong
    assert told_again.repeats == 1
    assert judge(PLANNED, twice).duplicate_terminals == 1


@pytest.mark.parametrize(
    ("count", "expected", "changes"),
    [
        ("lost", 1, {"states": {1: "running", 2: "error"}}),
        ("lost", 1, {"states": {1: "finished", 2: "finished"}}),
        ("lost", 1, {"states": {1: "error", 2: "error"}}),
        ("lost", 1, {"details": {1: "", 2: "the input is missing"}}),
        ("lost", 1, {"objects": with_objects(output="changed")}),
        ("lost", 1, {"objects": with_objects(output="")}),
        ("lost", 1, {"objects": with_objects(more="too many")}),
        ("lost", 1, {"objects": {1: GOOD.objects[1], 2: {CONTAINER_LOG: "cc"}}}),
        ("lost", 1, {"starts": [2]}),
        ("lost", 1, {"events": RELEASED}),
        ("duplicate_terminals", 1, {"heard": heard("finished", "finished")}),
        ("duplicate_terminals", 1, {"heard": heard("error", "finished"), "lives": KILLED}),
        ("duplicate_terminals", 2, {"mails": {1: 3, 2: 1}}),
        ("late_requests", 1, {"events": [*GOOD.events, event("update", 1, "running")]}),
        ("late_requests", 1, {"events": [*GOOD.events, event("update", 1, "running", 404)]}),
        ("late_requests", 1, {"events": [*GOOD.events, event("sign_upload", 2)]}),
        ("late_requests", 1, {"events": [*GOOD.events, event("stored", 2)]}),
        ("orphans", 2, {"orphans": ["a container", "a row"]}),
        ("extra_starts", 2, {"starts": [1, 1, 2, 1]}),
        ("extra_starts", 1, {"starts": [1, 1, 2, 1], "engine_killed": True}),
        ("violations", 1, {"violations": ["finished before postprocessing"]}),
        ("crashes", 1, {"crashes": ["exit code 1"]}),
    ],
)
def test_each_thing_wrong_is_counted(count: str, expected: int, changes: dict[str, Any]) -> None:
    verdict = judge(PLANNED, replace(GOOD, **changes))
    assert verdict.numbers()[count] == expected
    assert not verdict.good


@pytest.mark.parametrize(
    "changes", [{"events": RELEASED, "starts": [1, 1, 1, 1, 2]}, {"starts": [2, 2]}], ids=["given back", "run again"]
)
def test_a_killed_engine_excuses_runs_and_releases(changes: dict[str, Any]) -> None:
    assert judge(PLANNED, replace(GOOD, engine_killed=True, **changes)).good
    assert not judge(PLANNED, replace(GOOD, **changes)).good


def test_the_first_heartbeat_of_a_held_job_is_timed() -> None:
    short = [Life(10.0, 20.0, frozenset({1}))]
    assert judge(PLANNED, replace(GOOD, lives=short)).restart_to_beat_p99_s == 2.0
    too_short_to_tell = [Life(13.0, 15.0, frozenset({1}))]
    assert judge(PLANNED, replace(GOOD, lives=too_short_to_tell)).restart_to_beat_p99_s is None
    silent = [*short, Life(30.0, 45.0, frozenset({1}))]
    assert judge(PLANNED, replace(GOOD, lives=silent)).restart_to_beat_p99_s == 15.0
