"""P8 and P9: the memory and the heartbeats of a real worker while it moves a lot and both cores are kept busy.

One worker (`python -m jobfetcher run`, beating every 5 s) runs two jobs in turns: one with an input and an output of
4 GiB, one with 20,000 outputs in 20 folders. The API is mock_api; nginx is its storage, so that the worker is the one
that is busy. All of it is on the disk, not in memory: 16 GiB would not fit. The 4 GiB are zeros that take no room where
they come from; the worker and nginx write them in full.

A job computes only between its transfers, so what keeps the cores busy *during* the transfers is a container of this
module, for the whole time: one endless loop per core, with the CPU weight of a job and without its limit, which leaves
less to the worker than any job may.

Memory is what the kernel keeps (VmHWM in /proc, set back to the present size before each job): the highest of all jobs,
against the highest of three seconds of idling before the first. Gaps are the times between two words about one job, in
the mock API's record, from the moment when it handed the job out.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import docker

from benchmarks.frame import GIB, MIB, Bench, Row, in_words
from benchmarks.jobs import Api, running_api
from benchmarks.servers import running_nginx
from jobfetcher.engine.run_spec import BoxPolicy
from tests.support.services import docker_client, ensure_busybox_image, wait_until
from tests.support.worker import command

_BEAT_S = 5
_ALLOWED_MIB = 64
_GAP_S = 7.0
_FOLDERS = 20

#: A 4 GiB job on busy cores takes about a minute.
_JOB_TIMEOUT_S = 900.0


def peak(bench: Bench) -> Iterator[Row]:
    """P8 and P9."""
    size, files = (64 * MIB, 400) if bench.short else (4 * GIB, 20_000)
    # a word of at most 16 letters per file, written by the shell itself: no process is started for it
    write = f"mkdir $d; i=0; while [ $i -lt {files // _FOLDERS} ]; do echo $d-$i > $d/$i; i=$((i+1)); done"
    jobs = {
        f"{in_words(size)} in and out": f"truncate -s {size} /files/out/large",
        f"{files} outputs": f"cd /files/out; for d in $(seq {_FOLDERS}); do {write}; done",
    }
    peaks: dict[str, list[float]] = {what: [] for what in jobs}
    stored = bench.disk / "api" / "data" / "files"
    with contextlib.ExitStack() as opened:
        engine = opened.enter_context(contextlib.closing(docker_client()))
        image = ensure_busybox_image(engine)
        nginx = opened.enter_context(running_nginx(bench.disk / "nginx", stored))
        api = opened.enter_context(running_api(bench.disk / "api", MOCK_API_STORAGE_URL=nginx.http))
        large = api.put_input("large", b"large")
        os.truncate(stored / "inputs" / "large", size)
        settings = {
            "API_URL": api.url,
            "ACCESS_TOKEN": "mock-token",
            "PATH_BASE": str(bench.disk / "base"),
            "TIMEOUT_JOB": "1",
            "TIMEOUT_STATUS": str(_BEAT_S),
            "GPUS": "none",
            "RESERVE_DISK": "0",
            "JOB_NETWORK_GUARD": "off",  # a measurement leaves no rules in the firewall
        }
        worker = opened.enter_context(command(["run"], settings, bench.disk))
        worker.wait_for("asking http")
        _forget_peak(worker.pid)
        time.sleep(3)
        idle = _peak_mib(worker.pid)
        opened.enter_context(_busy_cores(engine, image))
        done: list[int] = []
        for turn in range(bench.repeats):
            for what, script in jobs.items():
                inputs = {"in/large": large} if "in" in what.split() else {}
                _forget_peak(worker.pid)
                started = time.monotonic()
                done.append(_run(api, image, script, inputs))
                peaks[what].append(_peak_mib(worker.pid))
                took = time.monotonic() - started
                bench.say(f"{turn + 1}: {what}: {peaks[what][-1]:.1f} MiB (idle {idle:.1f}), {took:.0f} s")
        gaps = sorted(gap for job_id in done for gap in _gaps(api, job_id))
    for what, found in peaks.items():
        yield bench.at_most("P8", f"peak memory, {what}", max(found), "MiB", "idle", idle, _ALLOWED_MIB)
    p99 = gaps[math.ceil(len(gaps) * 0.99) - 1]
    what = f"heartbeat gap, p99 of {len(gaps)} (longest {gaps[-1]:.2f} s), cores busy"
    ok = bench.judge(p99 <= _GAP_S)
    yield Row("P9", what, p99, "s", "interval", _BEAT_S, p99 / _BEAT_S, f"value <= {_GAP_S:g} s", ok)


def _run(api: Api, image: str, script: str, inputs: dict[str, str]) -> int:
    """One job, from its submission to its end; its id."""
    handler = {"image_url": image, "files_down": inputs, "files_up": {"output": "out"}}
    job_id = api.submit({"app": {"cmd": [script]}, "handler": handler, "hardware": {}})

    def ended() -> bool:
        time.sleep(0.5)  # asking costs the machine something, too
        # `queued` is what a worker says that gives the job back
        return any(event["state"] in {"finished", "error", "queued"} for event in api.events("update", job_id))

    wait_until(ended, f"job {job_id} ended", _JOB_TIMEOUT_S)
    job = api.job(job_id)
    if job["state"] != "finished":
        raise AssertionError(f"job {job_id} is {job['state']}: {job['details']}")
    return job_id


def _gaps(api: Api, job_id: int) -> Iterator[float]:
    """Seconds between two words of the worker about a job, from when it was handed out to its end."""
    kinds = {"pull", "update"}
    times = [
        event["time"] for event in api.events(job_id=job_id) if event["kind"] in kinds and event["code"] in {None, 204}
    ]
    yield from (later - earlier for earlier, later in itertools.pairwise(times))


@contextlib.contextmanager
def _busy_cores(engine: docker.APIClient, image: str) -> Iterator[None]:
    """One endless loop per core, in one container, for the length of the block."""
    loops = "while :; do :; done & " * (os.cpu_count() or 1)
    host = engine.create_host_config(cpu_shares=BoxPolicy().cpu_shares, network_mode="none")
    container = engine.create_container(image, ["/bin/sh", "-c", f"{loops} wait"], host_config=host)["Id"]
    try:
        engine.start(container)
        yield
    finally:
        engine.remove_container(container, force=True)


def _forget_peak(pid: int) -> None:
    """proc(5), /proc/PID/clear_refs: 5 sets the peak back to the present size."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _peak_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) / 1024
    raise AssertionError(f"process {pid} has no VmHWM")
