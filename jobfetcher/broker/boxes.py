"""Which containers may be made: those that the worker would make itself, of the same few things (FAULTS.md T11, T33).

Pure; used by `rules`. What a client sends is read for what a job may choose and no more: image, command, environment,
cores, memory and GPUs. Of these the container's configuration is made again by the code that the worker has for that
(`build_run_spec`, `box`), under the policy of the machine's owner, and what was sent must be equal to it, field by
field. So there is no second list of what is allowed, that could fall behind the first; every field that `box` does not
make is refused because it is not there; and what goes to the engine is what was made here, never what was sent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobfetcher.broker.talk import Refusal
from jobfetcher.core.errors import JobfetcherError
from jobfetcher.core.job import Job, JobId, parse_job_id
from jobfetcher.core.machine import Gpu, Share
from jobfetcher.core.run import Image, RunSpec
from jobfetcher.core.text import clean
from jobfetcher.engine import give_back
from jobfetcher.engine.box import box
from jobfetcher.engine.flavour import Flavour
from jobfetcher.engine.image_config import changed_env
from jobfetcher.engine.run_spec import (
    LABEL_INSTANCE,
    BoxPolicy,
    against_image,
    build_proof_spec,
    build_run_spec,
)
from jobfetcher.engine.volumes import MOUNT_POINT

_MIB = 1024 * 1024
_NANO = 1e9

#: A GPU by its UUID, or a part of one (nvidia-smi -L); never `all`, nor a number, which may mean another one tomorrow.
_GPU = re.compile(r"(?:GPU|MIG)-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_PROOF_NAME = re.compile(r"proof-[0-9a-f]{12}")
_HELPER_NAME = re.compile(r"own-[0-9a-f]{12}")
_JOB_NAME = re.compile(r"(?P<job>.+)-(?P<attempt>[1-9]\d{0,18}|0)")

#: The program of the worker's own box: its file in the mounted directory, or the engine's init itself (`engine.proof`).
_PROOF_FILE = re.compile(re.escape(MOUNT_POINT) + r"/proof-[0-9a-f]{16}")
_PROOF_INIT = ["/sbin/docker-init", "-h"]
_SMI = "/usr/bin/nvidia-smi"
_PROOF_FOLDER = "proof"

_VISIBLE = "NVIDIA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Policy:
    """What the machine's owner lets a worker have made.

    `host_base`: PATH_BASE as the engine's host sees it; `second_base`: another name of it that a worker may use
    (`engine.second_name`), or nothing. `gpus`: UUIDs that may be given, None: any GPU, by its UUID.
    """

    instance: str
    host_base: str
    box: BoxPolicy = field(default_factory=BoxPolicy)
    gpus: frozenset[str] | None = None
    second_base: str = ""

    @property
    def bases(self) -> tuple[str, ...]:
        """The names that PATH_BASE may have in a mount, the usual one last."""
        return tuple(base for base in (self.second_base, self.host_base) if base)

    @property
    def prefix(self) -> str:
        """How the names of this worker's containers begin."""
        return f"jobfetcher-{self.instance}-"


@dataclass(frozen=True, slots=True)
class Machine:
    """The most that one container may have, and how its engine is spoken to."""

    cpu_cores: float
    memory_mib: int
    flavour: Flavour
    architecture: str = "amd64"


@dataclass(frozen=True, slots=True)
class Made:
    """A container that may be made: its configuration, but for the sources of its mounts, which are at `ways` below
    PATH_BASE, in the order of the mounts.

    `unlimited_layer`: the worker left the limit on its layer out, as it does once an engine could not hold one; whether
    that is so, the engine must say again.
    """

    config: dict[str, Any]
    ways: tuple[tuple[str, ...], ...]
    unlimited_layer: bool = False

    def mounted_from(self, places: list[str]) -> dict[str, Any]:
        """The configuration with these sources."""
        mounts = [
            {**mount, "Source": place} for mount, place in zip(self.config["HostConfig"]["Mounts"], places, strict=True)
        ]
        return {**self.config, "HostConfig": {**self.config["HostConfig"], "Mounts": mounts}}


class _Free(BaseModel):
    """Of a part of the body, what is not the same in every container. The rest is compared, not read."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _Mount(_Free):
    source: str = Field(alias="Source")


class _Gpus(_Free):
    uuids: list[str] = Field(alias="DeviceIDs", min_length=1, max_length=64)


class _Host(_Free):
    mounts: list[_Mount] = Field(alias="Mounts", min_length=1)
    network: str = Field(alias="NetworkMode")
    shm: int = Field(alias="ShmSize", ge=0)
    memory: int | None = Field(None, alias="Memory", gt=0)
    nano_cpus: int | None = Field(None, alias="NanoCpus", gt=0)
    gpus: list[_Gpus] | None = Field(None, alias="DeviceRequests", min_length=1, max_length=1)
    layer: dict[str, str] | None = Field(None, alias="StorageOpt")


class Asked(_Free):
    """What a container is to be made of."""

    image: str = Field(alias="Image", pattern=r"^sha256:[0-9a-f]{64}$")
    env: list[str] = Field(alias="Env", max_length=10_000)
    command: list[str] | None = Field(None, alias="Cmd")
    host: _Host = Field(alias="HostConfig")


def read(body: Any) -> Asked:
    """The free parts of a body. Raises Refusal."""
    try:
        return Asked.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Refusal(403, f"create: {clean(where, 100)}: {first['msg'][:100]}") from None


def make(
    name: str,
    body: Mapping[str, Any],
    asked: Asked,
    *,
    policy: Policy,
    machine: Machine,
    image: Callable[[], Image],
    own_image: Literal["", "proof", "helper"],
    client: str,
    network_mode: str,
) -> Made:
    """The container of that name, made anew. `image`: what is known of `asked.image`, if a job may run on it.
    `own_image`: it is one of the worker's own instead. `client`: who asks, as `uid:gid`.

    Raises Refusal for everything that is not just what the worker makes.
    """
    if not name.startswith(policy.prefix):
        raise Refusal(403, f"create: the name must begin with {policy.prefix}")
    rest = name.removeprefix(policy.prefix)
    try:
        if _PROOF_NAME.fullmatch(rest):
            spec, ways = _proof(name, asked, policy, machine, None if own_image == "proof" else image())
        elif _HELPER_NAME.fullmatch(rest) and own_image == "helper":
            spec, ways = _helper(name, asked, policy, machine, client)
        elif found := _JOB_NAME.fullmatch(rest):
            spec, ways = _job(JobId(found["job"]), int(found["attempt"]), asked, policy, machine, image())
        else:
            raise Refusal(403, "create: the name is none of a job's container")
        made = (
            give_back.config(spec, machine.flavour)
            if own_image == "helper"
            else box(spec, network_mode, machine.flavour)
        )
    except (JobfetcherError, ValueError) as error:
        raise Refusal(403, f"create: {clean(str(error), 200)}") from None
    if spec.command == ("-L",):
        made["Entrypoint"] = [_SMI]
    if where := difference(made, body):
        raise Refusal(403, f"create: {where}")
    is_job = not own_image and spec.command != ("-L",)
    return Made(made, ways, is_job and policy.box.layer_mib is not None and not asked.host.layer)


def _job(
    job_id: JobId, attempt: int, asked: Asked, policy: Policy, machine: Machine, image: Image
) -> tuple[RunSpec, tuple[tuple[str, ...], ...]]:
    parse_job_id(job_id)
    share = _share(asked, policy, machine, _requested(asked))
    command = asked.command
    if command is not None and (len(command) != 3 or command[:2] != ["/bin/sh", "-c"]):
        raise ValueError("Cmd: a job's command is run by /bin/sh -c")
    way = ("jobs", job_id, "files")
    spec = build_run_spec(
        Job(id=job_id, image="any", command=tuple(command[2:]) if command else (), env=_job_env(asked, image, share)),
        share,
        image=image,
        files_host_path=_host_path(asked, policy, way),
        attempt=attempt,
        instance=policy.instance,
        policy=policy.box if asked.host.layer else replace(policy.box, layer_mib=None),
    )
    return spec, (way, *((*way, *folder.split("/")) for folder in spec.folders))


def _proof(
    name: str, asked: Asked, policy: Policy, machine: Machine, image: Image | None
) -> tuple[RunSpec, tuple[tuple[str, ...], ...]]:
    """The worker's own box (`engine.proof`); `image` None: on the empty one."""
    env = _env(asked)
    # One that is shown without its GPUs keeps the variable that names them.
    uuids = tuple(uuid for uuid in env.get(_VISIBLE, "").split(",") if uuid not in {"", "void"})
    share = _share(asked, policy, machine, uuids)
    way = (_PROOF_FOLDER,)
    spec = build_proof_spec(share, files_host_path=_host_path(asked, policy, way), policy=policy.box)
    spec = replace(spec, name=name, labels={LABEL_INSTANCE: policy.instance}, image_id=asked.image)
    command = asked.command or []
    if image is not None:
        spec = against_image(spec, image)
        spec = replace(spec, env={**spec.env, "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}, command=("-L",))
    elif command == _PROOF_INIT or (len(command) == 1 and _PROOF_FILE.fullmatch(command[0])):
        spec = replace(spec, command=tuple(command))
    else:
        raise ValueError("Cmd: the worker's own box runs the engine's init, or its file in /files")
    if image is None and not asked.host.gpus:
        spec = replace(spec, gpu_uuids=())
    return spec, (way,)


def _helper(
    name: str, asked: Asked, policy: Policy, machine: Machine, client: str
) -> tuple[RunSpec, tuple[tuple[str, ...], ...]]:
    """The box that gives the files of one job back (`engine.give_back`), to whoever asks and nobody else."""
    source = asked.host.mounts[0].source
    base = next((base for base in policy.bases if source.startswith(f"{base}/jobs/")), policy.host_base)
    way = tuple(source.removeprefix(f"{base}/").split("/"))
    if not way[1:] or way[2:] not in {(), ("files",)} or way[0] != "jobs" or way[1] in {"", ".", ".."}:
        raise ValueError("HostConfig.Mounts: the helper gets the directory of one job")
    owner = "0:0" if machine.flavour.rootless else client
    spec = give_back.spec(policy.box, image_id=asked.image, host_path="/".join((base, *way)), owner=owner, name=name)
    return replace(spec, labels={LABEL_INSTANCE: policy.instance}), (way,)


def _share(asked: Asked, policy: Policy, machine: Machine, uuids: tuple[str, ...]) -> Share:
    """What the container is to have of the machine. Raises ValueError where that is more than there is."""
    memory = asked.host.memory
    if memory is None:  # an engine that cannot limit it, where only half of it is said (`build_run_spec`)
        memory = 2 * asked.host.shm
    if memory % _MIB or memory > machine.memory_mib * _MIB:
        raise ValueError(f"HostConfig.Memory is in whole MiB and at most this machine's {machine.memory_mib}")
    cores = machine.cpu_cores if asked.host.nano_cpus is None else (asked.host.nano_cpus + 0.5) / _NANO
    if int(cores * _NANO) > machine.cpu_cores * _NANO:
        raise ValueError(f"HostConfig.NanoCpus is at most this machine's {machine.cpu_cores:g} cores")
    for uuid in uuids:
        if not _GPU.fullmatch(uuid) or (policy.gpus is not None and uuid not in policy.gpus):
            raise ValueError(f"HostConfig.DeviceRequests: {clean(uuid, 50)} is no GPU that may be given (GPUS)")
    if len(set(uuids)) != len(uuids):
        raise ValueError("HostConfig.DeviceRequests: a GPU stands twice")
    return Share(cores, memory // _MIB, tuple(Gpu(uuid, "", 0, "") for uuid in uuids))


def _requested(asked: Asked) -> tuple[str, ...]:
    return tuple(asked.host.gpus[0].uuids) if asked.host.gpus else ()


def _env(asked: Asked) -> dict[str, str]:
    """The variables that have a value; what stands without one takes the image's away."""
    return {name: value for name, equals, value in (entry.partition("=") for entry in asked.env) if equals}


def _job_env(asked: Asked, image: Image, share: Share) -> dict[str, str]:
    """What of the environment came from the job: not what is set against the image, nor what the worker adds."""
    changed, _ = changed_env(image.env, gpus=bool(share.gpus))
    return {name: value for name, value in _env(asked).items() if name != _VISIBLE and changed.get(name) != value}


def _host_path(asked: Asked, policy: Policy, way: tuple[str, ...]) -> str:
    """The source that the first mount must have: the directory by the name that the worker has for PATH_BASE."""
    paths = ["/".join((base, *way)) for base in policy.bases]
    return next((path for path in paths if asked.host.mounts[0].source == path), paths[-1])


def difference(made: Any, sent: Any, where: str = "") -> str:
    """In which field what was sent is not what was made, in a sentence; nothing where they are the same."""
    if isinstance(made, dict) and isinstance(sent, dict):
        for name in sent:
            if name not in made:
                return f"{clean(f'{where}.{name}'.lstrip('.'), 100)} is no field of such a container"
        for name, value in made.items():
            if name not in sent:
                return f"{where}.{name} is missing".lstrip(".")
            if found := difference(value, sent[name], f"{where}.{name}".lstrip(".")):
                return found
        return ""
    if isinstance(made, list) and isinstance(sent, list) and len(made) == len(sent):
        for number, (one, other) in enumerate(zip(made, sent, strict=True)):
            if found := difference(one, other, f"{where}[{number}]"):
                return found
        return ""
    if type(made) is type(sent) and made == sent:
        return ""
    return f"{where} is not what the policy of this machine makes of it"
