"""What `jobfetcher resources` and `jobfetcher config` print: plain records first, then a table or JSON of them.

Tables go to standard output; on a terminal they are drawn by rich, in a pipe they are tab-separated lines.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import SecretStr

from jobfetcher.core.machine import Inventory, Offer
from jobfetcher.core.text import clean
from jobfetcher.settings import Loaded, Settings

Row = Mapping[str, str]


def config_rows(loaded: Loaded) -> list[dict[str, str]]:
    """Every setting by name, its value (secrets masked), and the layer it came from."""
    rows = []
    for name in Settings.model_fields:
        value = getattr(loaded.settings, name)
        rows.append({"name": name.upper(), "value": _shown(name, value), "from": loaded.layers[name]})
    return rows


def _shown(name: str, value: object) -> str:
    if isinstance(value, SecretStr):
        return "********"
    if name in {"proxy", "http_proxy", "https_proxy"} and isinstance(value, str) and "@" in value:
        return re.sub(r"//.*@", "//********@", value)
    if value is None or value in ("", ()):
        default = Settings.model_fields[name].default
        return default if isinstance(default, str) and default else ""
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


class Engine(Protocol):
    """What is shown of a container engine."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...


class Place(Protocol):
    """What is shown of a disk: a place on it, which need not be there yet, and its name for people."""

    @property
    def path(self) -> Path: ...

    @property
    def name(self) -> str: ...


def machine_words(engine: Engine, free: Offer, slots: int, places: Sequence[Place]) -> str:
    """The same in one line, for the log of `run`."""
    gpus = f"{len(free.gpus)} GPU" if free.gpus else "no GPU"
    jobs = "1 job" if slots == 1 else f"{slots} jobs"
    disks = ", ".join(
        f"{disk['free_mib'] / 1024:.1f} GiB free {'in' if disk['name'] == disk['path'] else 'on'} {disk['name']}"
        for disk in _disks(places)
    )
    return (
        f"for jobs: {max(0, free.whole_cores)} cores, {max(0, free.memory_mib)} MiB, {gpus}, {jobs} at a time; {disks};"
        f" engine: {clean(engine.name, 80)} {clean(engine.version, 40)}"
    )


def resources_record(
    inventory: Inventory, free: Offer, slots: int, notes: Sequence[str], engine: Engine, places: Sequence[Place]
) -> dict[str, Any]:
    """What the machine has and what would be advertised, memory and disks in MiB. `places`: on the disks that jobs
    fill."""
    return {
        "engine": {"name": engine.name, "version": engine.version},
        "machine": {
            "cpu_cores": round(inventory.cpu_cores, 2),
            "memory_mib": inventory.memory_mib,
            "architecture": inventory.architecture,
            "gpus": len(inventory.gpus),
        },
        "offer": {
            "cpu_cores": max(0, free.whole_cores),
            "memory_mib": max(0, free.memory_mib),
            "gpus": [
                {"uuid": gpu.uuid, "model": gpu.model, "archi": gpu.archi, "memory_mib": gpu.memory_mib}
                for gpu in free.gpus
            ],
        },
        "disks": _disks(places),
        "slots": slots,
        "notes": list(notes),
    }


def _disks(places: Sequence[Place]) -> list[dict[str, Any]]:
    """The disks of these places, each once, sizes in MiB."""
    found: dict[int, dict[str, Any]] = {}
    for place in places:
        there = next(folder for folder in (place.path, *place.path.parents) if folder.exists())
        disk = shutil.disk_usage(there)
        sizes = {"size_mib": disk.total >> 20, "free_mib": disk.free >> 20}
        found.setdefault(there.stat().st_dev, {"path": str(place.path), "name": place.name, **sizes})
    return list(found.values())


def resources_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """The record as rows for people."""
    machine, offer, engine = record["machine"], record["offer"], record["engine"]
    rows = [
        {"resource": "CPU cores", "machine": f"{machine['cpu_cores']:g}", "offered": str(offer["cpu_cores"])},
        {"resource": "memory (MiB)", "machine": str(machine["memory_mib"]), "offered": str(offer["memory_mib"])},
        {"resource": "GPUs", "machine": str(machine["gpus"]), "offered": str(len(offer["gpus"]))},
    ]
    for gpu in offer["gpus"]:
        about = f"{gpu['memory_mib']} MiB, architecture {gpu['archi']}"
        rows.append({"resource": f"  {clean(gpu['model'], 80)}", "machine": gpu["uuid"], "offered": about})
    rows.append({"resource": "jobs side by side", "machine": "", "offered": str(record["slots"])})
    for disk in record["disks"]:
        name = disk["name"] if disk["name"] != disk["path"] else f"disk of {clean(disk['path'], 200)}"
        rows.append(
            {"resource": f"{name} (MiB)", "machine": str(disk["size_mib"]), "offered": f"{disk['free_mib']} free"}
        )
    about = f"{clean(engine['name'], 80)} {clean(engine['version'], 40)}"
    rows.append({"resource": "container engine", "machine": about, "offered": ""})
    rows += [{"resource": "note", "machine": clean(note, 400), "offered": ""} for note in record["notes"]]
    return rows


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_table(rows: Sequence[Row]) -> None:
    """A table on standard output: drawn on a terminal, tab-separated lines with a header elsewhere."""
    names = list(rows[0])
    if not sys.stdout.isatty():
        for line in (names, *([row[name] for name in names] for row in rows)):
            sys.stdout.write("\t".join(line) + "\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*(name.upper() for name in names), box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(row[name], overflow="fold") for name in names))
    Console().print(table)
