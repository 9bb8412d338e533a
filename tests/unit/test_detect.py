"""resources.detect: kernel files of cgroup v1 and v2, made up and from a real container; pynvml on the stub."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import docker
import psutil
import pynvml
import pytest

from jobfetcher.core.errors import ConfigError
from jobfetcher.resources.detect import GpuReading, detect, memory_in_use_mib, read_gpus
from tests.support.services import GpuStub

GIB = 1024**3
#: The lines of proc_meminfo(5) that psutil reads: 64 GiB, of which a new program could have 44.
MEMINFO = "".join(
    f"{name}: {kib} kB\n"
    for name, kib in {
        "MemTotal": 64 << 20,
        "MemFree": 40 << 20,
        "MemAvailable": 44 << 20,
        "Buffers": 0,
        "Cached": 4 << 20,
        "SReclaimable": 0,
        "Shmem": 0,
        "Active": 0,
        "Inactive": 0,
        "Slab": 0,
    }.items()
)
V2_MOUNT = "31 23 0:28 {root} /sys/fs/cgroup ro,nosuid shared:9 master:2 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct ro,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory ro,relatime master:11 - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)
NO_V1_LIMIT = "9223372036854771712\n"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of cores of the machine that runs the tests is not what is tested here."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cores_and_memory(root: Path) -> tuple[float, int]:
    inventory = detect("none", root)
    return inventory.cpu_cores, inventory.memory_mib


def test_a_host_without_cgroups_offers_everything(tmp_path: Path) -> None:
    assert cores_and_memory(machine(tmp_path, {})) == (8.0, 64 * 1024)


def test_v2_limits_of_a_container_with_its_own_namespace(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
    }
    assert cores_and_memory(machine(tmp_path, files)) == (1.5, 4096)


def test_v2_the_lowest_limit_of_all_parents_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/lab.slice/worker.service/sub\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        "sys/fs/cgroup/lab.slice/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/lab.slice/memory.max": f"{16 * GIB}\n",
        "sys/fs/cgroup/lab.slice/worker.service/cpu.max": "max 100000\n",
        "sys/fs/cgroup/lab.slice/worker.service/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/lab.slice/worker.service/sub/cpu.max": "500000 100000\n",
        "sys/fs/cgroup/lab.slice/worker.service/sub/memory.max": "max\n",
        "sys/fs/cgroup/other.service/cpu.max": "10000 100000\n",
        "sys/fs/cgroup/other.service/memory.max": "1048576\n",
    }
    assert cores_and_memory(machine(tmp_path, files)) == (3.0, 8192)


def test_v1_limits_of_a_container_that_sees_the_hosts_path(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/\n",
        "proc/self/mountinfo": V1_MOUNTS.format(root="/docker/abc"),
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
    }
    assert cores_and_memory(machine(tmp_path, files)) == (2.5, 2048)


def test_v1_limits_on_a_host_are_found_below_the_mount(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/system/worker\n2:cpu,cpuacct:/system/worker\n0::/\n",
        "proc/self/mountinfo": V1_MOUNTS.format(root="/"),
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/system/worker/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/system/worker/cpu.cfs_period_us": "50000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_V1_LIMIT,
        "sys/fs/cgroup/memory/system/memory.limit_in_bytes": f"{6 * GIB}\n",
        "sys/fs/cgroup/memory/system/worker/memory.limit_in_bytes": NO_V1_LIMIT,
    }
    assert cores_and_memory(machine(tmp_path, files)) == (1.0, 6144)


def test_v1_without_limits_is_the_whole_host(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n2:cpu,cpuacct:/\n0::/\n",
        "proc/self/mountinfo": V1_MOUNTS.format(root="/"),
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_V1_LIMIT,
    }
    assert cores_and_memory(machine(tmp_path, files)) == (8.0, 64 * 1024)


@pytest.mark.parametrize(
    ("own", "mount_root"), [("/", "/../.."), ("/../other", "/"), ("/elsewhere", "/docker/abc"), ("/a/../b", "/")]
)
def test_a_path_that_is_not_below_the_mount_is_not_followed(tmp_path: Path, own: str, mount_root: str) -> None:
    files = {
        "proc/self/cgroup": f"0::{own}\n",
        "proc/self/mountinfo": V2_MOUNT.format(root=mount_root),
        "sys/fs/cgroup/cpu.max": "200000 100000\n",
        "sys/fs/other/cpu.max": "10000 100000\n",
        "sys/fs/cgroup/b/cpu.max": "10000 100000\n",
    }
    assert cores_and_memory(machine(tmp_path, files)) == (2.0, 64 * 1024)


@pytest.mark.parametrize("text", ["", "\n", "nonsense", "-5 100000", "100000 0", "1 2 3"])
def test_limits_that_make_no_sense_are_no_limits(tmp_path: Path, text: str) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        "sys/fs/cgroup/cpu.max": text,
        "sys/fs/cgroup/memory.max": text,
    }
    assert cores_and_memory(machine(tmp_path, files)) == (8.0, 64 * 1024)


def test_memory_in_use_is_what_a_new_program_could_not_have(tmp_path: Path) -> None:
    assert memory_in_use_mib(machine(tmp_path, {})) == (64 - 44) * 1024


@pytest.mark.parametrize(("limit_gib", "in_use_gib"), [(60, 16), (44, 0), (4, 0)])
def test_others_use_the_part_that_is_not_ours_first(tmp_path: Path, limit_gib: int, in_use_gib: int) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        "sys/fs/cgroup/memory.max": f"{limit_gib * GIB}\n",
    }
    assert memory_in_use_mib(machine(tmp_path, files)) == in_use_gib * 1024


@pytest.mark.parametrize("meminfo", ["", "MemTotal: many kB\n"])
def test_a_machine_that_does_not_tell_its_memory_is_an_error(tmp_path: Path, meminfo: str) -> None:
    with pytest.raises(ConfigError, match="memory of this machine"):
        detect("none", machine(tmp_path, {"proc/meminfo": meminfo}))
    with pytest.raises(ConfigError, match="is /proc mounted"):
        detect("none", tmp_path / "nothing")


def test_architecture_has_dockers_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel, name in {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64"}.items():
        monkeypatch.setattr(platform, "machine", lambda kernel=kernel: kernel)
        assert detect("none", machine(tmp_path, {})).architecture == name


def test_this_machine_and_its_affinity() -> None:
    script = (
        "import os; from jobfetcher.resources.detect import *\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "found = detect('none'); print(found.cpu_cores, found.memory_mib, memory_in_use_mib())"
    )
    cores, memory, in_use = python(script, dict(os.environ)).split()
    assert 0 < float(cores) <= 1
    assert 0 < int(in_use) < int(memory)


@pytest.mark.docker
def test_a_real_container_with_limits(tmp_path: Path, engine: docker.APIClient, busybox: str) -> None:
    """The kernel files as a limited container of this machine's engine shows them, v1 or v2."""
    script = (
        "for f in /proc/self/cgroup /proc/self/mountinfo $(find /sys/fs/cgroup/ -name cpu.max -o -name memory.max"
        " -o -name memory.limit_in_bytes -o -name 'cpu.cfs_*_us'); do echo \"FILE $f\"; cat $f; done"
    )
    limits = engine.create_host_config(cpu_period=100_000, cpu_quota=70_000, mem_limit="96m")
    container = engine.create_container(busybox, ["sh", "-c", script], host_config=limits)["Id"]
    try:
        engine.start(container)
        engine.wait(container, timeout=60)
        printed = engine.logs(container).decode()
    finally:
        engine.remove_container(container, force=True)
    files = {}
    for part in printed.split("FILE /")[1:]:
        name, _, text = part.partition("\n")
        files[name] = text
    assert cores_and_memory(machine(tmp_path, files)) == (0.7, 96)


# -- GPUs -------------------------------------------------------------------------------------------------------------

A4000, TITAN = "NVIDIA RTX A4000:16376:8.6", "NVIDIA TITAN V:12066:7.0"
#: A Gpu is a slotted dataclass, which JSON does not know.
READ = """
import dataclasses, json, sys
from jobfetcher.resources.detect import read_gpus
print(json.dumps(read_gpus(sys.argv[1]), default=dataclasses.asdict))
"""


def python(script: str, env: dict[str, str], *arguments: str) -> str:
    """What a new Python process prints: LD_LIBRARY_PATH is read at its start only."""
    repository = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=env, cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def gpu(stub: GpuStub, index: int, model: str, memory_mib: int, archi: str) -> dict[str, object]:
    return {"uuid": stub.uuid(index), "model": model, "memory_mib": memory_mib, "archi": archi}


def test_gpus_as_nvml_lists_them(gpus: GpuStub) -> None:
    found, problems, absent = json.loads(python(READ, gpus.env(A4000, TITAN), "all"))
    assert found == [gpu(gpus, 0, "NVIDIA RTX A4000", 16376, "8.6"), gpu(gpus, 1, "NVIDIA TITAN V", 12066, "7.0")]
    assert (problems, absent) == ([], [])


@pytest.mark.parametrize(
    ("allowed", "indices"), [("", [0, 1]), ("ALL", [0, 1]), ("none", []), ("{1}", [1]), (" {1} , {0}", [0, 1])]
)
def test_gpus_setting_chooses(gpus: GpuStub, allowed: str, indices: list[int]) -> None:
    wanted = allowed.format(gpus.uuid(0), gpus.uuid(1))
    found, _, absent = json.loads(python(READ, gpus.env(A4000, TITAN), wanted))
    assert [one["uuid"] for one in found] == [gpus.uuid(index) for index in indices]
    assert absent == []


def test_an_unknown_gpu_is_an_error_that_names_those_present(gpus: GpuStub) -> None:
    script = (
        "import sys; from jobfetcher.resources.detect import *\n"
        "try: detect(sys.argv[1])\n"
        "except ConfigError as error: print(error)"
    )
    said = python(script, gpus.env(A4000), f"{gpus.uuid(0)},GPU-gone")
    assert said == f"GPUS names GPU-gone, not on this machine; present: {gpus.uuid(0)} (NVIDIA RTX A4000)\n"


def test_one_gpu_that_fails_does_not_hide_the_others(gpus: GpuStub) -> None:
    lost = (
        "import pynvml\nreal = pynvml.nvmlDeviceGetMemoryInfo\n"
        "def broken(handle):\n"
        "    if pynvml.nvmlDeviceGetName(handle).endswith('A4000'):\n"
        "        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)\n"
        "    return real(handle)\n"
        "pynvml.nvmlDeviceGetMemoryInfo = broken\n"
    )
    found, problems, _ = json.loads(python(lost + READ, gpus.env(A4000, TITAN), "all"))
    assert found == [gpu(gpus, 1, "NVIDIA TITAN V", 12066, "7.0")]
    assert len(problems) == 1
    assert "GPU number 0 does not answer" in problems[0]


def test_a_driver_without_gpus_and_no_driver_at_all_have_a_reason(gpus: GpuStub, tmp_path: Path) -> None:
    assert json.loads(python(READ, gpus.env(), "all")) == [[], ["the NVIDIA driver lists no GPU"], []]
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    found, problems, _ = json.loads(python(READ, {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}, "all"))
    assert found == []
    assert len(problems) == 1
    assert "no NVIDIA driver here" in problems[0]


def test_a_driver_that_does_not_answer_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", broken)
    reading = read_gpus()
    assert reading.gpus == ()
    assert len(reading.problems) == 1
    assert "the NVIDIA driver does not answer (Driver Not Loaded)" in reading.problems[0]


def real_gpus() -> GpuReading:
    """The GPUs of this machine; skips where no driver is."""
    if not Path("/proc/driver/nvidia/version").exists():
        pytest.skip("no NVIDIA driver on this machine")
    reading = read_gpus()
    assert reading.gpus, reading.problems
    return reading


@pytest.mark.gpu
def test_a_real_gpu() -> None:
    for one in real_gpus().gpus:
        assert one.uuid.startswith("GPU-")
        assert one.memory_mib > 0
        assert float(one.archi) >= 3.0


@pytest.mark.gpu
def test_reading_a_real_gpu_again_and_again_takes_nothing_more() -> None:
    """A worker that asks every 30 s does so 20,000 times a week."""
    known = [gpu.uuid for gpu in real_gpus().gpus]
    before = held()
    for _ in range(500):
        assert [gpu.uuid for gpu in read_gpus().gpus] == known
    descriptors, resident_mib = held()
    assert descriptors == before[0]
    assert resident_mib - before[1] < 2


def held() -> tuple[int, float]:
    """How many descriptors this process has open, and its resident set in MiB."""
    process = psutil.Process()
    return process.num_fds(), process.memory_info().rss / 1024**2
