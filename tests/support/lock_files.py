"""The lock files below requirements/, read as the tests compare them. pip itself reads them its own way."""

from __future__ import annotations

import re
from dataclasses import dataclass

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.services import REPOSITORY

#: dev: tests, tools, all extras. worker: the image. build: what builds the package. lock: what writes these files.
LOCK_FILES = ("dev", "worker", "build", "lock")


@dataclass(frozen=True)
class Locked:
    """One distribution of a lock file: its name in the registry's spelling, and what is allowed of it."""

    name: str
    version: str
    marker: str | None
    hashes: frozenset[str]

    @property
    def is_for_here(self) -> bool:
        """Whether pip installs it on a machine such as this one."""
        return self.marker is None or Marker(self.marker).evaluate()


def lines(lock_file: str) -> list[str]:
    """Its requirements, each one line with all of its hashes."""
    text = (REPOSITORY / "requirements" / f"{lock_file}.txt").read_text().replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def locked(lock_file: str) -> dict[str, Locked]:
    """What it holds, by name. AssertionError for a line that is no exact version with hashes, or comes twice."""
    found: dict[str, Locked] = {}
    for line in lines(lock_file):
        text, *hashes = re.split(r"\s+--hash=sha256:", line)
        assert hashes, f"{lock_file}.txt: without a hash: {line}"
        assert all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes), f"{lock_file}.txt: {line}"
        requirement = Requirement(text)
        exact = re.fullmatch(r"==([A-Za-z0-9.!+]+)", str(requirement.specifier))
        assert exact, f"{lock_file}.txt: not an exact version: {text}"
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{lock_file}.txt: twice: {name}"
        marker = str(requirement.marker) if requirement.marker else None
        found[name] = Locked(name, exact[1], marker, frozenset(hashes))
    return found
