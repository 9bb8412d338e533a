"""A whole worker on an engine that cannot run jobs: from the start, and from one moment on (T23, S3).

The engine is a private one whose docker-init is really another program: linked to libraries that images lack, as
Debian's `tini` is beside its `tini-static`.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobfetcher.worker import Leaving
from tests.support.mock_server import running_mock_api
from tests.support.private_engine import private_engine
from tests.support.services import ensure_busybox_image, wait_until
from tests.support.worker import DEADLINE_S, Lab, assert_clean, running_worker

pytestmark = [pytest.mark.docker, pytest.mark.fault("T23", "S3")]

CURE = "install a statically linked docker-init"


@dataclass(frozen=True)
class Place:
    """A mock API, a private engine, and that engine's docker-init, to be broken and mended."""

    lab: Lab
    url: str
    init: Path
    linked: Path

    def breaks(self) -> None:
        self._put(self.linked)

    def mends(self) -> None:
        self._put(Path(shutil.which("docker-init") or ""))

    def _put(self, program: Path) -> None:
        draft = self.init.with_suffix(".new")
        shutil.copy(program, draft)
        draft.rename(self.init)  # not over the old one, which runs

    def states(self, *jobs: int) -> list[str]:
        return [self.lab.server.state(job) for job in jobs]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    source, linked = tmp_path / "init.c", tmp_path / "linked-init"
    source.write_text("int main(void) { return 0; }\n")
    subprocess.run(["gcc", "-o", str(linked), str(source)], check=True)
    with private_engine() as engine, running_mock_api(tmp_path / "server") as server:
        client = engine.client()
        lab = Lab(server, tmp_path / "base", ensure_busybox_image(client), client)
        found = Place(lab, engine.url, engine.directory / "bin" / "docker-init", linked)
        found.mends()
        before = lab.held()
        yield found
        assert_clean(lab, before)


def test_no_job_is_taken_before_it_works_and_the_cure_is_said_once(place: Place) -> None:
    place.breaks()
    job = place.lab.submit("true")
    with running_worker(place.lab.settings(docker_host=place.url), lambda taken, idle_s: taken >= 1) as running:
        running.heard.wait_for("not_polling")
        assert place.states(job) == ["queued"]
        assert place.lab.server.events("pull") == place.lab.server.events("poll") == []
        place.mends()
        wait_until(lambda: place.states(job) == ["finished"], "it is run", DEADLINE_S)
        running.join()
    (said,) = running.heard.messages("not_polling")
    assert said.startswith("no job can be taken: the engine's init cannot be run in a container")
    assert CURE in said


def test_an_engine_that_breaks_under_way_costs_at_most_five_jobs(place: Place) -> None:
    first = place.lab.submit("true")
    with running_worker(place.lab.settings(docker_host=place.url)) as running:
        wait_until(lambda: place.states(first) == ["finished"], "all is well", DEADLINE_S)
        place.breaks()
        jobs = [place.lab.submit("true") for _ in range(12)]
        running.heard.wait_for("not_polling")
        wait_until(lambda: set(place.states(*jobs)) == {"queued"}, "given back, and none failed for it", DEADLINE_S)
        spoilt = [job for job in jobs if place.lab.server.events("pull", job)]
        assert 1 <= len(spoilt) <= 5
        place.mends()
        rest = [job for job in jobs if job not in spoilt]
        wait_until(lambda: set(place.states(*rest)) == {"finished"}, "the rest is run", DEADLINE_S)
        running.leave(Leaving.DRAIN)
        running.join()
    (said,) = running.heard.messages("not_polling")
    assert CURE in said
