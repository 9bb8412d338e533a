"""Whole jobs on Podman's Docker-compatible socket, with root rights and without: what README promises of it.

The worker is the command, of the user whose Podman it is. After each test the oracle sees that every job had one end
and that nothing is left. `tests/contract/test_engine.py` asks the same Podman for what every engine promises.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import uuid4

import docker
import pytest

from demo.busybox_image import IMAGE
from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.machine import Gpu
from jobfetcher.engine.docker import DockerContainer, DockerEngine
from jobfetcher.engine.images import ImagePolicy, PullPolicy
from jobfetcher.engine.run_spec import BoxPolicy
from tests.support.as_user import python_as
from tests.support.boxes import LONG_S, DockerBench, no_progress, podman_bench
from tests.support.mock_server import running_mock_api
from tests.support.podman import PrivatePodman, private_podman
from tests.support.services import REPOSITORY, GpuStub, Registry, wait_until
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Command, Lab, assert_clean, command, wait_until_running

pytestmark = pytest.mark.docker

BOTH = pytest.mark.parametrize("kind", ["podman", "rootless_podman"])
ROOTFUL = pytest.mark.parametrize("kind", ["podman"])
ROOTLESS = pytest.mark.parametrize("kind", ["rootless_podman"])

Work = Callable[..., AbstractContextManager[Command]]

RESULT = "echo result > /files/out/result"
OUT = {"output": "out"}

#: What a worker says when it runs a job again whose end nobody could vouch for.
AGAIN = "running it once more"

#: What nobody but a container's root may enter or read.
CLOSED = (
    "cd /files/out && mkdir -p deep/er && echo deep > deep/er/closed && echo open > open &&"
    "chmod 000 deep/er/closed deep/er deep && chown 1234:1234 open && mkdir /files/else && chmod 000 /files/else"
)


@pytest.fixture
def engine_of_kind(request: pytest.FixtureRequest, kind: str) -> PrivatePodman:
    found: PrivatePodman = request.getfixturevalue(kind)
    return found


@pytest.fixture
def podman_lab(engine_of_kind: PrivatePodman) -> Iterator[Lab]:
    """A mock API, and a directory of the user whose Podman it is."""
    podman = engine_of_kind
    home = podman.shared / f"lab-{uuid4().hex[:8]}"
    home.mkdir()
    os.chown(home, podman.uid, podman.gid)
    try:
        with running_mock_api(home / "server") as server:
            lab = Lab(server, home / "base", IMAGE, podman.client())
            before = lab.held()
            yield lab
            assert_clean(lab, before)
    finally:
        shutil.rmtree(home)


@pytest.fixture
def work(podman_lab: Lab, engine_of_kind: PrivatePodman, tmp_path: Path) -> Work:
    """`jobfetcher run --exit-when-idle 1` of that user, with these settings, for the length of the block."""
    podman, home = engine_of_kind, podman_lab.base.parent
    python = python_as(tmp_path, podman.uid, podman.gid)

    def start(*arguments: str, **settings: str) -> AbstractContextManager[Command]:
        env = {**podman_lab.env(docker_host=podman.url, **settings), "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
        return command(["run", *(arguments or ("--exit-when-idle", "1"))], env, home, executable=python)

    return start


@pytest.fixture
def bench(engine_of_kind: PrivatePodman) -> Iterator[DockerBench]:
    with podman_bench(engine_of_kind) as ready:
        yield ready


def container_of(lab: Lab) -> dict[str, object]:
    [found] = lab.containers()
    state = lab.engine.inspect_container(found["Id"])["State"]
    return {"Id": found["Id"], "StartedAt": state["StartedAt"]}


# -- whose files -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.fault("E13", "T27")
def test_the_helper_gives_files_back_to_the_user_whose_podman_it_is(bench: DockerBench) -> None:
    mine = bench.files.stat().st_uid
    assert bench.run(bench.spec("mkdir /files/out && touch /files/out/x && chown -R 1234:1234 /files/out"))[0].code == 0
    assert (bench.files / "out").stat().st_uid != mine
    for _ in range(2):
        bench.engine.own(str(bench.files))
        assert {path.stat().st_uid for path in (bench.files / "out", bench.files / "out/x")} == {mine}


# -- what is offered ---------------------------------------------------------------------------------------------------


@ROOTFUL
def test_resources_offers_no_more_than_run_where_the_engine_has_less(
    podman_lab: Lab, engine_of_kind: PrivatePodman, gpus: GpuStub, tmp_path: Path
) -> None:
    """Podman before 5.4 hands out no GPU (NVIDIA's driver is a double here); all have one runtime."""
    version = tuple(int(part) for part in str(podman_lab.engine.version()["Version"]).split(".")[:2])
    driver = gpus.env("NVIDIA RTX A4000:16376:8.6")
    settings = podman_lab.env(docker_host=engine_of_kind.url, gpus="all")
    settings |= {name: driver[name] for name in ("LD_LIBRARY_PATH", "JF_STUB_GPUS")}
    with command(["resources", "--json"], settings, tmp_path) as run:
        assert run.wait() == 0, run.errors
        said = json.loads(run.output)
    notes = [note for note in said["notes"] if "no GPU is offered: Podman" in note]
    assert (len(said["offer"]["gpus"]), len(notes), said["slots"]) == ((1, 0, 1) if version >= (5, 4) else (0, 1, 1))
    with command(["run"], settings, tmp_path) as run:
        run.wait_for(f", {'no GPU' if notes else '1 GPU'}, 1 job at a time; ")
        assert all(note in run.errors for note in notes)
    for arguments in (["resources"], ["run"]):
        with command(arguments, settings | {"JOB_RUNTIME": "runsc"}, tmp_path) as run:
            assert run.wait() == 2
            assert "jobfetcher: JOB_RUNTIME=runsc has no effect here" in run.errors


# -- whole jobs --------------------------------------------------------------------------------------------------------


@BOTH
def test_forty_short_jobs_have_forty_ends(podman_lab: Lab, work: Work) -> None:
    jobs = [podman_lab.submit(f"echo {number} > /files/out/number", files_up=OUT) for number in range(40)]
    with work(max_jobs="2") as worker:
        assert worker.wait(240) == 0, worker.errors
    assert [podman_lab.ended(job) for job in jobs] == [("finished", "")] * 40
    assert [podman_lab.server.results(job)["output/out/number"] for job in jobs] == [b"%d\n" % n for n in range(40)]
    assert AGAIN not in worker.errors


@BOTH
@pytest.mark.fault("A4")
def test_a_running_container_is_adopted(podman_lab: Lab, work: Work) -> None:
    job = podman_lab.submit(UNTIL_LET_GO, f"&& {RESULT}", files_up=OUT)
    with work() as first:
        wait_until_running(podman_lab, job)
        before = container_of(podman_lab)
        first.send(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
    heard = len(podman_lab.server.events("update", job))
    with work() as second:
        wait_until(lambda: len(podman_lab.server.events("update", job)) > heard, "the next start beats", DEADLINE_S)
        assert container_of(podman_lab) == before
        podman_lab.let_go(job)
        assert second.wait() == 0, second.errors
    assert podman_lab.ended(job) == ("finished", "")
    assert podman_lab.server.results(job)["output/out/result"] == b"result\n"


@BOTH
@pytest.mark.fault("A5")
@pytest.mark.parametrize("stopped", [False, True], ids=["service-stays", "service-killed"])
def test_an_end_while_no_worker_was_there_is_no_restart(
    podman_lab: Lab, work: Work, engine_of_kind: PrivatePodman, stopped: bool
) -> None:
    """Nor is it where the service was away as well: what runs a container, and notes its end, is its conmon."""
    job = podman_lab.submit(UNTIL_LET_GO, f"&& {RESULT}", files_up=OUT)
    with work() as first:
        wait_until_running(podman_lab, job)
        first.send(signal.SIGKILL)
        first.wait()
    container = podman_lab.containers()[0]["Id"]
    conmon = engine_of_kind.conmon_of(container)
    if stopped:
        engine_of_kind.kill()
    podman_lab.let_go(job)
    wait_until(lambda: not Path(f"/proc/{conmon}").exists(), "its conmon has ended", DEADLINE_S)
    if stopped:
        engine_of_kind.start()
    with work() as second:
        assert second.wait() == 0, second.errors
    assert AGAIN not in second.errors
    assert podman_lab.ended(job) == ("finished", "")


@BOTH
@pytest.mark.fault("E1")
@pytest.mark.fault("E2")
def test_a_job_runs_on_while_the_service_is_away(podman_lab: Lab, work: Work, engine_of_kind: PrivatePodman) -> None:
    job = podman_lab.submit(UNTIL_LET_GO, f"&& {RESULT}", files_up=OUT)
    with work() as worker:
        wait_until_running(podman_lab, job)
        before = container_of(podman_lab)
        engine_of_kind.stop()
        engine_of_kind.start()
        assert container_of(podman_lab) == before
        podman_lab.let_go(job)
        assert worker.wait() == 0, worker.errors
    assert AGAIN not in worker.errors
    assert podman_lab.ended(job) == ("finished", "")


@BOTH
@pytest.mark.fault("B17")
def test_a_cancelled_job_is_stopped_and_leaves_nothing(podman_lab: Lab, work: Work) -> None:
    job = podman_lab.submit(f"{CLOSED}; {UNTIL_LET_GO}", files_up=OUT)
    with work("--once") as worker:
        wait_until(lambda: (podman_lab.files(job) / "else").exists(), "the job has written its files", DEADLINE_S)
        podman_lab.server.delete(job)
        assert worker.wait() == 0, worker.errors


@ROOTFUL
@pytest.mark.fault("E4")
def test_out_of_memory_is_told(podman_lab: Lab, work: Work) -> None:
    job = podman_lab.submit("tail /dev/zero", hardware={"memory": 64})
    with work("--once") as worker:
        assert worker.wait() == 0, worker.errors
    state, details = podman_lab.ended(job)
    assert (state, details.split("(")[0].strip()) == ("error", "out of memory"), details


@BOTH
@pytest.mark.fault("E13")
def test_what_a_jobs_root_user_leaves_is_sent_and_deleted(podman_lab: Lab, work: Work) -> None:
    job = podman_lab.submit(CLOSED, files_up=OUT)
    with work("--once") as worker:
        assert worker.wait() == 0, worker.errors
    assert podman_lab.ended(job) == ("finished", "")
    results = podman_lab.server.results(job)
    assert {name: content for name, content in results.items() if name.startswith("output/")} == {
        "output/out/deep/er/closed": b"deep\n",
        "output/out/open": b"open\n",
    }


# -- what is said at the start -----------------------------------------------------------------------------------------


@ROOTFUL
def test_a_rootful_podman_says_at_the_start_that_jobs_see_each_other(podman_lab: Lab, work: Work) -> None:
    job = podman_lab.submit("ip route | grep -q default")
    with work("--once", job_network="bridge") as worker:
        assert worker.wait() == 0, worker.errors
    assert "jobs that run here at the same time can reach each other: Podman" in worker.errors
    assert "without a limit" not in worker.errors
    assert podman_lab.ended(job) == ("finished", "")


@ROOTLESS
def test_a_rootless_podman_says_at_the_start_which_limits_it_has_not(podman_lab: Lab, work: Work) -> None:
    job = podman_lab.submit("ip route | grep -q default")
    with work("--once", job_network="bridge") as worker:
        assert worker.wait() == 0, worker.errors
    assert "jobs run here without a limit on memory, cores and processes: Podman" in worker.errors
    assert "can reach each other" not in worker.errors
    assert podman_lab.ended(job) == ("finished", "")


@ROOTFUL
def test_a_runtime_that_podman_would_not_take_is_refused(podman_lab: Lab, work: Work) -> None:
    with work("--once", job_runtime="runc") as worker:
        assert worker.wait() == 2
    assert "JOB_RUNTIME=runc has no effect here: Podman" in worker.errors.splitlines()[-1]


@ROOTLESS
def test_jobs_without_root_rights_have_a_network_each(bench: DockerBench) -> None:
    policy = BoxPolicy()
    address = "ip -o -4 addr show scope global | sed 's,.* inet \\([0-9.]*\\).*,\\1,'"
    listens = f"nc -l -p 7000 -e true & {address}; echo ready; sleep 60"
    server = bench.engine.start(bench.spec(listens, policy=policy))
    deadline = time.monotonic() + LONG_S
    while server.last_lines(1) != "ready":
        assert time.monotonic() < deadline
        assert server.wait(0.05) is None
    of_the_server = server.last_lines(2).splitlines()[0]
    # Both have the same address, slirp4netns' own or with pasta the machine's, each in a network of its own: where the
    # other listens, nobody does.
    asks = f"{address}; nc -w 2 {of_the_server} 7000"
    end, printed = bench.run(bench.spec(asks, job_id="2", policy=policy))
    server.remove()
    assert end.code != 0
    assert printed.splitlines()[0] == of_the_server


@BOTH
@pytest.mark.fault("T11")
def test_the_box_holds_as_dockers_does(bench: DockerBench) -> None:
    """Beside limits: seven capabilities, no way to more, a filter of system calls, no network, one mount of ours."""
    status = "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status"
    asked = f"{status}; ls /sys/class/net; grep -c ' /files ' /proc/mounts"
    _, printed = bench.run(bench.spec(asked))
    # CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID and SETUID (linux/capability.h: bits 0, 1, 3, 4, 5, 6 and 7)
    assert [line.split()[-1] for line in printed.splitlines()] == ["00000000000000fb"] * 2 + ["1", "2", "lo", "1"]


@ROOTFUL
@pytest.mark.fault("T12")
def test_a_rootful_podman_holds_the_limits(bench: DockerBench) -> None:
    files = "memory/memory.limit_in_bytes pids/pids.max cpu/cpu.cfs_quota_us cpu/cpu.shares"
    _, printed = bench.run(bench.spec(f"cd /sys/fs/cgroup; cat {files}; ulimit -c", memory_mib=100, cpu_cores=0.5))
    assert printed.split() == [str(100 << 20), "4096", "50000", "512", "0"]


# -- what an engine is asked -------------------------------------------------------------------------------------------


@BOTH
def test_waiting_costs_the_service_next_to_nothing(bench: DockerBench, engine_of_kind: PrivatePodman) -> None:
    """Podman's own call for it takes a whole core for each job."""
    container = bench.engine.start(bench.spec("sleep 60"))
    before, began = engine_of_kind.cpu_s(), time.monotonic()
    assert container.wait(4) is None
    used, passed = engine_of_kind.cpu_s() - before, time.monotonic() - began
    container.remove()
    assert used < passed / 5, f"{used:.2f} s of processor time in {passed:.2f} s"


@BOTH
@pytest.mark.fault("E8")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ('ENTRYPOINT ["/no/such/program"]', "the image has no /no/such/program"),
        ('ENTRYPOINT ["/etc/passwd"]', "/etc/passwd in the image is not a program that may be run"),
        ("WORKDIR /etc/passwd/x", "the image's working directory is unusable"),
        ("USER nobody-knows", f"{JobReason.CANNOT_START.value}: the container cannot start, its user is unknown"),
    ],
    ids=["missing", "no-program", "no-directory", "unknown-user"],
)
def test_what_cannot_start_is_the_jobs_fault(
    bench: DockerBench, engine_of_kind: PrivatePodman, change: str, why: str
) -> None:
    client = engine_of_kind.client()
    name = f"jobfetcher-test/{uuid4().hex[:8]}"
    copied = client.create_container(IMAGE, host_config=client.create_host_config(network_mode="none"))
    client.commit(copied, name, "1", changes=change)
    client.remove_container(copied)
    try:
        end, _ = bench.run(bench.spec("true", image=bench.engine.prepare(f"{name}:1", Halt(), no_progress)))
        said = end.error
    except JobFault as fault:
        said = f"{fault.reason.value}: {fault}"
    finally:
        client.remove_image(f"{name}:1", force=True)
    assert why in said, said


@BOTH
@pytest.mark.fault("E8")
def test_nothing_to_run_is_the_jobs_fault(bench: DockerBench) -> None:
    """Podman 4 refuses to make such a container. Podman 5 starts it, and its init finds no program of no name."""
    assert bench.engine.prove(replace(bench.spec("true"), image_id=""), bench.files)  # which leaves an empty image
    [empty] = bench.engine.api.ask("GET", "/images/json", filters='{"reference": ["jobfetcher-proof"]}').json()
    try:
        end, _ = bench.run(replace(bench.spec("true"), image_id=empty["Id"], command=None))
        said = end.error
    except JobFault as fault:
        said = str(fault)
    assert "neither the job nor the image says what to run" in said, said


@BOTH
@pytest.mark.fault("E8")
def test_a_command_that_is_too_long_is_the_jobs_fault(bench: DockerBench) -> None:
    """All together may have 2 MiB as a rule (execve(2)). It is crun that says so, where runc does with Docker."""
    end, _ = bench.run(bench.spec("true", env={f"V{number}": "x" * 120_000 for number in range(20)}))
    assert "longer than Linux takes" in end.error
    assert end.stopped_for is None


@BOTH
def test_a_network_that_is_not_there_names_the_setting(bench: DockerBench) -> None:
    with pytest.raises(WorkerFault, match="JOB_NETWORK=brigde: the engine has no such network"):
        bench.engine.start(bench.spec("true", policy=BoxPolicy(network="brigde")))


@BOTH
@pytest.mark.fault("D4")
def test_a_flood_of_output_is_bounded_on_disk(bench: DockerBench, engine_of_kind: PrivatePodman) -> None:
    container = bench.engine.start(bench.spec("yes 0123456789012345678901234567890123456789 | head -n 2000000"))
    assert container.wait(LONG_S) is not None
    logs = engine_of_kind.directory.rglob(f"{container.id}/userdata/ctr.log*")
    sizes = [path.stat().st_size for path in logs]
    container.remove()
    assert 0 < sum(sizes) < 40_000_000, "the job printed 82 MB, and each line has a head of some 40 bytes"


@BOTH
@pytest.mark.fault("E14")
def test_a_gpu_that_it_cannot_give_is_the_workers_fault(bench: DockerBench) -> None:
    """Podman before 5.4 can give none. Later ones find none of that name in a CDI specification."""
    gpu = Gpu(uuid="GPU-1", model="A", memory_mib=1, archi="8.0")
    why = "unresolvable CDI devices" if bench.engine.flavour().gives_gpus else "hands out no GPU"
    with pytest.raises(WorkerFault, match=why) as refused:
        bench.engine.start(bench.spec("true", gpus=(gpu,)))
    assert refused.value.reason is WorkerReason.GPU


@BOTH
@pytest.mark.fault("E11")
def test_what_a_person_does_to_a_job_is_no_success(bench: DockerBench, engine_of_kind: PrivatePodman) -> None:
    client = engine_of_kind.client()
    obeys = "trap 'exit 0' TERM; echo ready; while :; do sleep 0.1; done"

    def ready() -> DockerContainer:
        container = bench.engine.start(bench.spec(obeys))
        deadline = time.monotonic() + LONG_S
        while "ready" not in container.last_lines(1):
            assert time.monotonic() < deadline
            assert container.wait(0.05) is None
        return container

    acts: list[tuple[Callable[[str], object], bool, set[int]]] = [
        (client.kill, True, {137}),
        (partial(client.kill, signal=signal.SIGTERM), False, {0}),
        (partial(client.restart, timeout=5), False, {0, 255}),
    ]
    for act, genuine, codes in acts:
        container = ready()
        with ThreadPoolExecutor(1) as waiter:
            waited = waiter.submit(container.wait, LONG_S)
            act(container.id)
            end = waited.result()
        container.remove()
        assert end is not None
        assert (end.genuine, end.oom_killed) == (genuine, False)
        assert end.code in codes


@ROOTLESS
@pytest.mark.fault("E6")
@pytest.mark.fault("E7")
def test_images_come_from_a_registry(
    bench: DockerBench, engine_of_kind: PrivatePodman, registry: Registry, engine: docker.APIClient, busybox: str
) -> None:
    name = f"{registry.address}/podman/busybox"
    engine.tag(busybox, name, "1")
    try:
        pushed = engine.push(name, "1")
        assert "error" not in pushed, pushed
    finally:
        engine.remove_image(f"{name}:1")
    pulling = DockerEngine(bench.instance, url=engine_of_kind.url, images=ImagePolicy(pull=PullPolicy.IF_NOT_PRESENT))
    image = pulling.prepare(f"{name}:1", Halt(), no_progress)
    assert image.pulled
    assert image.digest is not None
    assert bench.run(bench.spec("echo pulled", image=image))[1] == "pulled"
    assert pulling.forget_image(image.id, image.reference)
    with pytest.raises(JobFault) as missing:
        pulling.prepare(f"{registry.address}/no/such:image", Halt(), no_progress)
    assert missing.value.reason is JobReason.IMAGE_MISSING
    pulling.close()


def test_a_podman_that_keeps_no_events_is_believed() -> None:
    with private_podman(events="none") as podman, podman_bench(podman) as bench:
        end, _ = bench.run(bench.spec("exit 3"))
    assert (end.code, end.genuine) == (3, True)
