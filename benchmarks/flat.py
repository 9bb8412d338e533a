"""P11: what one output and one job cost must not grow with how many there are.

Cost is processor time of this process, all threads, and everything lies in memory: waits for a server or a disk would
hide what grows.

Outputs: the real `staging.stage_out` over files of 1 KiB, the worker's own transfer to nginx by a POST form, each file
marked in a real journal; no server signs (that is P4). A job of 10 outputs is measured many times in a row, so that
both sides move the same number of files. Since a job has costs of its own, which 10,000 outputs share, the last
thousand of those are also held against the first thousand of the same job.

Jobs: the real `runner.Runner` and journal, with the package's own fakes for engine, server and storage; one input and
one output; medians of 500 jobs on each side, in turns. One journal is empty, the other has 10,000 records of ends that
no server has heard yet, with a file each, 10,000 files of a job that is open, and 10,000 jobs that came and went.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from benchmarks.frame import Bench, Row, in_turns
from benchmarks.servers import running_nginx
from jobfetcher import build, staging
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import FileRef, InputFile, Job, JobId, JobPath, OutputKind
from jobfetcher.core.machine import Inventory
from jobfetcher.core.run import Ending, Outcome, Stored
from jobfetcher.core.urls import Method, SignedRequest
from jobfetcher.engine.run_spec import BoxPolicy, build_run_spec
from jobfetcher.journal import Journal
from jobfetcher.resources.budget import Budget
from jobfetcher.runner import Rules, Runner
from jobfetcher.settings import Settings
from jobfetcher.testing.fake_engine import FakeEngine, Script
from jobfetcher.testing.fake_source import FakeLease, FakeSource
from jobfetcher.testing.fake_transfer import FakeTransfer
from jobfetcher.workspace import Base, Workspace

_KIB = 1024
_FEW = 10
_JOB = Job.model_validate({"id": "7", "image": "none", "outputs": [{"kind": "output", "path": "out"}]})


def flat(bench: Bench) -> Iterator[Row]:
    """P11."""
    yield from _outputs(bench)
    yield _history(bench)


class _Lease(FakeLease):
    """Signs one form for everything, which is nginx's."""

    form: SignedRequest

    def sign_output(self, kind: OutputKind, folder: str, name: str, *, renew: bool = False) -> SignedRequest:  # noqa: ARG002 - the same for all
        return self.form


def _outputs(bench: Bench) -> Iterator[Row]:
    many, edge = (400, 100) if bench.short else (10_000, 1000)
    with ExitStack() as opened:
        nginx = opened.enter_context(running_nginx(bench.memory / "nginx", bench.memory))
        settings = Settings.model_validate(
            {"api_url": nginx.http, "access_token": "none", "path_base": bench.memory, "gpus": "none"}
        )
        transfer = opened.enter_context(closing(build.make_transfer(settings)))
        journal = opened.enter_context(closing(Journal(bench.memory / "journal.db")))
        lease = _Lease(source := FakeSource(), "token", _JOB.id, source.put(_JOB))
        lease.form = SignedRequest(Method.POST, f"{nginx.http}/_storage", fields=(("key", "${filename}"),))
        folders = {count: _folder(bench.memory / str(count), count) for count in (_FEW, many)}

        def send(count: int) -> list[float]:
            """What had been spent when each of the outputs was marked."""
            journal.claim(_JOB.id, "token", _JOB)
            began = time.process_time()
            marks: list[float] = []

            def mark(stored: Stored) -> None:
                journal.mark(_JOB.id, "out", stored)
                marks.append(time.process_time() - began)

            staging.stage_out(
                _JOB, lease, folders[count], transfer, halt=Halt(), have={}, mark=mark, progress=staging.Progress()
            )
            if len(marks) != count:
                raise AssertionError(f"{len(marks)} of {count} outputs were sent")
            journal.forget(_JOB.id)
            return marks

        ends: list[tuple[float, float]] = []

        def at_once() -> float:
            marks = send(many)
            ends.append((marks[-1] - marks[-edge - 1], marks[edge - 1]))
            return marks[-1] / many

        def in_tens() -> float:
            return _spent(lambda: [send(_FEW) for _ in range(many // _FEW)]) / many

        in_tens()  # connections are open, byte code is there
        value, baseline = in_turns(at_once, in_tens, bench.repeats)
        last, first = (statistics.median(side) / edge for side in zip(*ends, strict=True))
    yield _row(bench, f"per output, {many} in a job", value, "10 in a job", baseline)
    yield _row(bench, f"per output, the last {edge} of {many}", last, f"the first {edge}", first)


def _row(bench: Bench, what: str, value_s: float, against: str, baseline_s: float) -> Row:
    ratio = value_s / baseline_s
    ok = bench.judge(ratio <= 1.2)
    return Row("P11", what, value_s * 1000, "ms", against, baseline_s * 1000, ratio, "ratio <= 1.2", ok)


def _spent(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _folder(path: Path, count: int) -> Workspace:
    workspace = Workspace(path)
    workspace.create()
    (workspace.files / "out").mkdir()
    for number in range(count):
        (workspace.files / "out" / f"{number:05}").write_bytes(bytes(_KIB))
    return workspace


def _history(bench: Bench) -> Row:
    rows, jobs = (100, 5) if bench.short else (10_000, 100)
    numbers = itertools.count(1_000_000)
    with ExitStack() as opened:
        bench.say(f"writing {2 * rows} records and {2 * rows} files")
        (bench.memory / "old").mkdir()
        _fill(bench.memory / "old" / "journal.db", rows)
        fresh, old = (opened.enter_context(_machine(bench.memory / name)) for name in ("fresh", "old"))

        spent: dict[Callable[[JobId], None], list[float]] = {old: [], fresh: []}
        for _ in range(jobs * bench.repeats):
            for run, costs in spent.items():
                costs.append(_spent(partial(run, JobId(str(next(numbers))))))
        value, baseline = (statistics.median(costs) for costs in spent.values())
    return _row(bench, f"per job, {rows} open records in the journal, as many jobs before", value, "none", baseline)


def _fill(path: Path, rows: int) -> None:
    """Jobs that came and went, jobs whose end nobody has heard yet with a file each, and one with many files."""
    with closing(Journal(path)) as journal:
        for number in range(rows):
            gone, unheard = JobId(f"gone-{number}"), JobId(f"unheard-{number}")
            for job in (gone, unheard):
                journal.claim(job, "token", _JOB)
                journal.settling(job, Outcome(Ending.FINISHED, None, ""))
                journal.mark(job, "out", Stored("output:out/result", _KIB, "md5:0", ""))
            journal.forget(gone)
        journal.claim(JobId("open"), "token", _JOB)
        for number in range(rows):
            journal.mark(JobId("open"), "out", Stored(f"output:out/{number}", _KIB, "md5:0", ""))


def _copy(files: Path) -> None:
    shutil.copyfile(files / "in", files / "out" / "a")


@contextmanager
def _machine(path: Path) -> Iterator[Callable[[JobId], None]]:
    """A worker's runner and journal in a directory, all around it fakes that take no time; yields what runs a job."""

    def silent(name: str, /, level: str = "info", **fields: object) -> None:
        """Nobody listens."""

    source, transfer = FakeSource(), FakeTransfer()
    transfer.objects["http://files.invalid/b/in"] = bytes(_KIB)
    budget = Budget(
        Inventory(4.0, 4096), slots=1, memory_in_use_mib=lambda: 0, read_gpus=lambda: (), reserve_memory_mib=0
    )
    with ExitStack() as opened:
        base = opened.enter_context(Base(path, reserve_mib=0))
        journal = opened.enter_context(closing(Journal(base.path / "journal.db")))
        runner = Runner(
            base=base,
            host_base=PurePosixPath(base.path),
            journal=journal,
            transfer=transfer,
            engine=FakeEngine(lambda _: Script(acts=_copy)),
            build_spec=partial(build_run_spec, instance="bench", policy=BoxPolicy()),
            rules=Rules(),
            emit=silent,
        )

        def run(job_id: JobId) -> None:
            job = _JOB.model_copy(
                update={"id": job_id, "inputs": (InputFile(path=JobPath("in"), ref=FileRef("b/in")),)}
            )
            source.put(job)
            lease = source.resume("token", job_id)
            journal.claim(job_id, lease.token, job)
            outcome = runner.run(lease, job, budget.reserve(job.needs), Halt())
            if outcome is None or outcome.ending is not Ending.FINISHED:
                raise AssertionError(f"job {job_id}: {outcome}")

        yield run
