"""What the broker remembers: images it was told of, images it brought, and which containers are its worker's.

Used by `rules`. The first two outlive the broker in a file, if it has one: which images this worker brought decides
which it may remove (FAULTS.md D7). Ids of images and containers never come to mean something else, so what was found
out once about one holds.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from jobfetcher.core.errors import ConfigError

#: So many of each are kept; of one that is forgotten the engine is asked again.
_MOST = 10_000


class Ledger:
    """Thread-safe. `path`: the file; None: nothing outlives this process. Raises ConfigError for one that is none."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._told: OrderedDict[str, str] = OrderedDict()
        self._pulled: OrderedDict[str, str] = OrderedDict()
        self._ours: OrderedDict[str, str] = OrderedDict()
        if path is None:
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                self._told.update(kept["told"])
                self._pulled.update(kept["pulled"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"BROKER_STATE: {path} cannot be used ({error}); remove it, or name another") from None

    def tell(self, image_id: str, reference: str) -> None:
        """An image that jobs may run: it was asked for by a name that is allowed."""
        self._note(self._told, image_id, reference)

    def was_told_of(self, image_id: str) -> bool:
        """Whether that image may be run."""
        return image_id in self._told

    def brought(self, image_id: str, reference: str) -> None:
        """An image that was not on this machine before our pull."""
        self._note(self._pulled, image_id, reference)

    def brought_as(self, image_id: str) -> str | None:
        """The name by which we brought an image; None: we did not."""
        return self._pulled.get(image_id)

    def forget(self, image_id: str) -> None:
        """An image that is gone."""
        with self._lock:
            self._told.pop(image_id, None)
            self._pulled.pop(image_id, None)
            self._write()

    def is_ours(self, container_id: str, name: str) -> None:
        """A container, by its whole id, is our worker's, and has that name."""
        with self._lock:
            self._ours[container_id] = name
            _bound(self._ours)

    def name_of(self, container_id: str) -> str | None:
        """The name of a container that is known to be ours."""
        return self._ours.get(container_id)

    @property
    def containers(self) -> frozenset[str]:
        """The ids of containers that are known to be ours, those that are gone as well."""
        with self._lock:
            return frozenset(self._ours)

    def _note(self, kept: OrderedDict[str, str], image_id: str, reference: str) -> None:
        with self._lock:
            if image_id in kept:
                return
            kept[image_id] = reference
            _bound(kept)
            self._write()

    def _write(self) -> None:
        """A disk that is full costs what would have been remembered, and no job."""
        if self._path is None:
            return
        new = self._path.with_name(f"{self._path.name}.new")
        with contextlib.suppress(OSError):
            new.write_text(json.dumps({"told": self._told, "pulled": self._pulled}), encoding="utf-8")
            new.replace(self._path)


def _bound(kept: OrderedDict[str, str]) -> None:
    while len(kept) > _MOST:
        kept.popitem(last=False)
