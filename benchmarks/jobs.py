"""P1, P2 and P6: jobs through the real worker, against the container engine alone.

The worker is the real command (`python -m jobfetcher run`) with its shipped settings but for those named in
`_SETTINGS`, the API is `mock_api` in a process of its own, on loopback, with its files on the same disk. The peer makes
the *same* container (the worker's own `build_run_spec` and `box`, the same image, network and command, a job directory
with the same files) with the four calls that cannot be left out, create, start, wait and remove, written here on one
kept-alive connection to the engine: no SDK, no checks, nothing journaled, nothing moved.

The two take turns. While the peer is measured the worker is stopped (SIGSTOP), so that it costs nothing; while jobs are
queued it is stopped, too, so that it finds them all there.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx

from benchmarks.frame import MIB, Bench, Row, in_turns, seconds
from benchmarks.link import running_link
from benchmarks.servers import running_nginx
from jobfetcher import build
from jobfetcher.core.job import Job
from jobfetcher.core.machine import Share
from jobfetcher.core.run import Image
from jobfetcher.engine.api import DEFAULT_URL
from jobfetcher.engine.box import box
from jobfetcher.engine.run_spec import build_run_spec
from jobfetcher.resources import detect
from jobfetcher.settings import Settings
from tests.support.mock_server import MockServer
from tests.support.services import answers, docker_client, ensure_busybox_image, free_port, running, wait_until
from tests.support.worker import Command, command

#: The trivial job of P1 and P2: reads its two inputs, writes its two outputs.
COPY = ("cp /files/in/a /files/out/a && cp /files/in/b /files/out/b",)

#: Not the shipped ones: where the server is, and nothing that depends on the machine. It asks every 0.5 s, which only
#: matters when the queue was empty: after each job it asks at once. A measurement leaves no rules in the firewall.
_SETTINGS = {
    "access_token": "mock-token",
    "gpus": "none",
    "timeout_job": "0.5",
    "reserve_disk": "0",
    "job_network_guard": "off",
}


class Api(MockServer):
    """The mock API in a process of its own."""

    def finished_at(self, job_ids: Sequence[int]) -> list[float]:
        """When the server heard `finished` of each of these jobs, by its clock, in order of time."""
        return self._times("update", "finished", job_ids)

    def pulled_at(self, job_ids: Sequence[int]) -> list[float]:
        """When the server handed each of these jobs out, by its clock, in order of time."""
        return self._times("pull", None, job_ids)

    def _times(self, kind: str, state: str | None, job_ids: Sequence[int]) -> list[float]:
        wanted = set(job_ids)
        events = [event for event in self.events(kind) if event["job_id"] in wanted]
        times = sorted(event["time"] for event in events if state is None or event["state"] == state)
        if len(times) != len(wanted):
            raise AssertionError(f"{len(times)} of {len(wanted)} jobs have the event {kind} {state or ''}")
        return times


@contextlib.contextmanager
def running_api(data_dir: Path, **environment: str) -> Iterator[Api]:
    """The mock API as a command; `environment`: settings of it (MOCK_API_...)."""
    data_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "mock_api", "--port", str(port), "--data-dir", str(data_dir / "data")]
    env = {"PATH": os.environ.get("PATH", os.defpath), **environment}
    with (
        running(argv, data_dir / "log", lambda: answers(f"{url}/access_info"), env),
        httpx.Client(base_url=url, timeout=60.0, trust_env=False) as client,
    ):
        yield Api(url, data_dir / "data", client)


class Peer:
    """The engine alone, through its bare API on one kept-alive connection. For one thread."""

    def __init__(self) -> None:
        self._connection = http.client.HTTPConnection("localhost")
        self._connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.sock.connect(DEFAULT_URL.removeprefix("unix://"))

    def containers(self, config: bytes, count: int) -> None:
        """So many containers, one after the other, each from create to gone. `config`: the create call's body."""
        for _ in range(count):
            container = self.ask("POST", "/containers/create", config)["Id"]
            self.ask("POST", f"/containers/{container}/start")
            code = self.ask("POST", f"/containers/{container}/wait")["StatusCode"]
            self.ask("DELETE", f"/containers/{container}?v=1&force=1")
            if code != 0:
                raise AssertionError(f"the peer's container exited with {code}")

    def ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        """One call; the JSON it answers."""
        self._connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        with self._connection.getresponse() as answer:
            said = answer.read()
        if answer.status >= 300:
            raise AssertionError(f"{method} {path}: {answer.status} {said[:300]!r}")
        return json.loads(said) if said else None

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


@dataclass(frozen=True)
class Site:
    """One API, one worker, one image."""

    api: Api
    worker: Command
    settings: Settings
    image: str
    place: Path

    def spec(self, cmd: Sequence[str], inputs: dict[str, str]) -> dict[str, Any]:
        """A job as its user submits it; needs nothing, so gets an equal share of the machine."""
        return {
            "app": {"cmd": list(cmd)},
            "handler": {"image_url": self.image, "files_down": inputs, "files_up": {"output": "out"}},
            "hardware": {},
        }

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The worker is stopped inside the block."""
        self.worker.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.worker.send(signal.SIGCONT)

    def run(self, spec: dict[str, Any], count: int) -> list[int]:
        """Queue `count` such jobs while the worker is stopped, let it run them, and return their ids when all ended.

        AssertionError with the worker's last words when they do not end well and in time (30 s for each).
        """
        with self.paused():
            jobs = [self.api.submit(spec) for _ in range(count)]
        left = list(jobs)

        def all_ended() -> bool:
            while left and (state := self.api.state(left[-1])) in {"finished", "error"}:
                if state == "error":
                    raise AssertionError(f"job {left[-1]}: {self.api.job(left[-1])['details']}")
                left.pop()
            time.sleep(1.0)  # a question costs both sides some 3 ms, and the times are the server's own
            return not left

        try:
            wait_until(all_ended, f"{count} jobs ended", 30.0 * count)
        except AssertionError as error:
            last = "\n".join(self.worker.errors.splitlines()[-20:])
            raise AssertionError(f"{error}; the worker said:\n{last}") from None
        return jobs

    def container(self, cmd: Sequence[str], files: Path) -> bytes:
        """The create call's body that the worker sends for such a job, with `files` as its directory."""
        with closing(Peer()) as peer:
            image_id = peer.ask("GET", f"/images/{self.image}/json")["Id"]
            (network,) = peer.ask("GET", "/networks?" + urlencode({"filters": '{"name": ["^jobfetcher$"]}'}))
        slots = self.settings.max_jobs or 1
        inventory = detect.detect("none")
        budget = build.make_budget(self.settings, inventory, detect.GpuProbe("none", lambda *_, **__: None))
        budget.offer()
        free = budget.free()
        share = Share(free.cpu_cores / slots, free.memory_mib // slots, ())
        job = Job.model_validate({"id": "bench", "image": self.image, "command": list(cmd)})
        spec = build_run_spec(
            job,
            share,
            image=Image(image_id, self.image, None, ""),
            files_host_path=str(files),
            attempt=1,
            instance="bench",
            policy=build.make_box(self.settings),
        )
        return json.dumps(box(spec, network["Id"])).encode()


@contextlib.contextmanager
def site(place: Path, worker_settings: dict[str, str] | None = None, *, link_rate: int = 0) -> Iterator[Site]:
    """A worker that waits for jobs, and its API.

    With `link_rate` (bytes a second each way) the files are nginx's, behind a link; it throws away what it is sent.
    """
    with closing(docker_client()) as engine:
        image = ensure_busybox_image(engine)
    with ExitStack() as opened:
        storage = {}
        if link_rate:
            nginx = opened.enter_context(running_nginx(place / "nginx", place / "api" / "data" / "files"))
            port = opened.enter_context(running_link(place, nginx.port, in_all=link_rate))
            storage["MOCK_API_STORAGE_URL"] = f"http://127.0.0.1:{port}"
        api = opened.enter_context(running_api(place / "api", **storage))
        given = {"api_url": api.url, "path_base": str(place / "base"), **_SETTINGS, **(worker_settings or {})}
        worker = opened.enter_context(command(["run"], {name.upper(): value for name, value in given.items()}, place))
        worker.wait_for("asking http")
        yield Site(api, worker, Settings.model_validate(given), image, place)


def small_files(here: Site) -> tuple[dict[str, str], Path]:
    """Two inputs of 1 KiB on the server, and a job directory that has them, for the peer."""
    files = here.place / "peer"
    (files / "in").mkdir(parents=True)
    (files / "out").mkdir()
    inputs = {}
    for name in ("a", "b"):
        content = os.urandom(1024)
        (files / "in" / name).write_bytes(content)
        inputs[f"in/{name}"] = here.api.put_input(name, content)
    return inputs, files


def trivial(bench: Bench) -> Iterator[Row]:
    """P1. Seconds per job: from the first `finished` that the server heard to the last, over the jobs between."""
    jobs = 2 if bench.short else 6
    with site(bench.disk) as here:
        inputs, files = small_files(here)
        spec = here.spec(COPY, inputs)
        here.run(spec, 1)  # now the network for jobs is there, and everything is in memory

        def ours() -> float:
            done = here.api.finished_at(here.run(spec, jobs + 1))
            return (done[-1] - done[0]) / jobs

        config = here.container(COPY, files)
        with closing(Peer()) as peer:

            def engines() -> float:
                with here.paused():
                    return seconds(lambda: peer.containers(config, jobs)) / jobs

            value, baseline = in_turns(ours, engines, bench.repeats)
    what = "seconds per trivial job, one slot, 2 inputs and 2 outputs of 1 KiB"
    yield bench.at_most("P1", what, value, "s", "create, start, wait and remove alone", baseline, 0.10)


def side_by_side(bench: Bench) -> Iterator[Row]:
    """P2. Jobs per second: over the time from the first job handed out to the last one told `finished`.

    Both sides start with nothing going and end with nothing left, so both have idle slots around the last jobs.
    """
    slots, each = 4, 1 if bench.short else 6
    with site(bench.disk, {"max_jobs": str(slots)}) as here:
        inputs, files = small_files(here)
        spec = here.spec(COPY, inputs)
        here.run(spec, slots)

        def ours() -> float:
            jobs = here.run(spec, slots * each)
            return len(jobs) / (here.api.finished_at(jobs)[-1] - here.api.pulled_at(jobs)[0])

        with ExitStack() as peers:
            config = here.container(COPY, files)
            four = [peers.enter_context(closing(Peer())) for _ in range(slots)]

            def engines() -> float:
                with here.paused(), ThreadPoolExecutor(slots) as threads:
                    return (
                        slots * each / seconds(lambda: [*threads.map(lambda peer: peer.containers(config, each), four)])
                    )

            value, baseline = in_turns(ours, engines, bench.repeats)
    what = "jobs per second, 4 slots, 2 inputs and 2 outputs of 1 KiB"
    yield bench.faster("P2", what, value, "jobs/s", "the same engine calls from 4 threads", baseline, 0.90)


def overlap(bench: Bench) -> Iterator[Row]:
    """P6. Seconds from the first job handed out to the last one told `finished`.

    The files come from and go to nginx over a link with a limit for each direction: mock_api would need as much of the
    processor for them as the job. Everything lies in memory. The engine alone makes the containers one after the other
    on files that are there, a few in each turn, each as long as the mean of them; what the bytes alone take at the
    link's speed is known.
    """
    count, compute_s, size, rate = (3, 0.2, 4 * MIB, 100 * MIB) if bench.short else (20, 2.0, 100 * MIB, 100 * MIB)
    cmd = (f"cp /files/in/a /files/out/a && sleep {compute_s:g}",)
    with site(bench.memory, {"prefetch": "1", "max_jobs": "1"}, link_rate=rate) as here:
        inputs, files = small_files(here)
        content = os.urandom(size)
        (files / "in/a").write_bytes(content)
        spec = here.spec(cmd, {"in/a": here.api.put_input("a", content)})
        here.run(here.spec(COPY, inputs), 1)

        def ours() -> float:
            jobs = here.run(spec, count)
            return here.api.finished_at(jobs)[-1] - here.api.pulled_at(jobs)[0]

        config = here.container(cmd, files)
        with closing(Peer()) as peer:

            def engines() -> float:
                some = max(1, count // bench.repeats)
                with here.paused():
                    return seconds(lambda: peer.containers(config, some)) / some * count

            value, engine_s = in_turns(ours, engines, bench.repeats)
    moved_s = count * size / rate
    against = "the engine alone" if engine_s >= moved_s else "the bytes at the link's speed"
    baseline = max(engine_s, moved_s)
    ratio = value / baseline
    what = f"{count} jobs of {compute_s:g} s with {size // MIB} MiB in and out over {rate // MIB} MiB/s, PREFETCH=1"
    yield Row("P6", what, value, "s", against, baseline, ratio, "ratio <= 1.08", bench.judge(ratio <= 1.08))
