"""The steps of a job as functions, each in a process of its own, with nothing but JSON and a directory between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mock_server import MockServer, job_spec, running_mock_api

PRELUDE = """
import json, sys
from pathlib import Path
from jobfetcher.core.errors import JobfetcherError
from jobfetcher.core.machine import Offer
from jobfetcher.core.phases import Phase
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.settings import load
from jobfetcher.steps import HandedOut, fetch_job, report, stage_in, stage_out

settings = load().settings
handed = HandedOut.model_validate_json(sys.argv[1]) if sys.argv[1] else None
"""


def step(server: MockServer, code: str, handed: str = "") -> str:
    """Run `code` in a fresh interpreter; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, handed],
        env={"PATH": os.environ["PATH"], "API_URL": server.url, "ACCESS_TOKEN": "mock-token", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FETCH = "found = fetch_job(settings, Offer(4, 8000)); print('' if found is None else found.model_dump_json())"


def test_each_step_in_its_own_process(tmp_path: Path) -> None:
    job_dir = tmp_path / "job"
    job_dir.mkdir()
    with running_mock_api(tmp_path / "mock") as server:
        ref = server.put_input("in/a.txt", b"some input")
        handler = {
            "image_url": "anything",
            "files_down": {"data/a.txt": ref},
            "files_up": {"output": "out", "log": "log"},
        }
        job_id = server.submit(job_spec(handler=handler))

        handed = step(server, FETCH)
        assert json.loads(handed)["job"]["id"] == str(job_id)
        assert "mock-token" not in handed
        assert server.state(job_id) == "pulled"

        assert step(server, "print(report(settings, handed, Phase.STAGING_IN).name)", handed) == "KEEP"
        assert server.state(job_id) == "preprocessing"
        stored = step(
            server,
            f"stored = stage_in(settings, handed, Path({str(job_dir)!r}));"
            "print(json.dumps({name: [file.size, file.digest] for name, file in stored.items()}))",
            handed,
        )
        assert list(json.loads(stored)) == ["data/a.txt"]
        assert (job_dir / "files/data/a.txt").read_bytes() == b"some input"
        assert (job_dir / "files/out").is_dir()

        step(server, "report(settings, handed, Phase.RUNNING)", handed)
        (job_dir / "files/out/deep").mkdir()
        (job_dir / "files/out/deep/b.bin").write_bytes(b"\0\1")
        (job_dir / "files/log/l.txt").write_text("said")
        step(server, "report(settings, handed, Phase.STAGING_OUT)", handed)
        step(server, f"stage_out(settings, handed, Path({str(job_dir)!r}))", handed)
        # again, as after an interruption: nothing is doubled
        step(server, f"stage_out(settings, handed, Path({str(job_dir)!r}))", handed)

        step(server, "report(settings, handed, Outcome(Ending.FINISHED, None, ''))", handed)
        step(server, "report(settings, handed, Outcome(Ending.FINISHED, None, ''))", handed)
        assert server.state(job_id) == "finished"
        assert server.results(job_id) == {"output/out/deep/b.bin": b"\0\1", "log/log/l.txt": b"said"}
        # No process can know that another one was heard, so each tells it until it is (FAULTS.md A7).
        [tally] = server.tally()
        assert (tally["ends"], tally["repeats"], tally["late_requests"]) == (["finished", "finished"], 1, 0)
        assert server.violations() == []
        assert step(server, FETCH) == ""


def test_a_worker_fault_gives_the_job_back(tmp_path: Path) -> None:
    with running_mock_api(tmp_path / "mock") as server:
        job_id = server.submit(job_spec())
        handed = step(server, FETCH)
        step(server, "report(settings, handed, Outcome())", handed)
        assert server.state(job_id) == "queued"


def test_a_job_that_was_deleted_says_stop(tmp_path: Path) -> None:
    with running_mock_api(tmp_path / "mock") as server:
        job_id = server.submit(job_spec())
        handed = step(server, FETCH)
        server.delete(job_id)
        assert step(server, "print(report(settings, handed, Phase.RUNNING).name)", handed) == "CANCEL"


@pytest.mark.fault("B16")
def test_a_job_nobody_can_read_is_reported_at_once(tmp_path: Path) -> None:
    with running_mock_api(tmp_path / "mock") as server:
        job_id = server.submit({"handler": {"image_url": 7}, "app": {}, "meta": {}}, raw=True)
        said = step(
            server, "try:\n    fetch_job(settings, Offer(4, 8000))\nexcept JobfetcherError as error:\n    print(error)"
        )
        assert "handler.image_url" in said
        assert server.state(job_id) == "error"


def test_a_job_of_another_server_is_refused(tmp_path: Path) -> None:
    with running_mock_api(tmp_path / "mock") as server:
        server.submit(job_spec())
        handed = json.loads(step(server, FETCH))
        handed["token"] = "https://other.example.org"
        said = step(
            server,
            "try:\n    report(settings, handed, Phase.RUNNING)\nexcept JobfetcherError as error:\n    print(error)",
            json.dumps(handed),
        )
        assert "other.example.org" in said
        assert server.url in said
