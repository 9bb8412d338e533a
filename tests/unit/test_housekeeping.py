"""housekeeping: which images go and which stay, what makes room, and that nothing else is touched."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobfetcher.core.errors import JobfetcherError, WorkerFault, WorkerReason
from jobfetcher.core.job import JobId
from jobfetcher.core.machine import Share
from jobfetcher.core.phases import Phase
from jobfetcher.core.run import Image
from jobfetcher.housekeeping import Housekeeper
from jobfetcher.journal import Journal
from jobfetcher.testing.fake_engine import FakeEngine
from jobfetcher.workspace import Base
from tests.support.jobs import Emitted, make_job
from tests.support.trees import names_in

DAY = 86_400.0
AWAY = WorkerFault(WorkerReason.ENGINE, "the engine does not answer")


class Images(FakeEngine):
    """An engine with a shelf of images; `kept` are those that it does not let go of (a container uses them)."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf: dict[str, str] = {}
        self.kept: set[str] = set()
        self.asked: list[str] = []

    def forget_image(self, image_id: str, reference: str) -> bool:
        self.check()
        self.asked.append(reference)
        assert self.shelf.get(reference, image_id) == image_id
        if reference in self.kept:
            return False
        self.shelf.pop(reference, None)
        return True


@dataclass
class House:
    """A housekeeper with all it needs; `now` is the wall clock of it and its journal."""

    base: Base
    path: Path
    now: float = 1_000_000_000.0
    engine: Images = field(default_factory=Images)
    emitted: Emitted = field(default_factory=Emitted)

    def __post_init__(self) -> None:
        self.journal = Journal(self.path / "journal.db", wall=lambda: self.now)
        self.keeper = Housekeeper(
            self.engine, self.base, self.journal, self.emitted, keep_s=7 * DAY, clock=lambda: self.now
        )

    def pull(self, reference: str, *, days_ago: float = 0.0) -> Image:
        """What a job does that needs an image: it is pulled and entered into the journal, at that time."""
        image = Image(f"sha256:{reference}", reference, None, "amd64", size_bytes=3 << 20, pulled=True)
        self.engine.shelf[reference] = image.id
        self.now -= days_ago * DAY
        self.journal.used_image(image)
        self.now += days_ago * DAY
        return image

    def images(self) -> list[str]:
        """What the engine has, after checking that the journal has the same."""
        assert sorted(image.reference for image in self.journal.images()) == sorted(self.engine.shelf)
        return sorted(self.engine.shelf)

    def run(self, job_id: str, image: Image) -> None:
        """A job that runs that image."""
        self.journal.claim(JobId(job_id), "token", make_job(job_id))
        self.journal.advance(JobId(job_id), Phase.STAGING_IN)
        self.journal.running(JobId(job_id), Share(1.0, 100), image)


@contextmanager
def a_house(path: Path) -> Iterator[House]:
    with Base(path / "base", reserve_mib=0) as base:
        house = House(base, path)
        with closing(house.journal):
            yield house


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(Base, "fullness", lambda self: 0.5)
    with a_house(tmp_path) as made:
        yield made


@pytest.mark.fault("D7")
def test_an_image_waits_with_its_job_however_long_that_takes(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pulled while inputs come for hours, or by a job that was prefetched: no container names it yet."""
    house.pull("other", days_ago=2)
    house.journal.claim(JobId("7"), "token", make_job("7"))
    house.journal.advance(JobId("7"), Phase.STAGING_IN)
    house.pull("its own")
    house.now += DAY
    monkeypatch.setattr(Base, "fullness", lambda self: 0.9)
    monkeypatch.setattr(Base, "is_full", lambda self: "no room")
    house.keeper.tidy()
    assert not house.keeper.make_room()
    assert house.images() == ["its own"]
    house.journal.forget(JobId("7"))
    house.keeper.tidy()
    assert house.images() == []


@pytest.mark.fault("D7")
def test_images_that_no_job_used_for_a_week_go_and_others_stay(house: House) -> None:
    house.pull("old", days_ago=7.1)
    house.pull("older", days_ago=300)
    house.pull("recent", days_ago=6.9)
    house.pull("new")
    house.engine.shelf["foreign"] = "sha256:foreign"
    house.keeper.tidy()
    assert house.engine.asked == ["older", "old"]  # the oldest first, and never what the journal does not know
    assert sorted(house.engine.shelf) == ["foreign", "new", "recent"]
    assert [image.reference for image in house.journal.images()] == ["recent", "new"]
    assert house.emitted.named("image_removed") == [
        {"message": "removed the image older (3 MiB), unused for 300.0 days"},
        {"message": "removed the image old (3 MiB), unused for 7.1 days"},
    ]
    house.keeper.tidy()
    assert len(house.engine.asked) == 2


@pytest.mark.fault("D7")
def test_an_image_that_is_used_again_begins_anew(house: House) -> None:
    image = house.pull("image", days_ago=100)
    house.journal.used_image(image)
    house.keeper.tidy()
    assert house.images() == ["image"]
    house.now += 8 * DAY
    house.keeper.tidy()
    assert house.images() == []


@pytest.mark.fault("D7")
def test_what_a_job_runs_is_not_even_asked_for(house: House) -> None:
    house.run("7", house.pull("running", days_ago=30))
    house.pull("idle", days_ago=20)
    house.keeper.tidy()
    assert house.engine.asked == ["idle"]
    house.journal.forget(JobId("7"))
    house.keeper.tidy()
    assert house.images() == []


@pytest.mark.fault("D7")
def test_what_the_engine_keeps_stays_ours_and_is_asked_for_again(house: House) -> None:
    house.pull("in use", days_ago=30)
    house.pull("idle", days_ago=20)
    house.engine.kept.add("in use")
    house.keeper.tidy()
    assert house.images() == ["in use"]
    house.engine.kept.clear()
    house.keeper.tidy()
    assert house.images() == []
    assert house.engine.asked == ["in use", "idle", "in use"]


def crowd(house: House, monkeypatch: pytest.MonkeyPatch, others: int) -> None:
    """A disk of which other things fill `others` percent and each image on the shelf one more."""
    monkeypatch.setattr(Base, "fullness", lambda self: (others + len(house.engine.shelf)) / 100)


@pytest.mark.fault("D7")
def test_a_crowded_disk_loses_what_was_used_longest_ago(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        house.pull(f"{number}", days_ago=(10 - number) / 2)
    crowd(house, monkeypatch, 75)  # 85 % in all: not above
    house.keeper.tidy()
    assert len(house.images()) == 10
    crowd(house, monkeypatch, 76)
    house.keeper.tidy()
    assert house.images() == ["6", "7", "8", "9"]  # 80 %
    house.keeper.tidy()
    assert len(house.images()) == 4
    crowd(house, monkeypatch, 99)  # not the images' doing, but there is nothing else that may be removed
    house.keeper.tidy()
    assert house.images() == []


@pytest.mark.fault("D7")
def test_an_image_whose_job_is_about_to_start_is_left_alone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.pull("just now")
    monkeypatch.setattr(Base, "fullness", lambda self: 1.0)
    monkeypatch.setattr(Base, "is_full", lambda self: "no room")
    house.keeper.tidy()
    assert not house.keeper.make_room()
    assert house.engine.asked == []
    house.now += 601
    house.keeper.tidy()
    assert house.engine.asked == ["just now"]


@pytest.mark.fault("F6")
def test_a_clock_that_jumps_back_removes_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.pull("image")
    house.now -= 3650 * DAY
    monkeypatch.setattr(Base, "fullness", lambda self: 1.0)
    house.keeper.tidy()
    assert house.images() == ["image"]


@pytest.mark.parametrize("trouble", ["engine", "disk"])
def test_trouble_is_told_once_and_not_raised(house: House, monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    house.pull("old", days_ago=30)

    def fail(self: Base) -> float:
        raise WorkerFault(WorkerReason.DISK, "the disk does not answer")

    for _ in range(2):
        with monkeypatch.context() as broken:
            if trouble == "engine":
                broken.setattr(house.engine, "fault", AWAY)
            else:
                broken.setattr(Base, "fullness", fail)
            for _ in range(3):
                house.keeper.tidy()
        assert house.images() == ["old"]
        house.engine.kept.add("old")
        house.keeper.tidy()  # well again, so that the next trouble is news
    assert [fields["message"] for fields in house.emitted.named("tidy_failed")] == [
        f"could not make room: the {trouble} does not answer"
    ] * 2
    assert house.emitted.levels("tidy_failed") == ["warning"] * 2


# -- make_room --------------------------------------------------------------------------------------------------------


def need(house: House, monkeypatch: pytest.MonkeyPatch, things: int) -> None:
    """A disk that is full until so many leftovers and images are gone from it."""

    def left() -> int:
        return len(house.engine.shelf) + len(names_in(house.base.path / "jobs"))

    enough = left() - things
    monkeypatch.setattr(Base, "is_full", lambda self: "no room" if left() > enough else "")


@pytest.mark.fault("D1")
def test_nothing_is_removed_while_there_is_room(house: House) -> None:
    (house.base.path / "jobs/8").mkdir()
    house.pull("image", days_ago=30)
    assert house.keeper.make_room()
    assert names_in(house.base.path / "jobs") == ["8"]
    assert house.images() == ["image"]


@pytest.mark.fault("D1")
def test_leftovers_go_first_and_then_images_as_many_as_are_needed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("7", "8", "9.deep5"):
        (house.base.path / "jobs" / name / "files").mkdir(parents=True)
    house.run("7", house.pull("running", days_ago=9))
    for number in range(4):
        house.pull(f"{number}", days_ago=(4 - number) / 10)
    with monkeypatch.context() as patch:
        need(house, patch, 2)
        assert house.keeper.make_room()
    assert names_in(house.base.path / "jobs") == ["7"]
    assert house.engine.asked == []
    with monkeypatch.context() as patch:
        need(house, patch, 2)
        assert house.keeper.make_room()
    assert house.images() == ["2", "3", "running"]
    with monkeypatch.context() as patch:
        need(house, patch, 3)
        assert not house.keeper.make_room()
    assert house.images() == ["running"]
    assert names_in(house.base.path / "jobs") == ["7"]


@pytest.mark.fault("D1")
def test_leftovers_go_while_the_engine_is_away(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    (house.base.path / "jobs/8").mkdir()
    house.pull("image", days_ago=30)
    house.engine.fault = AWAY
    need(house, monkeypatch, 1)
    assert house.keeper.make_room()
    assert names_in(house.base.path / "jobs") == []
    assert house.emitted.levels("leftover_removed") == ["warning"]


@pytest.mark.fault("E13", "T27")
def test_what_this_worker_may_not_delete_is_named_when_there_is_no_room(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is taken while the disk is full, and the reason given each time names what fills it."""
    (house.base.path / "jobs/8/files").mkdir(parents=True)
    (house.base.path / "jobs/8/files/stays").write_bytes(b"x" * (2 << 20))

    def refuse(parent: Path, name: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("jobfetcher.tree.remove", refuse)
    monkeypatch.setattr(Base, "is_full", lambda self: "no room")
    for _ in range(3):
        with pytest.raises(WorkerFault) as full:
            house.keeper.check_room()
        jobs = house.base.path / "jobs"
        left = f"this worker may not delete what jobs left in {jobs}/8 (2 MiB); delete that as root"
        assert str(full.value) == f"no room; {left}"
        assert full.value.reason is WorkerReason.DISK
    assert len(house.emitted.named("tidy_failed")) == 1


@pytest.mark.fault("J1")
def test_a_directory_that_a_damaged_journal_may_have_lost_is_not_deleted(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("8", "9"):
        (house.base.path / "jobs" / name).mkdir()
    need(house, monkeypatch, 2)
    house.journal.unreadable.append("8")
    assert not house.keeper.make_room()
    assert names_in(house.base.path / "jobs") == ["8"]
    (house.base.path / "jobs/9").mkdir()
    house.journal.damage = "the journal was damaged"
    assert not house.keeper.make_room()
    assert names_in(house.base.path / "jobs") == ["8", "9"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), AWAY])
def test_a_failing_disk_does_not_stop_the_worker(
    house: House, monkeypatch: pytest.MonkeyPatch, error: OSError | JobfetcherError
) -> None:
    def fail(self: Base, known: frozenset[JobId]) -> list[str]:
        raise error

    monkeypatch.setattr(Base, "is_full", lambda self: "no room")
    monkeypatch.setattr(Base, "leftovers", fail)
    assert not house.keeper.make_room()
    assert not house.keeper.make_room()
    assert len(house.emitted.named("tidy_failed")) == 1
