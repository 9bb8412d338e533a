"""The switches and the record, for tests: `/_mock/...`. Faults never apply here."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from mock_api.context import Parts
from mock_api.faults import Faults, Rule
from mock_api.record import tallies, violations
from mock_api.settings import Account

router = APIRouter(prefix="/_mock")


class _Shift(BaseModel):
    advance_s: float


class _UserSide(BaseModel):
    away: bool


class _NewAccount(Account):
    token: str | None = None


def _faults(request: Request) -> Faults:
    faults: Faults = request.app.state.faults
    return faults


TheFaults = Annotated[Faults, Depends(_faults)]


@router.get("/events")
def events(parts: Parts, kind: str | None = None, job_id: int | None = None) -> list[dict[str, Any]]:
    """The record, oldest first.

    Kinds: submit, pull, poll (an empty pull), update, status, sign_download, sign_upload, stored, missing, mail,
    requeue, delete, sign_in, refused (401, 403), fault, overlap, violation; lost_pull (a pull that the user's side
    could not be told of: the answer was 500, the job is `pulled`, S19).
    """
    return [asdict(entry) for entry in parts.store.record(kind, job_id)]


@router.get("/violations")
def get_violations(parts: Parts) -> list[dict[str, Any]]:
    """What a correct worker never does (see `mock_api.record`)."""
    return [asdict(violation) for violation in violations(parts.store.record())]


@router.get("/tally")
def tally(parts: Parts) -> list[dict[str, Any]]:
    """Pulls, ends, repeats and late requests of each account with each job."""
    return [asdict(one) for one in tallies(parts.store.record())]


@router.get("/heard")
def heard(parts: Parts, job_id: int | None = None) -> list[dict[str, Any]]:
    """Every word that reached the user's side, oldest first; `account` is null for the server's own sweep (S4).

    Ends that the user's side accepted are counted here, never in the queue's states (S19).
    """
    return parts.store.heard(job_id)


@router.get("/user_side")
def get_user_side(parts: Parts) -> _UserSide:
    """Whether the user's side is away."""
    return _UserSide(away=parts.store.away)


@router.put("/user_side")
def put_user_side(parts: Parts, wanted: _UserSide) -> _UserSide:
    """Send the user's side away, or bring it back.

    While it is away each update and pull is committed to the queue and answered 500 (S19), and a sweep ends with the
    first job that it meets (S24).
    """
    parts.store.away = wanted.away
    return wanted


@router.get("/outbox")
def outbox(parts: Parts) -> list[dict[str, Any]]:
    """Every e-mail to a user: one for each `finished` and each `error` (S11)."""
    return parts.store.mails()


@router.get("/traffic")
def traffic(parts: Parts) -> dict[str, dict[str, int]]:
    """Requests and bytes of each object on this server's own disk, since the start."""
    return parts.tree.traffic()


@router.post("/clock")
def clock(parts: Parts, shift: _Shift) -> dict[str, float]:
    """Set the server's clock forward."""
    parts.clock.advance(shift.advance_s)
    return {"now": parts.clock.now()}


@router.post("/sweep")
def sweep(parts: Parts) -> dict[str, list[int]]:
    """Look for silent jobs now; the ids of those found (S4)."""
    return {"jobs": parts.store.sweep()}


@router.post("/tokens/expire", status_code=204)
def expire_tokens(parts: Parts) -> None:
    """Refuse every IdToken made so far."""
    parts.tokens.expire_all()


@router.post("/accounts", status_code=204)
def add_account(parts: Parts, account: _NewAccount) -> None:
    """Make or replace an account."""
    parts.tokens.add_account(account, account.token)


@router.get("/faults")
def get_faults(faults: TheFaults) -> list[Rule]:
    """The rules that are still to act; `times` counts down."""
    return faults.rules()


@router.post("/faults")
def add_faults(faults: TheFaults, rules: Rule | list[Rule]) -> list[Rule]:
    """Add one rule or several; the first that matches a request acts on it."""
    faults.add(rules if isinstance(rules, list) else [rules])
    return faults.rules()


@router.delete("/faults", status_code=204)
def clear_faults(faults: TheFaults) -> None:
    """Forget all rules."""
    faults.clear()
