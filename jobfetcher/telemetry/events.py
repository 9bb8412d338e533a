"""Something happened: one name and plain fields, told to every listener.

Made by `build`; `Events.emit` is the `core.ports.Emit` that the rest of the program is given. Observers cannot hurt
(DESIGN.md, rule 12): whatever a listener raises ends here. Listeners run in the emitter's thread, one after the other,
so they must be quick.

Two fields have a meaning of their own in logs: `message`, the sentence for people, and `job`, whose event it is.
Progress has two events, several a second at most, that only progress bars listen to:

    emit("progress", job=..., step="download" | "pull" | "upload", done=bytes, total=bytes or None,
         files_done=..., files_total=...)
    emit("progress_end", job=..., step=...)

They also show since when a job has been running: from its event `run` to a `progress_end` of the step `run`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """`level` is debug, info, warning or error; `time` the wall clock, seconds since 1970 in UTC."""

    name: str
    level: str
    fields: Mapping[str, object]
    time: float


Listener = Callable[[Event], None]


class Events:
    """Fans events out to `listeners`, in their order. `clock` is the wall clock."""

    def __init__(self, *listeners: Listener, clock: Callable[[], float] = time.time) -> None:
        self._listeners = listeners
        self._clock = clock
        self._told: set[tuple[Listener, type[Exception]]] = set()

    def emit(self, name: str, /, level: str = "info", **fields: object) -> None:
        """Tell every listener. Never raises."""
        event = Event(name, level, fields, self._clock())
        for listener in self._listeners:
            try:
                listener(event)
            except Exception as error:
                self._tell_once(listener, error)

    def _tell_once(self, listener: Listener, error: Exception) -> None:
        """Once per listener and kind of error: a broken listener would otherwise break on every event."""
        kind = (listener, type(error))
        if kind not in self._told:
            self._told.add(kind)
            _LOG.error("the event listener %r failed; this is said once: %r", listener, error)
