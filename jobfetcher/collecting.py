"""A container's last minute: its log saved, then it is removed, whatever the engine and the disk are like just then.

Used by the runner, before outputs are read and before it is asked who filled a disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tenacity

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.failpoints import failpoint
from jobfetcher.core.halt import Halt
from jobfetcher.core.ports import Container

#: Tries of what the engine must do around a run: 1, 2, 4, 8, 16, then 30 s apart, some three minutes in all.
_INSIST_TRIES = 10

#: Of a log for which there is no room before the container is gone, so many lines are kept (at most 64 KiB).
_LAST_LINES = 1000

_T = TypeVar("_T")


def insist(action: Callable[[], _T], halt: Halt, sleep: Callable[[float], None]) -> _T:
    """Do what a run must not fail for: an engine that restarts is waited for, some three minutes. A disk is not: no
    engine makes room by itself."""

    def pause(seconds: float) -> None:
        halt.check()
        sleep(seconds)

    patiently = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        stop=tenacity.stop_after_attempt(_INSIST_TRIES),
        wait=tenacity.wait_exponential(max=30.0),
        sleep=pause,
        reraise=True,
    )
    return patiently(action)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, WorkerFault) and error.reason is not WorkerReason.DISK


def collect(container: Container, log: Path, halt: Halt, sleep: Callable[[float], None]) -> None:
    """Save what it printed to `log`, and remove it. Safe to repeat: it is removed last.

    Where there is no room for the log the end of it is, once the container is gone with all that it held (FAULTS.md
    D3). Raises WorkerFault(DISK) where there still is none.
    """
    failpoint("before:save_logs")
    last: str | None = None
    try:
        insist(lambda: container.save_logs(log), halt, sleep)
    except WorkerFault as fault:
        if fault.reason is not WorkerReason.DISK:
            raise
        with contextlib.suppress(WorkerFault):
            last = container.last_lines(_LAST_LINES)
    failpoint("after:save_logs")
    insist(container.remove, halt, sleep)
    failpoint("after:remove")
    if last is None:
        return
    try:
        log.write_text(f"[the disk was full: only the last of what the job printed is kept]\n{last}\n", "utf-8")
    except OSError as error:
        raise WorkerFault(WorkerReason.DISK, f"the job's log cannot be written: {error}") from error
