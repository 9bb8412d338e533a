"""An image that is small in its registry and fills the engine's disk when it is unpacked (T16), on a disk of 96 MiB."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.engine.docker import DockerEngine
from jobfetcher.engine.images import ImagePolicy
from tests.support.boxes import no_progress
from tests.support.mounts import ext4, needs_root
from tests.support.private_engine import PrivateEngine
from tests.support.services import Registry, require_program, running, running_registry, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.registry, needs_root]

DISK_MIB, BOMB_MIB = 96, 400


class _Zeros(io.RawIOBase):
    """So many bytes of nothing, without having them."""

    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int = -1) -> bytes:
        taken = self._left if size < 0 else min(size, self._left)
        self._left -= taken
        return bytes(taken)


def push(engine: docker.APIClient, registry: Registry, name: str, mib: int) -> str:
    """Push an image of one file of so many MiB; it is on no engine afterwards. Its reference."""
    repository = f"{registry.address}/tests/{name}"
    with tarfile.open(fileobj=(archive := io.BytesIO()), mode="w:gz") as tar:
        entry = tarfile.TarInfo("content")
        entry.size = mib << 20
        tar.addfile(entry, _Zeros(entry.size))
    said = engine.import_image_from_data(archive.getvalue(), repository, "1")
    image = str(json.loads(said.splitlines()[-1])["status"])
    try:
        assert "errorDetail" not in engine.push(repository, "1")
    finally:
        engine.remove_image(f"{repository}:1", force=True)
        with contextlib.suppress(docker.errors.ImageNotFound):
            engine.remove_image(image, force=True)
    return f"{repository}:1"


@contextlib.contextmanager
def small_engine(directory: Path) -> Iterator[PrivateEngine]:
    """An engine with all it has on a disk of DISK_MIB."""
    with ext4(directory, DISK_MIB) as disk:
        private = PrivateEngine(disk, live_restore=False, bridge=False)
        try:
            private.start()
            yield private
        finally:
            private.close()


@pytest.mark.slow
@pytest.mark.fault("T16", "D2")
def test_an_image_bomb_is_the_machines_fault_and_leaves_room(engine: docker.APIClient, tmp_path: Path) -> None:
    with running_registry() as registry, small_engine(tmp_path / "disk") as private:
        small, bomb = push(engine, registry, "small", 1), push(engine, registry, "bomb", BOMB_MIB)
        registry.stop()
        # The engine has a network of its own, without anybody in it: the same registry again, in there.
        inside = [require_program("nsenter", "util-linux"), f"--net=/proc/{private.pid}/ns/net"]
        subprocess.run([*inside, require_program("ip", "iproute2"), "link", "set", "lo", "up"], check=True)
        serve = [require_program("docker-registry", "docker-registry"), "serve", registry._directory / "config.yml"]
        connect = [*inside, "bash", "-c", f": < /dev/tcp/{registry.address.replace(':', '/')}"]

        def listens() -> bool:
            return subprocess.run(connect, capture_output=True, check=False).returncode == 0

        with running([*inside, *map(str, serve)], tmp_path / "registry.log", listens):
            ours = DockerEngine("bomb", url=private.url, images=ImagePolicy(registry_budget_s=0))
            with contextlib.closing(ours):
                free = os.statvfs(tmp_path / "disk").f_bavail
                with pytest.raises(WorkerFault, match="the engine's disk is full") as fault:
                    ours.prepare(bomb, Halt(), no_progress)
                assert fault.value.reason is WorkerReason.DISK
                wait_until(lambda: os.statvfs(tmp_path / "disk").f_bavail > free * 0.8, "the room is back", 30)
                assert ours.prepare(small, Halt(), no_progress).size_bytes >= 2**20
