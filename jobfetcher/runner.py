"""One job, top to bottom.

`Runner.run` is the whole life of a job on this machine after it was claimed and its share reserved; each step is a line
of it, in the order of DESIGN.md's table:

    4  the heartbeat begins; the outcome begins as *worker failed*
    5  stage in: inputs, concurrently, verified, into place
    6  prepare: the image, allowed and for this machine, pulled while the inputs come; then the run specification
       (a prefetched job waits here for its share of the machine)
    7  run: intent to the journal, container made, its id to the journal, start; wait (watching.py)
    8  free: the share of the machine goes back, so that the next job starts while this one uploads
    9  stage out: outputs, logs and the provenance record, whatever the exit code
    10 decide: the only line that can say *finished*
    11 settle: heartbeat stopped and joined, outcome to the journal, then the source is told
    12 leave: container and directory removed, then the record forgotten (11 and 12: outbox.py)

Every job is carried on from where the journal says that it stands, a new one as well as one that an earlier process
left (FAULTS.md A2 to A6): there is no second path for recovery. A run that this machine interrupted is repeated once,
from a clean state, at the phase STAGING_IN; the server goes on hearing `running` meanwhile (J5, E1, A10).

Knows seams only (core.ports); which engine, source or transfer it holds is build's business.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Protocol, TypeVar

from jobfetcher import staging
from jobfetcher.collecting import collect, insist
from jobfetcher.core.errors import JobFault, JobfetcherError, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.failpoints import failpoint
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import Job, JobId
from jobfetcher.core.machine import Gpu, Share
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Container, Emit, Engine, Lease, Transfer
from jobfetcher.core.run import Ending, Exit, Image, Outcome, RunSpec
from jobfetcher.core.text import clean
from jobfetcher.ending import fault_of, memory_note, named, outcome_of, withheld_note
from jobfetcher.heartbeat import Pulse, beating
from jobfetcher.journal import Journal, Record
from jobfetcher.outbox import Outbox
from jobfetcher.overlap import both
from jobfetcher.provenance import keep, provenance
from jobfetcher.reporting import Troubles, count_files, file_progress, limits_in_words, pull_progress
from jobfetcher.resources.budget import Reservation
from jobfetcher.watching import Limits, Watcher
from jobfetcher.workspace import Base, Workspace

_LOG = "container.log"

#: How long each step took.
Seconds = dict[str, float]

_T = TypeVar("_T")


class BuildSpec(Protocol):
    """engine.run_spec.build_run_spec with the machine owner's policy already bound."""

    def __call__(self, job: Job, share: Share, *, image: Image, files_host_path: str, attempt: int) -> RunSpec: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """What the machine's owner decided about every job. Times in seconds.

    `stop_after_silence_s`: a job is stopped when its source has not answered for so long; None: never.
    `prefetch_hold_s`: a job that waits for others to end is given back after so long; None: never.
    """

    beat_interval_s: float = 30.0
    limits: Limits = field(default_factory=Limits)
    stop_after_silence_s: float | None = 86_400.0
    worker_fault_is_error: bool = False
    prefetch_hold_s: float | None = 600.0


class Runner:
    """Runs jobs, one per call; calls may run side by side in threads.

    `gone_gpus` says in a sentence what is wrong with GPUs that a job on an image of that id held; nothing: all well.
    """

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
        gone_gpus: Callable[[Sequence[Gpu], str], str] = lambda gpus, image_id: "",  # noqa: ARG005 - nothing is known
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
        self._gone_gpus = gone_gpus
        self._clock = clock
        self._sleep = sleep
        self.watcher = Watcher(base, rules.limits, emit, clock=clock, sleep=sleep)
        self.outbox = Outbox(
            base=base,
            journal=journal,
            engine=engine,
            worker_fault_is_error=rules.worker_fault_is_error,
            emit=emit,
            sleep=sleep,
        )

    @property
    def gives_back(self) -> bool:
        """Whether others may run what this machine does not."""
        return not self._rules.worker_fault_is_error

    def run(self, lease: Lease, job: Job, hold: Reservation, halt: Halt) -> Outcome | None:
        """Bring a journaled job to its end, from where it stands. Never raises for what a job, a server or this
        machine does wrong. None: the worker detaches, and the next start goes on with the job.

        `halt` ends it early. The outcome that could not be told yet stays in the journal (see outbox).
        """
        outcome = Outcome()
        try:
            with hold, self._beating(lease, halt) as pulse:
                outcome = self._carry_out(lease, job, hold, halt, pulse)
        except Exception as error:
            if isinstance(error, Stopped) and error.reason is StopReason.DETACH:
                return None
            if not isinstance(error, JobfetcherError):
                where = traceback.format_exc(limit=-3)
                self._emit("bug", level="error", job=job.id, message=repr(error), where=where)
            outcome = outcome_of(error)
        finally:
            self.watcher.blame.close(job.id)
        # The heartbeat is joined: from here on nobody but this thread speaks of the job (PROTOCOL.md S6).
        return self.outbox.settle(lease, outcome)

    def _beating(self, lease: Lease, halt: Halt) -> AbstractContextManager[Pulse]:
        return beating(
            lease,
            halt,
            phase=_said(self._record(lease.job_id)),
            interval_s=self._rules.beat_interval_s,
            silence_s=self._rules.stop_after_silence_s,
            outage=self.outbox.outage,
            emit=self._emit,
        )

    def _carry_out(self, lease: Lease, job: Job, hold: Reservation, halt: Halt, pulse: Pulse) -> Outcome:
        """Steps 5 to 10, and once more where this machine interrupted the run."""
        while True:
            try:
                return self._go_on(lease, job, hold, halt, pulse)
            except WorkerFault as fault:
                if (blamed := self._blamed(job.id, fault, halt)) is not None:
                    raise blamed from fault
                if fault.reason is not WorkerReason.INTERRUPTED:
                    raise
                self._insist(halt, lambda: self._remove_container(job.id))
                failpoint("before:again")
                if not self._journal.again(job.id):
                    raise
                failpoint("after:again")
                hold.again(job.needs)
                message = f"{fault}; running it once more, from a clean state"
                self._emit("again", level="warning", job=job.id, message=message)

    def _go_on(self, lease: Lease, job: Job, hold: Reservation, halt: Halt, pulse: Pulse) -> Outcome:
        """Steps 5 to 10, from the first one that is not done; raises JobFault, WorkerFault or Stopped."""
        workspace = self._base.job(job.id)
        seconds: Seconds = {}

        record = self._record(job.id)
        if record.phase is Phase.CLAIMED:
            self._journal.advance(job.id, Phase.STAGING_IN)  # before both, or a crash in one would find either (A9)
        if record.phase in {Phase.CLAIMED, Phase.STAGING_IN}:
            _, image = both(
                halt,
                lambda halt: self._stage_in(lease, job, record, workspace, halt, pulse, seconds),
                lambda halt: self._prepare(job, halt, pulse, seconds),
                name=f"pull-{job.id}",
            )
            # One that runs once more was no prefetched job: it is not given back for having waited.
            share = self._share(job, hold, halt, seconds, None if record.runs else self._rules.prefetch_hold_s)
            failpoint("before:running")
            self._journal.running(job.id, share, image)
            failpoint("after:running")
            record = self._record(job.id)
        if record.image is None or record.share is None:
            raise WorkerFault(
                WorkerReason.RESTARTED, "an older jobfetcher, which this one cannot go on for, started it"
            )
        spec = self._spec(job, record.share, record.image)
        if record.phase is Phase.RUNNING:
            exit = self._run(job, record, spec, record.share, hold, halt, pulse, seconds)
        else:
            assert record.exit is not None  # noqa: S101 - the journal has an exit from STAGING_OUT on
            exit = record.exit

        with self._base.making_room():
            self._collect(job.id, halt)
        fault = fault_of(exit, record.share, workspace.logs / _LOG)
        inputs = self._journal.marked(job.id, "in")
        text = provenance(job, image=record.image, spec=spec, inputs=inputs, exit=exit, seconds=seconds)
        keep(text, workspace.logs, draft=workspace.path / "provenance")
        failpoint("after:provenance")
        with self._step(job.id, "stage_out", "upload", seconds, f"uploading after exit code {named(exit.code)}"):
            left_out = self._stage_out(lease, job, workspace, halt, pulse, fault)
        failpoint("after:stage_out")
        notes = [withheld_note(spec.withheld), left_out]
        if fault is not None:
            raise JobFault(fault.reason, "; ".join(note for note in (str(fault), *notes) if note))
        said = "; ".join(note for note in (memory_note(exit, record.share), *notes) if note)
        return Outcome(Ending.FINISHED, None, said)

    def _stage_in(
        self, lease: Lease, job: Job, record: Record, workspace: Workspace, halt: Halt, pulse: Pulse, seconds: Seconds
    ) -> None:
        """Step 5. What an earlier process moved is kept; after a run or a reboot only if it is still what it was."""
        waits = partial(self._waits, job.id, pulse)
        kept = self._journal.marked(job.id, "in")
        if record.runs or record.rebooted:
            if record.image is not None:
                self._own(job.id)
            kept = workspace.restore(kept, halt)
        failpoint("before:stage_in")
        saying = f"downloading {count_files(len(job.inputs))}" if job.inputs else ""
        with self._step(job.id, "stage_in", "download", seconds, saying):
            staging.stage_in(
                job,
                lease,
                workspace,
                self._transfer,
                halt=halt,
                have=kept,
                mark=lambda stored: self._journal.mark(job.id, "in", stored),
                progress=file_progress(self._emit, job.id, "download", self._clock, waits, halt.waits_for),
                awaits=partial(self._base.awaits, job.id),
            )
        failpoint("after:stage_in")
        halt.check()

    def _prepare(self, job: Job, halt: Halt, pulse: Pulse, seconds: Seconds) -> Image:
        """Step 6, beside step 5: a pull needs the network as well, but mostly another part of it."""
        with self._step(job.id, "prepare", "pull", seconds):
            note = partial(self._waits, job.id, pulse)
            troubles = Troubles(self._emit, job.id, "pull", self._clock, note, halt.waits_for)
            progress, waits = pull_progress(self._emit, job.id, self._clock), partial(troubles.retrying, job.image)
            image = self._engine.prepare(job.image, halt, progress, waits)
            troubles.recovered(job.image)
            failpoint("after:prepare")
            self._journal.used_image(image)
        halt.check()
        return image

    def _waits(self, job_id: JobId, pulse: Pulse, words: str) -> None:
        """What a job waits for goes to its user, and a crash meanwhile is none of the job's doing (A9)."""
        pulse.note(words)
        self._journal.acquit(job_id)

    def _share(self, job: Job, hold: Reservation, halt: Halt, seconds: Seconds, at_most_s: float | None) -> Share:
        """What the job may use; a prefetched one waits for it here, while it goes on saying that it is alive."""
        saying = ""
        if not hold.take():
            saying = "all is here; waiting for a job that computes to end"
            self._journal.acquit(job.id)  # crashes from here on are others' doing (A9): this one does nothing
        with self._step(job.id, "wait", "", seconds, saying):
            return hold.wait(halt, at_most_s)

    def _spec(self, job: Job, share: Share, image: Image) -> RunSpec:
        attempt = self._journal.attempt(job.id)
        return self._build_spec(job, share, image=image, files_host_path=self._host_path(job.id), attempt=attempt)

    def _run(
        self,
        job: Job,
        record: Record,
        spec: RunSpec,
        share: Share,
        hold: Reservation,
        halt: Halt,
        pulse: Pulse,
        seconds: Seconds,
    ) -> Exit:
        """Steps 7 and 8: a genuine end of the container, in the journal. Raises WorkerFault for any other."""
        with self._step(job.id, "run", "run", seconds, f"running {clean(job.image, 120)} {limits_in_words(share)}"):
            began_before = record.container is not None
            self.watcher.blame.open(job.id, began_before=began_before)  # before it can write anything
            container = self._container(job.id, record, spec, halt)
            pulse.enter(Phase.RUNNING)
            hold.begin()
            # With its files given back, so that all of them can be counted.
            stopping, remove = partial(self._journal.stopping, job.id), partial(self._collect, job.id, halt)
            exit = self.watcher.wait(job.id, container, halt, stopping, remove, began_before=began_before)
            failpoint("after:wait")
            halt.check()  # then it was stopped, and its exit code is not its own
            if not exit.genuine:
                raise WorkerFault(WorkerReason.INTERRUPTED, "the container engine restarted while the job ran")
            if isinstance(exit.stopped_for, WorkerReason):
                raise WorkerFault(exit.stopped_for, exit.error)
            if exit.code != 0 and (gone := self._gone_gpus(share.gpus, spec.image_id)):
                raise WorkerFault(WorkerReason.GPU, f"a GPU failed while the job ran: {gone}")
            hold.release()  # before the disk is waited for: the next job may start
            self._base.job(job.id).sync()  # what the job wrote outlives a power cut from here on
            failpoint("after:sync")
            self._journal.exited(job.id, exit)
            failpoint("after:exited")
        pulse.enter(Phase.STAGING_OUT)
        return exit

    def _container(self, job_id: JobId, record: Record, spec: RunSpec, halt: Halt) -> Container:
        """The job's container: started now, or the one that an earlier process started (FAULTS.md A3, A4).

        What an earlier process may have asked the engine to start is never started again, for the job may have run and
        left half of its files, whatever an engine says that was killed meanwhile: it is found running or at a genuine
        end, or the run is repeated from a clean state.
        """
        if record.rebooted:
            raise WorkerFault(WorkerReason.INTERRUPTED, "this machine was restarted while the job ran")
        if record.stopping:  # whatever it exited with was its answer to our TERM
            raise WorkerFault(WorkerReason.INTERRUPTED, "the worker died while it was stopping the job")
        if record.container is None:
            self._base.job(job_id).make_folders(spec.folders)
            failpoint("before:start")
            with self._base.unmoved(job_id, lambda: self._remove_container(job_id)):
                container = self._engine.start(spec, partial(self._starting, job_id))  # one of that name is adopted
            failpoint("after:started")
            return container
        found = self._insist(halt, lambda: self._engine.find(job_id))
        if found is None or found.id != record.container:
            raise WorkerFault(WorkerReason.INTERRUPTED, "the job's container was gone when the worker came back")
        self._emit("adopted", job=job_id, message="its container was still there; going on with it")
        return found

    def _starting(self, job_id: JobId, container_id: str) -> None:
        failpoint("before:starting")
        self._journal.started(job_id, container_id)
        failpoint("after:starting")

    def _collect(self, job_id: JobId, halt: Halt) -> None:
        """Before outputs are read: the log saved, the container gone, so that nothing writes any more (T4), and the
        files this worker's own. Safe to repeat: the container is removed last."""
        self._remove_saved(job_id, halt)
        self._quietly(job_id, lambda: self._own(job_id))
        failpoint("after:own")

    def _remove_saved(self, job_id: JobId, halt: Halt) -> None:
        container = self._insist(halt, lambda: self._engine.find(job_id))
        if container is not None:
            collect(container, self._base.job(job_id).logs / _LOG, halt, self._sleep)

    def _blamed(self, job_id: JobId, fault: WorkerFault, halt: Halt) -> JobFault | None:
        """The job's own fault, where it is why this machine's disk failed it (FAULTS.md D3)."""
        if fault.reason is not WorkerReason.DISK or halt.reason is not None:
            return None
        return self.watcher.blame.of_a_fault(job_id, partial(self._remove_saved, job_id, halt))

    def _stage_out(
        self, lease: Lease, job: Job, workspace: Workspace, halt: Halt, pulse: Pulse, fault: JobFault | None
    ) -> str:
        """Send the outputs; returns what was left out, as a sentence. A job that failed already is not failed anew by
        an output that cannot be sent: both are told."""
        waits = partial(self._waits, job.id, pulse)
        try:
            sent = staging.stage_out(
                job,
                lease,
                workspace,
                self._transfer,
                halt=halt,
                have=self._journal.marked(job.id, "out"),
                mark=lambda stored: self._journal.mark(job.id, "out", stored),
                progress=file_progress(self._emit, job.id, "upload", self._clock, waits),
            )
        except JobFault as error:
            if fault is None:
                raise
            return str(error)
        return sent.sentence()

    def _record(self, job_id: JobId) -> Record:
        record = self._journal.record(job_id)
        if record is None:
            raise WorkerFault(WorkerReason.DISK, "the journal has no record of the job any more")
        return record

    def _remove_container(self, job_id: JobId) -> None:
        if (container := self._engine.find(job_id)) is not None:
            container.remove()

    def _own(self, job_id: JobId) -> None:
        """Without root, what a job's root wrote may neither be read nor deleted before this (FAULTS.md E13)."""
        if os.geteuid() != 0 and self._base.job(job_id).files.is_dir():
            if why := self._base.cannot_own():
                raise WorkerFault(WorkerReason.DISK, f"files of other users are not given back: {why}")
            self._engine.own(self._host_path(job_id))

    def _host_path(self, job_id: JobId) -> str:
        return str(self._host_base / "jobs" / job_id / "files")

    def _insist(self, halt: Halt, action: Callable[[], _T]) -> _T:
        return insist(action, halt, self._sleep)

    def _quietly(self, job_id: JobId, action: Callable[[], _T]) -> _T | None:
        """Do what must not change the outcome any more; what a failure leaves here is found when the job is left."""
        try:
            return action()
        except Exception as error:
            self._emit("clean_up_failed", level="warning", job=job_id, message=f"clean-up: {error}")
            return None

    @contextmanager
    def _step(self, job_id: JobId, step: str, bar: str, seconds: Seconds, message: str = "") -> Iterator[None]:
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


def _said(record: Record) -> Phase:
    """The phase to begin beating with. The server's view never goes back, also where a run is repeated."""
    return Phase.RUNNING if record.runs and record.phase is Phase.STAGING_IN else record.phase
