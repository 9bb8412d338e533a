"""One job, top to bottom.

`Runner.run` is the whole life of a job on this machine after it was claimed and its share reserved; each step is a line
of it, in the order of DESIGN.md's table:

    4  the heartbeat begins; the outcome begins as *worker failed*
    5  stage in: inputs, concurrently, verified, into place
    6  prepare: the image, allowed and for this machine; the run specification
    7  run: intent to the journal, start, container id to the journal; wait, watching cancel and the time limit
    8  free: the share of the machine goes back, so that the next job starts while this one uploads
    9  stage out: outputs, logs and the provenance record, whatever the exit code
    10 decide: the only line that can say *finished*
    11 settle: heartbeat stopped and joined, outcome to the journal, then the source is told
    12 leave: container and directory removed, then the record forgotten (11 and 12: outbox.py)

Knows seams only (core.ports); which engine, source or transfer it holds is build's business.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol, TypeVar

import tenacity

from jobfetcher import staging
from jobfetcher.core.errors import (
    JobFault,
    JobReason,
    SourceError,
    Stopped,
    StopReason,
    Verdict,
    WorkerFault,
    WorkerReason,
    verdict,
)
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import Job, JobId
from jobfetcher.core.machine import Share
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Container, Emit, Engine, Lease, Transfer
from jobfetcher.core.run import Ending, Exit, Image, Outcome, RunSpec
from jobfetcher.core.text import clean
from jobfetcher.heartbeat import Pulse, beating
from jobfetcher.journal import Journal
from jobfetcher.outbox import Outbox
from jobfetcher.provenance import provenance
from jobfetcher.resources.budget import Reservation
from jobfetcher.workspace import Base, Workspace

#: How much of what a failed job printed last goes into its one sentence.
_LAST_LINES, _LAST_CHARACTERS = 10, 700

#: One wait call to the engine; its end is noticed at once, this only bounds how long one request stays open.
_WAIT_S = 60.0

#: Progress is told at most this often, in seconds.
_PROGRESS_S = 0.2

#: Tries of what the engine must do after a run: 1, 2, 4, 8, 16, then 30 s apart, some three minutes in all.
_INSIST_TRIES = 10


_T = TypeVar("_T")


class BuildSpec(Protocol):
    """engine.run_spec.build_run_spec with the machine owner's policy already bound."""

    def __call__(self, job: Job, share: Share, *, image: Image, files_host_path: str, attempt: int) -> RunSpec: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """What the machine's owner decided about every job. Times in seconds."""

    beat_interval_s: float = 30.0
    stop_grace_s: float = 10.0
    max_runtime_s: float | None = None
    worker_fault_is_error: bool = False


class Runner:
    """Runs jobs, one per call; calls may run side by side in threads."""

    def __init__(
        self,
        *,
        base: Base,
        host_base: PurePosixPath,
        journal: Journal,
        transfer: Transfer,
        engine: Engine,
        build_spec: BuildSpec,
        rules: Rules,
        emit: Emit,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._base = base
        self._host_base = host_base
        self._journal = journal
        self._transfer = transfer
        self._engine = engine
        self._build_spec = build_spec
        self._rules = rules
        self._emit = emit
        self._clock = clock
        self._sleep = sleep
        self.outbox = Outbox(
            base=base,
            journal=journal,
            engine=engine,
            worker_fault_is_error=rules.worker_fault_is_error,
            emit=emit,
            sleep=sleep,
        )

    def run(self, lease: Lease, job: Job, hold: Reservation, halt: Halt) -> Outcome:
        """Run a claimed job to its end. Never raises for what a job, a server or this machine does wrong.

        `halt` ends it early. The outcome that could not be told yet stays in the journal (see outbox).
        """
        outcome = Outcome()
        try:
            with hold, beating(lease, halt, interval_s=self._rules.beat_interval_s, emit=self._emit) as pulse:
                outcome = self._carry_out(lease, job, hold, halt, pulse)
        except Exception as error:
            outcome = self.outcome_of(job.id, error)
        # The heartbeat is joined: from here on nobody but this thread speaks of the job (PROTOCOL.md S6).
        return self.outbox.settle(lease, outcome)

    def _carry_out(self, lease: Lease, job: Job, hold: Reservation, halt: Halt, pulse: Pulse) -> Outcome:
        """Steps 5 to 10; raises JobFault, WorkerFault or Stopped instead of returning a bad outcome."""
        workspace = self._base.job(job.id)
        seconds: dict[str, float] = {}

        self._journal.advance(job.id, Phase.STAGING_IN)
        with self._step(
            job.id, "stage_in", "download", seconds, f"downloading {_files(len(job.inputs))}" if job.inputs else ""
        ):
            inputs = staging.stage_in(
                job,
                lease,
                workspace,
                self._transfer,
                halt=halt,
                have=self._journal.marked(job.id, "in"),
                mark=lambda stored: self._journal.mark(job.id, "in", stored),
                progress=self._progress(job.id, "download"),
            )
        halt.check()

        with self._step(job.id, "prepare", "pull", seconds):
            image = self._engine.prepare(job.image, halt, self._pull_progress(job.id))
            files_host_path = str(self._host_base / "jobs" / job.id / "files")
            attempt = self._journal.attempt(job.id)
            spec = self._build_spec(job, hold.share, image=image, files_host_path=files_host_path, attempt=attempt)
        halt.check()

        self._journal.advance(job.id, Phase.RUNNING)
        with self._step(job.id, "run", "", seconds, f"running {clean(job.image, 120)} {_limits(hold.share)}"):
            container = self._engine.start(spec)
            removed = False
            try:
                self._journal.started(job.id, container.id)
                pulse.enter(Phase.RUNNING)
                exit, timed_out = self._wait(container, halt)
                self._journal.exited(job.id, exit)
                hold.release()
                halt.check()
                pulse.enter(Phase.STAGING_OUT)
                fault = self._insist(halt, lambda: self._fault_of(exit, timed_out, container, hold.share))
                self._insist(halt, lambda: container.save_logs(workspace.logs / "container.log"))
                # Nothing may still write when its files are read: gone before the outputs are walked (FAULTS.md T4).
                self._insist(halt, container.remove)
                removed = True
            finally:
                if not removed:
                    self._quietly(job.id, container.remove)
                if os.geteuid() != 0:  # also when the job is cancelled: what its root wrote must be deleted
                    self._quietly(job.id, lambda: self._engine.own(image.id, files_host_path))

        if isinstance(fault, WorkerFault):
            raise fault  # nobody vouches for what such a run left

        record = provenance(job, image=image, spec=spec, inputs=inputs, exit=exit, seconds=seconds)
        (workspace.logs / "provenance.json").write_text(record, encoding="utf-8")
        with self._step(job.id, "stage_out", "upload", seconds, f"uploading after exit code {exit.code}"):
            left_out = self._stage_out(lease, job, workspace, halt, fault)
        if fault is not None:
            raise JobFault(fault.reason, f"{fault}; {left_out}" if left_out else str(fault))
        return Outcome(Ending.FINISHED, None, left_out)

    def _stage_out(self, lease: Lease, job: Job, workspace: Workspace, halt: Halt, fault: JobFault | None) -> str:
        """Send the outputs; returns what was left out, as a sentence. A job that failed already is not failed anew by
        an output that cannot be sent: both are told."""
        try:
            sent = staging.stage_out(
                job,
                lease,
                workspace,
                self._transfer,
                halt=halt,
                have=self._journal.marked(job.id, "out"),
                mark=lambda stored: self._journal.mark(job.id, "out", stored),
                progress=self._progress(job.id, "upload"),
            )
        except JobFault as error:
            if fault is None:
                raise
            return str(error)
        return sent.sentence()

    def _insist(self, halt: Halt, action: Callable[[], _T]) -> _T:
        """Do what a finished run must not fail for: an engine that restarts is waited for, some three minutes."""

        def sleep(seconds: float) -> None:
            halt.check()
            self._sleep(seconds)

        patiently = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(WorkerFault),
            stop=tenacity.stop_after_attempt(_INSIST_TRIES),
            wait=tenacity.wait_exponential(max=30.0),
            sleep=sleep,
            reraise=True,
        )
        return patiently(action)

    def _wait(self, container: Container, halt: Halt) -> tuple[Exit, bool]:
        """How the container ended, and whether it was for its time limit. A halt stops it, which ends the wait."""
        limit = self._rules.max_runtime_s
        ends_at = None if limit is None else self._clock() + limit
        timed_out = False
        with self._stopping_on(halt, container):
            while True:
                left = _WAIT_S if ends_at is None or timed_out else max(0.0, min(_WAIT_S, ends_at - self._clock()))
                exit = container.wait(left)
                if exit is not None:
                    return exit, timed_out
                if ends_at is not None and not timed_out and self._clock() >= ends_at:
                    timed_out = True
                    container.stop(self._rules.stop_grace_s)

    @contextmanager
    def _stopping_on(self, halt: Halt, container: Container) -> Iterator[None]:
        """While inside, a halt stops the container. In a thread of its own, because stopping takes up to the grace
        time, and whoever sets the halt (a heartbeat, the way out with many jobs) must not wait for it. Tried again
        until the wait is over: a cancelled job must not run on because the engine did not answer once (B7)."""

        over = threading.Event()

        def stop() -> None:
            while not over.is_set():
                try:
                    container.stop(self._rules.stop_grace_s)
                    return
                except WorkerFault as error:
                    self._emit("stop_failed", level="error", message=f"a container could not be stopped: {error}")
                over.wait(self._rules.stop_grace_s)

        stopper = threading.Thread(target=stop, name="stop-container")
        try:
            with halt.waking(stopper.start):
                yield
        finally:
            over.set()
            if stopper.ident is not None:
                stopper.join()

    def _fault_of(
        self, exit: Exit, timed_out: bool, container: Container, share: Share
    ) -> JobFault | WorkerFault | None:
        """What is wrong with this end, or None for a genuine exit 0 (FAULTS.md E1, E4, J6)."""
        if not exit.genuine:
            return WorkerFault(WorkerReason.INTERRUPTED, "the container engine restarted while the job ran")
        if timed_out:
            return JobFault(
                JobReason.TIME_LIMIT, f"stopped after the time limit of this worker, {self._rules.max_runtime_s:g} s"
            )
        if exit.code == 0:
            return None
        if exit.oom_killed:
            return JobFault(
                JobReason.OUT_OF_MEMORY, f"out of memory (limit {share.memory_mib} MiB), exit code {exit.code}"
            )
        if exit.error:
            return JobFault(JobReason.CANNOT_START, exit.error)
        said = clean(" | ".join(container.last_lines(_LAST_LINES).split("\n")).strip(" |"), 20_000)[-_LAST_CHARACTERS:]
        if exit.code == 137:
            return JobFault(JobReason.KILLED_OUTSIDE, f"killed (exit code 137), not by this worker{_quote(said)}")
        return JobFault(JobReason.EXIT_CODE, f"exit code {exit.code}{_quote(said)}")

    def outcome_of(self, job_id: JobId, error: Exception) -> Outcome:
        """The outcome that an error stands for; what is not of our tree is a bug of ours and the job is innocent."""
        match verdict(error):
            case Verdict.SILENCE:
                assert isinstance(error, Stopped)  # noqa: S101 - only Stopped means silence
                return Outcome(Ending.DROPPED, None, f"taken back by the server ({error.reason.value})")
            case Verdict.FAIL_JOB:
                reason = error.reason if isinstance(error, JobFault) else JobReason.UNREADABLE_SPEC
                return Outcome(Ending.JOB_FAILED, reason, str(error))
        if isinstance(error, WorkerFault):
            return Outcome(Ending.WORKER_FAILED, error.reason, str(error))
        if isinstance(error, Stopped):
            if error.reason is StopReason.HEARTBEAT:
                return Outcome(Ending.WORKER_FAILED, WorkerReason.HEARTBEAT, "the worker's keep-alives broke down")
            return Outcome(Ending.WORKER_FAILED, WorkerReason.SHUTDOWN, "the worker was shut down")
        if isinstance(error, SourceError):
            return Outcome(Ending.WORKER_FAILED, WorkerReason.SOURCE, str(error))
        self._emit("bug", level="error", job=job_id, message=f"{error!r}", where=traceback.format_exc(limit=-3))
        return Outcome(Ending.WORKER_FAILED, WorkerReason.INTERNAL, f"the worker failed ({type(error).__name__})")

    def _quietly(self, job_id: JobId, action: Callable[[], _T]) -> _T | None:
        """Do what must not change the outcome any more; what a failure leaves here is found at the next start."""
        try:
            return action()
        except Exception as error:
            self._emit("clean_up_failed", level="warning", job=job_id, message=f"clean-up: {error}")
            return None

    @contextmanager
    def _step(self, job_id: JobId, step: str, bar: str, seconds: dict[str, float], message: str = "") -> Iterator[None]:
        """Time one step into `seconds`, announce it with `message`, and end its progress bar if it has one."""
        if message:
            self._emit(step, job=job_id, message=message)
        began = self._clock()
        try:
            yield
        finally:
            seconds[step] = self._clock() - began
            if bar:
                self._emit("progress_end", job=job_id, step=bar)

    def _progress(self, job_id: JobId, step: str) -> staging.Progress:
        """A progress that is told at most every _PROGRESS_S, and at the last file."""
        told_at = [0.0]

        def changed(progress: staging.Progress) -> None:
            now = self._clock()
            if now - told_at[0] < _PROGRESS_S:
                return
            told_at[0] = now
            self._emit(
                "progress",
                job=job_id,
                step=step,
                done=progress.moved,
                total=progress.bytes_total,
                files_done=progress.files,
                files_total=progress.files_total,
            )

        return staging.Progress(changed=changed)

    def _pull_progress(self, job_id: JobId) -> Callable[[int, int], None]:
        told_at = [0.0]

        def pulled(done: int, total: int) -> None:
            if self._clock() - told_at[0] >= _PROGRESS_S:
                told_at[0] = self._clock()
                self._emit("progress", job=job_id, step="pull", done=done, total=total or None)

        return pulled


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _limits(share: Share) -> str:
    gpus = f", {len(share.gpus)} GPU" if share.gpus else ""
    return f"with {share.cpu_cores:g} cores, {share.memory_mib} MiB{gpus}"


def _quote(said: str) -> str:
    return f"; it last printed: {said}" if said else ""
