"""The side thread of one job: it says that the job is alive, and learns when it must end.

    with beating(lease, halt, interval_s=30) as pulse:
        pulse.enter(Phase.RUNNING)

One sender (DESIGN.md, rule 4): phases entered and keep-alives go through this one thread, in order, so the job's own
thread never waits for the network and two updates never cross (PROTOCOL.md S9). On leaving, the thread is stopped *and
joined*, a request in flight included: a late `running` after `finished` would open the job again (S6).
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jobfetcher.core.errors import SourceError, SourceUnavailable, StopReason
from jobfetcher.core.failpoints import failpoint
from jobfetcher.core.halt import Halt
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Emit, Lease, Standing
from jobfetcher.outage import Outage

#: Waits after the 1st, 2nd, ... failed attempt; the last one repeats. With a 10 s deadline per attempt some ten
#: attempts fit into a lease of 300 s (FAULTS.md J3).
RETRY_S = (1.0, 2.0, 4.0, 8.0, 15.0)

#: A server that asks for patience gets it, but no more than this: five attempts still fit into a lease (FAULTS.md B11).
ASKED_MOST_S = 60.0

#: 10 % either way, so that a thousand workers started together do not beat together.
_JITTER = 0.1

#: More failures of our own making than this within _BUG_WINDOW_S, and the job cannot be kept (FAULTS.md F8).
_BUGS, _BUG_WINDOW_S = 3, 600.0

#: What a job waits for is told at most so often, in seconds.
_NOTE_S = 60.0


class Pulse:
    """What the job's thread holds of its heartbeat."""

    def __init__(
        self,
        lease: Lease,
        halt: Halt,
        *,
        interval_s: float,
        silence_s: float | None,
        emit: Emit,
        outage: Outage,
        clock: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self._lease = lease
        self._halt = halt
        self._interval_s = interval_s
        self._silence_s = silence_s
        self._emit = emit
        self._outage = outage
        self._clock = clock
        self._jitter = jitter
        self._changed = threading.Condition()
        self._phase = Phase.CLAIMED
        self._unsaid: deque[Phase] = deque()
        self._note, self._noted_at = "", -_NOTE_S
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{lease.job_id}")

    def enter(self, phase: Phase) -> None:
        """The job is in `phase` now: said at once, and repeated from now on. Never blocks."""
        with self._changed:
            self._phase = phase
            self._unsaid.append(phase)
            self._changed.notify()

    def note(self, words: str) -> None:
        """What the job waits for, for its user to see: told once, with a keep-alive, and one a minute at most, because
        a server appends each to the job's record (PROTOCOL.md S11). Of several meanwhile the latest is told."""
        self._note = words

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def stop(self) -> None:
        """Say what is still unsaid if the server listens, then end; returns when the thread is gone."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        failures = 0
        bugs: list[float] = []
        due = heard_at = self._clock()
        while (phase := self._next(due, failures)) is not None:
            last_try = self._stopping
            note = self._note if self._clock() - self._noted_at >= _NOTE_S else ""
            try:
                failpoint("before:beat")
                standing = self._lease.beat(phase, note)
                failpoint("after:beat")
            except SourceError as error:
                failures += 1
                asked = error.retry_after_s if isinstance(error, SourceUnavailable) else None
                pause_s = retry_pause_s(failures, asked, self._interval_s, self._jitter())
                due = self._clock() + pause_s
                job = self._lease.job_id
                self._outage.failed(job, f"the keep-alive of job {job} is not delivered", error, pause_s)
                if self._gives_up(self._clock() - heard_at):
                    self._halt.set(StopReason.SILENCE)
                if failures == 1:
                    message = f"keep-alive not delivered, trying again: {error}"
                    self._emit("heartbeat_failed", level="debug", job=job, message=message)
                if last_try:
                    return
                continue
            except Exception as error:
                # A bug of ours must not end the beats silently: the server would hand the job on while it runs here.
                now = self._clock()
                bugs = [moment for moment in bugs if now - moment < _BUG_WINDOW_S] + [now]
                self._emit("heartbeat_bug", level="error", job=self._lease.job_id, message=f"heartbeat: {error!r}")
                if len(bugs) >= _BUGS:
                    self._halt.set(StopReason.HEARTBEAT)
                    return
                failures += 1
                due = now + RETRY_S[0]
                continue
            if failures:
                message = "keep-alive delivered again"
                self._emit("heartbeat_recovered", level="debug", job=self._lease.job_id, message=message)
            self._outage.answered(self._lease.job_id)
            failures, heard_at = 0, self._clock()
            if note:
                self._noted_at, self._note = heard_at, "" if self._note is note else self._note
            with self._changed:
                if self._unsaid and self._unsaid[0] is phase:
                    self._unsaid.popleft()
            if standing is not Standing.KEEP:
                self._halt.set(StopReason.CANCELLED if standing is Standing.CANCEL else StopReason.LOST)
                return
            due = self._clock() + self._interval_s * self._jitter()

    def _gives_up(self, silent_s: float) -> bool:
        """Whether a job that still computes is stopped. Results are kept and told whenever the source is back (B3)."""
        return self._phase is Phase.RUNNING and self._silence_s is not None and silent_s >= self._silence_s

    def _next(self, due: float, failures: int) -> Phase | None:
        """Wait until something must be said, and return it; None when all is said and the job is over.

        While the server does not answer, a newly entered phase waits for the next attempt, too: no hammering.
        """
        with self._changed:
            while True:
                if self._stopping or (self._unsaid and not failures):
                    return self._unsaid[0] if self._unsaid else None
                left = due - self._clock()
                if left <= 0:
                    return self._unsaid[0] if self._unsaid else self._phase
                self._changed.wait(left)


def beat_jitter() -> float:
    """By how much to multiply a pause between two beats."""
    return random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - spreads load only


def retry_pause_s(failures: int, asked_s: float | None, interval_s: float, jitter: float) -> float:
    """Seconds until the next try after so many failures in a row, when the server `asked_s` for patience, or did not.

    What it asks of all may be one and the same moment (Retry-After with a date): they come within one interval after
    it, as on any day, as far as ASKED_MOST_S leaves room.
    """
    pause_s = RETRY_S[min(failures, len(RETRY_S)) - 1] * jitter
    if not asked_s:
        return pause_s
    spread_s = random.uniform(0.0, interval_s)  # noqa: S311 - spreads load only
    return max(pause_s, min(asked_s + spread_s, ASKED_MOST_S))


@contextmanager
def beating(
    lease: Lease,
    halt: Halt,
    *,
    interval_s: float,
    emit: Emit,
    phase: Phase = Phase.CLAIMED,
    silence_s: float | None = None,
    outage: Outage | None = None,
    clock: Callable[[], float] = time.monotonic,
    jitter: Callable[[], float] = beat_jitter,
) -> Iterator[Pulse]:
    """Beat for `lease` while inside, beginning with `phase`; sets `halt` when the source says the job is not ours.

    `interval_s`: seconds between keep-alives. `silence_s`: a running job is halted when none was accepted for so long.
    `outage` is told how they go.
    """
    pulse = Pulse(
        lease,
        halt,
        interval_s=interval_s,
        silence_s=silence_s,
        emit=emit,
        outage=outage or Outage(emit, clock=clock),
        clock=clock,
        jitter=jitter,
    )
    pulse.enter(phase)
    pulse.start()
    try:
        yield pulse
    finally:
        pulse.stop()
