"""A worker killed once at every failpoint there is, started again, and left alone: the job has one right end (N1).

All cases are run before the first test, some at a time: most of a case is waiting, because a worker that comes after a
kill says no end before the calls of the dead one are surely over (10 or 30 s, FAULTS.md A7). A test then tells how its
case went. Each has a server, a PATH_BASE and processes of its own.

Not killed here: nothing. What needs a circumstance of its own (a reboot, a registry, a worker that is not root, an end
that nobody heard for a week) gets it below.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest
from docker.errors import APIError

from jobfetcher.core.failpoints import FAILPOINTS
from tests.chaos.jobs import Planned, input_content, sha256
from tests.chaos.oracle import Life, judge
from tests.chaos.seen import Starts, orphans, remove_containers, see, take_lost_answers_back
from tests.e2e.test_bare_metal_user import USER, as_user
from tests.support import clock, services
from tests.support.mock_server import running_mock_api
from tests.support.services import REPOSITORY, Registry, require, require_program, wait_until
from tests.support.worker import DEADLINE_S, Command, Lab, command

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(600)]

_AT_ONCE = 10  # of the cases: on two cores, so many workers start within some seconds
_ENDS_WITHIN_S = 120.0  # a call that is in doubt for 30 s, on a busy machine

#: Held while a server starts and answers its first request: FastAPI makes the routes then, under
#: `warnings.catch_warnings`, which no other thread may do at the same time.
_starting = threading.Lock()

_BOOT_ID = "/proc/sys/kernel/random/boot_id"

#: Says so (exit code 9) where it was not given a clean state, reads an input and spoils it, prints, and writes.
_COMMAND = (
    "[ ! -e /files/out/began ] || exit 9; touch /files/out/began; sleep 0.3; cp /files/data/in.bin /files/out/copy;"
    " printf spoiled | dd of=/files/data/in.bin conv=notrunc 2> /dev/null;"
    " echo logged > /files/logs/own.log; echo printed"
)
_INPUT = input_content(3)
RICH = Planned(
    "rich",
    _COMMAND,
    {
        "output/out/began": sha256(b""),
        "output/out/copy": sha256(_INPUT),
        "log/logs/own.log": sha256(b"logged\n"),
        "log/jobfetcher/container.log": sha256(b"printed\n"),
    },
    writes={"output": "out", "log": "logs"},
)


@dataclass(frozen=True)
class Circumstance:
    """What a failpoint needs in order to be met.

    `before`: where an earlier worker was killed first; `reboot`: the machine was restarted after that; `not_root`: the
    worker has no rights of root; `registry`: the image must be pulled.
    """

    before: str | None = None
    reboot: bool = False
    not_root: bool = False
    registry: bool = False


_HOLDING = Circumstance(before="after:started")
_REBOOTED = Circumstance(before="after:started", reboot=True)
CIRCUMSTANCES = {
    "before:recover": _HOLDING,
    "after:recover": _HOLDING,
    "before:again": _REBOOTED,
    "after:again": _REBOOTED,
    "before:restore": _REBOOTED,
    "during:restore": _REBOOTED,
    "after:own": Circumstance(not_root=True),
    "after:pull": Circumstance(registry=True),
}

#: Met only by an end that could not be told for a week: a test of their own.
QUARANTINE = ("before:quarantine", "after:quarantine")
CASES = sorted(FAILPOINTS - set(QUARANTINE))


class Case:
    """One job, killed at one place."""

    def __init__(self, name: str, circumstance: Circumstance, home: Path, lab: Lab) -> None:
        self._name = name
        self._needs = circumstance
        self._home = home
        self._lab = lab
        self._starts = Starts(lab)
        self._lives: list[Life] = []
        self._boot = "first"
        self._python: Path | None = None
        self._env: Mapping[str, str] = {}
        if circumstance.not_root:
            os.chown(home, USER, USER)
            self._python = as_user(Path(tempfile.mkdtemp(dir=home)))
            self._env = {"HOME": str(home), "PYTHONPATH": str(REPOSITORY)}

    def run(self) -> None:
        """Raises AssertionError that says what went wrong, with what the workers said."""
        try:
            self._run()
        except AssertionError as error:
            logs = sorted(self._home.glob("command*.err"))
            said = "\n".join(f"-- worker {number}:\n{services.tail(log, 12)}" for number, log in enumerate(logs))
            raise AssertionError(f"{self._name}: {error}\n{said}") from error
        finally:
            remove_containers(self._lab)

    def _run(self) -> None:
        lab = self._lab
        ref = lab.server.put_input("in.bin", _INPUT)
        job = lab.submit(_COMMAND, image=lab.image, files_down={"data/in.bin": ref}, files_up=RICH.writes)
        if self._needs.before is not None:
            self._killed_at(self._needs.before)
        if self._needs.reboot:
            self._reboot(lab.files(job))
        self._killed_at(self._name)
        with self._worker() as worker:
            self._wait_for_end(worker, job)
            worker.send(signal.SIGTERM)
            assert worker.wait() == 0
        verdict = judge(
            {job: RICH},
            see(lab, {job: RICH}, self._starts, kills=1, lives=self._lives, engine_killed=self._needs.reboot),
        )
        assert verdict.wrong == {}
        assert len(self._starts.jobs) == (2 if self._needs.reboot else 1), f"{self._starts.jobs} container starts"

    def _killed_at(self, failpoint: str) -> None:
        began = time.time()
        with self._worker(JOBFETCHER_FAILPOINT=failpoint) as worker:

            def is_over() -> bool:
                self._starts.look()  # before all the others' events are too many for the engine to remember
                return not worker.is_running

            wait_until(is_over, f"killed at {failpoint}", DEADLINE_S)
            assert worker.wait() == -signal.SIGKILL, f"it never came to {failpoint}"
        self._lives.append(Life(began, time.time(), frozenset()))
        self._starts.look(now=True)

    def _wait_for_end(self, worker: Command, job: int) -> None:
        server, began, deadline = self._lab.server, time.time(), time.monotonic() + _ENDS_WITHIN_S
        while True:
            assert worker.is_running, "the worker ended by itself"
            assert time.monotonic() < deadline, f"no end within {_ENDS_WITHIN_S:g} s: {server.job(job)}"
            self._starts.look()
            # it also has to ask for the next job: then it has looked at all that an earlier one left
            if server.outbox() and any(event["time"] > began for event in server.events("poll")):
                return
            take_lost_answers_back(server, silent_s=3.0)
            time.sleep(0.5)  # not at once: many cases wait beside each other

    def _reboot(self, files: Path) -> None:
        """What a reboot leaves, late in the run: an input spoiled, a container dead, and another boot id.

        The container may have ended with 0 just before, which nobody can vouch for any more.
        """
        wait_until((files / "logs/own.log").exists, "the job has spoiled its input")
        for container in self._lab.containers():
            with contextlib.suppress(APIError):  # it has ended already
                self._lab.engine.kill(container["Id"])
        self._boot = "second"

    @contextlib.contextmanager
    def _worker(self, **env: str) -> Iterator[Command]:
        changes = {"pull_policy": "if-not-present"} if self._needs.registry else {}
        options = {**self._lab.env(timeout_status="1", **changes), **self._env, **env}
        prefix: list[str] = []
        if self._needs.reboot:
            boot_id = self._home / f"boot-{self._boot}"
            boot_id.write_text(f"00000000-0000-4000-8000-{len(self._boot):012d}\n")
            mount = f'mount --bind "$0" {_BOOT_ID} && exec "$@"'
            prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, str(boot_id)]
        python = {} if self._python is None else {"executable": self._python}
        with command(["run"], options, self._home, prefix=prefix, **python) as worker:
            yield worker


def carry_out(name: str, registry: Registry | None) -> None:
    """One case, from nothing to nothing."""
    circumstance = CIRCUMSTANCES.get(name, Circumstance())
    with contextlib.ExitStack() as opened:
        engine = opened.enter_context(contextlib.closing(services.docker_client()))
        image = services.ensure_busybox_image(engine)
        home = Path(tempfile.mkdtemp(prefix="jobfetcher-failpoint-"))  # whose parents others may enter
        opened.callback(shutil.rmtree, home)
        if registry is not None:
            image = opened.enter_context(_only_in(registry, engine, image))
        with _starting:
            # the account gets a job again whose answer was lost with it
            server = opened.enter_context(running_mock_api(home / "server", retry_different=False))
            server.outbox()
        Case(name, circumstance, home, Lab(server, home / "base", image, engine)).run()


@contextlib.contextmanager
def _only_in(registry: Registry, engine: docker.APIClient, source: str) -> Iterator[str]:
    """The reference of an image that is in the registry and not on the engine."""
    repository = f"{registry.address}/failpoints"
    engine.tag(source, repository, "1")
    pushed = engine.push(repository, "1")
    engine.remove_image(f"{repository}:1")
    assert "error" not in pushed, pushed
    try:
        yield f"{repository}:1"
    finally:
        if engine.images(name=f"{repository}:1"):
            engine.remove_image(f"{repository}:1")


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, Future[None]]:
    """How each case that is asked for went."""
    require("root" if os.geteuid() == 0 else None, "root rights: for another boot id, and to play another user")
    require_program("unshare", "util-linux")
    asked = {
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_killed_once and hasattr(item, "callspec")
    }
    with contextlib.ExitStack() as opened:
        registry = None
        if any(CIRCUMSTANCES.get(name, Circumstance()).registry for name in asked):
            registry = opened.enter_context(services.running_registry())
        pool = opened.enter_context(ThreadPoolExecutor(_AT_ONCE))
        found = {}
        for name in sorted(asked):
            own = registry if CIRCUMSTANCES.get(name, Circumstance()).registry else None
            found[name] = pool.submit(carry_out, name, own)
        wait(found.values())
    return found


@pytest.mark.fault("N1", "A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8")
@pytest.mark.parametrize("name", CASES)
def test_killed_once(name: str, outcomes: dict[str, Future[None]]) -> None:
    outcomes[name].result()


@pytest.mark.fault("N1", "J9")
@pytest.mark.parametrize("name", QUARANTINE)
def test_killed_while_an_end_that_nobody_heard_is_put_aside(
    name: str, tmp_path: Path, engine: docker.APIClient, busybox: str
) -> None:
    with clock.shim(tmp_path) as clocks, running_mock_api(tmp_path / "server") as server:
        lab = Lab(server, tmp_path / "base", busybox, engine)
        starts = Starts(lab)
        ref = server.put_input("in.bin", _INPUT)
        job = lab.submit(_COMMAND, files_down={"data/in.bin": ref}, files_up=RICH.writes)
        env = {**lab.env(timeout_status="1", stop_after_silence="0"), **clocks.env()}
        try:
            with command(["run"], {**env, "JOBFETCHER_FAILPOINT": "after:settling"}, tmp_path) as worker:
                assert worker.wait() == -signal.SIGKILL
            server.set_faults({"path": "/status$", "status": 503})
            clocks.jump_realtime(8 * 86_400)
            clocks.rate(8)  # all it does from here on is to wait and to be refused
            with command(["run"], {**env, "JOBFETCHER_FAILPOINT": name}, tmp_path) as worker:
                assert worker.wait() == -signal.SIGKILL, worker.errors
            starts.look(now=True)
            with command(["run"], env, tmp_path) as worker:
                worker.wait_for("could not be delivered for 7 days")
                worker.send(signal.SIGTERM)
                assert worker.wait() == 0, worker.errors
            assert orphans(lab) == ["quarantine in PATH_BASE"]
            kept = [path for path in (lab.base / "quarantine").rglob("copy") if path.is_file()]
            assert [path.read_bytes() for path in kept] == [_INPUT]
            starts.look(now=True)
            assert starts.jobs == [job]
            ends = [event for event in server.events("update", job) if event["state"] in {"finished", "error"}]
            assert [event for event in ends if event["code"] == 204] == []
        finally:
            remove_containers(lab)
