"""What can be seen of a lab: the journal a dead worker left, container starts, what remains, and all of it together."""

import contextlib
import os
import shutil
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import docker

from jobfetcher.build import find_instance
from tests.chaos.jobs import Planned, sha256
from tests.chaos.oracle import Life, Seen
from tests.support.mock_server import MockServer
from tests.support.worker import Lab

#: The mock API's lease, in seconds.
LEASE_S = 300.0

_OWN_FILES = {"lock", "jobs", "journal.db", "journal.db-wal", "journal.db-shm", "journal.ballast", "cache"}


class Starts:
    """Counts the starts of the lab's containers by the engine's events, of which it remembers only the last 256."""

    def __init__(self, lab: Lab) -> None:
        self.jobs: list[int] = []
        self._lab = lab
        self._instance = find_instance(os.path.realpath(lab.base))
        self._since = int(time.time())
        self._due = 0.0
        self._known: set[tuple[str, int]] = set()

    def look(self, *, now: bool = False) -> None:
        """Ask for what happened since the last look, about once a second or `now`."""
        if not now and time.monotonic() < self._due:
            return
        self._due = time.monotonic() + 1.0
        until = int(time.time()) + now  # it takes whole seconds, and answers when the last one is over
        filters = {"type": "container", "event": "start", "label": f"jobfetcher.instance={self._instance}"}
        # a second of the last look once more: what is seen twice is counted once
        for event in self._lab.engine.events(since=self._since - 1, until=until, filters=filters, decode=True):
            moment = (event["Actor"]["ID"], int(event["timeNano"]))
            job = event["Actor"]["Attributes"].get("jobfetcher.job")
            if job is not None and moment not in self._known:
                self._known.add(moment)
                self.jobs.append(int(job))
        self._since = until


def open_jobs(base: Path) -> dict[int, str]:
    """Job and phase of each row that a dead worker's journal has; from a copy: nobody else opens the journal itself."""
    with TemporaryDirectory() as directory:
        copy = Path(directory) / "journal.db"
        for suffix in ("", "-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(base / f"journal.db{suffix}", f"{copy}{suffix}")
        with contextlib.closing(sqlite3.connect(copy)) as journal:
            if not journal.execute("SELECT 1 FROM sqlite_schema WHERE name = 'job'").fetchall():
                return {}  # no worker came as far as its tables
            return {int(job): str(phase) for job, phase in journal.execute("SELECT id, phase FROM job")}


def orphans(lab: Lab) -> list[str]:
    """What a worker that has ended should not have left."""
    found = [f"container {container['Names'][0]}" for container in lab.containers(of_jobs_only=False)]
    found += [f"{entry.name} in PATH_BASE" for entry in lab.base.iterdir() if entry.name not in _OWN_FILES]
    found += [f"directory of job {entry.name}" for entry in (lab.base / "jobs").iterdir()]
    return found + [f"journal row of job {job} in phase {phase}" for job, phase in open_jobs(lab.base).items()]


def see(
    lab: Lab,
    planned: Mapping[int, Planned],
    starts: Starts,
    *,
    kills: int,
    lives: Sequence[Life] = (),
    crashes: Sequence[str] = (),
    engine_killed: bool = False,
    broker_killed: bool = False,
) -> Seen:
    """All that there is to see, when no worker runs any more."""
    server = lab.server
    starts.look(now=True)
    described = {job: server.job(job) for job in planned}
    return Seen(
        kills=kills,
        events=server.events(),
        states={job: str(found["state"]) for job, found in described.items()},
        details={job: str(found["details"] or "") for job, found in described.items()},
        objects={job: _digests(server, job) for job in planned},
        heard=_ends(server.heard()),
        mails=Counter(int(mail["job_id"]) for mail in server.outbox()),
        starts=starts.jobs,
        lives=lives,
        orphans=orphans(lab),
        violations=[f"job {found['job_id']}: {found['rule']}" for found in server.violations()],
        crashes=crashes,
        engine_killed=engine_killed,
        broker_killed=broker_killed,
    )


def _ends(words: Sequence[Mapping[str, Any]]) -> dict[int, list[tuple[float, str]]]:
    """Of what the user's side heard: the ends, by job, in order."""
    ends: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for word in words:
        if word["state"] in ("finished", "error"):
            ends[int(word["job_id"])].append((float(word["time"]), str(word["state"])))
    return ends


def remove_containers(lab: Lab) -> None:
    """The engine shall not suffer from what went wrong here."""
    for container in lab.containers(of_jobs_only=False):
        with contextlib.suppress(docker.errors.DockerException):
            lab.engine.remove_container(container["Id"], v=True, force=True)


def take_lost_answers_back(server: MockServer, silent_s: float) -> bool:
    """Whether all that has not ended are jobs whose answer no worker lived to read; then they are in the queue again.

    Such a job was `pulled`, and nobody has said a word of it since, while workers asked for more for `silent_s`. One
    that was pulled while the user's side was away is such a job as well: its answer was a 500 (PROTOCOL.md S19). The
    server would take it back after its lease (FAULTS.md A1); its clock is set forward instead.
    """
    pulled = {event["job_id"]: event["time"] for kind in ("pull", "lost_pull") for event in server.events(kind)}
    ended = {mail["job_id"] for mail in server.outbox()}
    left = pulled.keys() - ended
    polls = [event["time"] for event in server.events("poll")]
    if not left or any(server.queue_state(job) != "pulled" for job in left):
        return False
    if not polls or polls[-1] < max(pulled[job] for job in left) + silent_s:
        return False
    server.advance(LEASE_S + 1)
    server.sweep()
    return True


def _digests(server: MockServer, job: int) -> dict[str, str]:
    return {name: sha256(content) for name, content in server.results(job).items()}
