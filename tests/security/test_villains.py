"""Jobs that exhaust whatever they can, through a whole worker: it keeps its word all the same (T12, D4)."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.services import require, wait_until
from tests.support.worker import DEADLINE_S, Lab, running_worker

pytestmark = pytest.mark.docker

#: How often a keep-alive is sent here, and how long the silence between two may be, in seconds; in real life these are
#: 30 and 90 (FAULTS.md N4).
BEAT_S, SILENCE_S = 2, 10

#: Two jobs with several vices each: a machine of two cores takes no more than three jobs. The bomb goes off in a shell
#: of its own: the job's shell would end if its own second fork came when all processes are taken.
VILLAINS = [
    "b() { b | b & }; (b) & while true; do echo 0123456789012345678901234567890123456789; done",
    "for i in 1 2 3 4; do while :; do :; done & done; for i in $(seq 20000); do : > /files/out/$i; done; "
    "while true; do tail /dev/zero; done",
]


def resident_mib() -> float:
    """What this process, the worker in it, has in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.fault("T12", "N4")
def test_villains_side_by_side_neither_silence_the_worker_nor_stop_another_job(lab: Lab) -> None:
    villains = [lab.submit(cmd, hardware={"memory": 64}, files_up={"output": "out"}) for cmd in VILLAINS]
    settings = lab.settings(
        max_jobs=str(len(villains) + 1), timeout_status=str(BEAT_S), job_pids_limit="100", reserve_memory="64"
    )
    with running_worker(settings) as running:
        for job in villains:
            lab.server.wait_for_state(job, "running", timeout_s=DEADLINE_S)
        honest = lab.submit("echo fine > /files/out/a", hardware={"memory": 64}, files_up={"output": "out"})
        rage_until = time.monotonic() + 2 * SILENCE_S / 3
        while time.monotonic() < rage_until or lab.server.state(honest) != "finished":
            asked = time.monotonic()
            assert [lab.server.state(job) for job in villains] == ["running"] * len(villains)
            assert time.monotonic() - asked < 5  # another program of this machine answers
            assert time.monotonic() < rage_until + DEADLINE_S, (
                f"the honest job does not end: {running.heard.all()[-15:]}"
            )
            time.sleep(0.1)
        assert lab.server.results(honest)["output/out/a"] == b"fine\n"
        for job in villains:
            lab.server.delete(job)
        wait_until(lambda: not lab.containers(), "the villains are gone", DEADLINE_S)
    for job in villains:
        beats = [event["time"] for event in lab.server.events("update", job)]
        assert len(beats) > 2
        assert max(later - earlier for earlier, later in pairwise(beats)) < SILENCE_S


@pytest.mark.fault("D4", "N8")
def test_a_job_that_prints_without_end_fills_neither_disk_nor_memory(lab: Lab) -> None:
    """A small part of the 10 GB of the row: twice what is kept, so that every file of it was turned over."""
    root = Path(str(lab.engine.info()["DockerRootDir"]), "containers")
    require(root if os.access(root, os.R_OK | os.X_OK) else None, "root rights, to see the engine's directory")
    line = "0123456789" * 10
    job = lab.submit(
        f"yes {line} | head -c {64 * 2**20}; echo the last line; touch /files/printed; sleep 600",
        hardware={"memory": 64},
        files_up={"output": "out"},
    )
    with running_worker(lab.settings(job_disk_limit="1024")) as running:
        lab.server.wait_for_state(job, "running", timeout_s=DEADLINE_S)
        before = resident_mib()
        wait_until((lab.files(job) / "printed").exists, "it has printed all", DEADLINE_S)
        (container,) = lab.containers()
        files = list((root / str(container["Id"])).rglob("*"))
        assert sum(path.stat().st_blocks * 512 for path in files if path.is_file()) <= 40 * 2**20
        assert lab.server.state(job) == "running"  # printing is no crime
        lab.engine.stop(container["Id"], timeout=0)
        running.heard.wait_for("job_ended")
        lab.server.wait_for_state(job, "error", timeout_s=DEADLINE_S)
        assert resident_mib() - before <= 64
    kept = lab.server.results(job)["log/jobfetcher/container.log"]
    assert kept.endswith(b"the last line\n")
    assert len(kept) <= 40 * 2**20
    assert len(lab.ended(job)[1].encode()) <= 1500
