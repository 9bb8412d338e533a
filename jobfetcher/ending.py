"""How a job ended: from an exit or an error to the one Outcome that is told. Pure, but for the log's last lines.

Used by the runner and the worker. The line between the two faults is drawn here and in `core.errors.verdict`: the job's
own fault is final (`error`), this machine's gives the job back (FAULTS.md J5).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from jobfetcher.core.errors import (
    JobFault,
    JobReason,
    SourceError,
    Stopped,
    StopReason,
    UnwantedJob,
    Verdict,
    WorkerFault,
    WorkerReason,
    verdict,
)
from jobfetcher.core.machine import Share
from jobfetcher.core.run import Ending, Exit, Outcome
from jobfetcher.core.text import clean

#: How much of what a failed job printed last goes into its one sentence.
_LAST_LINES, _LAST_CHARACTERS, _LAST_BYTES = 10, 700, 64 * 1024

#: What a stop by this worker means for the job. A detach ends no job and FAILED has a cause: they never come here.
_STOPPED: dict[StopReason, Outcome] = {
    StopReason.SHUTDOWN: Outcome(Ending.WORKER_FAILED, WorkerReason.SHUTDOWN, "the worker was shut down"),
    StopReason.WAITED: Outcome(
        Ending.WORKER_FAILED, WorkerReason.WAITED, "another job computed here for longer than PREFETCH_HOLD"
    ),
    StopReason.HEARTBEAT: Outcome(Ending.WORKER_FAILED, WorkerReason.HEARTBEAT, "the worker's keep-alives broke down"),
    StopReason.SILENCE: Outcome(
        Ending.WORKER_FAILED, WorkerReason.SOURCE, "the server did not answer for as long as STOP_AFTER_SILENCE says"
    ),
}


def outcome_of(error: Exception) -> Outcome:
    """The outcome that an error stands for; what is not of our tree is a bug of ours and the job is innocent."""
    if verdict(error) is Verdict.FAIL_JOB:
        reason = error.reason if isinstance(error, JobFault) else JobReason.UNREADABLE_SPEC
        return Outcome(Ending.JOB_FAILED, reason, str(error))
    match error:
        case Stopped(reason=StopReason.CANCELLED | StopReason.LOST):
            return Outcome(Ending.DROPPED, None, f"taken back by the server ({error.reason.value})")
        case Stopped():
            return _STOPPED[error.reason]
        case WorkerFault() | UnwantedJob():
            return Outcome(Ending.WORKER_FAILED, error.reason, str(error))
        case SourceError():
            return Outcome(Ending.WORKER_FAILED, WorkerReason.SOURCE, str(error))
    return Outcome(Ending.WORKER_FAILED, WorkerReason.INTERNAL, f"the worker failed ({type(error).__name__})")


def fault_of(exit: Exit, share: Share, log: Path) -> JobFault | None:
    """What is wrong with a genuine end, or None for exit 0 (FAULTS.md E4, J6). `log`: what the job printed."""
    if isinstance(exit.stopped_for, JobReason):
        return JobFault(exit.stopped_for, exit.error)
    if exit.code == 0:
        return None
    if exit.oom_killed:
        return JobFault(JobReason.OUT_OF_MEMORY, f"out of memory (limit {share.memory_mib} MiB), exit code {exit.code}")
    if exit.error:
        return JobFault(JobReason.CANNOT_START, exit.error)
    said = _last_words(log)
    if exit.code == 137:
        return JobFault(JobReason.KILLED_OUTSIDE, f"killed (exit code 137), not by this worker{said}")
    return JobFault(JobReason.EXIT_CODE, f"exit code {named(exit.code)}{said}")


def named(code: int) -> str:
    """An exit code, and the signal that it stands for: shells and docker-init add 128 to that."""
    with contextlib.suppress(ValueError):
        return f"{code} ({signal.Signals(code - 128).name})"
    return str(code)


def memory_note(exit: Exit, share: Share) -> str:
    """The job went on after one of its processes was killed (FAULTS.md E4): its user should know."""
    return f"a process of the job was killed for memory (limit {share.memory_mib} MiB)" if exit.oom_killed else ""


def withheld_note(names: Sequence[str]) -> str:
    """What a job asked for and did not get, for its user: it may be why the job did not do what was wanted."""
    return f"not given to the job: {', '.join(clean(name, 80) for name in names)}" if names else ""


def _last_words(log: Path) -> str:
    """What the job printed last, as the end of a sentence."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
    except OSError:
        return ""
    said = clean(" | ".join(lines).strip(" |"), 20_000)[-_LAST_CHARACTERS:]
    return f"; it last printed: {said}" if said else ""
