"""The steps of a job as functions, for deployments where each one runs in a process of its own.

Cloud deployments fetch a job in one short-lived function, stage it in another, run it in a batch service and upload
from a third. Nothing is kept between calls but what the caller carries along: a `HandedOut` (JSON) and a directory. The
runner uses the same code (staging, the lease); here it only gets other surroundings: no journal, no heartbeat thread.

    settings = load().settings
    handed = fetch_job(settings, Offer(cpu_cores=8, memory_mib=30_000))   # a process
    report(settings, handed, Phase.STAGING_IN)                            # any process, again every 30 s or so
    stage_in(settings, handed, Path("/mnt/job"))                          # another; /mnt/job/files is the job's /files
    ...                                                                   # run it somewhere
    stage_out(settings, handed, Path("/mnt/job"))                         # another
    report(settings, handed, Outcome(Ending.FINISHED, None, ""))          # the last word, once

Whoever calls these owns the promise: one terminal report per job, nothing after it, and a report of where the job
stands at least every 300 s until then (PROTOCOL.md S4).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from jobfetcher import build, staging
from jobfetcher.core.errors import JobReason, UnreadableJob, UnwantedJob
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import Job
from jobfetcher.core.machine import Offer
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Emit, Lease, Standing, Transfer
from jobfetcher.core.run import Ending, Outcome, Stored
from jobfetcher.outbox import tell
from jobfetcher.settings import Settings
from jobfetcher.workspace import Workspace


class HandedOut(BaseModel):
    """A job that was handed out to us, as JSON between processes: `model_dump_json`, `model_validate_json`.

    `token` rebuilds the right to speak of the job; it holds no secret.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    token: str
    job: Job


def fetch_job(settings: Settings, offer: Offer, *, emit: Emit | None = None) -> HandedOut | None:
    """Ask for one job that fits `offer` (memory in MiB); None when there is none.

    The server gives it out for good the moment it answers (PROTOCOL.md S1): store the result before anything else. A
    job that nobody could run is reported as failed here, then UnreadableJob is raised; one that only this worker must
    not run is given back, and it is UnwantedJob. That a signed job is played again is not noticed from one call to the
    next. Raises SourceUnavailable or SourceRefused when the server could not be asked.
    """
    emit = emit or _silent
    with ExitStack() as opened:
        source = build.make_source(settings, emit)
        opened.callback(source.close)
        try:
            claim = source.fetch(offer, 0.0)
        except UnwantedJob as error:
            outcome = Outcome(Ending.WORKER_FAILED, error.reason, str(error))
            tell(error.lease, outcome, worker_fault_is_error=settings.on_worker_fault == "error")
            raise
        except UnreadableJob as error:
            error.lease.settle(Outcome(Ending.JOB_FAILED, JobReason.UNREADABLE_SPEC, str(error)))
            raise
        return None if claim is None else HandedOut(token=claim.lease.token, job=claim.job)


def stage_in(
    settings: Settings, handed: HandedOut, directory: Path, *, halt: Halt | None = None, emit: Emit | None = None
) -> dict[str, Stored]:
    """Bring the job's inputs into `directory/files`, and make its output folders; returns the inputs by path.

    Call it again after an interruption: parts that are there are resumed. Raises JobFault (missing or corrupt input),
    WorkerFault (storage, disk) or Stopped (`halt` was set).
    """
    with _lease(settings, handed, emit) as lease, _transfer(settings) as transfer:
        return staging.stage_in(
            handed.job,
            lease,
            Workspace(directory),
            transfer,
            halt=halt or Halt(),
            have={},
            mark=_forget,
            progress=staging.Progress(),
        )


def stage_out(
    settings: Settings, handed: HandedOut, directory: Path, *, halt: Halt | None = None, emit: Emit | None = None
) -> staging.StagedOut:
    """Send the job's outputs from `directory/files`, and everything in `directory/logs` as the worker's own logs.

    Nothing may write there any more. Sending a file twice does no harm. Raises as `stage_in` does.
    """
    with _lease(settings, handed, emit) as lease, _transfer(settings) as transfer:
        return staging.stage_out(
            handed.job,
            lease,
            Workspace(directory),
            transfer,
            halt=halt or Halt(),
            have={},
            mark=_forget,
            progress=staging.Progress(),
        )


def report(settings: Settings, handed: HandedOut, what: Phase | Outcome, *, emit: Emit | None = None) -> Standing:
    """Tell the server where the job stands (a Phase, to be repeated) or how it ended (an Outcome, once and last).

    Anything but Standing.KEEP means: end the job and never report again. A worker's fault gives the job back, or
    reports it as failed, as ON_WORKER_FAULT says; of a job that was dropped nothing is said. Raises SourceUnavailable
    or SourceRefused when it was not heard; repeating the call is safe.
    """
    with _lease(settings, handed, emit) as lease:
        if isinstance(what, Phase):
            return lease.beat(what)
        return tell(lease, what, worker_fault_is_error=settings.on_worker_fault == "error")


@contextmanager
def _lease(settings: Settings, handed: HandedOut, emit: Emit | None) -> Iterator[Lease]:
    source = build.make_source(settings, emit or _silent)
    try:
        yield source.resume(handed.token, handed.job.id)
    finally:
        source.close()


@contextmanager
def _transfer(settings: Settings) -> Iterator[Transfer]:
    transfer = build.make_transfer(settings)
    try:
        yield transfer
    finally:
        transfer.close()


def _silent(name: str, /, level: str = "info", **fields: object) -> None:
    """The default listener: the caller sees results and errors, and may pass an `emit` for more."""


def _forget(stored: Stored) -> None:
    """No journal here: what was moved is known by what lies in the directory."""
