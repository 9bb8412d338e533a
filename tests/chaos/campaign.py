"""One campaign: jobs, a worker that is killed again and again, and what was seen of it.

The worker is the command, the engine and everything else are real; the server is the mock API, which lives here and
outlives every worker. The seed decides the jobs and how long each worker lives; when a kill meets which step is for the
machine to decide, so that two campaigns of one seed are alike and not the same.
"""

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos import jobs
from tests.chaos.jobs import Planned
from tests.chaos.oracle import Life, Verdict, judge
from tests.chaos.seen import LEASE_S, Starts, open_jobs, remove_containers, see, take_lost_answers_back
from tests.support.mock_server import MockServer, running_mock_api
from tests.support.private_engine import PrivateEngine, private_engine
from tests.support.services import docker_client, ensure_busybox_image
from tests.support.worker import Command, Lab, command

#: How long a worker lives before it is killed, in seconds: some do not get as far as their first line of log.
_VERY_SHORT, _SHORT = (0.0, 0.3), (0.05, 4.0)
_VERY_SHORT_SHARE = 0.15

#: Of the lives with an engine of our own, so many see it killed or stopped; the worker goes down with it in half.
_ENGINE_SHARE, _BOTH_SHARE = 0.25, 0.5

#: Of the lives with a broker between worker and engine, so many see it killed; it is away for at most so many seconds.
_BROKER_SHARE, _BROKER_AWAY_S = 0.4, 2.0

#: A worker that comes after a kill says no end before the calls of the dead one are surely over, 10 or 30 s. So when
#: its hands are full, one lives until it has brought half of its jobs to their end, at most so long.
_BREATHER_S = 75.0

#: The last worker gets this long without any progress before what is left is called lost, in seconds.
_STALLED_S = 240.0

#: All that is left has been silent for so long: a worker that held it would have spoken, in seconds.
_SILENT_S = 12.0

#: So many lives in a row that end by themselves are no campaign.
_CRASHES = 10

#: The end of an idle worker that is told to leave.
_LEAVE_S = 30.0

#: With `pages`: this share of all requests, to the API and to the storage, is answered by somebody else's page; and
#: before this share of the workers' lives the user's side goes away, or comes back. For the last one it is there.
_PAGES_SHARE, _AWAY_SHARE = 0.04, 0.3

Progress = Callable[[str], None]


class CampaignError(Exception):
    """It makes no sense to go on; the text says why."""


@dataclass(frozen=True)
class Options:
    """What to do. `jobs` None: as many as the kills need, the queue never runs dry; `engine`: kill an engine, too.

    `max_jobs`, `prefetch` and `cache` (whether inputs are kept) are the worker's settings. `pages`: the user's side of
    the server goes away and comes back, and some requests are answered by pages of gateways, filters and portals.
    `broker`: the worker has no engine but behind a broker, which is killed, too.
    """

    kills: int = 50
    seed: int = 1
    engine: bool = False
    jobs: int | None = None
    max_jobs: int = 8
    prefetch: int = 0
    cache: bool = False
    pages: bool = False
    broker: bool = False


def run(options: Options, directory: Path, progress: Progress = lambda line: None) -> Verdict:
    """Do a campaign in `directory`, which must exist and be empty; everything it starts is gone at its end."""
    with contextlib.ExitStack() as opened:
        engine = opened.enter_context(contextlib.closing(docker_client()))
        image = ensure_busybox_image(engine)
        own: PrivateEngine | None = None
        if options.engine:
            own = opened.enter_context(private_engine())
            own.copy_image(engine, image)
            engine = own.client()
        # The account gets a job again whose answer was lost, and no number of lost answers makes a job an error.
        again: dict[str, Any] = {"retry_different": False, "max_retries": 1000, "lease_s": LEASE_S}
        server = opened.enter_context(running_mock_api(directory / "server", **again))
        lab = Lab(server, directory / "base", image, engine)
        opened.callback(remove_containers, lab)
        campaign = Campaign(options, lab, own, directory / "logs", progress)
        opened.callback(campaign.end_broker)
        campaign.do_kills()
        campaign.let_end()
        return campaign.judge()


class Campaign:
    """The state of a campaign; `do_kills`, `let_end` and `judge`, in this order."""

    def __init__(
        self, options: Options, lab: Lab, own_engine: PrivateEngine | None, logs: Path, progress: Progress
    ) -> None:
        self._options = options
        self._lab = lab
        self._own_engine = own_engine
        self._logs = logs
        self._progress = progress
        self._chance = random.Random(options.seed)  # noqa: S311 - a seed must give the same again
        self._planned: dict[int, Planned] = {}
        self._inputs: dict[int, str] = {}
        self._kills = 0
        self._lives: list[Life] = []
        self._crashes: list[str] = []
        self._in_a_row = 0  # lives that ended by themselves
        self._starts = Starts(lab)
        self._began = time.monotonic()
        self._away = False
        self._broker: contextlib.ExitStack | None = None
        self._broker_process: Command | None = None
        if options.pages:
            # but not to the user's own requests, which are the campaign's
            everything = {"path": "^(?!/user/)", "page": "any"}
            self._server.set_faults({**everything, "rate": _PAGES_SHARE, "seed": options.seed})
        logs.mkdir()
        if options.broker:
            self._start_broker()

    @property
    def _server(self) -> MockServer:
        return self._lab.server

    def do_kills(self) -> None:
        """Start a worker, kill it, and again."""
        for _ in range(self._options.jobs or 0):
            self._submit()
        while self._kills < self._options.kills:
            self._keep_queue_full()
            if self._options.pages and self._chance.random() < _AWAY_SHARE:
                self._set_user_side(away=not self._away)
            held = open_jobs(self._lab.base)
            with self._worker(held) as worker:
                if len(held) >= 2 * self._options.max_jobs + self._options.prefetch:
                    self._breathe(worker, frozenset(held))
                self._live_and_die(worker)
            self._say()

    def let_end(self) -> None:
        """A last worker, which nobody kills, until every job has its end; then it is told to leave."""
        self._set_user_side(away=False)
        while not self._last_life():
            self._say()

    def _set_user_side(self, *, away: bool) -> None:
        self._away = away
        self._server.set_user_side(away=away)

    def judge(self) -> Verdict:
        """Look at what there is, and hold it against the plan."""
        seen = see(
            self._lab,
            self._planned,
            self._starts,
            kills=self._kills,
            lives=self._lives,
            crashes=self._crashes,
            engine_killed=self._own_engine is not None,
            broker_killed=self._options.broker,
        )
        return judge(self._planned, seen)

    # -- lives --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _worker(self, held: dict[int, str]) -> Iterator[Command]:
        """A worker; whatever the block does, its life is on record afterwards. `held`: see `open_jobs`."""
        behind = f"unix://{self._broker_socket}" if self._options.broker else self._engine_url
        own_engine = {} if behind is None else {"docker_host": behind}
        cache_size = "1GiB" if self._options.cache else "0"
        ahead = {"prefetch": str(self._options.prefetch), "cache_size": cache_size}
        env = self._lab.env(timeout_status="1", log_level="debug", **ahead, **own_engine)
        started = time.time()
        with command(["run", "--max-jobs", str(self._options.max_jobs)], env, self._logs) as worker:
            try:
                yield worker
            finally:
                if worker.is_running:
                    worker.send(signal.SIGKILL)
                worker.wait()
                unended = frozenset(job for job, phase in held.items() if phase != "settling")
                self._lives.append(Life(started, time.time(), unended))

    def _live_and_die(self, worker: Command) -> None:
        """Let it work for its time, during which the engine may go and come back; then it is killed."""
        if self._own_engine is not None and self._chance.random() < _ENGINE_SHARE:
            self._wait(worker, self._chance.uniform(0.5, _SHORT[1]))
            self._engine_goes(self._own_engine, worker)
        if self._options.broker and self._chance.random() < _BROKER_SHARE:
            self._wait(worker, self._chance.uniform(0.0, _SHORT[1]))
            self._broker_goes(worker)
        shortest, longest = _VERY_SHORT if self._chance.random() < _VERY_SHORT_SHARE else _SHORT
        if not self._wait(worker, self._chance.uniform(shortest, longest)):
            self._note_crash(worker)
            return
        worker.send(signal.SIGKILL)
        self._kills += 1
        self._in_a_row = 0

    def _breathe(self, worker: Command, held: frozenset[int]) -> None:
        """Let it bring half of what it holds to an end."""
        deadline = time.monotonic() + _BREATHER_S
        while len(self._not_ended() & held) > len(held) // 2 and time.monotonic() < deadline:
            self._say()
            if not self._wait(worker, 0.5):
                return

    def _wait(self, worker: Command, seconds: float) -> bool:
        """Wait, looking at the engine's events; False when the worker has ended by itself."""
        deadline = time.monotonic() + seconds
        while worker.is_running and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.05))
            self._starts.look()
        return worker.is_running

    def _engine_goes(self, engine: PrivateEngine, worker: Command) -> None:
        """The engine is killed or stopped, and comes back after a while; the worker may go down with it."""
        self._starts.look(now=True)  # an engine that starts again has forgotten what happened
        (engine.kill if self._chance.random() < 0.5 else engine.stop)()
        self._kills += 1
        if self._chance.random() < _BOTH_SHARE:
            worker.send(signal.SIGKILL)
        time.sleep(self._chance.uniform(0.0, 2.0))
        engine.start()

    @property
    def _engine_url(self) -> str | None:
        return None if self._own_engine is None else self._own_engine.url

    @property
    def _broker_socket(self) -> Path:
        return self._logs / "broker.sock"

    def _start_broker(self) -> None:
        """A broker with the engine's socket, on its own."""
        self._lab.base.mkdir(mode=0o700, exist_ok=True)
        env = {"PATH_BASE": str(self._lab.base), "BROKER_SOCKET": str(self._broker_socket), "GPUS": "none"}
        env |= {} if self._engine_url is None else {"DOCKER_HOST": self._engine_url}
        self._broker = contextlib.ExitStack()
        self._broker_process = self._broker.enter_context(command(["broker"], env, self._logs))
        self._broker_process.wait_for("listening at")

    def _broker_goes(self, worker: Command) -> None:
        """The broker is killed and comes back after a while; the worker may go down with it."""
        assert self._broker_process is not None
        self._broker_process.send(signal.SIGKILL)
        self._kills += 1
        if self._chance.random() < _BOTH_SHARE:
            worker.send(signal.SIGKILL)
        time.sleep(self._chance.uniform(0.0, _BROKER_AWAY_S))
        self.end_broker()
        self._start_broker()

    def end_broker(self) -> None:
        """End the broker, if there is one."""
        if self._broker is not None:
            self._broker.close()
            self._broker = None

    def _note_crash(self, worker: Command) -> None:
        """It ended by itself, which is right only where its engine or the broker was away; it is started again."""
        code = worker.wait()
        said = f"exit code {code}: {' | '.join(worker.errors.splitlines()[-3:])}"
        if self._own_engine is None and not self._options.broker:
            self._crashes.append(said)
        self._in_a_row += 1
        if self._in_a_row >= _CRASHES:
            raise CampaignError(f"the worker does not stay up: {said}")

    def _last_life(self) -> bool:
        """Let it work until all jobs have ended, or nothing moves any more; False when it ended by itself before."""
        moved, since = time.monotonic(), time.time()
        left = self._not_ended()
        with self._worker(open_jobs(self._lab.base)) as worker:
            # It also has to ask for jobs: then it has looked at everything that was left to it.
            while (left or not self._has_polled(since)) and time.monotonic() - moved < _STALLED_S:
                if not self._wait(worker, 0.5):
                    self._note_crash(worker)
                    return False
                self._say()
                before, left = left, self._not_ended()
                if left != before or take_lost_answers_back(self._server, _SILENT_S):
                    moved = time.monotonic()
            worker.send(signal.SIGTERM)
            try:
                code = worker.wait(_LEAVE_S)
            except AssertionError as error:
                self._crashes.append(f"it does not leave when told to: {error}")
            else:
                if code != 0:
                    self._crashes.append(f"exit code {code} after SIGTERM: {worker.errors[-300:]}")
        return True

    def _has_polled(self, since: float) -> bool:
        return any(event["time"] > since for event in self._server.events("poll"))

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _keep_queue_full(self) -> None:
        if self._options.jobs is None:
            taken = {event["job_id"] for kind in ("pull", "lost_pull") for event in self._server.events(kind)}
            while len(self._planned.keys() - taken) < 2 * self._options.max_jobs:
                self._submit()

    def _submit(self) -> None:
        planned = jobs.plan(len(self._planned), self._chance)
        reads = {path: self._input(index) for path, index in planned.reads.items()}
        self._planned[self._lab.submit(planned.command, files_down=reads, files_up=planned.writes)] = planned

    def _input(self, index: int) -> str:
        if index not in self._inputs:
            self._inputs[index] = self._server.put_input(f"chaos/{index}.bin", jobs.input_content(index))
        return self._inputs[index]

    def _not_ended(self) -> frozenset[int]:
        ended = {int(mail["job_id"]) for mail in self._server.outbox()}
        return frozenset(self._planned.keys() - ended)

    def _say(self) -> None:
        ended = len(self._planned) - len(self._not_ended())
        self._progress(
            f"kill {self._kills}/{self._options.kills}, {ended}/{len(self._planned)} jobs ended,"
            f" {len(self._crashes)} crashes, {time.monotonic() - self._began:.0f} s"
        )
