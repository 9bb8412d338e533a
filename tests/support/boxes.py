"""What the engine's tests share: an engine (real or fake), an image on it, a job directory, specs made from them."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import docker
import pytest

from demo.busybox_image import IMAGE
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import Job, JobId
from jobfetcher.core.machine import Gpu, Share
from jobfetcher.core.ports import Container, Engine
from jobfetcher.core.run import Exit, Image, RunSpec
from jobfetcher.engine.docker import DockerEngine
from jobfetcher.engine.images import ImagePolicy, PullPolicy
from jobfetcher.engine.run_spec import BoxPolicy, build_run_spec
from jobfetcher.testing.fake_engine import FakeContainer, FakeEngine
from tests.support.podman import PrivatePodman

LOCAL = ImagePolicy(pull=PullPolicy.NEVER)
NO_NETWORK = BoxPolicy(network=None)
LONG_S = 60.0  # what a container of a test needs at most on a busy machine; a wait ends when the container does


_MADE = "jobfetcher-test.made-by"  # the label of images that a bench made


def no_progress(_done: int, _total: int) -> None:
    """For who does not look at a pull's progress."""


def short_pause(seconds: float) -> None:
    """A `sleep` for engines: none is waited out. Whoever waits for something looks at the clock again."""
    time.sleep(min(seconds, 0.1))


@dataclass(frozen=True)
class Bench:
    """One worker's view of an engine, and one job directory that its containers get."""

    engine: Engine
    image: Image
    files: Path
    instance: str

    def spec(
        self,
        *command: str,
        job_id: str = "1",
        attempt: int = 1,
        memory_mib: int = 64,
        cpu_cores: float = 1,
        gpus: tuple[Gpu, ...] = (),
        labels: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        image: Image | None = None,
        policy: BoxPolicy = NO_NETWORK,
    ) -> RunSpec:
        """The spec of a job with that command, made by the product's own `build_run_spec`."""
        return build_run_spec(
            Job(id=JobId(job_id), image="any", command=command, labels=dict(labels or {}), env=dict(env or {})),
            Share(cpu_cores, memory_mib, gpus),
            image=image or self.image,
            files_host_path=str(self.files),
            attempt=attempt,
            instance=self.instance,
            policy=policy,
        )

    def run(self, spec: RunSpec) -> tuple[Exit, str]:
        """Run it to its end and remove it: how it ended, and the last 100 lines it printed."""
        container = self.engine.start(spec)
        try:
            end = container.wait(LONG_S)
            assert end is not None, f"{spec.command} still runs after {LONG_S:g} s"
            return end, container.last_lines(100)
        finally:
            container.remove()


@dataclass(frozen=True)
class FakeBench(Bench):
    """A Bench on the engine in memory, and what people do there."""

    engine: FakeEngine

    def pause(self, container: Container) -> None:
        """`docker pause`"""
        assert isinstance(container, FakeContainer)
        container.paused = True

    def make_image(self, *names: str) -> Image:
        """An image that nobody else uses, by those names; `reference` is the first."""
        image = Image(f"sha256:{uuid4().hex}", names[0], None, self.image.architecture)
        self.engine.here[image.id] = set(names)
        return image

    def untag(self, *names: str) -> None:
        """`docker rmi` of those names"""
        for known in self.engine.here.values():
            known.difference_update(names)


@dataclass(frozen=True)
class DockerBench(Bench):
    """A Bench on the real engine, and what people do there, as in FakeBench."""

    engine: DockerEngine

    def pause(self, container: Container) -> None:
        with self.engine.api.calling("pause"):
            self.engine.api.ask("POST", f"/containers/{container.id}/pause")

    def make_image(self, *names: str) -> Image:
        """A copy of the bench's image, gone with the bench."""
        api = self.engine.api
        with api.calling("make an image"), closing(docker.APIClient(api.url)) as client:
            copied = api.create({"Image": self.image.id}, f"jobfetcher-{self.instance}-copied")
            for name in names:
                repository, tag = name.rsplit(":", 1)
                if name == names[0]:
                    client.commit(copied, repository, tag, changes=f"LABEL {_MADE}={self.instance}")
                else:
                    client.tag(names[0], repository, tag)
            client.remove_container(copied)
        return self.engine.prepare(names[0], Halt(), no_progress)

    def untag(self, *names: str) -> None:
        with closing(docker.APIClient(self.engine.api.url)) as client:
            for name in names:
                client.remove_image(name)


@contextmanager
def docker_bench(busybox: str, files: Path, **options: Any) -> Iterator[DockerBench]:
    """A worker of its own on the engine that answers here; `options` of DockerEngine. Its containers are gone at the
    end."""
    instance = f"test{uuid4().hex[:8]}"
    engine = DockerEngine(instance, images=LOCAL, **options)
    files.mkdir(mode=0o777, exist_ok=True)
    files.chmod(0o777)
    try:
        yield DockerBench(engine, engine.prepare(busybox, Halt(), no_progress), files, instance)
    finally:
        engine.reap(frozenset())
        with closing(docker.APIClient(engine.api.url)) as client:
            for image in client.images(filters={"label": f"{_MADE}={instance}"}):
                client.remove_image(image["Id"], force=True)
        engine.close()


@pytest.fixture
def bench(busybox: str, tmp_path: Path) -> Iterator[DockerBench]:
    """A worker of its own for one test. The folders that use it import it in their conftest."""
    with docker_bench(busybox, tmp_path / "files") as ready:
        yield ready


@contextmanager
def podman_bench(podman: PrivatePodman, **options: Any) -> Iterator[DockerBench]:
    """`docker_bench` on a Podman of the tests' own, with a job directory of the user whose Podman it is."""
    files = podman.shared / f"files-{uuid4().hex[:8]}"
    files.mkdir()
    os.chown(files, podman.uid, podman.gid)
    with docker_bench(IMAGE, files, url=podman.url, **options) as bench:
        yield bench
