"""What of an engine's answers is the worker's business. Pure; used by `rules`.

An engine tells its clients everything: everybody's containers, images, volumes and networks. Of that the worker gets
what it asks for by its own code, and of others' things at most that there is one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jobfetcher.engine.run_spec import LABEL_INSTANCE, OWN_NETWORK

_VERSION = ("Version", "ApiVersion", "MinAPIVersion", "Arch", "Os")

#: GET /info: what the worker's rooms read of it (`docker`, `flavour`, `registries`, `vouch`).
_INFO = (
    "Architecture",
    "CgroupVersion",
    "CpuCfsQuota",
    "DefaultRuntime",
    "DockerRootDir",
    "Driver",
    "HttpProxy",
    "HttpsProxy",
    "LiveRestoreEnabled",
    "MemTotal",
    "MemoryLimit",
    "NCPU",
    "NoProxy",
    "PidsLimit",
    "SecurityOptions",
    "SystemTime",
)

#: Of a network.
_NETWORK = ("Name", "Id", "Created", "Options", "Driver")


def version(said: Mapping[str, Any]) -> dict[str, Any]:
    """Of GET /version."""
    parts = [{"Name": part.get("Name"), "Version": part.get("Version")} for part in said.get("Components") or ()]
    platform = {"Name": (said.get("Platform") or {}).get("Name", "")}
    return {**_some(said, _VERSION), "Platform": platform, "Components": parts}


def info(said: Mapping[str, Any]) -> dict[str, Any]:
    """Of GET /info. Of runtimes their names, of registries whether there are mirrors, of disks their kind."""
    disk = [pair for pair in said.get("DriverStatus") or () if pair[:1] == ["Backing Filesystem"]]
    mirrors = ["there are some"] if (said.get("RegistryConfig") or {}).get("Mirrors") else []
    runtimes: dict[str, Any] = {name: {} for name in said.get("Runtimes") or ()}
    return {
        **_some(said, _INFO),
        "DriverStatus": disk,
        "Runtimes": runtimes,
        "RegistryConfig": {"Mirrors": mirrors},
    }


def is_ours(found: Mapping[str, Any], instance: str) -> bool:
    """Whether an inspected container is this worker's: by its label, and by its name, for an image may have labels."""
    labels = (found.get("Config") or {}).get("Labels") or {}
    return labels.get(LABEL_INSTANCE) == instance and is_our_name(str(found.get("Name")), instance)


def is_our_name(name: str, instance: str) -> bool:
    """Whether a container of that name is this worker's, if its label says the same."""
    return name.removeprefix("/").startswith(f"jobfetcher-{instance}-")


def containers(said: list[Mapping[str, Any]], instance: str) -> list[Mapping[str, Any]]:
    """Of GET /containers/json."""
    return [
        one
        for one in said
        if (one.get("Labels") or {}).get(LABEL_INSTANCE) == instance
        and all(is_our_name(str(name), instance) for name in one.get("Names") or [""])
    ]


def mounts_over(found: Mapping[str, Any], host_base: str) -> dict[str, Any] | None:
    """Of a container that is no job's: that PATH_BASE is mounted into it, and where. None: it is not.

    A worker in a container finds by that where its directory lies on the host (`engine.host_path`).
    """
    mounts = [
        {name: mount.get(name) for name in ("Type", "Source", "Destination")}
        for mount in found.get("Mounts") or ()
        if f"{host_base}/".startswith(f"{str(mount.get('Source') or '-').rstrip('/')}/")
    ]
    return {"Id": found.get("Id"), "Mounts": mounts} if mounts else None


def networks(said: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of GET /networks: ours, and of the others their names, by which a person finds a slip in JOB_NETWORK."""
    return [_some(one, _NETWORK if one.get("Name") == OWN_NETWORK else ("Name",)) for one in said]


def bridge(said: Mapping[str, Any]) -> dict[str, Any]:
    """Of GET /networks/bridge: its age, which is a witness of the engine's (`engine.vouch`)."""
    return _some(said, ("Created",))


def events(said: bytes, instance: str, known: Collection[str]) -> bytes:
    """Of GET /events: ours, and of other containers that one was made, which shows that the engine's API was open.

    `known`: ids of our containers, for an engine tells no labels of one that it is removing.
    """
    return b"".join(json.dumps(event).encode() + b"\n" for event in _events(said, instance, known))


def _events(said: bytes, instance: str, known: Collection[str]) -> Iterator[dict[str, Any]]:
    for line in said.splitlines():
        event = json.loads(line)
        actor = event.get("Actor") or {}
        about = actor.get("Attributes") or {}
        ours = about.get(LABEL_INSTANCE) == instance and is_our_name(str(about.get("name")), instance)
        if ours or actor.get("ID") in known:
            yield {"Action": event.get("Action"), "Actor": {"ID": actor.get("ID")}, "timeNano": event.get("timeNano")}
        elif event.get("Action") == "create":
            yield {"Action": "create", "Actor": {"ID": ""}}


def volumes(said: Mapping[str, Any], ours: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Of GET /system/df: the sizes of the volumes that our containers have."""
    names = {mount.get("Name") for one in ours for mount in one.get("Mounts") or () if mount.get("Type") == "volume"}
    found = [
        {"Name": one.get("Name"), "UsageData": {"Size": (one.get("UsageData") or {}).get("Size")}}
        for one in said.get("Volumes") or ()
        if one.get("Name") in names
    ]
    return {"Volumes": found}


def image_ids(said: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of GET /images/json: the ids, by which a pull that brought something is told from one that did not."""
    return [_some(one, ("Id",)) for one in said]


def _some(said: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: said[name] for name in names if name in said}
