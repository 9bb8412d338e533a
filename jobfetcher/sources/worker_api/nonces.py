"""Which signed jobs were taken here, so that none is played again (FAULTS.md T30); used by `signing`.

A file of lines, each on disk before the job is taken: `{"nonce": ..., "job": ..., "expires": ..., "ended": ...}`. A
line of the same nonce replaces the earlier ones. A line that a power cut tore is no line. What can serve nobody any
more is left out when the file is written anew: at a start, and after every _ANEW_AFTER lines.

When is that? The clock of this machine alone must not say so, for it may be ahead for a while (a dead battery, a server
of time that lies): what was forgotten then could be played again once the clock is right. So two things must say it, by
_KEPT_S each: the clock, and another signature that was taken here and ends so much later. A signature holds for 90 days
at most, hence its signer made it after the earlier one had ended, whatever this machine's clock said. Where no further
job comes, nothing is forgotten, and nothing grows: with 1,000 jobs a day, each signed for a day, some 92,000 are known
at a time, and so many lines of 160 bytes are 15 MB.
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

#: A nonce is known for so long past its expiry, in seconds: the 90 days that any signature may hold (signing.py), and a
#: day more for the minutes that are forgiven to clocks.
_KEPT_S = 91 * 86_400.0

#: After so many lines the file is written anew while the worker runs. Each job has two lines, so that they halve.
_ANEW_AFTER = 1000


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
        #: Lines that were appended since the file was written anew, and whether it lacks one that is in memory.
        self._appended, self._lacks_one = 0, False

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
        """That job must not come again under the same signature. A note that cannot be written is kept in memory, and
        is written with the next one that can be."""
        with self._lock, contextlib.suppress(WorkerFault):
            for noted in list(self._read().values()):
                if noted.job == job_id and not noted.ended:
                    with contextlib.suppress(WorkerFault):
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
                    if isinstance(one.expires, int | float):
                        found[one.nonce] = one
            self._forget_old(found)
            if path is not None and len(found) != len(lines):
                self._rewrite(path, found)
        except OSError as error:
            raise self._unusable(error) from error
        self._noted = found
        return found

    def _forget_old(self, found: dict[str, _Noted]) -> None:
        """Leave out what can serve nobody any more, as the module says."""
        last = max((one.expires for one in found.values()), default=0.0)
        useless_before = min(self._now(), last) - _KEPT_S
        for nonce in [nonce for nonce, one in found.items() if one.expires < useless_before]:
            del found[nonce]

    def _rewrite(self, path: Path, found: dict[str, _Noted]) -> None:
        """Whole on disk under another name first: a crash leaves the old file or the new one."""
        draft = path.with_name(f"{path.name}.new")
        with draft.open("w", encoding="utf-8") as file:
            file.writelines(_line(one) for one in found.values())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _sync_folder(path.parent)
        self._appended, self._lacks_one = 0, False

    def _tidy(self, path: Path, known: dict[str, _Noted]) -> None:
        if self._lacks_one:
            self._rewrite(path, known)
        elif self._appended >= _ANEW_AFTER:
            self._appended = 0
            self._forget_old(known)
            with contextlib.suppress(OSError):  # no room for a second copy: one more line may still fit
                self._rewrite(path, known)

    def _note(self, noted: _Noted) -> None:
        known = self._read()
        if (path := self._path) is not None:
            try:
                self._tidy(path, known)
                is_new = not path.exists()
                with path.open("a", encoding="utf-8") as file:
                    file.write(_line(noted))
                    file.flush()
                    os.fsync(file.fileno())
                if is_new:
                    _sync_folder(path.parent)
                self._appended += 1
            except OSError as error:
                if noted.ended:
                    known[noted.nonce] = noted
                    self._lacks_one = True
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
