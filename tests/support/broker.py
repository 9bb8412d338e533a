"""A broker for tests: in this process, on a socket of its own, before the real engine or one that only counts."""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobfetcher import build_broker
from jobfetcher.broker.server import Broker
from jobfetcher.settings import Settings


@dataclass
class Told:
    """What a broker told of itself; its `emit`."""

    events: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, name: str, /, level: str = "info", **fields: object) -> None:
        self.events.append({**fields, "event": name, "level": level})

    def refusals(self) -> list[str]:
        """The sentences of what was refused."""
        return [str(event["message"]) for event in self.events if event["event"] == "refused"]

    def errors(self) -> list[str]:
        """The sentences of what went wrong in the broker itself."""
        return [str(event["message"]) for event in self.events if event["event"] == "broker_error"]


@dataclass
class RunningBroker:
    """A broker that listens at `url`."""

    url: str
    told: Told
    broker: Broker


def broker_settings(base: Path, folder: Path, **more: object) -> Settings:
    """The settings of a broker of the worker in `base`, whose socket lies in `folder`."""
    given = {"path_base": base, "broker_socket": folder / "broker.sock", "gpus": "none", "job_network": "none"}
    return Settings.model_validate({**given, **more})


@contextlib.contextmanager
def running_broker(settings: Settings, room: Path) -> Iterator[RunningBroker]:
    """A broker for the length of the block. `room`: where its mounts lie."""
    told = Told()
    with build_broker.broker(settings, told, room) as broker:
        thread = threading.Thread(target=broker.serve, name="broker serves")
        thread.start()
        try:
            yield RunningBroker(f"unix://{settings.broker_socket}", told, broker)
        finally:
            broker.close()
            thread.join()
    with contextlib.suppress(FileNotFoundError):
        for place in room.glob("*/*/*"):
            assert not os.path.ismount(place), f"{place} is still mounted"
