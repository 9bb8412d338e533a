"""What differs between engines that speak Docker's API: Docker itself, and Podman behind its Docker-compatible socket.

Made by `docker` from what an engine says of itself; pure. The other rooms ask for a value and never for the engine's
name. What is here was read in Podman's sources and release notes and tried on Podman 4.3.1 and 5.4.2, both with control
groups v1; of versions between and after, and of control groups v2, it was only read.

- Log: Podman has no driver `local`. `k8s-file` begins an empty file when the old one is full and deletes that one, so
  the limit is that of all three files of `local` together, to lose as little as possible.
- Waiting: while Podman before 5.0 waits for an end it asks without a pause (pkg/api/handlers/utils/containers.go, an
  interval of a nanosecond): one core for each job. And `next-exit` of any version before 6 misses an end that comes
  before the question has reached its event log. So Podman is asked for the state, at intervals (`PollingLine`). 5.4.2
  waits for 1 % of a core and missed none of 80 quick ends; but asking costs the same and can miss none.
- Its service is no daemon: what runs a container is its own conmon, which notes the exit code, whatever becomes of the
  service. See `vouch`.
- `OOMKilled` is false for whatever was killed for memory, before 5.0: conmon leaves its mark in another directory than
  the one where it is looked for. A job that was killed by KILL, and not through Podman, is taken for one of those.
  5.4.2 says it, also where only a child of the job's first process was killed.
- Events come from a log. A time `until` in the past ends the answer before anything is read; `stream=false` is meant.
- Network: the bridge's option `enable_icc` is unknown to Podman. Its option `isolate` keeps networks apart and not the
  containers of one network, and networks made by this API have it anyway. Without root rights each container has a
  network of its own where `private` is asked for (slirp4netns, from 5.0 on pasta): none reaches another. In pasta's
  each has the address of the machine.
- GPUs: before 5.4 the API drops `DeviceRequests` without a word; later ones take names of CDI, with the driver `cdi`,
  from a specification in /etc/cdi. 5.4.2 was seen to give one and two devices of a specification that was made up.
- `Runtime` is dropped without a word: the runtime is the service's, from containers.conf.
- A filter of system calls is named by a file on Podman's machine; its contents, which Docker takes, are not taken. So
  there its own stays, which leaves more to capabilities (`mount`, `unshare`) and closes io_uring as the worker's does.
- A missing source of a mount is made as an empty directory, where Docker refuses it (FAULTS.md E12).
- Limits need a control group of the service's own: without root rights there is none with control groups v1, and with
  v2 only those that systemd delegates. What is missing is left out, since the runtime would refuse the container.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from jobfetcher.engine.api import Line
from jobfetcher.engine.polling import PollingLine
from jobfetcher.engine.printed import FILE_BYTES, FILES
from jobfetcher.engine.vouch import FILTERS

#: What an engine must be asked to keep containers of one bridge network apart.
_ICC = "com.docker.network.bridge.enable_icc"


class Limit(StrEnum):
    """What an engine may be unable to limit, in words for people."""

    MEMORY = "memory"
    CORES = "cores"
    PROCESSES = "processes"


#: The controller of each limit, and the key by which Docker's /info says that it is there.
_CONTROLLERS = {Limit.MEMORY: "memory", Limit.CORES: "cpu", Limit.PROCESSES: "pids"}
_INFO = {Limit.MEMORY: "MemoryLimit", Limit.CORES: "CpuCfsQuota", Limit.PROCESSES: "PidsLimit"}

#: What in a container's configuration (`box`) states each limit.
_HOST_CONFIG = {
    Limit.MEMORY: ("Memory", "MemorySwap"),
    Limit.CORES: ("NanoCpus", "CpuShares"),
    Limit.PROCESSES: ("PidsLimit",),
}


@dataclass(frozen=True, slots=True)
class Flavour:
    """How one kind of engine is spoken to. The defaults are Docker's.

    `kind`: its name, where it does not say a better one of itself; `name`: the engine in a sentence. `log`:
    HostConfig.LogConfig. `line`: how an end is waited for. `told_before_start`: whether it can be waited for before the
    start. `ends_containers`: whether a stop or a start of the engine ends its containers (`vouch`).
    `seen_killed_when_removed`: whether one that is removed while it runs is seen as killed before it is gone.
    `tells_out_of_memory`: whether it says of a container that it was killed for memory.
    `remembered`: the query that makes GET /events answer with what is remembered, and end; `remembered_filters`: with
    what it is narrowed. `network_options`: of the own bridge network for jobs. `own_network`: a network mode that is
    better than that network, if any. `gpu_driver`, `gpu_prefix`: of a DeviceRequest; the driver None: the engine gives
    no GPU. `takes_runtime`: whether a container may have a runtime of its own. `rootless`: whether its user is no root,
    so that files of a container's root are that user's; `remapped`: whether containers have other users although its
    own is root (userns-remap). `removes_env`: whether a variable without a value takes the image's away.
    `floods_cost_it`: whether the engine itself copies what containers print (`flood`).
    `takes_filter`: whether a container may have a filter of system calls of the worker's. `missing`: the limits that it
    cannot hold. `limits_layers`: whether it may be able to hold a container's own layer to a size; that its disk is
    mounted for it (`pquota`) only shows when it is asked to.
    """

    kind: str = ""
    name: str = "the container engine"
    log: Mapping[str, Any] = field(
        default_factory=lambda: {
            "Type": "local",
            "Config": {"max-size": f"{FILE_BYTES >> 20}m", "max-file": str(FILES)},
        }
    )
    line: type[Line] = Line
    told_before_start: bool = True
    ends_containers: bool = True
    seen_killed_when_removed: bool = False
    tells_out_of_memory: bool = True
    remembered: Mapping[str, str] = field(default_factory=lambda: {"since": "0", "until": "0"})
    remembered_filters: Mapping[str, list[str]] = field(default_factory=lambda: dict(FILTERS))
    network_options: Mapping[str, str] = field(default_factory=lambda: {_ICC: "false"})
    own_network: str | None = None
    gpu_driver: str | None = ""
    gpu_prefix: str = ""
    takes_runtime: bool = True
    rootless: bool = False
    remapped: bool = False
    removes_env: bool = True
    floods_cost_it: bool = True
    takes_filter: bool = True
    missing: frozenset[Limit] = frozenset()
    limits_layers: bool = False

    @property
    def gives_gpus(self) -> bool:
        """Whether a container can have a GPU."""
        return self.gpu_driver is not None

    @property
    def keeps_apart(self) -> bool:
        """Whether jobs on the own network cannot reach each other."""
        return bool(self.network_options) or self.own_network is not None

    def device_request(self, uuids: Sequence[str]) -> dict[str, Any]:
        """What gives a container these GPUs."""
        request: dict[str, Any] = {
            "DeviceIDs": [f"{self.gpu_prefix}{uuid}" for uuid in uuids],
            "Capabilities": [["gpu"]],
        }
        return request | ({"Driver": self.gpu_driver} if self.gpu_driver else {})

    def without_env(self, names: Sequence[str]) -> list[str]:
        """Entries of a container's environment by which it does not have these variables of its image. Podman reads one
        without a value from the environment of its own service, so there it is empty."""
        return [name if self.removes_env else f"{name}=" for name in names]

    def fitted(self, config: dict[str, Any]) -> dict[str, Any]:
        """A container's configuration (`box`) without the limits that this engine cannot hold."""
        dropped = {key for limit in self.missing for key in _HOST_CONFIG[limit]}
        kept = {key: value for key, value in config["HostConfig"].items() if key not in dropped}
        return {**config, "HostConfig": kept}

    def notes(self, *, own_network: bool, gpus: bool) -> tuple[str, ...]:
        """What the machine's owner must know before jobs run here, a sentence each.

        `own_network`: jobs get the own network (JOB_NETWORK=bridge). `gpus`: this machine has GPUs to give.
        """
        return tuple(
            sentence
            for sentence, holds in (
                (_UNLIMITED.format(limits=_listed(self.missing), name=self.name), bool(self.missing)),
                (_TOGETHER.format(name=self.name), own_network and not self.keeps_apart),
                (_NO_GPUS.format(name=self.name), gpus and not self.gives_gpus),
            )
            if holds
        )


DOCKER = Flavour()

_UNLIMITED = (
    "jobs run here without a limit on {limits}: {name} has no control group of its own for that. It needs root rights, "
    "or control groups v2 and a delegation by systemd (Delegate=cpu memory pids in user@.service)"
)
_TOGETHER = (
    "jobs that run here at the same time can reach each other: {name} cannot keep the containers of one network apart. "
    "JOB_NETWORK=slirp4netns gives each job a network of its own, JOB_NETWORK=none none at all"
)
_NO_GPUS = (
    "no GPU is offered: {name} hands out none through its Docker-compatible API. Podman does from 5.4 on (with a CDI "
    "specification: nvidia-ctk cdi generate --device-name-strategy=uuid --output=/etc/cdi/nvidia.yaml)"
)


def docker_flavour(info: Mapping[str, Any]) -> Flavour:
    """Docker, of its answer to GET /info."""
    options = {str(option).split(",")[0] for option in info.get("SecurityOptions") or ()}
    rootless = "name=rootless" in options
    name = "Docker without root rights" if rootless else "Docker"
    missing = frozenset(limit for limit, key in _INFO.items() if info.get(key) is False)
    status = {str(pair[0]): str(pair[1]) for pair in info.get("DriverStatus") or () if len(pair) == 2}
    return Flavour(
        name=name,
        rootless=rootless,
        remapped="name=userns" in options,
        takes_filter=_takes_filter(info),
        missing=missing,
        # Docker Engine, "Set storage driver options per container": of overlay2 only over XFS.
        limits_layers=info.get("Driver") == "overlay2" and status.get("Backing Filesystem") == "xfs",
    )


def _takes_filter(info: Mapping[str, Any]) -> bool:
    """Whether this Docker filters system calls, and its owner has not named a filter of his own for all containers."""
    for option in info.get("SecurityOptions") or ():
        name, *more = str(option).split(",")
        if name == "name=seccomp":
            return not more or more[0] in {"profile=default", "profile=builtin", "profile=unconfined"}
    return False


def podman_flavour(version: str, info: Mapping[str, Any]) -> Flavour:
    """Podman of that version, of its own answer to GET /libpod/info."""
    host = info.get("host") or {}
    rootless = bool((host.get("security") or {}).get("rootless"))
    there = host.get("cgroupControllers")
    cdi = _numbers(version) >= (5, 4)
    return Flavour(
        kind="Podman",
        name=f"Podman {version}{' without root rights' if rootless else ''}",
        log={"Type": "k8s-file", "Config": {"max-size": f"{FILES * FILE_BYTES >> 20}m"}},
        line=PollingLine,
        told_before_start=False,
        ends_containers=False,
        seen_killed_when_removed=True,
        tells_out_of_memory=_numbers(version) >= (5, 0),
        remembered={"stream": "false"},
        remembered_filters={"type": ["container"]},  # it knows no `die` before 4.4, and has few events of a container
        network_options={},
        own_network="private" if rootless else None,
        gpu_driver="cdi" if cdi else None,
        gpu_prefix="nvidia.com/gpu=" if cdi else "",
        takes_runtime=False,
        removes_env=False,
        takes_filter=False,
        floods_cost_it=False,  # its conmon does, one for each container, and keeps less than is looked for
        rootless=rootless,
        # A Podman that says nothing of controllers is taken to have them all.
        missing=frozenset() if there is None else frozenset(x for x, name in _CONTROLLERS.items() if name not in there),
    )


def _numbers(version: str) -> tuple[int, ...]:
    """`5.4.0-dev` as (5, 4): major and minor. Nothing that is no number counts."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _listed(limits: frozenset[Limit]) -> str:
    words = [limit.value for limit in Limit if limit in limits]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
