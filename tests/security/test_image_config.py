"""What an image says of itself and what comes along of it: the table, row by row, on a real engine (FAULTS.md T28)."""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest
from pydantic import TypeAdapter

from jobfetcher.core.errors import JobFault, JobReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.machine import Gpu, Share
from jobfetcher.core.run import Image
from jobfetcher.engine.box import box
from jobfetcher.engine.image_config import FIELDS, Fate, acting_env, changed_env, label_keys, loader_value
from jobfetcher.engine.run_spec import BoxPolicy, against_image, build_proof_spec
from tests.security.test_box import differences, reduced
from tests.support.boxes import DockerBench, docker_bench, no_progress, podman_bench
from tests.support.crowded_image import CONFIG, ENV, LABELS, crowded_image
from tests.support.podman import PrivatePodman

pytestmark = pytest.mark.fault("T28")

GOLDEN = Path(__file__).with_name("golden_inspect_crowded.json")
PAGE = Path(__file__).parents[2] / "docs" / "image-configuration.md"
GPU = Gpu("GPU-7", "any", 1, "8.6")

#: What inspect says of a field of which a container has nothing.
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})


@contextmanager
def running(bench: DockerBench, *command: str, policy: BoxPolicy | None = None) -> Iterator[Mapping[str, Any]]:
    """What the engine says of a job's container on the image with everything, while it runs."""
    with closing(docker.APIClient(bench.engine.api.url)) as client, crowded_image(client) as reference:
        image = bench.engine.prepare(reference, Halt(), no_progress)
        spec = bench.spec(*command, image=image, policy=policy or BoxPolicy(network=None))
        for folder in spec.folders:
            (bench.files / folder).mkdir()
        container = bench.engine.start(spec)
        try:
            found = bench.engine.api.inspect(container.id)
            assert found is not None
            yield found
        finally:
            container.remove()


@pytest.mark.docker
@pytest.mark.fault("T11")
def test_the_box_of_an_image_that_says_everything_is_the_golden_one(bench: DockerBench) -> None:
    with running(bench, "sleep 60", policy=BoxPolicy()) as found:
        assert differences(json.loads(GOLDEN.read_text()), reduced(found, bench)) == []


@pytest.mark.docker
@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_each_field_meets_the_fate_of_its_row(inspected: Mapping[str, Any], field: Any) -> None:
    config = inspected["Config"]
    given, got = CONFIG[field.name], config.get(field.name)
    match field.name:
        case "Labels":
            assert {key: value for key, value in got.items() if value} == {
                "jobfetcher.instance": "test",
                "jobfetcher.job": "1",
                "jobfetcher.attempt": "1",
            }
            assert got.keys() == given.keys() | {"jobfetcher.attempt"}
        case "Env":
            env = dict(entry.split("=", 1) for entry in got if "=" in entry)  # one without a value is taken away
            assert {name: env.get(name) for name in ENV} == ENV | {
                "NVIDIA_VISIBLE_DEVICES": "void",
                "NVIDIA_DRIVER_CAPABILITIES": "compute,utility,video,graphics,ngx,compat32",
                "NVIDIA_REQUIRE_JETPACK": None,
                "NVIDIA_MIG_CONFIG_DEVICES": None,
                "NVIDIA_MIG_MONITOR_DEVICES": None,
                "NVIDIA_IMEX_CHANNELS": None,
                "NVIDIA_GDS": None,
                "NVIDIA_MOFED": None,
                "NVIDIA_MOUNT_EVERYTHING": None,
            }
            assert env.keys() <= ENV.keys()
        case "Volumes":
            mounts = {mount["Destination"]: mount["Type"] for mount in inspected["Mounts"]}
            assert mounts == {"/files": "bind", "/files/kept": "bind", "/data": "volume"}
        case "Healthcheck":  # the engine fills in the image's pauses between checks that are none
            assert got["Test"] == ["NONE"]
        case "ArgsEscaped":
            assert not got
        case "Image":
            assert got == inspected["Image"] != given
        case "Hostname":
            assert got == inspected["Id"][:12]
        case "Memory" | "MemorySwap" | "CpuShares" | "Cpuset" | "VolumeDriver":
            name = {"Cpuset": "CpusetCpus"}.get(field.name, field.name)
            limits = {"Memory": 64 * 2**20, "MemorySwap": 64 * 2**20, "CpuShares": 512}
            assert inspected["HostConfig"][name] == limits.get(name, "")
            assert got is None
        case _ if field.fate is Fate.TAKEN:
            assert got == given
        case "StopSignal":
            assert got == "SIGTERM"
        case _:
            assert got in NOTHING


@pytest.fixture(scope="module")
def inspected(busybox: str, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """One container on the image with everything; each row looks at it."""
    with docker_bench(busybox, tmp_path_factory.mktemp("crowded") / "files") as bench, running(bench) as found:
        labels = {key: "test" if value == bench.instance else value for key, value in found["Config"]["Labels"].items()}
        return {**found, "Config": {**found["Config"], "Labels": labels}}


def image_of(engine: docker.APIClient, reference: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = engine.inspect_image(reference)  # type: ignore[no-untyped-call]
    return found


@pytest.mark.docker
def test_the_table_has_every_field_that_an_engine_tells_of(engine: docker.APIClient, busybox: str) -> None:
    """A field that a new engine has is one that somebody has to think about: it gets a row first."""
    rows = [field.name for field in FIELDS]
    assert len(rows) == len(set(rows))
    with crowded_image(engine) as reference:
        told = {name for image in (reference, busybox) for name in image_of(engine, image)["Config"]}
    assert told <= set(rows)
    assert set(CONFIG) == set(rows)


def test_a_page_has_the_table() -> None:
    lines = ["| field | in a Dockerfile | | why |", "|---|---|---|---|"]
    for field in FIELDS:
        keyword = f"`{field.keyword}`" if field.keyword else ""
        why = field.why[0].upper() + field.why[1:]
        lines.append(f"| `{field.name}` | {keyword} | {field.fate} | {why}. |")
    assert "\n".join(lines) in PAGE.read_text()


@pytest.mark.docker
def test_a_jobs_process_does_not_have_the_variables_that_are_removed(bench: DockerBench) -> None:
    with running(bench, "env; sleep 60") as found:
        container = bench.engine.find(JobId("1"))
        assert container is not None
        assert container.id == found["Id"]
        while "MODE=slow" not in (printed := container.last_lines(100)):
            assert container.wait(0.05) is None
    names = {line.partition("=")[0] for line in printed.splitlines()}
    assert "LD_LIBRARY_PATH" in names
    assert not names & {"NVIDIA_GDS", "NVIDIA_MOFED", "NVIDIA_MIG_CONFIG_DEVICES", "NVIDIA_IMEX_CHANNELS"}


@pytest.mark.docker
def test_no_check_of_health_is_ever_run(bench: DockerBench) -> None:
    """The engine says of a container whether it looks after its health: `starting` before the first check."""
    with running(bench, "sleep 60") as found:
        assert (found["State"].get("Health") or {"Status": "none"})["Status"] == "none"


@pytest.mark.docker
def test_a_job_is_ended_by_term_whatever_its_image_says(bench: DockerBench, engine: docker.APIClient) -> None:
    with crowded_image(engine, Entrypoint=None, User="0", Volumes={}) as reference:
        image = bench.engine.prepare(reference, Halt(), no_progress)
        spec = bench.spec("trap 'echo was asked; exit 0' TERM; echo ready; while :; do sleep 0.1; done", image=image)
        container = bench.engine.start(spec)
        try:
            while container.last_lines(1) != "ready":
                assert container.wait(0.05) is None
            container.stop(10)
            assert container.last_lines(1) == "was asked"
        finally:
            container.remove()


@pytest.mark.docker
def test_labels_without_end_are_the_jobs_fault(bench: DockerBench, engine: docker.APIClient) -> None:
    for labels in ({f"k{n}": "" for n in range(1001)}, {"k" * 70_000: ""}):
        with (
            crowded_image(engine, Labels=labels) as reference,
            pytest.raises(JobFault, match=r"its image has [\d,]+ labels of [\d,]+ bytes") as caught,
        ):
            bench.engine.prepare(reference, Halt(), no_progress)
        assert caught.value.reason is JobReason.CANNOT_START


@pytest.mark.docker
def test_variables_without_end_are_the_jobs_fault(bench: DockerBench, engine: docker.APIClient) -> None:
    with (
        crowded_image(engine, Env=[f"NVIDIA_X={'y' * 70_000}"]) as reference,
        pytest.raises(JobFault, match=r"70,009 bytes of variables NVIDIA_\* and LD_\*"),
    ):
        bench.engine.prepare(reference, Halt(), no_progress)


@pytest.mark.docker
def test_podman_takes_no_more_along(podman: PrivatePodman) -> None:
    with podman_bench(podman) as bench, running(bench) as found:
        config = found["Config"]
        named = {key: value for key, value in config["Labels"].items() if key in LABELS and value}
        assert named == {"jobfetcher.instance": bench.instance, "jobfetcher.job": "1"}
        env = dict(entry.split("=", 1) for entry in config["Env"])
        assert env["NVIDIA_VISIBLE_DEVICES"] == "void"
        assert not [env[name] for name in ("NVIDIA_MIG_CONFIG_DEVICES", "NVIDIA_GDS", "NVIDIA_MOFED") if env[name]]
        assert str(config["StopSignal"]) in {"15", "SIGTERM"}
        assert (config.get("Healthcheck") or {}).get("Test") in (None, ["NONE"])
        assert not any((found["HostConfig"].get("PortBindings") or {}).values())


# -- without an engine -------------------------------------------------------------------------------------------------


def test_a_box_of_the_workers_own_on_a_jobs_image_takes_no_more_along() -> None:
    spec = build_proof_spec(Share(1, 64, (GPU,)), files_host_path="/x", policy=BoxPolicy())
    image = Image("sha256:1", "x", None, "", labels=label_keys(CONFIG), env=acting_env(CONFIG))
    made = box(against_image(spec, image), "none")
    assert set(made["Labels"].values()) == {"", "proof", "0"}
    assert made["Labels"].keys() >= LABELS.keys()
    assert made["Healthcheck"] == {"Test": ["NONE"]}
    assert {"NVIDIA_VISIBLE_DEVICES=GPU-7", "NVIDIA_MOFED", "LD_PRELOAD"} <= set(made["Env"])


@pytest.mark.fault("T13")
def test_with_a_gpu_the_loaders_variables_name_fixed_places_only() -> None:
    changed, removed = changed_env(acting_env(CONFIG), gpus=True)
    assert changed["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib"
    assert "LD_PRELOAD" in removed


@pytest.mark.fault("T13")
@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("LD_PRELOAD", "/usr/lib/libtcmalloc.so.4", "/usr/lib/libtcmalloc.so.4"),
        ("LD_PRELOAD", "/usr/lib/a.so ./b.so:/opt/c.so", "/usr/lib/a.so:/opt/c.so"),
        ("LD_PRELOAD", "/proc/self/cwd/steal.so", None),
        ("LD_PRELOAD", "//proc/self/cwd/steal.so", None),
        ("LD_PRELOAD", "/./proc/self/cwd/steal.so", None),
        ("LD_PRELOAD", "/usr/../proc/self/cwd/steal.so", None),
        ("LD_PRELOAD", "/dev/fd/3", None),
        ("LD_PRELOAD", "steal.so", None),
        ("LD_LIBRARY_PATH", "/opt/a lib:/opt/b::", "/opt/a lib:/opt/b"),
        ("LD_LIBRARY_PATH", "$ORIGIN/lib:/$LIB", None),
        ("LD_LIBRARY_PATH", "/", None),
        ("LD_AUDIT", "../steal.so", None),
        ("LD_DEBUG_OUTPUT", "/etc/cron.d/x", None),
        ("PATH", "./bin", "./bin"),
    ],
)
def test_what_is_left_of_a_loaders_variable(name: str, value: str, kept: str | None) -> None:
    assert loader_value(name, value) == kept


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("all", "compute,utility,video,graphics,ngx,compat32"),
        ("compute,utility", "compute,utility"),
        ("utility, compute,display", "compute,utility"),
        ("display", "compute,utility"),
        ("", "compute,utility"),
        ("unheard-of", "compute,utility"),
    ],
)
def test_which_parts_of_the_driver_an_image_may_ask_for(asked: str, given: str) -> None:
    changed, removed = changed_env([f"NVIDIA_DRIVER_CAPABILITIES={asked}"], gpus=True)
    assert (changed or {"NVIDIA_DRIVER_CAPABILITIES": asked})["NVIDIA_DRIVER_CAPABILITIES"] == given
    assert removed == ()


def test_a_record_that_an_older_worker_wrote_is_read() -> None:
    """And one of this worker by an older one, which does not know the new fields."""
    records = TypeAdapter(Image)
    old = '{"id": "sha256:1", "reference": "x", "digest": null, "architecture": "amd64", "volumes": ["/data"]}'
    image = records.validate_json(old, strict=True)
    assert (image.volumes, image.labels, image.env) == (("/data",), (), ())
    new = Image("sha256:1", "x", None, "amd64", labels=("a",), env=("NVIDIA_GDS=1",))
    assert records.validate_json(records.dump_json(new), strict=True) == new
