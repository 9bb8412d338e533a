"""Small disks, really full, out of inodes, read-only or failing: what the worker's directory does with them (D1 to D7).

ext4 on loop devices and tmpfs, with the limits a person would see; all of it needs root, as mounting does.
"""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import docker
import pytest

from jobfetcher.core.errors import ConfigError, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.machine import Share
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import PullProgress, PullWaits
from jobfetcher.core.run import Exit, Image, Outcome
from jobfetcher.engine.docker import DockerEngine
from jobfetcher.engine.images import ImagePolicy
from jobfetcher.housekeeping import Housekeeper
from jobfetcher.journal import Journal
from jobfetcher.testing.fake_engine import FakeEngine
from jobfetcher.tree import disk_usage
from jobfetcher.workspace import Base, engines_disk
from tests.support.boxes import Bench, no_progress
from tests.support.jobs import Emitted, make_job
from tests.support.mounts import break_ext4, ext4, failing_ext4, fill, make_ext4, mounted_ext4, needs_root, tmpfs
from tests.support.services import Registry, wait_until
from tests.support.trees import names_in
from tests.support.worker import Lab, running_worker

pytestmark = needs_root

DAY = 86_400.0
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 disk of 64 MiB; of so small a one, half is the reserve."""
    with ext4(tmp_path / "disk") as mounted:
        yield mounted


class ImagesOnDisk(FakeEngine):
    """An engine in memory whose images take real room in `root`, as the engine's own directory does."""

    def __init__(self, root: Path, mib: float) -> None:
        super().__init__()
        self.root = root
        self.pulls = 0
        self._size = int(mib * MIB)

    def prepare(self, reference: str, halt: Halt, progress: PullProgress, waits: PullWaits | None = None) -> Image:
        found = super().prepare(reference, halt, progress, waits)
        file = self.root / found.id
        pulled = not file.exists()
        if pulled:
            self.pulls += 1
            file.write_bytes(b"x" * self._size)
        return Image(found.id, reference, found.digest, found.architecture, self._size, pulled)

    def forget_image(self, image_id: str, reference: str) -> bool:
        if any(container.spec.image_id == image_id for container in self.containers):
            return False
        (self.root / image_id).unlink(missing_ok=True)
        return True


# -- D1 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("D1")
def test_no_job_is_taken_below_the_reserve_of_either_disk(tmp_path: Path, disk: Path) -> None:
    with ext4(tmp_path / "engines") as engines, Base(disk) as base:
        base.also_watch(engines_disk(engines))
        base.check_room()
        assert sum(base.free_bytes().values()) > 100 * MIB
        for full in (disk, engines):
            file = fill(full, leave=20 * MIB)
            with pytest.raises(WorkerFault, match=r"has less than 0\.0\d+ GiB free \(RESERVE_DISK\)") as fault:
                base.check_room()
            assert fault.value.reason is WorkerReason.DISK
            assert str(fault.value).startswith(f"{full} ")
            file.unlink()
            base.check_room()  # it recovers by itself


@pytest.mark.fault("D1")
def test_room_is_made_from_leftovers_first_and_then_from_own_images(tmp_path: Path, disk: Path) -> None:
    emitted, now = Emitted(), [1e9]
    with (
        ext4(tmp_path / "engines") as engines,
        Base(disk) as base,
        closing(Journal(disk / "journal.db", wall=lambda: now[0])) as journal,
    ):
        base.also_watch(engines_disk(engines))
        engine = ImagesOnDisk(engines, mib=8)
        keeper = Housekeeper(engine, base, journal, emitted, clock=lambda: 1e9 + DAY)
        for name in ("8", "9"):
            base.job(JobId(name)).create()
            (base.job(JobId(name)).files / "left").write_bytes(b"x" * 15 * MIB)
        base.job(JobId("7")).create()
        journal.claim(JobId("7"), "token", make_job())
        assert base.is_full().startswith(str(disk))
        assert keeper.make_room()
        assert names_in(disk / "jobs") == ["7"]

        now[0] -= 1.0  # the open job was claimed later, so they are not for it
        for number in range(5):
            journal.used_image(engine.prepare(f"image:{number}", Halt(), no_progress))
        (engines / "of somebody else").write_bytes(b"x" * 4 * MIB)
        assert base.is_full().startswith(str(engines))
        assert keeper.make_room()
        left = [image.reference for image in journal.images()]
        assert left == ["image:3", "image:4"] or left == ["image:2", "image:3", "image:4"]  # no more than is needed
        assert len(emitted.named("image_removed")) == 5 - len(left)

        fill(engines)
        assert not keeper.make_room()  # then it is a person's turn
        assert journal.images() == []
        assert (engines / "of somebody else").exists()
        assert base.is_full()


# -- D2, D5 -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("D2")
def test_what_does_not_fit_is_refused_and_a_full_disk_still_has_a_journal(disk: Path) -> None:
    with Base(disk) as base, closing(Journal(disk / "journal.db")) as journal:
        journal.claim(JobId("7"), "token", make_job())
        base.room_for(10 * MIB)
        with pytest.raises(WorkerFault, match="40 MiB more do not fit"):
            base.room_for(40 * MIB)
        base.job(JobId("7")).create()
        fill(disk)
        with pytest.raises(WorkerFault, match="No space left on device") as fault:
            _create_many(base, 10_000)  # the last few blocks are taken by folders
        assert fault.value.reason is WorkerReason.DISK
        # How the job ends can be written all the same: the ballast makes room.
        journal.settling(JobId("7"), Outcome(message="m" * 100_000))
        assert not (disk / "journal.ballast").exists()
        base.job(JobId("7")).remove()
        journal.forget(JobId("7"))
        assert journal.records() == []


def _create_many(base: Base, count: int) -> None:
    for number in range(count):
        base.job(JobId(f"8-{number}")).create()


@pytest.mark.fault("D5")
def test_a_journal_that_cannot_be_written_keeps_what_it_had(disk: Path) -> None:
    with closing(Journal(disk / "journal.db")) as journal:
        journal.claim(JobId("7"), "token", make_job())
        done = ["7"]

        def claim_more() -> None:
            for number in range(1000):
                fill(disk)
                journal.claim(JobId(f"8-{number}"), "token", make_job(f"8-{number}", env={"BIG": "x" * 100_000}))
                done.append(f"8-{number}")

        with pytest.raises(WorkerFault, match="journal cannot be written") as fault:
            claim_more()
        assert fault.value.reason is WorkerReason.DISK
        assert len(done) > 1  # the ballast took the first ones
        before = journal.records()
        assert [record.id for record in before] == done
        for _ in range(3):
            with pytest.raises(WorkerFault, match="journal cannot be written"):
                journal.settling(JobId("7"), Outcome(message="m" * 5_000_000))
        assert journal.records() == before  # the phase did not advance
    with closing(Journal(disk / "journal.db")) as journal:  # so does the next start find it
        assert (journal.damage, journal.records()) == ("", before)
        for filler in disk.glob("filler-*"):
            filler.unlink()
        journal.settling(JobId("7"), Outcome(message="m" * 5_000_000))
        settled = journal.record(JobId("7"))
        assert settled is not None
        assert settled.phase is Phase.SETTLING


# -- D6 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("D6")
def test_a_disk_that_went_read_only_takes_no_job_and_is_fine_when_it_is_mounted_again(tmp_path: Path) -> None:
    image = make_ext4(tmp_path / "image")
    with (
        mounted_ext4(image, tmp_path / "disk") as disk,
        Base(disk) as base,
        closing(Journal(disk / "journal.db")) as journal,
    ):
        base.job(JobId("7")).create()
        journal.claim(JobId("7"), "token", make_job())
        before = journal.records()
        keeper = Housekeeper(FakeEngine(), base, journal, Emitted())
        (disk / "jobs/left").mkdir()
        assert base.is_full() == ""
        os.sync()
        break_ext4(disk)
        for trouble in (base.is_full(), base.is_full()):
            assert trouble.startswith(f"{disk} ")
            assert "read-only" in trouble.lower()
        assert not keeper.make_room()  # nothing can be deleted, and nothing is raised
        with pytest.raises(WorkerFault, match="Read-only file system"):
            base.job(JobId("8")).create()
        with pytest.raises(WorkerFault, match=r"cannot be cleared away: .*Read-only file system"):
            base.job(JobId("7")).restore({})
        with pytest.raises(WorkerFault, match="journal cannot be written"):
            journal.advance(JobId("7"), Phase.STAGING_IN)
        with pytest.raises(OSError, match="Read-only file system"):
            base.quarantine("7", "why")
        assert journal.records() == before
    # A copy: while a container that is just being made has the old mount in its view, that is what would come back.
    copy = shutil.copyfile(image, tmp_path / "copy")
    with mounted_ext4(copy, disk), Base(disk) as base, closing(Journal(disk / "journal.db")) as journal:
        base.check_room()
        assert (journal.damage, journal.records()) == ("", before)
        journal.advance(JobId("7"), Phase.STAGING_IN)
        assert base.job(JobId("7")).restore({}) == {}
        assert base.leftovers(frozenset({JobId("7")})) == ["left"]


@pytest.mark.fault("D6")
def test_a_disk_that_loses_what_was_written_is_noticed_before_the_journal_says_so(tmp_path: Path) -> None:
    with failing_ext4(tmp_path / "disk") as disk, Base(disk, reserve_mib=0) as base:
        workspace = base.job(JobId("7"))
        workspace.create()
        workspace.sync()
        with (workspace.files / "output").open("wb") as output:
            for _ in range(32):
                output.write(b"x" * MIB)  # the page cache takes it all
        # the loop device's word, or ext4's own where the kernel wrote back first and has made it read-only by now
        words = "Input/output error|No space left|Read-only file system"
        with pytest.raises(WorkerFault, match=f"takes no writes: ({words})") as fault:
            workspace.sync()
        assert fault.value.reason is WorkerReason.DISK


@pytest.mark.fault("D6")
def test_a_disk_that_runs_out_of_inodes_under_a_job_is_full(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "16m,nr_inodes=200") as disk, Base(disk, reserve_mib=1) as base:
        workspace = base.job(JobId("7"))
        workspace.create()
        assert base.is_full() == ""
        with contextlib.suppress(OSError):
            for number in range(1000):
                (workspace.files / f"{number}").touch()
        assert base.is_full() == f"{disk} has hardly any inodes left; delete small files on that disk"
        with pytest.raises(WorkerFault, match="No space left on device"):
            base.job(JobId("8")).create()
        base.job(JobId("8")).remove()
        workspace.remove()
        base.check_room()


# -- D3: how a job's use is measured ----------------------------------------------------------------------------------


@pytest.mark.fault("D3")
def test_what_a_job_takes_of_its_disk_is_what_the_disk_lost(disk: Path) -> None:
    with Base(disk) as base:
        workspace = base.job(JobId("7"))
        workspace.create()
        before = disk_free(disk)
        for folder in range(20):
            (workspace.files / f"{folder}").mkdir()
            for number in range(20):
                (workspace.files / f"{folder}/{number}").write_bytes(b"x" * 3000 * number)
            os.link(workspace.files / f"{folder}/19", workspace.files / f"{folder}/again")
        os.sync()
        assert abs((before - disk_free(disk)) - workspace.taken().bytes) < 100_000


# -- D7 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("D7")
def test_five_hundred_jobs_leave_nothing_but_what_is_not_ours(tmp_path: Path, disk: Path) -> None:
    """Twenty images of 3 MiB do not fit on this disk: those that were used longest ago go, and come again."""
    jobs, now = 500, [1e9]
    with (
        tmpfs(tmp_path / "fast", "16m") as fast,  # it is the slowest part, and not what is looked at here
        Base(disk, reserve_mib=2) as base,
        closing(Journal(fast / "journal.db", wall=lambda: now[0])) as journal,
    ):
        (disk / "engine").mkdir()
        engine = ImagesOnDisk(disk / "engine", mib=3)
        keeper = Housekeeper(engine, base, journal, Emitted(), clock=lambda: now[0])
        engine.prepare("foreign:1", Halt(), no_progress)
        foreign = names_in(disk / "engine")
        at_first = disk_usage(disk)
        bench = Bench(engine, Image("", "", None, "amd64"), disk, "worker")
        fullest = 0.0
        for number in range(jobs):
            job = JobId(f"{number}")
            base.check_room()
            journal.claim(job, "token", make_job(job))
            base.job(job).create()
            (base.job(job).files / "output").write_bytes(b"x" * 10_000)
            journal.advance(job, Phase.STAGING_IN)
            kind = number % 20 if number % 3 == 0 else number % 4  # four of them are asked for again and again
            image = engine.prepare(f"image:{kind}", Halt(), no_progress)
            journal.used_image(image)
            journal.running(job, Share(1.0, 64), image)
            container = engine.start(bench.spec("true", job_id=job, image=image))
            journal.exited(job, Exit(0))
            keeper.tidy()  # while the job still runs
            assert (disk / "engine" / image.id).exists()
            fullest = max(fullest, base.fullness())
            journal.settling(job, Outcome())
            container.remove()
            base.job(job).remove()
            journal.forget(job)
            now[0] += 1800
        assert 21 < engine.pulls < jobs / 2  # the others had to be pulled again
        assert fullest < 0.95
        assert len(journal.images()) > 10  # as many as there is room for
        now[0] += 8 * DAY
        keeper.tidy()
        assert journal.images() == []
        assert names_in(disk / "engine") == foreign
        assert names_in(disk / "jobs") == []
        assert engine.containers == []
    assert disk_usage(disk) - at_first < MIB


@pytest.mark.docker
@pytest.mark.registry
@pytest.mark.fault("D7")
def test_only_images_that_this_worker_pulled_go_from_the_engine(
    tmp_path: Path, engine: docker.APIClient, busybox: str, registry: Registry
) -> None:
    """On the real engine: pulled ones go; a person's, one that a container uses and one with another name stay."""
    repository = f"{registry.address}/tests/{uuid4().hex[:8]}"
    names = {name: f"{repository}:{name}" for name in ("idle", "used", "named", "foreign")}
    emitted, now = Emitted(), [1e9]
    worker = DockerEngine(f"test{uuid4().hex[:8]}", images=ImagePolicy(), emit=emitted)
    container = ""
    try:
        for name, reference in names.items():
            _build(engine, busybox, reference, name)
            engine.push(repository, name)
            if name != "foreign":
                engine.remove_image(reference)
        with (
            Base(tmp_path / "base", reserve_mib=0) as base,
            closing(Journal(tmp_path / "journal.db", wall=lambda: now[0])) as journal,
        ):
            keeper = Housekeeper(worker, base, journal, emitted, clock=lambda: now[0])
            for reference in names.values():
                image = worker.prepare(reference, Halt(), no_progress)
                assert image.pulled == (reference != names["foreign"])
                journal.used_image(image)
            container = engine.create_container(names["used"], ["true"])["Id"]
            engine.tag(names["named"], repository, "by-a-person")
            now[0] += 6 * DAY
            keeper.tidy()
            assert _present(engine, repository) == {*names, "by-a-person"}
            now[0] += 2 * DAY
            keeper.tidy()
            assert _present(engine, repository) == {"used", "named", "foreign", "by-a-person"}
            assert {image.reference for image in journal.images()} == {names["used"], names["named"]}
            engine.remove_container(container)
            container = ""
            keeper.tidy()
            assert _present(engine, repository) == {"named", "foreign", "by-a-person"}
            assert emitted.named("tidy_failed") == []
    finally:
        if container:
            engine.remove_container(container, force=True)
        for tag in _present(engine, repository):
            engine.remove_image(f"{repository}:{tag}", force=True)
        worker.close()


# -- a whole worker ---------------------------------------------------------------------------------------------------


@pytest.mark.docker
@pytest.mark.fault("D1")
def test_a_worker_takes_no_job_until_there_is_room(lab: Lab, disk: Path) -> None:
    here = replace(lab, base=disk / "base")
    filler = fill(disk, leave=15 * MIB)
    job = here.submit("echo done > /files/out/x", files_up={"output": "out"})
    with running_worker(here.settings(reserve_disk="20"), lambda taken, idle_s: taken >= 1) as worker:
        worker.heard.wait_for("not_polling")
        said = f"no job can be taken: {here.base} has less than 0.02 GiB free (RESERVE_DISK); make room there"
        assert worker.heard.messages("not_polling") == [said]
        assert here.ended(job)[0] == "queued"
        filler.unlink()
        worker.join()
    assert here.ended(job) == ("finished", "")
    assert len(worker.heard.all("not_polling")) == 1
    assert names_in(here.base / "jobs") == []


@pytest.mark.docker
@pytest.mark.fault("D3")
def test_a_job_that_fills_the_disk_is_stopped_before_the_disk_is_full(lab: Lab, disk: Path) -> None:
    here = replace(lab, base=disk / "base")
    reserve = 20 * MIB
    job = here.submit("dd if=/dev/zero of=/files/big bs=1M count=32; sleep 60", files_up={"output": "out"})
    lowest = disk_free(disk)

    def ended() -> bool:
        nonlocal lowest
        lowest = min(lowest, disk_free(disk))
        return bool(worker.heard.all("job_ended"))

    with running_worker(here.settings(reserve_disk="20"), lambda taken, idle_s: taken >= 1) as worker:
        wait_until(ended, "the job's end")
        worker.join()
    assert "stopped: the job filled the disk (it used " in here.ended(job)[1]
    assert reserve / 2 < lowest < reserve
    assert names_in(here.base / "jobs") == []
    assert disk_free(disk) > 2 * reserve


@pytest.mark.docker
@pytest.mark.fault("D6")
def test_a_worker_whose_disk_goes_read_only_takes_no_job_and_does_not_die(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []
    real = Base.is_full

    def is_full(self: Base) -> str:
        tries.append(real(self))
        return tries[-1]

    monkeypatch.setattr(Base, "is_full", is_full)
    with mounted_ext4(make_ext4(tmp_path / "image"), tmp_path / "disk") as disk:
        here = replace(lab, base=disk / "base")
        with running_worker(here.settings()) as worker:
            first = here.submit("true")
            wait_until(lambda: here.ended(first)[0] == "finished", "the first job's end")
            wait_until(lambda: names_in(here.base / "jobs") == [], "its directory is gone")
            break_ext4(disk)
            worker.heard.wait_for("not_polling")
            second, sofar = here.submit("true"), len(tries)
            wait_until(lambda: len(tries) >= sofar + 4, "it tries again")
            assert here.ended(second)[0] == "queued"
            assert len(worker.heard.all("not_polling")) == 1
            assert "read-only" in worker.heard.messages("not_polling")[0].lower()
        # started anew by a supervisor, it says why in one sentence
        with pytest.raises(ConfigError, match="Read-only file system"), running_worker(here.settings()) as worker:
            worker.join()
        assert here.ended(second)[0] == "queued"
    here.server.delete(second)


def disk_free(folder: Path) -> int:
    """Bytes free for anyone on the disk of a folder."""
    return shutil.disk_usage(folder).free


def _build(engine: docker.APIClient, base: str, reference: str, label: str) -> None:
    """An image of its own on `base`, that differs from others by a label."""
    dockerfile = io.BytesIO(f'FROM {base}\nLABEL tests.name="{label}-{uuid4().hex}"\n'.encode())
    for _ in engine.build(fileobj=dockerfile, tag=reference, rm=True):
        pass


def _present(engine: docker.APIClient, repository: str) -> set[str]:
    """The tags of a repository that the engine has."""
    tags = [name for image in engine.images() for name in image["RepoTags"] or ()]
    return {tag.removeprefix(f"{repository}:") for tag in tags if tag.startswith(f"{repository}:")}
