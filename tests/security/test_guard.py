"""That jobs on the own bridge do not reach services of the machine, by a chain of the worker's (FAULTS.md T31).

The machine is the network namespace of an engine of the tests' own: a thread that enters it (setns(2)) stands for a
worker there, and the rules are gone with it. Those of the machine that runs the tests are never changed.
"""

import ctypes
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest

from demo.busybox_image import IMAGE
from jobfetcher import build
from jobfetcher.engine import guard
from jobfetcher.engine.guard import CHAIN, USER_CHAIN, Guard
from jobfetcher.engine.run_spec import OWN_NETWORK, BoxPolicy
from tests.security.test_bridge import PORT, asked, outside
from tests.support.boxes import DockerBench, docker_bench
from tests.support.own_engine import end
from tests.support.private_engine import PrivateEngine, private_engine
from tests.support.services import require_program, wait_until
from tests.support.worker import Lab, command

pytestmark = [pytest.mark.docker, pytest.mark.fault("T31")]

_NEW_NET = 0x40000000  # linux/sched.h, CLONE_NEWNET: the descriptor is of such a namespace
ANSWER = "of the machine"


@pytest.fixture(scope="module")
def machine(
    engine: docker.APIClient, busybox: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrivateEngine]:
    """An engine in a network namespace of its own, where a service listens on all addresses."""
    require_program("iptables", "iptables")
    www = tmp_path_factory.mktemp("www")
    (www / "x").write_text(f"{ANSWER}\n")
    with private_engine() as own:
        own.copy_image(engine, IMAGE)
        subprocess.run(outside(own, require_program("ip", "iproute2"), "link", "set", "lo", "up"), check=True)
        serve = [require_program("busybox", "busybox-static"), "httpd", "-f", "-p", str(PORT), "-h", str(www)]
        server = subprocess.Popen(outside(own, *serve))
        try:
            yield own
        finally:
            end(server, signal.SIGTERM)


@pytest.fixture
def clean(machine: PrivateEngine) -> Iterator[PrivateEngine]:
    """That machine, without rules before and after."""
    flush(machine)
    yield machine
    flush(machine)


@contextmanager
def network_of(own: PrivateEngine) -> Iterator[None]:
    """This thread, and programs that it starts, in the network namespace of that engine."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as before, open(f"/proc/{own.pid}/ns/net") as there:
        assert libc.setns(there.fileno(), _NEW_NET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(before.fileno(), _NEW_NET) == 0, os.strerror(ctypes.get_errno())


def iptables(own: PrivateEngine, *arguments: str, program: str = "iptables") -> str:
    done = subprocess.run(outside(own, program, "-w", *arguments), check=True, capture_output=True, text=True)
    return done.stdout


def flush(own: PrivateEngine) -> None:
    """As a firewall that is loaded anew does it."""
    for program in ("iptables", "ip6tables"):
        iptables(own, "-F", program=program)
        iptables(own, "-X", program=program)


class Clock:
    """Time that passes when a test says so, in seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self) -> None:
        """So long that the rules are looked at again."""
        self.now += guard.LOOK_EVERY_S + 1


class Said(list[tuple[str, str, str]]):
    """What the worker said: name, level, message."""

    def emit(self, name: str, /, level: str = "info", **fields: Any) -> None:
        self.append((name, level, str(fields["message"])))


@contextmanager
def guarded(own: PrivateEngine, files: Path, said: Said, **options: Any) -> Iterator[DockerBench]:
    with docker_bench(IMAGE, files, url=own.url, guard=Guard(said.emit, **options)) as bench:
        yield bench


def bridge(own: PrivateEngine) -> str:
    [found] = own.client().networks(names=[OWN_NETWORK])
    return f"br-{found['Id'][:12]}"


def test_without_the_chain_a_job_reaches_the_machine(clean: PrivateEngine, tmp_path: Path) -> None:
    """Else the tests below would show nothing."""
    with docker_bench(IMAGE, tmp_path / "files", url=clean.url) as bench, network_of(clean):
        assert ANSWER in asked(bench)


def test_a_job_does_not_reach_services_of_the_machine(clean: PrivateEngine, tmp_path: Path) -> None:
    said = Said()
    with guarded(clean, tmp_path / "files", said) as bench, network_of(clean):
        assert ANSWER not in asked(bench)
        assert [(name, level) for name, level, _ in said] == [("network_guarded", "info")]
        # What comes in elsewhere is none of the chain's business.
        nc = (
            f"printf 'GET /x HTTP/1.0\\r\\n\\r\\n' | {require_program('busybox', 'busybox-static')} nc 127.0.0.1 {PORT}"
        )
        assert ANSWER in subprocess.run(["sh", "-c", nc], capture_output=True, text=True, check=True).stdout


def test_the_owner_opens_one_service_for_jobs(clean: PrivateEngine, tmp_path: Path) -> None:
    """Also before the worker has made its chain, so that the rule may come with the machine's own at its start."""
    iptables(clean, "-N", USER_CHAIN)
    iptables(clean, "-A", USER_CHAIN, "-p", "tcp", "--dport", str(PORT), "-j", "ACCEPT")
    with guarded(clean, tmp_path / "files", Said()) as bench, network_of(clean):
        assert ANSWER in asked(bench)
    iptables(clean, "-F", USER_CHAIN)
    with guarded(clean, tmp_path / "files", Said()) as bench, network_of(clean):
        assert ANSWER not in asked(bench)


def test_the_machine_may_still_speak_to_a_job(clean: PrivateEngine, tmp_path: Path) -> None:
    """Answers of connections that the machine opened come through."""
    with guarded(clean, tmp_path / "files", Said()) as bench, network_of(clean):
        container = bench.engine.start(bench.spec("echo of the job | nc -l -p 80", policy=BoxPolicy()))
        try:
            [found] = clean.client().inspect_container(container.id)["NetworkSettings"]["Networks"].values()
            ask = [require_program("busybox", "busybox-static"), "nc", "-w", "3", found["IPAddress"], "80"]

            def answer() -> bool:
                done = subprocess.run(ask, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
                return "of the job" in done.stdout

            wait_until(answer, "the job answers the machine")
        finally:
            container.remove()


def test_a_flushed_chain_comes_back_and_what_is_there_is_not_made_again(clean: PrivateEngine, tmp_path: Path) -> None:
    clock, said = Clock(), Said()
    with guarded(clean, tmp_path / "files", said, clock=clock) as bench, network_of(clean):
        assert ANSWER not in asked(bench)
        rules = iptables(clean, "-S"), iptables(clean, "-S", program="ip6tables")
        assert rules[0].count(f"-j {CHAIN}\n") == rules[1].count(f"-j {CHAIN}\n") == 1
        Guard(said.emit).hold(bridge(clean))  # another worker's
        assert (iptables(clean, "-S"), iptables(clean, "-S", program="ip6tables")) == rules
        flush(clean)
        clock.pass_by()
        assert ANSWER not in asked(bench)
        assert (iptables(clean, "-S"), iptables(clean, "-S", program="ip6tables")) == rules
        iptables(clean, "-F", CHAIN)  # a part of it
        clock.pass_by()
        assert ANSWER not in asked(bench)


def test_jobs_pay_for_a_look_once_in_a_while(clean: PrivateEngine, tmp_path: Path) -> None:
    started: list[str] = []

    def find(name: str) -> str:
        started.append(name)
        return require_program(name, "iptables")

    clock = Clock()
    with guarded(clean, tmp_path / "files", Said(), clock=clock, find=find) as bench, network_of(clean):
        bench.run(bench.spec("true", policy=BoxPolicy()))
        started.clear()
        bench.run(bench.spec("true", job_id="2", policy=BoxPolicy()))
        assert started == []
        clock.pass_by()
        bench.run(bench.spec("true", job_id="3", policy=BoxPolicy()))
        assert started == ["iptables", "ip6tables"]


def test_the_name_server_that_the_machine_may_be_is_asked(clean: PrivateEngine, tmp_path: Path) -> None:
    written = tmp_path / "resolv.conf"
    written.write_text(
        "# a comment\nsearch lab\nnameserver 127.0.0.53\nnameserver 10.1.2.3\nnameserver fd00::5\nnameserver\n"
    )
    said = Said()
    files = (written, tmp_path / "none")
    with guarded(clean, tmp_path / "files", said, name_servers=files) as bench, network_of(clean):
        bench.run(bench.spec("true", policy=BoxPolicy()))
    four, six = iptables(clean, "-S", CHAIN), iptables(clean, "-S", CHAIN, program="ip6tables")
    assert "-d 10.1.2.3/32 -p udp -m udp --dport 53 -j RETURN" in four
    assert "-d 10.1.2.3/32 -p tcp -m tcp --dport 53 -j RETURN" in four
    assert "127.0.0.53" not in four
    assert "-d fd00::5/128 -p udp -m udp --dport 53 -j RETURN" in six
    assert four.splitlines()[-1].startswith(f"-A {CHAIN} -j REJECT")


def test_without_iptables_it_is_said_once_and_jobs_run(clean: PrivateEngine, tmp_path: Path) -> None:
    said, clock = Said(), Clock()
    with guarded(clean, tmp_path / "files", said, clock=clock, find=lambda _: None) as bench, network_of(clean):
        for job in ("1", "2"):
            finished, _ = bench.run(bench.spec("true", job_id=job, policy=BoxPolicy()))
            assert finished.code == 0
            clock.pass_by()
        assert bench.engine.open_network() == said[0][2]
    [(name, level, message)] = said
    assert (name, level) == ("network_open", "warning")
    assert "there is no program iptables here" in message
    assert f"iptables -I INPUT -i {bridge(clean)} -j REJECT" in message


def test_what_iptables_refuses_is_one_sentence(clean: PrivateEngine, tmp_path: Path) -> None:
    program = tmp_path / "iptables"
    program.write_text("#!/bin/sh\necho 'Permission denied (you must be root)' >&2\necho more >&2\nexit 4\n")
    program.chmod(0o755)
    said = Said()
    with guarded(clean, tmp_path / "files", said, find=lambda _: str(program)) as bench, network_of(clean):
        finished, _ = bench.run(bench.spec("true", policy=BoxPolicy()))
    assert finished.code == 0
    [(_, _, message)] = said
    assert "for iptables -S: Permission denied (you must be root). This rule" in message


def test_a_worker_elsewhere_says_so_and_touches_nothing(clean: PrivateEngine, tmp_path: Path) -> None:
    """As one in a container does: the engine's bridge is not in its network namespace."""
    said = Said()
    with guarded(clean, tmp_path / "files", said, find=lambda name: pytest.fail(f"{name} is looked for")) as bench:
        for job in ("1", "2"):
            bench.run(bench.spec("true", job_id=job, policy=BoxPolicy()))
    [(name, level, message)] = said
    assert (name, level) == ("network_open", "info")
    assert "in a container or on another machine" in message
    assert CHAIN not in iptables(clean, "-S")


@pytest.mark.parametrize(("setting", "guards"), [("auto", True), ("off", False)])
def test_a_setting_decides(clean: PrivateEngine, tmp_path: Path, lab: Lab, setting: str, guards: bool) -> None:
    """And `resources`, which makes nothing, says what `run` would: that this worker is elsewhere."""
    changes = {"docker_host": clean.url, "job_network": "bridge", "job_network_guard": setting}
    with (
        docker_bench(IMAGE, tmp_path / "files", url=clean.url) as bench,
        closing(build.make_engine(lab.settings(**changes), bench.instance, Said().emit)) as worker,
        network_of(clean),
    ):
        worker.start(bench.spec("true", policy=BoxPolicy())).remove()
    assert (f"-j {CHAIN}\n" in iptables(clean, "-S")) is guards
    with command(["resources", "--json"], lab.env(**changes), tmp_path) as run:
        assert run.wait() == 0, run.output
        notes = [note for note in json.loads(run.output)["notes"] if "JOB_NETWORK_GUARD" in note]
    assert len(notes) == guards
    assert all("in a container or on another machine" in note for note in notes)


def test_run_says_it_once_at_its_start(clean: PrivateEngine, tmp_path: Path, lab: Lab) -> None:
    """When it shows itself that this machine runs jobs, before it asks for one; and jobs run."""
    lab.submit("true")
    settings = lab.env(docker_host=clean.url, job_network="bridge", job_network_guard="auto")
    with command(["run", "--once"], settings, tmp_path) as run:
        assert run.wait() == 0, run.errors
        assert run.errors.count("JOB_NETWORK_GUARD=off") == 1, run.errors
        assert run.errors.index("JOB_NETWORK_GUARD=off") < run.errors.index("job 1")
    assert lab.server.job(1)["state"] == "finished"
