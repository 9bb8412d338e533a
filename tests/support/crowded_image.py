"""An image whose configuration says everything that an image can say, for an engine to load."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import docker

from demo.busybox_image import local_busybox, root_tar
from tests.support.services import require

#: What acts on a container from outside of it, by its labels, and keys of the worker's own.
LABELS = {
    "traefik.enable": "true",
    "traefik.http.routers.login.rule": "HostRegexp(`.*`)",
    "com.docker.compose.project": "lab",
    "com.docker.compose.service": "database",
    "ofelia.enabled": "true",
    "ofelia.job-exec.steal.schedule": "@every 5s",
    "ofelia.job-exec.steal.command": "touch /files/out/by-ofelia",
    "com.centurylinklabs.watchtower.lifecycle.pre-update": "/steal",
    "io.containers.autoupdate": "registry",
    "jobfetcher.instance": "another",
    "jobfetcher.job": "17",
    "jobfetcher.unknown": "x",
    "org.opencontainers.image.title": "Everything",
}

ENV = {
    "PATH": "/bin",
    "MODE": "slow",
    "NVIDIA_VISIBLE_DEVICES": "all",
    "NVIDIA_DRIVER_CAPABILITIES": "all",
    "NVIDIA_REQUIRE_CUDA": "cuda>=11.0",
    "NVIDIA_DISABLE_REQUIRE": "1",
    "NVIDIA_REQUIRE_JETPACK": "csv-mounts=all",
    "NVIDIA_PYTORCH_VERSION": "24.01",
    "NVIDIA_MIG_CONFIG_DEVICES": "all",
    "NVIDIA_MIG_MONITOR_DEVICES": "all",
    "NVIDIA_IMEX_CHANNELS": "0",
    "NVIDIA_GDS": "enabled",
    "NVIDIA_MOFED": "enabled",
    "NVIDIA_MOUNT_EVERYTHING": "1",
    "LD_LIBRARY_PATH": "/usr/local/nvidia/lib:",
    "LD_PRELOAD": "/proc/self/cwd/steal.so",
}

#: Every field that the engine's own type of an image's configuration has or had (moby, api/types/container/config.go,
#: and image/spec/v1.2), each with a value that would be seen.
CONFIG: Mapping[str, Any] = {
    "Hostname": "database",
    "Domainname": "lab.example.org",
    "User": "1234:1234",
    "AttachStdin": True,
    "AttachStdout": True,
    "AttachStderr": True,
    "ExposedPorts": {"8000/tcp": {}},
    "Tty": True,
    "OpenStdin": True,
    "StdinOnce": True,
    "Env": [f"{name}={value}" for name, value in ENV.items()],
    "Cmd": ["sleep", "50"],
    "Healthcheck": {"Test": ["CMD-SHELL", "echo checked >> /checked"], "Interval": 1_000_000_000, "Retries": 1},
    "ArgsEscaped": True,
    "Image": "sha256:0",
    "Volumes": {"/data": {}, "/files/kept": {}},
    "WorkingDir": "/work",
    "Entrypoint": ["/bin/env", "CAME=along"],
    "NetworkDisabled": True,
    "MacAddress": "02:42:ac:11:00:99",
    "OnBuild": ["RUN /steal"],
    "Labels": LABELS,
    "StopSignal": "SIGKILL",
    "StopTimeout": 77,
    "Shell": ["/bin/steal", "-c"],
    "Memory": 4096 * 2**20,
    "MemorySwap": -1,
    "CpuShares": 4096,
    "Cpuset": "0",
    "PublishService": "x",
    "VolumeDriver": "x",
}


@contextmanager
def crowded_image(client: docker.APIClient, **changes: Any) -> Iterator[str]:
    """The reference of such an image on that engine, with `changes` in its configuration; gone at the end."""
    busybox = local_busybox()
    require(busybox, "a statically linked busybox (package busybox-static)")
    assert busybox is not None
    layer = root_tar(busybox)
    digest = hashlib.sha256(layer).hexdigest()
    whole = {
        "architecture": str(client.version()["Arch"]),
        "os": "linux",
        "config": {**CONFIG, **changes},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{"created_by": "by hand"}],
    }
    config = json.dumps(whole).encode()
    reference = f"docker.io/jobfetcher-test/crowded-{uuid4().hex[:8]}:1"
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": name, "RepoTags": [reference], "Layers": ["layer.tar"]}]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in ((name, config), ("layer.tar", layer), ("manifest.json", json.dumps(manifest).encode())):
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    for report in client.load_image(buffer.getvalue()):  # type: ignore[no-untyped-call]
        assert "error" not in report, report
    try:
        yield reference
    finally:
        client.remove_image(reference, force=True)
