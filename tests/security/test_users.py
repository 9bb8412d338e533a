"""Whose numbers jobs run under, and that the owner hears of it (FAULTS.md T11)."""

import json
import os
from pathlib import Path

import docker
import pytest

from jobfetcher.engine.flavour import DOCKER, Flavour, docker_flavour, podman_flavour
from jobfetcher.engine.users import name_of, notes
from tests.support.boxes import DockerBench, docker_bench
from tests.support.private_engine import private_engine
from tests.support.worker import Lab, command

pytestmark = pytest.mark.fault("T11")

REMAPPED = docker_flavour({"SecurityOptions": ["name=seccomp,profile=default", "name=userns"]})
ROOTLESS = docker_flavour({"SecurityOptions": ["name=rootless"]})


def who(number: int) -> str | None:
    return {0: "root", 1000: "anna"}.get(number)


@pytest.mark.parametrize(
    ("flavour", "job_user", "said"),
    [
        (DOCKER, None, "userns-remap"),
        (DOCKER, "", "userns-remap"),
        (DOCKER, "0:0", "userns-remap"),
        (DOCKER, "00", "userns-remap"),
        (podman_flavour("5.4.2", {}), None, "A Podman without root rights has one"),
        (DOCKER, "1000:1000", "JOB_USER=1000:1000: 1000 is anna, a user of this machine"),
        (DOCKER, "1000", "JOB_USER=1000: 1000 is anna"),
        (DOCKER, "70000:70000", ""),
        (DOCKER, "labuser", ""),  # which the worker's own box refuses
        (REMAPPED, None, ""),
        (REMAPPED, "1000:1000", ""),
        (ROOTLESS, None, ""),
        (ROOTLESS, "1000", ""),
    ],
)
def test_what_the_owner_hears(flavour: Flavour, job_user: str | None, said: str) -> None:
    found = list(notes(flavour, job_user, who))
    assert len(found) == bool(said)
    assert said in "".join(found)


def test_who_has_a_number() -> None:
    assert name_of(0) == "root"
    assert name_of(2**31 + 7) is None
    assert name_of(2**70) is None


@pytest.mark.docker
@pytest.mark.parametrize(("job_user", "said"), [("1:1", "1 is daemon"), (None, "root among them"), ("70123:70123", "")])
def test_the_start_check_says_it(lab: Lab, tmp_path: Path, job_user: str | None, said: str) -> None:
    settings = lab.env(**({"job_user": job_user} if job_user else {}))
    with command(["resources", "--json"], settings, tmp_path) as run:
        assert run.wait() == 0
        found = [note for note in json.loads(run.output)["notes"] if "numbers" in note]
    assert len(found) == bool(said)
    assert said in "".join(found)


@pytest.mark.docker
def test_jobs_of_a_remapped_engine_are_nobody_out_here(engine: docker.APIClient, busybox: str, tmp_path: Path) -> None:
    """And their box is the same as anywhere else: mounts, filter and all."""
    subordinates = Path("/etc/subuid")
    named = [line.split(":") for line in subordinates.read_text().splitlines()] if subordinates.exists() else []
    if not named:
        pytest.skip("no user of this machine has subordinate ids (subuid(5))")
    with private_engine(users=named[0][0]) as remapped:
        remapped.copy_image(engine, busybox)
        with docker_bench(busybox, tmp_path / "files", url=remapped.url) as bench:
            assert list(notes(bench.engine.flavour(), None)) == []
            assert printed_id(bench) == "0"
            first = int(named[0][1])
            assert (bench.files / "made").stat().st_uid == first > 65535
            bench.engine.own(str(bench.files))
            assert (bench.files / "made").stat().st_uid == os.getuid()


def printed_id(bench: DockerBench) -> str:
    end, printed = bench.run(bench.spec("touch /files/made; id -u"))
    assert end.code == 0, printed
    return printed
