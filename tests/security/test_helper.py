"""The box that gives a job's files back: an image of ours, nothing of the job in it, the whole policy of jobs (T27)."""

import contextlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import docker
import pytest
from docker.errors import ImageNotFound

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.run import RunSpec
from jobfetcher.engine import give_back
from jobfetcher.engine.api import EngineApi
from jobfetcher.engine.docker import DockerContainer, DockerEngine
from jobfetcher.engine.give_back import Helper
from jobfetcher.engine.run_spec import BoxPolicy
from tests.security.test_box import GOLDEN, differences, reduced
from tests.support.boxes import LOCAL, DockerBench
from tests.support.mounts import tmpfs

pytestmark = [pytest.mark.docker, pytest.mark.fault("T27", "E13")]

THEM = 1234


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """What the engine says of each container just before it is removed."""
    found: list[Mapping[str, Any]] = []
    remove = EngineApi.remove

    def look_and_remove(api: EngineApi, container: str) -> None:
        if (inspected := api.inspect(container)) is not None:
            found.append(inspected)
        remove(api, container)

    monkeypatch.setattr(EngineApi, "remove", look_and_remove)
    return found


@pytest.fixture
def ours(engine: docker.APIClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Helper]:
    """An image like ours that no other test uses: the same program with a word behind it. Gone at the end."""
    architecture = str(engine.version()["Arch"])
    with tarfile.open(fileobj=io.BytesIO(give_back.helper(architecture).archive)) as archive:
        layer = archive.extractfile("layer.tar")
        assert layer is not None
        with tarfile.open(fileobj=layer) as files:
            program = files.extractfile("give_back")
            assert program is not None
            packed = give_back.pack(program.read() + uuid4().hex.encode(), architecture)
    monkeypatch.setattr(give_back, "helper", lambda _: packed)
    yield packed
    for reference in (packed.id, packed.name):
        with contextlib.suppress(ImageNotFound):
            engine.remove_image(reference, force=True)


@pytest.fixture
def theirs(bench: DockerBench) -> Callable[[], int]:
    """The owner of a file in the job's directory that was another user's."""
    (bench.files / "theirs").touch(mode=0)
    os.chown(bench.files / "theirs", THEM, THEM)
    return lambda: (bench.files / "theirs").stat().st_uid


def own_under(policy: BoxPolicy, bench: DockerBench) -> None:
    with contextlib.closing(DockerEngine(bench.instance, images=LOCAL, policy=policy)) as engine:
        engine.own(str(bench.files))


def image(engine: docker.APIClient, reference: str) -> dict[str, Any]:
    """What the engine says of an image; nothing where it has none of that name or id."""
    try:
        found: dict[str, Any] = engine.inspect_image(reference)  # type: ignore[no-untyped-call]
    except ImageNotFound:
        return {}
    return found


# -- the box -----------------------------------------------------------------------------------------------------------


def test_the_helpers_box_is_a_jobs_but_for_what_is_named_here(
    bench: DockerBench, seen: list[Mapping[str, Any]], theirs: Callable[[], int]
) -> None:
    bench.engine.own(str(bench.files))
    [found] = seen
    other = {line.partition(":")[0] for line in differences(json.loads(GOLDEN.read_text()), reduced(found, bench))}
    assert other == {
        "/Config/Cmd",
        "/Config/Env",
        "/Config/User",
        "/Config/Labels/jobfetcher.attempt",
        "/Config/Labels/jobfetcher.job",
        # limited as a job is, to a size of its own
        "/HostConfig/Memory",
        "/HostConfig/MemorySwap",
        "/HostConfig/NanoCpus",
        "/HostConfig/ShmSize",
    }
    config, host = found["Config"], found["HostConfig"]
    assert config["Cmd"] == ["/give_back", f"{os.getuid()}:{os.getgid()}", "/files"]
    assert "NVIDIA_VISIBLE_DEVICES=void" in config["Env"]
    assert {entry.partition("=")[0] for entry in config["Env"]} <= {"NVIDIA_VISIBLE_DEVICES", "PATH"}
    assert (config["User"], config["Labels"]) == ("0", {"jobfetcher.instance": bench.instance})
    assert (host["NetworkMode"], host["Memory"], host["NanoCpus"]) == ("none", 512 << 20, 1e9)
    assert found["Image"] == give_back.helper(str(bench.engine.describe().architecture)).id
    assert theirs() == os.getuid()


def test_what_the_owner_sets_for_jobs_holds_for_the_helper(
    bench: DockerBench, seen: list[Mapping[str, Any]], theirs: Callable[[], int]
) -> None:
    """But for what gives jobs more: no capability beside the base's, no network, and not the jobs' user."""
    policy = BoxPolicy(
        cap_add=("SYS_PTRACE",),
        cpu_shares=33,
        shm_mib=7,
        pids_limit=77,
        network="bridge",
        runtime="io.containerd.runc.v2",
        user="1000:1000",
        read_only=True,
    )
    own_under(policy, bench)
    [found] = seen
    host = found["HostConfig"]
    assert (host["CpuShares"], host["ShmSize"], host["PidsLimit"]) == (33, 7 << 20, 77)
    assert (host["Runtime"], host["ReadonlyRootfs"]) == ("io.containerd.runc.v2", True)
    assert not {"SYS_PTRACE", "CAP_SYS_PTRACE"} & set(host["CapAdd"])
    assert (host["NetworkMode"], found["Config"]["User"]) == ("none", "0")
    assert theirs() == os.getuid()


def test_a_runtime_that_is_not_there_is_not_gone_around(bench: DockerBench, theirs: Callable[[], int]) -> None:
    with pytest.raises(WorkerFault, match="JOB_RUNTIME=kata-that-nobody-has") as fault:
        own_under(BoxPolicy(runtime="kata-that-nobody-has"), bench)
    assert fault.value.reason is WorkerReason.ENGINE, "it may go better later"
    assert str(bench.files) in str(fault.value)
    assert theirs() == THEM


# -- the image ---------------------------------------------------------------------------------------------------------


def test_it_is_imported_once_and_again_when_somebody_removed_it(
    bench: DockerBench, engine: docker.APIClient, ours: Helper, theirs: Callable[[], int]
) -> None:
    assert image(engine, ours.id) == {}
    bench.engine.own(str(bench.files))
    found = image(engine, ours.id)
    assert found["RepoTags"] == [ours.name]
    assert found["RootFS"]["Layers"] == [ours.layer]
    assert theirs() == os.getuid()
    bench.engine.own(str(bench.files))
    assert image(engine, ours.id)["Metadata"] == found["Metadata"], "it was imported anew"
    engine.remove_image(ours.id)
    os.chown(bench.files / "theirs", THEM, THEM)
    bench.engine.own(str(bench.files))
    assert theirs() == os.getuid()


def test_one_that_is_removed_between_look_and_use_is_imported_again(
    bench: DockerBench, engine: docker.APIClient, theirs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = give_back.find_or_import
    answers = [f"sha256:{uuid4().hex * 2}"]
    monkeypatch.setattr(give_back, "find_or_import", lambda api: answers.pop() if answers else find(api))
    bench.engine.own(str(bench.files))
    assert theirs() == os.getuid()


def test_the_same_content_has_the_same_id_everywhere_and_other_content_another_name(ours: Helper) -> None:
    architecture = "amd64"
    one, two = give_back.pack(b"program", architecture), give_back.pack(b"program", architecture)
    other, elsewhere = give_back.pack(b"programs", architecture), give_back.pack(b"program", "arm64")
    assert one == two
    assert len({helper.name for helper in (one, other, elsewhere, ours)}) == 4
    assert len({helper.id for helper in (one, other, elsewhere, ours)}) == 4
    assert one.name == f"jobfetcher-helper:{one.id.removeprefix('sha256:')[:12]}"


def test_an_image_that_somebody_gave_our_name_is_not_used(
    bench: DockerBench, engine: docker.APIClient, busybox: str, ours: Helper, theirs: Callable[[], int]
) -> None:
    canary = b"#!/bin/sh\ntouch /files/canary; exit 0\n"
    shell = Path("/bin/busybox").read_bytes()
    impostor = imported(engine, ours.name, {"give_back": canary, "bin/sh": shell, "bin/touch": shell})
    assert image(engine, ours.name)["Id"] == impostor
    try:
        bench.engine.own(str(bench.files))
        assert theirs() == os.getuid()
        assert not (bench.files / "canary").exists()
        assert image(engine, ours.name)["Id"] == ours.id, "the import takes the name"
    finally:
        engine.remove_image(impostor, force=True)


@pytest.mark.parametrize(
    "change", ['ENTRYPOINT ["/sbin/docker-init"]', 'VOLUME ["/files/a"]', "ENV LD_PRELOAD=/files/a.so", "LABEL a=b"]
)
def test_one_of_our_name_and_layer_that_says_something_else_is_not_used(
    bench: DockerBench, engine: docker.APIClient, ours: Helper, theirs: Callable[[], int], change: str
) -> None:
    with tarfile.open(fileobj=io.BytesIO(ours.archive)) as archive:
        layer = archive.extractfile("layer.tar")
        assert layer is not None
        changes = ['CMD ["/give_back"]', change]
        repository, tag = ours.name.split(":")
        engine.import_image_from_data(layer.read(), repository, tag, changes=changes)
    impostor = image(engine, ours.name)
    assert impostor["RootFS"]["Layers"] == [ours.layer], "else the test shows nothing"
    try:
        assert not ours.is_this(impostor)
        bench.engine.own(str(bench.files))
        assert theirs() == os.getuid()
        assert image(engine, ours.name)["Id"] == ours.id
    finally:
        engine.remove_image(impostor["Id"], force=True)


def test_an_engine_that_keeps_images_by_another_digest_is_asked_by_name(ours: Helper) -> None:
    """As containerd's store does, which no engine here has: its answer is put in."""
    manifest = "sha256:" + "5" * 64
    answer = {"Id": manifest, "Config": {"Cmd": ["/give_back"], "Env": None}, "RootFS": {"Layers": [ours.layer]}}
    assert ours.is_this(answer)
    assert not ours.is_this({**answer, "RootFS": {"Layers": [ours.layer, ours.layer]}})
    assert not ours.is_this({**answer, "RootFS": {}})
    assert not ours.is_this({})


def test_an_engine_on_another_machine_is_told_of_in_a_sentence(
    bench: DockerBench, theirs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.engine.cannot_own() == ""
    version = bench.engine.api.version
    monkeypatch.setattr(bench.engine.api, "_version", version._replace(architecture="s390x"))
    with pytest.raises(WorkerFault, match="left behind: there is no helper program for an engine on s390x") as fault:
        bench.engine.own(str(bench.files))
    assert fault.value.reason is WorkerReason.DISK
    assert str(bench.files) in str(fault.value)
    assert theirs() == THEM
    assert bench.engine.cannot_own().endswith("a worker that runs as root needs none")  # the start says it


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_there_is_one_for_each_machine_that_workers_run_on(architecture: str) -> None:
    helper = give_back.helper(architecture)
    with tarfile.open(fileobj=io.BytesIO(helper.archive)) as archive:
        [manifest] = json.load(archive.extractfile("manifest.json") or io.BytesIO())
        config = json.load(archive.extractfile(manifest["Config"]) or io.BytesIO())
        with tarfile.open(fileobj=archive.extractfile("layer.tar")) as layer:
            [entry] = layer.getmembers()
    assert (config["architecture"], config["os"]) == (architecture, "linux")
    assert (entry.name, entry.mode, entry.uid, entry.isreg()) == ("give_back", 0o755, 0, True)


# -- what is in it -----------------------------------------------------------------------------------------------------


def test_a_hostile_tree_is_given_back_and_nothing_outside_of_it(bench: DockerBench, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("secret")
    os.chown(outside, 4321, 4321)
    outside.chmod(0o400)
    script = (
        f"cd /files && mkdir out && ln -s {outside} out/file && ln -s /etc/shadow out/shadow && ln -s / out/root && "
        "mkfifo out/pipe && echo x > out/one && ln out/one out/two && chmod 6755 out/one && "
        "mkdir -p \"$(printf 'out/a\\nb')\" && i=0 && cd out && while [ $i -lt 300 ]; do mkdir d && cd d && "
        "i=$((i+1)); done && touch deep && chmod 000 . && cd /files && chown -hR 1234:1234 out && chmod 000 out"
    )
    assert bench.run(bench.spec(script))[0].code == 0
    shadow = Path("/etc/shadow").stat()
    bench.engine.own(str(bench.files))
    command = ["find", str(bench.files), "-not", "-uid", str(os.getuid())]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""
    assert (bench.files / "out/one").stat().st_mode & 0o7777 == 0o755
    assert (outside.stat().st_uid, outside.stat().st_mode & 0o777) == (4321, 0o400)
    assert (Path("/etc/shadow").stat().st_uid, Path("/etc/shadow").stat().st_mode) == (shadow.st_uid, shadow.st_mode)


def test_what_cannot_be_given_back_is_named_and_the_rest_is_given_back(
    bench: DockerBench, theirs: Callable[[], int]
) -> None:
    with tmpfs(bench.files / "other\nline", "1m") as other:
        os.chown(other, THEM, THEM)
        with pytest.raises(WorkerFault) as fault:
            bench.engine.own(str(bench.files))
        assert other.stat().st_uid == THEM
    said = f"{bench.files} has files of other users that are left behind: "
    assert str(fault.value) == said + "other\\x0aline: Invalid cross-device link; 1 could not be given back"
    assert fault.value.reason is WorkerReason.DISK
    assert theirs() == os.getuid()


def test_a_helper_that_is_killed_may_do_better_later(
    bench: DockerBench, theirs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end says nothing of the files: nothing is put aside for good."""
    make, start = give_back.spec, DockerEngine._start

    def sleeper(*arguments: Any, **more: Any) -> RunSpec:
        """One that is there to be killed, in place of ours, which is done in a moment."""
        return replace(make(*arguments, **more), image_id=bench.image.id, command=("/bin/sleep", "600"))

    def start_and_kill(engine: DockerEngine, container: DockerContainer, *arguments: Any, **more: Any) -> None:
        start(engine, container, *arguments, **more)
        with engine.api.calling("kill a container"):
            engine.api.ask("POST", f"/containers/{container.id}/kill")

    monkeypatch.setattr(give_back, "spec", sleeper)
    monkeypatch.setattr(DockerEngine, "_start", start_and_kill)
    with pytest.raises(WorkerFault) as fault:
        bench.engine.own(str(bench.files))
    assert fault.value.reason is WorkerReason.ENGINE
    assert "exit code 137" in str(fault.value)
    assert theirs() == THEM


def imported(engine: docker.APIClient, name: str, files: Mapping[str, bytes]) -> str:
    """The id of an image that has these programs, and that name."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
    engine.import_image_from_data(packed.getvalue(), *name.split(":"))
    return str(image(engine, name)["Id"])
