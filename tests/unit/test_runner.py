"""runner: every end of a job, with fakes at the seams: what is said, what is stored, and that nothing stays."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from jobfetcher import tree
from jobfetcher.core.errors import (
    ConfigError,
    JobFault,
    JobfetcherError,
    JobReason,
    SourceRefused,
    SourceUnavailable,
    StopReason,
    WorkerFault,
    WorkerReason,
)
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import Job, JobId
from jobfetcher.core.machine import Inventory
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Lease, Standing
from jobfetcher.core.run import Ending, Exit, Outcome, RunSpec
from jobfetcher.engine.run_spec import BoxPolicy, build_run_spec
from jobfetcher.journal import Journal
from jobfetcher.resources.budget import Budget, Reservation
from jobfetcher.runner import Rules, Runner
from jobfetcher.testing.fake_engine import FakeEngine, Script
from jobfetcher.testing.fake_source import FakeSource
from jobfetcher.testing.fake_transfer import FakeTransfer
from jobfetcher.watching import Limits
from jobfetcher.workspace import Base
from tests.support.jobs import Emitted, make_job
from tests.support.trees import names_in

SEVEN = JobId("7")
URL = "http://files.invalid"
BEATS = {"claimed", "running", "staging_out"}


@dataclass
class Bench:
    path: Path
    rules: Rules = field(default_factory=partial(Rules, beat_interval_s=3600.0, limits=Limits(stop_grace_s=0.1)))
    script: Script = field(default_factory=Script)

    def __post_init__(self) -> None:
        self.source, self.transfer, self.emit = FakeSource(URL), FakeTransfer(), Emitted()
        self.engine = FakeEngine(lambda spec: self.script)
        self.base = Base(self.path / "base", reserve_mib=0)
        self.journal = Journal(self.base.path / "journal.db")
        self.budget = Budget(
            Inventory(4.0, 4096),
            slots=1,
            memory_in_use_mib=lambda: 0,
            read_gpus=lambda: (),
            reserve_memory_mib=0,
            prefetch=1,
        )
        self.halt = Halt()
        self.naps: list[float] = []
        self.outcome = Outcome()
        self.runner = self.make_runner(self.rules)

    def make_runner(self, rules: Rules, **changes: Any) -> Runner:
        parts: dict[str, Any] = {
            "base": self.base,
            "host_base": PurePosixPath(self.base.path),
            "journal": self.journal,
            "transfer": self.transfer,
            "engine": self.engine,
            "build_spec": partial(build_run_spec, attempt=1, instance="i", policy=BoxPolicy()),
            "rules": rules,
            "emit": self.emit,
            "sleep": self.naps.append,
        }
        return Runner(**(parts | changes))

    def close(self) -> None:
        self.journal.close()
        self.base.close()

    def run(self, job: Job | None = None) -> Outcome:
        job = job or make_job(outputs={"output": "out"})
        if job.id not in self.source.said:
            self.source.put(job)
        lease = self.source.resume("t", job.id)
        self.journal.claim(job.id, lease.token, job)
        self.hold: Reservation = self.budget.reserve(job.needs)
        outcome = self.runner.run(lease, job, self.hold, self.halt)
        assert outcome is not None, "only a detached job has none"
        return outcome

    def claimed(self) -> Lease:
        """The lease of a job that is on record, of which nothing was done yet."""
        self.source.put(job := make_job())
        lease = self.source.resume("t", job.id)
        self.journal.claim(job.id, lease.token, job)
        return lease

    def in_thread(self, job: Job | None = None) -> Callable[[], Outcome]:
        """Run beside the test; call the result to wait for the outcome."""
        outcomes: list[Outcome] = []
        job = job or make_job(outputs={"output": "out"})
        self.source.put(job)  # before the thread starts: the test asks what was said of it from now on
        thread = threading.Thread(target=lambda: outcomes.append(self.run(job)))
        thread.start()

        def wait() -> Outcome:
            thread.join(20)
            [outcome] = outcomes
            return outcome

        return wait

    @property
    def words(self) -> list[str]:
        return self.source.said[SEVEN].words

    @property
    def last(self) -> tuple[str, str]:
        said = self.source.said[SEVEN]
        return said.words[-1], said.details[-1]

    @property
    def stored(self) -> dict[str, bytes]:
        start = f"{URL}/7/"
        return {
            name.removeprefix(start): body for name, body in self.transfer.objects.items() if name.startswith(start)
        }

    def nothing_is_left(self) -> bool:
        return (
            self.engine.containers == []
            and names_in(self.base.path / "jobs") == []
            and self.journal.records() == []
            and self.budget.offer() is not None
        )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def writes(name: str, content: bytes = b"result") -> Callable[[Path], None]:
    def act(files: Path) -> None:
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_bytes(content)

    return act


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# -- the good end -----------------------------------------------------------------------------------------------------


def test_a_job_from_inputs_to_finished(bench: Bench) -> None:
    bench.transfer.objects[f"{URL}/b/in"] = b"input"
    bench.script = Script(acts=writes("out/result"), prints="hello\n")
    outcome = bench.run(make_job(inputs={"data/in": "b/in"}, outputs={"output": "out"}))
    assert outcome == Outcome(Ending.FINISHED, None, "")
    assert bench.words == ["claimed", "running", "staging_out", "finished"]
    assert bench.last == ("finished", "")
    assert set(bench.stored) == {
        "output/out/result",
        "log/jobfetcher/container.log",
        "log/jobfetcher/provenance.json",
    }
    assert bench.stored["log/jobfetcher/container.log"] == b"hello\n"
    record = json.loads(bench.stored["log/jobfetcher/provenance.json"])
    assert (record["exit"]["class"], record["inputs"][0]["size"]) == ("success", 5)
    assert bench.nothing_is_left()
    assert bench.emit.levels("job_ended") == ["info"]


def test_an_outcome_begins_as_the_workers_failure() -> None:
    assert Outcome().ending is Ending.WORKER_FAILED
    assert Outcome().reason is WorkerReason.INTERNAL


def test_what_was_skipped_is_told_with_the_success(bench: Bench) -> None:
    bench.script = Script(acts=lambda files: (files / "out" / "link").symlink_to("/etc/passwd"))
    bench.run()
    word, details = bench.last
    assert word == "finished"
    assert "out/link is a link" in details


# -- finished only when earned (J6) -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "reason", "words"),
    [
        (Exit(3), JobReason.EXIT_CODE, "exit code 3; it last printed: one | two"),
        (Exit(126), JobReason.EXIT_CODE, "exit code 126"),
        (Exit(139), JobReason.EXIT_CODE, "exit code 139 (SIGSEGV); it last printed"),
        (Exit(134), JobReason.EXIT_CODE, "exit code 134 (SIGABRT); it last printed"),
        (Exit(255), JobReason.EXIT_CODE, "exit code 255; it last printed"),
        (Exit(137, oom_killed=True), JobReason.OUT_OF_MEMORY, "out of memory (limit 4096 MiB), exit code 137"),
        (Exit(1, oom_killed=True), JobReason.OUT_OF_MEMORY, "out of memory (limit 4096 MiB), exit code 1"),
        (Exit(137), JobReason.KILLED_OUTSIDE, "killed (exit code 137), not by this worker"),
    ],
)
def test_a_job_that_fails_is_reported_with_its_outputs(bench: Bench, end: Exit, reason: JobReason, words: str) -> None:
    bench.script = Script(exit=end, acts=writes("out/partial"), prints="one\ntwo\n")
    outcome = bench.run()
    assert (outcome.ending, outcome.reason) == (Ending.JOB_FAILED, reason)
    assert bench.last[0] == "error"
    assert words in bench.last[1]
    assert "output/out/partial" in bench.stored
    assert "log/jobfetcher/provenance.json" in bench.stored
    assert bench.nothing_is_left()


def test_a_failed_job_is_told_with_what_could_not_be_uploaded(bench: Bench) -> None:
    bench.script = Script(exit=Exit(3), acts=writes("out/big"))
    bench.transfer.failures["output:out/big"] = [JobFault(JobReason.OUTPUT_TOO_LARGE, "output big is too large")]
    outcome = bench.run()
    assert outcome.reason is JobReason.EXIT_CODE
    assert bench.last == ("error", "exit code 3; output big is too large")


def test_a_failed_job_is_told_with_what_was_skipped(bench: Bench) -> None:
    bench.script = Script(exit=Exit(3), acts=lambda files: (files / "out" / "link").symlink_to("/etc/passwd"))
    bench.run()
    assert bench.last == ("error", "exit code 3; not uploaded: out/link is a link, not a file")


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (0, "not given to the job: DOCKER_HOST, NVIDIA_DRIVER_CAPABILITIES"),
        (3, "exit code 3; not given to the job: DOCKER_HOST, NVIDIA_DRIVER_CAPABILITIES"),
    ],
)
def test_what_a_job_did_not_get_is_told(bench: Bench, code: int, details: str) -> None:
    """But what it got with another value: its GPUs."""
    bench.script = Script(exit=Exit(code))
    withheld = {"NVIDIA_DRIVER_CAPABILITIES": "all", "DOCKER_HOST": "unix:///x", "NVIDIA_VISIBLE_DEVICES": "all"}
    bench.run(make_job().model_copy(update={"env": {**withheld, "MODE": "fast"}}))
    assert bench.last[1] == details


@pytest.mark.fault("E8")
def test_a_program_that_the_image_does_not_have_is_named(bench: Bench) -> None:
    bench.script = Script(exit=Exit(127, error="the image has no /bin/sh"))
    outcome = bench.run()
    assert outcome.reason is JobReason.CANNOT_START
    assert bench.last == ("error", "the image has no /bin/sh")


@pytest.mark.fault("E1")
@pytest.mark.parametrize("code", [0, 1, 137])
def test_an_exit_that_nobody_vouches_for_is_given_back(bench: Bench, code: int) -> None:
    bench.script = Script(exit=Exit(code, genuine=False), acts=writes("out/half"))
    outcome = bench.run()
    assert (outcome.ending, outcome.reason) == (Ending.WORKER_FAILED, WorkerReason.INTERRUPTED)
    assert bench.last == ("released", "the container engine restarted while the job ran")
    assert bench.stored == {}
    assert bench.nothing_is_left()


@pytest.mark.parametrize(
    ("failure", "word"),
    [
        (WorkerFault(WorkerReason.STORAGE, "storage is away"), "released"),
        (JobFault(JobReason.OUTPUT_TOO_LARGE, "too large"), "error"),
        (RuntimeError("a bug"), "released"),
    ],
)
def test_exit_0_without_every_output_stored_is_not_finished(bench: Bench, failure: Exception, word: str) -> None:
    bench.script = Script(acts=writes("out/result"))
    bench.transfer.failures["output:out/result"] = [failure]
    bench.run()
    assert bench.last[0] == word
    assert "finished" not in bench.words
    assert bench.nothing_is_left()


def test_what_a_job_printed_cannot_drive_the_mail(bench: Bench) -> None:
    bench.script = Script(exit=Exit(1), prints="\x1b]0;evil\x07\n" + "x" * 5000 + "end")
    bench.run()
    assert bench.last[1].isprintable()
    assert bench.last[1].endswith("end")
    assert len(bench.last[1]) < 800


# -- every step may fail ----------------------------------------------------------------------------------------------

FAULTS: list[tuple[Exception, str, JobReason | WorkerReason | None]] = [
    (JobFault(JobReason.INPUT_MISSING, "the words"), "error", JobReason.INPUT_MISSING),
    (WorkerFault(WorkerReason.DISK, "the words"), "released", WorkerReason.DISK),
    (SourceUnavailable("the words"), "released", WorkerReason.SOURCE),
    (SourceRefused("the words"), "released", WorkerReason.SOURCE),
    (ConfigError("the words"), "released", WorkerReason.INTERNAL),
    (ValueError("secret detail"), "released", WorkerReason.INTERNAL),
    (OSError(28, "No space left on device"), "released", WorkerReason.INTERNAL),
]


class Failing:
    """Stands before a fake and raises `error` from one of its methods, after `skip` calls that go through."""

    def __init__(self, inner: object, method: str, error: Exception, *, skip: int = 0) -> None:
        self._inner, self._method, self._error, self._skip = inner, method, error, skip

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._inner, name, None)
        if name != self._method:
            return real

        def fail(*arguments: object, **named: object) -> Any:
            if self._skip > 0 and real is not None:
                self._skip -= 1
                return real(*arguments, **named)
            raise self._error

        return fail


class Once:
    """Stands before a fake engine that does not start the first container."""

    def __init__(self, inner: FakeEngine, error: Exception) -> None:
        self._inner, self._errors = inner, [error]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start(self, spec: RunSpec, before_start: Callable[[str], None]) -> Any:
        if self._errors:
            raise self._errors.pop()
        return self._inner.start(spec, before_start)


class Starting:
    """Stands before a fake engine: when it is about to start a container, `then` is called, after it is on record."""

    def __init__(self, inner: FakeEngine, then: Callable[[], None]) -> None:
        self._inner, self._then = inner, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start(self, spec: RunSpec, before_start: Callable[[str], None]) -> Any:
        def both(container_id: str) -> None:
            before_start(container_id)
            self._then()

        return self._inner.start(spec, both)


class Removing:
    """Stands before a fake engine whose containers are not removed the first `failures` times."""

    def __init__(self, inner: FakeEngine, failures: int) -> None:
        self._inner, self._left = inner, failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start(self, spec: RunSpec, before_start: Callable[[str], None]) -> Any:
        return self._wrapped(self._inner.start(spec, before_start))

    def find(self, job_id: JobId) -> Any:
        found = self._inner.find(job_id)
        return None if found is None else self._wrapped(found)

    def _wrapped(self, container: Any) -> Any:
        real = container.remove

        def remove() -> None:
            self._left -= 1
            if self._left >= 0:
                raise WorkerFault(WorkerReason.ENGINE, "the engine does not answer")
            real()

        wrapper = Failing(container, "", RuntimeError())
        wrapper.__dict__["remove"] = remove
        return wrapper


POINTS = [
    ("journal", "advance"),
    ("transfer", "download"),
    ("engine", "prepare"),
    ("build_spec", "__call__"),
    ("engine", "start"),
    ("journal", "started"),
    ("journal", "exited"),
    ("transfer", "upload"),
]


@pytest.mark.parametrize(("seam", "method"), POINTS, ids=[f"{seam}.{method}" for seam, method in POINTS])
@pytest.mark.parametrize(("error", "word", "reason"), FAULTS, ids=[type(fault[0]).__name__ for fault in FAULTS])
def test_wherever_it_fails_the_end_is_right_and_nothing_is_left(
    bench: Bench, seam: str, method: str, error: Exception, word: str, reason: JobReason | WorkerReason
) -> None:
    def refuse(*arguments: object, **named: object) -> RunSpec:
        raise error

    stand_in = refuse if seam == "build_spec" else Failing(getattr(bench, seam), method, error)
    bench.runner = bench.make_runner(bench.rules, **{seam: stand_in})
    outcome = bench.run()
    if isinstance(error, OSError) and method == "upload":
        reason = WorkerReason.DISK  # there the error is a walk's, and known
    assert outcome.reason is reason
    assert (outcome.ending is Ending.JOB_FAILED) == (word == "error")
    assert bench.last[0] == word
    assert ("the words" in bench.last[1]) == (str(error) == "the words" and not isinstance(error, ConfigError))
    assert "secret detail" not in bench.last[1]  # a bug's own words are for the log, not for the job's user
    assert [word for word in bench.words if word not in BEATS] == [word]
    assert bench.nothing_is_left()


@pytest.mark.fault("E8")
def test_a_container_that_does_not_start_is_the_jobs_fault(bench: Bench) -> None:
    bench.script = Script(start_error=JobFault(JobReason.CANNOT_START, "no /bin/sh in the image"))
    bench.run()
    assert bench.last == ("error", "no /bin/sh in the image")
    assert bench.nothing_is_left()


@pytest.mark.fault("E11")
def test_a_container_removed_by_somebody_is_the_jobs_fault(bench: Bench) -> None:
    bench.script = Script(held=True)
    outcome = bench.in_thread()
    until(lambda: bench.engine.containers != [])
    bench.engine.containers[0].remove_outside()
    assert outcome().reason is JobReason.REMOVED_OUTSIDE
    assert bench.nothing_is_left()


@pytest.mark.fault("A3")
def test_what_may_have_been_started_is_run_again_from_a_clean_state(bench: Bench) -> None:
    """The worker and the engine were killed during the start: the engine knows of none, and yet the job has run."""
    starts: list[list[str]] = []

    def acts(files: Path) -> None:
        starts.append(sorted(path.name for path in files.iterdir()))
        (files / "out" / "result").write_bytes(b"result")

    bench.script = Script(acts=acts)
    job = make_job(outputs={"output": "out"})
    bench.source.put(job)
    lease = bench.source.resume("t", job.id)
    bench.journal.claim(job.id, lease.token, job)

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    dying = bench.make_runner(bench.rules, engine=Starting(bench.engine, die))
    with bench.budget.reserve(job.needs) as hold, pytest.raises(Killed):
        dying.run(lease, job, hold, Halt())
    [left] = bench.engine.containers
    (bench.base.job(job.id).files / "half-written").touch()  # it did run
    assert bench.journal.records()[0].container == left.id
    with bench.budget.reserve(job.needs) as hold:
        outcome = bench.make_runner(bench.rules).run(lease, job, hold, Halt())
    assert outcome is not None
    assert outcome.ending is Ending.FINISHED
    assert starts == [["out"]]
    assert bench.stored["output/out/result"] == b"result"
    assert bench.nothing_is_left()


@pytest.mark.fault("D7", "E6")
def test_an_image_that_is_removed_before_the_start_is_prepared_again_once(bench: Bench) -> None:
    gone = WorkerFault(WorkerReason.INTERRUPTED, "its image was removed from this machine before the job could start")
    bench.script = Script(acts=writes("out/result"))
    bench.runner = bench.make_runner(bench.rules, engine=Once(bench.engine, gone))
    assert bench.run().ending is Ending.FINISHED
    assert len(bench.engine.prepared) == 2
    assert "image was removed" in str(bench.emit.named("again")[0]["message"])
    assert bench.nothing_is_left()


def test_a_pull_that_is_tried_again_is_said_with_its_job_and_told_to_its_user(bench: Bench) -> None:
    away = "the registry does not answer"
    bench.engine.pull_waits = [(away, 1800.0), (away, 1799.0)]
    bench.runner = bench.make_runner(replace(bench.rules, beat_interval_s=0.01))
    bench.script = Script(held=True)
    outcome = bench.in_thread(make_job())

    def told() -> list[str]:
        return [details for details in bench.source.said[SEVEN].details if away in details]

    assert bench.source.wait_for(lambda: told() != [])
    until(lambda: bench.engine.containers != [])
    bench.engine.containers[0].release()
    assert outcome().ending is Ending.FINISHED
    [said] = bench.emit.named("transfer_retrying")
    assert (said["job"], said["step"]) == (SEVEN, "pull")
    assert f"{away}; it is tried again until " in str(said["message"])
    assert "(30 min)" in str(said["message"])
    assert len(bench.emit.named("transfer_recovered")) == 1
    assert len(told()) == 1


def test_an_image_that_is_removed_each_time_gives_the_job_back(bench: Bench) -> None:
    gone = WorkerFault(WorkerReason.INTERRUPTED, "its image was removed from this machine before the job could start")
    bench.runner = bench.make_runner(bench.rules, engine=Failing(bench.engine, "start", gone))
    assert bench.run().reason is WorkerReason.INTERRUPTED
    assert len(bench.engine.prepared) == 2
    assert bench.last[0] == "released"
    assert bench.nothing_is_left()


def test_the_workers_fault_is_an_error_where_one_worker_is_all_there_is(bench: Bench) -> None:
    bench.runner = bench.make_runner(Rules(beat_interval_s=3600.0, worker_fault_is_error=True))
    bench.script = Script(start_error=WorkerFault(WorkerReason.ENGINE, "the engine is away"))
    assert bench.run().ending is Ending.WORKER_FAILED
    assert bench.last == ("error", "the engine is away")
    assert bench.nothing_is_left()


def test_a_clean_up_that_fails_changes_no_outcome_and_is_done_later(bench: Bench) -> None:
    """DESIGN.md, step 12: container and directory first, then the record is forgotten."""
    bench.runner = bench.make_runner(
        bench.rules, engine=Failing(bench.engine, "find", WorkerFault(WorkerReason.ENGINE, "away"), skip=1)
    )
    outcome = bench.run()
    assert outcome.ending is Ending.FINISHED
    assert bench.words[-1] == "finished"
    assert bench.emit.named("clean_up_failed")
    assert bench.runner.outbox.waiting == [SEVEN]
    [record] = bench.journal.records()
    assert record.phase is Phase.SETTLING
    assert (bench.base.path / "jobs" / "7").is_dir()
    said = list(bench.words)
    later = bench.make_runner(bench.rules)
    assert later.outbox.deliver(bench.source.resume("t", SEVEN), outcome)
    assert bench.words == said
    assert bench.nothing_is_left()


@pytest.mark.fault("E13", "T27")
def test_what_may_not_be_deleted_is_put_beside_and_holds_nothing_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = tree.remove

    def refuse(parent: Path, name: str) -> None:
        if name == "7":
            raise PermissionError(13, "Permission denied")
        remove(parent, name)

    with monkeypatch.context() as patch:
        patch.setattr(tree, "remove", refuse)
        assert bench.run().ending is Ending.FINISHED
    assert bench.words[-1] == "finished"
    [left] = bench.emit.named("files_left")
    assert (bench.emit.levels("files_left"), left["job"]) == (["error"], SEVEN)
    assert "7.left1 is left, with 0 MiB" in str(left["message"])
    assert bench.runner.outbox.waiting == []
    assert bench.journal.records() == []
    assert names_in(bench.base.path / "jobs") == ["7.left1"]
    bench.base.remove("7.left1")
    assert bench.nothing_is_left()


@pytest.mark.fault("T4")
def test_outputs_are_not_read_while_the_container_is_there(bench: Bench) -> None:
    bench.script = Script(acts=writes("out/result"))
    bench.runner = bench.make_runner(bench.rules, engine=Removing(bench.engine, failures=3))
    assert bench.run().ending is Ending.FINISHED
    assert bench.naps == [1.0, 2.0, 4.0]
    assert "output/out/result" in bench.stored


def test_a_container_that_cannot_be_removed_gives_the_job_back_unread(bench: Bench) -> None:
    bench.script = Script(acts=writes("out/result"))
    bench.runner = bench.make_runner(bench.rules, engine=Removing(bench.engine, failures=1000))
    assert bench.run().reason is WorkerReason.ENGINE
    assert bench.words[-1] == "released"
    assert bench.stored == {}
    assert bench.runner.outbox.waiting == [SEVEN]


def test_a_heartbeat_that_cannot_start_gives_the_job_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert bench.run().ending is Ending.WORKER_FAILED
    assert bench.words == ["released"]
    assert bench.nothing_is_left()


# -- cancel, at every step (B17) --------------------------------------------------------------------------------------


@pytest.mark.fault("B17")
@pytest.mark.parametrize("reason", [StopReason.CANCELLED, StopReason.LOST])
@pytest.mark.parametrize("step", ["before", "download", "prepare", "run", "upload"])
def test_a_job_taken_back_ends_in_silence(bench: Bench, step: str, reason: StopReason) -> None:
    stop(bench, step, reason)
    assert bench.outcome.ending is Ending.DROPPED
    assert set(bench.words) <= BEATS
    assert "output/out/result" not in bench.stored
    assert bench.nothing_is_left()


@pytest.mark.fault("F3")
@pytest.mark.parametrize(
    ("reason", "why"),
    [(StopReason.SHUTDOWN, WorkerReason.SHUTDOWN), (StopReason.HEARTBEAT, WorkerReason.HEARTBEAT)],
)
@pytest.mark.parametrize("step", ["before", "download", "prepare", "run", "upload"])
def test_a_job_stopped_by_the_worker_is_given_back(
    bench: Bench, step: str, reason: StopReason, why: WorkerReason
) -> None:
    stop(bench, step, reason)
    assert bench.outcome.reason is why
    assert bench.last == ("released", bench.outcome.message)
    assert bench.nothing_is_left()


def stop(bench: Bench, step: str, reason: StopReason) -> None:
    """Run a job and halt it in `step`; the outcome is left in `bench.outcome`."""
    bench.transfer.objects[f"{URL}/b/in"] = b"input"
    job = make_job(inputs={"in": "b/in"}, outputs={"output": "out"})
    bench.script = Script(held=step == "run", acts=writes("out/result"))
    if step == "before":
        bench.halt.set(reason)
    if step == "download":
        bench.transfer.stall.add("in")
    if step == "upload":
        bench.transfer.stall.add("output:out/result")
    if step == "prepare":
        real = bench.engine.prepare

        def prepare(*arguments: Any) -> Any:
            found = real(*arguments)
            bench.halt.set(reason)
            return found

        setattr(bench.engine, "prepare", prepare)  # noqa: B010 - halted while the image is pulled
    outcome = bench.in_thread(job)
    if step == "download":
        until(lambda: any(record.phase is Phase.STAGING_IN for record in bench.journal.records()))
    if step == "run":
        until(lambda: bench.engine.containers != [])
    if step == "upload":
        until(lambda: any(record.phase is Phase.STAGING_OUT for record in bench.journal.records()))
    bench.halt.set(reason)
    bench.outcome = outcome()


@pytest.mark.fault("B7")
def test_a_404_to_a_heartbeat_stops_the_container(bench: Bench) -> None:
    bench.runner = bench.make_runner(Rules(beat_interval_s=0.01, limits=Limits(stop_grace_s=0.1)))
    bench.script = Script(held=True, ignores_term=True)
    outcome = bench.in_thread()
    until(lambda: "running" in bench.words)
    [container] = bench.engine.containers
    bench.source.said[SEVEN].answers.append(Standing.CANCEL)
    assert outcome().ending is Ending.DROPPED
    assert container.stopped_with == [0.1]
    assert set(bench.words) <= BEATS
    assert bench.nothing_is_left()


@pytest.mark.fault("B17")
def test_a_job_cancelled_at_its_very_end_is_not_called_finished(bench: Bench) -> None:
    said = bench.source.put(make_job())
    said.answers += [Standing.KEEP] * 3 + [Standing.CANCEL]
    bench.run(make_job())
    assert "finished" not in bench.words
    [event] = bench.emit.named("job_ended")
    assert event["ending"] == "dropped"
    assert bench.nothing_is_left()


@pytest.mark.fault("B7")
def test_a_container_that_could_not_be_stopped_is_stopped_again(bench: Bench) -> None:
    bench.script = Script(held=True)
    outcome = bench.in_thread()
    until(lambda: "running" in bench.words)
    [container] = bench.engine.containers
    stop, failures = container.stop, iter([WorkerFault(WorkerReason.ENGINE, "the engine is away")])

    def fails_once(grace_s: float) -> None:
        for failure in failures:
            raise failure
        stop(grace_s)

    setattr(container, "stop", fails_once)  # noqa: B010 - the engine is away for this call only
    bench.halt.set(StopReason.CANCELLED)  # the stop fails in its own thread
    until(lambda: bench.emit.named("stop_failed") != [])
    assert outcome().ending is Ending.DROPPED
    assert bench.nothing_is_left()


# -- time, and what is given back when --------------------------------------------------------------------------------


@pytest.mark.fault("E9")
def test_a_job_over_its_time_limit_is_stopped_and_its_outputs_kept(bench: Bench) -> None:
    bench.runner = bench.make_runner(Rules(beat_interval_s=3600.0, limits=Limits(stop_grace_s=0.1, max_runtime_s=0.2)))
    bench.script = Script(held=True, ignores_term=True, acts=writes("out/partial"))
    outcome = bench.run()
    assert outcome.reason is JobReason.TIME_LIMIT
    assert bench.last == ("error", "stopped after the time limit of this worker, 0.2 s")
    assert "output/out/partial" in bench.stored
    assert bench.nothing_is_left()


def test_the_share_is_free_as_soon_as_the_container_ended(bench: Bench) -> None:
    bench.script = Script(acts=writes("out/result"))
    bench.transfer.stall.add("output:out/result")
    outcome = bench.in_thread()
    until(lambda: any(record.phase is Phase.STAGING_OUT for record in bench.journal.records()))
    until(lambda: bench.budget.offer() is not None)  # while the upload hangs
    bench.transfer.stall.clear()
    assert outcome().ending is Ending.FINISHED


@pytest.mark.fault("T4")
def test_the_container_is_gone_before_its_files_are_read(bench: Bench) -> None:
    bench.script = Script(acts=writes("out/result"))
    seen: list[int] = []
    real = bench.transfer.upload

    def upload(*arguments: Any) -> None:
        seen.append(len(bench.engine.containers))
        real(*arguments)

    setattr(bench.transfer, "upload", upload)  # noqa: B010 - looks around first
    bench.run()
    assert seen == [0]


def test_the_journal_is_written_before_the_source_hears(bench: Bench) -> None:
    phases: list[tuple[str, Phase]] = []
    lease = bench.source.resume("t", SEVEN)
    real = type(lease)._say

    def say(self: Any, word: str, details: str) -> Standing:
        record = bench.journal.record(SEVEN)
        assert record is not None
        phases.append((word, record.phase))
        return real(self, word, details)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(lease), "_say", say)
        bench.run()
    on_record = dict(phases)
    assert on_record["running"] in {Phase.RUNNING, Phase.STAGING_OUT, Phase.SETTLING}
    assert on_record["finished"] is Phase.SETTLING


@pytest.mark.fault("A9")
def test_a_prefetched_job_waits_with_all_its_inputs_and_is_not_blamed_for_crashes_meanwhile(bench: Bench) -> None:
    bench.transfer.objects[f"{URL}/b/in"] = b"input"
    running = bench.budget.reserve(make_job().needs)
    outcome = bench.in_thread(make_job(inputs={"in": "b/in"}))
    until(lambda: bench.emit.named("wait") != [])
    assert (bench.base.path / "jobs" / "7" / "files" / "in").read_bytes() == b"input"
    assert bench.engine.prepared == ["busybox:latest"]
    assert bench.engine.specs == []
    for _ in range(20):  # so many processes died meanwhile, each after it had come to this wait again
        assert bench.journal.resuming(SEVEN) == 1
        bench.journal.acquit(SEVEN)
    running.release()
    assert outcome().ending is Ending.FINISHED
    assert bench.words == ["claimed", "running", "staging_out", "finished"]
    assert bench.nothing_is_left()


def test_a_resumed_job_that_waits_is_acquitted(bench: Bench) -> None:
    with bench.budget.reserve(make_job().needs):
        job = make_job()
        bench.source.put(job)
        lease = bench.source.resume("t", job.id)
        bench.journal.claim(job.id, lease.token, job)
        for crashes in range(1, 5):
            assert bench.journal.resuming(job.id) == crashes
        hold = bench.budget.reserve(job.needs)
        thread = threading.Thread(target=bench.runner.run, args=(lease, job, hold, bench.halt))
        thread.start()
        until(lambda: bench.emit.named("wait") != [])
        assert bench.journal.resuming(job.id) == 1
        bench.halt.set(StopReason.SHUTDOWN)
        thread.join(20)
    assert bench.last == ("released", "the worker was shut down")
    assert bench.nothing_is_left()


@pytest.mark.parametrize("fails", ["image", "input"])
@pytest.mark.fault("E6", "C7")
def test_the_image_comes_while_inputs_do_and_one_failure_ends_both(bench: Bench, fails: str) -> None:
    """The other one would take for ever."""
    bench.transfer.objects[f"{URL}/b/in"] = b"input"
    real = bench.engine.prepare
    pulling = threading.Event()

    def prepare(reference: str, halt: Halt, *more: Any) -> Any:
        pulling.set()
        if fails == "image":
            until(lambda: any(record.phase is Phase.STAGING_IN for record in bench.journal.records()))
            raise JobFault(JobReason.IMAGE_MISSING, "the registry does not have it")
        assert halt.wait(20), "nobody told it to end"
        halt.check()
        return real(reference, halt, *more)

    setattr(bench.engine, "prepare", prepare)  # noqa: B010 - a registry that is slow, or does not have it
    if fails == "image":
        bench.transfer.stall.add("in")
    else:
        download = bench.transfer.download

        def missing(*arguments: Any) -> None:
            assert pulling.wait(20)
            bench.transfer.objects.clear()
            download(*arguments)

        setattr(bench.transfer, "download", missing)  # noqa: B010 - gone while the image is pulled
    outcome = bench.run(make_job(inputs={"in": "b/in"}))
    assert outcome.reason is (JobReason.IMAGE_MISSING if fails == "image" else JobReason.INPUT_MISSING)
    assert bench.last[0] == "error"
    assert bench.engine.specs == []
    assert bench.nothing_is_left()


def test_how_long_each_step_took_is_on_record_with_the_wait(bench: Bench) -> None:
    bench.run()
    record = json.loads(bench.stored["log/jobfetcher/provenance.json"])
    assert record["seconds"].keys() >= {"stage_in", "prepare", "wait", "run"}


# -- an end that nobody hears (J9) ------------------------------------------------------------------------------------


def undeliverable(bench: Bench, count: int, error: JobfetcherError) -> None:
    said = bench.source.put(make_job())
    said.answers += [Standing.KEEP] * 3 + [error] * count  # type: ignore[list-item]  # only source errors are passed


@pytest.mark.fault("B1")
def test_a_short_outage_at_the_end_is_waited_out(bench: Bench) -> None:
    undeliverable(bench, 3, SourceUnavailable("down"))
    assert bench.run(make_job()).ending is Ending.FINISHED
    assert bench.words[-1] == "finished"
    assert len(bench.naps) == 3
    assert bench.nothing_is_left()


@pytest.mark.fault("B2")
def test_an_undeliverable_end_stays_on_record_with_its_files_and_is_told_later(bench: Bench) -> None:
    undeliverable(bench, 100, SourceUnavailable("down"))
    outcome = bench.run(make_job())
    assert "finished" not in bench.words
    [record] = bench.journal.records()
    assert (record.phase, record.outcome) == (Phase.SETTLING, outcome)
    assert names_in(bench.base.path / "jobs") == ["7"]
    lease = bench.source.resume("t", SEVEN)
    for _ in range(50):
        if bench.runner.outbox.deliver(lease, outcome):
            break
    assert bench.emit.levels("server_away") == ["warning"]  # J10: once, not per try
    assert "the end (finished) of job 7 is not delivered yet: down" in str(bench.emit.named("server_away")[0])
    assert set(bench.emit.levels("settle_failed")) == {"debug"}
    bench.source.said[SEVEN].answers.clear()
    assert bench.runner.outbox.deliver(lease, outcome)
    assert bench.words.count("finished") == 1
    assert len(bench.emit.named("server_back")) == 1
    assert bench.nothing_is_left()


@pytest.mark.fault("A8")
def test_an_end_that_was_accepted_is_not_told_again_by_the_next_process(bench: Bench) -> None:
    """The first one died, or could not, while it cleaned up."""
    bench.runner = bench.make_runner(
        bench.rules, engine=Failing(bench.engine, "find", WorkerFault(WorkerReason.ENGINE, "down"))
    )
    outcome = Outcome(Ending.JOB_FAILED, JobReason.EXIT_CODE, "exit code 3")
    lease = bench.claimed()
    bench.runner.outbox.settle(lease, outcome)
    assert bench.words[-1] == "error"
    [record] = bench.journal.records()
    assert bench.journal.was_accepted(SEVEN)
    bench.runner = bench.make_runner(bench.rules)
    again = bench.source.resume("t", SEVEN, cut_off=record.phase)
    assert record.outcome is not None
    bench.runner.outbox.settle(again, record.outcome)
    assert bench.source.said[SEVEN].repeats == 0
    assert bench.nothing_is_left()


@pytest.mark.fault("A7")
def test_an_end_of_which_nothing_is_on_record_is_told_again_by_the_next_process(bench: Bench) -> None:
    lease = bench.claimed()
    outcome = Outcome(Ending.JOB_FAILED, JobReason.EXIT_CODE, "exit code 3")
    bench.journal.settling(SEVEN, outcome)
    lease.settle(outcome)  # and here it dies
    again = bench.source.resume("t", SEVEN, cut_off=Phase.SETTLING)
    bench.runner.outbox.settle(again, outcome)
    assert bench.source.said[SEVEN].repeats == 1
    assert bench.words.count("error") == 1
    assert bench.nothing_is_left()


def test_telling_twice_is_telling_once(bench: Bench) -> None:
    outcome = bench.run()
    assert bench.runner.outbox.deliver(bench.source.resume("t", SEVEN), outcome)
    assert [word for word in bench.words if word not in BEATS] == ["finished"]


@pytest.mark.fault("D5")
def test_an_end_that_cannot_be_journaled_is_told_all_the_same(bench: Bench) -> None:
    bench.runner = bench.make_runner(
        bench.rules, journal=Failing(bench.journal, "settling", WorkerFault(WorkerReason.DISK, "disk full"))
    )
    bench.run()
    assert bench.words[-1] == "finished"
    assert bench.emit.levels("journal_failed") == ["error"]


def test_secrets_of_a_bug_go_to_the_log_only(bench: Bench) -> None:
    bench.runner = bench.make_runner(bench.rules, engine=Failing(bench.engine, "prepare", KeyError("detail")))
    bench.run()
    assert bench.last == ("released", "the worker failed (KeyError)")
    [bug] = bench.emit.named("bug")
    assert "detail" in str(bug["message"])
