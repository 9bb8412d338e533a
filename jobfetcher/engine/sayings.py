"""What an engine says when a container cannot be created or started, and whose fault that is. Pure.

Used by `docker` (a job's container) and `proof` (the worker's own). An engine quotes names in what it says that a job
or its image chose: its user, its working directory, its program. They may spell anything, such as
`/opt/nvidia: no space left on device`, so a saying is known by the whole of its own words around such a name, never by
a word that may stand in it (FAULTS.md E8, E14, J5). What quotes a name without marks (`unable to find user NAME: no
matching entries in passwd file`) is looked for first; the others are looked for in what is left without quoted text.

Sources: moby 20.10 and 28 (daemon/create.go, start.go, oci_linux.go, nvidia_linux.go, errors.go), runc 1.1
(libcontainer/init_linux.go, user/user.go), libnvidia-container 1.14 (src/error.c). Each row of the tables is tried in
tests/unit/test_sayings.py on what engines really said.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Protocol

from jobfetcher.core.errors import ConfigError, JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.text import clean


class Policy(Protocol):
    """What of a container the machine's owner chose, not the job: a RunSpec or a BoxPolicy."""

    @property
    def user(self) -> str | None: ...

    @property
    def network(self) -> str | None: ...

    @property
    def runtime(self) -> str | None: ...

    @property
    def cap_add(self) -> Sequence[str]: ...


#: docker-init (tini) starts the job's program; when it cannot, it prints one line and exits 126, 127 or 1. Podman's
#: init (catatonit) exits 1, and does not say which program it was.
INIT_FAILED = re.compile(
    r"(?:\[FATAL tini \(\d+\)\] exec (?P<program>.*) failed|ERROR \(catatonit:\d+\): failed to exec pid1): (?P<why>.*)"
)

#: What is printed instead when not even the init can be run (execve(2), E2BIG): by runc, and by crun in other words, as
#: a line of JSON, for Podman has it write its log so.
TOO_LONG = re.compile(
    r'exec \S+: argument list too long|(?:\{"msg":")?exec container process `\S+`: Argument list too long(?:",.*\})?'
)

#: Linux takes a quarter of the limit for the stack, which is 8 MiB as a rule (execve(2)).
ARGUMENTS = "command and environment together are longer than Linux takes (2 MiB as a rule); use a file for so much"

#: Said where nothing is to be run.
NO_COMMAND = "neither the job nor the image says what to run"

#: What runc or crun prints into a container's log, as its only line, when the engine's own init cannot be run in it.
INIT_BROKEN = re.compile(
    r'(?:\{"msg":")?exec (?:container process (?:\(.*?\) )?)?`?(?:/sbin/docker-init|/dev/init|/run/podman-init)`?: '
    r'(?P<why>.*?)(?:",.*\})?'
)

_RUNC_FAILED = re.compile(r'exec: "(?P<program>[^"]*)": (?P<why>.*?)(?:: unknown)?$')

#: The same of crun, which is Podman's runtime as a rule.
_CRUN_FAILED = re.compile(r"^crun: (?:executable file|the path) `(?P<program>.*)` (?P<why>.*)$", re.DOTALL)

#: With `Init` the first program of a box is the engine's own init, whatever the job's is: docker-init, or catatonit.
_INITS = {"docker-init", "/sbin/docker-init", "catatonit", "/dev/init", "/run/podman-init"}

#: Text between quotation marks; with what follows a mark that is never closed. crun puts names between backticks.
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*(?:"|$)|`[^`]*`')

_UNKNOWN_USER = re.compile(
    r"(?:^|: )unable to find (?P<kind>user|group) (?P<name>.*): no matching entries in (?:passwd|group) file",
    re.IGNORECASE | re.DOTALL,
)

#: An image's working directory that cannot be made or entered, the whole of what is said: it quotes the name bare.
_WORKDIR_BROKEN = re.compile(
    r"^cannot mkdir: |(?:^|: )chdir to cwd \(|^(?:creating container \S+ workdir: )?"
    r"(?:lstat|stat|mkdir) /.*/(?:merged|rootfs|fs)/.*: "
    r"(?:not a directory|file name too long|too many levels of symbolic links)$",
    re.IGNORECASE | re.DOTALL,
)

#: What names no setting: said of a container whose runtime, init, network or device the machine does not have.
_RUNTIME_BROKEN = (
    r"unable to retrieve OCI runtime error|failed to start shim|shim .*not installed|binary not installed"
    r"|failed to create shim: .*fork/exec"
)

#: What Podman says without the program that gives a container a network of its own: pasta, and slirp4netns before 5.0.
_NETWORK_BROKEN = re.compile(r"^could not find (?P<program>\S+), the network namespace can't be ")

#: In the order in which they are looked for, in what is said without quoted text: whose fault, and a sentence.
_SAYINGS: tuple[tuple[re.Pattern[str], JobReason | WorkerReason, str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), reason, sentence)
    for pattern, reason, sentence in (
        (
            r'^invalid mount config for type "": bind source path does not exist',
            WorkerReason.DISK,
            "the engine does not see the job's directory",
        ),
        (r": no space left on device(?:: unknown)?\.?$", WorkerReason.DISK, "the engine's disk is full"),
        (
            r'(?:^|: |\n)could not select device driver ""'
            r"|(?:^|: |\n)nvidia-container-(?:cli|runtime)[a-z.-]*: "
            r"|(?:^|: )(?:CDI device injection failed|unresolvable CDI devices|failed to inject CDI devices)"
            r"|(?:^|: )error gathering device information while adding custom device"
            r"|(?:^|: )unknown device(?:: unknown)?$",
            WorkerReason.GPU,
            "the GPU cannot be given",
        ),
        (
            r"^no command specified|^container create: no command or entrypoint provided",
            JobReason.CANNOT_START,
            NO_COMMAND,
        ),
    )
)

#: What a setting of the machine's owner makes an engine say: the setting, its value of a policy, and the cure.
_SETTINGS: tuple[tuple[re.Pattern[str], str, str | None, str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), setting, attribute, cure)
    for pattern, setting, attribute, cure in (
        (
            r"^(?:container create: )?(?:network .* not found|unable to find network with name or ID .*)",
            "JOB_NETWORK",
            "network",
            "the engine has no such network (`docker network ls` shows those it has)",
        ),
        (
            r"^(?:unknown runtime specified|(?:unknown or )?invalid runtime name)"
            r'|(?:^|: )(?:default )?OCI runtime "" not found',
            "JOB_RUNTIME",
            "runtime",
            "the engine has no such runtime (`docker info` shows those it has)",
        ),
        (
            r"^invalid CapAdd: |^.*unknown capability",
            "JOB_CAP_ADD",
            "cap_add",
            "the engine knows no such capability (capabilities(7) lists them, such as SYS_PTRACE)",
        ),
        (r"(?:^|\W)(?:HostConfig\.)*ShmSize\b|^shm size\b", "JOB_SHM_SIZE", None, "the engine takes no such size"),
    )
)


def start_fault(said: str, policy: Policy) -> JobFault | WorkerFault:
    """What a failed create or start of a job means. What nobody here has seen before is the engine's trouble, not the
    job's; what the machine's owner chose wrongly is this machine's fault as well."""
    if wrong := setting_fault(said, policy):
        return WorkerFault(WorkerReason.ENGINE, str(wrong))
    if unknown := _UNKNOWN_USER.search(said):
        who = f"the image has no {unknown['kind'].lower()} {clean(unknown['name'], 80)}"
        return JobFault(JobReason.CANNOT_START, f"the container cannot start, its user is unknown: {who}")
    bare = _QUOTED.sub('""', said)
    if _WORKDIR_BROKEN.search(bare):
        where = f"the image's working directory is unusable: {clean(said, 300)}"
        return JobFault(JobReason.CANNOT_START, f"the container cannot start, {where}")
    if re.search(_RUNTIME_BROKEN, bare, re.IGNORECASE):
        return WorkerFault(WorkerReason.ENGINE, f"the engine's runtime for containers is broken: {clean(said, 300)}")
    if lacks := _NETWORK_BROKEN.search(said):
        return WorkerFault(WorkerReason.ENGINE, f"the engine lacks {lacks['program']}, which gives jobs their networks")
    if failed := _RUNC_FAILED.search(said) or _CRUN_FAILED.search(said):
        if failed["program"] in _INITS and "argument list too long" not in failed["why"].lower():
            return init_fault(failed["why"])
        return JobFault(JobReason.CANNOT_START, cannot_run(failed["program"], failed["why"]))
    for pattern, reason, sentence in _SAYINGS:
        if pattern.search(bare):
            message = f"the container cannot start, {sentence}: {clean(said, 300)}"
            return JobFault(reason, message) if isinstance(reason, JobReason) else WorkerFault(reason, message)
    return WorkerFault(WorkerReason.ENGINE, f"the container engine could not start a container: {clean(said, 300)}")


def setting_fault(said: str, policy: Policy, known: Sequence[str] = ()) -> ConfigError | None:
    """The setting that makes the engine say so, named with its value and a cure; None where it is none.

    `known`: names that the engine has, for a suggestion.
    """
    if unknown := _UNKNOWN_USER.search(said):
        if policy.user is None or unknown["name"] not in policy.user.split(":"):
            return None
        return ConfigError(
            f"JOB_USER={policy.user}: images need not know the {unknown['kind'].lower()} {unknown['name']}; "
            "write numbers, such as JOB_USER=1000:1000 (`id -u` and `id -g` of that user)"
        )
    bare = _QUOTED.sub('""', said)
    if _WORKDIR_BROKEN.search(bare):
        return None
    for pattern, setting, attribute, cure in _SETTINGS:
        if not pattern.search(bare):
            continue
        chosen = getattr(policy, attribute) if attribute else None
        if attribute and not any(one in said for one in ([chosen] if isinstance(chosen, str) else chosen or ())):
            continue  # the engine speaks of something else
        value = chosen if isinstance(chosen, str) else None
        like = difflib.get_close_matches(value, known, 1) if value else []
        meant = f"; is {like[0]} meant?" if like else ""
        given = f"{setting}={value}" if value else setting
        return ConfigError(f"{given}: {cure}{meant}" if value else f"{given}: {cure}: {clean(said, 200)}")
    return None


def init_fault(why: str) -> WorkerFault:
    """The engine's own init cannot be run in a box: not there, or linked to libraries that images do not have."""
    return WorkerFault(
        WorkerReason.ENGINE,
        f"the engine's init cannot be run in a container ({clean(why, 150)}); install a statically linked docker-init "
        "(Debian: package tini or docker-ce, Podman: catatonit) and restart the engine",
    )


#: What a person can do about a machine that cannot start containers, by what its engine says.
_CURES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), cure)
    for pattern, cure in (
        (
            r"address pool",
            "remove networks that nobody uses (docker network prune), or give the engine more (default-address-pools)",
        ),
        (r"no space left on device", "make room on the engine's disk (docker system df shows what takes it)"),
        (r"logging plugin|log driver|logging driver", "the engine must have the log driver `local`"),
        (r"version mismatch", "the driver was updated under way: restart the machine"),
        (
            r"could not select device driver|nvidia-container|CDI device",
            "look whether NVIDIA's container toolkit is set up (nvidia-ctk runtime configure --runtime=docker) and "
            "restart the engine",
        ),
        (r"bind source path does not exist", "the engine must see PATH_BASE at that place: see PATH_HOST_BASE"),
        (r"iptables|no chain/target/match", "a firewall that was reloaded took the engine's rules: restart the engine"),
        (r"lacks pasta", "install it (package passt)"),
        (r"lacks slirp4netns", "install it (package slirp4netns)"),
        (r"cgroup", "look at the machine's control groups, and restart the engine"),
        (r"read-only file system", "look for errors of the engine's disk (dmesg)"),
    )
)


def with_cure(fault: WorkerFault) -> WorkerFault:
    """The same fault with what a person can do about it, where that is known."""
    message = str(fault)
    cure = next((cure for pattern, cure in _CURES if pattern.search(message)), "")
    return WorkerFault(fault.reason, f"{message}; {cure}") if cure else fault


def cannot_run(program: str, why: str) -> str:
    """One sentence for a program that could not be run. `why` is errno's text, or runc's."""
    program, why = clean(program, 200), clean(why, 200).lower()
    if "argument list too long" in why:
        return ARGUMENTS
    if "permission denied" in why:
        return f"{program} in the image is not a program that may be run"
    if "exec format error" in why:
        return f"{program} in the image is not made for this machine (exec format error)"
    if "no such file" in why or "not found" in why:
        return f"the image has no {program}"
    return f"{program} in the image cannot be run: {why}"
