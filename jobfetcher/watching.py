"""Watching one container to its end, and ending it when it must end.

Used by the runner, in the job's own thread. A job is stopped when its halt is set (cancelled, taken over, shut down),
when its time is up, and when the disk runs full; it is left running when the worker detaches. A container that
cannot be killed is *stuck*: it is tried again every five minutes, and the worker takes no job meanwhile (FAULTS.md E5).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from jobfetcher.core.errors import JobReason, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.ports import Container, Emit
from jobfetcher.core.run import Exit
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

_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Limits:
    """When this worker stops a job by itself. Times in seconds; None: no limit but the disk's own."""

    stop_grace_s: float = 10.0
    max_runtime_s: float | None = None
    disk_limit_mib: int | None = None


class Watcher:
    """Waits for containers, one per call; calls may run side by side in threads."""

    def __init__(self, base: Base, limits: Limits, emit: Emit, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._base = base
        self._limits = limits
        self._emit = emit
        self._clock = clock
        #: Jobs whose container cannot be killed, and what the engine says.
        self.stuck: dict[JobId, str] = {}

    def check_stuck(self) -> None:
        """Raise WorkerFault(ENGINE) while a container cannot be killed: no job is taken then (FAULTS.md E5)."""
        for job_id, why in list(self.stuck.items()):
            raise WorkerFault(WorkerReason.ENGINE, f"the container of job {job_id} cannot be killed: {why}")

    def wait(self, job_id: JobId, container: Container, halt: Halt, before_stop: Callable[[], None]) -> Exit:
        """How the container ended. `Exit.stopped_for` is set where one of the limits ended it.

        `before_stop` is called before this worker begins to stop it, and may raise WorkerFault: it is stopped anyway.

        Raises Stopped(DETACH) with the container running on, and what `Container.wait` raises. Any other halt stops
        the container, and its exit is returned: the caller asks the halt.
        """
        watch = _Watch(self._base, self._limits, job_id, container, self._emit, self._clock)
        with self._stopping(job_id, container, halt, before_stop) as stop:
            while True:
                exit = container.wait(_SLICE_S)
                if exit is not None and watch.reason is not None:
                    return replace(exit, stopped_for=watch.reason, error=watch.why)
                if exit is not None:
                    return exit
                if halt.reason is StopReason.DETACH:
                    raise Stopped(StopReason.DETACH)
                if halt.reason is not None or watch.oversteps():
                    stop()

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
        self, base: Base, limits: Limits, job_id: JobId, container: Container, emit: Emit, clock: Callable[[], float]
    ) -> None:
        self._base = base
        self._limits = limits
        self._job_id = job_id
        self._container = container
        self._emit = emit
        self._clock = clock
        self._began = self._disk_due = clock()
        self._state_due = self._began + _STATE_S
        self._free_at_first = base.free_bytes()
        self._paused_since: float | None = None
        self._pause_told = False
        self.reason: JobReason | WorkerReason | None = None
        self.why = ""

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
        elif now >= self._disk_due:
            self._look_at_disk()
            took = self._clock() - now
            self._disk_due = now + max(_DISK_S, took * _MEASURE_SHARE)
        return self.reason is not None

    def _look_at_disk(self) -> None:
        full = self._base.find_full()
        limit_mib = self._limits.disk_limit_mib
        if not full and limit_mib is None:
            return
        files, layers = self._used()
        used = files + layers
        if limit_mib is not None and used > limit_mib << 20:
            self.reason = JobReason.DISK_FILLED
            self.why = f"stopped: the job used {used / _GIB:.1f} GiB of disk, and JOB_DISK_LIMIT is {limit_mib} MiB"
        elif full and self._has_filled(full, files, layers):
            self.reason = JobReason.DISK_FILLED
            self.why = f"stopped: the job filled the disk (it used {used / _GIB:.1f} GiB); {full.why}"
        elif full:
            self.reason = WorkerReason.DISK
            self.why = f"the disk ran full while the job ran: {full.why}"

    def _has_filled(self, full: Full, files: int, layers: int) -> bool:
        """Whether half of what is gone of that disk since the start, or more, is this job's. Of that disk alone: beside
        a busy engine whose images lie on another one, a job would be taken for innocent."""
        if full.disk is None:
            return False
        gone = self._free_at_first.get(full.disk, 0) - self._base.free_bytes().get(full.disk, 0)
        return self._base.used_on(full.disk, files, layers) >= gone / 2

    def _used(self) -> tuple[int, int]:
        """Bytes of the job's directory, and of its container's layer and volumes (FAULTS.md D3)."""
        files = self._base.job(self._job_id).used_bytes()
        try:
            return files, self._container.written_bytes()
        except WorkerFault as error:  # the engine's disk may be the one that is full
            self._emit("measure_failed", level="debug", job=self._job_id, message=str(error))
            return files, 0

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
