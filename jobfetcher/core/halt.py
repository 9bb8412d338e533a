"""The one bit that flows back into a running job: it must end now, and why.

One `Halt` per job. Whoever learns that the job must end (heartbeat, signal handler, time limit) sets it; the first
reason wins. Whoever blocks registers what ends the wait (stop the container, abort the transfer). What the job has to
wait for before it can run is known here as well: it may be a reason to end it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jobfetcher.core.errors import Stopped, StopReason


def unheard(_step: str, _what: str) -> None:
    """Nobody asks what a job waits for."""


class Halt:
    """Set once, read by all. Thread-safe. `on_wait` is called with what `waits_for` is; it must not raise."""

    def __init__(self, on_wait: Callable[[str, str], None] = unheard) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._reason: StopReason | None = None
        self._wakers: list[Callable[[], None]] = []
        self._on_wait = on_wait
        self._waits: dict[str, str] = {}

    @property
    def reason(self) -> StopReason | None:
        """Why the job must end, or None while it may go on."""
        return self._reason

    def set(self, reason: StopReason) -> None:
        """Ask the job to end. Only the first reason counts; wakers run in the caller's thread, once."""
        with self._lock:
            if self._reason is not None:
                return
            self._reason = reason
            wakers = list(self._wakers)
        self._event.set()
        for wake in wakers:
            wake()

    @property
    def waits(self) -> str:
        """What the job has to wait for before it can run, in a sentence; empty while it makes progress, and later."""
        with self._lock:
            return next(iter(self._waits.values()), "")

    def waits_for(self, step: str, what: str) -> None:
        """A step before the run has to wait, as the sentence `what` says; an empty one: it goes on."""
        with self._lock:
            if what:
                self._waits[step] = what
            else:
                self._waits.pop(step, None)
        self._on_wait(step, what)

    def check(self) -> None:
        """Raise Stopped if the job must end."""
        if self._reason is not None:
            raise Stopped(self._reason)

    def wait(self, timeout_s: float) -> bool:
        """Sleep that ends at once when the job must end; True if it must."""
        return self._event.wait(timeout_s)

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """While inside, `wake` is called when the halt is set (at once if it already is). It must not raise."""
        with self._lock:
            already = self._reason is not None
            if not already:
                self._wakers.append(wake)
        if already:
            wake()
        try:
            yield
        finally:
            with self._lock:
                if wake in self._wakers:
                    self._wakers.remove(wake)
