"""What differs between engines, of what they say of themselves: Podman 4 and 5, rootful and rootless, and Docker."""

from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from jobfetcher.core.errors import ConfigError
from jobfetcher.core.run import RunSpec
from jobfetcher.engine.api import EngineApi
from jobfetcher.engine.box import box
from jobfetcher.engine.flavour import DOCKER, Flavour, Limit, docker_flavour, podman_flavour

ALL = ["cpuset", "cpu", "io", "memory", "pids"]

SPEC = RunSpec(
    job_id="1",  # type: ignore[arg-type]
    name="name",
    labels={},
    image_id="sha256:1",
    command=None,
    env={},
    files_host_path="/jobs/1/files",
    cpu_cores=2,
    cpu_shares=512,
    memory_mib=64,
    shm_mib=32,
    pids_limit=100,
    gpu_uuids=("GPU-1", "GPU-2"),
    runtime=None,
    network=None,
    user=None,
    read_only=False,
    cap_add=(),
)


def podman(version: str = "4.3.1", controllers: list[str] | None = None, *, rootless: bool = False) -> Flavour:
    """Podman's answer to GET /libpod/info, as far as it is read."""
    return podman_flavour(version, {"host": {"cgroupControllers": controllers, "security": {"rootless": rootless}}})


def limits(flavour: Flavour) -> set[str]:
    config: dict[str, Any] = box(SPEC, "none", flavour)["HostConfig"]
    return {"Memory", "MemorySwap", "NanoCpus", "CpuShares", "PidsLimit"} & set(config)


def test_dockers_box_is_what_it_was() -> None:
    assert docker_flavour({"MemoryLimit": True, "CpuCfsQuota": True, "PidsLimit": True}).missing == frozenset()
    host = box(SPEC, "none")["HostConfig"]
    assert host["LogConfig"] == {"Type": "local", "Config": {"max-size": "10m", "max-file": "3"}}
    assert host["DeviceRequests"] == [{"DeviceIDs": ["GPU-1", "GPU-2"], "Capabilities": [["gpu"]]}]
    assert DOCKER.notes(own_network=True, gpus=True) == ()


@pytest.mark.parametrize(
    ("controllers", "missing", "kept"),
    [
        (ALL, set(), {"Memory", "MemorySwap", "NanoCpus", "CpuShares", "PidsLimit"}),
        (None, set(), {"Memory", "MemorySwap", "NanoCpus", "CpuShares", "PidsLimit"}),
        (["memory", "pids"], {Limit.CORES}, {"Memory", "MemorySwap", "PidsLimit"}),
        ([], set(Limit), set()),
    ],
    ids=["all", "not-said", "as-systemd-delegates", "v1"],
)
def test_limits_that_cannot_be_held_are_left_out_and_named(
    controllers: list[str] | None, missing: set[Limit], kept: set[str]
) -> None:
    flavour = podman(controllers=controllers, rootless=True)
    assert flavour.missing == missing
    assert limits(flavour) == kept
    notes = " ".join(flavour.notes(own_network=False, gpus=False)).partition(":")[0]
    assert all((limit.value in notes) == (limit in missing) for limit in Limit)


def test_docker_without_root_rights_says_what_it_cannot_limit() -> None:
    flavour = docker_flavour({"SecurityOptions": ["name=seccomp,profile=default", "name=rootless"], "PidsLimit": False})
    assert flavour.rootless
    assert flavour.missing == {Limit.PROCESSES}
    [note] = flavour.notes(own_network=True, gpus=True)
    assert note.startswith(
        "jobs run here without a limit on processes: Docker without root rights has no control group"
    )


@pytest.mark.parametrize(
    ("version", "gpus", "memory"),
    [
        ("4.3.1", False, False),
        ("4.9.4-rhel", False, False),
        ("5.0.0", False, True),
        ("5.3.2", False, True),
        ("5.4.0-dev", True, True),
        ("5.10.1", True, True),
        ("6.0.0", True, True),
        ("unknown", False, False),
    ],
)
def test_what_a_version_of_podman_can_do(version: str, gpus: bool, memory: bool) -> None:
    flavour = podman(version, ALL)
    assert (flavour.gives_gpus, flavour.tells_out_of_memory) == (gpus, memory)
    assert bool(flavour.notes(own_network=False, gpus=True)) is not gpus
    if gpus:
        assert box(SPEC, "none", flavour)["HostConfig"]["DeviceRequests"] == [
            {
                "Driver": "cdi",
                "DeviceIDs": ["nvidia.com/gpu=GPU-1", "nvidia.com/gpu=GPU-2"],
                "Capabilities": [["gpu"]],
            }
        ]


def test_who_keeps_jobs_apart() -> None:
    assert DOCKER.keeps_apart
    assert podman(controllers=ALL, rootless=True).keeps_apart
    [note] = podman(controllers=ALL).notes(own_network=True, gpus=False)
    assert note.startswith("jobs that run here at the same time can reach each other: Podman 4.3.1 cannot")
    assert podman(controllers=ALL).notes(own_network=False, gpus=False) == ()


@pytest.mark.parametrize(
    ("path", "cure"),
    [
        ("/nowhere/docker.sock", "systemctl start docker"),
        ("/nowhere/podman/podman.sock", "systemctl enable --now podman.socket"),
        ("/nowhere/user/1000/podman/podman.sock", "systemctl --user enable --now podman.socket"),
    ],
)
def test_a_socket_that_is_not_there_says_how_it_comes(path: str, cure: str) -> None:
    with closing(EngineApi(f"unix://{path}")) as api, pytest.raises(ConfigError) as refused:
        api.check()
    assert cure in str(refused.value)


@pytest.mark.fault("D3")
@pytest.mark.parametrize(
    ("driver", "status", "size"),
    [
        ("overlay2", [["Backing Filesystem", "xfs"], ["Supports d_type", "true"]], {"size": "2048m"}),
        ("overlay2", [["Backing Filesystem", "extfs"]], None),
        ("btrfs", [["Backing Filesystem", "xfs"]], None),  # there it would count the image's own files
        ("overlay2", [["odd"], ["Backing Filesystem"]], None),
        ("overlay2", None, None),
        (None, [["Backing Filesystem", "xfs"]], None),
    ],
)
def test_a_layer_has_a_limit_where_the_engine_may_hold_it(driver: str | None, status: Any, size: object) -> None:
    flavour = docker_flavour({"Driver": driver, "DriverStatus": status})
    assert box(replace(SPEC, layer_mib=2048), "none", flavour)["HostConfig"].get("StorageOpt") == size
    assert "StorageOpt" not in box(SPEC, "none", flavour)["HostConfig"], "no limit, no field"
