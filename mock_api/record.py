"""What the record says about the workers: the order of their updates judged by the rules a correct worker keeps.

Pure: a list of entries in, a list of violations or of tallies out. Used by `GET /_mock/violations` and `/_mock/tally`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mock_api.models import State

#: The note of an update that the queue committed and the user's side did not hear: the answer was 500 (S19).
UNHEARD = "committed, the user's side not told"

MAX_DETAILS_BYTES = 1500  # S12: they travel in the query string

_RANK = {State.PULLED: 0, State.PREPROCESSING: 1, State.RUNNING: 2, State.POSTPROCESSING: 3, State.FINISHED: 4}


@dataclass(frozen=True)
class Entry:
    """One line of the record. `code` is the HTTP status of the answer, where a request was answered."""

    id: int
    time: float
    kind: str
    job_id: int | None
    account: str | None
    state: str | None
    details: str | None
    code: int | None
    note: str | None


@dataclass(frozen=True)
class Violation:
    """Something that a correct worker never does; `event` is the id of the entry that shows it."""

    event: int
    job_id: int | None
    account: str | None
    rule: str


@dataclass
class Tally:
    """What one account did with one job: how often it pulled it, which ends of its were accepted, in order (`queued`:
    given back), which ends the queue committed and the user's side never heard (S19), how often it told the same end
    again after it had been accepted (right where the answer did not reach it, or it was killed before it noted it), and
    how many other updates and upload requests it sent after one, whatever they were answered."""

    job_id: int
    account: str
    pulls: int = 0
    ends: list[str] = field(default_factory=list)
    unheard_ends: list[str] = field(default_factory=list)
    repeats: int = 0
    late_requests: int = 0


_ENDS = frozenset({State.FINISHED, State.ERROR, State.QUEUED})

#: The note of a fault that handles a request about a job's state and then loses the answer.
_LOST_ANSWER = re.compile(r'(?:GET|PUT) /jobs/(\d+)/status .*"drop":"after"')


@dataclass
class _Tenure:
    """One account's time with one job, from its pull to its last word."""

    reached: int = _RANK[State.PULLED]
    last_word: State | None = None  # the terminal state it reported, or `queued` for a release
    told_to_stop: bool = False


def violations(entries: Iterable[Entry]) -> list[Violation]:
    """All violations in the record, in its order.

    A refused update does not count towards the order of states (the worker is right to send it again), but it counts
    for the rules on details and on updates after a 404. An end may be told again until the worker knows that it was
    accepted, which nobody but the worker can tell: `tallies` counts these repeats. Another word than the same end is
    wrong even after an end that was answered 500, because the queue may have committed it (S19, S6). An account that
    lost a job without being told may send one update more: the 404 is how it learns (S5). Asking for the state is right
    at any time.
    """
    tenures: dict[tuple[int | None, str | None], _Tenure] = {}
    answer_lost: set[int | None] = set()  # jobs whose next answer a fault keeps from the worker
    found: list[Violation] = []
    for entry in entries:
        tenure = tenures.get((entry.job_id, entry.account))
        rules: list[str] = []
        if entry.kind == "fault" and (lost := _LOST_ANSWER.match(entry.note or "")):
            answer_lost.add(int(lost[1]))
        elif entry.kind == "pull":
            tenures[entry.job_id, entry.account] = _Tenure()
        elif entry.kind == "violation":
            rules = [entry.note or ""]
        elif entry.kind == "update":
            rules = [*_of_details(entry.details or ""), *_of_order(entry, tenure)]
        elif entry.kind == "sign_upload" and tenure is not None and tenure.last_word is not None:
            rules = [f"asked where to upload to after {_end(tenure.last_word)}"]
        if entry.kind in ("update", "status"):
            heard = entry.job_id not in answer_lost
            answer_lost.discard(entry.job_id)
            if tenure is not None and entry.code == 404 and heard:
                tenure.told_to_stop = True
        found += [Violation(entry.id, entry.job_id, entry.account, rule) for rule in rules]
    return found


def tallies(entries: Iterable[Entry]) -> list[Tally]:
    """The tally of each account with each job that it pulled, in the order of the first pulls."""
    found: dict[tuple[int | None, str | None], Tally] = {}
    ended: dict[tuple[int | None, str | None], str | None] = {}  # by the end that was accepted last
    for entry in entries:
        owner = (entry.job_id, entry.account)
        if entry.kind == "pull" and entry.job_id is not None and entry.account is not None:
            found.setdefault(owner, Tally(entry.job_id, entry.account)).pulls += 1
            ended.pop(owner, None)
        elif entry.kind == "update" and owner in ended and entry.state == ended[owner]:
            found[owner].repeats += 1
        elif entry.kind in ("update", "sign_upload") and owner in ended:
            found[owner].late_requests += 1
        if entry.kind == "update" and entry.state in _ENDS and owner in found:
            if entry.code == 204:
                found[owner].ends.append(entry.state)
                ended[owner] = entry.state
            elif entry.note == UNHEARD:
                found[owner].unheard_ends.append(entry.state)
    return list(found.values())


def _of_order(entry: Entry, tenure: _Tenure | None) -> Iterator[str]:
    if tenure is None:
        yield "update by an account that never held the job"
        return
    if tenure.told_to_stop:
        yield "update after a 404 told the worker to stop"
    if entry.code == 204 or entry.note == UNHEARD:
        yield from _of_state(State(entry.state or ""), tenure)


def _of_state(state: State, tenure: _Tenure) -> Iterator[str]:
    last_word = tenure.last_word
    if state in _ENDS:
        tenure.last_word = state
    if last_word is not None:
        if state is not last_word:
            yield f"{state} after {_end(last_word)}"
        return
    if state in (State.QUEUED, State.ERROR):  # right from every state
        return
    rank = _RANK[state]
    if rank < tenure.reached:
        yield f"{state} after {_name(tenure.reached)}: going backwards"
    # A server that was away missed the states in between, and a worker does not go through them again. But nobody may
    # say that all is stored without ever having said that it is being stored.
    if state is State.FINISHED and tenure.reached < _RANK[State.POSTPROCESSING]:
        yield f"{state} before {State.POSTPROCESSING}"
    tenure.reached = max(rank, tenure.reached)


def _of_details(details: str) -> Iterator[str]:
    if len(details.encode()) > MAX_DETAILS_BYTES:
        yield f"details of {len(details.encode())} bytes; at most {MAX_DETAILS_BYTES} (S12)"
    if any(char in "<>&" for char in details):
        yield "details with a raw <, > or & (S11)"
    if any(ord(char) < 32 or 127 <= ord(char) < 160 for char in details):
        yield "details with control characters (S11)"


def _end(last_word: State) -> str:
    return "the release" if last_word is State.QUEUED else last_word


def _name(rank: int) -> str:
    return next(state for state, of_state in _RANK.items() if of_state == rank)
