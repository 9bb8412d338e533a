"""Which signed jobs were taken here, so that none is played again (FAULTS.md T30); used by `signing`.

A file of lines, each on disk before the job is taken: `{"nonce": ..., "job": ..., "expires": ..., "ended": ...}`. A
line of the same nonce replaces the earlier ones. What has expired is left out when the file is read at a start. A line
that a power cut tore is no line.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.job import JobId
from jobfetcher.pinned import shown

#: The file's name in PATH_BASE.
NAME = "nonces.jsonl"


@dataclass(frozen=True, slots=True)
class _Noted:
    nonce: str
    job: str
    expires: float
    ended: bool = False


class Nonces:
    """Thread-safe. `base` says where PATH_BASE is when that is needed, for it is made after what reads settings; None:
    nothing is kept beyond this process. `now` is the time of day, in seconds."""

    def __init__(self, base: Callable[[], Path] | None = None, now: Callable[[], float] = time.time) -> None:
        self._base = base
        self._now = now
        self._lock = threading.Lock()
        self._noted: dict[str, _Noted] | None = None

    def use(self, nonce: str, job_id: JobId, expires: float) -> None:
        """Note that a job is taken whose signature has that nonce. Raises ValueError where it is played again: another
        job has it, or this one has ended. And WorkerFault(DISK) where nothing can be noted, so that it must not run.
        """
        with self._lock:
            noted = self._read()
            before = noted.get(nonce)
            if before is None:
                self._note(_Noted(nonce, job_id, expires))
                return
            if before.job != job_id:
                raise ValueError(f"its signature was used before, for job {before.job}: it is played again")
            if before.ended:
                raise ValueError("its signature was used before, and that job has ended: it is played again")

    def ended(self, job_id: JobId) -> None:
        """That job must not come again under the same signature. A note that cannot be written is kept in memory."""
        with self._lock, contextlib.suppress(WorkerFault):
            for noted in list(self._read().values()):
                if noted.job == job_id and not noted.ended:
                    self._note(replace(noted, ended=True))

    @property
    def _path(self) -> Path | None:
        return None if self._base is None else self._base() / NAME

    def _read(self) -> dict[str, _Noted]:
        if self._noted is not None:
            return self._noted
        path = self._path
        found: dict[str, _Noted] = {}
        lines: list[bytes] = []
        try:
            if path is not None and path.exists():
                lines = [line for line in path.read_bytes().splitlines() if line]
            for line in lines:
                with contextlib.suppress(ValueError, TypeError):
                    one = _Noted(**json.loads(line))
                    if float(one.expires) >= self._now():
                        found[one.nonce] = one
                    else:
                        found.pop(one.nonce, None)
            if path is not None and len(found) != len(lines):
                self._rewrite(path, found)
        except OSError as error:
            raise self._unusable(error) from error
        self._noted = found
        return found

    def _rewrite(self, path: Path, found: dict[str, _Noted]) -> None:
        draft = path.with_name(f"{path.name}.new")
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(_line(one) for one in found.values())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def _note(self, noted: _Noted) -> None:
        known = self._read()
        if (path := self._path) is not None:
            try:
                is_new = not path.exists()
                with path.open("a", encoding="utf-8") as file:
                    file.write(_line(noted))
                    file.flush()
                    os.fsync(file.fileno())
                if is_new:
                    _sync_folder(path.parent)
            except OSError as error:
                if noted.ended:
                    known[noted.nonce] = noted
                raise self._unusable(error) from error
        known[noted.nonce] = noted

    def _unusable(self, error: OSError) -> WorkerFault:
        return WorkerFault(
            WorkerReason.DISK, f"{shown(self._path)} cannot be used, so no signed job is run: {error.strerror or error}"
        )


def _line(noted: _Noted) -> str:
    """A line of its own, also behind one that was torn on a full disk."""
    return f"\n{json.dumps(asdict(noted))}\n"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
