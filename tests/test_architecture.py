"""The house keeps its shape: who may import whom (DESIGN.md, Rooms).

Read from the source, not from running modules, so that an import inside a function counts, too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jobfetcher"

#: What each room may import besides itself and `core`. The order is the direction: nothing below imports from above.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "pinned": set(),
    "trusted": {"pinned"},
    "tree": {"pinned"},
    "heartbeat": {"outage"},
    "journal": {"journal_file", "pinned"},
    "journal_file": set(),
    "provenance": set(),
    "leftovers": {"pinned", "tree"},
    "quota": set(),
    "workspace": {"leftovers", "pinned", "quota", "tree", "trusted"},
    "staging": {"pinned", "tree", "workspace"},
    "settings": {"certificates", "dotenv", "owners"},
    "certificates": set(),
    "owners": set(),
    "dotenv": set(),
    "resources": set(),
    "telemetry": set(),
    "sources": {"pinned"},
    "transfer": {"pinned"},
    "engine": {"pinned", "tree"},
    "broker": {"engine"},
    "testing": set(),
    "outage": set(),
    "outbox": {"journal", "leftovers", "outage", "workspace"},
    "ending": set(),
    "overlap": set(),
    "pace": {"outage"},
    "reporting": {"staging"},
    "blame": {"workspace"},
    "collecting": set(),
    "watching": {"blame", "workspace"},
    "housekeeping": {"journal", "workspace"},
    "recovery": {"journal", "resources", "workspace"},
    "runner": {
        "collecting",
        "ending",
        "heartbeat",
        "journal",
        "outbox",
        "overlap",
        "provenance",
        "reporting",
        "resources",
        "staging",
        "watching",
        "workspace",
    },
    "self_test": {"pinned", "tree"},
    "worker": {
        "ending",
        "housekeeping",
        "journal",
        "pace",
        "recovery",
        "resources",
        "runner",
        "self_test",
        "workspace",
    },
    "build": {
        "certificates",
        "settings",
        "show",
        "resources",
        "telemetry",
        "sources",
        "transfer",
        "engine",
        "housekeeping",
        "journal",
        "runner",
        "self_test",
        "watching",
        "worker",
        "workspace",
    },
    "build_broker": {"broker", "build", "engine", "settings"},
    "steps": {"build", "outbox", "staging", "settings", "workspace"},
    "show": {"settings"},
    "refusals": set(),
    "cli": {"build", "build_broker", "refusals", "settings", "show", "telemetry", "resources", "worker"},
    "__main__": {"cli"},
}

#: Libraries that do I/O or are slow to load: the job path and the core know none of them.
IO_LIBRARIES = {"docker", "httpx", "httpcore", "pycurl", "psutil", "pynvml", "requests", "rich", "typer"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            assert node.module is not None
            if node.module == "jobfetcher":
                yield from (f"jobfetcher.{alias.name}" for alias in node.names)
            else:
                yield node.module


def sources(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, f"no source below {folder}"
    return found


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_one_way(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is a new room: give it a line here, and say in its docstring who uses it"
    allowed = MAY_IMPORT[room] | {"core", room}
    used = {name.split(".")[1] for name in imports(path) if name.startswith("jobfetcher.")} - {"__version__"}
    assert used <= allowed, f"{path.name} may not import {sorted(used - allowed)}"


@pytest.mark.parametrize("room", ["core", "runner", "worker", "heartbeat", "staging", "journal", "workspace", "tree"])
def test_the_job_path_knows_no_adapter_library(room: str) -> None:
    place = PACKAGE / room
    for path in sources(place) if place.is_dir() else [place.with_suffix(".py")]:
        used = {name.split(".")[0] for name in imports(path)}
        assert not used & IO_LIBRARIES, f"{path} imports {used & IO_LIBRARIES}"


def test_adapters_do_not_know_each_other() -> None:
    adapters = {"sources", "transfer", "engine", "telemetry", "resources"}
    for adapter in adapters:
        assert not MAY_IMPORT[adapter] & adapters


@pytest.mark.parametrize(
    ("package", "other"), [("mock_api", "jobfetcher"), ("jobfetcher", "mock_api"), ("jobfetcher", "tests")]
)
def test_two_readings_of_the_protocol_share_no_code(package: str, other: str) -> None:
    for path in sources(ROOT / package):
        assert other not in {name.split(".")[0] for name in imports(path)}, f"{path} imports {other}"


def test_only_settings_reads_the_environment() -> None:
    for path in sources(PACKAGE):
        if path.name == "settings.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}:
                pytest.fail(f"{path.relative_to(ROOT)}:{node.lineno} reads the environment; settings.py is for that")


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_room_says_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path} has no docstring"


@pytest.mark.parametrize(("room", "most"), [("worker.py", 400), ("runner.py", 450), ("heartbeat.py", 220)])
def test_the_main_rooms_stay_readable(room: str, most: int) -> None:
    """An alarm, not a law: what grows past this wants to be cut."""
    assert len((PACKAGE / room).read_text().splitlines()) <= most


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import jobfetcher; print(len(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) == 1


def test_help_loads_no_slow_library() -> None:
    code = "import sys, jobfetcher.cli; print(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    slow = {"docker", "httpx", "pycurl", "psutil", "pynvml", "pydantic", "tenacity", "sqlite3"}
    assert not slow & set(done.stdout.split())
