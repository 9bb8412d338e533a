"""staging: names in, names out, nothing moved twice, and honest words about what was not sent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobfetcher.core.errors import JobFault, JobReason, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import InputFile, Job
from jobfetcher.core.run import Stored
from jobfetcher.staging import OWN_FOLDER, Progress, StagedOut, stage_in, stage_out
from jobfetcher.testing.fake_source import FakeSource
from jobfetcher.testing.fake_transfer import FakeTransfer
from jobfetcher.workspace import Workspace
from tests.support.jobs import make_job
from tests.support.trees import fingerprint, names_in

URL = "http://files.invalid"


@dataclass
class Bench:
    workspace: Workspace
    source: FakeSource = field(default_factory=FakeSource)
    transfer: FakeTransfer = field(default_factory=FakeTransfer)
    halt: Halt = field(default_factory=Halt)
    marks: list[Stored] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    awaited: list[int] = field(default_factory=list)

    def input(self, ref: str, content: bytes) -> None:
        self.transfer.objects[f"{URL}/{ref}"] = content

    def bring(self, job: Job, have: Mapping[str, Stored] | None = None) -> dict[str, Stored]:
        return stage_in(
            job,
            self.source.resume("t", job.id),
            self.workspace,
            self.transfer,
            halt=self.halt,
            have=have or {},
            mark=self.marks.append,
            progress=self.progress,
            awaits=self.awaited.append,
        )

    def send(self, job: Job, have: Mapping[str, Stored] | None = None) -> StagedOut:
        return stage_out(
            job,
            self.source.resume("t", job.id),
            self.workspace,
            self.transfer,
            halt=self.halt,
            have=have or {},
            mark=self.marks.append,
            progress=self.progress,
        )

    def write(self, path: str, content: bytes = b"x") -> Path:
        target = self.workspace.files / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return target

    @property
    def stored(self) -> dict[str, bytes]:
        """What lies in the store for job 7, by kind and path."""
        start = f"{URL}/7/"
        return {
            name.removeprefix(start): body for name, body in self.transfer.objects.items() if name.startswith(start)
        }


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(Workspace(tmp_path / "7"))
    made.workspace.create()
    return made


def test_inputs_arrive_at_their_names_and_are_marked(bench: Bench) -> None:
    bench.input("b/one", b"1")
    bench.input("b/two", b"22")
    job = make_job(inputs={"data/one.bin": "b/one", "two": "b/two"}, outputs={"output": "out", "log": "logs/run"})
    stored = bench.bring(job)
    assert (bench.workspace.files / "data/one.bin").read_bytes() == b"1"
    assert (bench.workspace.files / "two").read_bytes() == b"22"
    assert names_in(bench.workspace.files) == ["data", "logs", "out", "two"]
    assert names_in(bench.workspace.parts) == []
    assert {name: item.size for name, item in stored.items()} == {"data/one.bin": 1, "two": 2}
    assert {mark.name for mark in bench.marks} == set(stored)
    assert (bench.progress.files, bench.progress.files_total, bench.progress.moved) == (2, 2, 3)


@pytest.mark.fault("D2")
def test_it_says_how_much_is_still_to_come_and_at_the_end_that_nothing_is(bench: Bench) -> None:
    bench.input("b/one", b"1" * 100)
    bench.input("b/two", b"2" * 50)
    bench.bring(make_job(inputs={"one": "b/one", "two": "b/two"}))
    assert bench.awaited == [100, 0, 50, 0, 0]
    bench.awaited.clear()
    bench.transfer.failures["three"] = [WorkerFault(WorkerReason.STORAGE, "away")]
    with pytest.raises(WorkerFault):
        bench.bring(make_job(inputs={"one": "b/one", "three": "b/three"}))
    assert bench.awaited[-1] == 0, "of one that failed nothing comes any more"


def test_a_job_without_inputs_gets_its_output_folders(bench: Bench) -> None:
    assert bench.bring(make_job(outputs={"output": "a/b"})) == {}
    assert (bench.workspace.files / "a/b").is_dir()


def test_what_an_earlier_attempt_placed_is_not_fetched_again(bench: Bench) -> None:
    bench.input("b/one", b"1")
    bench.input("b/two", b"22")
    job = make_job(inputs={"one": "b/one", "two": "b/two"})
    have = bench.bring(job)
    bench.marks.clear()
    bench.transfer.objects.clear()
    assert bench.bring(job, have) == have
    assert bench.marks == []


@pytest.mark.parametrize("damage", ["missing", "shorter", "link", "folder"])
def test_a_placed_file_that_is_not_as_it_was_is_fetched_again(bench: Bench, damage: str) -> None:
    bench.input("b/one", b"11")
    job = make_job(inputs={"one": "b/one"})
    have = bench.bring(job)
    path = bench.workspace.files / "one"
    path.unlink()
    if damage == "shorter":
        path.write_bytes(b"1")
    elif damage == "link":
        (bench.workspace.files / "other").write_bytes(b"11")
        path.symlink_to("other")
    elif damage == "folder":
        path.mkdir()
        with pytest.raises(WorkerFault, match=r"input 'one' cannot be stored"):
            bench.bring(job, have)
        return
    bench.bring(job, have)
    assert path.read_bytes() == b"11"
    assert not path.is_symlink()


def test_a_missing_input_is_the_jobs_fault(bench: Bench) -> None:
    with pytest.raises(JobFault) as fault:
        bench.bring(make_job(inputs={"one": "b/none"}))
    assert fault.value.reason is JobReason.INPUT_MISSING
    assert names_in(bench.workspace.files) == []


@pytest.mark.fault("B17")
def test_a_cancel_ends_both_directions(bench: Bench) -> None:
    bench.input("b/one", b"1")
    bench.write("out/a")
    bench.halt.set(StopReason.CANCELLED)
    with pytest.raises(Stopped):
        bench.bring(make_job(inputs={"one": "b/one"}))
    with pytest.raises(Stopped):
        bench.send(make_job(outputs={"output": "out"}))
    assert bench.stored == {}


def test_inputs_never_go_through_a_link_in_the_job_directory(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (bench.workspace.files / "data").symlink_to(tmp_path / "outside")
    bench.input("b/one", b"1")
    with pytest.raises(WorkerFault, match=r"input 'data/one' cannot be stored"):
        bench.bring(make_job(inputs={"data/one": "b/one"}))
    assert fingerprint(tmp_path / "outside") == {}


def test_outputs_keep_their_path_and_the_workers_logs_lie_below_its_own_name(bench: Bench) -> None:
    bench.write("out/a", b"A")
    bench.write("out/deep/b", b"B")
    bench.write("model", b"M")
    bench.write("elsewhere/secret", b"S")
    (bench.workspace.logs / "container.log").write_bytes(b"L")
    sent = bench.send(make_job(outputs={"output": "out", "artifact": "model"}))
    assert bench.stored == {
        "output/out/a": b"A",
        "output/out/deep/b": b"B",
        "artifact/model": b"M",
        f"log/{OWN_FOLDER}/container.log": b"L",
    }
    assert sent.sentence() == ""
    assert {mark.name for mark in bench.marks} == {
        "output:out/a",
        "output:out/deep/b",
        "artifact:model",
        f"log:{OWN_FOLDER}/container.log",
    }


def test_a_log_that_would_take_the_place_of_the_workers_own_is_named_and_not_sent(bench: Bench) -> None:
    bench.write(f"{OWN_FOLDER}/container.log", b"forged")
    bench.write(f"{OWN_FOLDER}/other.log", b"the job's")
    (bench.workspace.logs / "container.log").write_bytes(b"L")
    sent = bench.send(make_job(outputs={"log": OWN_FOLDER}))
    assert bench.stored == {f"log/{OWN_FOLDER}/container.log": b"L", f"log/{OWN_FOLDER}/other.log": b"the job's"}
    assert sent.sentence() == f"not uploaded: {OWN_FOLDER}/container.log has the name of a log of the worker's own"


def test_each_kind_gets_its_files_where_trees_nest_or_coincide(bench: Bench) -> None:
    bench.write("out/a")
    bench.write("out/logs/b")
    bench.send(make_job(outputs={"output": "out", "artifact": "out", "log": "out/logs"}))
    assert sorted(bench.stored) == [
        "artifact/out/a",
        "artifact/out/logs/b",
        "log/out/logs/b",
        "output/out/a",
        "output/out/logs/b",
    ]


def test_an_output_folder_that_the_job_removed_is_no_error(bench: Bench) -> None:
    sent = bench.send(make_job(outputs={"output": "results", "log": "results", "artifact": "."}))
    assert sent.sentence() == "output folder results is gone: the job removed it"
    (bench.workspace.files / "results").touch()  # a file in its place is sent
    (bench.workspace.files / "link").symlink_to("results")
    sent = bench.send(make_job(outputs={"output": "results", "log": "link/x", "artifact": "away/x"}))
    assert sent.sentence() == (
        "output folder away/x is gone: the job removed it; not uploaded: link/x one of its folders is a link or a file"
    )


@pytest.mark.fault("A6")
def test_what_an_earlier_attempt_stored_is_not_sent_again_unless_it_grew(bench: Bench) -> None:
    bench.write("out/same", b"1")
    bench.write("out/grown", b"1")
    job = make_job(outputs={"output": "out"})
    have = {mark.name: mark for mark in (bench.send(job), bench.marks)[1]}
    bench.transfer.objects.clear()
    bench.write("out/grown", b"22")
    again = bench.send(job, have)
    assert bench.stored == {"output/out/grown": b"22"}
    assert set(again.stored) == {"output:out/same", "output:out/grown"}


def test_five_skipped_things_are_named_and_the_rest_counted(bench: Bench) -> None:
    bench.write("out/honest")
    for number in range(9):
        (bench.workspace.files / "out" / f"link{number}").symlink_to("x\n<b>")
    sentence = bench.send(make_job(outputs={"output": "out"})).sentence()
    assert sentence.startswith("not uploaded: out/link")
    assert sentence.count("is a link, not a file") == 5
    assert sentence.endswith("; and 4 more")
    assert list(bench.stored) == ["output/out/honest"]


@pytest.mark.fault("C15")
@pytest.mark.parametrize("name", [b"bell\x07", b"new\nline", b"\xff", b"a\x9b"])
def test_a_name_that_cannot_travel_fails_the_job_after_all_else_was_sent(bench: Bench, name: bytes) -> None:
    bench.write("out/a", b"A")
    os.close(os.open(os.fsencode(bench.workspace.files / "out") + b"/" + name, os.O_CREAT, 0o600))
    bench.write("out/z", b"Z")
    with pytest.raises(JobFault, match="was not uploaded: its name is not UTF-8 text or has control") as fault:
        bench.send(make_job(outputs={"output": "out"}))
    assert fault.value.reason is JobReason.BAD_OUTPUT
    assert str(fault.value).isprintable()
    assert bench.stored == {"output/out/a": b"A", "output/out/z": b"Z"}


@pytest.mark.parametrize("name", ["ä ö", "日本.csv", "quote\"'", "semi;colon", "percent%2e", "-rf", "a\u200bb"])
def test_odd_but_lawful_names_travel(bench: Bench, name: str) -> None:
    bench.write(f"out/{name}", b"A")
    bench.send(make_job(outputs={"output": "out"}))
    assert bench.stored == {f"output/out/{name}": b"A"}


def test_the_first_failure_is_raised_after_the_other_files_were_sent(bench: Bench) -> None:
    for name in "abc":
        bench.write(f"out/{name}")
    bench.transfer.failures["output:out/b"] = [WorkerFault(WorkerReason.STORAGE, "storage is away")]
    with pytest.raises(WorkerFault, match="storage is away"):
        bench.send(make_job(outputs={"output": "out"}))
    assert sorted(bench.stored) == ["output/out/a", "output/out/c"]


def test_a_disk_error_while_walking_is_the_workers_fault(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write("out/a")
    real = os.scandir

    def failing(path: int) -> object:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(WorkerFault, match=r"outputs cannot be read.*Input/output error") as fault:
        bench.send(make_job(outputs={"output": "out"}))
    monkeypatch.setattr(os, "scandir", real)
    assert fault.value.reason is WorkerReason.DISK


# -- inputs whose content was signed ----------------------------------------------------------------------------------


def signed_job(content: bytes) -> Job:
    """A job with the input in/a, of which that content was signed."""
    file = {"path": "in/a", "ref": "a", "sha256": hashlib.sha256(content).hexdigest()}
    return make_job(id="7").model_copy(update={"inputs": (InputFile.model_validate(file),)})


@pytest.mark.fault("T30")
def test_an_input_must_have_the_content_that_was_signed(bench: Bench) -> None:
    bench.input("a", b"as signed")
    stored = bench.bring(signed_job(b"as signed"))
    assert bench.marks == [stored["in/a"]]  # its hash was known: nothing is read again
    bench.input("a", b"evil stuf")
    (bench.workspace.files / "in/a").unlink()
    with pytest.raises(JobFault, match="input in/a is not what was signed: it is sha256:") as fault:
        bench.bring(signed_job(b"as signed"))
    assert fault.value.reason is JobReason.INPUT_CORRUPT


@pytest.mark.fault("T30")
@pytest.mark.parametrize("digest", ["md5:0", ""])
def test_an_input_of_which_only_an_md5_is_known_is_hashed_and_marked_anew(bench: Bench, digest: str) -> None:
    """Placed by an attempt that died before its content was compared: what it is now counts."""
    bench.workspace.create()
    bench.write("in/a", b"as signed")
    have = {"in/a": Stored("in/a", 9, digest, "etag")}
    stored = bench.bring(signed_job(b"as signed"), have)
    whole = Stored("in/a", 9, f"sha256:{hashlib.sha256(b'as signed').hexdigest()}", "etag")
    assert (stored, bench.marks) == ({"in/a": whole}, [whole])
    bench.write("in/a", b"evil stuf")
    with pytest.raises(JobFault, match="is not what was signed"):
        bench.bring(signed_job(b"as signed"), have)
