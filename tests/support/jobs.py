"""Small values that many tests start from: a job, an emit that records, a clock that a test sets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jobfetcher.core.job import Job


def make_job(id: str = "7", **changes: Any) -> Job:
    """A job that needs nothing; `inputs` is a mapping path -> ref, `outputs` a mapping kind -> path."""
    inputs: Mapping[str, str] = changes.pop("inputs", {})
    outputs: Mapping[str, str] = changes.pop("outputs", {})
    return Job.model_validate(
        {
            "id": id,
            "image": "busybox:latest",
            "command": ["true"],
            "inputs": [{"path": path, "ref": ref} for path, ref in inputs.items()],
            "outputs": [{"kind": kind, "path": path} for kind, path in outputs.items()],
        }
        | changes
    )


@dataclass
class Emitted:
    """A `core.ports.Emit` that keeps what it is told. Thread-safe."""

    events: list[tuple[str, str, dict[str, object]]] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, name: str, /, level: str = "info", **fields: object) -> None:
        with self._changed:
            self.events.append((name, level, fields))
            self._changed.notify_all()

    def named(self, name: str) -> list[dict[str, object]]:
        """The fields of all events of that name, in order."""
        return [fields for found, _, fields in list(self.events) if found == name]

    def levels(self, name: str) -> list[str]:
        """The levels of all events of that name, in order."""
        return [level for found, level, _ in list(self.events) if found == name]

    def wait_for(self, happened: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        """Wait until `happened` is true after an event; False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(happened, timeout_s)


@dataclass
class FakeClock:
    """A clock in this process, in seconds, that stands still until a test sets `now`.

    For what is given its clock. The clocks of another process are turned by tests/support/clock.py.
    """

    now: float = 10_000.0

    def __call__(self) -> float:
        return self.now
