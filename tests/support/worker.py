"""A whole worker under test, in this process or as the command, beside a mock API; and the oracle of every such test.

Used by the end-to-end tests. A `Lab` is one mock API, one PATH_BASE and one engine. `work` and `running_worker` run a
worker here, put together by `jobfetcher.build` as the command does it; `command` runs `python -m jobfetcher`.
Everything has a deadline. `assert_clean` is the promise of the house (DESIGN.md) in code: every job handed out has one
end, and nothing of ours remains.
"""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import docker
import httpx

from jobfetcher import build
from jobfetcher.settings import Settings
from jobfetcher.worker import Gate, Leaving, Polling, Worker
from tests.support.mock_server import MockServer
from tests.support.services import tail, wait_until

DEADLINE_S = 60.0  # what a worker of a test needs at most on a busy machine; a wait ends when the worker does
_GRACE_S = 10.0  # until a worker that was told to stop has ended, and until its connections are closed

#: A job of this command ends when the test says so (`Lab.let_go`).
UNTIL_LET_GO = "until [ -e /files/go ]; do sleep 0.05; done"

#: What may lie in PATH_BASE while no job is open.
_OWN_FILES = {
    "lock",
    "journal.db",
    "journal.db-wal",
    "journal.db-shm",
    "journal.ballast",
    "jobs",
    "cache",
    "refused.json",
    "sign-in.json",
    "nonces.jsonl",
}

#: Settings that every worker of a lab has unless its test says otherwise, as `TESTS_WITH="PREFETCH=1 MAX_JOBS=3"`: the
#: tests of faults hold with everything on as well (scripts/test).
TESTS_WITH = {
    name.lower(): value
    for name, _, value in (setting.partition("=") for setting in os.environ.get("TESTS_WITH", "").split())
}

#: Words that end an account's time with a job; `queued` is the release (PROTOCOL.md S10).
_ENDS = {"finished", "error", "queued"}


class Heard:
    """What a worker told its observers; it is the `emit` of a worker that runs here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[dict[str, Any]] = []

    def __call__(self, name: str, /, level: str = "info", **fields: object) -> None:
        with self._lock:
            self._events.append({**fields, "event": name, "level": level})

    def all(self, name: str | None = None) -> list[dict[str, Any]]:
        """The events so far, oldest first, whole or only those of one name."""
        with self._lock:
            return [event for event in self._events if name in (None, event["event"])]

    def messages(self, name: str) -> list[str]:
        """The sentences of the events of one name."""
        return [str(event["message"]) for event in self.all(name)]

    def wait_for(self, name: str, count: int = 1) -> None:
        """Poll until `count` events of that name were heard; AssertionError after DEADLINE_S."""
        wait_until(lambda: len(self.all(name)) >= count, f"{count} events {name!r}", DEADLINE_S)


class RunningWorker:
    """A worker in a thread of this process."""

    def __init__(self, settings: Settings, enough: Gate) -> None:
        self.heard = Heard()
        self._settings = settings
        self._enough = enough
        self._worker: Worker | None = None
        self._told = Leaving.NO
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="worker")
        self._thread.start()

    def join(self) -> None:
        """Wait for its own end and raise what it raised; AssertionError, and the worker stopped, after DEADLINE_S."""
        self._thread.join(DEADLINE_S)
        if self._thread.is_alive():
            self.stop()
            raise AssertionError(f"the worker did not end by itself; last events: {self.heard.all()[-10:]}")
        if self._error is not None:
            raise self._error

    def leave(self, how: Leaving = Leaving.DRAIN) -> None:
        """What a signal does: stop taking jobs; with STOP_JOBS also stop the running ones."""
        self._told = how  # first: it may be put together just now
        if self._worker is not None:
            self._worker.leave(how)

    def stop(self) -> None:
        """End it, its jobs given back, whatever state it is in."""
        self.leave(Leaving.STOP_JOBS)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), f"the worker cannot be stopped; last events: {self.heard.all()[-10:]}"

    def _run(self) -> None:
        try:
            with build.worker(self._settings, Polling(self._settings.timeout_job, self._enough), self.heard) as worker:
                self._worker = worker
                if self._told is not Leaving.NO:
                    worker.leave(self._told)
                worker.run()
        except Exception as error:
            self._error = error


@contextlib.contextmanager
def running_worker(settings: Settings, enough: Gate = lambda taken, idle_s: False) -> Iterator[RunningWorker]:
    """A worker for the length of the block; it is stopped there if it has not ended by itself."""
    mask = os.umask(0o077)
    os.umask(mask)
    running = RunningWorker(settings, enough)
    try:
        yield running
    finally:
        running.stop()
        os.umask(mask)  # a worker sets the umask of its process, and that is ours


def work(settings: Settings, *, jobs: int = 1) -> Heard:
    """Run a worker here until it has taken `jobs` jobs and they have ended. Raises what the worker raises."""
    with running_worker(settings, lambda taken, idle_s: taken >= jobs) as running:
        running.join()
    return running.heard


class Command:
    """A running `jobfetcher` command."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self._process = process
        self._out = out
        self._err = err

    @property
    def output(self) -> str:
        """What it wrote to standard output so far."""
        return self._out.read_text()

    @property
    def errors(self) -> str:
        """What it wrote to standard error so far: its log, and complaints."""
        return self._err.read_text()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id; a program that was to run it (`prefix`) has the same, having become it."""
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Its exit code; AssertionError with its last lines when it does not end in time."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:g} s; it said:\n{tail(self._err)}") from None

    def wait_for(self, text: str) -> None:
        """Poll until its standard error has `text` in it; AssertionError when it ends before, or after DEADLINE_S."""

        def said() -> bool:
            ended = self._process.poll() is not None  # asked first, so that what it said last still counts
            if text in self.errors:
                return True
            assert not ended, f"it ended without saying {text!r}:\n{tail(self._err)}"
            return False

        wait_until(said, f"the command says {text!r}", DEADLINE_S)


@contextlib.contextmanager
def command(
    arguments: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    *,
    prefix: Sequence[str] = (),
    executable: Path = Path(sys.executable),
) -> Iterator[Command]:
    """Run `python -m jobfetcher ARGUMENTS` with nothing but `env` (and a PATH) for the length of the block.

    In `cwd`, so that no .env of the checkout is read; in a session of its own, so that no Ctrl-C of ours reaches it.
    If it still runs at the end of the block, its jobs are stopped, then it is killed. `prefix`: a program that runs it;
    `executable`: another Python.
    """
    number = len(list(cwd.glob("command*.err")))
    out, err = cwd / f"command{number}.out", cwd / f"command{number}.err"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            [*prefix, str(executable), "-m", "jobfetcher", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={"PATH": os.environ.get("PATH", os.defpath), **env},
            cwd=cwd,
            start_new_session=True,
        )
    try:
        yield Command(process, out, err)
    finally:
        for _ in range(2):
            process.terminate()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Held(NamedTuple):
    """What this process holds: how many open descriptors, and which threads."""

    descriptors: int
    threads: frozenset[threading.Thread]


@dataclass(frozen=True)
class Lab:
    """One mock API, one directory for a worker, one engine: what an end-to-end test works with.

    `told_again`: jobs whose end the worker may tell more than once, for it could not know that it was heard: the answer
    was lost, or it was killed before it noted it (PROTOCOL.md S19, FAULTS.md A7). A test adds them.
    """

    server: MockServer
    base: Path
    image: str
    engine: docker.APIClient
    told_again: set[int] = field(default_factory=set)

    def options(self, **changes: str) -> dict[str, str]:
        """Settings, by field name, of a worker that is quick to ask, to beat and to stop."""
        signing_in = {} if "password" in changes else {"access_token": "mock-token"}
        quick = {
            "api_url": self.server.url,
            "path_base": str(self.base),
            "timeout_job": "0.2",
            "timeout_status": "0.3",
            "stop_grace": "1",
            "gpus": "none",
            "reserve_disk": "0",
            "job_network": "none",
            "job_network_guard": "off",  # tests leave the rules of this machine's firewall alone
            "pull_policy": "never",
        }
        return {**quick, **signing_in, **TESTS_WITH, **changes}

    def settings(self, **changes: str) -> Settings:
        """`options`, checked, for a worker in this process."""
        return Settings.model_validate(self.options(**changes))

    def env(self, **changes: str) -> dict[str, str]:
        """`options` as the environment of a command; one that is set to the empty string is left out."""
        return {name.upper(): value for name, value in self.options(**changes).items() if value}

    def submit(
        self,
        *cmd: str,
        image: str | None = None,
        entrypoint: str | None = "fit",
        env: Mapping[str, str] | None = None,
        files_down: Mapping[str, str] | None = None,
        files_up: Mapping[str, str] | None = None,
        hardware: Mapping[str, object] | None = None,
    ) -> int:
        """Submit a job; without `cmd` it has the image's own command. `files_down` is path to file id.

        `entrypoint` is a label that real jobs always have and that nothing runs (PROTOCOL.md).
        """
        spec = {
            "app": {"cmd": list(cmd) or None, "env": env},
            "handler": {
                "image_url": image or self.image,
                "entrypoint": entrypoint,
                "files_down": files_down,
                "files_up": files_up,
            },
            "hardware": hardware or {},
        }
        return self.server.submit(spec)

    def files(self, job_id: int) -> Path:
        """The job's directory: what it sees as /files."""
        return self.base / "jobs" / str(job_id) / "files"

    def let_go(self, job_id: int) -> None:
        """Let a running job of the command UNTIL_LET_GO end."""
        (self.files(job_id) / "go").touch()

    def containers(self, *, of_jobs_only: bool = True) -> list[dict[str, Any]]:
        """The containers, running or not, of the worker of this directory: those of jobs, or also boxes of its own."""
        labels = [f"jobfetcher.instance={build.find_instance(os.path.realpath(self.base))}"]
        filters = {"label": [*labels, "jobfetcher.job"] if of_jobs_only else labels}
        return list(self.engine.containers(all=True, filters=filters))

    def ended(self, job_id: int) -> tuple[str, str]:
        """The job's state and details, as its user sees them, less the line break that the server puts first (S22)."""
        job = self.server.job(job_id)
        return str(job["state"]), str(job["details"] or "").removeprefix("\n")

    def computed(self, job_id: int) -> tuple[datetime, datetime]:
        """When the job's container started and ended, as the record says that lies beside its results."""
        record = json.loads(self.server.results(job_id)["log/jobfetcher/provenance.json"])
        began, ended = (datetime.fromisoformat(record["exit"][name]) for name in ("started_at", "finished_at"))
        return began, ended

    def take_as_another_account(self) -> list[int]:
        """Which jobs another account is handed out now; it gives them back at once."""
        self.server.add_account("another", "another-password", token="another-token")
        headers = {"Authorization": "Bearer another-token"}
        with httpx.Client(base_url=self.server.url, headers=headers, trust_env=False) as another:
            offer = {"memory": 10**12, "cpu_cores": 1000, "limit": 100}
            jobs = list(another.get("/jobs", params=offer).raise_for_status().json())
            for job in jobs:
                another.put(f"/jobs/{job}/status", params={"status": "queued"}).raise_for_status()
        return [int(job) for job in jobs]

    def held(self) -> Held:
        """What this process holds now, less what the test's own clients keep and the mock API, which runs here too."""
        self.engine.close()  # its idle connections; it opens new ones when it is used again
        self.server.events()  # opens the one connection that stays
        opened = [_target(entry) for entry in os.scandir("/proc/self/fd")]
        threads = (thread for thread in threading.enumerate() if not thread.name.startswith("AnyIO worker"))
        return Held(sum(not path.startswith(f"{self.server.data_dir}/") for path in opened), frozenset(threads))


def wait_until_running(lab: Lab, job_id: int) -> None:
    """Wait until the server knows that the job runs and its container, the only one, does."""
    lab.server.wait_for_state(job_id, "running")
    # A container that was made and not yet started, too, is in the list; killed then, the worker runs the job anew.
    wait_until(lambda: [one["State"] for one in lab.containers()] == ["running"], "its container runs", DEADLINE_S)


def assert_clean(lab: Lab, before: Held) -> None:
    """Assert that no worker runs here any more and that all it did is in order (FAULTS.md, "the same oracle").

    No violation in the server's record; one end for each time a job was handed out, and none where its user deleted
    it or the server took it back for good; one mail for each end; no container, directory, journal row, descriptor or
    thread left.
    """
    _assert_nothing_left(lab)
    _assert_ends(lab.server, lab.told_again)
    deadline = time.monotonic() + _GRACE_S
    while (now := lab.held()).descriptors > before.descriptors or now.threads - before.threads:
        left = f"descriptors: {before.descriptors} -> {now.descriptors}, threads: {now.threads - before.threads}"
        assert time.monotonic() < deadline, f"left open: {left}"
        time.sleep(0.02)


def _assert_ends(server: MockServer, told_again: set[int]) -> None:
    assert (found := server.violations()) == [], f"the worker broke the protocol: {found}"
    events = server.events()
    deleted = {event["job_id"] for event in events if event["kind"] == "delete"}
    pulls = Counter((event["job_id"], event["account"]) for event in events if event["kind"] == "pull")
    ends = [event for event in events if event["kind"] == "update" and event["code"] == 204 and event["state"] in _ENDS]
    counted = Counter((event["job_id"], event["account"]) for event in ends)
    for tally in server.tally():
        if tally["job_id"] in told_again:
            counted[tally["job_id"], tally["account"]] -= tally["repeats"]
    wanted = {owner: count for owner, count in (pulls - _lost(events)).items() if owner[0] not in deleted}
    assert counted == wanted, f"ends by (job, account): {dict(counted)}, but wanted {wanted}"
    told = Counter(event["job_id"] for event in ends if event["state"] != "queued")
    mails = Counter(mail["job_id"] for mail in server.outbox())
    assert mails == told, f"mails by job: {dict(mails)}, but ends {dict(told)}"


def _lost(events: Sequence[Mapping[str, Any]]) -> Counter[tuple[int, str]]:
    """How often the server took a job back from an account that was silent (PROTOCOL.md S4) and never took it again by
    a word of its own (S5), by (job, account)."""
    lost: Counter[tuple[int, str]] = Counter()
    silent: set[tuple[int, str]] = set()
    for event in events:
        owner = (event["job_id"], event["account"])
        if event["kind"] == "requeue":
            silent.add(owner)
        elif event["kind"] == "pull" and owner in silent:
            lost[owner] += 1
            silent.discard(owner)
        elif event["kind"] == "update" and event["code"] == 204:
            silent.discard(owner)
    return lost + Counter(silent)


def _assert_nothing_left(lab: Lab) -> None:
    if left := lab.containers(of_jobs_only=False):
        for container in left:  # the next test shall not suffer
            lab.engine.remove_container(container["Id"], force=True)
        raise AssertionError(f"containers left: {[container['Names'] for container in left]}")
    if not (lab.base / "journal.db").exists():
        return  # no worker came so far
    strangers = {entry.name for entry in lab.base.iterdir()} - _OWN_FILES
    assert not strangers, f"PATH_BASE has {strangers}"
    jobs = [entry.name for entry in (lab.base / "jobs").iterdir()]
    assert jobs == [], f"PATH_BASE/jobs has {jobs}"
    with contextlib.closing(sqlite3.connect(lab.base / "journal.db")) as journal:
        rows = [journal.execute(f"SELECT * FROM {table}").fetchall() for table in ("job", "file")]  # noqa: S608  constants
    assert rows == [[], []], f"the journal has {rows}"


def _target(entry: "os.DirEntry[str]") -> str:
    try:
        return os.readlink(entry.path)
    except FileNotFoundError:  # the descriptor of the listing itself, or one that the mock API closed just now
        return ""
