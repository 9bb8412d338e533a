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
from jobfetcher.engine.seccomp import security_option
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
        "HostConfig": _closed(
            [_bind(spec.files_host_path), *_inner_binds(spec)],
            spec.cap_add,
            own_filter=spec.own_filter and flavour.takes_filter,
        )
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
    if spec.layer_mib is not None and flavour.limits_layers:
        config["HostConfig"]["StorageOpt"] = {"size": f"{spec.layer_mib}m"}
    if spec.gpu_uuids:
        config["HostConfig"]["DeviceRequests"] = [flavour.device_request(spec.gpu_uuids)]
    return flavour.fitted(config)


def _bind(host_path: str, target: str = MOUNT_POINT) -> dict[str, Any]:
    """A Mount fails when its source is missing, where a Bind would make it as root (FAULTS.md E12)."""
    return {"Type": "bind", "Source": host_path, "Target": target}


def _inner_binds(spec: RunSpec) -> list[dict[str, Any]]:
    """In place of the anonymous volumes that the engine would make for what the image declares below /files."""
    return [_bind(f"{spec.files_host_path}/{folder}", f"{MOUNT_POINT}/{folder}") for folder in spec.folders]


def _closed(mounts: list[dict[str, Any]], cap_add: tuple[str, ...], *, own_filter: bool) -> dict[str, Any]:
    """What every container of ours has in common: mounts of the job's directory only, few capabilities, no way to
    more, and a filter of system calls: the worker's, or else the engine's own."""
    return {
        "Mounts": mounts,
        "CapDrop": ["ALL"],
        "CapAdd": list(cap_add),
        "SecurityOpt": ["no-new-privileges", *([security_option()] if own_filter else [])],
        "RestartPolicy": {"Name": "no"},
        "AutoRemove": False,
    }
