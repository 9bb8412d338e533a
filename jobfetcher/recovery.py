"""What an earlier process of this worker left, found at the start, before the first new job is taken.

Used by the worker. Nothing is done here that takes long or speaks to the server: a job that is still open goes on in a
slot of its own, at the phase that the journal says (runner.py), so that its first heartbeat leaves at once (N3).

    decided end                 -> told, then cleaned up (outbox)
    any earlier phase           -> goes on (A2 to A6), unless it has crashed the worker again and again (A9)
    what cannot be read         -> its directory is put aside, its container removed (J1); nothing is said about it
    container or directory of no job we know -> removed
"""

from __future__ import annotations

from dataclasses import dataclass

from jobfetcher.core.errors import JobReason, WorkerFault, WorkerReason
from jobfetcher.core.job import Job, JobId
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Emit, Engine, JobSource, Lease
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.journal import MAX_RUNS, Journal, Record
from jobfetcher.resources.budget import NOTHING, Budget, Reservation
from jobfetcher.workspace import Base

#: FAULTS.md A9: resumed more often than this within an hour and no step further, a job is not tried again. It is blamed
#: only when it was the only one; beside others it is given back, and one that runs, which asks little of the worker, is
#: given twice as many tries.
_MAX_RESUMES = 5


@dataclass(frozen=True, slots=True)
class Open:
    """One job to bring to its end: by telling its `outcome` where it has one, else by going on with `job`."""

    lease: Lease
    job: Job | None
    hold: Reservation | None
    outcome: Outcome | None


def open_jobs(journal: Journal, source: JobSource, budget: Budget, emit: Emit, *, crashed: bool) -> list[Open]:
    """All jobs of the journal; those whose container may run hold their share again before the others reserve theirs.

    `crashed`: the last process did not leave because it was told to. Raises ConfigError where the journal is of another
    server.
    """
    records = journal.records()
    leases = {record.id: source.resume(record.token, record.id, cut_off=record.phase) for record in records}
    alone = sum(record.outcome is None for record in records) == 1
    running_first = sorted(records, key=lambda record: record.phase not in {Phase.RUNNING, Phase.STAGING_OUT})
    found = [_open(record, leases[record.id], journal, budget, emit, crashed, alone) for record in running_first]
    given_back = [now for was, now in zip(running_first, found, strict=True) if was.outcome is None and now.outcome]
    for one in found if given_back and not alone else ():
        if one.outcome is None:  # one that stays is blamed only for what happens without those that left
            journal.acquit(one.lease.job_id)
    return found


def next_start(record: Record) -> str:
    """What the next start does with an open job that is left as it stands now, for a person."""
    job = f"job {record.id}"
    if record.outcome is not None:
        return f"{job} has ended here; the next start sees to it that the server knows"
    if record.phase is not Phase.RUNNING:
        return f"{job} is left where it is ({record.phase.value.replace('_', ' ')}); the next start goes on with it"
    if record.stopping:  # Runner._container
        again = "runs it once more, from the beginning" if record.runs < MAX_RUNS else "gives it back"
        return f"{job} was being stopped, and what it computed is lost; the next start {again}"
    return f"{job} runs on in its container; the next start goes on with it"


def _open(
    record: Record, lease: Lease, journal: Journal, budget: Budget, emit: Emit, crashed: bool, alone: bool
) -> Open:
    if record.outcome is not None:
        return Open(lease, None, None, record.outcome)
    where = record.phase.value.replace("_", " ")
    resumes = _resumes(record, journal, emit) if crashed else 0
    if resumes > (_MAX_RESUMES if alone or record.phase is not Phase.RUNNING else 2 * _MAX_RESUMES):
        why = f"the worker crashed {resumes} times in phase {where} of this job"
        if alone:
            return Open(lease, None, None, Outcome(Ending.JOB_FAILED, JobReason.CRASHES_WORKER, why))
        why = f"{why}, or of another one that it had in hand"
        return Open(lease, None, None, Outcome(Ending.WORKER_FAILED, WorkerReason.RESTARTED, why))
    if record.job is None and record.phase is Phase.CLAIMED:
        why = "worker cannot read the job"  # it could not at the claim, either; how it read is not on record
        return Open(lease, None, None, Outcome(Ending.JOB_FAILED, JobReason.UNREADABLE_SPEC, why))
    if record.job is None:
        why = f"the worker was replaced by one that cannot read the job any more ({where})"
        return Open(lease, None, None, Outcome(Ending.WORKER_FAILED, WorkerReason.RESTARTED, why))
    try:
        hold = _hold(record, record.job, budget)
    except WorkerFault as error:
        return Open(lease, None, None, Outcome(Ending.WORKER_FAILED, error.reason, str(error)))
    known_as = f" (to its user: job {record.job.user_job_id})" if record.job.user_job_id else ""
    message = f"going on with it where it was left ({where}){known_as}"
    emit("job_resumed", job=record.id, user_job=record.job.user_job_id, message=message)
    return Open(lease, record.job, hold, None)


def _resumes(record: Record, journal: Journal, emit: Emit) -> int:
    """How often the job was resumed without getting on; not counted on a full disk, where it goes on all the same."""
    try:
        return journal.resuming(record.id)
    except WorkerFault as error:
        emit("journal_failed", level="error", job=record.id, message=str(error))
        return 0


def _hold(record: Record, job: Job, budget: Budget) -> Reservation:
    if record.phase is Phase.STAGING_OUT:
        return NOTHING  # compute was given back already: what is left to do is to upload
    if record.phase is Phase.RUNNING and record.share is None:
        raise WorkerFault(WorkerReason.RESTARTED, "the worker was replaced by a newer one while it ran")
    if record.phase is Phase.RUNNING and record.share is not None and not record.rebooted:
        return budget.hold(record.share)
    # Nothing of it runs. One that ran before a reboot may have given its share to the next one already.
    hold = budget.queue(job.needs)
    hold.take()
    return hold


def clear_strays(journal: Journal, engine: Engine, base: Base, emit: Emit, *, older_than_s: float = 0.0) -> None:
    """Remove this worker's containers that belong to no open job, and at the start also such directories.

    Where the journal was damaged, a directory may be of a job whose row is lost: it is put aside, not deleted.
    `older_than_s`: leave alone what is younger; above 0 only containers are looked at (FAULTS.md E10).
    """
    try:
        known = frozenset(record.id for record in journal.records())
        if older_than_s:  # a record that was damaged since the start: its job still runs here
            known |= {JobId(name) for name in journal.unreadable}
        for name in engine.reap(known, older_than_s=older_than_s):
            emit("container_reaped", level="warning", message=f"removed the leftover container {name}")
    except WorkerFault as error:
        emit("reap_failed", level="warning", message=f"leftover containers could not be looked for: {error}")
        return
    if older_than_s:
        return
    try:
        leftovers = base.leftovers(known)
    except OSError as error:
        emit("directory_left", level="warning", message=f"leftovers cannot be looked for: {error}")
        return
    for name in leftovers:
        try:
            if journal.damage or name in journal.unreadable:
                kept = base.quarantine(name, journal.damage or "the journal's row of this job was damaged")
                emit("quarantined", level="error", message=f"job {name} is not on record any more; kept in {kept}")
            else:
                base.remove(name)
        except (OSError, WorkerFault) as error:
            emit("directory_left", level="warning", message=f"leftover {name} cannot be deleted: {error}")


def damage_of(journal: Journal) -> str:
    """What is wrong with the journal that was found, as a sentence for the log; empty when nothing is."""
    lost = f"; lost: job {', '.join(journal.unreadable)}" if journal.unreadable else ""
    return f"{journal.damage}{lost}" if journal.damage or lost else ""
