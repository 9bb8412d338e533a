"""What this machine has: cores and memory as the kernel limits them, GPUs as NVML lists them.

Used by `build` (once at start, and as the probes of `budget` and the runner) and by `jobfetcher resources`. Reads
/proc, the cgroup files and NVML; changes nothing. All memory in MiB.

A worker in a container without limits sees the whole host, which is right: jobs are its siblings, not its children. A
worker with limits offers no more than its own limits say.

A GPU that fell off the bus can make an NVML call hang for ever, so NVML is asked in a thread of its own, with a
deadline (FAULTS.md E14). Not done: a GPU that is partitioned with MIG is offered as one whole.

NVIDIA's library, once loaded, holds 18 MiB (it brings libcuda along), and a reading takes 7 ms of processor time: on an
H200, driver 580. It stays loaded between readings all the same: to unload it gives 14 MiB back, but takes twice the
time and leaves an open descriptor behind each time, 2,880 a day, where a process may often have 1,024.
"""

from __future__ import annotations

import math
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from jobfetcher.core.errors import ConfigError
from jobfetcher.core.machine import Gpu, Inventory
from jobfetcher.core.ports import Emit

_MIB = 1024 * 1024

#: How long the NVIDIA driver may take to list its GPUs, in seconds. Without persistence mode it wakes them up first.
_NVML_DEADLINE_S = 10.0

_NO_DRIVER = "no NVIDIA driver here (libnvidia-ml.so.1 is not found): no GPU is offered"
_NONE_WANTED = "GPUS=none: no GPU is offered"

#: Docker names architectures as Go does; the kernel's other names (ppc64le, s390x, riscv64) are the same in both.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}


class GpuReading(NamedTuple):
    """The GPUs that may be used, in NVML's order, and why there are not more, as sentences for people.

    `absent`: UUIDs that were asked for and are not there.
    """

    gpus: tuple[Gpu, ...]
    problems: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


def detect(gpus_allowed: str = "all", root: Path = Path("/")) -> Inventory:
    """What this machine has for jobs and the worker together.

    `gpus_allowed` is the setting GPUS: `all`, `none`, or UUIDs separated by commas. `root` is where /proc and /sys are.
    Raises ConfigError when GPUS names a GPU that is not here, or /proc cannot be read.
    """
    reading = read_gpus(gpus_allowed)
    if reading.absent:
        present = ", ".join(f"{gpu.uuid} ({gpu.model})" for gpu in read_gpus().gpus) or "none"
        why = f" ({'; '.join(reading.problems)})" if reading.problems else ""
        raise ConfigError(f"GPUS names {', '.join(reading.absent)}, not on this machine; present: {present}{why}")
    machine = platform.machine()
    return Inventory(
        # the affinity mask already has the cpuset in it: the kernel keeps it a subset (cpuset(7))
        cpu_cores=min(float(len(os.sched_getaffinity(0))), _cpu_quota(root)),
        memory_mib=_memory_mib(root, _host_memory(root)[0]),
        gpus=reading.gpus,
        architecture=_ARCHITECTURES.get(machine, machine),
    )


def memory_in_use_mib(root: Path = Path("/")) -> int:
    """MiB of `Inventory.memory_mib` that programs use now, the worker and the running jobs among them.

    Host total less what a new program could have without swapping (proc_meminfo(5), MemAvailable). Where the worker's
    own limit leaves part of the host's memory to others, what they use comes out of that part first: 20 of 64 GiB in
    use take nothing from a worker that is limited to 4.
    """
    total, available = _host_memory(root)
    in_use_mib = (total - available) // _MIB
    return max(0, in_use_mib - (total // _MIB - _memory_mib(root, total)))


def read_gpus(gpus_allowed: str = "all") -> GpuReading:
    """The GPUs that GPUS (see `detect`) allows, with what is free on each at this moment. Never raises."""
    listed = [word.strip() for word in gpus_allowed.split(",") if word.strip()]
    everything = not listed or [word.lower() for word in listed] == ["all"]
    if [word.lower() for word in listed] == ["none"]:
        return GpuReading((), (_NONE_WANTED,))
    gpus, problems = _driver.read()
    if everything:
        return GpuReading(gpus, problems)
    present = {gpu.uuid for gpu in gpus}
    return GpuReading(
        tuple(gpu for gpu in gpus if gpu.uuid in listed),
        problems,
        tuple(uuid for uuid in listed if uuid not in present),
    )


def gone(gpus: Sequence[Gpu]) -> str:
    """What is wrong with GPUs that a job held, in one sentence; nothing when all of them answer."""
    if not gpus:
        return ""
    reading = read_gpus()
    answering = {gpu.uuid for gpu in reading.gpus}
    lost = ", ".join(f"{gpu.model} ({gpu.uuid})" for gpu in gpus if gpu.uuid not in answering)
    return f"GPU {lost} does not answer any more: {_joined(reading.problems)}" if lost else ""


class GpuProbe:
    """The GPUs for jobs, read anew at each call: those that answer the driver and are not set aside. For one thread,
    but for `set_aside`.

    `emit` hears `gpu_trouble` when there are fewer than there were, or one does not answer, and `gpu_well` when that is
    over: once per change, not per reading. It hears `gpu_set_aside` and `gpu_back` of one that answers the driver and
    does not work in a container (FAULTS.md E14).
    """

    def __init__(self, gpus_allowed: str, emit: Emit) -> None:
        self._allowed = gpus_allowed
        self._emit = emit
        self._known: dict[str, Gpu] = {}
        self._trouble = ""
        self._aside: dict[str, str] = {}

    def every(self) -> tuple[Gpu, ...]:
        """All that answer the driver, also those that are set aside."""
        return read_gpus(self._allowed).gpus

    def is_aside(self, gpu: Gpu) -> bool:
        """Whether no job gets it."""
        return gpu.uuid in self._aside

    def set_aside(self, gpu: Gpu, why: str) -> None:
        """No job gets it from now on, because of `why`, which is told once while it stays the same."""
        if self._aside.get(gpu.uuid) != why:
            self._aside[gpu.uuid] = why
            message = f"GPU {gpu.model} ({gpu.uuid}) is set aside; no job gets it until it works: {why}"
            self._emit("gpu_set_aside", level="error", message=message)

    def take_back(self, gpu: Gpu) -> None:
        """Jobs may get it again."""
        if self._aside.pop(gpu.uuid, None) is not None:
            self._emit("gpu_back", message=f"GPU {gpu.model} ({gpu.uuid}) works in a container again; jobs get it")

    def __call__(self) -> tuple[Gpu, ...]:
        reading = read_gpus(self._allowed)
        self._known.update((gpu.uuid, gpu) for gpu in reading.gpus)
        trouble = self._trouble_in(reading)
        if trouble and trouble != self._trouble:
            self._emit("gpu_trouble", level="error", message=f"{trouble}; jobs get only the GPUs that answer")
        elif self._trouble and not trouble:
            self._emit("gpu_well", message="all GPUs answer again")
        self._trouble = trouble
        return tuple(gpu for gpu in reading.gpus if gpu.uuid not in self._aside)

    def _trouble_in(self, reading: GpuReading) -> str:
        answering = {gpu.uuid for gpu in reading.gpus}
        lost = [f"GPU {gpu.model} ({uuid}) is gone" for uuid, gpu in self._known.items() if uuid not in answering]
        # A machine that never had a GPU has no trouble.
        usual = set() if lost else {_NO_DRIVER, _NONE_WANTED}
        return "; ".join([*lost, *(problem for problem in reading.problems if problem not in usual)])


_Answer = tuple[tuple[Gpu, ...], tuple[str, ...]]


class _Driver:
    """Asks NVML in a thread of its own. While one question hangs no other is asked, and nobody waits for it again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: Future[_Answer] | None = None
        self._asked_at = 0.0

    def read(self) -> _Answer:
        """All GPUs, and what is wrong; callers at the same time share one answer. Ends within the deadline."""
        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked, self._asked_at = Future(), time.monotonic()
                # a daemon: a call that hangs must not keep the worker from ending
                helper = threading.Thread(target=_answer, args=(self._asked,), name="nvml", daemon=True)
                try:
                    helper.start()
                except RuntimeError as error:
                    self._asked = None
                    return (), (f"this machine lets the worker start no more threads ({error}): no GPU is offered",)
            asked, waited = self._asked, time.monotonic() - self._asked_at
        try:
            return asked.result(timeout=max(0.0, _NVML_DEADLINE_S - waited))
        except TimeoutError:
            return (), (f"the NVIDIA driver does not answer within {_NVML_DEADLINE_S:g} s: no GPU is offered",)


_driver = _Driver()


def _answer(asked: Future[_Answer]) -> None:
    try:
        asked.set_result(_nvml_gpus())
    except BaseException as error:
        asked.set_exception(error)


def _nvml_gpus() -> _Answer:
    """All GPUs of the driver, and what went wrong while asking for them."""
    import pynvml  # here: a machine without GPUs, and `--help`, should not pay for it

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return (), (_NO_DRIVER,)
    except pynvml.NVMLError as error:
        return (), (f"the NVIDIA driver does not answer ({error}): no GPU is offered",)
    gpus: list[Gpu] = []
    problems: list[str] = []
    try:
        count = int(pynvml.nvmlDeviceGetCount())
        if not count:
            problems.append("the NVIDIA driver lists no GPU")
        for index in range(count):
            try:
                gpus.append(_nvml_gpu(index))
            except pynvml.NVMLError as error:
                problems.append(f"GPU number {index} does not answer ({error}) and is not offered")
    except pynvml.NVMLError as error:
        problems.append(f"the NVIDIA driver does not list its GPUs ({error}): no GPU is offered")
    finally:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError as error:
            problems.append(f"the NVIDIA driver could not be let go of ({error})")
    return tuple(gpus), tuple(problems)


def _nvml_gpu(index: int) -> Gpu:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        model=str(pynvml.nvmlDeviceGetName(handle)),
        # not `free`: what the driver keeps for itself counts as used
        memory_mib=(int(memory.total) - int(memory.used)) // _MIB,
        archi=f"{major}.{minor}",
    )


def _host_memory(root: Path) -> tuple[int, int]:
    """Total and available bytes of the host (or, under lxcfs, of the container)."""
    import psutil  # here, as pynvml: `--help` should not pay for it

    psutil.PROCFS_PATH = str(root / "proc")  # psutil's own switch for a /proc that is mounted elsewhere
    try:
        memory = psutil.virtual_memory()
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"the memory of this machine cannot be read ({error!r}); is /proc mounted?") from error
    return memory.total, memory.available


def _memory_mib(root: Path, host_total: int) -> int:
    """The lower of the host's total (bytes) and the own cgroup's limit, in MiB."""
    limits = [host_total]
    for directory in _own_cgroups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # v2: "max" or bytes; v1: bytes, 2^63 rounded is no limit
            text = _read_line(directory / name)
            if text.isdecimal():
                limits.append(int(text))
    return min(limits) // _MIB


def _cpu_quota(root: Path) -> float:
    """Cores that the own cgroup may use on average; infinite where there is no limit."""
    quotas = [math.inf]
    for directory in _own_cgroups(root, "cpu"):
        v2 = _read_line(directory / "cpu.max").split()  # "max 100000" or "150000 100000"
        v1 = [_read_line(directory / "cpu.cfs_quota_us"), _read_line(directory / "cpu.cfs_period_us")]  # "-1": no limit
        for pair in (v2, v1):
            if len(pair) == 2 and all(word.isdecimal() and int(word) > 0 for word in pair):
                quotas.append(int(pair[0]) / int(pair[1]))
    return min(quotas)


def _own_cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The directories of our own cgroup of `controller` and of all its parents that can be seen, in v2 and in v1.

    Every one of them limits us, whichever is lowest. Formats: cgroups(7), proc_pid_mountinfo(5).
    """
    own: dict[str, str] = {}
    for line in _read_lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        own.update(dict.fromkeys(controllers.split(","), path))  # v2 has no controllers here: its name is ""
    for line in _read_lines(root / "proc/self/mountinfo"):
        mount, _, rest = line.partition(" - ")
        kind, _, options = rest.partition(" ")
        if kind == "cgroup2":
            path = own.get("", "/")
        elif kind == "cgroup" and controller in options.rpartition(" ")[2].split(","):
            path = own.get(controller, "/")
        else:
            continue
        mount_root, mount_point = mount.split(" ")[3:5]
        top = root / mount_point.lstrip("/")
        yield top
        # Of a container's own cgroup only the part below what is mounted can be seen; a path that is not below it (as
        # in another cgroup namespace) cannot be.
        if ".." not in path and Path(path).is_relative_to(mount_root):
            directory = top / Path(path).relative_to(mount_root)
            while directory != top:
                yield directory
                directory = directory.parent


def _joined(problems: Sequence[str]) -> str:
    return "; ".join(problems) or "the driver does not list it"


def _read_lines(path: Path) -> list[str]:
    """The lines of a kernel file; none if it is not there: such a kernel or container has no such limit."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _read_line(path: Path) -> str:
    return next(iter(_read_lines(path)), "").strip()
