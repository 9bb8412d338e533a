"""Waiting for a container's end by asking for its state, for an engine whose own call for that is no use (`flavour`).

Used by `docker` in place of `api.Line`. Promises: an end is noticed at most half a second late, for some 1 % of a core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from jobfetcher.engine.api import Line, NotFound

#: The pause between two questions, in seconds: at first, and after the container has run for a while. Podman takes 2 to
#: 5 ms of processor time for an answer.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.05, 0.5

#: What an engine itself says for an exit code that it does not know.
_UNKNOWN_CODE = 255


class PollingLine(Line):
    """A `Line` on which the engine does not say an end by itself: it is asked again and again."""

    clock: Callable[[], float] = staticmethod(time.monotonic)
    sleep: Callable[[float], None] = staticmethod(time.sleep)

    def begin_wait(self, container: str, condition: str) -> None:
        """See `Line.begin_wait`; only for a container that runs. Raises NotFound, ValueError for another condition."""
        if condition != "not-running":
            raise ValueError(f"{condition} cannot be seen by asking")
        state = self._state(container)
        if state is None:
            raise NotFound(404, f"no such container: {container}")
        self._container = container
        self._started = state["StartedAt"]
        self._pause_s = _FIRST_PAUSE_S

    def ended(self, timeout_s: float) -> int | None:
        """See `Line.ended`. 255 for one that is gone, or runs for another time: how its run ended was not seen."""
        deadline = self.clock() + timeout_s
        while True:
            state = self._state(self._container)
            if state is None or state["StartedAt"] != self._started:
                return _UNKNOWN_CODE
            if not runs(state):
                return int(state["ExitCode"])
            left = deadline - self.clock()
            if left <= 0:
                return None
            self.sleep(min(self._pause_s, left))
            self._pause_s = min(self._pause_s * 1.2, _LAST_PAUSE_S)

    def _state(self, container: str) -> Mapping[str, Any] | None:
        found = self.get(f"/containers/{container}/json")
        return None if found is None else found["State"]


def runs(state: Mapping[str, Any]) -> bool:
    """Whether a container runs, of its `State`. Podman says of one that is just being stopped that it does not run."""
    return bool(state["Running"]) or state["Status"] == "stopping"
