"""A job's user takes it back while it is in hand here: downloading, running, uploading; told in both forms of S7.

Afterwards its container and directory are gone, and the worker takes the next job. That no further update is sent is
the oracle's to see (`assert_clean`): one after the 404 is a violation.
"""

import time
from collections.abc import Callable

import pytest

from tests.support.services import wait_until
from tests.support.worker import DEADLINE_S, Lab, RunningWorker, running_worker

pytestmark = [pytest.mark.docker, pytest.mark.fault("B17"), pytest.mark.fault("N6")]

#: Files of a transfer that the server makes slow: at 16 connections all of them take 7.5 s, much longer than a cancel.
FILES, EACH_S = 240, 0.5

#: Two heartbeats of 0.3 s, with a second between them where the first was answered 500, and then the clean-up.
GONE_WITHIN_S = 15.0

by_both_forms = pytest.mark.parametrize(
    "swept",
    [pytest.param(False, marks=pytest.mark.fault("B7")), pytest.param(True, marks=pytest.mark.fault("B8"))],
    ids=["404", "500-then-GET"],
)


def cancel(lab: Lab, job: int, swept: bool, ready: Callable[[RunningWorker], None]) -> RunningWorker:
    """Run a worker, delete `job` once it is `ready`, and see it gone and the next job finished."""
    with running_worker(lab.settings(transfers="1"), lambda taken, idle_s: taken == 2) as running:
        ready(running)
        lab.server.delete(job, swept=swept)
        deleted_at = time.monotonic()
        running.heard.wait_for("job_ended")
        assert time.monotonic() - deleted_at < GONE_WITHIN_S
        assert not (lab.base / "jobs" / str(job)).exists()
        assert not [container for container in lab.containers() if container["Labels"]["jobfetcher.job"] == str(job)]
        following = lab.submit("true")
        running.join()
    first, second = running.heard.all("job_ended")
    assert (first["job"], first["ending"], first["message"]) == (
        str(job),
        "dropped",
        "taken back by the server (cancelled)",
    )
    assert (second["job"], second["ending"]) == (str(following), "finished")
    codes = [event["code"] for event in lab.server.events("update", job) if event["code"] != 204]
    assert codes == ([500, 500] if swept else [404])
    return running


@by_both_forms
def test_while_downloading(lab: Lab, swept: bool) -> None:
    inputs = {f"in/{number}": lab.server.put_input(str(number), b"x") for number in range(FILES)}
    job = lab.submit("touch /files/out/ran", files_down=inputs, files_up={"output": "out"})
    lab.server.set_faults({"method": "GET", "path": "^/_storage/", "delay_s": EACH_S})
    fetched = (lab.base / "jobs" / str(job) / "files" / "in" / "0").exists

    def ready(_: RunningWorker) -> None:
        wait_until(fetched, "the first input is here", DEADLINE_S)

    running = cancel(lab, job, swept, ready)
    assert sum(counts["gets"] for counts in lab.server.traffic().values()) < FILES
    assert [event["job"] for event in running.heard.all("run")] == [str(job + 1)]


@by_both_forms
def test_while_running(lab: Lab, swept: bool) -> None:
    job = lab.submit("touch /files/out/began; sleep 120", files_up={"output": "out"})

    def ready(_: RunningWorker) -> None:
        wait_until((lab.files(job) / "out" / "began").exists, "the job began", DEADLINE_S)
        lab.server.wait_for_state(job, "running")

    cancel(lab, job, swept, ready)
    assert lab.server.events("stored", job) == []


@by_both_forms
def test_while_uploading(lab: Lab, swept: bool) -> None:
    names = " ".join(f"/files/out/{number}" for number in range(FILES))
    job = lab.submit(f"touch {names}", files_up={"output": "out"})
    lab.server.set_faults({"method": "POST", "path": "^/_storage", "times": FILES, "delay_s": EACH_S})

    def stored() -> int:
        return len(lab.server.events("stored", job))

    def ready(_: RunningWorker) -> None:
        wait_until(lambda: stored() > 0, "the first output is stored", DEADLINE_S)

    cancel(lab, job, swept, ready)
    assert 0 < stored() < FILES
