"""A box of the worker's own: the machine shows that it can run a job before it takes one (FAULTS.md T23, E14).

Used by `docker` for `Engine.prove`. The box is made by `box.box`, as a job's is: same mount, network, log driver, init,
runtime, user, capabilities, /dev/shm, read-only root and GPUs. So what is wrong with one of these is found here and
not by six users' jobs, which this account would never get again (PROTOCOL.md S3).

What runs in it needs no program of ours and none of an image's. The image is an empty archive, and the program is a
file that the worker has just written into the mounted directory:

    #!/sbin/docker-init -h

The engine mounts its init into every box that asks for it (`Init`), and the kernel runs it as the interpreter of that
file. Exit 0 proves all of this at once: the engine has a network, a log driver, a runtime and an init; its init runs
where there is no library at all (one that is linked to libraries fails in most images too, or worse, in some); and
the engine mounts the very directory that we write to, for a file with a name that nobody else knows was found there.
A static program for each architecture, carried along, would prove no more; an image of a user's would prove less,
since it hides an init that needs libraries. The empty image weighs nothing and stays on the engine, as the network
for jobs does.

On a GPU machine the box gets the GPUs as a job does. Whether they can be used inside is said by `nvidia-smi -L`, which
NVIDIA's toolkit mounts into the box at /usr/bin, but which needs the C library of an image: for that a job's image is
named. The path is absolute, so that no program of that name in the image's PATH is asked.

Where the directory's file system forbids programs (`noexec`), the init is run itself: the mount is then proven only to
be there for the engine.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import secrets
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jobfetcher.core.errors import ConfigError, JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.run import RunSpec
from jobfetcher.core.text import clean
from jobfetcher.engine.api import EngineApi, NotFound, Refused
from jobfetcher.engine.sayings import INIT_BROKEN, INIT_FAILED, init_fault, setting_fault, start_fault
from jobfetcher.engine.volumes import MOUNT_POINT
from jobfetcher.pinned import shown

#: The image of the box: nothing in it. By this name it is found again.
IMAGE = "jobfetcher-proof:1"

#: How long the program in the box may take, in seconds. It takes 20 ms; a virtual machine (kata) starts in a few s.
_RUN_S = 30.0

#: The pause between two looks at whether it has ended, in seconds.
_LOOK_S = 0.05

#: What every box of ours is called with: where engines put their init, and by which name of the engine.
_INIT = "/sbin/docker-init"
_PODMAN_INITS = ("/run/podman-init", "/dev/init")

#: What the kernel and the init say when they cannot run a program.
_CANNOT_RUN = {126, 127}

#: Names and numbers that are other ones in every box: without them the same trouble is said in the same words (J10).
_CHANGES = re.compile(r"\b[0-9a-f]{12,64}\b|jobfetcher-[0-9a-z]+-proof-[0-9a-f]+|proof-[0-9a-f]{16}")

_SMI = "/usr/bin/nvidia-smi"

#: NVIDIA's toolkit writes a list of libraries into a container when its devices are there (libnvidia-container,
#: src/cli/configure.c). Where that fails, the image lacks what that takes, as our empty one may: the GPU was
#: given, and the rest of the box is shown without it.
_LAST_STEP = "nvidia-container-cli: ldcache error"

Config = Callable[[RunSpec], dict[str, Any]]


def prove(api: EngineApi, spec: RunSpec, config: Config, folder: Path) -> bool:
    """Run one box as `spec` says, but for its program, and see it work; it is gone afterwards. False: it cannot tell.

    `config` makes the engine's own words of a specification, the same as for a job (`box.box`). `folder`: where this
    process sees `spec.files_host_path`. With `spec.image_id`, what is run is `nvidia-smi -L` of
    that image's box; without, the program that the docstring above tells of, in the empty image.

    Raises ConfigError naming the setting that is wrong, WorkerFault(GPU, DISK or ENGINE) saying what to do.
    """
    if spec.image_id:
        return _prove_gpus(api, spec, config)
    spec = replace(spec, image_id=_image(api))
    failed: WorkerFault | None = None
    for init in _inits(api):
        with _program(folder, init) as command:
            try:
                code, said = _run(api, replace(spec, command=command), config)
            except WorkerFault as fault:
                if not spec.gpu_uuids or _LAST_STEP not in str(fault):
                    raise
                code, said = _run(api, replace(spec, command=command, gpu_uuids=()), config)
        if code == 0:
            return True
        failed = _fault(code, said, init, folder)
    assert failed is not None  # noqa: S101 - there is always one init at least
    raise failed


def _prove_gpus(api: EngineApi, spec: RunSpec, config: Config) -> bool:
    """Ask NVIDIA's own program in a box on an image of a job. One that cannot run it, or is gone, tells nothing."""
    # The toolkit mounts it where the container may use `utility`, which an image may have left out.
    env = {**spec.env, "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
    try:
        code, said = _run(api, replace(spec, command=("-L",), env=env), config, program=_SMI)
    except JobFault:
        return False
    if code in _CANNOT_RUN or INIT_FAILED.search(said):
        return False
    if code:
        why = clean(_steady(said), 200) or "it says nothing"
        raise WorkerFault(WorkerReason.GPU, f"nvidia-smi fails in a container (exit code {code}): {why}")
    return True


def _run(api: EngineApi, spec: RunSpec, config: Config, program: str = "") -> tuple[int, str]:
    """Create, start, wait, read and remove one box: its exit code, and what it printed last.

    `program`: what is run instead of the image's entry point. Raises JobFault where its image cannot run it.
    """
    made = config(spec)
    if program:
        made["Entrypoint"] = [program]
    with api.calling("run a container for a test"):
        try:
            created = api.create(made, spec.name)
        except Refused as error:
            raise _refusal(api, error, spec, program) from error
        try:
            return _started(api, created, spec, program)
        finally:
            api.remove(created)


def _started(api: EngineApi, container: str, spec: RunSpec, program: str) -> tuple[int, str]:
    try:
        api.ask("POST", f"/containers/{container}/start", timeout_s=api.work_s)
    except Refused as error:
        raise _refusal(api, error, spec, program) from error
    code: int | None = None
    give_up = time.monotonic() + _RUN_S
    # It is looked at, not waited for: it runs for 20 ms, and not every engine tells so quick an end (`flavour`).
    while code is None and time.monotonic() < give_up:
        state = (api.inspect(container) or {}).get("State") or {}
        if state.get("Status") in {"exited", "stopped"}:
            code = int(state["ExitCode"])
        else:
            time.sleep(_LOOK_S)
    if code is None:
        raise WorkerFault(WorkerReason.ENGINE, f"a container for a test did not end within {_RUN_S:g} s")
    if code == 0:
        return 0, ""
    state = (api.inspect(container) or {}).get("State") or {}
    printed = ""
    with (
        contextlib.suppress(Refused),  # a log driver that cannot be read from
        # From its begin: of the first of the last lines Podman loses what was printed by a write before.
        api.reading(f"/containers/{container}/logs", timeout_s=api.look_up_s, stdout="1", stderr="1") as answer,
    ):
        printed = _without_frames(answer.read(4096))
    return code, " ".join(filter(None, [str(state.get("Error") or ""), printed])).strip()


def _refusal(api: EngineApi, error: Refused, spec: RunSpec, program: str) -> ConfigError | WorkerFault | JobFault:
    """What it means that the engine does not make or start the box. Only an image of a job may be at fault."""
    said = _steady(error.said)
    if wrong := setting_fault(said, spec, _known(api, said)):
        return wrong
    fault = start_fault(said, spec)
    if program and isinstance(error, NotFound) and "no such image" in said.lower():
        return JobFault(JobReason.IMAGE_MISSING, said)
    if isinstance(fault, JobFault) and not program:
        return WorkerFault(WorkerReason.ENGINE, f"the engine cannot start a container: {clean(said, 300)}")
    return fault


def _known(api: EngineApi, said: str) -> Sequence[str]:
    """Names that the engine has of the kind that it complains about."""
    with contextlib.suppress(Refused, ValueError, LookupError, TypeError):
        if "network" in said:
            return ["bridge", "none", *(str(one["Name"]) for one in api.ask("GET", "/networks").json())]
        if "runtime" in said:
            return list(api.ask("GET", "/info").json().get("Runtimes") or ())
    return ()


def _fault(code: int, said: str, init: str, folder: Path) -> WorkerFault:
    """Why the program in the box did not end with 0."""
    said = _steady(said)
    failed = INIT_FAILED.search(said)
    broken = INIT_BROKEN.fullmatch(said)
    if broken or (failed is None and f"exec {init}" in said):
        return init_fault(broken["why"] if broken else said)
    why = failed["why"].lower() if failed else said.lower()
    if "no such file" in why:
        return WorkerFault(
            WorkerReason.DISK,
            f"a file that the worker writes to {shown(folder)} is not seen in containers: the engine mounts another "
            "directory of that name; is the worker in a namespace of its own (a private mount, another machine, snap)?",
        )
    if "permission denied" in why:
        return WorkerFault(
            WorkerReason.DISK,
            f"containers may not use what the worker writes to {shown(folder)}; is it SELinux (`ausearch -m avc`), or "
            "a directory above it that the engine's user may not enter?",
        )
    return WorkerFault(
        WorkerReason.ENGINE, f"a container for a test ended with exit code {code}: {clean(said, 300) or 'no word'}"
    )


@contextmanager
def _program(folder: Path, init: str) -> Iterator[tuple[str, ...]]:
    """The command of the box; while inside, what it needs lies in `folder`. Raises WorkerFault(DISK)."""
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        yield (init, "-h")
        return
    name = f"proof-{secrets.token_hex(8)}"
    path = folder / name
    try:
        path.write_text(f"#!{init} -h\n", encoding="ascii")
        path.chmod(0o755)  # whatever the umask; JOB_USER may be anybody
    except OSError as error:
        raise WorkerFault(WorkerReason.DISK, f"{shown(folder)} cannot be written: {error.strerror}") from error
    try:
        yield (f"{MOUNT_POINT}/{name}",)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _inits(api: EngineApi) -> tuple[str, ...]:
    """Where this engine puts its init into a box."""
    with api.calling("say what it is"):
        parts = api.ask("GET", "/version").json().get("Components") or ()
        podman = any("podman" in str(part.get("Name")).lower() for part in parts)
    return _PODMAN_INITS if podman else (_INIT,)


def _image(api: EngineApi) -> str:
    """The id of the empty image, made where the engine does not have it."""
    with api.calling("make the image for a test"):
        found = _find_image(api)
        if found is None:
            query = urlencode({"fromSrc": "-", "repo": IMAGE})  # with its tag: Podman before 4.6 has no ear for `tag`
            with closing(api.line(api.work_s)) as line:
                headers = {"Content-Type": "application/x-tar"}
                line.request("POST", f"/v{api.version.api}/images/create?{query}", _empty_archive(), headers)
                with line.getresponse() as answer:
                    said = answer.read(4096).decode(errors="replace")
                    if answer.status != http.client.OK:
                        raise Refused(answer.status, said)
            found = _find_image(api)
            if found is None:
                raise Refused(http.client.NOT_FOUND, f"it took the image {IMAGE} and does not have it: {said}")
        return str(found["Id"])


def _find_image(api: EngineApi) -> Mapping[str, Any] | None:
    try:
        found: Mapping[str, Any] = api.ask("GET", f"/images/{IMAGE}/json").json()
    except NotFound:
        return None
    return found


def _empty_archive() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w"):
        pass
    return packed.getvalue()


def _steady(said: str) -> str:
    """What was said, without what is another number or name each time."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = str(json.loads(said)["message"])
    return _CHANGES.sub("...", said)


def _without_frames(log: bytes) -> str:
    """What a short log says: frames of a header of 8 bytes, the last 4 their length."""
    pieces: list[bytes] = []
    while len(log) > 8:
        size = int.from_bytes(log[4:8], "big")
        pieces.append(log[8 : 8 + size])
        log = log[8 + size :]
    return b"".join(pieces).decode(errors="replace")
