"""What an image declares with VOLUME: below /files it lies in the job's directory, elsewhere it is measured."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import docker
import pytest

from jobfetcher.core.errors import JobFault, JobReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.run import Image, RunSpec
from jobfetcher.workspace import Workspace
from tests.support.boxes import LONG_S, DockerBench, no_progress
from tests.support.mock_server import running_mock_api
from tests.support.worker import Lab, work

pytestmark = pytest.mark.docker

MIB = 1024 * 1024


@pytest.fixture
def declaring(engine: docker.APIClient, busybox: str) -> Iterator[Callable[..., str]]:
    """Make an image that declares these volumes, of the tests' image and what `command` changes in it first."""
    made: list[str] = []

    def make(*volumes: str, command: str = "true") -> str:
        container = engine.create_container(busybox, ["/bin/sh", "-c", command])["Id"]
        try:
            engine.start(container)
            engine.wait(container)
            repository = f"jobfetcher-test/volumes-{uuid4().hex[:8]}"
            # the engine's own words: a Dockerfile's VOLUME takes more than one path
            engine.commit(container, repository, "1", conf={"Volumes": {volume: {} for volume in volumes}})
        finally:
            engine.remove_container(container, v=True)
        made.append(f"{repository}:1")
        return made[-1]

    yield make
    for reference in made:
        engine.remove_image(reference, force=True)


def ready(bench: DockerBench, image: Image, command: str) -> RunSpec:
    """A spec, its folders made as the runner makes them."""
    spec = bench.spec(command, image=image)
    Workspace(bench.files.parent).make_folders(spec.folders)
    return spec


def prepared(bench: DockerBench, reference: str) -> Image:
    return bench.engine.prepare(reference, Halt(), no_progress)


def volumes_of(engine: docker.APIClient) -> set[str]:
    return {str(volume["Name"]) for volume in engine.volumes()["Volumes"] or ()}


# -- below /files ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("J6", "T4")
@pytest.mark.parametrize(
    ("volume", "folder"),
    [
        ("/files/out", "out"),
        ("/files/deep/er/out", "deep/er/out"),
        ("//files/./x/../out/", "out"),
        ("/files/größe und mehr", "größe und mehr"),
        ("/files", "out"),
    ],
)
def test_what_is_written_below_files_stays(
    bench: DockerBench, engine: docker.APIClient, declaring: Callable[..., str], volume: str, folder: str
) -> None:
    before = volumes_of(engine)
    image = prepared(bench, declaring(volume))
    spec = ready(bench, image, f"mkdir -p '/files/{folder}' && echo kept > '/files/{folder}/result'")
    end, printed = bench.run(spec)
    assert (end.code, printed) == (0, "")
    assert (bench.files / folder / "result").read_text() == "kept\n"
    assert volumes_of(engine) <= before


def test_inputs_below_a_volume_are_seen_and_any_user_may_write_there(
    bench: DockerBench, declaring: Callable[..., str]
) -> None:
    image = prepared(bench, declaring("/files/data", "/files/out"))
    (bench.files / "data").mkdir(mode=0o777)
    (bench.files / "data/in.txt").write_text("input\n")
    spec = replace(ready(bench, image, "cat /files/data/in.txt && cp /files/data/in.txt /files/out/"), user="1234:1234")
    end, printed = bench.run(spec)
    assert (end.code, printed) == (0, "input")
    assert (bench.files / "out/in.txt").read_text() == "input\n"


@pytest.mark.fault("T11")
def test_a_job_cannot_put_a_link_in_the_way_of_its_mounts(
    bench: DockerBench, engine: docker.APIClient, declaring: Callable[..., str], tmp_path: Path
) -> None:
    """A person who restarts the container would have the engine follow it, with the rights of root."""
    secret = tmp_path / "secret"
    (secret / "b").mkdir(parents=True)
    image = prepared(bench, declaring("/files/a/b"))
    attack = (
        f"mv /files/a /files/x; rm -rf /files/a; rmdir /files/a/b; ln -sfn {secret} /files/a; touch /files/a/b/mine"
    )
    spec = ready(bench, image, f"{attack}; exit 0")
    container = bench.engine.start(spec)
    assert container.wait(LONG_S) is not None
    engine.restart(container.id)
    engine.wait(container.id)
    container.remove()
    assert list((secret / "b").iterdir()) == []
    assert (bench.files / "a").is_dir()
    assert not (bench.files / "a").is_symlink()


@pytest.mark.fault("E8")
@pytest.mark.parametrize(
    ("volume", "words"),
    [
        ("files/out", "its path must begin with /"),
        ("/", "where none can be"),
        ("/proc/driver", "where none can be"),
        ("/files/a\nb", "no name for a folder"),
        ("/files/" + "x" * 256, "no name for a folder"),
        ("/" + "x/" * 2048, "longer than Linux takes"),
    ],
)
def test_what_no_job_can_have_is_the_images_fault(
    bench: DockerBench, declaring: Callable[..., str], volume: str, words: str
) -> None:
    image = declaring(volume)
    with pytest.raises(JobFault, match=words) as fault:
        prepared(bench, image)
    assert fault.value.reason is JobReason.CANNOT_START
    assert "\n" not in str(fault.value)


@pytest.mark.fault("T12")
def test_so_many_volumes_are_no_programs_need(bench: DockerBench, declaring: Callable[..., str]) -> None:
    many, deep = declaring(*[f"/v{number}" for number in range(101)]), declaring("/files" + "/x" * 101)
    with pytest.raises(JobFault, match="101 volumes, and a job gets at most 100"):
        prepared(bench, many)
    with pytest.raises(JobFault, match="101 mounts below /files"):
        prepared(bench, deep)


def test_an_input_file_where_the_image_wants_a_folder_is_named(
    bench: DockerBench, declaring: Callable[..., str]
) -> None:
    image = prepared(bench, declaring("/files/data.tif"))
    (bench.files / "data.tif").write_bytes(b"image")
    with pytest.raises(JobFault, match=r"'data.tif' \(VOLUME\), which is an input file") as fault:
        ready(bench, image, "true")
    assert fault.value.reason is JobReason.CANNOT_START


@pytest.mark.fault("J6")
@pytest.mark.parametrize("volume", ["/alias/out", "/results"])
def test_a_volume_that_is_a_link_into_files_is_not_run(
    bench: DockerBench, engine: docker.APIClient, declaring: Callable[..., str], volume: str
) -> None:
    image = prepared(bench, declaring(volume, command="ln -s /files /alias; ln -s /files/out /results"))
    with pytest.raises(JobFault, match=r"a link to /files.*outputs there would be lost"):
        bench.engine.start(ready(bench, image, "echo lost > /files/out/result"))
    assert engine.containers(all=True, filters={"label": f"jobfetcher.instance={bench.instance}"}) == []


@pytest.mark.fault("J6")
def test_a_job_of_such_an_image_has_its_outputs(
    engine: docker.APIClient, declaring: Callable[..., str], tmp_path: Path
) -> None:
    image = declaring("/files/out", "/files/other")
    with running_mock_api(tmp_path / "server") as server:
        lab = Lab(server, tmp_path / "base", image, engine)
        ref = server.put_input("in.txt", b"input\n")
        job = lab.submit(
            "cat /files/other/in.txt > /files/out/result",
            files_down={"other/in.txt": ref},
            files_up={"output": "out"},
        )
        work(lab.settings())
        assert server.state(job) == "finished"
        assert server.results(job)["output/out/result"] == b"input\n"


# -- elsewhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("D3")
@pytest.mark.parametrize("who", ["the worker", "the engine"])
def test_a_volume_elsewhere_is_measured_and_goes_with_its_container(
    bench: DockerBench,
    engine: docker.APIClient,
    declaring: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    who: str,
) -> None:
    before = volumes_of(engine)
    image = prepared(bench, declaring("/scratch"))
    if who == "the engine":
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    elif os.geteuid() != 0:
        pytest.skip("without root rights the engine is asked")
    fills = "head -c 20000000 /dev/zero > /scratch/big; head -c 3000000 /dev/zero > /layer"
    container = bench.engine.start(ready(bench, image, fills))
    assert container.wait(LONG_S) is not None
    assert 23_000_000 <= container.written().engine.bytes < 24_000_000
    container.remove()
    assert volumes_of(engine) <= before


@pytest.mark.fault("D3")
def test_the_disk_limit_holds_for_files_layer_and_volumes_together(
    engine: docker.APIClient, declaring: Callable[..., str], tmp_path: Path
) -> None:
    image = declaring("/scratch")
    fills = "for place in /files /scratch /tmp; do head -c 25000000 /dev/zero > $place/big; done; sleep 120"
    with running_mock_api(tmp_path / "server") as server:
        lab = Lab(server, tmp_path / "base", image, engine)
        job = lab.submit(fills)
        work(lab.settings(job_disk_limit="60MiB"))
        said = server.job(job)
        assert said["state"] == "error"
        assert "72 MiB of disk, and JOB_DISK_LIMIT is 60 MiB" in said["details"]
