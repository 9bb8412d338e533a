"""DockerEngine on the real engine: ends, start errors, lost answers, absence, logs, ownership."""

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import docker
import pytest

from jobfetcher.core.errors import ConfigError, JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.machine import Gpu
from jobfetcher.core.ports import Container
from jobfetcher.core.run import Exit, Image
from jobfetcher.engine.api import EngineApi, Unreachable
from jobfetcher.engine.box import box
from jobfetcher.engine.docker import DockerEngine
from jobfetcher.engine.flavour import Flavour
from jobfetcher.engine.run_spec import BoxPolicy
from tests.support.boxes import LOCAL, LONG_S, DockerBench, docker_bench, no_progress
from tests.support.engine_proxy import EngineProxy, engine_proxy
from tests.support.private_engine import private_engine
from tests.support.services import wait_until

pytestmark = pytest.mark.docker

#: An ELF header of a 64-bit program for arm64 (e_machine 183), and nothing behind it.
ARM_PROGRAM = bytes.fromhex("7f454c460201010000000000000000000200b700") + bytes(44)


@pytest.fixture
def proxy() -> Iterator[EngineProxy]:
    with engine_proxy() as running:
        yield running


@pytest.fixture
def make_image(engine: docker.APIClient, bench: DockerBench) -> Iterator[Callable[..., Image]]:
    """Import an image with these files and nothing else, removed at the end."""
    made: list[str] = []

    def make(*changes: str, **files: bytes) -> Image:
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name.replace("__", "/"))
                entry.mode, entry.size = 0o755, len(content)
                tar.addfile(entry, io.BytesIO(content))
        repository = f"jobfetcher-test/made-{uuid4().hex[:8]}"
        engine.import_image_from_data(archive.getvalue(), repository, "1", changes=list(changes))
        made.append(f"{repository}:1")
        return bench.engine.prepare(made[-1], Halt(), no_progress)

    yield make
    for reference in made:
        engine.remove_image(reference, force=True)


def left(engine: docker.APIClient, bench: DockerBench) -> list[str]:
    return [c["Id"] for c in engine.containers(all=True, filters={"label": f"jobfetcher.instance={bench.instance}"})]


# -- how a job ends ----------------------------------------------------------------------------------------------------


@pytest.mark.fault("E4")
def test_out_of_memory_is_named(bench: DockerBench) -> None:
    end, _ = bench.run(bench.spec("tail /dev/zero", memory_mib=64))
    assert (end.code, end.oom_killed) == (137, True)


def test_the_end_is_noticed_at_once(bench: DockerBench) -> None:
    container = bench.engine.start(bench.spec("sleep 1"))
    end = container.wait(LONG_S)
    noticed = datetime.now(UTC)
    container.remove()
    assert end is not None
    # A machine that stands still included; else it would be noticed when it is looked at from time to time.
    assert (noticed - datetime.fromisoformat(end.finished_at)).total_seconds() < 10
    assert end.started_at < end.finished_at


@pytest.mark.fault("E9")
def test_orphans_in_the_container_are_reaped(bench: DockerBench) -> None:
    zombies = "ps -o stat | grep -c Z"
    orphans = (
        "for i in 1 2 3 4 5; do (sleep 0.1 &); done; sleep 1; "
        f"for i in 1 2 3 4 5; do [ $({zombies}) = 0 ] && break; sleep 1; done; {zombies}"
    )
    _, printed = bench.run(bench.spec(orphans))
    assert printed == "0"


def test_the_images_entry_point_is_kept(make_image: Callable[..., Image], bench: DockerBench) -> None:
    busybox = Path("/bin/busybox").read_bytes()
    image = make_image(
        'ENTRYPOINT ["/bin/busybox","echo","kept"]', 'CMD ["/bin/busybox","echo","own"]', bin__busybox=busybox
    )
    assert bench.run(bench.spec("x", image=image))[1] == "kept /bin/sh -c x"
    assert bench.run(bench.spec(image=image))[1] == "kept /bin/busybox echo own"
    assert bench.run(bench.spec("x", image=image, labels={"entrypoint": "fit"}))[1] == "kept /bin/sh -c x"


# -- what cannot start -------------------------------------------------------------------------------------------------


@pytest.mark.fault("E8")
def test_a_program_that_cannot_be_run_is_named(make_image: Callable[..., Image], bench: DockerBench) -> None:
    def ends(code: int, **spec: object) -> str:
        end, _ = bench.run(bench.spec("true", **spec))  # type: ignore[arg-type]  # one of spec's own keywords each time
        assert end.code == code
        return end.error

    assert ends(127, image=make_image(readme=b"nothing to run\n")) == "the image has no /bin/sh"
    assert ends(127, image=make_image('ENTRYPOINT ["no-such-program"]')) == "the image has no no-such-program"
    no_program = make_image('ENTRYPOINT ["/etc/hosts"]')  # which the engine itself puts there
    assert ends(126, image=no_program) == "/etc/hosts in the image is not a program that may be run"
    assert ends(0) == ""


@pytest.mark.fault("E8")
def test_a_program_for_another_machine_does_not_run(make_image: Callable[..., Image], bench: DockerBench) -> None:
    end, printed = bench.run(bench.spec("true", image=make_image(bin__sh=ARM_PROGRAM)))
    assert end.code in {1, 126, 127}
    assert "exec format error" in end.error.lower(), printed


@pytest.mark.fault("E8")
def test_more_environment_than_linux_takes_is_named(bench: DockerBench) -> None:
    spec = bench.spec("true", env={f"V{number}": "x" * 100_000 for number in range(30)})
    try:
        end, _ = bench.run(spec)
        said = end.error
    except JobFault as fault:  # newer engines say it at the start
        said = str(fault)
    assert "command and environment together are longer than Linux takes" in said


@pytest.mark.fault("E9")
@pytest.mark.parametrize(
    ("change", "command", "printed"),
    [
        ('ENTRYPOINT ["/init"]', ("echo said",), "first\nsaid"),
        ('CMD ["/init", "echo", "own"]', (), "first\nown"),
        ('CMD ["/init", "echo", "own"]', ("echo said",), "said"),
    ],
)
def test_an_init_program_of_the_images_own_is_process_1(
    make_image: Callable[..., Image], bench: DockerBench, change: str, command: tuple[str, ...], printed: str
) -> None:
    """s6-overlay and its kind refuse to be any other."""
    busybox = Path("/bin/busybox").read_bytes()
    init = b'#!/bin/sh\n[ $$ = 1 ] || { echo can only run as pid 1; exit 100; }\necho first\nexec "$@"\n'
    image = make_image(change, init=init, bin__sh=busybox, bin__echo=busybox)
    end, said = bench.run(bench.spec(*command, image=image))
    assert (end.code, said) == (0, printed)


@pytest.mark.fault("E8")
def test_start_errors_are_the_jobs_fault_and_leave_nothing(
    make_image: Callable[..., Image], bench: DockerBench, engine: docker.APIClient
) -> None:
    with pytest.raises(JobFault, match="neither the job nor the image says what to run") as nothing:
        bench.engine.start(bench.spec(image=make_image(readme=b"x")))
    with pytest.raises(JobFault, match="its user is unknown") as user:
        bench.engine.start(bench.spec("id", image=make_image("USER ghost", readme=b"x")))
    assert {nothing.value.reason, user.value.reason} == {JobReason.CANNOT_START}
    assert left(engine, bench) == []


@pytest.mark.fault("E12")
def test_this_machines_faults_are_not_the_jobs(bench: DockerBench, engine: docker.APIClient) -> None:
    with pytest.raises(WorkerFault, match="does not see the job's directory") as path:
        bench.engine.start(replace(bench.spec("true"), files_host_path="/no/such/nvidia/directory"))
    with pytest.raises(WorkerFault, match="CPU") as cpus:
        bench.engine.start(bench.spec("true", cpu_cores=10_000))
    with pytest.raises(WorkerFault, match="runtime") as runtime:
        bench.engine.start(bench.spec("true", policy=BoxPolicy(network=None, runtime="no-such-runtime")))
    gone = Image("sha256:" + "0" * 64, "gone", None, "amd64")
    with pytest.raises(WorkerFault, match="image was removed from this machine") as image:
        bench.engine.start(bench.spec("true", image=gone))
    assert path.value.reason is WorkerReason.DISK
    assert {fault.value.reason for fault in (cpus, runtime)} == {WorkerReason.ENGINE}
    assert image.value.reason is WorkerReason.INTERRUPTED, "it is prepared again, and the job runs"
    assert left(engine, bench) == []


def test_a_gpu_that_the_engine_cannot_give_is_the_workers_fault(bench: DockerBench, engine: docker.APIClient) -> None:
    spec = bench.spec("true", gpus=(Gpu("GPU-no-such", "none", 1, "1.0"),))
    try:
        bench.engine.start(spec).remove()
    except WorkerFault as fault:
        assert fault.reason is WorkerReason.GPU  # noqa: PT017 - an engine with a GPU stub starts it: no fault then
    else:
        pytest.skip("this engine gives GPUs, or a stub of one")
    assert left(engine, bench) == []


# -- answers that get lost ---------------------------------------------------------------------------------------------


@pytest.mark.fault("A3")
@pytest.mark.fault("E10")
@pytest.mark.parametrize("call", ["/containers/create", "/containers/"])
def test_a_lost_answer_does_not_make_a_second_container(
    bench: DockerBench, engine: docker.APIClient, proxy: EngineProxy, call: str
) -> None:
    through = DockerEngine(bench.instance, url=proxy.url, images=LOCAL, sleep=lambda _: None)
    through.describe()  # so that the client is there, and the next POST is the one that gets lost
    proxy.lose(f"POST /v{engine.api_version}{call}")
    container = through.start(bench.spec("echo once >> /files/out"))
    assert container.wait(LONG_S) is not None
    assert len(proxy.lost) == 1
    assert left(engine, bench) == [container.id]
    assert (bench.files / "out").read_text() == "once\n"
    container.remove()
    through.close()


@pytest.mark.fault("A3")
def test_a_lost_answer_to_start_does_not_start_it_twice(
    bench: DockerBench, engine: docker.APIClient, proxy: EngineProxy
) -> None:
    spec = bench.spec("echo once >> /files/out")
    created = bench.engine.api.create(box(spec, "none"), spec.name)  # and then we died
    through = DockerEngine(bench.instance, url=proxy.url, images=LOCAL, sleep=lambda _: None)
    through.describe()
    proxy.lose(f"POST /v{engine.api_version}/containers/{created}/start")
    container = through.start(spec)
    assert container.id == created
    end = container.wait(LONG_S)
    assert end is not None
    assert (end.code, len(proxy.lost)) == (0, 1)
    assert (bench.files / "out").read_text() == "once\n"
    container.remove()
    through.close()


def test_a_container_that_was_never_started_has_not_succeeded(bench: DockerBench) -> None:
    spec = bench.spec("true")
    bench.engine.api.create(box(spec, "none"), spec.name)
    found = bench.engine.find(JobId("1"))
    assert found is not None
    end = found.wait(LONG_S)
    assert end is not None
    assert not end.genuine


# -- an engine that goes away ------------------------------------------------------------------------------------------


class Absence:
    """A job whose engine goes away while its end is waited for. Its program ends with code 3 when it is told to."""

    def __init__(self, bench: DockerBench, proxy: EngineProxy) -> None:
        self._go = bench.files / "go"
        self._proxy = proxy
        self._slept = threading.Event()
        self._engine = DockerEngine(bench.instance, url=proxy.url, images=LOCAL, sleep=self._sleep)
        container = self._engine.start(bench.spec("until [ -e /files/go ]; do sleep 0.1; done; exit 3"))
        self._ends: list[Exit | None] = []
        self._waiter = threading.Thread(target=lambda: self._ends.append(container.wait(LONG_S)))
        self._waiter.start()
        self._until_waiting(0)
        proxy.away()
        assert self._slept.wait(LONG_S)

    def back(self) -> None:
        """The engine is there again, and asked for the end of the job again."""
        before = len(self._proxy.requests)
        self._proxy.back()
        self._until_waiting(before)

    def end(self) -> None:
        """Tell the job to end."""
        self._go.touch()

    def result(self) -> Exit:
        self._waiter.join(LONG_S)
        self._engine.close()
        [end] = self._ends
        assert end is not None
        return end

    def _sleep(self, _: float) -> None:
        self._slept.set()
        time.sleep(0.02)

    def _until_waiting(self, after: int) -> None:
        deadline = time.monotonic() + LONG_S
        while not any(b"/wait" in line for line in self._proxy.requests[after:]):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.fault("E1")
def test_a_job_that_outlives_the_engines_absence_goes_on(bench: DockerBench, proxy: EngineProxy) -> None:
    absence = Absence(bench, proxy)
    absence.back()
    absence.end()
    end = absence.result()
    assert (end.code, end.genuine) == (3, True)


@pytest.mark.fault("E1")
def test_an_exit_counts_that_the_engine_saw_while_only_the_worker_was_cut_off(
    bench: DockerBench, engine: docker.APIClient, proxy: EngineProxy
) -> None:
    absence = Absence(bench, proxy)
    absence.end()
    engine.wait(f"jobfetcher-{bench.instance}-1-1")
    proxy.back()
    end = absence.result()
    assert (end.code, end.genuine) == (3, True)


@pytest.mark.fault("E2")
def test_whether_it_runs_is_asked_again_from_time_to_time(
    bench: DockerBench, proxy: EngineProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobfetcher.engine.docker._CROSS_CHECK_S", 0.1)
    through = DockerEngine(bench.instance, url=proxy.url, images=LOCAL)
    container = through.start(bench.spec("sleep 60"))
    proxy.requests.clear()
    calls = [f"/containers/{container.id}/{question}".encode() for question in ("json", "wait")]
    deadline = time.monotonic() + LONG_S
    while any(sum(call in request for request in proxy.requests) < 2 for call in calls):
        assert time.monotonic() < deadline, "not asked again"
        assert container.wait(0.5) is None
    through.close()


def test_a_short_job_costs_the_engine_two_questions(bench: DockerBench, proxy: EngineProxy, tmp_path: Path) -> None:
    """Beside create, wait, start, logs and remove: its state, and what the engine remembers of it. /version and /info,
    for which an engine runs other programs, take more time than all of these."""
    through = DockerEngine(bench.instance, url=proxy.url, images=LOCAL)
    through.check()
    proxy.requests.clear()
    container = through.start(bench.spec("exit 3"))
    end = container.wait(LONG_S)
    container.save_logs(tmp_path / "log")
    container.remove()
    through.close()
    assert end is not None
    assert (end.code, end.genuine) == (3, True)
    asked = [request.decode().split()[:2] for request in proxy.requests if request.endswith(b"HTTP/1.1")]
    assert [(method, path.split("?")[0].rsplit("/", 1)[1]) for method, path in asked] == [
        ("POST", "create"),
        ("POST", "wait"),
        ("POST", "start"),
        ("GET", "json"),
        ("GET", "events"),
        ("GET", "logs"),
        ("DELETE", container.id),
    ]


@pytest.mark.fault("E2")
def test_a_line_that_the_engine_closed_while_nobody_used_it_is_no_failure(
    bench: DockerBench, proxy: EngineProxy
) -> None:
    through = DockerEngine(bench.instance, url=proxy.url, images=LOCAL)
    through.check()
    proxy.away()
    proxy.back()
    through.check()
    assert through.find(JobId("1")) is None
    through.close()


def test_a_container_that_nobody_waited_for_leaves_no_line_open(bench: DockerBench) -> None:
    bench.engine.close()  # its idle connections
    before = len(os.listdir("/proc/self/fd"))
    container = bench.engine.start(bench.spec("sleep 60"))
    bench.engine.close()
    assert len(os.listdir("/proc/self/fd")) == before + 1, "the line on which its end is waited for"
    container.remove()
    del container
    bench.engine.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.fault("E3")
def test_an_engine_that_stays_away_is_the_workers_fault(bench: DockerBench, proxy: EngineProxy) -> None:
    through = DockerEngine(
        bench.instance, url=proxy.url, images=LOCAL, reconnect_s=0.5, sleep=lambda _: time.sleep(0.05)
    )
    container = through.start(bench.spec("sleep 60"))
    proxy.away()
    assert container.wait(0.1) is None  # not yet for long
    with pytest.raises(WorkerFault, match="no container engine answers"):
        container.wait(LONG_S)
    through.close()


# -- is there an engine ------------------------------------------------------------------------------------------------


def test_describe_says_what_the_engine_is(bench: DockerBench, engine: docker.APIClient) -> None:
    bench.engine.check()
    info, version = bench.engine.describe(), engine.version()
    assert (info.version, info.architecture) == (version["Version"], version["Arch"])
    assert "runc" in info.runtimes
    assert info.cpu_cores >= 1
    assert info.memory_mib > 64


def test_no_engine_refused_and_no_permission_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such socket"):
        DockerEngine("x", url=f"unix://{tmp_path}/none.sock").check()
    with pytest.raises(ConfigError, match="is not an engine on this machine"):
        DockerEngine("x", url="ssh://lab@other")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "deaf.sock"))
        with pytest.raises(WorkerFault, match="connection refused"):
            DockerEngine("x", url=f"unix://{tmp_path}/deaf.sock").check()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_socket_without_permission_says_which_group_to_join() -> None:
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:  # a process of its own, for it gives its rights away
        os.close(reads)
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        try:
            DockerEngine("x").check()
            said = "no error"
        except ConfigError as error:
            said = str(error)
        os.write(writes, said.encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert "add the user to the group docker" in said


def test_an_engine_of_another_version_is_spoken_to_in_its_own(tmp_path: Path) -> None:
    """It was replaced while the worker ran: its older API would refuse every call in the words of the newer one."""
    version = ["1.44"]
    paths: list[str] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    paths.append(client.recv(65536).split()[1].decode())
                    said = json.dumps({"ApiVersion": version[0], "Arch": "amd64", "Os": "linux"}).encode()
                    head = f"Api-Version: {version[0]}\r\nContent-Length: {len(said)}\r\nConnection: close"
                    client.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + said)

    with socket.socket(socket.AF_UNIX) as listener, contextlib.closing(EngineApi(f"unix://{tmp_path}/e.sock")) as api:
        listener.bind(str(tmp_path / "e.sock"))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            for version[0] in ("1.44", "1.41"):
                api.check()
                api.ask("GET", "/info")
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
    assert [path for path in paths if path.endswith("info")] == ["/v1.44/info", "/v1.41/info"]


def test_a_frozen_engine_is_given_up_in_time(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as frozen:
        frozen.bind(str(tmp_path / "frozen.sock"))
        frozen.listen()
        api = EngineApi(f"unix://{tmp_path}/frozen.sock", look_up_s=1)
        started = time.monotonic()
        with pytest.raises(Unreachable, match="in time"):
            api.check()
        assert time.monotonic() - started < 10
        api.close()


# -- logs --------------------------------------------------------------------------------------------------------------


def test_a_flood_of_output_is_bounded_on_disk_and_in_memory(bench: DockerBench, tmp_path: Path) -> None:
    container = bench.engine.start(bench.spec("yes 0123456789 | head -c 33000000; echo; echo last"))
    assert container.wait(LONG_S) is not None
    container.save_logs(tmp_path / "log")
    size = (tmp_path / "log").stat().st_size
    assert 5_000_000 < size < 31_000_000
    with (tmp_path / "log").open("rb") as log:
        log.seek(-5, os.SEEK_END)
        assert log.read() == b"last\n"
    assert container.last_lines(1) == "last"
    assert len(container.last_lines(10_000_000)) <= 64 * 1024
    container.remove()


#: Prints lines of a thousand bytes, so many bytes in all; the engine takes 1027 for each.
PRINTS = "yes $(head -c 999 /dev/zero | tr '\\0' x) | head -c {size}; echo; echo last"

#: More than the engine keeps.
FLOODS = PRINTS.format(size=34_000_000)

WAITS_THEN = "echo first; until [ -e /files/go ]; do sleep 0.05; done; {command}"


def printed_after_a_look(bench: DockerBench, command: str, tmp_path: Path) -> list[str]:
    """The first and the last line of the log of a job that prints `first`, and goes on with `command` after a look."""
    container = bench.engine.start(bench.spec(WAITS_THEN.format(command=command)))
    wait_until(lambda: container.last_lines(1) == "first", "it has printed", LONG_S)
    assert container.wait(0.1) is None  # in which it looks
    (bench.files / "go").touch()
    return saved(container, tmp_path)


def saved(container: Container, tmp_path: Path) -> list[str]:
    assert container.wait(LONG_S) is not None
    container.save_logs(tmp_path / "log")
    container.remove()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("log")] == ["log"]
    with (tmp_path / "log").open(errors="replace") as log:
        lines = deque(log, maxlen=1)
        log.seek(0)
        return [log.readline(), *lines]


@pytest.mark.fault("D4")
def test_a_log_whose_begin_was_not_kept_says_so_at_its_top(bench: DockerBench, tmp_path: Path) -> None:
    first, last = printed_after_a_look(bench, FLOODS, tmp_path)
    assert re.fullmatch(
        r"\[jobfetcher\] the first part of this log is missing: the engine keeps the last 30 MiB of what a job prints; "
        r"what was printed before \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, in the first .+ of the run, is not here\n",
        first,
    ), first
    assert last == "last\n"


@pytest.mark.fault("D4")
@pytest.mark.parametrize("size", [2_000_000, 25_000_000])
def test_a_log_that_is_whole_says_nothing(bench: DockerBench, tmp_path: Path, size: int) -> None:
    """Of the second one the third file of the engine has begun."""
    first, last = printed_after_a_look(bench, PRINTS.format(size=size), tmp_path)
    assert (first, last) == ("first\n", "last\n")
    assert (tmp_path / "log").stat().st_size == len("first\n\nlast\n") + size


@pytest.mark.fault("D4")
def test_of_a_log_that_was_long_before_anybody_looked_it_is_said_that_it_may_lack_its_begin(
    bench: DockerBench, tmp_path: Path
) -> None:
    started = bench.engine.start(bench.spec(f"echo first; {FLOODS}"))
    assert started.wait(LONG_S) is not None
    found = bench.engine.find(JobId("1"))  # by a worker that comes later
    assert found is not None
    first, last = saved(found, tmp_path)
    assert "the first part of this log may be missing" in first
    assert last == "last\n"


@pytest.mark.fault("D4", "N8")
def test_a_log_of_a_gigabyte_costs_no_memory(tmp_path: Path) -> None:
    """An engine that keeps so much, which Docker's does not as it is asked to: it is said to be whole."""
    script = """
import http.server, os, resource, socket, socketserver, sys, threading
from pathlib import Path
from jobfetcher.engine.docker import DockerContainer, DockerEngine

LINE = bytes([1, 0, 0, 0]) + (16384).to_bytes(4, "big") + b"x" * 16383 + b"\\n"

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        version = b'{"ApiVersion": "1.41", "Arch": "amd64", "Os": "linux"}'
        times = 1024 if "tail=all" in self.path else 1
        self.send_response(200)
        self.send_header("Content-Length", str(times * 64 * len(LINE) if "/logs" in self.path else len(version)))
        self.end_headers()
        if "/logs" in self.path:
            for _ in range(times):
                self.wfile.write(LINE * 64)
        else:
            self.wfile.write(version)
    def log_message(self, *_): pass
    def address_string(self): return ""

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

server = Server(sys.argv[1], Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
container = DockerContainer(DockerEngine("i", url="unix://" + sys.argv[1]), "c" * 64)
container.last_lines(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
container.save_logs(Path("/dev/null"))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before)
"""
    run = [sys.executable, "-c", script, str(tmp_path / "engine.sock")]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 * 1024, f"{int(done.stdout) >> 10} MiB more than before"


def test_a_line_without_an_end_does_not_fill_the_memory(bench: DockerBench) -> None:
    container = bench.engine.start(bench.spec("head -c 1000000 /dev/zero | tr '\\0' x"))
    assert container.wait(LONG_S) is not None
    assert set(container.last_lines(1000)) == {"x"}
    assert len(container.last_lines(1000)) <= 64 * 1024
    container.remove()


# -- whose files -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("E13")
def test_own_makes_everything_ours_but_not_what_links_point_to(
    bench: DockerBench, engine: docker.APIClient, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.touch()
    if os.geteuid() == 0:
        os.chown(outside, 4321, 4321)
    before = outside.stat().st_uid
    script = (
        "mkdir -p /files/a/b && echo x > /files/a/b/c && mkfifo /files/a/pipe && "
        f"ln -s {outside} /files/a/link && ln -s / /files/a/root && chown -R 1234:1234 /files/a && chmod 000 /files/a/b"
    )
    assert bench.run(bench.spec(script))[0].code == 0
    bench.engine.own(str(bench.files))
    assert (bench.files / "a/b").lstat().st_mode & 0o777 == 0o700
    names = [bench.files / name for name in ("a", "a/b", "a/b/c", "a/pipe", "a/link", "a/root")]
    assert {name.lstat().st_uid for name in names} == {os.getuid()}
    assert outside.stat().st_uid == before
    assert left(engine, bench) == []


@pytest.mark.fault("E13")
def test_an_engine_without_root_rights_shows_our_files_as_roots(
    bench: DockerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such engine here: that this one says it is one, and another user than root's, is put in."""
    monkeypatch.setattr(DockerEngine, "flavour", lambda _: Flavour(rootless=True))
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    (bench.files / "theirs").touch()
    os.chown(bench.files / "theirs", 1234, 1234)
    bench.engine.own(str(bench.files))
    assert (bench.files / "theirs").stat().st_uid == 0  # which is our own user, seen from outside of such an engine


@pytest.mark.fault("E13")
def test_own_works_on_an_engine_that_gives_its_containers_other_users(
    engine: docker.APIClient, busybox: str, tmp_path: Path
) -> None:
    subordinates = Path("/etc/subuid")
    named = [line.split(":")[0] for line in subordinates.read_text().splitlines()] if subordinates.exists() else []
    if not named:
        pytest.skip("no user of this machine has subordinate ids (subuid(5))")
    with private_engine(users=named[0]) as remapped:
        remapped.copy_image(engine, busybox)
        with docker_bench(busybox, tmp_path / "files", url=remapped.url) as bench:
            end, printed = bench.run(bench.spec("mkdir /files/out && touch /files/out/r && chmod 000 /files/out"))
            assert (end.code, printed) == (0, "")
            assert (bench.files / "out").stat().st_uid > 0, "its root is another user out here"
            bench.engine.own(str(bench.files))
            assert (bench.files / "out/r").stat().st_uid == os.getuid()


@pytest.mark.fault("E10")
def test_two_workers_on_one_engine_leave_each_other_alone(bench: DockerBench, busybox: str, tmp_path: Path) -> None:
    with docker_bench(busybox, tmp_path / "other") as other:
        theirs = other.engine.start(other.spec("sleep 60"))
        assert bench.engine.reap(frozenset()) == []
        assert bench.engine.find(JobId("1")) is None
        assert theirs.wait(0.1) is None
        theirs.remove()
