"""self_test: when this machine is tested, what a broken GPU costs, and how it comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobfetcher.core.errors import ConfigError, JobfetcherError, WorkerFault, WorkerReason
from jobfetcher.core.machine import Share
from jobfetcher.core.run import RunSpec
from jobfetcher.engine.run_spec import BoxPolicy, build_proof_spec
from jobfetcher.self_test import FOLDER, GPU_S, IDLE_S, RETRY_S, SelfTest
from jobfetcher.testing.fake_engine import FakeEngine
from tests.support.gpus import A4000, TITAN, ListedGpus

ENGINE = WorkerFault(WorkerReason.ENGINE, "no box starts")
GPU = WorkerFault(WorkerReason.GPU, "the GPU cannot be given")
INSIDE = WorkerFault(WorkerReason.GPU, "nvidia-smi fails in a container")


class Bench:
    def __init__(self, path: Path, *gpus: object) -> None:
        self.now = 1000.0
        self.engine = FakeEngine()
        self.gpus = ListedGpus(*gpus)  # type: ignore[arg-type]
        self.base = path
        self.test = SelfTest(
            engine=self.engine,
            make_spec=lambda held: build_proof_spec(
                Share(1.0, 64, tuple(held)), files_host_path=str(path / FOLDER), policy=BoxPolicy()
            ),
            base=path,
            gpus=self.gpus,
            clock=lambda: self.now,
        )

    def boxes(self) -> list[tuple[tuple[str, ...], str]]:
        """The GPUs and the image of each box that ran since the last call."""
        found = [(spec.gpu_uuids, spec.image_id) for spec in self.engine.proved]
        self.engine.proved.clear()
        return found

    def breaks(self, *gpus: str, with_: JobfetcherError = GPU, image: str | None = None) -> None:
        """Boxes with one of these GPUs fail; with `image`: only on that one."""

        def unfit(spec: RunSpec) -> JobfetcherError | None:
            wrong = set(gpus) & set(spec.gpu_uuids) and image in (None, spec.image_id)
            return with_ if wrong else None

        self.engine.unfit = unfit


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Bench]:
    return lambda *gpus: Bench(tmp_path, *gpus)


@pytest.mark.fault("T23")
def test_it_is_tested_at_the_start_when_asked_and_every_ten_idle_minutes(make: Callable[..., Bench]) -> None:
    bench = make()
    assert bench.test.check(busy=False)
    assert not bench.test.check(busy=False)
    bench.now += IDLE_S
    assert not bench.test.check(busy=True)
    assert bench.test.check(busy=False)
    bench.test.ask()
    assert bench.test.check(busy=True)
    assert bench.boxes() == [((), "")] * 3
    assert not (bench.base / FOLDER).exists()


@pytest.mark.fault("T23")
@pytest.mark.parametrize("wrong", [ENGINE, ConfigError("JOB_NETWORK=brigde")])
def test_one_that_fails_is_due_again_at_once(make: Callable[..., Bench], wrong: JobfetcherError) -> None:
    bench = make()
    bench.engine.unfit = lambda spec: wrong
    for _ in range(3):
        with pytest.raises(type(wrong)):
            bench.test.check(busy=True)
    bench.engine.unfit = lambda spec: None
    assert bench.test.check(busy=True)
    assert not (bench.base / FOLDER).exists()


@pytest.mark.fault("E14")
def test_all_gpus_are_tested_at_once_and_each_in_turn_only_where_that_fails(make: Callable[..., Bench]) -> None:
    bench = make(A4000, TITAN)
    bench.test.check(busy=False)
    assert bench.boxes() == [((A4000.uuid, TITAN.uuid), "")]
    bench.breaks(TITAN.uuid)
    bench.test.ask()
    assert bench.test.check(busy=False)  # the other GPU, and jobs without one, go on
    assert bench.boxes() == [((A4000.uuid, TITAN.uuid), ""), ((), ""), ((A4000.uuid,), ""), ((TITAN.uuid,), "")]
    assert bench.gpus.aside == {TITAN.uuid: str(GPU)}


@pytest.mark.fault("E14")
def test_a_gpu_that_was_set_aside_comes_back_when_its_box_runs(make: Callable[..., Bench]) -> None:
    bench = make(A4000, TITAN)
    bench.breaks(TITAN.uuid)
    bench.test.check(busy=False)
    bench.boxes()
    bench.now += GPU_S - 1
    bench.test.check(busy=True)
    assert bench.boxes() == []
    bench.now += 1
    bench.test.check(busy=True)
    assert bench.boxes() == [((TITAN.uuid,), "")]
    assert bench.gpus.aside
    bench.breaks()
    bench.now += GPU_S
    bench.test.check(busy=True)
    assert bench.gpus.aside == {}


@pytest.mark.fault("E14")
def test_a_machine_that_starts_no_box_at_all_blames_no_gpu(make: Callable[..., Bench]) -> None:
    bench = make(A4000)
    bench.engine.unfit = lambda spec: ENGINE
    with pytest.raises(WorkerFault, match="no box starts"):
        bench.test.check(busy=False)
    assert bench.gpus.aside == {}
    assert "no box starts" in bench.test.lost([A4000], "sha256:1")
    assert bench.gpus.aside == {}


@pytest.mark.fault("E14")
def test_a_failed_job_asks_for_its_own_gpu_inside_a_box_of_its_image(make: Callable[..., Bench]) -> None:
    bench = make(A4000, TITAN)
    bench.test.check(busy=False)
    bench.boxes()
    assert bench.test.lost([], "sha256:1") == ""
    assert bench.test.lost([TITAN], "sha256:1") == ""
    assert bench.boxes() == [((TITAN.uuid,), ""), ((TITAN.uuid,), "sha256:1")]
    bench.breaks(TITAN.uuid, with_=INSIDE, image="sha256:1")
    assert bench.test.lost([TITAN], "sha256:1") == (
        f"GPU {TITAN.model} ({TITAN.uuid}) does not work in a container: {INSIDE}"
    )
    assert bench.gpus.aside == {TITAN.uuid: str(INSIDE)}  # it had answered in this very image


@pytest.mark.fault("E14", "T23")
def test_an_image_in_which_no_gpu_answers_takes_none_from_others(make: Callable[..., Bench]) -> None:
    """It may have libraries of its own that NVIDIA's program stumbles over, or want to do harm."""
    bench = make(TITAN)
    assert bench.test.lost([TITAN], "sha256:good") == ""
    bench.breaks(TITAN.uuid, with_=INSIDE, image="sha256:broken")
    assert bench.test.lost([TITAN], "sha256:broken") == "", "the job keeps its own end"
    assert bench.gpus.aside == {}


@pytest.mark.fault("E14", "T23")
def test_an_image_that_is_gone_bears_no_witness_against_a_gpu(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(TITAN)
    assert bench.test.lost([TITAN], "sha256:good") == ""
    bench.breaks(TITAN.uuid, with_=INSIDE, image="sha256:broken")
    prove = bench.engine.prove
    monkeypatch.setattr(
        bench.engine, "prove", lambda spec, folder: spec.image_id != "sha256:good" and prove(spec, folder)
    )
    assert str(INSIDE) in bench.test.lost([TITAN], "sha256:broken"), "the job is given back"
    assert bench.gpus.aside == {}, "by the word of one image alone"


@pytest.mark.fault("E14", "T23")
def test_where_no_image_ever_answered_one_gives_its_job_back_and_two_are_believed(make: Callable[..., Bench]) -> None:
    bench = make(TITAN)
    bench.breaks(TITAN.uuid, with_=INSIDE, image="sha256:1")
    assert str(INSIDE) in bench.test.lost([TITAN], "sha256:1")
    assert str(INSIDE) in bench.test.lost([TITAN], "sha256:1")
    assert bench.gpus.aside == {}
    bench.breaks(TITAN.uuid, with_=INSIDE, image="sha256:2")
    assert str(INSIDE) in bench.test.lost([TITAN], "sha256:2")
    assert bench.gpus.aside


@pytest.mark.fault("E14")
def test_what_failed_inside_boxes_comes_back_when_it_answers_in_one_of_them(make: Callable[..., Bench]) -> None:
    bench = broken_inside(make)
    for _ in range(2):
        bench.test.ask()
        bench.test.check(busy=False)  # the box alone starts well
        assert bench.gpus.aside
        bench.now += GPU_S
        bench.test.check(busy=True)
        assert bench.gpus.aside
    bench.breaks(TITAN.uuid, with_=INSIDE, image="sha256:1")  # in the other one it answers
    bench.now += GPU_S
    bench.test.check(busy=True)
    assert bench.gpus.aside == {}


@pytest.mark.fault("E14")
def test_what_failed_inside_boxes_is_tried_again_after_half_an_hour(make: Callable[..., Bench]) -> None:
    bench = broken_inside(make)
    bench.now += RETRY_S
    bench.test.check(busy=True)
    assert bench.gpus.aside == {}
    assert bench.test.lost([TITAN], "sha256:1"), "and it begins anew"
    assert bench.gpus.aside == {}


@pytest.mark.fault("E14")
def test_a_gpu_that_stops_answering_where_it_did_is_set_aside_until_it_answers(make: Callable[..., Bench]) -> None:
    bench = make(A4000, TITAN)
    assert bench.test.lost([TITAN], "sha256:1") == ""
    bench.breaks(TITAN.uuid, with_=INSIDE, image="sha256:1")
    bench.test.ask()
    bench.test.check(busy=False)
    assert bench.gpus.aside == {TITAN.uuid: str(INSIDE)}
    bench.now += 10 * RETRY_S
    bench.test.check(busy=True)
    assert bench.gpus.aside, "this image is to be believed"
    bench.breaks()
    bench.now += GPU_S
    bench.test.check(busy=True)
    assert bench.gpus.aside == {}


def broken_inside(make: Callable[..., Bench]) -> Bench:
    """With a GPU that was set aside because it answered in neither of two images, and never in any."""
    bench = make(A4000, TITAN)

    def unfit(spec: RunSpec) -> JobfetcherError | None:
        return INSIDE if TITAN.uuid in spec.gpu_uuids and spec.image_id else None

    bench.engine.unfit = unfit
    bench.test.check(busy=False)
    for image in ("sha256:1", "sha256:2"):
        assert bench.test.lost([TITAN], image)
    assert bench.gpus.aside == {TITAN.uuid: str(INSIDE)}
    return bench


@pytest.mark.fault("E14")
def test_the_image_in_which_gpus_answered_is_used_for_later_tests(make: Callable[..., Bench]) -> None:
    bench = make(A4000)
    bench.test.lost([A4000], "sha256:1")
    bench.boxes()
    bench.test.ask()
    bench.test.check(busy=False)
    assert bench.boxes() == [((A4000.uuid,), ""), ((A4000.uuid,), "sha256:1")]


@pytest.mark.fault("D6")
def test_a_directory_that_cannot_be_made_is_the_disks_fault(tmp_path: Path, make: Callable[..., Bench]) -> None:
    bench = make()
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "left by a killed one").touch()
    bench.test.check(busy=False)
    assert not (tmp_path / FOLDER).exists()
    tmp_path.rmdir()
    bench.test.ask()
    with pytest.raises(WorkerFault) as seen:
        bench.test.check(busy=False)
    assert seen.value.reason is WorkerReason.DISK
    tmp_path.mkdir()
