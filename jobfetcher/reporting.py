"""Progress on its way to the observers: throttled, so that a thousand small files do not become a thousand events.

And what keeps files from moving: said once for a job and a reason, however many files and tries it concerns (FAULTS.md
C21, J10).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from jobfetcher.core.halt import unheard
from jobfetcher.core.job import JobId
from jobfetcher.core.machine import Share
from jobfetcher.core.ports import Emit, PullProgress
from jobfetcher.core.text import clean, unnumbered
from jobfetcher.staging import Progress

#: Progress is told at most this often, in seconds.
_EVERY_S = 0.2

#: A job with a thousand odd files needs no thousand lines.
_MOST_NOTICES = 5


def file_progress(
    emit: Emit,
    job_id: JobId,
    step: str,
    clock: Callable[[], float],
    note: Callable[[str], None],
    waits_for: Callable[[str, str], None] = unheard,
) -> Progress:
    """A progress of files that is told as `step` (`download` or `upload`). `note` and `waits_for`: see `Troubles`."""
    due = _every(clock)

    def changed(progress: Progress) -> None:
        if due():
            emit(
                "progress",
                job=job_id,
                step=step,
                done=progress.moved,
                total=progress.bytes_total,
                files_done=progress.files,
                files_total=progress.files_total,
            )

    return Progress(changed=changed, troubles=Troubles(emit, job_id, step, clock, note, waits_for))


class Troubles:
    """Says which files of a job, or its image, have to be tried again, why, and until when; and that it is over.

    One line at WARN for each reason, which names the first file that it concerns, and one at INFO when no file waits
    any more. `note` hears the same sentence, for the job's user; `waits_for` hears the step with one while anything of
    it waits, and with an empty one when nothing does any more; `wall` is the wall clock, in seconds since 1970.
    """

    def __init__(
        self,
        emit: Emit,
        job_id: JobId,
        step: str,
        clock: Callable[[], float],
        note: Callable[[str], None],
        waits_for: Callable[[str, str], None] = unheard,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._emit, self._job_id, self._step, self._clock, self._wall = emit, job_id, step, clock, wall
        self._note, self._waits_for = note, waits_for
        self._waiting: set[str] = set()
        self._said: set[str] = set()
        self._noticed = 0
        self._since = 0.0

    def retrying(self, name: str, why: str, for_s: float | None) -> None:
        """A file is tried again, for `for_s` seconds more at most; None: for as long as the job is held."""
        if not self._waiting:
            self._since = self._clock()
            self._said.clear()
            self._waits_for(self._step, f"the {self._step} of {clean(name, 120)} has to wait: {clean(why, 300)}")
        self._waiting.add(name)
        reason = unnumbered(why.replace(name, ""))
        if reason in self._said:
            return
        self._said.add(reason)
        until = "as long as the job is held"
        if for_s is not None:
            until = f"until {_time(self._wall() + for_s)} ({_span(for_s)})"
        what = f"has to wait: {clean(why, 500)}; it is tried again {until}"
        self._warn("transfer_retrying", name, what)
        self._note(f"{self._step} of {clean(name, 120)}: {what}")

    def recovered(self, name: str) -> None:
        """A file goes on."""
        if name not in self._waiting:
            return
        self._waiting.discard(name)
        if not self._waiting:
            self._waits_for(self._step, "")
            message = f"the {self._step} goes on after {_span(self._clock() - self._since)}"
            self._emit("transfer_recovered", job=self._job_id, step=self._step, file=clean(name), message=message)

    def noticed(self, name: str, what: str) -> None:
        """Something else about a file; of many only the first few are said."""
        self._noticed += 1
        if self._noticed <= _MOST_NOTICES:
            self._warn("transfer_noticed", name, clean(what, 500))

    def _warn(self, event: str, name: str, what: str) -> None:
        message = f"{self._step} of {clean(name, 120)}: {what}"
        self._emit(event, level="warning", job=self._job_id, step=self._step, file=clean(name), message=message)


def _time(wall_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(wall_s))


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 72 * 3600 else f"{seconds / 86_400:.0f} days"


def pull_progress(emit: Emit, job_id: JobId, clock: Callable[[], float]) -> PullProgress:
    """The progress of an image's pull."""
    due = _every(clock)

    def pulled(done: int, total: int) -> None:
        if due():
            emit("progress", job=job_id, step="pull", done=done, total=total or None)

    return pulled


def _every(clock: Callable[[], float]) -> Callable[[], bool]:
    told_at = 0.0

    def due() -> bool:
        nonlocal told_at
        now = clock()
        if now - told_at < _EVERY_S:
            return False
        told_at = now
        return True

    return due


def count_files(count: int) -> str:
    """`1 file`, `2 files`."""
    return "1 file" if count == 1 else f"{count} files"


def limits_in_words(share: Share) -> str:
    """What a job may use, as the end of a sentence."""
    gpus = f", {len(share.gpus)} GPU" if share.gpus else ""
    return f"with {share.cpu_cores:g} cores, {share.memory_mib} MiB{gpus}"
