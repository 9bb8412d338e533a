"""What of an image's configuration reaches its job's container: taken, blanked or refused. Pure; used by `images`,
`run_spec`, `box` and `docker`.

Whatever stands in an image's configuration comes along unseen: the engine merges it into the container's own wherever
the container's says nothing (moby, daemon/commit.go `merge`). It was written by whoever built the image, and some of
it acts outside of the container: labels tell other programs of the machine what to do with it (traefik, compose,
ofelia, watchtower), a health check has the engine run programs, variables tell NVIDIA's toolkit which devices and which
of the machine's files to give. `FIELDS` says of every field what becomes of it and why, and
tests/security/test_image_config.py compares each row with what a real engine makes of an image that has everything; a
field that an engine knows and this table does not fails that test (FAULTS.md T28).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jobfetcher.core.errors import JobFault, JobReason

#: Most labels that an image may have, and most bytes of all their keys: each is named again in every container.
_MOST_LABELS, _MOST_LABEL_BYTES = 1000, 64 * 1024

#: Most bytes of the variables that say which devices and libraries a container gets.
_MOST_ENV_BYTES = 64 * 1024

#: What `docker stop` and the worker send to end a job: what is promised to jobs, whatever an image would rather have.
STOP_SIGNAL = "SIGTERM"

#: No check of health, not even the image's (Docker Engine API, HealthConfig).
NO_HEALTHCHECK: Mapping[str, Sequence[str]] = {"Test": ["NONE"]}

#: Variables that NVIDIA's toolkit acts on, or may one day, and that of the dynamic loader.
_ACTS = re.compile(r"(?:NVIDIA|LD)_")

#: Of those named NVIDIA_*, what only describes the image, makes a start fail on a driver that is too old, or steers a
#: library inside the container. Not NVIDIA_REQUIRE_JETPACK, which names lists of the machine's files to mount.
_HARMLESS = re.compile(
    r"NVIDIA_(?:REQUIRE_(?!JETPACK)[A-Z0-9_]+|DISABLE_REQUIRE|[A-Z0-9_]+_VERSION|PRODUCT_NAME|BUILD_(?:ID|REF)"
    r"|CUDA_END_OF_LIFE|TF32_OVERRIDE)"
)

_ABILITIES = "NVIDIA_DRIVER_CAPABILITIES"

#: What of the driver an image may ask for (NVIDIA's toolkit, "Driver Capabilities"): all but `display`, which is for
#: whoever sits at the machine.
_KNOWN_ABILITIES = ("compute", "utility", "video", "graphics", "ngx", "compat32")

#: What NVIDIA's toolkit gives where nothing is asked for.
_USUAL_ABILITIES = "compute,utility"

#: Lists of libraries, which a list's colons separate, and of LD_PRELOAD also blanks (ld.so(8)).
_SEPARATORS = re.compile(r"[: ]")
_LISTS_OF_FILES = frozenset({"LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT"})


class Fate(StrEnum):
    """What becomes of a field. A field that is taken may still be refused for what stands in it; its row says so."""

    TAKEN = "taken"
    BLANKED = "blanked"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Field:
    """One field of an image's configuration, by its names in the engine's API and in a Dockerfile (none: "")."""

    name: str
    keyword: str
    fate: Fate
    why: str


FIELDS: tuple[Field, ...] = (
    Field("User", "USER", Fate.TAKEN, "it holds inside the container only; `JOB_USER` wins over it"),
    Field(
        "Env",
        "ENV",
        Fate.TAKEN,
        "it is the program's own. Of NVIDIA_* only what describes the image or sets a condition for its start is "
        "taken; NVIDIA_VISIBLE_DEVICES is the worker's, NVIDIA_DRIVER_CAPABILITIES loses `display`, and what would "
        "give other devices or files of the machine is removed. In a job that holds a GPU, LD_PRELOAD, "
        "LD_LIBRARY_PATH and LD_AUDIT keep what names a fixed place, because programs of NVIDIA's toolkit inherit "
        "them outside of the container (CVE-2025-23266); other LD_* are removed there. Refused: more than 64 KiB of "
        "NVIDIA_* and LD_*",
    ),
    Field("Entrypoint", "ENTRYPOINT", Fate.TAKEN, "it is the program to run, in its box as any other"),
    Field("Cmd", "CMD", Fate.TAKEN, "it is run where the job names no command"),
    Field("WorkingDir", "WORKDIR", Fate.TAKEN, "it is a directory inside the container"),
    Field(
        "Volumes",
        "VOLUME",
        Fate.TAKEN,
        "below /files it lies in the job's own directory; elsewhere it is the engine's, counted by JOB_DISK_LIMIT and "
        "removed with the container. Refused: a place where no container can have one, a name that no output can have, "
        "a way into /files by a link, more than 100",
    ),
    Field(
        "ExposedPorts",
        "EXPOSE",
        Fate.TAKEN,
        "an engine has no way to leave it out. It opens nothing: no port is published (PublishAllPorts is false), and "
        "on the network for jobs a container reaches no other one, whatever is exposed",
    ),
    Field(
        "Labels",
        "LABEL",
        Fate.BLANKED,
        "other programs of the machine act on what labels say (reverse proxies, schedulers, updaters). An engine has "
        "no way to leave a key out, so every key has an empty value; the worker's own keys have the worker's values. "
        "Refused: more than 1,000 labels, or more than 64 KiB of keys",
    ),
    Field("Healthcheck", "HEALTHCHECK", Fate.BLANKED, "the engine would run its program again and again; nobody asks"),
    Field(
        "StopSignal",
        "STOPSIGNAL",
        Fate.BLANKED,
        "a job is ended by TERM and after STOP_GRACE by KILL, whatever its image says: another signal may be one that "
        "its program never sees, or KILL at once",
    ),
    Field("StopTimeout", "", Fate.BLANKED, "how long an end takes is STOP_GRACE's to say"),
    Field(
        "OnBuild", "ONBUILD", Fate.BLANKED, "it acts when another image is built on this one; the worker builds none"
    ),
    Field("Shell", "SHELL", Fate.BLANKED, "it acts when the image is built; a job's command is run by /bin/sh"),
    Field("Hostname", "", Fate.BLANKED, "the engine names each container itself"),
    Field("Domainname", "", Fate.BLANKED, "as Hostname"),
    Field("MacAddress", "", Fate.BLANKED, "the engine gives each container its own"),
    Field("NetworkDisabled", "", Fate.BLANKED, "JOB_NETWORK decides"),
    Field("Tty", "", Fate.BLANKED, "a job has no terminal"),
    Field("OpenStdin", "", Fate.BLANKED, "a job has no standard input"),
    Field("StdinOnce", "", Fate.BLANKED, "as OpenStdin"),
    Field("AttachStdin", "", Fate.BLANKED, "nobody is attached"),
    Field("AttachStdout", "", Fate.BLANKED, "as AttachStdin"),
    Field("AttachStderr", "", Fate.BLANKED, "as AttachStdin"),
    Field("Image", "", Fate.BLANKED, "the image that is run is named by its id"),
    Field("Memory", "", Fate.BLANKED, "a relic of old formats; the job's share decides"),
    Field("MemorySwap", "", Fate.BLANKED, "as Memory"),
    Field("CpuShares", "", Fate.BLANKED, "as Memory"),
    Field("Cpuset", "", Fate.BLANKED, "as Memory"),
    Field("PublishService", "", Fate.BLANKED, "a relic of old formats; nothing is published"),
    Field("VolumeDriver", "", Fate.BLANKED, "a relic of old formats; volumes are the engine's usual ones"),
    Field("ArgsEscaped", "", Fate.TAKEN, "it is for Windows; on Linux it means nothing"),
)


def label_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of an image's labels. Raises JobFault(CANNOT_START) where they are too many to be blanked each time."""
    keys = tuple(sorted(str(key) for key in config.get("Labels") or ()))
    size = sum(len(key.encode(errors="replace")) for key in keys)
    if len(keys) > _MOST_LABELS or size > _MOST_LABEL_BYTES:
        raise JobFault(
            JobReason.CANNOT_START,
            f"the container cannot start, its image has {len(keys):,} labels of {size:,} bytes, and a job's image may "
            f"have {_MOST_LABELS:,} of {_MOST_LABEL_BYTES:,} (LABEL)",
        )
    return keys


def blanked(keys: Iterable[str]) -> dict[str, str]:
    """Labels that take the values away from an image's."""
    return dict.fromkeys(keys, "")


def acting_env(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Of an image's variables (`NAME=value`) those that may act outside of its container. Raises JobFault(CANNOT_START)
    where they are too long for that."""
    found = tuple(str(entry) for entry in config.get("Env") or () if _ACTS.match(str(entry)))
    if (size := sum(len(entry.encode(errors="replace")) for entry in found)) > _MOST_ENV_BYTES:
        raise JobFault(
            JobReason.CANNOT_START,
            f"the container cannot start, its image has {size:,} bytes of variables NVIDIA_* and LD_*, and a job's "
            f"image may have {_MOST_ENV_BYTES:,} (ENV)",
        )
    return found


def changed_env(entries: Iterable[str], *, gpus: bool) -> tuple[dict[str, str], tuple[str, ...]]:
    """What a container has in place of these variables (`acting_env`), and the names of those that it does not have.

    `gpus`: it gets GPUs, so NVIDIA's toolkit runs programs of its own while it is made.
    """
    changed: dict[str, str] = {}
    removed: set[str] = set()
    for entry in entries:
        name, _, value = entry.partition("=")
        if name == _ABILITIES:
            new: str | None = _abilities(value)
        elif name.startswith("NVIDIA_"):
            new = value if _HARMLESS.fullmatch(name) else None
        else:
            new = loader_value(name, value) if gpus else value
        if new is None:
            removed.add(name)
        elif new != value:
            changed[name] = new
    return changed, tuple(sorted(removed))


def loader_value(name: str, value: str) -> str | None:
    """A variable of the dynamic loader (ld.so(8)) as a container that gets GPUs may have it; None: not at all.

    NVIDIA's toolkit runs programs on the machine's side with the container's variables, in the container's root
    directory as the current one: a relative path, or one through /proc, is a file of the image's that they load, with
    root's rights. An empty part is the current directory.
    """
    if name not in _LISTS_OF_FILES:
        return None if name.startswith("LD_") else value
    separators = _SEPARATORS if name == "LD_PRELOAD" else re.compile(":")
    return ":".join(part for part in separators.split(value) if _is_fixed(part)) or None


def _is_fixed(path: str) -> bool:
    """Whether a path means the same file whoever opens it, wherever that program is."""
    parts = [part for part in path.split("/") if part not in {"", "."}]
    return path.startswith("/") and ".." not in parts and "$" not in path and parts[:1] not in (["proc"], ["dev"], [])


def _abilities(value: str) -> str:
    asked = {part.strip() for part in value.split(",")}
    return ",".join(one for one in _KNOWN_ABILITIES if one in asked or "all" in asked) or _USUAL_ABILITIES
