"""Watching one container to its end, and ending it when it must end.

Used by the runner, in the job's own thread. A job is stopped when its halt is set (cancelled, taken over, shut down),
when its time is up, when it takes more disk than JOB_DISK_LIMIT, and when a disk runs full and it is its turn (whether
it was the one that filled it is asked of `blame` when its container is gone); it is left running when the worker
detaches. A container that cannot be killed is *stuck*: it is tried again every five minutes, and the worker takes no
job meanwhile (FAULTS.md E5).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from jobfetcher.blame import Blame, Turns, size
from jobfetcher.core.errors import JobFault, JobReason, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.ports import Container, Emit
from jobfetcher.core.run import Exit, Taken, Written
from jobfetcher.workspace import Base, Full

#: One wait call to the engine. Its end is noticed at once; this bounds how soon a detach and the disk are looked at.
_SLICE_S = 2.0

#: The disk is looked at this often, and the container's state, in seconds (FAULTS.md D3, E2).
_DISK_S, _STATE_S = 5.0, 30.0

#: Measuring a job's directory takes time; at most one part in so many of it is spent on that.
_MEASURE_SHARE = 20

#: A container that still runs so long after it was to be killed is stuck; then it is tried again this often (E5).
_STUCK_S, _STUCK_RETRY_S = 60.0, 300.0

#: A pause that lasts longer is told (E11).
_PAUSED_S = 600.0

#: So long a job's directory is counted to find out who holds most of a full disk, in seconds: it is being filled.
_ORDER_S = 3.0


@dataclass(frozen=True, slots=True)
class Limits:
    """When this worker stops a job by itself. Times in seconds; None: no limit but the disk's own."""

    stop_grace_s: float = 10.0
    max_runtime_s: float | None = None
    disk_limit_mib: int | None = None


class Watcher:
    """Waits for containers, one per call; calls may run side by side in threads."""

    def __init__(
        self,
        base: Base,
        limits: Limits,
        emit: Emit,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._base = base
        self._limits = limits
        self._emit = emit
        self._clock = clock
        #: Jobs whose container cannot be killed, and what the engine says.
        self.stuck: dict[JobId, str] = {}
        #: Who filled a disk; the runner asks it, too, and says when a job is over.
        self.blame = Blame(base, sleep)
        self._turns = Turns(base, lambda job_id: job_id in self.stuck)

    def check_stuck(self) -> None:
        """Raise WorkerFault(ENGINE) while a container cannot be killed: no job is taken then (FAULTS.md E5)."""
        for job_id, why in list(self.stuck.items()):
            raise WorkerFault(WorkerReason.ENGINE, f"the container of job {job_id} cannot be killed: {why}")

    def wait(
        self,
        job_id: JobId,
        container: Container,
        halt: Halt,
        before_stop: Callable[[], None],
        remove: Callable[[], None],
        *,
        began_before: bool = False,
    ) -> Exit:
        """How the container ended. `Exit.stopped_for` is set where one of the limits ended it.

        `before_stop` is called before this worker begins to stop it, and may raise WorkerFault: it is stopped anyway.
        `remove` is called where it was stopped for a full disk: it saves what must be saved and removes the container.
        `began_before`: an earlier process began the run; it counts where nobody opened its account in `blame`.

        Raises Stopped(DETACH) with the container running on, and what `Container.wait` and `remove` raise. Any other
        halt stops the container, and its exit is returned: the caller asks the halt.
        """
        if not self.blame.is_open(job_id):
            self.blame.open(job_id, began_before=began_before)
        watch = _Watch(self._base, self._limits, job_id, container, self._turns, self._emit, self._clock)
        with self._turns.running(job_id, watch.holds):
            with self._stopping(job_id, container, halt, before_stop) as stop:
                while (exit := container.wait(_SLICE_S)) is None:
                    if halt.reason is StopReason.DETACH:
                        raise Stopped(StopReason.DETACH)
                    if halt.reason is not None or watch.oversteps():
                        stop()
            if watch.reason is None:
                return exit
            said = ""
            if watch.full is not None and exit.genuine and halt.reason is None:
                seen = partial(watch.holds_elsewhere, watch.full)
                said = self.blame.judge(job_id, watch.full, watch.before, remove, since=watch.since, seen=seen)
            if said:
                return replace(exit, stopped_for=JobReason.DISK_FILLED, error=said)
            return replace(exit, stopped_for=watch.reason, error=watch.why)

    @contextmanager
    def _stopping(
        self, job_id: JobId, container: Container, halt: Halt, before_stop: Callable[[], None]
    ) -> Iterator[Callable[[], None]]:
        """While inside, a halt stops the container, and so does a call of what this yields. In a thread of its own,
        because stopping takes up to the grace time, and whoever sets the halt (a heartbeat, the way out with many
        jobs) must not wait for it. Tried again until the wait is over: a cancelled job must not run on because the
        engine did not answer once (FAULTS.md B7)."""
        over = threading.Event()
        once = threading.Lock()

        def run() -> None:
            try:
                before_stop()
            except Exception as error:  # whatever is wrong with the note, the container must stop
                self._emit("journal_failed", level="error", job=job_id, message=f"{error}")
            self._stop(job_id, container, over)

        thread = threading.Thread(target=run, name=f"stop-{job_id}")

        def begin() -> None:
            if halt.reason is not StopReason.DETACH and once.acquire(blocking=False):
                try:
                    thread.start()
                except RuntimeError as error:  # the limit of threads; the wait comes back to it
                    self._emit("stop_failed", level="error", job=job_id, message=f"it cannot be stopped: {error}")
                    once.release()

        try:
            with halt.waking(begin):
                yield begin
        finally:
            over.set()
            if thread.ident is not None:
                thread.join()
            self.stuck.pop(job_id, None)

    def _stop(self, job_id: JobId, container: Container, over: threading.Event) -> None:
        began, told = self._clock(), False
        while not over.is_set():
            try:
                container.stop(self._limits.stop_grace_s)
                return
            except WorkerFault as error:
                why = str(error)
            if not told:
                told = True
                self._emit("stop_failed", level="error", job=job_id, message=f"it cannot be stopped: {why}")
            if self._clock() - began < _STUCK_S:
                over.wait(self._limits.stop_grace_s)
                continue
            if job_id not in self.stuck:
                self.stuck[job_id] = why
                message = f"its container cannot be killed; no job is taken until it is gone: {why}"
                self._emit("stuck", level="error", job=job_id, message=message)
            over.wait(_STUCK_RETRY_S)


class _Watch:
    """What one container is watched for, besides its end. `reason` and `why` are set once a limit is overstepped."""

    def __init__(
        self,
        base: Base,
        limits: Limits,
        job_id: JobId,
        container: Container,
        turns: Turns,
        emit: Emit,
        clock: Callable[[], float],
    ) -> None:
        self._base = base
        self._limits = limits
        self._job_id = job_id
        self._container = container
        self._turns = turns
        self._emit = emit
        self._clock = clock
        self._began = self._disk_due = clock()
        self._state_due = self._began + _STATE_S
        self._paused_since: float | None = None
        self._pause_told = False
        self.reason: JobReason | WorkerReason | None = None
        self.why = ""
        #: The disk for which it is stopped, whoever filled it, and what was free of all disks then.
        self.full: Full | None = None
        self.before: dict[int, Taken] = {}
        self.since = 0

    def oversteps(self) -> bool:
        """Whether the job must be stopped now; True once."""
        if self.reason is not None:
            return False
        now = self._clock()
        if now >= self._state_due:
            self._state_due = now + _STATE_S
            self._look_for_pause(now)
        limit = self._limits.max_runtime_s
        if limit is not None and now - self._began >= limit:
            self.reason = JobReason.TIME_LIMIT
            self.why = f"stopped after the time limit of this worker, {limit:g} s"
        elif (called := self._turns.called(self._job_id)) is not None:
            self._stop_for(called)
        elif now >= self._disk_due:
            self._look_at_disk()
            took = self._clock() - now
            self._disk_due = now + max(_DISK_S, took * _MEASURE_SHARE)
        return self.reason is not None

    def _look_at_disk(self) -> None:
        full = self._base.find_full()
        if full is not None and full.disk is None:  # it went read-only, say, which is no job's doing
            self._stop_for(full)
            return
        if full is not None:
            self._turns.take(full)
            if self._turns.called(self._job_id) is not None:
                self._stop_for(full)
                return
        if (limit_mib := self._limits.disk_limit_mib) is not None:
            files, written = self._used()
            used = (files + written.engine + written.files).bytes
            if used > limit_mib << 20:
                self.reason = JobReason.DISK_FILLED
                self.why = f"stopped: the job used {size(used)} of disk, and JOB_DISK_LIMIT is {limit_mib} MiB"

    def _stop_for(self, full: Full) -> None:
        self.reason = WorkerReason.DISK
        self.why = f"the disk ran full while the job ran: {full.why}"
        if full.disk is not None:
            self.since = self._base.made_room  # first: what goes away just now counts as gone meanwhile
            self.full, self.before = full, self._base.free()

    def holds(self, full: Full) -> int:
        """How much the job holds of that disk, as far as it can be seen. Called from other jobs' threads."""
        assert full.disk is not None  # noqa: S101 - for another fault nobody has a turn
        try:
            files, written = self._used(_ORDER_S)
            return self._base.used_on(full.disk, files + written.files, written.engine).of(full.scarce)
        except (WorkerFault, JobFault):  # the disk does not answer, or somebody removed the container
            return 0

    def holds_elsewhere(self, full: Full) -> int:
        """How much of that disk its container holds beside the job's directory, as far as it can be seen."""
        assert full.disk is not None  # noqa: S101 - for another fault nobody has a turn
        try:
            written = self._container.written()
            return self._base.used_on(full.disk, written.files, written.engine).of(full.scarce)
        except (WorkerFault, JobFault):  # the disk does not answer, or somebody removed the container
            return 0

    def _used(self, within_s: float = math.inf) -> tuple[Taken, Written]:
        """What the job's directory takes, and what its container holds elsewhere (FAULTS.md D3)."""
        files = self._base.job(self._job_id).taken(within_s)
        try:
            return files, self._container.written()
        except WorkerFault as error:  # the engine's disk may be the one that is full
            self._emit("measure_failed", level="debug", job=self._job_id, message=str(error))
            return files, Written()

    def _look_for_pause(self, now: float) -> None:
        try:
            paused = self._container.is_paused()
        except WorkerFault:
            return  # the next wait says what is wrong
        if not paused:
            self._paused_since, self._pause_told = None, False
        elif self._paused_since is None:
            self._paused_since = now
        elif now - self._paused_since >= _PAUSED_S and not self._pause_told:
            self._pause_told = True
            message = f"its container has been paused for {(now - self._paused_since) / 60:.0f} min; docker unpause it"
            self._emit("paused", level="warning", job=self._job_id, message=message)
