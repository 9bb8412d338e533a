"""Jobs through the broker on the real engine: a worker without the engine's socket, links in the way, kills (T33)."""

import contextlib
import io
import os
import shutil
import signal
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import docker
import psutil
import pytest

from jobfetcher import build
from jobfetcher.broker.pins import ROOM
from jobfetcher.core.errors import WorkerFault
from jobfetcher.core.halt import Halt
from jobfetcher.core.ports import Container
from jobfetcher.engine.docker import DockerEngine
from jobfetcher.engine.images import ImagePolicy, PullPolicy
from jobfetcher.engine.run_spec import BoxPolicy
from tests.support.as_user import python_as
from tests.support.boxes import LOCAL, LONG_S, DockerBench, no_progress
from tests.support.broker import RunningBroker, broker_settings, running_broker
from tests.support.mock_server import running_mock_api
from tests.support.mounts import needs_root
from tests.support.services import REPOSITORY, Registry, require_program
from tests.support.worker import UNTIL_LET_GO, Command, Lab, command, running_worker, wait_until_running, work

pytestmark = [pytest.mark.fault("T33"), pytest.mark.docker, needs_root]

USER = 64124  # nobody's number, on Debian: above those of users, below nobody's (Debian policy, 9.2.2)

CLOSED = (
    "mkdir -p /files/out/deep && cd /files/out && echo secret > closed && echo x > deep/x &&"
    "chmod 000 closed deep/x deep && chown 1234:1234 closed"
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the socket of a broker and its mounts lie; nothing is mounted below at the end."""
    made = tmp_path / "broker"
    made.mkdir()
    yield made
    assert [place for place in made.glob("mounts/*/*/*") if os.path.ismount(place)] == []


@pytest.fixture
def brokered(lab: Lab, folder: Path) -> Iterator[RunningBroker]:
    """A broker for the worker of the lab, which has to be told of it."""
    lab.base.mkdir(mode=0o700)
    with running_broker(broker_settings(lab.base, folder), folder / "mounts") as broker:
        yield broker
    assert (broker.told.refusals(), broker.told.errors()) == ([], [])


@pytest.fixture
def bench(busybox: str, tmp_path: Path, folder: Path) -> Iterator[DockerBench]:
    """A worker's engine behind a broker, and the directory of the job 1."""
    base = tmp_path / "base"
    files = base / "jobs" / "1" / "files"
    files.mkdir(parents=True)
    files.chmod(0o777)
    with running_broker(broker_settings(base, folder), folder / "mounts") as broker:
        engine = DockerEngine(build.find_instance(str(base)), url=broker.url, images=LOCAL)
        try:
            yield DockerBench(engine, engine.prepare(busybox, Halt(), no_progress), files, engine.instance)
        finally:
            engine.reap(frozenset())
            engine.close()


def test_a_job_with_inputs_and_outputs(lab: Lab, brokered: RunningBroker) -> None:
    given = lab.server.put_input("words", b"some words\n")
    job = lab.submit(
        "mkdir -p /files/out; tr a-z A-Z < /files/in.txt > /files/out/x",
        files_down={"in.txt": given},
        files_up={"output": "out"},
    )
    work(lab.settings(docker_host=brokered.url))
    assert lab.ended(job)[0] == "finished"
    assert lab.server.results(job)["output/out/x"] == b"SOME WORDS\n"


def test_a_job_that_fails_says_so(lab: Lab, brokered: RunningBroker) -> None:
    job = lab.submit("echo wrong; exit 3")
    work(lab.settings(docker_host=brokered.url))
    assert lab.ended(job) == ("error", "exit code 3; it last printed: wrong")


@pytest.mark.parametrize("network", ["bridge", "none"])
def test_the_network_for_jobs_is_made_and_used(lab: Lab, folder: Path, network: str) -> None:
    lab.base.mkdir(mode=0o700)
    with running_broker(broker_settings(lab.base, folder, job_network=network), folder / "mounts") as broker:
        job = lab.submit("ls /sys/class/net | grep -c eth0; true")
        work(lab.settings(docker_host=broker.url, job_network=network))
        assert lab.ended(job)[0] == "finished"
        assert broker.told.refusals() == []


@pytest.mark.registry
def test_an_image_is_pulled_and_removed_again(
    engine: docker.APIClient, registry: Registry, tmp_path: Path, folder: Path
) -> None:
    """Also by a broker that was started anew: what came through it stands in its file. What was here stays."""
    names = [f"{registry.address}/lab/brokered-{uuid4().hex[:8]}:1" for _ in range(2)]
    for name in names:
        repository, _, tag = name.rpartition(":")
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            entry = tarfile.TarInfo("content")
            entry.size = 8
            tar.addfile(entry, io.BytesIO(os.urandom(8)))
        engine.import_image_from_data(archive.getvalue(), repository, tag)
        assert "errorDetail" not in engine.push(repository, tag)
    engine.remove_image(names[0])
    base = tmp_path / "base"
    base.mkdir()
    settings = broker_settings(
        base, folder, allowed_images=(f"{registry.address}/lab/*",), broker_state=folder / "state" / "images.json"
    )
    images = ImagePolicy(pull=PullPolicy.ALWAYS)
    found = []
    try:
        for last in (False, True):
            with (
                running_broker(settings, folder / "mounts") as broker,
                contextlib.closing(DockerEngine("any", url=broker.url, images=images)) as worker,
            ):
                found.append([worker.prepare(name, Halt(), no_progress) for name in names])
                with pytest.raises(WorkerFault, match="not among ALLOWED_IMAGES of this broker"):
                    worker.prepare("docker.io/library/other:1", Halt(), no_progress)
                if last:
                    brought, here = found[0]
                    assert (brought.pulled, here.pulled) == (True, False)
                    assert [worker.forget_image(one.id, one.reference) for one in (here, brought)] == [False, True]
        left = [name for name in names if engine.images(name)]
        assert left == names[1:]
    finally:
        for name in names:
            with contextlib.suppress(docker.errors.ImageNotFound):
                engine.remove_image(name, force=True)


def test_a_link_in_the_place_of_a_jobs_directory_is_not_followed(bench: DockerBench, tmp_path: Path) -> None:
    """Whoever took over the worker owns the directory; the engine would follow a link there with root's rights."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("not for jobs")
    bench.files.rmdir()
    bench.files.symlink_to(elsewhere)
    with pytest.raises(WorkerFault, match="no plain directory"):
        bench.engine.start(bench.spec("cat /files/secret"))
    bench.files.unlink()
    shutil.rmtree(bench.files.parent)
    (elsewhere / "files").mkdir()
    bench.files.parent.symlink_to(elsewhere)
    with pytest.raises(WorkerFault, match="no plain directory"):
        bench.engine.start(bench.spec("cat /files/secret"))
    bench.files.parent.unlink()


def test_a_link_that_comes_between_create_and_start_leads_nowhere(bench: DockerBench, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("not for jobs")
    moved = bench.files.with_name("moved")

    def swap(_container: str) -> None:  # it is created, and not started yet
        bench.files.rename(moved)
        bench.files.symlink_to(elsewhere)

    container = bench.engine.start(bench.spec("ls /files; touch /files/mine"), swap)
    end, printed = ended(container)
    assert (end, printed) == (0, "")
    assert ([one.name for one in moved.iterdir()], [one.name for one in elsewhere.iterdir()]) == (["mine"], ["secret"])


def test_directories_that_are_swapped_all_the_time_let_no_job_out(bench: DockerBench, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("not for jobs")
    moved, link = bench.files.with_name("moved"), bench.files.with_name("link")
    link.symlink_to(elsewhere)
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            bench.files.rename(moved)
            link.rename(bench.files)
            bench.files.rename(link)
            moved.rename(bench.files)

    thread = threading.Thread(target=swap)
    thread.start()
    ran = refused = 0
    try:
        for attempt in range(1, 26):
            try:
                container = bench.engine.start(bench.spec("ls /files; echo x > /files/mine", attempt=attempt))
            except WorkerFault:
                refused += 1
                continue
            ran += 1
            assert "secret" not in ended(container)[1]
    finally:
        done.set()
        thread.join()
    assert [one.name for one in elsewhere.iterdir()] == ["secret"]
    assert ran + refused == 25


def ended(container: Container) -> tuple[int, str]:
    """Its exit code and what it printed; it is removed."""
    try:
        end = container.wait(LONG_S)
        assert end is not None
        return end.code, container.last_lines(10)
    finally:
        container.remove()


@contextlib.contextmanager
def broker_command(lab: Lab, folder: Path, **more: str) -> Iterator[Command]:
    """`jobfetcher broker` as a process of its own, listening."""
    env = {"PATH_BASE": str(lab.base), "BROKER_SOCKET": str(folder / "broker.sock"), "GPUS": "none"}
    with command(["broker"], {**env, "JOB_NETWORK": "none", **more}, folder) as running:
        running.wait_for("listening at")
        yield running
    with contextlib.suppress(OSError):  # a place of this worker's that is in use, or gone
        (ROOM / build.find_instance(str(lab.base))).rmdir()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_job_outlives_the_broker(lab: Lab, folder: Path, number: signal.Signals) -> None:
    lab.base.mkdir(mode=0o700)
    job = lab.submit(f"{UNTIL_LET_GO}; mkdir /files/out; echo done > /files/out/x", files_up={"output": "out"})
    settings = lab.settings(docker_host=f"unix://{folder}/broker.sock")
    with contextlib.ExitStack() as first:
        broker = first.enter_context(broker_command(lab, folder))
        with running_worker(settings, lambda taken, idle_s: taken >= 1) as running:
            wait_until_running(lab, job)
            broker.send(number)
            assert broker.wait() == (0 if number is signal.SIGTERM else -number)
            time.sleep(0.2)  # the worker finds nobody there, and waits
            with broker_command(lab, folder):
                lab.let_go(job)
                running.join()
    assert lab.ended(job)[0] == "finished"
    assert lab.server.results(job)["output/out/x"] == b"done\n"


def test_a_worker_of_another_user_has_no_other_way(lab: Lab, folder: Path) -> None:
    """The broker's socket belongs to BROKER_USER alone, and a broker is not started twice."""
    lab.base.mkdir(mode=0o700)
    with broker_command(lab, folder, BROKER_USER="4711") as running:
        found = (folder / "broker.sock").stat()
        assert (found.st_uid, found.st_mode & 0o777) == (4711, 0o600)
        env = {"PATH_BASE": str(lab.base), "BROKER_SOCKET": str(folder / "broker.sock")}
        with command(["broker"], env, folder) as second:
            assert second.wait() == 2
            assert "a broker listens at" in second.errors
        assert running.is_running


@pytest.mark.fault("E13")
def test_a_worker_without_any_right_runs_jobs_and_gets_their_files_back(
    engine: docker.APIClient, busybox: str, tmp_path: Path, folder: Path
) -> None:
    """An ordinary user without the group of the engine's socket; the job's root leaves files closed to all others."""
    for needed in ("setpriv", "unshare"):
        require_program(needed, "util-linux")
    home = Path(tempfile.mkdtemp(prefix="jobfetcher-user-"))
    try:
        os.chown(home, USER, USER)
        with running_mock_api(home / "server") as server:
            lab = Lab(server, home / "base", busybox, engine)
            lab.base.mkdir(mode=0o700)
            os.chown(lab.base, USER, USER)
            job = lab.submit(CLOSED, files_up={"output": "out"})
            with running_broker(broker_settings(lab.base, home, broker_user=str(USER)), folder / "mounts") as broker:
                env = {**lab.env(docker_host=broker.url), "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
                program = python_as(tmp_path, USER, USER)
                with command(["run", "--once"], env, home, executable=program) as worker:
                    assert worker.wait() == 0, worker.errors
                env["DOCKER_HOST"] = ""
                with command(["run", "--once"], env, home, executable=program) as worker:
                    assert worker.wait() == 2
                    assert "no permission to use the container engine" in worker.errors
            assert (broker.told.refusals(), broker.told.errors()) == ([], [])
            assert lab.ended(job)[0] == "finished"
            assert lab.server.results(job)["output/out/closed"] == b"secret\n"
            assert list((lab.base / "jobs").iterdir()) == []
    finally:
        shutil.rmtree(home)


@pytest.mark.slow
def test_a_job_costs_little_more(lab: Lab, folder: Path, busybox: str) -> None:
    """The bar is 5 ms for a job: 20 jobs one after the other, directly and through a broker in a process of its own,
    in turn, so that a busy machine is busy for both. What is asserted is the broker's processor time, for how much
    longer a job takes is lost in the scatter of a machine that others use; three times the bar, for cold caches."""
    files = lab.base / "jobs" / "1" / "files"
    files.mkdir(parents=True)
    took: dict[str, list[float]] = {"direct": [], "brokered": []}
    instance = build.find_instance(str(lab.base))
    with contextlib.ExitStack() as opened:
        broker = psutil.Process(opened.enter_context(broker_command(lab, folder)).pid)
        engines = {
            "direct": DockerEngine(instance, images=LOCAL),
            "brokered": DockerEngine(instance, url=f"unix://{folder}/broker.sock", images=LOCAL),
        }
        for engine in engines.values():
            opened.callback(engine.close)
        before = sum(broker.cpu_times()[:2])
        for attempt in range(1, 41):
            way = "brokered" if attempt % 2 else "direct"
            began = time.perf_counter()
            engine = engines[way]
            bench = DockerBench(engine, engine.prepare(busybox, Halt(), no_progress), files, instance)
            ended(engine.start(bench.spec("true", attempt=attempt, policy=BoxPolicy(network=None))))
            took[way].append((time.perf_counter() - began) * 1000)
        used = (sum(broker.cpu_times()[:2]) - before) * 1000 / len(took["brokered"])
    pairs = list(zip(took["direct"], took["brokered"], strict=True))[2:]
    more = statistics.median(brokered - direct for direct, brokered in pairs)
    print(f"a job takes {statistics.median(took['direct']):.1f} ms directly, {more:+.1f} ms through the broker")
    print(f"the broker used {used:.1f} ms of processor time a job")
    assert used < 15
