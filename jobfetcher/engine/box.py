"""A RunSpec in the engine's own words (Docker Engine API, "Create a container"). Pure; used by `docker`.

Promises: what is not in the spec is not in the container: no ports, devices, volumes, privileges, restarts.
`tests/security/golden_inspect.json` is what the engine makes of it, field by field (FAULTS.md T11).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobfetcher.core.run import RunSpec
from jobfetcher.engine.run_spec import BASE_CAPABILITIES

#: Where a job finds its directory (PROTOCOL.md "How a job must be run").
MOUNT_POINT = "/files"

_MIB = 1024 * 1024


def box(spec: RunSpec, network_mode: str) -> dict[str, Any]:
    """The container of a job. `network_mode` is `none`, or the name or id of a network."""
    memory = spec.memory_mib * _MIB
    config: dict[str, Any] = {
        "Image": spec.image_id,
        "Env": [f"{name}={value}" for name, value in spec.env.items()],
        "Labels": dict(spec.labels),
        "HostConfig": _closed(spec.files_host_path, spec.cap_add)
        | {
            "IpcMode": "private",
            "ShmSize": spec.shm_mib * _MIB,
            "PidsLimit": spec.pids_limit,
            "Memory": memory,
            "MemorySwap": memory,  # memory and swap together: so no swap
            "NanoCpus": int(spec.cpu_cores * 1e9),
            "CpuShares": spec.cpu_shares,
            "Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}],  # a core dump can be as large as the memory
            "Init": True,  # reaps zombies and passes TERM on (FAULTS.md E9)
            "NetworkMode": network_mode,
            # At most 30 MB on disk, however much a job prints (FAULTS.md D4).
            "LogConfig": {"Type": "local", "Config": {"max-size": "10m", "max-file": "3"}},
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
        config["HostConfig"]["DeviceRequests"] = [{"DeviceIDs": list(spec.gpu_uuids), "Capabilities": [["gpu"]]}]
    return config


def chown_box(image_id: str, host_path: str, owner: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """A container that gives all below `host_path` to `owner` (`uid:gid`); of links themselves, not of targets.

    And opens it to the owner, who could neither read nor delete below a directory of mode 000. `chmod -R` leaves links.
    """
    return {
        "Image": image_id,
        "Entrypoint": ["/bin/sh", "-c", f'chown -Rh "$0" {MOUNT_POINT} && chmod -R u+rwX {MOUNT_POINT}'],
        "Cmd": [owner],
        "User": "0",
        "WorkingDir": "/",
        "Labels": dict(labels),
        "HostConfig": _closed(host_path, BASE_CAPABILITIES)
        | {"NetworkMode": "none", "PidsLimit": 16, "Memory": 256 * _MIB, "MemorySwap": 256 * _MIB},
    }


def _closed(host_path: str, cap_add: tuple[str, ...]) -> dict[str, Any]:
    """What every container of ours has in common: one mount, few capabilities, no way to more."""
    return {
        # A Mount fails when its source is missing, where a Bind would make it as root (FAULTS.md E12).
        "Mounts": [{"Type": "bind", "Source": host_path, "Target": MOUNT_POINT}],
        "CapDrop": ["ALL"],
        "CapAdd": list(cap_add),
        "SecurityOpt": ["no-new-privileges"],  # the default seccomp profile stays
        "RestartPolicy": {"Name": "no"},
        "AutoRemove": False,
    }
