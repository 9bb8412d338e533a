"""Whose doing it is that a disk is full: told by what comes back when a job's container is gone (FAULTS.md D3).

Counting what a job holds is not enough. It may keep files open that have no name any more, only map them, or send them
through a socket to itself; and not every worker may look into the engine's directories. But all that a job holds goes
with its container, except for what lies in its own directory, and that can be counted. So a job is stopped when a disk
is full, what is free before its container goes is compared with what is free after, and what its directory has taken
since the start is added. If that is half of what the disk has lost since the job began, or more, the job did it, and it
is told so (`error`); if not, somebody else did, and the job is given back. Inodes count as bytes do.

Half, because other jobs, pulls and people write to the same disk: whoever took the most of it is in no doubt. And never
for less than a twentieth of the reserve: a disk that so little makes full was full before.

Used by watching and runner. Knows no engine and stops nothing itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from jobfetcher.core.errors import JobFault, JobReason, WorkerFault
from jobfetcher.core.job import JobId
from jobfetcher.core.run import Taken
from jobfetcher.workspace import Base, Full

#: Counting a job's directory ends after so many seconds, with what was counted: before it runs, and for the verdict.
_COUNT_FIRST_S, _COUNT_S = 5.0, 60.0

#: A disk may say some time later that room is free again: XFS and btrfs take it back in the background. It is looked at
#: so often, with so many seconds between.
_LOOKS, _LOOK_PAUSE_S = 10, 0.5

#: A job is guilty of one part in so many of what is gone, or more; and never of less than one part of the reserve.
_SHARE_OF_GONE, _SHARE_OF_RESERVE = 2, 20

_MIB, _GIB = 1024**2, 1024**3


@dataclass(slots=True)
class Account:
    """What was there of one job, and what was free, when its run was first watched; later the verdict, if it fell.

    Of a run that an earlier process began nobody knows what was free then: it is taken for all that the disk can hold.
    """

    free: dict[int, Taken]
    kept: Taken
    verdict: str = ""


class Blame:
    """The accounts of the jobs that run. Thread-safe. `sleep` in seconds."""

    def __init__(self, base: Base, sleep: Callable[[float], None]) -> None:
        self._base = base
        self._sleep = sleep
        self._accounts: dict[JobId, Account] = {}

    def open(self, job_id: JobId, *, began_before: bool = False) -> None:
        """A job is about to run: what it writes from now on counts. `began_before`: an earlier process began it."""
        free = self._base.sizes() if began_before else self._base.free()
        self._accounts[job_id] = Account(free, self._base.job(job_id).taken(_COUNT_FIRST_S))

    def is_open(self, job_id: JobId) -> bool:
        """Whether the run of that job is watched for what it takes."""
        return job_id in self._accounts

    def close(self, job_id: JobId) -> None:
        """No question about that job will come any more."""
        self._accounts.pop(job_id, None)

    def judge(
        self,
        job_id: JobId,
        full: Full,
        before: Mapping[int, Taken],
        remove: Callable[[], None],
        *,
        since: int,
        seen: Callable[[], int] = lambda: 0,
    ) -> str:
        """Why the job is to blame for that full disk, in a sentence; nothing: it is not. For once a run.

        `before`: what was free when it was told to end, and `since`: `Base.made_room` then. Where something else went
        away meanwhile, nobody can tell whose room came back: of that no more counts than what was `seen` of the job's,
        in bytes or inodes. `remove` takes its container away, and returns when it is gone. Raises what `remove` raises,
        and WorkerFault(DISK) where the disk does not answer.
        """
        most = seen()
        remove()
        account = self._accounts.pop(job_id, None)
        if account is None or full.disk is None:
            return ""
        gone = account.free.get(full.disk, Taken()) - before.get(full.disk, Taken())
        grown = self._base.job(job_id).taken(_COUNT_S) - account.kept
        kept = max(0, self._base.used_on(full.disk, grown, Taken()).of(full.scarce))
        needed = max(gone.of(full.scarce) / _SHARE_OF_GONE, full.least / _SHARE_OF_RESERVE)
        for look in range(_LOOKS):
            back = (self._base.free().get(full.disk, Taken()) - before.get(full.disk, Taken())).of(full.scarce)
            back = max(0, min(back, most) if self._base.has_made_room(since) else back)
            if 0 < back + kept >= needed:
                account.verdict = (
                    f"stopped: the job filled the disk (it used {amount(back + kept, full)}, of which "
                    f"{amount(back, full)} came back when its container was gone); {full.why}"
                )
                self._accounts[job_id] = account  # a later fault of this disk is its doing as well
                return account.verdict
            if look == 0:
                self._base.settle()
            self._sleep(_LOOK_PAUSE_S)
        return ""

    def of_a_fault(self, job_id: JobId, remove: Callable[[], None]) -> JobFault | None:
        """This machine's disk failed a job after its run had begun: the job's own fault, if it is one. For a job that
        fills a disk and ends before anybody looks must not go on to the next machine because the worker found no room
        for its log. None: it is not, or it cannot be told."""
        if (account := self._accounts.get(job_id)) is None:
            return None
        try:
            full = self._base.find_full()
            if not account.verdict and full is not None:
                self.judge(job_id, full, self._base.free(), remove, since=self._base.made_room)
        except WorkerFault:
            return None
        return JobFault(JobReason.DISK_FILLED, account.verdict) if account.verdict else None


@dataclass(frozen=True, slots=True)
class _Leaving:
    """What was stopped last, and what was free of the full disk when its container was gone."""

    job_id: JobId
    disk: int
    free: Taken


class Turns:
    """While a disk is full, one job is stopped at a time: the one that holds most of it. Only when it is gone, and the
    disk is still full, it is the turn of the next. Thread-safe.

    What the last one left in its directory may be on its way to the server for hours. So long, the next one is stopped
    only where less than half is left of what was free then.
    """

    def __init__(self, base: Base, is_stuck: Callable[[JobId], bool]) -> None:
        self._base = base
        self._is_stuck = is_stuck
        self._lock = threading.Lock()
        self._running: dict[JobId, Callable[[Full], int]] = {}
        self._turn: tuple[JobId, Full] | None = None
        self._leaving: _Leaving | None = None

    @contextmanager
    def running(self, job_id: JobId, holds: Callable[[Full], int]) -> Iterator[None]:
        """While inside, the job may be stopped for a full disk, of which it holds so much as `holds` says."""
        with self._lock:
            self._running[job_id] = holds
        try:
            yield
        finally:
            with self._lock:
                del self._running[job_id]
                if self._turn is not None and self._turn[0] == job_id:
                    _, full = self._turn
                    self._turn = None
                    self._note_leaving(job_id, full)

    def _note_leaving(self, job_id: JobId, full: Full) -> None:
        assert full.disk is not None  # noqa: S101 - for another fault nobody has a turn
        try:
            free = self._base.free().get(full.disk, Taken())
        except WorkerFault:
            free = Taken()
        self._leaving = _Leaving(job_id, full.disk, free)

    def called(self, job_id: JobId) -> Full | None:
        """The full disk for which it is this job's turn, if it is."""
        turn = self._turn
        return turn[1] if turn is not None and turn[0] == job_id else None

    def take(self, full: Full) -> None:
        """A job sees that a disk is full: whose turn it is gets decided, unless somebody decides it now."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._turn is not None and not self._is_stuck(self._turn[0]):
                return
            if self._is_still_leaving(full):
                return
            candidates = [job_id for job_id in self._running if not self._is_stuck(job_id)]
            if len(candidates) == 1:  # it need not be measured, and every second counts
                self._turn = candidates[0], full
            elif candidates:
                self._turn = max(candidates, key=lambda job_id: self._running[job_id](full)), full
        finally:
            self._lock.release()

    def _is_still_leaving(self, full: Full) -> bool:
        left = self._leaving
        if left is None or left.disk != full.disk or not self._base.job(left.job_id).path.exists():
            return False
        now, then = self._base.free().get(left.disk, Taken()).of(full.scarce), left.free.of(full.scarce)
        return then > 0 and now * 2 >= then


def amount(count: int, full: Full) -> str:
    """So many bytes or inodes, for people."""
    return f"{count:,} inodes" if full.scarce == "inodes" else size(count)


def size(count: int) -> str:
    """So many bytes, for people."""
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / _MIB:.0f} MiB"
