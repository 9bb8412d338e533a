"""Where the worker's own parts come from: few, named, each at one version, and nothing else at build time (T24)."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.services import REPOSITORY

pytestmark = pytest.mark.fault("T24")


def pins() -> dict[str, str]:
    """Name to version, of constraints.txt."""
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+]+)", line) for line in lines]
    assert all(found), "constraints.txt has a line that is no exact version"
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def project() -> dict[str, Any]:
    return dict(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"])


def needed(*requirements: str) -> Iterator[str]:
    """The names of these requirements and of all that they need here, by what is installed."""
    seen: set[str] = set()
    todo = [Requirement(text) for text in requirements]
    while todo:
        wanted = todo.pop()
        key = f"{canonicalize_name(wanted.name)}{sorted(wanted.extras)}"
        if key in seen:
            continue
        seen.add(key)
        yield canonicalize_name(wanted.name)
        for text in importlib.metadata.requires(wanted.name) or ():
            inner = Requirement(text)
            extras = [*wanted.extras, ""]
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(inner)


def test_everything_a_worker_needs_is_pinned_and_there_is_not_much_of_it() -> None:
    found = set(needed(*project()["dependencies"]))
    assert found <= pins().keys()
    assert len(found) <= 45, f"a new dependency brings its own along: {sorted(found)}"


def test_every_extra_is_pinned_too() -> None:
    for name, requirements in project()["optional-dependencies"].items():
        outside = [text for text in requirements if Requirement(text).name != "jobfetcher"]
        assert set(needed(*outside)) <= pins().keys(), name


def test_what_is_installed_here_is_what_is_pinned() -> None:
    """So that the versions that are tested are those that are shipped."""
    other = {
        name: (version, importlib.metadata.version(name))
        for name, version in pins().items()
        if importlib.metadata.version(name) != version
    }
    assert other == {}


def test_the_image_is_built_from_the_pins_and_ships_no_installer() -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    commands = re.findall(r"^RUN (.*)", dockerfile.replace("\\\n", ""), re.MULTILINE)
    installs = [line for command in commands for line in command.split("&&") if " install " in line]
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)
    shipped = dockerfile.rpartition("\nFROM ")[2]
    assert "pip" not in shipped
    assert re.findall(r"^COPY (.*)", shipped, re.MULTILINE) == ["--from=build /opt/jobfetcher /opt/jobfetcher"]
    assert not re.search(r"^(RUN|ADD) ", shipped, re.MULTILINE)  # nothing is fetched into what is shipped


def test_nobody_is_told_to_ask_a_registry_for_our_name() -> None:
    """It is published nowhere, so there the name is anybody's."""
    paths = [REPOSITORY / "README.md", *(REPOSITORY / "jobfetcher").rglob("*.py")]
    assert [path for path in paths if re.search(r"pip install[^\n`]* '?jobfetcher\b", path.read_text())] == []


def test_only_what_belongs_there_goes_into_a_build() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    assert "*" in ignored or {".env", ".git"} <= set(ignored)
    assert not any(re.fullmatch(r"!.*\.env", line) for line in ignored)
