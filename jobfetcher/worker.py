"""The outer loop, kept dull: recover, offer, fetch, admit, hand to a slot; drain when told to.

    until leaving:  tell unheard ends -> machine fit? -> what is free? -> fetch -> journal -> reserve -> slot

A slot is a thread of its own that runs one job to its end (runner.Runner). Nothing here sleeps: every wait is on the
budget's event, which a finished job and a signal both set.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Protocol

from jobfetcher import recovery
from jobfetcher.core.errors import (
    EXPECTED,
    ConfigError,
    JobfetcherError,
    SourceRefused,
    StopReason,
    UnreadableJob,
    Verdict,
    WorkerFault,
    WorkerReason,
    verdict,
)
from jobfetcher.core.failpoints import failpoint
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import Job, JobId
from jobfetcher.core.ports import Claim, Emit, Engine, JobSource, Lease
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.ending import outcome_of
from jobfetcher.housekeeping import Housekeeper
from jobfetcher.journal import Journal
from jobfetcher.pace import Pace
from jobfetcher.resources.budget import NOTHING, Budget, Reservation
from jobfetcher.runner import Runner
from jobfetcher.self_test import DOUBTFUL, SelfTest
from jobfetcher.workspace import Base

#: As many jobs again may upload as may compute: slow uploads must not fill the disk with finished jobs.
_OPEN_PER_SLOT = 2

#: Stray containers are looked for, and images tidied, this often; a stray must be as old (FAULTS.md E10).
_RECONCILE_S = 300.0

_IN_QUEUE = "it waits for one that computes"

#: FAULTS.md F2: detached within 5 s. A slot that is not out by then is cut off, which the journal bears.
_DETACH_S = 4.0


class Leaving(IntEnum):
    """How far the way out has gone; each signal is one step (DESIGN.md, rule 11).

    DETACH: jobs are left as they stand, containers running; the next start goes on with them (FAULTS.md F2).
    """

    NO = 0
    DRAIN = 1
    DETACH = 2
    STOP_JOBS = 3


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
    hold: Reservation


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
        housekeeper: Housekeeper,
        self_test: SelfTest,
        polling: Polling,
        emit: Emit,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = lambda: random.uniform(0.9, 1.1),  # noqa: S311 - spreads load only
    ) -> None:
        self._source = source
        self._engine = engine
        self._budget = budget
        self.base, self._journal = base, journal
        self._runner = runner
        self._housekeeper = housekeeper
        self._self_test = self_test
        self._polling = polling
        self._emit = emit
        self._clock = clock
        self._pace = Pace(polling.interval_s, emit, clock=clock, jitter=jitter, outage=runner.outbox.outage)
        self._slots: dict[JobId, _Slot] = {}
        self._outbox = runner.outbox
        self._taken, self._reconcile_due = 0, 0.0
        self._leaving = Leaving.NO
        #: Whether the server has ever answered a question for a job.
        self.welcomed = False
        #: Whether a job was left as it stands, for the next start.
        self.detached = False
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
            self.say_goodbye()  # also of one that had enough, or whose setup a person must mend

    def leave(self, how: Leaving) -> None:
        """Stop taking jobs; with DETACH also let go of those in hand, with STOP_JOBS stop them and give them back.

        Safe in a signal handler.
        """
        self._leaving = max(self._leaving, how)
        self.say_goodbye()  # now, for `docker stop` kills what takes longer than 10 s
        self._budget.wake()

    def say_goodbye(self) -> None:
        """Tell the next start that what is open was not left by a crash (FAULTS.md A9). Safe in a signal handler."""
        with contextlib.suppress(OSError):
            self.base.say_goodbye()

    def last_words(self) -> list[str]:
        """What becomes of each job in hand, as sentences, when this process ends now; and that it must after this."""
        return [recovery.next_start(record) for record in self._journal.last_records()]

    @property
    def left_by_signal(self) -> bool:
        """Whether `leave` was called, as opposed to having had enough."""
        return self._leaving is not Leaving.NO

    @property
    def unfinished(self) -> bool:
        """Whether something is left for the next start: an end that was not heard, or what could not be removed."""
        return bool(self._outbox.waiting)

    @property
    def running(self) -> list[JobId]:
        """Jobs that this worker has in hand now."""
        return list(self._slots)

    def recover(self) -> None:
        """Go on with what an earlier process left, before the first new job is taken (recovery.py)."""
        failpoint("before:recover")
        if damage := recovery.damage_of(self._journal):
            self._emit("journal_damaged", level="error", message=damage)
        for found in recovery.open_jobs(
            self._journal, self._source, self._budget, self._emit, crashed=self.base.crashed
        ):
            lease, job, hold, outcome = found.lease, found.job, found.hold, found.outcome
            if outcome is not None:
                self._in_slot(lease, Halt(), partial(self._outbox.settle, lease, outcome))
            elif job is not None and hold is not None:
                self._run(lease, job, hold)
        recovery.clear_strays(self._journal, self._engine, self.base, self._emit)
        self._reconcile_due = self._clock() + _RECONCILE_S
        failpoint("after:recover")

    def _poll(self) -> None:
        idle_since: float | None = None
        while not self._leaving:
            self._outbox.flush()
            self._reconcile()
            taken, idle_s = self._taken, 0.0 if idle_since is None else self._clock() - idle_since
            if self._polling.enough(taken, idle_s):
                return
            wait_s = self._pace.left_s() or self._take_one()
            is_busy = self._slots or self._taken > taken
            idle_since = None if is_busy else idle_since or self._clock()  # not before it asked: a job may have waited
            if self._polling.idle_limit_s is not None:
                wait_s = min(wait_s, max(0.0, self._polling.idle_limit_s - idle_s))
            if wait_s > 0:
                self._budget.wait_for_change(min(wait_s, self._outbox.due_in_s()))

    def _take_one(self) -> float:
        """Try to take one job; returns how long to wait before the next try, in seconds (0: at once).

        A wait also ends when something gets free or a signal comes.
        """
        try:
            offer = None if self._is_full() else self._budget.offer()
            if offer is None and self._slots:
                return self._polling.interval_s  # ended early by the next job that gives something back
            self._engine.check()
            if self._pace.in_trouble:
                self._outbox.flush(now=True)  # what an engine that was away still holds comes before new jobs
            self._runner.watcher.check_stuck()
            self._housekeeper.check_room()
            if self._self_test.check(busy=bool(self._slots), asked=self._pace.is_doubtful(len(self._slots))):
                self._pace.tested()
                return self._take_one()  # from the top: a GPU that does not work is not offered
            if offer is None:
                raise WorkerFault(WorkerReason.DOES_NOT_FIT, self._budget.shortage())
            failpoint("before:fetch")
            claim = self._source.fetch(offer, 0.0)
            failpoint("after:fetch")
        except UnreadableJob as error:
            self.welcomed = True
            self._settle_unreadable(error)
            return 0.0
        except JobfetcherError as error:
            # At the very first question a wrong password or no engine: a person is at hand to see it. Later the engine
            # is being restarted or the account changed (FAULTS.md B4, E1, E3), and running jobs wait for it.
            hopeless = verdict(error) is Verdict.STOP_WORKER or isinstance(error, SourceRefused)
            if hopeless and not self.welcomed and not self._slots and not self._outbox.waiting:
                if isinstance(error, ConfigError):
                    raise  # what caused it is kept
                raise ConfigError(str(error)) from error
            return self._pace.failed(error)
        self.welcomed = True
        self._pace.well()
        if claim is None:
            self._emit("no_job", level="debug", message="no job for this machine")
            return self._pace.idle()
        self._admit(claim)
        return 0.0

    def _reconcile(self) -> None:
        """Every five minutes: containers that belong to no job of ours, and images nobody needs any more."""
        if self._clock() < self._reconcile_due:
            return
        self._reconcile_due = self._clock() + _RECONCILE_S
        recovery.clear_strays(self._journal, self._engine, self.base, self._emit, older_than_s=_RECONCILE_S)
        self._housekeeper.tidy()

    def _is_full(self) -> bool:
        return len(self._slots) >= _OPEN_PER_SLOT * self._budget.slots + self._budget.prefetch

    def _admit(self, claim: Claim) -> None:
        """Journal the job, reserve its share, and hand it to a slot (steps 2 and 3)."""
        lease, job = claim
        if job.id in self._slots or job.id in self._outbox.waiting:
            # The server gave us again what we hold (its lease ran out meanwhile). Who holds it goes on; it is ours.
            self._emit("job_again", level="warning", job=job.id, message="handed out again while it is in hand here")
            return
        self._taken += 1
        self._pace.took()
        try:
            failpoint("before:claim")
            self._journal.claim(job.id, lease.token, job)
            failpoint("after:claim")
            known_as = f" (to its user: job {job.user_job_id})" if job.user_job_id else ""
            message = f"claimed{known_as}, image {job.image}"
            self._emit("job_claimed", job=job.id, user_job=job.user_job_id, message=message, image=job.image)
            hold = self._budget.reserve(job.needs)
            failpoint("after:reserve")
        except WorkerFault as error:
            outcome = Outcome(Ending.WORKER_FAILED, error.reason, str(error))
            self._in_slot(lease, Halt(), partial(self._outbox.settle, lease, outcome))
        else:
            self._run(lease, job, hold)

    def _run(self, lease: Lease, job: Job, hold: Reservation) -> None:
        halt = Halt(on_wait=lambda *_: self._budget.wake() if self._leaving else None)  # for `_drain` to look at it
        if not self._in_slot(lease, halt, partial(self._runner.run, lease, job, hold, halt), hold):
            hold.release()

    def _settle_unreadable(self, error: UnreadableJob) -> None:
        """Report a job that nobody could run, with the same care as any other end."""
        lease = error.lease
        if lease.job_id in self._slots or lease.job_id in self._outbox.waiting:
            return
        self._taken += 1
        try:
            self._journal.claim(lease.job_id, lease.token, None)
        except WorkerFault as fault:
            self._emit("journal_failed", level="error", job=lease.job_id, message=str(fault))
        outcome = outcome_of(error)
        self._in_slot(lease, Halt(), partial(self._outbox.settle, lease, outcome))

    def _in_slot(
        self, lease: Lease, halt: Halt, bring_to_end: Callable[[], Outcome | None], hold: Reservation = NOTHING
    ) -> bool:
        """Bring a job to its end in a thread of its own: a server that does not answer must not hold up the others.

        False: there can be no thread for it, and it was given back.
        """

        def run() -> None:
            outcome: Outcome | None = Outcome()
            try:
                outcome = bring_to_end()
            except Exception as error:
                # A bug of ours. The job is in the journal, so the next start goes on with it; so does the worker.
                self._emit("bug", level="error", job=lease.job_id, message=f"{error!r}", where=traceback.format_exc(-3))
            finally:
                self._ended(outcome)
                del self._slots[lease.job_id]
                self._budget.wake()

        slot = _Slot(halt, threading.Thread(target=run, name=f"job-{lease.job_id}"), hold)
        self._slots[lease.job_id] = slot
        try:
            slot.thread.start()
            return True
        except RuntimeError as error:  # the limit of processes of this user or container
            del self._slots[lease.job_id]
            message = f"this machine lets the worker start no more threads: {error}"
            outcome = Outcome(Ending.WORKER_FAILED, WorkerReason.INTERNAL, message)
            self._ended(self._outbox.settle(lease, outcome))
            return False

    def _ended(self, outcome: Outcome | None) -> None:
        if outcome is None:
            self.detached = True  # the journal has it
            return
        if self._pace.ended(outcome) or outcome.reason in DOUBTFUL:
            self._self_test.ask()
        if outcome.ending is Ending.WORKER_FAILED and outcome.reason not in EXPECTED:
            self.worker_faults += 1

    def _drain(self) -> None:
        """Wait until all jobs have ended; heartbeats go on meanwhile. Stop or let go of them when `leave` says so."""
        told, detached_at = Leaving.NO, self._clock()
        while self._slots:
            if told is not self._leaving:
                told, detached_at = self._leaving, self._clock()
                what, then = _FAREWELL[told]
                jobs = ", ".join(sorted(job for job, slot in list(self._slots.items()) if not self._gives_back(slot)))
                self._emit("draining", message=f"{what} job {jobs}; {then}" if jobs else "leaving")
            reason = {Leaving.DETACH: StopReason.DETACH, Leaving.STOP_JOBS: StopReason.SHUTDOWN}.get(self._leaving)
            # Those that wait first: else one of them might still begin to compute with what another one gives back.
            for job, slot in sorted(self._slots.items(), key=lambda held: not held[1].hold.is_waiting):
                if reason is not None:
                    slot.halt.set(reason)
                elif self._gives_back(slot) and (why := _IN_QUEUE if slot.hold.cancel() else slot.halt.waits):
                    self._emit("draining", job=job, message=f"giving it back: {why}")
                    slot.halt.set(StopReason.SHUTDOWN)
            if self._leaving is Leaving.DETACH and self._clock() - detached_at >= _DETACH_S:
                return  # what is still busy is cut off with this process
            if self._leaving is Leaving.DETACH:
                self._budget.wait_for_change(0.2)
            else:
                self._outbox.flush()  # a job that ended must not lose its lease while another one is finished
                self._budget.wait_for_change(min(self._polling.interval_s, self._outbox.due_in_s()))
        if self._leaving is not Leaving.DETACH:
            self._outbox.flush(now=True)
        if self._outbox.waiting:
            jobs = ", ".join(self._outbox.waiting)
            self._emit("unheard", level="warning", message=f"job {jobs} is not wholly ended; the next start goes on")

    def _gives_back(self, slot: _Slot) -> bool:
        """Whether a drain gives the job back, which has not run yet: others run it sooner than this machine, where it
        was prefetched, or waits for a registry or a storage that may be away for hours (FAULTS.md C21)."""
        waits = slot.halt.reason is None and (slot.hold.is_waiting or slot.halt.waits != "")
        return self._leaving is Leaving.DRAIN and self._runner.gives_back and waits


#: What is said on the way out, and what another signal does.
_FAREWELL = {
    Leaving.NO: ("finishing", "Ctrl-C or SIGTERM: leave sooner"),
    Leaving.DRAIN: ("finishing", "another Ctrl-C or SIGTERM: stop and give back"),
    Leaving.DETACH: ("letting go of", "the next start goes on with it"),
    Leaving.STOP_JOBS: ("stopping and giving back", "another Ctrl-C or SIGTERM: exit at once"),
}
