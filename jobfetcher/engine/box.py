"""A RunSpec in the engine's own words (Docker Engine API, "Create a container"). Pure; used by `docker`.

Promises: what is not in the spec is not in the container: no ports, devices, volumes, privileges, restarts. Below
/files nothing is mounted that does not lie in the job's own directory, whatever the image declares (`volumes`). Of the
image's own configuration comes along what `image_config` says of each field, and a job's labels are the worker's.
`tests/security/golden_inspect.json` is what the engine makes of it, field by field (FAULTS.md T11).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobfetcher.core.run import RunSpec
from jobfetcher.engine.flavour import DOCKER, Flavour
from jobfetcher.engine.image_config import NO_HEALTHCHECK, STOP_SIGNAL
from jobfetcher.engine.run_spec import BASE_CAPABILITIES
from jobfetcher.engine.volumes import MOUNT_POINT

_MIB = 1024 * 1024

#: In every container of ours, so that what an image says of the same does not come along (`image_config`).
_IMAGE_SAYS_NOTHING: Mapping[str, Any] = {
    "Healthcheck": {name: list(value) for name, value in NO_HEALTHCHECK.items()},
    "StopSignal": STOP_SIGNAL,
}


def box(spec: RunSpec, network_mode: str, flavour: Flavour = DOCKER) -> dict[str, Any]:
    """The container of a job. `network_mode` is `none`, or the name or id of a network; `flavour` is the engine's."""
    memory = spec.memory_mib * _MIB
    config: dict[str, Any] = {
        "Image": spec.image_id,
        "Env": [f"{name}={value}" for name, value in spec.env.items()] + flavour.without_env(spec.unset),
        "Labels": dict(spec.labels),
        **_IMAGE_SAYS_NOTHING,
        "HostConfig": _closed([_bind(spec.files_host_path), *_inner_binds(spec)], spec.cap_add)
        | {
            "IpcMode": "private",
            "ShmSize": spec.shm_mib * _MIB,
            "PidsLimit": spec.pids_limit,
            "Memory": memory,
            "MemorySwap": memory,  # memory and swap together: so no swap
            "NanoCpus": int(spec.cpu_cores * 1e9),
            "CpuShares": spec.cpu_shares,
            "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],  # a core dump can be as large as the memory
            "Init": spec.init,  # reaps zombies and passes TERM on (FAULTS.md E9)
            "NetworkMode": network_mode,
            "PublishAllPorts": False,  # an image's EXPOSE cannot be left out, and opens nothing
            "LogConfig": dict(flavour.log),  # bounded, however much a job prints (FAULTS.md D4)
            "ReadonlyRootfs": spec.read_only,
        },
    }
    if spec.command is not None:
        config["Cmd"] = list(spec.command)
    if spec.user is not None:
        config["User"] = spec.user
    if spec.runtime is not None:
        config["HostConfig"]["Runtime"] = spec.runtime
    if spec.gpu_uuids:
        config["HostConfig"]["DeviceRequests"] = [flavour.device_request(spec.gpu_uuids)]
    return flavour.fitted(config)


def chown_box(
    image_id: str, host_path: str, owner: str, labels: Mapping[str, str], *, target: str, host_users: bool = False
) -> dict[str, Any]:
    """A container that gives all below `host_path` to `owner` (`uid:gid`); of links themselves, not of targets.

    And opens it to the owner, who could neither read nor delete below a directory of mode 000. `chmod -R` leaves links.
    `target`: where it is mounted, a path that no image can know, or a volume that the image declares there would be
    given away instead. `host_users`: outside of the user namespace that an engine with userns-remap gives containers,
    where `owner` would be somebody else.
    """
    return {
        "Image": image_id,
        "Entrypoint": ["/bin/sh", "-c", 'chown -Rh "$0" "$1" && chmod -R u+rwX "$1"'],
        "Cmd": [owner, target],
        "User": "0",
        "WorkingDir": "/",
        "Labels": dict(labels),
        **_IMAGE_SAYS_NOTHING,
        "HostConfig": _closed([_bind(host_path, target)], BASE_CAPABILITIES)
        | {"NetworkMode": "none", "PidsLimit": 16, "Memory": 256 * _MIB, "MemorySwap": 256 * _MIB}
        | ({"UsernsMode": "host"} if host_users else {}),
    }


def _bind(host_path: str, target: str = MOUNT_POINT) -> dict[str, Any]:
    """A Mount fails when its source is missing, where a Bind would make it as root (FAULTS.md E12)."""
    return {"Type": "bind", "Source": host_path, "Target": target}


def _inner_binds(spec: RunSpec) -> list[dict[str, Any]]:
    """In place of the anonymous volumes that the engine would make for what the image declares below /files."""
    return [_bind(f"{spec.files_host_path}/{folder}", f"{MOUNT_POINT}/{folder}") for folder in spec.folders]


def _closed(mounts: list[dict[str, Any]], cap_add: tuple[str, ...]) -> dict[str, Any]:
    """What every container of ours has in common: mounts of the job's directory only, few capabilities, no way to
    more."""
    return {
        "Mounts": mounts,
        "CapDrop": ["ALL"],
        "CapAdd": list(cap_add),
        "SecurityOpt": ["no-new-privileges"],  # the default seccomp profile stays
        "RestartPolicy": {"Name": "no"},
        "AutoRemove": False,
    }
