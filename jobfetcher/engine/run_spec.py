"""What a job gets, decided: job + share + image + the machine owner's policy -> RunSpec. Pure.

Used by `build.py` (which binds the policy) for the runner. Promises: limits, capabilities, network, runtime and user
come from the policy and the share alone, never from the job (DESIGN.md "The job's box", FAULTS.md T11, T13).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jobfetcher.core.errors import ConfigError, JobFault, JobReason
from jobfetcher.core.job import Job, JobId
from jobfetcher.core.machine import Share
from jobfetcher.core.run import Image, RunSpec
from jobfetcher.core.text import clean
from jobfetcher.engine.image_config import blanked, changed_env, loader_value
from jobfetcher.engine.volumes import inner_folders, outer_volumes

LABEL_INSTANCE = "jobfetcher.instance"
LABEL_JOB = "jobfetcher.job"
LABEL_ATTEMPT = "jobfetcher.attempt"

#: The bridge network that the engine makes for jobs, with traffic between containers off.
OWN_NETWORK = "jobfetcher"

#: What a job's root may still do, inside its box only: own, read and signal its files and processes, change user.
#: Of Docker's default these are missing: AUDIT_WRITE, MKNOD, NET_BIND_SERVICE, NET_RAW, SETFCAP, SETPCAP, SYS_CHROOT.
BASE_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID")

#: Docker refuses less ("Minimum memory limit allowed is 6MB").
_MIN_MEMORY_MIB = 6

#: Docker refuses less than a hundredth of a core.
_MIN_CORES = 0.01

#: Linux takes no longer argument or environment string (MAX_ARG_STRLEN, execve(2)), its closing NUL included.
_MAX_STRING = 131_072

#: Names that say which devices a container sees, or that steer the engine's client. A job has no say in either. What is
#: left of LD_* in a job that gets GPUs: `image_config.loader_value`.
_REFUSED_ENV = ("NVIDIA_", "DOCKER_")


@dataclass(frozen=True, slots=True)
class BoxPolicy:
    """What the machine's owner lets every job have. Raises ConfigError for what would open the box.

    `cpu_shares`: below the engine's 1024, so that the worker wins when the processor is short. `shm_mib` None: half of
    the job's memory, like Linux's own /dev/shm (it counts within the memory limit). `network` None: none at all.
    `gpu_runtime`: the runtime for jobs that hold a GPU, where it differs from `runtime`.
    `own_filter`: the worker's filter of system calls, where the engine takes one, instead of the engine's own.
    """

    cap_add: tuple[str, ...] = ()
    cpu_shares: int = 512
    shm_mib: int | None = None
    pids_limit: int = 4096
    network: str | None = OWN_NETWORK
    runtime: str | None = None
    gpu_runtime: str | None = None
    user: str | None = None
    read_only: bool = False
    own_filter: bool = True
    layer_mib: int | None = None

    def __post_init__(self) -> None:
        if self.network in {"", "host"} or (self.network or "").startswith("container:"):
            raise ConfigError(
                f"JOB_NETWORK={self.network} would put jobs into another network namespace than their own"
            )
        if self.pids_limit <= 0:  # the engine reads 0 and below as unlimited
            raise ConfigError(f"a job's process limit must be above 0, not {self.pids_limit}")


def build_run_spec(
    job: Job,
    share: Share,
    *,
    image: Image,
    files_host_path: str,
    attempt: int,
    instance: str,
    policy: BoxPolicy,
) -> RunSpec:
    """Everything the engine needs to run `job`. `files_host_path` is the job directory on the engine's host.

    Raises JobFault(CANNOT_START) for what is too long for Linux, and for volumes that no container can have.
    """
    memory_mib = max(share.memory_mib, _MIN_MEMORY_MIB)
    command = _command(job)
    changed, removed = changed_env(image.env, gpus=bool(share.gpus))
    env = changed | _env(job, share)
    return RunSpec(
        job_id=job.id,
        name=container_name(instance, job.id, attempt),
        labels=blanked(image.labels) | {LABEL_INSTANCE: instance, LABEL_JOB: job.id, LABEL_ATTEMPT: str(attempt)},
        image_id=image.id,
        command=command,
        env=env,
        files_host_path=files_host_path,
        cpu_cores=max(share.cpu_cores, _MIN_CORES),
        cpu_shares=policy.cpu_shares,
        memory_mib=memory_mib,
        shm_mib=policy.shm_mib if policy.shm_mib is not None else memory_mib // 2,
        pids_limit=policy.pids_limit,
        gpu_uuids=tuple(gpu.uuid for gpu in share.gpus),
        runtime=(policy.gpu_runtime if share.gpus else None) or policy.runtime,
        network=policy.network,
        user=policy.user,
        read_only=policy.read_only,
        own_filter=policy.own_filter,
        cap_add=tuple(sorted({*BASE_CAPABILITIES, *policy.cap_add})),
        folders=inner_folders(image.volumes),
        volumes=outer_volumes(image.volumes),
        init=not (image.own_init == "entry point" or (image.own_init == "command" and command is None)),
        # NVIDIA_VISIBLE_DEVICES is not withheld: the job has it, with what it was given.
        withheld=tuple(
            name for name in dropped_env(job.env, gpus=bool(share.gpus)) if name != "NVIDIA_VISIBLE_DEVICES"
        ),
        unset=tuple(name for name in removed if name not in env),
        layer_mib=policy.layer_mib,
    )


def build_proof_spec(share: Share, *, files_host_path: str, policy: BoxPolicy) -> RunSpec:
    """A box of the worker's own, as a job's is made that says nothing for itself (`Engine.prove`)."""
    return build_run_spec(
        Job(id=JobId("proof"), image="none"),
        share,
        image=Image(id="", reference="none", digest=None, architecture=""),
        files_host_path=files_host_path,
        attempt=0,
        instance="",
        policy=replace(policy, layer_mib=None),  # whether that can be held is found out with a job's container
    )


def container_name(instance: str, job_id: JobId, attempt: int) -> str:
    """The name of a job's container. Deterministic, so that a lost reply can be found again (FAULTS.md J2)."""
    return f"jobfetcher-{instance}-{job_id}-{attempt}"


def against_image(spec: RunSpec, image: Image) -> RunSpec:
    """A box of the worker's own that runs on a job's image: of that, no more comes along than with a job."""
    changed, removed = changed_env(image.env, gpus=bool(spec.gpu_uuids))
    env = changed | dict(spec.env)
    unset = tuple(name for name in removed if name not in env)
    return replace(spec, labels=blanked(image.labels) | dict(spec.labels), env=env, unset=unset)


def dropped_env(env: Mapping[str, str], *, gpus: bool) -> tuple[str, ...]:
    """Names in a job's environment that it does not get, for a warning. `gpus`: it gets GPUs (`loader_value`)."""
    return tuple(sorted(env.keys() - _kept(env, gpus=gpus).keys()))


def _command(job: Job) -> tuple[str, ...] | None:
    if not job.command:
        return None
    return ("/bin/sh", "-c", _checked("command", " ".join(job.command)))


def _checked(what: str, text: str) -> str:
    size = len(text.encode()) + 1
    if size > _MAX_STRING:
        raise JobFault(
            JobReason.CANNOT_START, f"the {what} has {size:,} bytes; Linux takes at most {_MAX_STRING:,} in one piece"
        )
    return text


def _env(job: Job, share: Share) -> dict[str, str]:
    env = _kept(job.env, gpus=bool(share.gpus))
    for name, value in env.items():
        _checked(f"environment variable {clean(name, 80)}", f"{name}={value}")
    # `void`: no device at all, even where the image asks for all of them (FAULTS.md T13).
    env["NVIDIA_VISIBLE_DEVICES"] = ",".join(gpu.uuid for gpu in share.gpus) or "void"
    return env


def _kept(env: Mapping[str, str], *, gpus: bool) -> dict[str, str]:
    kept = {}
    for name, value in env.items():
        safe = loader_value(name, value) if gpus else value
        if safe is not None and not name.startswith(_REFUSED_ENV):
            kept[name] = safe
    return kept
