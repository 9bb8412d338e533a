"""Every error that crosses a seam, in one tree, and one pure answer to "what now?".

    JobfetcherError
     +- ConfigError          a setting or the machine's set-up is wrong           -> stop the worker, exit 2
     +- SourceError          the job source could not be spoken to
     |   +- SourceUnavailable    no answer, or not one we can use                 -> try again later
     |   |   +- TooSoon              nothing was asked yet                        -> try again when it is time
     |   +- SourceRefused        our credentials were refused (401, 403)          -> try again later, say so
     +- UnreadableJob        a job was handed out that nobody could run           -> report it as failed
     |   +- UnwantedJob          others may run it, and this worker must not      -> give the job back
     +- JobFault             the job's own fault                                  -> report `error`
     +- WorkerFault          this machine's fault                                 -> give the job back
     +- Stopped              the job must end: cancelled, lost, shut down         -> depends on the reason

Foreign exceptions stop at the adapters: an adapter raises one of these, `from` the foreign one. The message is the
sentence a person reads: what happened and what to do. It is cleaned where it leaves the program (core.text).
"""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobfetcher.core.ports import Lease


class JobReason(StrEnum):
    """Why a job failed by its own fault. Stable words: people match on them."""

    UNREADABLE_SPEC = "unreadable_spec"
    INPUT_MISSING = "input_missing"
    INPUT_CORRUPT = "input_corrupt"
    UNSAFE_REQUEST = "unsafe_request"
    IMAGE_MISSING = "image_missing"
    IMAGE_DENIED = "image_denied"
    IMAGE_ARCHITECTURE = "image_architecture"
    CANNOT_START = "cannot_start"
    EXIT_CODE = "exit_code"
    OUT_OF_MEMORY = "out_of_memory"
    TIME_LIMIT = "time_limit"
    KILLED_OUTSIDE = "killed_outside"
    REMOVED_OUTSIDE = "removed_outside"
    BAD_OUTPUT = "bad_output"
    OUTPUT_TOO_LARGE = "output_too_large"
    DISK_FILLED = "disk_filled"
    CRASHES_WORKER = "crashes_worker"


class WorkerReason(StrEnum):
    """Why this machine could not do its part. Stable words: people match on them."""

    INTERNAL = "internal"
    DOES_NOT_FIT = "does_not_fit"
    POLICY = "policy"
    DISK = "disk"
    ENGINE = "engine"
    INTERRUPTED = "interrupted"
    REGISTRY = "registry"
    STORAGE = "storage"
    SOURCE = "source"
    GPU = "gpu"
    HEARTBEAT = "heartbeat"
    RESTARTED = "restarted"
    SHUTDOWN = "shutdown"
    WAITED = "waited"


#: Given back without anything being wrong: no fault to count, to warn of or to slow down for.
EXPECTED = frozenset({WorkerReason.SHUTDOWN, WorkerReason.WAITED})


class StopReason(StrEnum):
    """Why a job in hand must be let go of before its own end. DETACH: by this process only; the next one goes on.

    WAITED: it was prefetched, and nothing got free for it in time. FAILED: something else that is done for the same job
    at the same time failed, and that failure is what counts.
    """

    CANCELLED = "cancelled"
    LOST = "lost"
    SHUTDOWN = "shutdown"
    HEARTBEAT = "heartbeat"
    SILENCE = "silence"
    DETACH = "detach"
    WAITED = "waited"
    FAILED = "failed"


class JobfetcherError(Exception):
    """Root of the tree; never raised itself."""


class ConfigError(JobfetcherError):
    """A setting or the machine's set-up is wrong; nothing can run until a person changes it."""


class SourceError(JobfetcherError):
    """The job source could not be spoken to."""


class SourceUnavailable(SourceError):
    """No usable answer. `retry_after_s`: what the server asked for, in seconds, if it did.

    `sent` is False when the request certainly never reached the server, so that repeating it is safe. `only_this`: the
    source itself failed at this one question and takes what else it is told, so that it is no outage.
    """

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, sent: bool = True, only_this: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.sent = sent
        self.only_this = only_this


class TooSoon(SourceUnavailable):
    """Nothing was said, for something said before may still be on its way. It tells nothing about the source.

    `retry_after_s`: when it can only have arrived.
    """


class SourceRefused(SourceError):
    """Our credentials were refused. Never a reason to stop a running job (PROTOCOL.md S16)."""


class UnreadableJob(JobfetcherError):
    """A job was handed out whose specification cannot be run by anyone; `lease` is the right to say so."""

    def __init__(self, lease: Lease, why: str) -> None:
        super().__init__(f"worker cannot read the job: {why}")
        self.lease = lease


class UnwantedJob(UnreadableJob):
    """A job was handed out that others may run and this worker must not, for `reason`: it is given back."""

    def __init__(self, lease: Lease, reason: WorkerReason, why: str) -> None:
        JobfetcherError.__init__(self, f"this worker must not run the job: {why}")
        self.lease = lease
        self.reason = reason


class JobFault(JobfetcherError):
    """The job's own fault: it is reported as `error` and never tried again."""

    def __init__(self, reason: JobReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class WorkerFault(JobfetcherError):
    """This machine's fault: the job is innocent and is given back."""

    def __init__(self, reason: WorkerReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Stopped(JobfetcherError):
    """The job must end now, for `reason`; raised out of whatever was going on."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(f"stopped: {reason.value}")
        self.reason = reason


class Verdict(Enum):
    """What an error means for the job and the worker."""

    RETRY = "retry"
    FAIL_JOB = "fail the job"
    GIVE_BACK = "give it back"
    SILENCE = "say nothing more of this job"
    STOP_WORKER = "stop the worker"


def verdict(error: BaseException) -> Verdict:
    """The one place that maps an error to what is done about it. Pure.

    An exception that is not of our tree is a bug of ours, so the job is innocent: GIVE_BACK.
    """
    match error:
        case SourceUnavailable() | SourceRefused():
            return Verdict.RETRY
        case UnwantedJob():
            return Verdict.GIVE_BACK
        case JobFault() | UnreadableJob():
            return Verdict.FAIL_JOB
        case Stopped(reason=StopReason.CANCELLED | StopReason.LOST):
            return Verdict.SILENCE
        case ConfigError():
            return Verdict.STOP_WORKER
        case _:
            return Verdict.GIVE_BACK
