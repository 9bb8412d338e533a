"""The outer loop, kept dull: recover, offer, fetch, admit, hand to a slot; drain when told to.

    until leaving:  tell unheard ends -> machine fit? -> what is free? -> fetch -> journal -> reserve -> slot

A slot is a thread of its own that runs one job to its end (runner.Runner). Nothing here sleeps: every wait is on the
budget's event, which a finished job and a signal both set.
"""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from jobfetcher.core.errors import (
    ConfigError,
    JobfetcherError,
    SourceError,
    SourceRefused,
    SourceUnavailable,
    StopReason,
    UnreadableJob,
    Verdict,
    WorkerFault,
    WorkerReason,
    verdict,
)
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.machine import Offer
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Claim, Emit, Engine, JobSource, Lease
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.journal import Journal, Record
from jobfetcher.resources.budget import Budget
from jobfetcher.runner import Runner
from jobfetcher.workspace import Base

#: FAULTS.md J8: longest pause between two polls of a server that does not answer.
_IDLE_CAP_S = 300.0

#: Longest pause between two tries to tell the end of a job.
_OUTBOX_CAP_S = 60.0

#: As many jobs again may upload as may compute: slow uploads must not fill the disk with finished jobs.
_OPEN_PER_SLOT = 2


class Leaving(IntEnum):
    """How far the way out has gone; each signal is one step (DESIGN.md, rule 11)."""

    NO = 0
    DRAIN = 1
    STOP_JOBS = 2


class Gate(Protocol):
    """Says when to stop taking jobs, beside signals: after so many, or when idle for so long."""

    def __call__(self, taken: int, idle_s: float) -> bool: ...


@dataclass(frozen=True, slots=True)
class Polling:
    """When to ask for jobs. `interval_s`: seconds between two questions when there was no job.

    `idle_limit_s`: no wait is longer than what is left of so many seconds without a job, for an `enough` that counts.
    """

    interval_s: float = 30.0
    enough: Gate = lambda taken, idle_s: False  # noqa: ARG005 - the default: never enough
    idle_limit_s: float | None = None


@dataclass(slots=True)
class _Slot:
    halt: Halt
    thread: threading.Thread


class Worker:
    """Takes jobs and runs them until told to leave. `run` belongs to the main thread; signals call `leave`."""

    def __init__(
        self,
        *,
        source: JobSource,
        engine: Engine,
        budget: Budget,
        base: Base,
        journal: Journal,
        runner: Runner,
        polling: Polling,
        emit: Emit,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = lambda: random.uniform(0.9, 1.1),  # noqa: S311 - spreads load only
    ) -> None:
        self._source = source
        self._engine = engine
        self._budget = budget
        self._base = base
        self._journal = journal
        self._runner = runner
        self._polling = polling
        self._emit = emit
        self._clock = clock
        self._jitter = jitter
        self._lock = threading.Lock()
        self._slots: dict[JobId, _Slot] = {}
        self._unheard: dict[JobId, tuple[Lease, Outcome]] = {}
        self._outbox_due = 0.0
        self._outbox_failures = 0
        self._not_before = 0.0
        self._leaving = Leaving.NO
        self._taken = 0
        self._trouble: str | None = None
        self._failures = 0
        #: Whether the server has ever answered a question for a job.
        self.welcomed = False
        #: Jobs that ended by this machine's fault; the command's exit code tells.
        self.worker_faults = 0

    def run(self) -> None:
        """Work until `leave` was called or `polling.enough` says so, and all jobs have ended.

        Raises ConfigError for what only a person can change; running jobs are ended first.
        """
        try:
            self.recover()
            self._poll()
        except ConfigError:
            self.leave(Leaving.STOP_JOBS)
            raise
        finally:
            self._drain()

    def leave(self, how: Leaving) -> None:
        """Stop taking jobs; with STOP_JOBS also stop the running ones and give them back. Safe in a signal handler."""
        self._leaving = max(self._leaving, how)
        self._budget.wake()

    @property
    def summary(self) -> str:
        """What jobs may have of this machine, in words."""
        free = self._budget.free()
        gpus = f"{len(free.gpus)} GPU" if free.gpus else "no GPU"
        jobs = "1 job" if self._budget.slots == 1 else f"{self._budget.slots} jobs"
        return f"{free.cpu_cores:.3g} cores, {free.memory_mib} MiB, {gpus}; {jobs} at a time"

    @property
    def left_by_signal(self) -> bool:
        """Whether `leave` was called, as opposed to having had enough."""
        return self._leaving is not Leaving.NO

    @property
    def unfinished(self) -> bool:
        """Whether something is left for the next start: an end that was not heard, or what could not be removed."""
        return bool(self._unheard)

    @property
    def running(self) -> list[JobId]:
        """Jobs that this worker has in hand now."""
        return list(self._slots)

    def recover(self) -> None:
        """Bring to an end what an earlier process left, before the first new job is taken.

        An outcome that is on record is delivered. A job that had none is given back after its container and directory
        are gone: whatever it was doing, this machine does not do it any more.
        """
        records = self._journal.records()
        for record in records:
            lease = self._source.resume(record.token, record.id)
            outcome = record.outcome
            if outcome is None:
                outcome = Outcome(Ending.WORKER_FAILED, WorkerReason.RESTARTED, _restarted(record))
                self._emit("job_found", level="debug", job=record.id, message=outcome.message)
                self._end_container(record)
                self._journal.settling(record.id, outcome)
            self._unheard[record.id] = (lease, outcome)
        known = frozenset(record.id for record in records)
        try:
            for name in self._engine.reap(known):
                self._emit("container_reaped", level="warning", message=f"removed the leftover container {name}")
        except WorkerFault as error:
            self._emit("reap_failed", level="warning", message=str(error))
        for name in self._base.leftovers(known):
            try:
                self._base.remove(name)
            except OSError as error:
                self._emit("directory_left", level="warning", message=f"leftover {name} cannot be deleted: {error}")

    def _end_container(self, record: Record) -> None:
        try:
            container = self._engine.find(record.id)
            if container is not None:
                container.remove()
        except WorkerFault as error:
            self._emit("clean_up_failed", level="warning", job=record.id, message=str(error))

    def _poll(self) -> None:
        idle_since = self._clock()
        while not self._leaving:
            self._flush_outbox()
            if self._slots:
                idle_since = self._clock()
            if self._polling.enough(self._taken, self._clock() - idle_since):
                return
            wait_s = max(0.0, self._not_before - self._clock()) or self._take_one()
            if self._polling.idle_limit_s is not None:
                wait_s = min(wait_s, max(0.0, self._polling.idle_limit_s - (self._clock() - idle_since)))
            if wait_s > 0:
                self._budget.wait_for_change(wait_s)

    def _take_one(self) -> float:
        """Try to take one job; returns how long to wait before the next try, in seconds (0: at once).

        A wait also ends when something gets free or a signal comes.
        """
        try:
            self._engine.check()
            if self._trouble is not None:
                self._flush_outbox(now=True)  # what an engine that was away still holds comes before new jobs
            self._base.check_room()
            offer = None if self._is_full() else self._budget.offer()
            if offer is None and not self._slots:
                raise WorkerFault(WorkerReason.DOES_NOT_FIT, _nothing_free(self._budget.free()))
            if offer is None:
                return self._polling.interval_s  # ended early by the next job that gives something back
            claim = self._source.fetch(offer, 0.0)
        except UnreadableJob as error:
            self.welcomed = True
            self._settle_unreadable(error)
            return 0.0
        except JobfetcherError as error:
            # At the very first question a wrong password or no engine: a person is at hand to see it. Later the engine
            # is being restarted or the account changed (FAULTS.md B4, E1, E3), and running jobs wait for it.
            hopeless = verdict(error) is Verdict.STOP_WORKER or isinstance(error, SourceRefused)
            if hopeless and not self.welcomed and not self._unheard:
                raise ConfigError(str(error)) from error
            return self._back_off(error)
        self.welcomed = True
        self._all_well()
        if claim is None:
            self._emit("no_job", level="debug", message="no job for this machine")
            return self._polling.interval_s * self._jitter()
        self._admit(claim)
        return 0.0

    def _is_full(self) -> bool:
        return len(self._slots) >= _OPEN_PER_SLOT * self._budget.slots

    def _admit(self, claim: Claim) -> None:
        """Journal the job, reserve its share, and hand it to a slot (steps 2 and 3)."""
        lease, job = claim
        if job.id in self._slots or job.id in self._unheard:
            # The server gave us again what we hold (its lease ran out meanwhile). Who holds it goes on; it is ours.
            self._emit("job_again", level="warning", job=job.id, message="handed out again while it is in hand here")
            return
        self._taken += 1
        try:
            self._journal.claim(job.id, lease.token, job)
            self._emit("job_claimed", job=job.id, message=f"claimed, image {job.image}", image=job.image)
            hold = self._budget.reserve(job.needs)
        except WorkerFault as error:
            outcome = Outcome(Ending.WORKER_FAILED, error.reason, str(error))
            self._in_slot(lease, Halt(), lambda: self._runner.outbox.settle(lease, outcome))
        else:
            halt = Halt()
            if not self._in_slot(lease, halt, lambda: self._runner.run(lease, job, hold, halt)):
                hold.release()

    def _settle_unreadable(self, error: UnreadableJob) -> None:
        """Report a job that nobody could run, with the same care as any other end."""
        lease = error.lease
        if lease.job_id in self._slots or lease.job_id in self._unheard:
            return
        self._taken += 1
        try:
            self._journal.claim(lease.job_id, lease.token, None)
        except WorkerFault as fault:
            self._emit("journal_failed", level="error", job=lease.job_id, message=str(fault))
        outcome = self._runner.outcome_of(lease.job_id, error)
        self._in_slot(lease, Halt(), lambda: self._runner.outbox.settle(lease, outcome))

    def _in_slot(self, lease: Lease, halt: Halt, bring_to_end: Callable[[], Outcome]) -> bool:
        """Bring a job to its end in a thread of its own: a server that does not answer must not hold up the others.

        False: there can be no thread for it, and it was given back.
        """

        def run() -> None:
            outcome = Outcome()
            try:
                outcome = bring_to_end()
            except Exception as error:
                # A bug of ours. The job is in the journal, so the next start gives it back; the worker goes on.
                self._emit("bug", level="error", job=lease.job_id, message=f"{error!r}", where=traceback.format_exc(-3))
            finally:
                self._ended(lease, outcome)
                del self._slots[lease.job_id]
                self._budget.wake()

        slot = _Slot(halt, threading.Thread(target=run, name=f"job-{lease.job_id}"))
        self._slots[lease.job_id] = slot
        try:
            slot.thread.start()
            return True
        except RuntimeError as error:  # the limit of processes of this user or container
            del self._slots[lease.job_id]
            message = f"this machine lets the worker start no more threads: {error}"
            self._ended(
                lease, self._runner.outbox.settle(lease, Outcome(Ending.WORKER_FAILED, WorkerReason.INTERNAL, message))
            )
            return False

    def _ended(self, lease: Lease, outcome: Outcome) -> None:
        if outcome.ending is Ending.WORKER_FAILED and outcome.reason is not WorkerReason.SHUTDOWN:
            self.worker_faults += 1
        if self._runner.outbox.is_open(lease.job_id):
            with self._lock:
                self._unheard[lease.job_id] = (lease, outcome)

    def _flush_outbox(self, *, now: bool = False) -> None:
        """Try again to bring jobs to their very end (runner.deliver), at growing intervals or `now`."""
        if not self._unheard or (not now and self._clock() < self._outbox_due):
            return
        with self._lock:
            waiting = list(self._unheard.items())
        heard = [job_id for job_id, (lease, outcome) in waiting if self._runner.outbox.deliver(lease, outcome)]
        with self._lock:
            for job_id in heard:
                del self._unheard[job_id]
        self._outbox_failures = 0 if len(heard) == len(waiting) else self._outbox_failures + 1
        self._outbox_due = self._clock() + min(_OUTBOX_CAP_S, 2.0**self._outbox_failures) * self._jitter()

    def _back_off(self, error: JobfetcherError) -> float:
        """Say once what is wrong, and how long to wait: full jitter up to a cap that doubles (FAULTS.md J8, J10)."""
        self._failures += 1
        message = str(error)
        if message != self._trouble:
            self._trouble = message
            self._emit("not_polling", level="error", message=f"no job can be taken: {message}")
        # At least as long as the server asks for, and never at once: `Retry-After: 0` must not make a busy loop.
        asked = error.retry_after_s if isinstance(error, SourceUnavailable) and error.retry_after_s else 0.0
        cap = min(_IDLE_CAP_S, self._polling.interval_s * 2.0 ** min(self._failures, 10))
        wait_s = max(asked, random.uniform(min(1.0, cap), cap))  # noqa: S311 - spreads load only
        if isinstance(error, SourceError):
            self._not_before = self._clock() + wait_s  # a job that ends meanwhile makes the server no better
        return wait_s

    def _all_well(self) -> None:
        if self._trouble is not None:
            self._emit("polling_again", message="the server and this machine are fine again; taking jobs")
        self._trouble, self._failures = None, 0

    def _drain(self) -> None:
        """Wait until all jobs have ended; heartbeats go on meanwhile. Stop them when `leave` says so."""
        told = Leaving.NO
        while self._slots:
            if told is not self._leaving:
                told = self._leaving
                jobs = ", ".join(sorted(self._slots))
                what = "stopping and giving back" if told is Leaving.STOP_JOBS else "finishing"
                then = "exit at once" if told is Leaving.STOP_JOBS else "stop and give back"
                self._emit("draining", message=f"{what} job {jobs}; another Ctrl-C or SIGTERM: {then}")
            if self._leaving is Leaving.STOP_JOBS:
                for slot in list(self._slots.values()):
                    slot.halt.set(StopReason.SHUTDOWN)
            self._budget.wait_for_change(self._polling.interval_s)
        self._flush_outbox(now=True)
        if self._unheard:
            jobs = ", ".join(sorted(self._unheard))
            self._emit("unheard", level="warning", message=f"job {jobs} is not wholly ended; the next start goes on")


def _nothing_free(free: Offer) -> str:
    return (
        f"only {max(0.0, free.cpu_cores):.1f} cores and {max(0, free.memory_mib)} MiB are free: other programs use the "
        "rest; close some, or lower RESERVE_CPUS and RESERVE_MEMORY"
    )


def _restarted(record: Record) -> str:
    where = {
        Phase.CLAIMED: "before it began",
        Phase.STAGING_IN: "while its inputs were downloaded",
        Phase.RUNNING: "while it ran",
        Phase.STAGING_OUT: "while its outputs were uploaded",
    }
    return f"the worker was stopped {where.get(record.phase, 'unexpectedly')}"
