"""The last two steps of a job: its end told, then everything of it removed here (DESIGN.md, steps 11 and 12).

Used by runner and worker; `steps` uses `tell`. The journal is the store: an end is on disk before it is told, and its
record stays until the source has heard it *and* container and directory are gone. What did not work is done again by
`deliver`, in this process or the next, for seven days (FAULTS.md J9); then what is left goes to quarantine, loudly.
That the source accepted the end is on disk as well before anything is removed: a process that dies while it cleans up
has a successor that says nothing (A8), and one that dies before has one that tells the end again (A7).
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable

import tenacity

from jobfetcher.core.errors import EXPECTED, SourceError, SourceUnavailable, WorkerFault, WorkerReason
from jobfetcher.core.failpoints import failpoint
from jobfetcher.core.job import JobId
from jobfetcher.core.ports import Emit, Engine, Lease, Standing
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.journal import Journal
from jobfetcher.leftovers import LeftBehind
from jobfetcher.outage import Outage
from jobfetcher.workspace import Base

#: Tries to tell the end at once, 1, 2 and 4 s apart or as the source asks, before it is left to the outbox.
_SETTLE_TRIES = 4

#: Longest wait between them, in seconds: a lost answer is in doubt for the length of one call (30 s).
_SETTLE_WAIT_S = 30.0

#: Longest pause between two rounds of `flush`, in seconds (FAULTS.md B2).
_FLUSH_CAP_S = 60.0

#: So long an end that the source does not hear is kept, in seconds (FAULTS.md J9).
KEEP_S = 7 * 86_400.0


class Outbox:
    """Ends of jobs on their way. Thread-safe: one job has one thread at a time.

    `wall` is the clock that the journal stamps ends with.
    """

    def __init__(
        self,
        *,
        base: Base,
        journal: Journal,
        engine: Engine,
        worker_fault_is_error: bool,
        emit: Emit,
        sleep: Callable[[float], None],
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = base
        #: Told how all calls of this worker go.
        self.outage = Outage(emit, clock=clock)
        self._journal = journal
        self._engine = engine
        self._wall = wall
        self._worker_fault_is_error = worker_fault_is_error
        self._emit = emit
        self._sleep = sleep
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[JobId, tuple[Lease, Outcome]] = {}
        self._due = 0.0
        self._failures = 0

    def settle(self, lease: Lease, outcome: Outcome) -> Outcome:
        """Steps 11 and 12: outcome to the journal, then told, then everything of the job removed here."""
        failpoint("before:settling")
        try:
            outcome = self._journal.settling(lease.job_id, outcome)
        except WorkerFault as error:
            # Not durable, but still to be told; without the record a restart finds the job in an earlier phase.
            self._emit("journal_failed", level="error", job=lease.job_id, message=str(error))
        failpoint("after:settling")
        if outcome.ending is not Ending.FINISHED:
            self._stop_running(lease.job_id)

        def failed(state: tenacity.RetryCallState) -> None:
            if state.outcome is not None and isinstance(error := state.outcome.exception(), SourceError):
                self._failed(lease.job_id, outcome, error, state.upcoming_sleep)

        patiently = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(SourceError),
            stop=tenacity.stop_after_attempt(_SETTLE_TRIES),
            wait=_as_asked,
            sleep=self._sleep,
            before_sleep=failed,
            reraise=True,
        )
        try:
            standing = patiently(self._tell, lease, outcome)
        except SourceError as error:
            self._not_heard(lease, outcome, error)
        else:
            self._heard(lease, outcome, standing)
        return outcome

    def _stop_running(self, job_id: JobId) -> None:
        """Before others may run the job. An engine that does not answer now is asked again when the job is left."""
        try:
            if (container := self._engine.find(job_id)) is not None:
                container.remove()
        except WorkerFault as error:
            self._emit("clean_up_failed", level="warning", job=job_id, message=f"clean-up: {error}")

    def deliver(self, lease: Lease, outcome: Outcome) -> bool:
        """Try once more what `settle` left undone: tell the end, clean up. False: call again later.

        Until it is True the record stays in the journal, which is the outbox.
        """
        try:
            standing = self._tell(lease, outcome)
        except SourceError as error:
            self._not_heard(lease, outcome, error)
            return self._given_up(lease.job_id, outcome)
        return self._heard(lease, outcome, standing)

    def _tell(self, lease: Lease, outcome: Outcome) -> Standing:
        """Tell it, unless an earlier process did and was heard; note that it was. Raises SourceError."""
        job_id = lease.job_id
        with contextlib.suppress(WorkerFault):  # a journal that cannot be read: told once more
            if self._journal.was_accepted(job_id):
                return Standing.KEEP
        standing = tell(lease, outcome, worker_fault_is_error=self._worker_fault_is_error)
        if (standing is not Standing.KEEP or outcome.ending is Ending.DROPPED) and self._has_run(job_id):
            lease.used_up()
        if outcome.ending is not Ending.DROPPED:
            self.outage.answered(job_id)
            with contextlib.suppress(WorkerFault):  # a full disk: if this process dies now, it is told once more
                self._journal.accepted(job_id)
        return standing

    def _has_run(self, job_id: JobId) -> bool:
        """Whether a run of the job was begun. The journal says so, for it knew before the engine did. A heartbeat may
        have asked before the run, and a server may hold its answer back until the job has done its work (T30)."""
        try:
            record = self._journal.record(job_id)
        except WorkerFault:
            return True  # it may have
        return record is not None and record.runs > 0

    @property
    def waiting(self) -> list[JobId]:
        """Jobs whose end is still to be told, or of which something is still here."""
        with self._lock:
            return sorted(self._open)

    def due_in_s(self) -> float:
        """Seconds until `flush` has something to do; infinite while nothing waits and the source answers."""
        deliver_s = max(0.0, self._due - self._clock()) if self.waiting else math.inf
        remind_s = self.outage.due_in_s()
        return deliver_s if remind_s is None else min(deliver_s, max(1.0, remind_s))

    def flush(self, *, now: bool = False) -> None:
        """Deliver what waits, at growing intervals or `now`, and remind of a source that is away. For one thread."""
        self.outage.remind()
        with self._lock:
            waiting = list(self._open.values())
        if not waiting or (not now and self._clock() < self._due):
            return
        delivered = [self.deliver(lease, outcome) for lease, outcome in waiting]
        self._failures = 0 if all(delivered) else self._failures + 1
        spread = random.uniform(0.9, 1.1)  # noqa: S311 - spreads load only
        self._due = self._clock() + min(_FLUSH_CAP_S, 2.0 ** min(self._failures, 10)) * spread

    def _still_open(self, lease: Lease, outcome: Outcome) -> str:
        """Keep it for `flush`; returns the level to log at: said once, not per try (FAULTS.md J10)."""
        with self._lock:
            known = lease.job_id in self._open
            self._open[lease.job_id] = (lease, outcome)
        return "debug" if known else "warning"

    def _closed(self, job_id: JobId) -> None:
        with self._lock:
            self._open.pop(job_id, None)
        self.outage.forget(job_id)

    def _not_heard(self, lease: Lease, outcome: Outcome, error: SourceError) -> None:
        self._still_open(lease, outcome)
        self._failed(lease.job_id, outcome, error, max(2.0, getattr(error, "retry_after_s", None) or 0.0))
        message = f"the end ({outcome.ending.value}) is not delivered yet: {error}"
        self._emit("settle_failed", level="debug", job=lease.job_id, message=message)

    def _failed(self, job_id: JobId, outcome: Outcome, error: SourceError, again_in_s: float) -> None:
        what = f"the end ({outcome.ending.value}) of job {job_id} is not delivered yet"
        self.outage.failed(job_id, what, error, again_in_s)

    def _given_up(self, job_id: JobId, outcome: Outcome) -> bool:
        """Whether the end has waited for too long: then what is left of the job is put aside for a person to see."""
        try:
            record = self._journal.record(job_id)
        except WorkerFault:  # damaged since the start; a later start has what is sound
            return False
        if record is None or record.decided_at is None or self._wall() - record.decided_at < KEEP_S:
            return False
        why = f"its end ({outcome.ending.value}: {outcome.message}) could not be delivered for 7 days"
        try:
            failpoint("before:quarantine")
            kept = self._base.quarantine(job_id, why) if self._base.job(job_id).path.exists() else None
            failpoint("after:quarantine")
            self._leave(job_id, outcome)
        except (WorkerFault, OSError) as error:
            self._emit("clean_up_failed", level="debug", job=job_id, message=str(error))
            return False
        self._closed(job_id)
        where = f"; what it left is in {kept}" if kept else ""
        self._emit("given_up", level="error", job=job_id, message=f"{why}{where}")
        return True

    def _heard(self, lease: Lease, outcome: Outcome, standing: Standing) -> bool:
        """The source knows the end; leave, and say so. False when something of the job could not be removed."""
        job_id = lease.job_id
        if standing is not Standing.KEEP:
            outcome = Outcome(Ending.DROPPED, None, f"taken back by the server ({standing.value}) as it ended")
        try:
            self._leave(job_id, outcome)
        except (WorkerFault, OSError) as error:
            level = self._still_open(lease, outcome)
            message = f"not all of the job could be removed, trying again later: {error}"
            self._emit("clean_up_failed", level=level, job=job_id, message=message)
            return False
        self._closed(job_id)
        expected = outcome.ending in {Ending.FINISHED, Ending.DROPPED} or outcome.reason in EXPECTED
        self._emit(
            "job_ended",
            level="info" if expected else "warning",
            job=job_id,
            ending=outcome.ending.value,
            reason=None if outcome.reason is None else outcome.reason.value,
            message=_farewell(outcome, self._worker_fault_is_error),
        )
        return True

    def _leave(self, job_id: JobId, outcome: Outcome) -> None:
        """Container and directory first, **then** the record, so that nothing of the job is ever unknown."""
        failpoint("before:remove_container")
        if (container := self._engine.find(job_id)) is not None:
            container.remove()
            if self._engine.find(job_id) is not None:
                raise WorkerFault(WorkerReason.ENGINE, "its container is still there")
        failpoint("after:remove_container")
        if self._has_results(job_id, outcome):
            kept = self._base.quarantine(job_id, outcome.message)
            message = f"its results could not be delivered and are kept in {kept}: {outcome.message}"
            self._emit("results_kept", level="error", job=job_id, message=message)
        else:
            self._remove_directory(job_id)
        failpoint("after:remove_directory")
        self._journal.forget(job_id)
        failpoint("after:forget")

    def _has_results(self, job_id: JobId, outcome: Outcome) -> bool:
        """Whether the job ran to its end and this machine could not deliver what it made: that is not thrown away (J9).

        One that was stopped by a person is not meant: that person asked for it.
        """
        if outcome.ending is not Ending.WORKER_FAILED or outcome.reason in EXPECTED:
            return False
        record = self._journal.record(job_id)
        return record is not None and record.exit is not None and self._base.job(job_id).files.is_dir()

    def _remove_directory(self, job_id: JobId) -> None:
        try:
            self._base.remove(job_id)
        except LeftBehind:  # no later try of this process goes better, and the job is over (E13)
            self._emit("files_left", level="error", job=job_id, message=self._base.left.set_aside(job_id))


def tell(lease: Lease, outcome: Outcome, *, worker_fault_is_error: bool) -> Standing:
    """Say how a job ended in the source's terms: settle, give back, or never speak of it again. Raises SourceError."""
    if outcome.ending is Ending.DROPPED:
        return Standing.KEEP
    failpoint("before:tell")
    if outcome.ending is Ending.WORKER_FAILED and not worker_fault_is_error:
        standing = lease.release(outcome.message)
    else:
        standing = lease.settle(outcome)
    failpoint("after:tell")
    return standing


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
            whose = "" if outcome.reason in EXPECTED else ", this machine's fault"
            return f"{done}{whose}: {outcome.message}"
        case Ending.DROPPED:
            return outcome.message
