"""GPUs end to end: which ones are offered, which ones a job gets, and that no job sees another's.

The worker reads its GPUs through the real pynvml on a stub of NVIDIA's library, and the engine is a private one that
takes GPU requests because of a stub of NVIDIA's hook: stubs at the C and exec boundary, and no GPU. The last test runs
on a real GPU, where there is one.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs

import docker
import pytest

from demo import busybox_image
from jobfetcher.resources import detect
from tests.support.mock_server import MockServer, running_mock_api
from tests.support.private_engine import PrivateEngine, private_engine
from tests.support.services import GpuStub, ensure_busybox_image, wait_until
from tests.support.worker import UNTIL_LET_GO, Command, Lab, assert_clean, command

pytestmark = pytest.mark.docker

A4000 = "NVIDIA RTX A4000"
H100 = "NVIDIA H100 80GB HBM3"
TWO_A4000 = (f"{A4000}:16376:8.6", f"{A4000}:16376:8.6")
TWO_MODELS = (f"{A4000}:16376:8.6", f"{H100}:81559:9.0")
GREEDY_IMAGE = "jobfetcher-test/all-gpus:latest"

SEE = "echo $NVIDIA_VISIBLE_DEVICES > /files/out/seen;"
OUT = {"output": "out"}


@pytest.fixture(scope="module")
def gpu_engine() -> Iterator[PrivateEngine]:
    """An engine that takes GPU requests, with two images: busybox, and one that asks for all GPUs by itself."""
    with private_engine() as engine:
        client = engine.client()
        ensure_busybox_image(client)
        busybox = busybox_image.local_busybox()
        assert busybox is not None
        repository, tag = GREEDY_IMAGE.split(":")
        root = busybox_image.root_tar(busybox)
        client.import_image_from_data(
            root, repository, tag, changes=["ENV PATH=/bin", "ENV NVIDIA_VISIBLE_DEVICES=all"]
        )
        yield engine


@pytest.fixture
def gpu_lab(gpu_engine: PrivateEngine, tmp_path: Path) -> Iterator[Lab]:
    """A mock API, and a directory for a worker on the private engine."""
    client = gpu_engine.client()
    with running_mock_api(tmp_path / "server") as server:
        lab = Lab(server, tmp_path / "base", ensure_busybox_image(client), client)
        before = lab.held()
        yield lab
        assert_clean(lab, before)


def env(lab: Lab, engine: PrivateEngine, stub: GpuStub, *listed: str, **settings: str) -> dict[str, str]:
    """The environment of a worker on that engine that sees these GPUs."""
    machine = {name: stub.env(*listed)[name] for name in ("LD_LIBRARY_PATH", "JF_STUB_GPUS")}
    return {**lab.env(gpus="all", docker_host=engine.url, **settings), **machine}


def asked(server: MockServer) -> list[dict[str, str]]:
    """What the worker's questions for a job said, in order."""
    questions = [event for event in server.events() if event["kind"] in ("pull", "poll")]
    return [{name: values[0] for name, values in parse_qs(event["note"]).items()} for event in questions]


def about_gpus(question: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in question.items() if name.startswith("gpu")}


def seen(lab: Lab, job_id: int) -> str:
    """What the job saw as its GPUs; it must have finished."""
    assert lab.ended(job_id) == ("finished", "")
    return lab.server.results(job_id)["output/out/seen"].decode().strip()


def requested(lab: Lab, job_id: int) -> list[str]:
    """The GPUs that the job's container has by the engine's word, while it runs."""
    found = [container for container in lab.containers() if container["Labels"]["jobfetcher.job"] == str(job_id)]
    requests = lab.engine.inspect_container(found[0]["Id"])["HostConfig"]["DeviceRequests"] or []
    assert all(request["Capabilities"] == [["gpu"]] and request["Count"] == 0 for request in requests)
    return [uuid for request in requests for uuid in request["DeviceIDs"]]


def run_to_idle(worker_env: dict[str, str], directory: Path) -> Command:
    """Run a worker until there was no job for a second."""
    with command(["run", "--exit-when-idle", "1"], worker_env, directory) as worker:
        assert worker.wait() == 0, worker.errors
    return worker


@pytest.mark.fault("T13")
def test_two_jobs_side_by_side_get_one_gpu_each(
    gpu_lab: Lab, gpu_engine: PrivateEngine, gpus: GpuStub, tmp_path: Path
) -> None:
    lab = gpu_lab
    needs = {"gpu_model": A4000, "gpu_archi": "8.6", "gpu_mem": 16000}
    jobs = [lab.submit(SEE, UNTIL_LET_GO, files_up=OUT, hardware=needs) for _ in range(2)]
    with command(["run", "--exit-when-idle", "1"], env(lab, gpu_engine, gpus, *TWO_A4000), tmp_path) as worker:
        for job in jobs:
            lab.server.wait_for_state(job, "running")
        both = [requested(lab, job) for job in jobs]
        for job in jobs:
            lab.let_go(job)
        assert worker.wait() == 0
    assert sorted(both) == [[gpus.uuid(0)], [gpus.uuid(1)]]
    assert [[seen(lab, job)] for job in jobs] == both
    # two GPUs of one model are one question, in the server's own words (PROTOCOL.md, `GET /jobs`)
    one = {"gpu_model": A4000, "gpu_archi": "8.6", "gpu_mem": "16376"}
    questions = [about_gpus(question) for question in asked(lab.server)]
    assert questions == [one] * len(questions)


@pytest.mark.fault("T13")
def test_a_job_sees_what_it_asked_for_and_nothing_else(
    gpu_lab: Lab, gpu_engine: PrivateEngine, gpus: GpuStub, tmp_path: Path
) -> None:
    lab = gpu_lab
    greedy = {"NVIDIA_VISIBLE_DEVICES": "all"}
    small, large = gpus.uuid(0), gpus.uuid(1)
    cases = {
        lab.submit(SEE, files_up=OUT, hardware={"gpu_mem": 40000}): large,
        lab.submit(SEE, files_up=OUT, hardware={"gpu_mem": 1}): small,
        lab.submit(SEE, files_up=OUT, hardware={"gpu_model": H100, "gpu_archi": "9.0"}): large,
        lab.submit(SEE, files_up=OUT): f"{small},{large}",  # asks for nothing: all, as there is one slot
        lab.submit(SEE, files_up=OUT, hardware={"gpu_mem": 0}): "void",
        lab.submit(SEE, files_up=OUT, hardware={"gpu_mem": 0}, env=greedy): "void",
        lab.submit(SEE, files_up=OUT, hardware={"gpu_model": A4000}, env=greedy): small,
        lab.submit(SEE, files_up=OUT, hardware={"gpu_mem": 0}, image=GREEDY_IMAGE): "void",
        lab.submit(SEE, files_up=OUT, hardware={"gpu_model": A4000}, image=GREEDY_IMAGE): small,
    }
    run_to_idle(env(lab, gpu_engine, gpus, *TWO_MODELS, max_jobs="1"), tmp_path)
    assert {job: seen(lab, job) for job in cases} == cases


def test_where_gpus_are_for_those_who_ask_a_silent_job_computes_beside_one_that_has_it(
    gpu_lab: Lab, gpu_engine: PrivateEngine, gpus: GpuStub, tmp_path: Path
) -> None:
    lab = gpu_lab
    silent = lab.submit(SEE, UNTIL_LET_GO, files_up=OUT)
    asking = lab.submit(SEE, UNTIL_LET_GO, files_up=OUT, hardware={"gpu_mem": 16000})
    worker_env = env(lab, gpu_engine, gpus, f"{A4000}:16376:8.6", gpu_unasked="none", reserve_memory="64")
    with command(["run", "--exit-when-idle", "1"], worker_env, tmp_path) as worker:
        for job in (silent, asking):
            lab.server.wait_for_state(job, "running")
        for job in (silent, asking):
            lab.let_go(job)
        assert worker.wait() == 0
    assert (seen(lab, silent), seen(lab, asking)) == ("void", gpus.uuid(0))


def test_a_worker_asks_once_for_each_model(
    gpu_lab: Lab, gpu_engine: PrivateEngine, gpus: GpuStub, tmp_path: Path
) -> None:
    """PROTOCOL.md S18: models are compared for equality, so one question cannot be about two."""
    run_to_idle(env(gpu_lab, gpu_engine, gpus, *TWO_MODELS), tmp_path)
    questions = [about_gpus(question) for question in asked(gpu_lab.server)]
    small = {"gpu_model": A4000, "gpu_archi": "8.6", "gpu_mem": "16376"}
    large = {"gpu_model": H100, "gpu_archi": "9.0", "gpu_mem": "81559"}
    assert len(questions) > 2
    assert questions == [small, large] * (len(questions) // 2)


def test_without_a_gpu_nothing_is_said_of_any(
    gpu_lab: Lab, gpu_engine: PrivateEngine, gpus: GpuStub, tmp_path: Path
) -> None:
    lab = gpu_lab
    waiting = lab.submit(SEE, files_up=OUT, hardware={"gpu_mem": 1000})
    taken = lab.submit(SEE, files_up=OUT)
    run_to_idle(env(lab, gpu_engine, gpus), tmp_path)
    assert [about_gpus(question) for question in asked(lab.server) if about_gpus(question)] == []
    assert lab.server.state(waiting) == "queued"
    assert seen(lab, taken) == "void"


# -- gone only inside a container (E14) --------------------------------------------------------------------------------


@pytest.fixture
def hook(gpu_engine: PrivateEngine) -> Iterator[Path]:
    """The stub of NVIDIA's hook on that engine; what a test makes of it is undone."""
    hook = gpu_engine.directory / "bin" / "nvidia-container-runtime-hook"
    before = hook.read_text()
    yield hook
    _write_program(hook, before)


def _write_program(path: Path, text: str) -> None:
    """In one step, for the engine may run it at this moment."""
    draft = path.with_suffix(".new")
    draft.write_text(text)
    draft.chmod(0o755)
    draft.rename(path)


BROKEN_HOOK = (
    "#!/bin/sh\necho 'nvidia-container-cli: initialization error: nvml error: driver not loaded' >&2\nexit 1\n"
)


@pytest.mark.fault("E14", "J5")
def test_a_gpu_that_containers_do_not_get_any_more_is_set_aside_and_comes_back(
    gpu_lab: Lab, gpu_engine: PrivateEngine, gpus: GpuStub, hook: Path, tmp_path: Path
) -> None:
    """The driver lists it all the time. The job goes back; where GPUs are for those who ask, jobs that need none go on;
    what passes is used again."""
    lab = gpu_lab
    asks = {"gpu_mem": 16000}
    victim = lab.submit(UNTIL_LET_GO, "&& exit 1", hardware=asks)
    mended = hook.read_text()
    given = env(lab, gpu_engine, gpus, f"{A4000}:16376:8.6", gpu_unasked="none")
    with command(["run"], given, tmp_path) as worker:
        lab.server.wait_for_state(victim, "running")
        _write_program(hook, BROKEN_HOOK)
        lab.let_go(victim)
        worker.wait_for(f"GPU {A4000} ({gpus.uuid(0)}) is set aside; no job gets it until it works")
        wait_until(lambda: lab.server.state(victim) == "queued", "it is given back")
        later = lab.submit(SEE, files_up=OUT, hardware=asks)
        without = lab.submit(SEE, files_up=OUT, hardware={"gpu_mem": 0})
        wait_until(lambda: lab.server.state(without) == "finished", "a job without a GPU goes on")
        assert lab.server.state(later) == "queued"
        _write_program(hook, mended)
        for _ in range(5):  # which make it test itself before its time
            lab.submit("exit 1", hardware={"gpu_mem": 0})
        worker.wait_for(f"GPU {A4000} ({gpus.uuid(0)}) works in a container again")
        wait_until(lambda: lab.server.state(later) == "finished", "it is used again")
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
    assert seen(lab, later) == gpus.uuid(0)
    assert seen(lab, without) == "void"
    assert worker.errors.count("is set aside") == 1


@pytest.mark.fault("E14", "J5")
def test_a_gpu_that_does_not_answer_inside_a_container_gives_the_job_back(
    gpu_lab: Lab, gpu_engine: PrivateEngine, gpus: GpuStub, tmp_path: Path
) -> None:
    """NVIDIA's own program is asked on the job's image; here both images have one which says what that one says. One
    alone could be broken itself."""
    lab = gpu_lab
    put = r"mkdir -p /usr/bin; printf '#!/bin/sh\necho Failed to initialize NVML: Unknown Error; exit 255\n' "
    put += "> /usr/bin/nvidia-smi; chmod 755 /usr/bin/nvidia-smi"
    for tag in ("one", "two"):
        made = lab.engine.create_container(lab.image, ["/bin/sh", "-c", f"{put}; echo {tag} > /tag"])["Id"]
        lab.engine.start(made)
        lab.engine.wait(made)
        lab.engine.commit(made, "jobfetcher-test/smi", tag)
        lab.engine.remove_container(made)
    asks = {"gpu_mem": 16000}
    with command(["run"], env(lab, gpu_engine, gpus, f"{A4000}:16376:8.6"), tmp_path) as worker:
        first = lab.submit("exit 1", hardware=asks, image="jobfetcher-test/smi:one")
        worker.wait_for("a GPU failed while the job ran: GPU NVIDIA RTX A4000")
        wait_until(lambda: lab.server.state(first) == "queued", "it is given back")
        assert "is set aside" not in worker.errors
        second = lab.submit("exit 1", hardware=asks, image="jobfetcher-test/smi:two")
        worker.wait_for("is set aside")
        wait_until(lambda: lab.server.state(second) == "queued", "it is given back")
        worker.wait_for("no job can be taken: none of its GPUs works")
        unsaid = lab.submit("true")  # one that says nothing of GPUs would be run without one, and fail for it
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
    assert lab.server.events("pull", unsaid) == []
    assert "Failed to initialize NVML: Unknown Error" in worker.errors


def real_gpu(engine: docker.APIClient) -> str:
    """The UUID of a real GPU here that the engine can give to containers.

    Skips where there is none, in CI as well: a GPU is no service that a set-up could install.
    """
    found = detect.read_gpus()
    if not found.gpus:
        pytest.skip(f"no real NVIDIA GPU here: {'; '.join(found.problems)}")
    if "nvidia" not in engine.info()["Runtimes"]:
        pytest.skip("an NVIDIA GPU is here, but the engine has no runtime `nvidia` (nvidia-ctk runtime configure)")
    return found.gpus[0].uuid


@pytest.mark.gpu
def test_a_real_gpu_is_given_to_a_job(lab: Lab, tmp_path: Path) -> None:
    uuid = real_gpu(lab.engine)
    cpu = lab.submit(SEE, "ls /dev > /files/out/devices", files_up=OUT, hardware={"gpu_mem": 0})
    gpu = lab.submit(SEE, "ls /dev > /files/out/devices", files_up=OUT, hardware={"gpu_mem": 1})
    libraries = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    run_to_idle({**lab.env(gpus=uuid), **libraries}, tmp_path)
    assert (seen(lab, cpu), seen(lab, gpu)) == ("void", uuid)

    def devices(job: int) -> int:
        listed = lab.server.results(job)["output/out/devices"].decode().split()
        return sum(name.startswith("nvidia") and name.removeprefix("nvidia").isdecimal() for name in listed)

    assert (devices(cpu), devices(gpu)) == (0, 1)
