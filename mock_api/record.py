"""What the record says about the workers: the order of their updates judged by the rules a correct worker keeps.

Pure: a list of entries in, a list of violations out. Used by `GET /_mock/violations`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mock_api.models import State

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
class _Tenure:
    """One account's time with one job, from its pull to its last word."""

    reached: int = _RANK[State.PULLED]
    last_word: State | None = None  # the terminal state it reported, or `queued` for a release
    told_to_stop: bool = False


def violations(entries: Iterable[Entry]) -> list[Violation]:
    """All violations in the record, in its order.

    A refused update does not count towards the order of states (the worker is right to send it again), but it counts
    for the rules on details and on updates after a 404. An account that lost a job without being told may send one
    update more: the 404 is how it learns (S5).
    """
    tenures: dict[tuple[int | None, str | None], _Tenure] = {}
    found: list[Violation] = []
    for entry in entries:
        owner = (entry.job_id, entry.account)
        if entry.kind == "pull":
            tenures[owner] = _Tenure()
        elif entry.kind == "status" and entry.code == 404 and owner in tenures:
            tenures[owner].told_to_stop = True
        elif entry.kind == "violation":
            found.append(Violation(entry.id, entry.job_id, entry.account, entry.note or ""))
        elif entry.kind == "update":
            rules = [*_of_details(entry.details or ""), *_of_order(entry, tenures.get(owner))]
            found += [Violation(entry.id, entry.job_id, entry.account, rule) for rule in rules]
    return found


def _of_order(entry: Entry, tenure: _Tenure | None) -> Iterator[str]:
    if tenure is None:
        yield "update by an account that never held the job"
        return
    if tenure.told_to_stop:
        yield "update after a 404 told the worker to stop"
    if entry.code == 404:
        tenure.told_to_stop = True
    if entry.code == 204:
        yield from _of_state(State(entry.state or ""), tenure)


def _of_state(state: State, tenure: _Tenure) -> Iterator[str]:
    last_word = tenure.last_word
    if state in (State.QUEUED, State.FINISHED, State.ERROR):
        tenure.last_word = state
    if last_word is not None:
        yield f"{state} after {'the release' if last_word is State.QUEUED else last_word}"
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


def _name(rank: int) -> str:
    return next(state for state, of_state in _RANK.items() if of_state == rank)
