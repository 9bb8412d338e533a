"""Where the worker's own parts come from: few, named, each at one version and by its hash, and nothing else (T24).

requirements/ has the lock files, which scripts/lock writes; the Dockerfile and scripts/setup install by them. The image
itself is looked at in test_supply_image.py.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.lock_files import LOCK_FILES, lines, locked
from tests.support.services import REPOSITORY, require

pytestmark = pytest.mark.fault("T24")


def pyproject() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def project() -> dict[str, Any]:
    return dict(pyproject()["project"])


def extras(*names: str) -> list[str]:
    """What these extras ask for, but for the project itself. None named: all extras."""
    offered = project()["optional-dependencies"]
    wanted = [text for name in names or offered for text in offered[name]]
    return [text for text in wanted if Requirement(text).name != "jobfetcher"]


def build_requirements() -> list[str]:
    return list(pyproject()["build-system"]["requires"])


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


def brought(lock_file: str) -> set[str]:
    """The names of what this lock file brings to a machine such as this one."""
    return {one.name for one in locked(lock_file).values() if one.is_for_here}


# -- the lock files ---------------------------------------------------------------------------------------------------


def test_the_image_gets_what_a_worker_needs_and_nothing_else_and_that_is_not_much() -> None:
    """Neither what the mock server needs nor a tool of the tests."""
    wanted = set(needed(*project()["dependencies"], *extras("signing")))
    assert brought("worker") == wanted
    assert len(wanted) <= 45, f"a new dependency brings its own along: {sorted(wanted)}"


def test_the_set_up_gets_all_extras_and_what_builds_the_package_and_nothing_else() -> None:
    assert brought("dev") == set(needed(*project()["dependencies"], *extras(), *build_requirements()))


def test_what_builds_the_package_is_named_to_the_version() -> None:
    for text in build_requirements():
        requirement = Requirement(text)
        assert str(requirement.specifier) == f"=={locked('build')[canonicalize_name(requirement.name)].version}"
    assert brought("build") == set(needed(*build_requirements()))


def test_what_writes_the_lock_files_is_locked_too() -> None:
    [tool] = pyproject()["dependency-groups"]["lock"]
    assert [f"{one.name}=={one.version}" for one in locked("lock").values()] == [tool]


@pytest.mark.parametrize("lock_file", ["worker", "build"])
def test_the_lock_files_name_the_same_files(lock_file: str) -> None:
    """What is tested is what is shipped, to the byte."""
    tested = locked("dev")
    assert [one.name for one in locked(lock_file).values() if tested[one.name] != one] == []


@pytest.mark.parametrize("lock_file", LOCK_FILES)
def test_a_lock_file_holds_on_every_python_and_processor(lock_file: str) -> None:
    """A line that is left out elsewhere would be a requirement that nobody locked there."""
    linux = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    cpython = {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    for one in locked(lock_file).values():
        for python in ("3.11", "3.12", "3.13", "3.14"):
            for processor in ("x86_64", "aarch64"):
                place = {**linux, **cpython, "python_version": python, "platform_machine": processor}
                assert one.marker is None or Marker(one.marker).evaluate(place) == ("win32" not in one.marker)


def test_what_is_installed_here_is_what_is_locked() -> None:
    """So that the versions that are tested are those that are shipped."""
    other = {
        one.name: (one.version, importlib.metadata.version(one.name))
        for one in locked("dev").values()
        if one.is_for_here and importlib.metadata.version(one.name) != one.version
    }
    assert other == {}


# -- who installs by them ---------------------------------------------------------------------------------------------


def installs() -> list[tuple[str, str]]:
    """File and command, wherever pip is told to bring something here: in what people run, build or are told to type."""
    paths = [REPOSITORY / name for name in ("Dockerfile", "Makefile", "README.md")]
    paths += [path for folder in ("scripts", ".ci", "jobfetcher", "demo") for path in (REPOSITORY / folder).rglob("*")]
    found = []
    for path in paths:
        if path.is_file() and path.suffix in ("", ".py", ".md"):
            for line in path.read_text(errors="replace").replace("\\\n", " ").splitlines():
                for command in re.split("&&|;", line.partition("# ")[0]):
                    if re.search(r"\bpip\b.* (install|wheel|download) ", command):
                        found.append((str(path.relative_to(REPOSITORY)), command))
    return found


def test_whatever_is_installed_is_compared_with_its_hash_or_made_from_what_is_here() -> None:
    """`--only-binary`: to build a source, pip fetches what its project asks for, and compares that with nothing."""
    places = set()
    for place, command in installs():
        places.add(place)
        words = set(command.split())
        if not words >= {"--require-hashes", "--only-binary", ":all:"}:
            assert words >= {"--no-index", "--no-deps"}, f"{place}: {command}"
            assert "--no-build-isolation" in words or command.rstrip().endswith(".whl"), f"{place}: {command}"
    assert places == {
        "Dockerfile",
        "README.md",
        "scripts/lock",
        "scripts/setup",
        "jobfetcher/sources/worker_api/signing.py",
    }


def test_nobody_is_told_to_ask_a_registry_for_our_name() -> None:
    """It is published nowhere, so there the name is anybody's."""
    paths = [REPOSITORY / "README.md", *(REPOSITORY / "jobfetcher").rglob("*.py")]
    assert [path for path in paths if re.search(r"pip install[^\n`]* '?jobfetcher\b", path.read_text())] == []


def test_the_set_up_is_done_anew_when_what_it_reads_changes() -> None:
    setup = (REPOSITORY / "scripts" / "setup").read_text()
    assert setup.count("sha256sum pyproject.toml requirements/dev.txt") == 2  # written, and compared
    assert set(re.findall(r"requirements/(\w+)\.txt", setup)) == {"dev"}


# -- a file that somebody changed on its way --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of one small locked distribution, as the registry has it, in a directory of its own."""
    folder = tmp_path_factory.mktemp("genuine")
    [line] = [line for line in lines("worker") if line.startswith("mdurl==")]
    done = pip("download", "--no-deps", "--dest", str(folder), line.split()[0])
    require(done.returncode == 0 or None, f"a package registry that answers ({done.stderr.strip()[-200:]})")
    [wheel] = folder.glob("*.whl")
    return wheel


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def install(wheel: Path, into: Path) -> subprocess.CompletedProcess[str]:
    """Install from the wheel's directory alone, by its line of the image's lock file and as the image is built."""
    [line] = [line for line in lines("worker") if line.startswith("mdurl==")]
    requirements = into.parent / f"{into.name}.txt"
    requirements.write_text(f"{line}\n")
    where = ("--no-index", "--find-links", str(wheel.parent), "--no-cache-dir", "--no-compile", "--target", str(into))
    return pip("install", *where, "--require-hashes", "--only-binary", ":all:", "--requirement", str(requirements))


def test_a_wheel_as_the_registry_has_it_is_installed(genuine: Path, tmp_path: Path) -> None:
    done = install(genuine, tmp_path / "into")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "into" / "mdurl" / "__init__.py").is_file()


@pytest.mark.parametrize("where", ["a flipped bit", "a file more", "its own record corrected"])
def test_a_wheel_that_somebody_changed_is_refused(genuine: Path, tmp_path: Path, where: str) -> None:
    """The last is a wheel as sound as the genuine one, and pip installs it where it is asked for no hash."""
    changed = tmp_path / genuine.name
    with zipfile.ZipFile(genuine) as source, zipfile.ZipFile(changed, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename == "mdurl/__init__.py" and where != "a file more":
                content = content[:-1] + bytes([content[-1] ^ 1])
            if info.filename.endswith("/RECORD") and where == "its own record corrected":
                content = re.sub(rb"(?m)^mdurl/__init__\.py,.*$", b"mdurl/__init__.py,,", content)
            target.writestr(info, content)
        if where == "a file more":
            target.writestr("mdurl/more.pth", "import os")
    into = tmp_path / "into"
    done = install(changed, into)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not into.exists() or list(into.iterdir()) == []
    if where == "its own record corrected":
        careless = pip("install", "--no-index", "--no-deps", "--no-compile", "--target", str(into), str(changed))
        assert careless.returncode == 0, careless.stderr  # so it was the hash
