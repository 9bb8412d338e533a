"""The last two steps of a job: its end told, then everything of it removed here (DESIGN.md, steps 11 and 12).

Used by runner and worker; `steps` uses `tell`. The journal is the store: an end is on disk before it is told, and its
record stays until the source has heard it *and* container and directory are gone. What did not work is done again by
`deliver`, in this process or the next.
"""

from __future__ import annotations

from collections.abc import Callable

import tenacity

from jobfetcher.core.errors import SourceError, SourceUnavailable, WorkerFault, WorkerReason
from jobfetcher.core.job import JobId
from jobfetcher.core.ports import Emit, Engine, Lease, Standing
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.journal import Journal
from jobfetcher.workspace import Base

#: Tries to tell the end at once, 1, 2 and 4 s apart or as the source asks, before it is left to the outbox.
_SETTLE_TRIES = 4

#: Longest wait between them, in seconds: a lost answer is in doubt for the length of one call (30 s).
_SETTLE_WAIT_S = 30.0


class Outbox:
    """Ends of jobs on their way. Thread-safe: one job has one thread at a time."""

    def __init__(
        self,
        *,
        base: Base,
        journal: Journal,
        engine: Engine,
        worker_fault_is_error: bool,
        emit: Emit,
        sleep: Callable[[float], None],
    ) -> None:
        self._base = base
        self._journal = journal
        self._engine = engine
        self._worker_fault_is_error = worker_fault_is_error
        self._emit = emit
        self._sleep = sleep
        self._open: set[JobId] = set()

    def settle(self, lease: Lease, outcome: Outcome) -> Outcome:
        """Steps 11 and 12: outcome to the journal, then told, then everything of the job removed here."""
        try:
            self._journal.settling(lease.job_id, outcome)
        except WorkerFault as error:
            # Not durable, but still to be told; without the record a restart finds the job in an earlier phase.
            self._emit("journal_failed", level="error", job=lease.job_id, message=str(error))
        patiently = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(SourceError),
            stop=tenacity.stop_after_attempt(_SETTLE_TRIES),
            wait=_as_asked,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            standing = patiently(tell, lease, outcome, worker_fault_is_error=self._worker_fault_is_error)
        except SourceError as error:
            self._not_heard(lease.job_id, outcome, error)
        else:
            self._heard(lease.job_id, outcome, standing)
        return outcome

    def deliver(self, lease: Lease, outcome: Outcome) -> bool:
        """Try once more what `settle` left undone: tell the end, clean up. False: call again later.

        Until it is True the record stays in the journal, which is the outbox.
        """
        try:
            standing = tell(lease, outcome, worker_fault_is_error=self._worker_fault_is_error)
        except SourceError as error:
            self._not_heard(lease.job_id, outcome, error)
            return False
        return self._heard(lease.job_id, outcome, standing)

    def is_open(self, job_id: JobId) -> bool:
        """Whether the job's end is still to be told, or something of it is still here: `deliver` must be called."""
        return job_id in self._open

    def _not_heard(self, job_id: JobId, outcome: Outcome, error: SourceError) -> None:
        known = job_id in self._open
        self._open.add(job_id)
        self._emit(
            "settle_failed",
            level="debug" if known else "warning",  # once, not per try (FAULTS.md J10)
            job=job_id,
            message=f"the end ({outcome.ending.value}) is not delivered yet: {error}",
        )

    def _heard(self, job_id: JobId, outcome: Outcome, standing: Standing) -> bool:
        """The source knows the end; leave, and say so. False when something of the job could not be removed."""
        if standing is not Standing.KEEP:
            outcome = Outcome(Ending.DROPPED, None, f"taken back by the server ({standing.value}) as it ended")
        known = job_id in self._open
        try:
            self._leave(job_id)
        except (WorkerFault, OSError) as error:
            self._open.add(job_id)
            self._emit(
                "clean_up_failed",
                level="debug" if known else "warning",
                job=job_id,
                message=f"not all of the job could be removed, trying again later: {error}",
            )
            return False
        self._open.discard(job_id)
        expected = outcome.ending in {Ending.FINISHED, Ending.DROPPED} or outcome.reason is WorkerReason.SHUTDOWN
        self._emit(
            "job_ended",
            level="info" if expected else "warning",
            job=job_id,
            ending=outcome.ending.value,
            reason=None if outcome.reason is None else outcome.reason.value,
            message=_farewell(outcome, self._worker_fault_is_error),
        )
        return True

    def _leave(self, job_id: JobId) -> None:
        """Container and directory first, **then** the record, so that nothing of the job is ever unknown."""
        if (container := self._engine.find(job_id)) is not None:
            container.remove()
            if self._engine.find(job_id) is not None:
                raise WorkerFault(WorkerReason.ENGINE, "its container is still there")
        self._base.job(job_id).remove()
        self._journal.forget(job_id)


def tell(lease: Lease, outcome: Outcome, *, worker_fault_is_error: bool) -> Standing:
    """Say how a job ended in the source's terms: settle, give back, or never speak of it again. Raises SourceError."""
    match outcome.ending:
        case Ending.WORKER_FAILED if not worker_fault_is_error:
            return lease.release(outcome.message)
        case Ending.FINISHED | Ending.JOB_FAILED | Ending.WORKER_FAILED:
            return lease.settle(outcome)
        case Ending.DROPPED:
            return Standing.KEEP


def _as_asked(state: tenacity.RetryCallState) -> float:
    """1, 2, 4 s; longer where the source asked for it, up to _SETTLE_WAIT_S."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, SourceUnavailable) and error.retry_after_s else 0.0
    return max(2.0 ** (state.attempt_number - 1), min(asked, _SETTLE_WAIT_S))


def _farewell(outcome: Outcome, worker_fault_is_error: bool) -> str:
    match outcome.ending:
        case Ending.FINISHED:
            return f"finished; {outcome.message}" if outcome.message else "finished"
        case Ending.JOB_FAILED:
            return f"failed by its own fault: {outcome.message}"
        case Ending.WORKER_FAILED:
            done = "reported as failed" if worker_fault_is_error else "given back"
            whose = "" if outcome.reason is WorkerReason.SHUTDOWN else ", this machine's fault"
            return f"{done}{whose}: {outcome.message}"
        case Ending.DROPPED:
            return outcome.message
