"""Whether the job source answers, said once for the whole worker and not once per job (FAULTS.md J10).

Used by `pace` (questions for jobs), `heartbeat` (keep-alives) and `outbox` (ends): each tells here how its calls go,
under a name of its own. One line at once when the first of them fails, a reminder every ten minutes with how long it
has been and when the next try is, and one line when none of them fails any more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from jobfetcher.core.errors import SourceError, TooSoon
from jobfetcher.core.ports import Emit

#: A person who looks at the log sees within so many seconds that it is not over.
_REMIND_S = 600.0

#: The longest pause between two tries is 15 min (what a server may ask for, and the back-off of an idle worker). Of
#: somebody who has not tried for longer than that nothing is known.
_HEARD_WITHIN_S = 1200.0

#: What people hear at once when the reason changes; one that goes on changing comes with the reminders.
_REASONS = 5


@dataclass(slots=True)
class _Trouble:
    """An outage that goes on. Times on the clock of `Outage`."""

    since: float
    said_at: float
    tried_at: float
    last: str
    reasons: set[str]


class Outage:
    """Thread-safe. `clock` in seconds."""

    def __init__(self, emit: Emit, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._emit = emit
        self._clock = clock
        self._lock = threading.Lock()
        #: Whose calls fail, and when each tries again.
        self._next_try: dict[str, float] = {}
        self._trouble: _Trouble | None = None

    def failed(self, who: str, what: str, error: SourceError, again_in_s: float) -> None:
        """A call of `who` failed, and is tried again after so many seconds. `what` failed, for a person."""
        if isinstance(error, TooSoon):
            return  # nothing was asked
        now, reason = self._clock(), str(error)
        with self._lock:
            self._next_try[who] = now + again_in_s
            message = f"{what}: {reason}"
            if self._trouble is None:
                self._trouble = _Trouble(now, now, now, message, {reason})
            else:
                self._trouble.tried_at, self._trouble.last = now, message
                if reason in self._trouble.reasons or len(self._trouble.reasons) >= _REASONS:
                    message = ""
                else:
                    self._trouble.reasons.add(reason)
            again = self._again(now)
        if message:
            self._emit("server_away", level="warning", message=f"{message}; {again}")
        else:
            self.remind()

    def answered(self, who: str) -> None:
        """A call of `who` was answered as it should be."""
        with self._lock:
            if self._next_try.pop(who, None) is None or self._next_try or self._trouble is None:
                return
            lasted_s, self._trouble = self._clock() - self._trouble.since, None
        self._emit("server_back", message=f"the server answers again, after {_span(lasted_s)}")

    def forget(self, who: str) -> None:
        """Nobody of that name makes calls any more."""
        with self._lock:
            self._next_try.pop(who, None)
            if not self._next_try:
                self._trouble = None

    def is_met_by_others(self, who: str) -> bool:
        """Whether calls of anybody but `who` fail."""
        with self._lock:
            return any(other != who for other in self._next_try)

    def remind(self) -> None:
        """Say that it is not over, if it is time for that."""
        with self._lock:
            now, trouble = self._clock(), self._trouble
            if trouble is None or now - trouble.said_at < _REMIND_S or now - trouble.tried_at > _HEARD_WITHIN_S:
                return
            trouble.said_at = now
            message = f"for {_span(now - trouble.since)} now: {trouble.last}; {self._again(now)}"
        self._emit("server_away", level="warning", message=message)

    def due_in_s(self) -> float | None:
        """Seconds until `remind` has something to say; None while all is well."""
        with self._lock:
            return None if self._trouble is None else max(0.0, self._trouble.said_at + _REMIND_S - self._clock())

    def _again(self, now: float) -> str:
        return f"trying again in {_span(max(0.0, min(self._next_try.values(), default=now) - now))}"


def _span(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
