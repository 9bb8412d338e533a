"""GPUs that fall off the bus, and a driver that hangs (E14): the real pynvml on the NVML stub, in processes.

The stub is a double at the C boundary: no machine lets a test break a GPU. What the driver of a real one answers is
taken from NVIDIA's nvml.h (GPU_IS_LOST, "Unknown Error").
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.services import GpuStub

A4000, TITAN = "NVIDIA RTX A4000:16376:8.6", "NVIDIA TITAN V:12066:7.0"

#: What every script below begins with. `control(lines)` breaks and mends the GPUs of this very process.
PRELUDE = """
import dataclasses, json, os, threading, time
from pathlib import Path
from jobfetcher.core.errors import WorkerFault
from jobfetcher.core.job import Needs
from jobfetcher.core.machine import Inventory
from jobfetcher.resources import detect
from jobfetcher.resources.budget import Budget

detect._NVML_DEADLINE_S = float(os.environ["DEADLINE_S"])
said = []

def emit(name, /, level="info", **fields):
    said.append([name, level, fields["message"]])

def control(*lines):
    file = Path(os.environ["JF_STUB_CONTROL"])
    file.with_suffix(".new").write_text("".join(line + "\\n" for line in lines))
    file.with_suffix(".new").rename(file)

def uuids(gpus):
    return [gpu.uuid for gpu in gpus]

def timed(call, *arguments):
    began = time.monotonic()
    return call(*arguments), time.monotonic() - began

def until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)

def asking():
    return [thread.name for thread in threading.enumerate() if thread.name == "nvml"]

probe = detect.GpuProbe("all", emit)
found = probe()
"""


def run(gpus: GpuStub, folder: Path, script: str, *present: str, deadline_s: float = 10.0) -> dict[str, Any]:
    """What a script prints, as JSON, in a new Python process that sees these GPUs."""
    env = gpus.env(*present) | {"JF_STUB_CONTROL": str(folder / "control"), "DEADLINE_S": str(deadline_s)}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script],
        env=env,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


@pytest.mark.fault("E14")
@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("lost", "GPU number 0 does not answer (GPU is lost) and is not offered"),
        ("unknown", "GPU number 0 does not answer (Unknown Error) and is not offered"),
        ("vanish", ""),
    ],
)
def test_a_gpu_that_fails_is_not_offered_and_told_once(gpus: GpuStub, tmp_path: Path, mode: str, why: str) -> None:
    script = f"""
first, second = found
control("{mode} 0")
broken = [uuids(probe()) for _ in range(3)]
blame = [detect.gone([first]), detect.gone([second]), detect.gone([first, second]), detect.gone([])]
told = list(said)
control()
mended = uuids(probe())
probe()
print(json.dumps(dict(broken=broken, blame=blame, told=told, mended=mended, then=said[len(told):])))
"""
    seen = run(gpus, tmp_path, script, A4000, TITAN)
    name = f"NVIDIA RTX A4000 ({gpus.uuid(0)})"
    assert seen["broken"] == [[gpus.uuid(1)]] * 3
    assert seen["blame"][0] == f"GPU {name} does not answer any more: {why or 'the driver does not list it'}"
    assert seen["blame"][1] == ""
    assert seen["blame"][2] == seen["blame"][0]
    assert seen["blame"][3] == ""
    trouble = "; ".join(filter(None, [f"GPU {name} is gone", why]))
    assert seen["told"] == [["gpu_trouble", "error", f"{trouble}; jobs get only the GPUs that answer"]]
    assert seen["mended"] == [gpus.uuid(0), gpus.uuid(1)]
    assert seen["then"] == [["gpu_well", "info", "all GPUs answer again"]]


@pytest.mark.fault("E14")
def test_a_gpu_that_is_set_aside_is_not_offered_until_it_is_taken_back(gpus: GpuStub, tmp_path: Path) -> None:
    """The driver says that all is well: it is containers that do not get it."""
    script = """
first, second = found
for _ in range(3):
    probe.set_aside(first, "no container gets it")
budget = Budget(Inventory(8.0, 8192, found), slots=2, memory_in_use_mib=lambda: 0, read_gpus=probe)
aside = uuids(budget.offer().gpus)
every = uuids(probe.every())
probe.set_aside(first, "another reason")
for _ in range(2):
    probe.take_back(first)
print(json.dumps(dict(aside=aside, every=every, back=uuids(budget.offer().gpus), told=said)))
"""
    seen = run(gpus, tmp_path, script, A4000, TITAN)
    both = [gpus.uuid(0), gpus.uuid(1)]
    assert (seen["aside"], seen["every"], seen["back"]) == ([gpus.uuid(1)], both, both)
    name = f"GPU NVIDIA RTX A4000 ({gpus.uuid(0)})"
    waits = f"{name} is set aside; no job gets it until it works"
    assert seen["told"] == [
        ["gpu_set_aside", "error", f"{waits}: no container gets it"],
        ["gpu_set_aside", "error", f"{waits}: another reason"],
        ["gpu_back", "info", f"{name} works in a container again; jobs get it"],
    ]


@pytest.mark.fault("E14")
def test_fewer_gpus_are_offered_and_jobs_without_one_go_on(gpus: GpuStub, tmp_path: Path) -> None:
    script = """
budget = Budget(Inventory(8.0, 8192, found), slots=2, memory_in_use_mib=lambda: 0, read_gpus=probe,
                gpu_unasked=False)
before = uuids(budget.offer().gpus)
control("lost 0", "lost 1")
offer = budget.offer()
try:
    budget.reserve(Needs(cpu_cores=1, memory_mib=100, gpu_mem_mib=1000))
    refused = ""
except WorkerFault as error:
    refused = str(error)
without = budget.reserve(Needs(cpu_cores=1, memory_mib=100, gpu_mem_mib=0)).share
print(json.dumps(dict(before=before, after=uuids(offer.gpus), cores=offer.cpu_cores, refused=refused,
                      cores_held=without.cpu_cores)))
"""
    seen = run(gpus, tmp_path, script, A4000, TITAN)
    assert seen["before"] == [gpus.uuid(0), gpus.uuid(1)]
    assert (seen["after"], seen["cores"]) == ([], 7.9)
    assert seen["refused"] == "the job asks for a GPU with 1000 MiB; no GPU is free on this machine"
    assert seen["cores_held"] == 1


@pytest.mark.fault("E14")
def test_a_driver_that_hangs_is_waited_for_once_and_asked_again_when_it_answers(gpus: GpuStub, tmp_path: Path) -> None:
    script = """
control("hang")
first, first_s = timed(probe)
later = [timed(probe) for _ in range(20)]
blame, blame_s = timed(detect.gone, found)
helpers = asking()
control()
until(lambda: not asking())
print(json.dumps(dict(first=uuids(first), first_s=first_s, later=[uuids(gpus) for gpus, _ in later],
                      later_s=max(took for _, took in later), blame=blame, blame_s=blame_s, helpers=helpers,
                      again=uuids(probe()), told=said)))
"""
    seen = run(gpus, tmp_path, script, A4000, TITAN, deadline_s=1.0)
    both = f"GPU NVIDIA RTX A4000 ({gpus.uuid(0)}) is gone; GPU NVIDIA TITAN V ({gpus.uuid(1)}) is gone"
    why = "the NVIDIA driver does not answer within 1 s: no GPU is offered"
    assert seen["first"] == []
    assert 0.9 < seen["first_s"] < 5
    assert seen["later"] == [[]] * 20
    assert max(seen["later_s"], seen["blame_s"]) < 0.9  # nobody waits a second time
    assert seen["blame"].endswith(f"does not answer any more: {why}")
    assert seen["helpers"] == ["nvml"]
    assert seen["again"] == [gpus.uuid(0), gpus.uuid(1)]
    assert seen["told"] == [
        ["gpu_trouble", "error", f"{both}; {why}; jobs get only the GPUs that answer"],
        ["gpu_well", "info", "all GPUs answer again"],
    ]


@pytest.mark.fault("E14")
def test_callers_at_the_same_time_share_one_question_to_a_hung_driver(gpus: GpuStub, tmp_path: Path) -> None:
    script = """
control("hang")
took = []
callers = [threading.Thread(target=lambda: took.append(timed(detect.read_gpus)[1])) for _ in range(8)]
for caller in callers:
    caller.start()
until(asking)
helpers = len(asking())
for caller in callers:
    caller.join()
print(json.dumps(dict(took=max(took), calls=len(took), helpers=max(helpers, len(asking())))))
"""
    seen = run(gpus, tmp_path, script, A4000, deadline_s=1.0)
    assert seen["calls"] == 8
    assert seen["took"] < 5
    assert seen["helpers"] == 1


@pytest.mark.fault("E14")
def test_a_process_ends_while_the_driver_hangs(gpus: GpuStub, tmp_path: Path) -> None:
    script = """
control("hang")
probe()
print(json.dumps(dict(helpers=asking())), flush=True)
"""
    began = time.monotonic()
    assert run(gpus, tmp_path, script, A4000, deadline_s=0.3) == {"helpers": ["nvml"]}
    assert time.monotonic() - began < 30  # `run` would give up after 50


def test_a_machine_without_gpus_has_no_trouble_to_tell(gpus: GpuStub, tmp_path: Path) -> None:
    no_driver = tmp_path / "none"
    no_driver.mkdir()
    (no_driver / "libnvidia-ml.so.1").write_text("not a library")
    empty = GpuStub(no_driver)
    assert run(empty, tmp_path, "print(json.dumps(dict(found=found, told=said)))") == {"found": [], "told": []}


def test_a_driver_that_answers_badly_at_the_start_is_told(gpus: GpuStub, tmp_path: Path) -> None:
    (tmp_path / "control").write_text("unknown 0\n")
    seen = run(gpus, tmp_path, "print(json.dumps(dict(found=uuids(found), told=said)))", A4000, TITAN)
    assert seen["found"] == [gpus.uuid(1)]
    assert [level for _, level, _ in seen["told"]] == ["error"]
    assert "GPU number 0 does not answer (Unknown Error)" in seen["told"][0][2]
