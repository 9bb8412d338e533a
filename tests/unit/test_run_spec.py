"""What a job gets is what the policy and its share say, never what the job says."""

import pytest

from jobfetcher.core.errors import ConfigError
from jobfetcher.core.job import Job, JobId
from jobfetcher.core.machine import Gpu, Share
from jobfetcher.core.run import Image, RunSpec
from jobfetcher.engine.box import box
from jobfetcher.engine.run_spec import BASE_CAPABILITIES, OWN_NETWORK, BoxPolicy, build_run_spec, dropped_env

IMAGE = Image("sha256:abc", "docker.io/library/busybox:latest", None, "amd64")
GPUS = (Gpu("GPU-1", "A4000", 16_000, "8.6"), Gpu("GPU-2", "A4000", 16_000, "8.6"))


def build(
    *,
    command: tuple[str, ...] | None = None,
    labels: dict[str, str] | None = None,
    env: dict[str, str] | None = None,
    share: Share | None = None,
    policy: BoxPolicy | None = None,
) -> RunSpec:
    return build_run_spec(
        Job(id=JobId("17"), image="busybox", command=command, labels=labels or {}, env=env or {}),
        share or Share(2.5, 4096),
        image=IMAGE,
        files_host_path="/data/jobs/17/files",
        attempt=2,
        instance="lab",
        policy=policy or BoxPolicy(),
    )


def test_names_and_labels_say_whose_it_is() -> None:
    spec = build()
    assert spec.name == "jobfetcher-lab-17-2"
    assert spec.labels == {"jobfetcher.instance": "lab", "jobfetcher.job": "17", "jobfetcher.attempt": "2"}
    assert (spec.image_id, spec.files_host_path) == ("sha256:abc", "/data/jobs/17/files")


def test_command_fragments_are_joined_and_given_to_a_shell() -> None:
    spec = build(command=("mkdir -p /files/out &&", "prog --in $(find /files -name '*.tif' | head -n 1)"))
    joined = "mkdir -p /files/out && prog --in $(find /files -name '*.tif' | head -n 1)"
    assert spec.command == ("/bin/sh", "-c", joined)


@pytest.mark.parametrize("command", [None, ()])
def test_no_command_means_the_images_own(command: tuple[str, ...] | None) -> None:
    assert build(command=command).command is None
    assert "Cmd" not in box(build(command=command), "none")


def test_labels_never_reach_the_engine() -> None:
    plain = build()
    labelled = build(labels={"entrypoint": "fit", "image_name": "decode", "image_version": "1.2"})
    assert labelled == plain
    assert "Entrypoint" not in box(labelled, "none")


@pytest.mark.fault("E15")
def test_limits_are_the_shares() -> None:
    spec = build()
    assert (spec.cpu_cores, spec.memory_mib, spec.shm_mib) == (2.5, 4096, 2048)
    assert (spec.cpu_shares, spec.pids_limit) == (512, 4096)
    host = box(spec, "none")["HostConfig"]
    assert host["Memory"] == host["MemorySwap"] == 4096 * 2**20
    assert host["NanoCpus"] == 2_500_000_000


def test_the_engine_refuses_less_than_six_mib_so_nobody_gets_less() -> None:
    assert build(share=Share(1, 3)).memory_mib == 6


@pytest.mark.fault("T13")
def test_a_job_sees_the_gpus_it_was_given_and_no_others() -> None:
    wish = {
        "NVIDIA_VISIBLE_DEVICES": "all",
        "NVIDIA_DRIVER_CAPABILITIES": "all",
        "DOCKER_HOST": "tcp://x",
        "MODE": "fast",
    }
    assert dropped_env(wish, gpus=False) == ("DOCKER_HOST", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_VISIBLE_DEVICES")

    without = build(env=wish)
    assert without.env == {"MODE": "fast", "NVIDIA_VISIBLE_DEVICES": "void"}
    assert "DeviceRequests" not in box(without, "none")["HostConfig"]

    given = build(env=wish, share=Share(1, 1024, GPUS))
    assert given.env == {"MODE": "fast", "NVIDIA_VISIBLE_DEVICES": "GPU-1,GPU-2"}
    [request] = box(given, "none")["HostConfig"]["DeviceRequests"]
    assert request == {"DeviceIDs": ["GPU-1", "GPU-2"], "Capabilities": [["gpu"]]}


@pytest.mark.fault("T11")
def test_the_policy_alone_decides_on_the_box() -> None:
    plain = build()
    assert (plain.cap_add, plain.network, plain.runtime, plain.user, plain.read_only) == (
        BASE_CAPABILITIES,
        OWN_NETWORK,
        None,
        None,
        False,
    )
    policy = BoxPolicy(("SYS_PTRACE",), 100, 256, 64, "lab-net", "kata", "nvidia", "1000:1000", True)
    spec = build(policy=policy)
    assert spec.cap_add == tuple(sorted((*BASE_CAPABILITIES, "SYS_PTRACE")))
    assert (spec.cpu_shares, spec.shm_mib, spec.pids_limit, spec.network) == (100, 256, 64, "lab-net")
    assert (spec.runtime, spec.user, spec.read_only) == ("kata", "1000:1000", True)
    assert build(policy=policy, share=Share(1, 1024, GPUS)).runtime == "nvidia"


@pytest.mark.parametrize("network", ["host", "container:other", ""])
def test_no_policy_puts_jobs_into_anothers_network(network: str) -> None:
    with pytest.raises(ConfigError, match="JOB_NETWORK"):
        BoxPolicy(network=network)


def test_no_policy_lifts_the_process_limit() -> None:
    with pytest.raises(ConfigError, match="process limit"):
        BoxPolicy(pids_limit=0)
