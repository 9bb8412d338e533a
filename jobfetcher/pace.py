"""How soon to ask for the next job: the usual interval, and back-off while something is wrong.

Used by the worker, in its main thread; `ended` comes from the slots. Jobs that end badly never hold up those of others
for long, for they may all be one user's: five in a row make this machine test itself (`self_test`), and as long as it
passes, jobs are taken at the usual pace, at most one a second (FAULTS.md T23). A machine that gives each job back, for
it cannot use the storage or its owner's policy refuses them all, would pass that test and eat the queue, since no
account gets a job again that it gave back (PROTOCOL.md S3): it takes ever fewer instead. Waits are spread, so that a
thousand workers do not come back together (J8), and every trouble is said once, not once per try (J10); of a server
that is away `outage` tells.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable

from jobfetcher.core.errors import EXPECTED, JobfetcherError, SourceError, SourceUnavailable, WorkerReason
from jobfetcher.core.ports import Emit
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.outage import Outage

#: FAULTS.md J8: longest pause between two polls of a server that does not answer.
_CAP_S = 300.0

#: FAULTS.md T23: so many bad ends within so many seconds, and no good one between, are a reason to doubt this machine;
#: and until a job ends well, so many seconds lie between a bad end and the next job.
_BAD_ENDS, _BAD_WITHIN_S = 5, 600.0
_BAD_PAUSE_S = 1.0

#: Reasons that are this machine's and that no box of its own would show, each with what its owner should look at. After
#: `_BAD_ENDS` jobs in a row were given back for them, one is tried after 1, 2, 4, 8 min and then every 10 min: that is
#: some ten jobs in the first hour, and the first user after the cure waits for ten minutes at most.
_UNPROVEN = {
    WorkerReason.STORAGE: "this machine cannot use the storage of their files",
    WorkerReason.POLICY: (
        "what this worker's settings allow is not what jobs need (ALLOWED_IMAGES, REGISTRY_ALLOW, PULL_POLICY, "
        "JOB_SIGNING_AUDIENCE)"
    ),
}
_REST_S, _REST_CAP_S = 60.0, 600.0

#: PROTOCOL.md S1, S19: a server that cannot reach its user's side hands a job out and answers 500. The job is lost to
#: this account (S3), so while words about jobs in hand are not accepted, the next one is asked for once in so many
#: usual intervals at most: 30 s x 60 is more than `_CAP_S`, so that outages of up to five minutes cost no job.
_HELD_INTERVALS = 60.0

#: Under which name the questions for jobs are known to `outage`.
_POLLING = "polling"


class Pace:
    """When to poll. `interval_s`: seconds between two questions when there was no job."""

    def __init__(
        self,
        interval_s: float,
        emit: Emit,
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = lambda: random.uniform(0.9, 1.1),  # noqa: S311 - spreads load only
        outage: Outage | None = None,
    ) -> None:
        self.interval_s = interval_s
        self._emit = emit
        self._outage = outage or Outage(emit, clock=clock)
        self._clock = clock
        self._jitter = jitter
        self._lock = threading.Lock()
        self._answered = False
        self._trouble: str | None = None
        self._trouble_is_here = False  # and not the server's
        self._failures = 0
        self._not_before = 0.0
        #: Since when no question was asked because words about jobs in hand are not accepted; and whether one was
        #: answered since: then these jobs have a trouble of their own, and hold up no other.
        self._held_since: float | None = None
        self._answered_meanwhile = False
        #: When jobs ended badly since the last good end or test, and how many have since the last good end.
        self._bad_ends: deque[float] = deque(maxlen=_BAD_ENDS)
        self._bad_row = 0
        self._told = False
        #: How many were given back in a row for a reason of `_UNPROVEN`; and, once that are too many, how many were
        #: taken since, and until when no other one is.
        self._given_back = self._tries = 0
        self._rest_until = 0.0
        self._has_finished = False

    @property
    def in_trouble(self) -> bool:
        """Whether the last question was not answered, or could not be asked."""
        return self._trouble is not None

    def left_s(self) -> float:
        """Seconds during which nothing may be asked, whatever gets free meanwhile."""
        now = self._clock()
        left_s = max(self._not_before, self._rest_until) - now
        return max(0.0, left_s, min(self._held_s(now), self.interval_s))

    def idle(self) -> float:
        """How long to wait when there was no job."""
        return self.interval_s * self._jitter()

    def failed(self, error: JobfetcherError) -> float:
        """Say once what is wrong, and how long to wait: full jitter up to a cap that doubles."""
        self._held_since = None
        self._failures += 1
        message = str(error)
        if message != self._trouble:
            self._trouble = message
            level = "debug" if isinstance(error, SourceError) else "error"  # of the server `outage` tells
            self._emit("not_polling", level=level, message=f"no job can be taken: {message}")
        # Never before the server wants it, never at once (`Retry-After: 0` must not make a busy loop), and never just
        # when it wants it: with a date, or after one answer to many at once, that is the same moment for all.
        asked_s = error.retry_after_s if isinstance(error, SourceUnavailable) and error.retry_after_s else 0.0
        cap_s = min(_CAP_S, self.interval_s * 2.0 ** min(self._failures, 10))
        wait_s = asked_s + random.uniform(min(1.0, cap_s), cap_s)  # noqa: S311 - spreads load only
        if isinstance(error, SourceError):
            self._outage.failed(_POLLING, "no job can be taken", error, wait_s)
            self._wait_until(self._clock() + wait_s)  # a job that ends meanwhile makes the server no better
            self._trouble_is_here = False
        else:
            self._trouble_is_here = True
        return wait_s

    def well(self) -> None:
        """The server answered and this machine is fit."""
        self._outage.answered(_POLLING)
        self._answered_meanwhile = True
        if self._trouble is not None:
            level = "info" if self._trouble_is_here else "debug"
            self._emit("polling_again", level=level, message="the server and this machine are fine again; taking jobs")
        elif not self._answered:
            self._emit("server_answers", message="the server answers; taking jobs")
        self._answered = True
        self._trouble, self._failures = None, 0

    def ended(self, outcome: Outcome) -> bool:
        """A job ended; True: so many have ended badly in a row that this machine must test itself (T23)."""
        if outcome.ending is Ending.DROPPED or outcome.reason in EXPECTED:
            return False
        if outcome.ending is Ending.WORKER_FAILED and outcome.reason in _UNPROVEN:
            self._was_given_back(outcome)
            return False
        self._took_part()
        with self._lock:
            now = self._clock()
            if outcome.ending is Ending.FINISHED:
                self._has_finished = True
                self._bad_ends.clear()
                self._bad_row, self._told = 0, False
                return False
            self._bad_row += 1
            self._bad_ends.append(now)
            if self._bad_row >= _BAD_ENDS:
                self._not_before = max(self._not_before, now + _BAD_PAUSE_S)
            return self._recent() >= _BAD_ENDS

    def is_doubtful(self, in_hand: int) -> bool:
        """Whether this machine must test itself before it takes another job: with `in_hand` jobs that may end badly as
        well, more of them would be spoilt by a broken machine than T23 allows."""
        with self._lock:
            bad = self._recent()
            return bad > 0 and bad + in_hand >= _BAD_ENDS

    def tested(self) -> None:
        """This machine tested itself and is well: if bad ends were the reason, people are told, once in a row."""
        with self._lock:
            self._bad_ends.clear()
            row = self._bad_row
            tell, self._told = row >= _BAD_ENDS and not self._told, self._told or row >= _BAD_ENDS
        if tell:
            message = (
                f"{row} jobs in a row ended badly; this machine has tested itself and is well, so it goes on at its "
                "usual pace"
            )
            self._emit("many_failures", level="warning", message=message)

    def took(self) -> None:
        """A job was taken. Where that was to see whether jobs can be run here again, no other one is before its end."""
        with self._lock:
            if self._given_back >= _BAD_ENDS:
                self._tries += 1
                self._rest()

    def _was_given_back(self, outcome: Outcome) -> None:
        """A job was given back for a reason that no box of the worker's own would show."""
        with self._lock:
            self._not_before = max(self._not_before, self._clock() + _BAD_PAUSE_S)
            # A policy under which a job has ended well is meant as it is: it refuses some jobs and must delay no other.
            if outcome.reason is WorkerReason.POLICY and self._has_finished:
                return
            self._given_back += 1
            if self._given_back >= _BAD_ENDS:
                self._rest()
            tell = self._given_back == _BAD_ENDS
        if tell and isinstance(outcome.reason, WorkerReason):
            message = (
                f"{_BAD_ENDS} jobs in a row were given back: {_UNPROVEN[outcome.reason]}; the next one is tried in "
                f"{_REST_S / 60:.0f} min, and as long as that does not change one in {_REST_CAP_S / 60:.0f} min at "
                f"most. The last one said: {outcome.message}"
            )
            self._emit("giving_back", level="warning", message=message)

    def _took_part(self) -> None:
        """A job ended otherwise, so it is not that all are given back."""
        with self._lock:
            tell = self._given_back >= _BAD_ENDS
            self._given_back = self._tries = 0
            self._rest_until = 0.0
        if tell:
            self._emit("taking_again", message="a job was not given back any more; taking jobs at the usual pace")

    def _rest(self) -> None:
        """Take no job for a while. The lock is held."""
        rest_s = min(_REST_CAP_S, _REST_S * 2.0 ** min(self._tries, 10) * self._jitter())
        self._rest_until = max(self._rest_until, self._clock() + rest_s)

    def _held_s(self, now: float) -> float:
        if not self._outage.is_met_by_others(_POLLING):
            self._held_since, self._answered_meanwhile = None, False
            return 0.0
        if self._answered_meanwhile:
            return 0.0
        if self._held_since is None:
            self._held_since = now
        return self._held_since + min(_CAP_S, _HELD_INTERVALS * self.interval_s) - now

    def _recent(self) -> int:
        now = self._clock()
        return sum(now - moment < _BAD_WITHIN_S for moment in self._bad_ends)

    def _wait_until(self, moment: float) -> None:
        with self._lock:
            self._not_before = max(self._not_before, moment)
