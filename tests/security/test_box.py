"""The box that every job runs in: what the engine made of it, field by field, and what a hostile job can do in it."""

import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import pytest

from jobfetcher.core.machine import Gpu
from jobfetcher.core.run import RunSpec
from jobfetcher.engine.box import box
from jobfetcher.engine.run_spec import BoxPolicy
from jobfetcher.engine.seccomp import security_option
from tests.support.boxes import LONG_S, DockerBench

pytestmark = pytest.mark.docker

GOLDEN = Path(__file__).with_name("golden_inspect.json")

#: Of `Config`, what a job's container may not differ in. The rest is the image's.
CONFIG = (
    *("Env", "Cmd", "Entrypoint", "User", "Tty", "OpenStdin", "ExposedPorts", "Volumes", "WorkingDir", "Labels"),
    *("Healthcheck", "StopSignal", "StopTimeout", "OnBuild", "Shell", "NetworkDisabled", "MacAddress", "Domainname"),
)

ALL_GPUS = {"NVIDIA_VISIBLE_DEVICES": "all", "DOCKER_HOST": "unix:///var/run/docker.sock", "MODE": "fast"}


@pytest.fixture
def inspect(bench: DockerBench) -> Callable[[RunSpec], Mapping[str, Any]]:
    """What the engine says of a container of this spec that is running."""

    def look(spec: RunSpec) -> Mapping[str, Any]:
        container = bench.engine.start(spec)
        found = bench.engine.api.inspect(container.id)
        container.remove()
        assert found is not None
        return found

    return look


def reduced(found: Mapping[str, Any], bench: DockerBench) -> dict[str, Any]:
    """The parts of an inspect that matter, with what differs from run to run named instead."""
    config = {name: found["Config"].get(name) for name in CONFIG}
    host = dict(found["HostConfig"])
    # The engine's own, by its version, cgroup and settings: masked paths grow, the cgroup namespace is private on v2.
    for name in ("MaskedPaths", "ReadonlyPaths", "CgroupnsMode", "ConsoleSize"):
        host.pop(name, None)
    if host["Runtime"] == bench.engine.api.ask("GET", "/info").json()["DefaultRuntime"]:
        host["Runtime"] = "<default>"
    mounts = [
        {name: mount[name] for name in ("Type", "Source", "Destination", "RW", "Propagation")}
        | ({"Source": "<volume>"} if mount["Type"] == "volume" else {})
        for mount in found["Mounts"]
    ]
    mounts.sort(key=lambda mount: str(mount["Destination"]))
    whole = {
        "Config": config,
        "HostConfig": host,
        "Mounts": mounts,
        "Networks": len(found["NetworkSettings"]["Networks"]),
    }
    text = json.dumps(whole, sort_keys=True)
    for value, name in (
        (security_option(), "<our filter of system calls>"),
        (str(bench.files), "<files>"),
        (bench.instance, "<instance>"),
        (str(host["NetworkMode"]), "<own network>"),
    ):
        text = text.replace(json.dumps(value)[1:-1], name)
    return dict(json.loads(text))


def differences(golden: Any, found: Any, path: str = "") -> list[str]:
    """Where the two differ; a field that one lacks counts as null there, for engines differ in their fields."""
    if isinstance(golden, dict) and isinstance(found, dict):
        return [
            line
            for name in sorted(golden.keys() | found.keys())
            for line in differences(golden.get(name), found.get(name), f"{path}/{name}")
        ]
    nothing: tuple[Any, ...] = (None, False, 0, "", [], {})
    if golden == found or (golden in nothing and found in nothing):
        return []
    return [f"{path}: {found!r}, not {golden!r}"]


@pytest.mark.fault("T11")
def test_the_running_box_is_the_golden_one(bench: DockerBench, inspect: Callable[[RunSpec], Mapping[str, Any]]) -> None:
    spec = bench.spec("sleep 60", env=ALL_GPUS, memory_mib=64, cpu_cores=0.5, policy=BoxPolicy())
    found = inspect(spec)
    assert differences(json.loads(GOLDEN.read_text()), reduced(found, bench)) == []
    assert {"/proc/kcore", "/proc/keys", "/sys/firmware"} <= set(found["HostConfig"]["MaskedPaths"])
    assert "/proc/sys" in found["HostConfig"]["ReadonlyPaths"]


def test_the_comparison_sees_what_opens_a_box(
    bench: DockerBench, inspect: Callable[[RunSpec], Mapping[str, Any]]
) -> None:
    golden = json.loads(GOLDEN.read_text())
    spec = bench.spec(
        "sleep 60", env=ALL_GPUS, memory_mib=64, cpu_cores=0.5, policy=BoxPolicy(("SYS_ADMIN",), pids_limit=5000)
    )
    lines = differences(golden, reduced(inspect(spec), bench))
    assert sorted(line.partition(":")[0] for line in lines) == ["/HostConfig/CapAdd", "/HostConfig/PidsLimit"]
    opened = golden | {"HostConfig": golden["HostConfig"] | {"Privileged": True, "PidMode": "host"}}
    assert differences(golden, opened) == [
        "/HostConfig/PidMode: 'host', not ''",
        "/HostConfig/Privileged: True, not False",
    ]


@pytest.mark.fault("T11")
def test_a_job_has_the_capabilities_of_the_policy_and_no_more(bench: DockerBench) -> None:
    status = "grep -E '^(CapBnd|CapEff|NoNewPrivs|Seccomp):' /proc/self/status"
    _, printed = bench.run(bench.spec(status))
    found = dict(line.split(":\t") for line in printed.splitlines())
    # Bits of CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, KILL 5, SETGID 6, SETUID 7: capabilities(7).
    assert int(found["CapBnd"], 16) == int(found["CapEff"], 16) == 0b11111011
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")  # 2: a filter is on


@pytest.mark.fault("T11")
@pytest.mark.parametrize(
    "attempt",
    [
        "mount -t tmpfs none /mnt",
        "mount -o remount,rw /proc/sys",
        "mknod /tmp/disk b 8 0",
        "ping -c 1 -W 1 127.0.0.1",
        "hostname other",
        "chroot / true",
        "echo other > /proc/sys/kernel/hostname",
        "ls /var/run/docker.sock /run/docker.sock",
        "dmesg",
    ],
)
def test_what_a_job_may_not_do(bench: DockerBench, attempt: str) -> None:
    end, printed = bench.run(bench.spec(f"mkdir -p /mnt; ({attempt}) 2>&1"))
    assert end.code != 0, printed
    assert re.search("not permitted|denied|read-only|no such file", printed, re.IGNORECASE), printed


def test_what_a_job_may_do(bench: DockerBench) -> None:
    script = (
        "set -e; echo x > /files/a; chown 1234:1234 /files/a; chmod 600 /files/a; cat /files/a; "
        "echo y > /etc/new; sleep 60 & kill $!; head -c 1000000 /dev/zero > /dev/shm/z; df -m /dev/shm | tail -n 1"
    )
    end, printed = bench.run(bench.spec(script, memory_mib=64))
    assert end.code == 0, printed
    assert printed.split()[2] == "32"  # MiB of shared memory: half of the job's memory
    assert (bench.files / "a").stat().st_uid == (1234 if os.geteuid() == 0 else (bench.files / "a").stat().st_uid)


@pytest.mark.fault("T11")
def test_no_network_means_no_interface_but_loopback(bench: DockerBench) -> None:
    _, printed = bench.run(bench.spec("ls /sys/class/net; cat /proc/net/route | tail -n +2"))
    assert printed.split() == ["lo"]


@pytest.mark.fault("T11")
def test_jobs_on_our_network_do_not_see_each_other(bench: DockerBench, engine: docker.APIClient) -> None:
    serve = "mkdir /www; echo hello > /www/x; echo ready; httpd -f -p 8000 -h /www"
    server = bench.engine.start(bench.spec(serve, policy=BoxPolicy()))
    try:
        while server.last_lines(1) != "ready":
            assert server.wait(0.05) is None
        found = bench.engine.api.inspect(server.id)
        assert found is not None
        [network] = found["NetworkSettings"]["Networks"].values()
        listed = engine.inspect_network(network["NetworkID"])
        assert listed["Name"] == "jobfetcher"
        assert listed["Options"]["com.docker.network.bridge.enable_icc"] == "false"
        assert found["NetworkSettings"]["Ports"] in (None, {})
        # Not by wget, which crashes in a static busybox whatever it asks.
        ask = f"printf 'GET /x HTTP/1.0\\r\\n\\r\\n' | nc -w 2 {network['IPAddress']} 8000"
        fetch = f"{ask}; echo code $?; ls /sys/class/net"
        _, printed = bench.run(bench.spec(fetch, job_id="2", policy=BoxPolicy()))
        assert "hello" not in printed
        assert "code 1\n" in f"{printed}\n"
        assert "eth0" in printed
    finally:
        server.remove()


def test_two_workers_that_make_the_network_at_once_share_one(bench: DockerBench) -> None:
    modes: list[str] = []
    threads = [threading.Thread(target=lambda n=n: modes.append(start_and_look(bench, n))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(modes) == 4
    assert len(set(modes)) == 1


def start_and_look(bench: DockerBench, number: int) -> str:
    container = bench.engine.start(bench.spec("sleep 60", job_id=f"n{number}", policy=BoxPolicy()))
    found = bench.engine.api.inspect(container.id)
    container.remove()
    assert found is not None
    return str(found["HostConfig"]["NetworkMode"])


@pytest.mark.fault("T12")
def test_a_fork_bomb_ends_at_the_process_limit(bench: DockerBench) -> None:
    policy = BoxPolicy(network=None, pids_limit=40)
    bomb = bench.engine.start(bench.spec("b() { b | b & }; b; sleep 60", policy=policy))
    other, printed = bench.run(bench.spec("for i in $(seq 50); do true & done; wait; echo fine", job_id="2"))
    found = bench.engine.api.ask("GET", f"/containers/{bomb.id}/stats", stream="0").json()
    assert 0 <= found["pids_stats"].get("current", 0) <= 40
    bomb.stop(0)
    assert bomb.wait(LONG_S) is not None
    bomb.remove()
    assert (other.code, printed) == (0, "fine")


@pytest.mark.fault("T13")
def test_an_image_that_asks_for_all_gpus_gets_none(bench: DockerBench, engine: docker.APIClient, busybox: str) -> None:
    created = engine.create_container(busybox, ["true"])["Id"]
    greedy = engine.commit(created, "jobfetcher-test/greedy", "1", changes="ENV NVIDIA_VISIBLE_DEVICES=all")["Id"]
    engine.remove_container(created)
    spec = bench.spec("echo $NVIDIA_VISIBLE_DEVICES; ls /dev", env=ALL_GPUS)
    try:
        _, printed = bench.run(replace(spec, image_id=greedy))
    finally:
        engine.remove_image("jobfetcher-test/greedy:1", force=True)
    visible, *devices = printed.splitlines()
    assert visible == "void"
    assert not [device for device in devices if "nvidia" in device or device.startswith(("sd", "vd", "kvm", "dri"))]


@pytest.mark.fault("T13")
def test_only_the_gpus_given_are_asked_for(bench: DockerBench) -> None:
    spec = bench.spec("true", env=ALL_GPUS, gpus=(Gpu("GPU-7", "any", 1, "8.6"),))
    assert box(spec, "none")["HostConfig"]["DeviceRequests"] == [{"DeviceIDs": ["GPU-7"], "Capabilities": [["gpu"]]}]
    assert "NVIDIA_VISIBLE_DEVICES=GPU-7" in box(spec, "none")["Env"]
    assert not [entry for entry in box(spec, "none")["Env"] if entry.startswith("DOCKER_") or entry.endswith("=all")]
