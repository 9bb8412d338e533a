"""The judgement: what was seen of a campaign in, what is wrong with it out. Pure.

lost                 jobs that did not end as planned: no end, the wrong one (a false `finished` above all), objects
                     missing, different or too many, or given back though the engine was well
duplicate_terminals  ends that the user's side heard beyond the one, but repeats; and mails other than one for each end
                     that it heard
repeats              the same end told once more by a process that could not know that it was heard: the one before was
                     killed between its request and its note of the answer. They are right, and counted apart (A7)
late_requests        updates, questions where to upload, and uploads after the end was told
orphans              containers, directories, files and journal rows that are left
extra_starts         container starts beyond the one; where the engine was killed too, beyond two for each time that
                     the job was taken
second_starts        jobs that were started in a directory in which they had run before, as they themselves saw by their
                     own mark in it: an engine that is killed may forget what it started
violations           what the server's record calls a broken protocol
crashes              ends of the worker that were its own doing
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from tests.chaos.jobs import PROVENANCE, UNCLEAN, Planned

#: N3: a held job's heartbeat comes so soon after a start, in seconds. A longer life without one counts as its length.
BEAT_S = 10.0

_ENDS = {"finished", "error"}
_LATE = {"update", "sign_upload", "stored"}


@dataclass(frozen=True)
class Life:
    """One process of the worker, in Unix time, and the jobs that the one before it left in its hands, unended."""

    started: float
    ended: float
    held: frozenset[int]


@dataclass(frozen=True)
class Seen:
    """All that was seen of a campaign. `starts`: the job of each container start; `objects`: job to name to SHA-256.

    `heard`: the ends that the user's side accepted, by job, each with its time: what the queue says proves nothing of
    that (PROTOCOL.md S19).
    """

    kills: int
    events: Sequence[Mapping[str, Any]]
    states: Mapping[int, str]
    details: Mapping[int, str]
    objects: Mapping[int, Mapping[str, str]]
    heard: Mapping[int, Sequence[tuple[float, str]]]
    mails: Mapping[int, int]
    starts: Sequence[int]
    lives: Sequence[Life] = ()
    orphans: Sequence[str] = ()
    violations: Sequence[str] = ()
    crashes: Sequence[str] = ()
    engine_killed: bool = False
    #: So was the broker: what was asked just then had no answer, and a job may be given back for it.
    broker_killed: bool = False


@dataclass(frozen=True)
class Verdict:
    """The counts, as they are printed, and for each job with something wrong what it is (job None: not of one job)."""

    kills: int
    jobs: int
    lost: int
    duplicate_terminals: int
    repeats: int
    late_requests: int
    orphans: int
    extra_starts: int
    second_starts: int
    violations: int
    crashes: int
    restart_to_beat_p99_s: float | None
    wrong: Mapping[int | None, Sequence[str]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether nothing at all is wrong."""
        return not self.wrong

    def numbers(self) -> dict[str, float | None]:
        """What is printed."""
        numbers = asdict(self)
        del numbers["wrong"]
        return numbers


def judge(planned: Mapping[int, Planned], seen: Seen) -> Verdict:
    """Hold what was seen against what was planned."""
    wrong: dict[int | None, list[str]] = defaultdict(list)
    lost = duplicates = repeats = late = extra = second = 0
    releases = _releases(seen.events)
    starts = Counter(seen.starts)
    requests_after = _late(seen.events)
    for job, plan in planned.items():
        losses = [*_loss(job, plan, seen)]
        if releases[job] and not (seen.engine_killed or seen.broker_killed):
            losses.append(f"given back {releases[job]} times")
        if not seen.engine_killed and job in seen.states and not starts[job]:
            losses.append("the engine never started it")
        lost += bool(losses)
        wrong[job] += losses
        ends = seen.heard.get(job, ())
        again = _repeats(ends, seen.lives)
        repeats += again
        if (twice := max(len(ends), seen.mails.get(job, 0)) - 1 - again) > 0:
            duplicates += twice
            mails = seen.mails.get(job, 0)
            wrong[job].append(f"{len(ends)} ends, {again} of them rightly told again, and {mails} mails")
        late += len(requests_after[job])
        wrong[job] += requests_after[job]
        allowed = (1 + releases[job]) * (2 if seen.engine_killed else 1)
        if starts[job] > allowed:
            extra += starts[job] - allowed
            wrong[job].append(f"{starts[job]} container starts")
        if f"exit code {UNCLEAN}" in seen.details.get(job, ""):
            second += 1
            wrong[job].append("started in a directory in which it had run before")
    wrong[None] += [
        *(f"left over: {what}" for what in seen.orphans),
        *(f"protocol: {what}" for what in seen.violations),
        *(f"the worker ended by itself: {what}" for what in seen.crashes),
    ]
    return Verdict(
        kills=seen.kills,
        jobs=len(planned),
        lost=lost,
        duplicate_terminals=duplicates,
        repeats=repeats,
        late_requests=late,
        orphans=len(seen.orphans),
        extra_starts=extra,
        second_starts=second,
        violations=len(seen.violations),
        crashes=len(seen.crashes),
        restart_to_beat_p99_s=_p99(_restart_to_beat(seen)),
        wrong={job: reasons for job, reasons in wrong.items() if reasons},
    )


def _loss(job: int, plan: Planned, seen: Seen) -> list[str]:
    state, details = seen.states.get(job, "gone"), seen.details.get(job, "")
    wanted = "error" if plan.exit_code else "finished"
    losses = []
    if state != wanted:
        losses.append(f"{plan.kind}: is {state}, not {wanted} ({details})")
    elif plan.exit_code and f"exit code {plan.exit_code}" not in details:
        losses.append(f"{plan.kind}: failed for another reason: {details}")
    found = dict(seen.objects.get(job, {}))
    if found.pop(PROVENANCE, None) is None:
        losses.append(f"{plan.kind}: no {PROVENANCE}")
    for name in sorted(plan.objects.keys() | found.keys()):
        if found.get(name) != plan.objects.get(name):
            what = "missing" if name not in found else "too many" if name not in plan.objects else "different"
            losses.append(f"{plan.kind}: object {name} is {what}")
    return losses


def _repeats(ends: Sequence[tuple[float, str]], lives: Sequence[Life]) -> int:
    """How many of the ends are the one before, told once more by another process, which could not know of the first."""
    died = [life.ended for life in lives]
    return sum(
        word == before and any(since < end < now for end in died) for (since, before), (now, word) in pairwise(ends)
    )


def _releases(events: Sequence[Mapping[str, Any]]) -> Counter[int]:
    return Counter(
        event["job_id"]
        for event in events
        if event["kind"] == "update" and event["code"] == 204 and event["state"] == "queued"
    )


def _late(events: Sequence[Mapping[str, Any]]) -> dict[int, list[str]]:
    """Requests for a job between its end (or its release) and the next time it is taken."""
    late: dict[int, list[str]] = defaultdict(list)
    over: dict[int, str] = {}
    for event in events:
        job = event["job_id"]
        if event["kind"] == "pull":
            over.pop(job, None)
        elif event["kind"] == "update" and event["state"] == over.get(job):
            pass  # the same end once more: `_repeats` and the mails say whether that was right
        elif event["kind"] in _LATE and job in over:
            late[job].append(f"{event['kind']} {event['state'] or event['note'] or ''} after {over[job]}")
        if event["kind"] == "update" and event["code"] == 204 and event["state"] in {*_ENDS, "queued"}:
            over.setdefault(job, event["state"])
    return late


def _restart_to_beat(seen: Seen) -> list[float]:
    """For each job held at a start: seconds to the first update by that process."""
    told: dict[int, list[float]] = defaultdict(list)
    for event in seen.events:
        if event["kind"] == "update":
            told[event["job_id"]].append(event["time"])
    found = []
    for life in seen.lives:
        for job in life.held:
            first = next((time for time in told[job] if life.started <= time <= life.ended), None)
            if first is not None:
                found.append(first - life.started)
            elif life.ended - life.started >= BEAT_S:
                found.append(life.ended - life.started)
    return found


def _p99(values: Sequence[float]) -> float | None:
    return round(sorted(values)[math.ceil(0.99 * len(values)) - 1], 2) if values else None
