"""Clocks that jump, and too little CPU time: no job is lost, and nobody is asked too often (FAULTS.md F6, F9, C10, N4).

First the shim that turns a process's clock, by itself; then the worker under it; last the worker on the real clock, on
a machine with far more to do than it can.
"""

import json
import math
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.clock import Clock, shim
from tests.support.services import wait_until
from tests.support.wired import BRISK, LATE_S, WRITES, WRITTEN, Wired
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Lab, command

HOUR, YEAR = 3600.0, 365.25 * 86_400

#: FAULTS.md F9, N4: keep-alives 30 s apart are at most so far apart, 99 in a hundred and all, in seconds.
P99_S, MOST_S = 45.0, 90.0


# -- the shim itself --------------------------------------------------------------------------------------------------

#: Prints, for each way of waiting that the worker or its libraries use, how long it took by its own clock.
WAITS = """
import json, pycurl, select, socket, threading, time

def took(wait):
    began = time.monotonic()
    try:
        wait()
    except (TimeoutError, pycurl.error):
        pass
    return time.monotonic() - began

server = socket.create_server(("127.0.0.1", 0))
server.settimeout(30)
curl = pycurl.Curl()
curl.setopt(pycurl.URL, "http://127.0.0.1:%d/" % server.getsockname()[1])
curl.setopt(pycurl.LOW_SPEED_LIMIT, 1024)
curl.setopt(pycurl.LOW_SPEED_TIME, 30)
condition = threading.Condition()
condition.acquire()
print(json.dumps({
    "sleep": took(lambda: time.sleep(30)),
    "event": took(lambda: threading.Event().wait(30)),
    "condition": took(lambda: condition.wait(30)),
    "poll": took(lambda: select.poll().poll(30_000)),
    "select": took(lambda: select.select([], [], [], 30)),
    "epoll": took(lambda: select.epoll().poll(30)),
    "socket": took(server.accept),
    "curl": took(curl.perform),
}))
"""

#: Says all its clocks when it is sent a line.
CLOCKS = """
import json, sys, time
names = ["CLOCK_MONOTONIC", "CLOCK_BOOTTIME", "CLOCK_REALTIME"]
for line in sys.stdin:
    said = {name: time.clock_gettime(getattr(time, name)) for name in names}
    print(json.dumps({**said, "time": time.time(), "monotonic": time.monotonic()}), flush=True)
"""

WAITS_LONG = """
import threading, time
print("waiting", flush=True)
began = time.monotonic()
threading.Event().wait(1000)
print(time.monotonic() - began, flush=True)
"""

#: Looks at its clocks as often as it can until it is sent a line; says whether one ever went back.
NEVER_BACK = """
import select, sys, threading, time
clocks = [time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, time.CLOCK_REALTIME]
back, over = [], threading.Event()
def look():
    last = [time.clock_gettime(clock) for clock in clocks]
    while not over.is_set():
        now = [time.clock_gettime(clock) for clock in clocks]
        back.extend(clock for clock, old, new in zip(clocks, last, now) if new < old)
        last = now
threads = [threading.Thread(target=look) for _ in range(2)]
[thread.start() for thread in threads]
print("looking", flush=True)
sys.stdin.readline()
over.set()
[thread.join() for thread in threads]
print(len(back), flush=True)
"""

SLEEPS = """
import time
time.sleep(100)
print("awake", flush=True)
input()
"""

UNIX_SOCKET = """
import socket
here, _ = socket.socketpair()
here.settimeout(30)
try:
    here.recv(1)
except TimeoutError:
    print("timed out")
"""


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[Clock]:
    with shim(tmp_path) as clock:
        yield clock


@contextmanager
def program(clock: Clock, text: str) -> Iterator["subprocess.Popen[str]"]:
    """A Python program under the shim, spoken to by its standard input and output."""
    with subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clock.env()
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def line(running: "subprocess.Popen[str]") -> str:
    """The next line that it says; AssertionError when there is none for ten seconds."""
    assert running.stdout is not None
    assert select.select([running.stdout], [], [], 10)[0], "it says nothing"
    return running.stdout.readline()


def ask(running: "subprocess.Popen[str]") -> dict[str, float]:
    assert running.stdin is not None
    running.stdin.write("\n")
    running.stdin.flush()
    return dict(json.loads(line(running)))


def test_every_wait_is_as_short_as_the_clock_is_fast(clock: Clock) -> None:
    clock.rate(1000)
    began = time.monotonic()
    with program(clock, WAITS) as running:
        took_s = json.loads(line(running))
    assert time.monotonic() - began < 8 * 30 / 2  # eight waits, and more than twice as fast on any machine
    assert {kind: took for kind, took in took_s.items() if took < 30} == {}


def test_a_new_rate_holds_for_a_wait_in_progress(clock: Clock) -> None:
    with program(clock, WAITS_LONG) as running:
        assert line(running) == "waiting\n"
        clock.rate(1000)
        assert float(line(running)) >= 1000


def test_who_sleeps_is_counted(clock: Clock) -> None:
    with program(clock, SLEEPS) as running:
        wait_until(lambda: clock.sleeping == 1, "it sleeps", 10)
        clock.rate(1000)
        assert line(running) == "awake\n"
        assert clock.sleeping == 0


def test_a_poll_of_a_unix_socket_takes_a_real_second(clock: Clock) -> None:
    clock.rate(1000)
    began = time.monotonic()
    with program(clock, UNIX_SOCKET) as running:
        assert line(running) == "timed out\n"
    assert 1 <= time.monotonic() - began < 10


def test_each_clock_jumps_as_it_is_told(clock: Clock) -> None:
    with program(clock, CLOCKS) as running:
        at_first = ask(running)
        assert at_first["time"] == pytest.approx(time.time(), abs=5)
        assert at_first["monotonic"] == pytest.approx(clock.now(), abs=5)
        clock.jump_realtime(-10 * YEAR)
        set_back = ask(running)
        clock.suspend(400)
        woken = ask(running)
        clock.skip(500)
        later = ask(running)
    jumps = [
        {name: round(after[name] - before[name], -2) for name in before}
        for before, after in pairwise([at_first, set_back, woken, later])
    ]
    still = dict.fromkeys(at_first, 0.0)
    wall = ("CLOCK_REALTIME", "time")
    assert jumps == [
        still | dict.fromkeys(wall, -10 * YEAR),
        still | dict.fromkeys((*wall, "CLOCK_BOOTTIME"), 400.0),
        dict.fromkeys(at_first, 500.0),
    ]


def test_no_clock_goes_back_when_the_rate_changes(clock: Clock) -> None:
    with program(clock, NEVER_BACK) as running:
        assert line(running) == "looking\n"
        for _ in range(200):
            clock.rate(20_000)
            clock.rate(1)
        assert running.stdin is not None
        running.stdin.write("\n")
        running.stdin.flush()
        assert line(running) == "0\n"


# -- the worker -------------------------------------------------------------------------------------------------------


@pytest.mark.docker
@pytest.mark.fault("F6")
def test_a_wall_clock_that_jumps_changes_nothing(wire: Wired) -> None:
    """While a job runs: keep-alives go on, no lease is in doubt, no token is asked for, no link is thought too old."""
    job = wire.submit(WRITES, ";", UNTIL_LET_GO)
    with wire.running(username="worker", password="worker-password") as worker:
        wire.server.wait_for_state(job, "running")
        for jump_s in (HOUR, -2 * HOUR, 10 * YEAR, -20 * YEAR, 10 * YEAR):
            wire.clock.jump_realtime(jump_s)
            wire.pass_time(40, BRISK)
        wire.lab.let_go(job)
        wait_until(lambda: bool(wire.server.events("sign_upload")), "the upload begins", DEADLINE_S)
        wire.clock.jump_realtime(-HOUR)
        assert wire.ends(job) == "finished"
    assert wire.results(job) == WRITTEN
    assert max(gaps_s(wire.lab, job)) <= P99_S + BRISK * LATE_S
    assert [event["note"] for event in wire.server.events("sign_in")] == ["USER_PASSWORD_AUTH"]
    assert wire.server.events("status") == []
    assert len(wire.server.events("sign_upload")) == len({"output", "log"})
    warnings = [line for line in worker.errors.splitlines() if "warning" in line]
    assert [line for line in warnings if "keep-alive not delivered" not in line] == []  # one may be late at this speed


@pytest.mark.docker
@pytest.mark.fault("C10")
def test_a_wrong_clock_is_named_where_the_storage_refuses_it(wire: Wired) -> None:
    """The storage is the mock's, told to answer as S3 does; how wrong the clock is, the worker finds by itself."""
    job = wire.submit(WRITES)
    wire.clock.jump_realtime(-2 * HOUR)
    skewed = "<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message></Error>"
    refusal = {"status": 403, "body": skewed, "content_type": "application/xml"}
    wire.server.set_faults({"method": "POST", "path": "^/_storage", **refusal})
    named = re.compile(r"check the clock of this machine: it is 7[12]\d\d s behind the storage's")
    with wire.running() as worker:
        wait_until(lambda: "postprocessing" in wire.server.updates(job), "the job has run", DEADLINE_S)
        wait_until(lambda: named.search(worker.errors) is not None, "the clock is named", DEADLINE_S)
        wire.server.set_faults()  # somebody sets it; the result was kept meanwhile (J9, C18)
        assert wire.ends(job) == "finished"
    assert wire.results(job) == WRITTEN


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that want a core each for the length of the block."""
    with ExitStack() as stack:
        for _ in range(processes):
            process = stack.enter_context(subprocess.Popen(["/bin/sh", "-c", "while :; do :; done"]))
            stack.callback(process.kill)
        yield


@contextmanager
def elsewhere() -> Iterator[None]:
    """All threads of this process come before others, where that is allowed: the server that lives in it stands for
    one on a machine of its own."""

    def prefer(nice: int) -> None:
        for thread in os.listdir("/proc/self/task"):
            with suppress(PermissionError, ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, int(thread), nice)

    as_ever = os.getpriority(os.PRIO_PROCESS, 0)
    prefer(as_ever - 10)
    try:
        yield
    finally:
        prefer(as_ever)


def gaps_s(lab: Lab, job: int) -> list[float]:
    """The times between the updates of the job that the server accepted, in seconds of its clock, shortest first."""
    times = [float(event["time"]) for event in lab.server.events("update", job) if event["code"] == 204]
    return sorted(later - earlier for earlier, later in pairwise(times))


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.fault("F9", "N4")
def test_keep_alives_go_on_on_a_machine_that_is_far_too_busy(lab: Lab, tmp_path: Path) -> None:
    """A tenth of the contract's times: keep-alives every 3 s, at most 4.5 s apart (99 in a hundred) and 9 s (all). That
    is stricter, since what delays them, 50 processes that want these cores, is not a tenth. Through all phases, with a
    download and some hundred outputs, which stand for 20 GB and 100,000.
    """
    scale = 0.1
    data = lab.server.put_input("data", bytes(32 * 1024**2))
    many = "for i in $(seq 300); do echo $i > /files/out/$i; done; " + UNTIL_LET_GO
    job = lab.submit(many, files_down={"in/data": data}, files_up={"output": "out", "artifact": "in"})
    env = lab.env(timeout_status=str(30 * scale), timeout_job="1")
    with command(["run", "--once"], env, tmp_path) as worker, busy(50), elsewhere():
        lab.server.wait_for_state(job, "running", timeout_s=DEADLINE_S)
        heard = len(lab.server.events("update", job))
        wait_until(lambda: len(lab.server.events("update", job)) >= heard + 4, "four keep-alives", DEADLINE_S)
        lab.let_go(job)
        lab.server.wait_for_state(job, "finished", timeout_s=DEADLINE_S)
        assert worker.wait() == 0
    assert len(lab.server.results(job)) == 300 + len({"in/data", "container.log", "provenance.json"})
    gaps = gaps_s(lab, job)
    assert gaps[min(math.ceil(len(gaps) * 0.99), len(gaps) - 1) - 1] <= P99_S * scale  # of fewer than 100 all but one
    assert gaps[-1] <= MOST_S * scale
