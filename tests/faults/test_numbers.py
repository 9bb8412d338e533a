"""Cuts and flipped bits by the hundred (N7), and a worker with little to live on (F10) or hit by signals (F5)."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.file_server import Act, FileServer, Object
from tests.support.services import require_program, wait_until
from tests.support.transfers import Recorder, getting, transfer, wanted
from tests.support.worker import DEADLINE_S, Lab, command

#: The whole of N7 is 1 GiB, by JOBFETCHER_TESTS_FULL=1; a CI run has an eighth of it. As many cuts in both.
SIZE = (1024 if os.environ.get("JOBFETCHER_TESTS_FULL") else 128) << 20

CUTS = FLIPS = 200

#: What every S3 sends, beside which an ETag is believed to be an MD5.
S3 = {"x-amz-request-id": "1"}


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        yield running


@pytest.mark.slow
@pytest.mark.fault("N7", "C2")
def test_two_hundred_cuts_cost_less_than_two_hundredths_of_the_bytes(server: FileServer, tmp_path: Path) -> None:
    dice = random.Random(7)  # noqa: S311 - a game, the same in every run
    content = dice.randbytes(SIZE)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()  # once, and not for each request
    server.objects["/in"] = Object(content, etag=f'"{md5}"', headers=dict(S3))
    server.script("/in", *(Act(cut=dice.randrange(SIZE // CUTS)) for _ in range(CUTS)))
    with closing(transfer()) as moving:
        moving.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
    assert hashlib.sha256((tmp_path / "in.part").read_bytes()).digest() == hashlib.sha256(content).digest()
    requests = server.requests("/in")
    assert len(requests) == CUTS + 1
    assert sum(seen.sent for seen in requests) <= 1.02 * SIZE


@pytest.mark.fault("N7", "C3")
def test_two_hundred_flipped_bits_are_all_caught(server: FileServer, tmp_path: Path) -> None:
    dice = random.Random(8)  # noqa: S311 - a game, the same in every run
    contents = {f"f{number}": dice.randbytes(dice.randrange(1, 65_536)) for number in range(FLIPS)}
    for name, content in contents.items():
        server.objects[f"/{name}"] = Object(content, headers=dict(S3))
        server.script(f"/{name}", Act(flip=dice.randrange(len(content))))
    with closing(transfer()) as moving:
        items = [wanted(tmp_path, name, getting(server.url(f"/{name}"))) for name in contents]
        moving.download(items, Recorder())
    for name, content in contents.items():
        assert (tmp_path / f"{name}.part").read_bytes() == content
        assert len(server.requests(f"/{name}")) == 2  # each was fetched again, once


# -- F10 --------------------------------------------------------------------------------------------------------------


@pytest.mark.docker
@pytest.mark.fault("F10")
@pytest.mark.parametrize("limit", ["--nofile=64:64", f"--data={256 << 20}"])
def test_with_little_a_worker_does_its_work(lab: Lab, tmp_path: Path, limit: str) -> None:
    inputs = {f"in/{number}": lab.server.put_input(f"{number}", b"x" * 100_000) for number in range(40)}
    job = lab.submit("cp -r /files/in/. /files/out/", files_down=inputs, files_up={"output": "out"})
    prefix = [require_program("prlimit", "util-linux"), limit, "--"]
    with command(["run", "--once"], lab.env(), tmp_path, prefix=prefix) as run:
        assert run.wait() == 0, run.errors
    assert lab.server.state(job) == "finished"
    assert len([name for name in lab.server.results(job) if name.startswith("output/")]) == len(inputs)


@pytest.mark.docker
@pytest.mark.fault("F10")
def test_with_too_little_a_worker_says_so_and_takes_no_job(lab: Lab, tmp_path: Path) -> None:
    lab.submit("true")
    prefix = [require_program("prlimit", "util-linux"), "--nofile=32:32", "--"]
    with command(["run", "--once"], lab.env(), tmp_path, prefix=prefix) as run:
        assert run.wait() == 2
        assert "needs 64 open files, and this one may have 32" in run.errors
    assert lab.server.events("pull") == []


# -- F5 ---------------------------------------------------------------------------------------------------------------

#: To be left alone by, or to be obeyed: what a terminal, a service manager and the kernel send.
SIGNALS = [signal.SIGWINCH, signal.SIGCHLD, signal.SIGCONT, signal.SIGTERM, signal.SIGINT, signal.SIGURG]
STARTS = 80 if os.environ.get("JOBFETCHER_TESTS_FULL") else 8


@pytest.mark.slow
@pytest.mark.docker
@pytest.mark.fault("F5", "N12")
@pytest.mark.parametrize("lab", [{"retry_different": False}], ids=["any account"], indirect=True)
def test_signals_at_any_moment_lose_no_job(lab: Lab, tmp_path: Path) -> None:
    """Several signals in a row, a few times a second, at every stage of a worker's life; then it may finish."""
    dice = random.Random(5)  # noqa: S311 - a game, the same in every run
    content = dice.randbytes(300_000)
    given = lab.server.put_input("a", content)
    jobs = [
        lab.submit("sleep 0.2; cp /files/in/a /files/out/a", files_down={"in/a": given}, files_up={"output": "out"})
        for _ in range(6)
    ]
    sent = 0
    for _ in range(STARTS):
        with command(["run"], lab.env(max_jobs="2"), tmp_path) as run:
            run.wait_for("asking http")  # from then on signals are its own
            ends_at = time.monotonic() + dice.uniform(0.3, 2.5)
            while run.is_running and time.monotonic() < ends_at:
                time.sleep(dice.uniform(0, 0.3))
                for number in dice.choices(SIGNALS, k=dice.randrange(1, 4)):
                    if run.is_running:
                        run.send(number)
                        sent += 1
            for _ in range(2):
                if run.is_running:
                    run.send(signal.SIGTERM)
            # A signal may come when the worker has said good-bye and Python is on its way out: then it ends by it.
            assert run.wait() in {0, 128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}, (
                run.errors
            )
            assert "Traceback" not in run.errors
    assert sent > STARTS
    with command(["run", "--exit-when-idle", "1"], lab.env(max_jobs="2"), tmp_path) as run:
        assert run.wait() == 0
    for job in jobs:
        assert lab.ended(job)[0] == "finished", lab.ended(job)[1]
        assert lab.server.results(job)["output/out/a"] == content


@pytest.mark.docker
@pytest.mark.fault("F4", "J5", "J6")
@pytest.mark.parametrize("code", [0, 3])
def test_a_job_that_was_being_stopped_when_its_worker_died_did_not_end_by_itself(
    lab: Lab, tmp_path: Path, code: int
) -> None:
    """It obeyed our TERM, with a code of its choice; nothing of that is its result."""
    wait = f"trap 'exit {code}' TERM; echo half > /files/out/a; while true; do sleep 0.05; done"
    job = lab.submit(wait, files_up={"output": "out"})
    env = lab.env(stop_grace="10") | {"JOBFETCHER_FAILPOINT": "after:wait"}
    with command(["run"], env, tmp_path) as run:
        lab.server.wait_for_state(job, "running", timeout_s=DEADLINE_S)
        wait_until((lab.files(job) / "out" / "a").exists, "the job began", DEADLINE_S)
        run.send(signal.SIGTERM)
        run.wait_for("finishing job")
        run.send(signal.SIGTERM)
        assert run.wait() == -signal.SIGKILL
    with command(["run", "--exit-when-idle", "1"], lab.env(), tmp_path) as run:
        # Either it is given back, or it is run again; that run waits for ever, and is stopped and given back.
        wait_until(lambda: not run.is_running or "once more" in run.errors, "it was given back or is run again")
        if run.is_running:
            run.send(signal.SIGTERM)
            run.wait_for("finishing job")  # of two signals that come together the kernel makes one
            run.send(signal.SIGTERM)
        run.wait()
    assert lab.ended(job)[0] == "queued", lab.ended(job)[1]
    assert lab.server.outbox() == []
