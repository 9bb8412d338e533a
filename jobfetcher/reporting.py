"""Progress on its way to the observers: throttled, so that a thousand small files do not become a thousand events."""

from __future__ import annotations

from collections.abc import Callable

from jobfetcher.core.job import JobId
from jobfetcher.core.ports import Emit, PullProgress
from jobfetcher.staging import Progress

#: Progress is told at most this often, in seconds.
_EVERY_S = 0.2


def file_progress(emit: Emit, job_id: JobId, step: str, clock: Callable[[], float]) -> Progress:
    """A progress of files that is told as `step` (`download` or `upload`)."""
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

    return Progress(changed=changed)


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
