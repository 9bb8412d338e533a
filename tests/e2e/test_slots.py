"""Slots, and jobs ahead of them (PREFETCH): who computes, who waits where, and what becomes of one that waits.

What one slot has to do with the next is also in test_shared_limits.py: two side by side and a third in the queue of the
server, a job that does not fit, the next job while the last one uploads.
"""

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from jobfetcher.resources import detect
from tests.chaos.seen import Starts
from tests.e2e.test_registry import new_image, pushed, stalling
from tests.support.engine_proxy import engine_proxy
from tests.support.services import LOOPBACK, Registry, wait_until
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Command, Lab, command, running_worker, work

pytestmark = pytest.mark.docker

AHEAD = {"max_jobs": "1", "prefetch": "1"}
OUT = {"output": "out"}
CORES = int(detect.detect("none").cpu_cores)

#: What another thing that is done at the same time must not wait for, in seconds.
_NEVER_S, _EACH_S = 60, 0.5


def second_of(lab: Lab) -> int:
    """A job with an input, to be brought while another one computes."""
    inputs = {"in": lab.server.put_input("in", b"input")}
    return lab.submit("cp /files/in /files/out/copy", files_down=inputs, files_up=OUT)


def wait_until_waiting(lab: Lab, computing: int, waiting: int) -> None:
    """The first one runs; of the second all is here, and at the server it is being prepared."""
    lab.server.wait_for_state(computing, "running")
    wait_until((lab.files(waiting) / "in").exists, "the second one's input is here", DEADLINE_S)
    lab.server.wait_for_state(waiting, "preprocessing")
    assert jobs_of(lab) == [str(computing)]


def heard_beats(lab: Lab) -> None:
    """Some heartbeats later: time enough for a worker to do what it should not."""
    beaten = len(lab.server.events("update"))
    wait_until(lambda: len(lab.server.events("update")) > beaten + 4, "some heartbeats", DEADLINE_S)


def jobs_of(lab: Lab) -> list[str]:
    return [container["Labels"]["jobfetcher.job"] for container in lab.containers()]


def in_turn(lab: Lab, *jobs: int) -> bool:
    """Whether each computed only after the one before it. (What the server hears may come later, and in any order.)"""
    computed = [lab.computed(job) for job in jobs]
    return all(ended <= began for (_, ended), (began, _) in pairwise(computed))


@contextmanager
def a_command(lab: Lab, directory: Path, *arguments: str, **changes: str) -> Iterator[Command]:
    with command(["run", *arguments], lab.env(**AHEAD, **changes), directory) as running:
        yield running


# -- what fits --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("E15")
@pytest.mark.parametrize(
    "hardware",
    [
        None,
        {"cpu_cores": None, "memory": None, "gpu_model": None, "gpu_archi": None, "gpu_mem": None},
        {"cpu_cores": 0, "memory": 0, "gpu_mem": 0},
    ],
    ids=["no section", "null", "zero"],
)
def test_a_job_that_asks_for_nothing_runs(lab: Lab, hardware: Mapping[str, object] | None) -> None:
    spec: dict[str, object] = {"app": {"cmd": ["true"]}, "handler": {"image_url": lab.image}}
    job = lab.server.submit(spec if hardware is None else {**spec, "hardware": hardware}, raw=True)
    work(lab.settings(max_jobs="2"))
    assert lab.ended(job) == ("finished", "")


@pytest.mark.fault("E15")
@pytest.mark.skipif(CORES < 2, reason="on one core a job that leaves something for another one cannot be")
@pytest.mark.parametrize("prefetch", ["0", "1"])
def test_what_is_handed_out_beyond_what_is_free_is_given_back_or_waits_its_turn(lab: Lab, prefetch: str) -> None:
    """The server does not heed the offer: it hands out a job that fits this machine, but not beside the other one."""
    first = lab.submit(UNTIL_LET_GO, hardware={"cpu_cores": 1})
    with running_worker(lab.settings(max_jobs="2", prefetch=prefetch), lambda taken, idle_s: taken == 3) as running:
        lab.server.wait_for_state(first, "running")
        second = lab.server.submit(
            {"app": {"cmd": ["true"]}, "handler": {"image_url": lab.image}, "hardware": {"cpu_cores": CORES}}, raw=True
        )
        lab.server.wait_for_state(second, "preprocessing" if prefetch == "1" else "queued")
        if prefetch == "1":
            running.heard.wait_for("wait")
        else:
            running.heard.wait_for("job_ended")
        assert jobs_of(lab) == [str(first)]
        third = lab.submit("true", hardware={"cpu_cores": 1})
        if prefetch == "0":
            lab.server.wait_for_state(third, "finished")  # the slot that the second one did not get is still there
        else:
            heard_beats(lab)
            assert lab.server.state(third) == "queued", "nothing passes the one that waits"
        lab.let_go(first)
        running.join()
    assert lab.ended(third) == ("finished", "")
    if prefetch == "1":
        assert lab.ended(second) == ("finished", "")
        assert in_turn(lab, first, second, third)
    else:
        assert lab.server.updates(second) == ["queued"]
        assert f"the job asks for {CORES} CPU cores" in lab.ended(second)[1]


def test_a_job_for_more_than_the_machine_has_is_given_back_while_another_one_computes(lab: Lab) -> None:
    """It does not wait for a turn that will never come."""
    first = lab.submit(UNTIL_LET_GO)
    with running_worker(lab.settings(**AHEAD), lambda taken, idle_s: taken == 2) as running:
        lab.server.wait_for_state(first, "running")
        spec = {"app": {"cmd": ["true"]}, "handler": {"image_url": lab.image}, "hardware": {"memory": 10**9}}
        second = lab.server.submit(spec, raw=True)
        running.heard.wait_for("job_ended")
        lab.let_go(first)
        running.join()
    assert lab.server.updates(second) == ["queued"]
    assert "the job asks for 1000000000 MiB of memory" in lab.ended(second)[1]


# -- one ahead --------------------------------------------------------------------------------------------------------


def test_the_next_job_is_prepared_while_one_computes_and_starts_when_that_has_ended(lab: Lab) -> None:
    first, second = lab.submit(UNTIL_LET_GO), second_of(lab)
    third = lab.submit("true")
    with running_worker(lab.settings(**AHEAD), lambda taken, idle_s: taken == 3) as running:
        wait_until_waiting(lab, first, second)
        running.heard.wait_for("wait")
        heard_beats(lab)
        assert lab.server.state(third) == "queued", "one ahead is one"
        assert jobs_of(lab) == [str(first)]
        fetched = lab.server.traffic()
        lab.let_go(first)
        running.join()
        assert lab.server.traffic() == {**lab.server.traffic(), **fetched}, "nothing was fetched again"
    assert [lab.ended(job)[0] for job in (first, second, third)] == ["finished"] * 3
    assert lab.server.results(second)["output/out/copy"] == b"input"
    assert in_turn(lab, first, second)


def test_one_that_waits_for_too_long_is_given_back_in_silence(lab: Lab) -> None:
    """No mail, no fault, no slower pace; and none is prefetched before the one that computes has ended."""
    first, second = lab.submit(UNTIL_LET_GO), second_of(lab)
    others = [lab.submit("true") for _ in range(2)]
    with running_worker(lab.settings(**AHEAD, prefetch_hold="4"), lambda taken, idle_s: taken == 4) as running:
        running.heard.wait_for("wait")
        running.heard.wait_for("job_ended")
        heard_beats(lab)
        assert [lab.server.state(job) for job in others] == ["queued", "queued"]
        assert lab.server.outbox() == []
        lab.let_go(first)
        running.join()
    assert [lab.ended(job)[0] for job in (first, *others)] == ["finished"] * 3
    assert lab.server.updates(second) == ["preprocessing", "queued"]
    assert lab.ended(second)[1] == "another job computed here for longer than PREFETCH_HOLD"
    assert [event["level"] for event in running.heard.all("job_ended")] == ["info"] * 4
    assert running.heard.all("many_failures") == []
    assert lab.take_as_another_account() == [second]


@pytest.mark.fault("B17", "B7")
@pytest.mark.fault("N6")
def test_one_that_is_cancelled_while_it_waits_makes_room_for_the_next(lab: Lab) -> None:
    first, second = lab.submit(UNTIL_LET_GO), second_of(lab)
    with running_worker(lab.settings(**AHEAD), lambda taken, idle_s: taken == 3) as running:
        wait_until_waiting(lab, first, second)
        lab.server.delete(second)
        running.heard.wait_for("job_ended")
        assert not lab.files(second).exists()
        third = second_of(lab)
        wait_until_waiting(lab, first, third)
        lab.let_go(first)
        running.join()
    assert lab.ended(first)[0] == lab.ended(third)[0] == "finished"
    assert lab.server.updates(second) == ["preprocessing"]


@pytest.mark.fault("E3")
def test_an_engine_that_is_away_while_one_waits_costs_neither(lab: Lab) -> None:
    first, second = lab.submit(UNTIL_LET_GO), second_of(lab)
    with (
        engine_proxy() as engine,
        running_worker(lab.settings(**AHEAD, docker_host=engine.url), lambda taken, idle_s: taken == 2) as running,
    ):
        wait_until_waiting(lab, first, second)
        engine.away()
        lab.let_go(first)
        heard_beats(lab)
        engine.back()
        running.join()
    assert lab.ended(first)[0] == lab.ended(second)[0] == "finished"


def test_once_is_one_job_with_prefetch_as_well(lab: Lab, tmp_path: Path) -> None:
    first, second = lab.submit("sleep 1"), second_of(lab)
    with a_command(lab, tmp_path, "--once") as worker:
        assert worker.wait() == 0, worker.errors
    assert lab.ended(first)[0] == "finished"
    assert lab.server.events("pull", second) == []


# -- leaving, and coming back -----------------------------------------------------------------------------------------


@pytest.mark.fault("F2")
def test_a_drain_gives_the_one_that_waits_back_at_once_and_finishes_the_other(lab: Lab, tmp_path: Path) -> None:
    first, second = lab.submit(UNTIL_LET_GO), second_of(lab)
    with a_command(lab, tmp_path) as worker:
        wait_until_waiting(lab, first, second)
        worker.send(signal.SIGTERM)
        lab.server.wait_for_state(second, "queued")
        wait_until(lambda: not lab.files(second).exists(), "nothing of it is here", DEADLINE_S)
        assert lab.take_as_another_account() == [second]
        assert lab.server.state(first) == "running"
        lab.let_go(first)
        assert worker.wait() == 0
        assert f"finishing job {first};" in worker.errors
    assert lab.ended(first)[0] == "finished"


@pytest.mark.fault("F3", "N12")
def test_ctrl_c_twice_gives_back_both(lab: Lab, tmp_path: Path) -> None:
    first, second = lab.submit("sleep 120"), second_of(lab)
    with a_command(lab, tmp_path) as worker:
        wait_until_waiting(lab, first, second)
        worker.send(signal.SIGINT)
        worker.wait_for("finishing job")
        worker.send(signal.SIGINT)
        assert worker.wait(25.0) == 0
    assert [lab.server.updates(job)[-1] for job in (first, second)] == ["queued", "queued"]
    assert sorted(lab.take_as_another_account()) == [first, second]


@pytest.mark.fault("F2")
def test_detached_from_both_the_next_start_goes_on_with_both(lab: Lab, tmp_path: Path) -> None:
    first, second = lab.submit(UNTIL_LET_GO), second_of(lab)
    starts = Starts(lab)
    with a_command(lab, tmp_path, stop_mode="detach") as worker:
        wait_until_waiting(lab, first, second)
        worker.send(signal.SIGTERM)
        assert worker.wait(10.0) == 0
    assert jobs_of(lab) == [str(first)]
    starts.look(now=True)
    goes_on_with_both(lab, tmp_path, first, second, starts)


@pytest.mark.fault("A2", "A4", "N1", "N3")
def test_killed_with_one_computing_and_one_waiting_both_end_once(lab: Lab, tmp_path: Path) -> None:
    first, second = lab.submit(UNTIL_LET_GO), second_of(lab)
    starts = Starts(lab)
    with a_command(lab, tmp_path) as worker:
        wait_until_waiting(lab, first, second)
        worker.wait_for("waiting for a job that computes to end")
        worker.send(signal.SIGKILL)
        assert worker.wait() == -signal.SIGKILL
    starts.look(now=True)
    goes_on_with_both(lab, tmp_path, first, second, starts)


def goes_on_with_both(lab: Lab, tmp_path: Path, first: int, second: int, starts: Starts) -> None:
    """In the order they were in, nothing started or fetched twice; and the first heartbeats come at once."""
    fetched = lab.server.traffic()
    since = time.time()
    with a_command(lab, tmp_path, "--exit-when-idle", "1") as worker:
        for job in (first, second):
            wait_until(partial(_beats, lab, job, since), f"the first word of job {job}", 10.0)
        worker.wait_for("waiting for a job that computes to end")
        assert jobs_of(lab) == [str(first)]
        starts.look(now=True)
        lab.let_go(first)
        assert worker.wait() == 0, worker.errors
    assert [lab.ended(job)[0] for job in (first, second)] == ["finished", "finished"]
    assert lab.server.results(second)["output/out/copy"] == b"input"
    starts.look(now=True)
    assert starts.jobs == [first, second]
    assert lab.server.traffic().items() >= fetched.items(), "an input was fetched again"
    assert in_turn(lab, first, second)


def _beats(lab: Lab, job: int, since: float) -> bool:
    return any(event["time"] >= since for event in lab.server.events("update", job))


# -- the image, pulled while inputs come ------------------------------------------------------------------------------

PULLS = {"pull_policy": "if-not-present", "transfers": "1"}


def endless_inputs(lab: Lab) -> dict[str, str]:
    """Inputs that come one after the other, for longer than anybody may wait here."""
    lab.server.set_faults({"method": "GET", "path": "^/_storage/", "delay_s": _EACH_S})
    return {f"in/{number}": lab.server.put_input(f"in/{number}", b"x") for number in range(int(_NEVER_S / _EACH_S))}


@pytest.fixture
def noise(lab: Lab) -> Iterator[str]:
    """The name of an image of one layer that no other image has."""
    name = "jobfetcher-test/overlap:1"
    new_image(lab.engine, name)
    try:
        yield name
    finally:
        for image in lab.engine.images(name=name, quiet=True):
            lab.engine.remove_image(image)


@pytest.mark.registry
def test_the_image_is_here_before_slow_inputs_are(lab: Lab, registry: Registry) -> None:
    lab.server.set_faults({"method": "GET", "path": "^/_storage/", "delay_s": 6})
    with pushed(lab.engine, lab.image, registry, "e2e/overlap") as reference:
        inputs = {"in": lab.server.put_input("in", b"input")}
        job = lab.submit("cp /files/in /files/out/copy", image=reference, files_down=inputs, files_up=OUT)
        with running_worker(lab.settings(**PULLS), lambda taken, idle_s: taken == 1) as running:
            wait_until(lambda: bool(lab.engine.images(name=reference)), "the image is here", DEADLINE_S)
            assert not (lab.files(job) / "in").exists()
            running.join()
        assert lab.ended(job) == ("finished", "")
    assert lab.server.results(job)["output/out/copy"] == b"input"


#: What S3 says of an object that is not there; another's 404 is waited for.
MISSING = {"status": 404, "body": "<Error><Code>NoSuchKey</Code></Error>", "content_type": "application/xml"}


@pytest.mark.registry
@pytest.mark.fault("C7")
def test_inputs_come_while_the_pull_stalls_and_one_that_is_missing_ends_it(
    lab: Lab, registry: Registry, noise: str
) -> None:
    with pushed(lab.engine, noise, registry, "e2e/noise") as reference, stalling(registry) as server:
        lab.engine.remove_image(noise)  # and its layer with it
        stalled = reference.replace(registry.address, f"{LOOPBACK}:{server.server_port}")
        lab.server.set_faults({"method": "GET", "path": "^/_storage/.*/gone$", "delay_s": 5, **MISSING})
        inputs = {name: lab.server.put_input(name, b"input") for name in ("in", "gone")}
        job = lab.submit("true", image=stalled, files_down=inputs)
        with running_worker(lab.settings(**PULLS), lambda taken, idle_s: taken == 1) as running:
            assert server.stalled.wait(DEADLINE_S)
            wait_until((lab.files(job) / "in").exists, "an input is here", DEADLINE_S)
            running.join()
        assert lab.engine.images(name=stalled) == []
    state, details = lab.ended(job)
    assert (state, "gone" in details, "not found" in details) == ("error", True, True), details


@pytest.mark.registry
@pytest.mark.fault("E6")
def test_an_image_that_is_missing_ends_a_download_that_takes_for_ever(lab: Lab, registry: Registry) -> None:
    inputs = endless_inputs(lab)
    job = lab.submit("true", image=f"{registry.address}/e2e/nothing:7", files_down=inputs)
    began = time.monotonic()
    work(lab.settings(**PULLS))
    assert time.monotonic() - began < _NEVER_S / 2
    assert "the registry does not have image" in lab.ended(job)[1]


@pytest.mark.registry
@pytest.mark.fault("B17")
def test_a_cancel_ends_the_pull_and_the_download(lab: Lab, registry: Registry, noise: str) -> None:
    with pushed(lab.engine, noise, registry, "e2e/noise") as reference, stalling(registry) as server:
        lab.engine.remove_image(noise)
        stalled = reference.replace(registry.address, f"{LOOPBACK}:{server.server_port}")
        job = lab.submit("true", image=stalled, files_down=endless_inputs(lab))
        began = time.monotonic()
        with running_worker(lab.settings(**PULLS), lambda taken, idle_s: taken == 1) as running:
            assert server.stalled.wait(DEADLINE_S)
            lab.server.delete(job)
            running.join()
        assert time.monotonic() - began < _NEVER_S / 2
    assert [event["ending"] for event in running.heard.all("job_ended")] == ["dropped"]
