"""The box in which a worker without root rights has a job's files given back to its user (FAULTS.md E13, T27).

Used by `docker` for `Engine.own`. Nothing of the job is in it: the image is this package's own, and what runs is one
program without a C library (`helper/give_back.c`, compiled for each machine beside it). The box is made by `box.box` of
the policy that jobs have, so whatever a job is kept from, by runtime, limits, log, seccomp or an environment that hides
GPUs, this is kept from as well. It differs from a job's in few fields, named in tests/security/test_helper.py: its
image and program, the user 0, no network, no capability of JOB_CAP_ADD, and labels without a job's.

The image is made here, of bytes that are the same on every machine, and imported by POST /images/load, which takes the
configuration as it is: so its id is known beforehand, where POST /images/create notes the time in it. Tried with Docker
20.10 and with Podman 4.3.1. It is called after its content, so that another program is another image; but a name can be
given to anything, so it is used by its id, and only where its layer is ours (FAULTS.md T14). Whoever removes it, by
`docker image prune -a` say, has it imported again; if the name means something else, the import takes the name.
ALLOWED_IMAGES and PULL_POLICY are about jobs, and no worker removes it: it has some 4 KiB.

An engine that keeps images in containerd's store calls them by another digest. There the name is looked up, and the
layer, which has the same digest everywhere, shows whether it is ours.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.machine import Share
from jobfetcher.core.run import RunSpec
from jobfetcher.core.text import clean
from jobfetcher.engine.api import EngineApi, NotFound, Refused
from jobfetcher.engine.box import box
from jobfetcher.engine.flavour import Flavour
from jobfetcher.engine.run_spec import BoxPolicy, build_proof_spec
from jobfetcher.engine.volumes import MOUNT_POINT

#: The image's name, before the digest of its content.
NAME = "jobfetcher-helper"

#: The program in the image.
PROGRAM = "/give_back"

#: Its exit code where something could not be given back, which it then names.
FAILED = 1

#: By what an engine calls its architecture (GOARCH), what the compiler calls it.
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}

#: What the box may use, beside jobs that run: one core, and as much memory as a virtual machine (kata) starts in.
_CORES, _MEMORY_MIB = 1.0, 512

#: What an image of ours may say of itself; another key with a value is somebody else's.
_CONFIG = {"Cmd": [PROGRAM]}

#: Most that is read of what an engine says of an import, in bytes.
_SAID_MAX = 4096

#: Two jobs that end at once import it once.
_importing = threading.Lock()


class NoProgram(WorkerFault):
    """There is none for this engine's machine, or this package is not whole: no later try goes better."""

    def __init__(self, why: str) -> None:
        super().__init__(WorkerReason.DISK, why)


@dataclass(frozen=True, slots=True)
class Helper:
    """The image for one architecture: its archive for POST /images/load, its name, id and the digest of its layer."""

    archive: bytes
    name: str
    id: str
    layer: str

    def is_this(self, found: Mapping[str, Any]) -> bool:
        """Whether what an engine found (GET /images/NAME/json) is this image, whatever its name."""
        layers = (found.get("RootFS") or {}).get("Layers")
        said = {key: value for key, value in (found.get("Config") or {}).items() if value}
        return layers == [self.layer] and said == _CONFIG


@cache
def helper(architecture: str) -> Helper:
    """The image for an engine of that architecture.

    Raises NoProgram.
    """
    machine = _MACHINES.get(architecture)
    if machine is None:
        raise NoProgram(
            f"there is no helper program for an engine on {clean(architecture, 30)}, only for those on "
            f"{' and '.join(_MACHINES)}; a worker that runs as root needs none"
        )
    path = Path(__file__).parent / "helper" / f"give_back-{machine}"
    try:
        program = path.read_bytes()
    except OSError as error:
        raise NoProgram(
            f"the helper program {path} cannot be read ({error.strerror}); install jobfetcher anew"
        ) from error
    return pack(program, architecture)


def pack(program: bytes, architecture: str) -> Helper:
    """The image that has nothing but this program."""
    layer = _tar({PROGRAM.lstrip("/"): program})
    layer_digest = _digest(layer)
    config = _json(
        {
            "architecture": architecture,
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",  # of the same bytes everywhere
            "config": _CONFIG,
            "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "jobfetcher"}],
        }
    )
    image_id = _digest(config)
    number = image_id.partition(":")[2]
    name = f"{NAME}:{number[:12]}"
    manifest = [{"Config": f"{number}.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    files = {"layer.tar": layer, f"{number}.json": config, "manifest.json": _json(manifest)}
    return Helper(_tar(files), name, image_id, layer_digest)


def find_or_import(api: EngineApi) -> str:
    """The id of our image on this engine, which is imported where it is not there.

    Raises NoProgram, and WorkerFault(ENGINE) for an engine that does not take it.
    """
    with api.calling("import the image of the helper"):
        ours = helper(api.version.architecture)
        if found := _find(api, ours):
            return found
        with _importing:
            if found := _find(api, ours):
                return found
            said = _load(api, ours.archive)
            if found := _find(api, ours):
                return found
        raise Refused(http.client.NOT_FOUND, f"it took {ours.name} and does not have it: {said}")


def spec(policy: BoxPolicy, *, image_id: str, host_path: str, owner: str, name: str) -> RunSpec:
    """The box that gives all in `host_path`, a directory on the engine's host, to `owner` (`uid:gid` as it sees them).

    `policy` is the jobs'. The three base capabilities CHOWN, DAC_OVERRIDE and FOWNER are what this needs.
    """
    plain = build_proof_spec(
        Share(_CORES, _MEMORY_MIB, ()),
        files_host_path=host_path,
        policy=replace(policy, cap_add=(), network=None, user="0"),
    )
    return replace(plain, name=name, labels={}, image_id=image_id, command=(PROGRAM, owner, MOUNT_POINT))


def config(spec: RunSpec, flavour: Flavour) -> dict[str, Any]:
    """That box in the engine's own words.

    Outside of the user namespace that an engine with userns-remap gives containers: its users are others there.
    """
    made = box(spec, "none", flavour)
    if flavour.remapped:
        made["HostConfig"]["UsernsMode"] = "host"
    return made


def in_words(printed: str) -> str:
    """What the program printed about files that it could not give back, as one line for people."""
    lines = (re.sub(r"errno (\d+)$", lambda found: os.strerror(int(found[1])), one) for one in printed.splitlines())
    return clean("; ".join(lines), 500) or "its log does not say which"


def _find(api: EngineApi, ours: Helper) -> str:
    """Its id there, by our digest or else by its name; nothing where neither is it."""
    for reference in (ours.id, ours.name):
        try:
            found = api.ask("GET", f"/images/{reference}/json").json()
        except NotFound:
            continue
        if ours.is_this(found):
            return str(found["Id"])
    return ""


def _load(api: EngineApi, archive: bytes) -> str:
    with closing(api.line(api.work_s)) as line:
        headers = {"Content-Type": "application/x-tar"}
        line.request("POST", f"/v{api.version.api}/images/load?quiet=1", archive, headers)
        with line.getresponse() as answer:
            said = answer.read(_SAID_MAX).decode(errors="replace").strip()
            if answer.status != http.client.OK:
                raise Refused(answer.status, said)
    return said


def _tar(files: Mapping[str, bytes]) -> bytes:
    """The same bytes for the same files, whoever packs them and when."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
