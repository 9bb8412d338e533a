"""What is in the worker's image: what its bill of materials says, each by a hash of the lock file; no installer (T24).

Also how the image of a release is made, with the real engine and a registry of our own.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from scripts import sbom
from tests.support.lock_files import locked
from tests.support.services import REPOSITORY, Registry, require_program

pytestmark = pytest.mark.fault("T24")

#: Prints name and version of every distribution that Python finds in the image.
INSTALLED = """
from importlib.metadata import distributions
import json, re
print(json.dumps([[re.sub("[-_.]+", "-", one.metadata["Name"]).lower(), one.version] for one in distributions()]))
"""


def printed(engine: docker.APIClient, image: str, *command: str, user: str = "") -> str:
    """What this command prints in a container of the image; it must succeed."""
    host = engine.create_host_config(network_mode="none")
    container = engine.create_container(image, list(command[1:]), entrypoint=command[0], user=user, host_config=host)[
        "Id"
    ]
    try:
        engine.start(container)
        code = engine.wait(container)["StatusCode"]
        output: str = engine.logs(container).decode()
        assert code == 0, output
        return output
    finally:
        engine.remove_container(container, force=True)


def listed(engine: docker.APIClient, image: str) -> dict[str, Any]:
    """What the engine's list says of the image: labels, digests."""
    [found] = engine.images(name=image)
    return dict(found)


@pytest.fixture(scope="module")
def bill(engine: docker.APIClient, worker_image: str) -> str:
    """The bill of materials, from where the image's label says that it is."""
    return printed(engine, worker_image, "cat", listed(engine, worker_image)["Labels"]["jobfetcher-image.sbom"])


@pytest.mark.docker
def test_the_bill_of_materials_is_cyclonedx(bill: str) -> None:
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill)
    assert error is None, error


@pytest.mark.docker
def test_it_names_all_that_is_installed_with_a_hash_of_the_lock_file(
    engine: docker.APIClient, worker_image: str, bill: str
) -> None:
    found = json.loads(bill)
    own, others = found["metadata"]["component"], found["components"]
    installed = json.loads(printed(engine, worker_image, "python", "-c", INSTALLED))
    assert sorted([one["name"], one["version"]] for one in [own, *others]) == sorted(installed)
    lock = locked("worker")
    # all of it, since the image is of Linux; pip and the build's tools are not among them
    assert {one["name"] for one in others} == {one.name for one in lock.values() if "win32" not in (one.marker or "")}
    for one in others:
        [hashed] = one["hashes"]
        assert hashed["alg"] == "SHA-256"
        assert hashed["content"] in lock[one["name"]].hashes, one["name"]
        assert one["licenses"], one["name"]
        assert one["purl"] == f"pkg:pypi/{one['name']}@{one['version']}"
    assert own["name"] == "jobfetcher"
    assert re.fullmatch("[0-9a-f]{64}", own["hashes"][0]["content"])


@pytest.mark.docker
def test_it_says_who_needs_whom(bill: str) -> None:
    """All that is there is needed by something that the worker needs."""
    needs = {one["ref"]: one["dependsOn"] for one in json.loads(bill)["dependencies"]}
    [todo] = [[ref] for ref in needs if ref.startswith("pkg:pypi/jobfetcher@")]
    reached: set[str] = set()
    while todo:
        ref = todo.pop()
        if ref not in reached:
            reached.add(ref)
            todo += needs[ref]
    assert reached == needs.keys()


def test_what_no_report_knows_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Something that came into the image beside pip, without a hash."""
    for name in ("known", "stranger"):
        metadata = tmp_path / f"{name}-1.0.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    item = {"metadata": {"name": "known"}, "download_info": {"archive_info": {"hash": f"sha256={'0' * 64}"}}}
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"install": [item]}))
    assert sbom.main("known", str(tmp_path), str(report)) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "'stranger' is installed" in said.err


def test_nothing_is_fetched_into_what_is_shipped_and_no_installer_is_in_it() -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    assert re.findall(r"^FROM (.*)", dockerfile, re.MULTILINE) == ["${BASE_IMAGE} AS build", "${BASE_IMAGE}"]
    shipped = dockerfile.rpartition("\nFROM ")[2]
    assert not re.search(r"^(RUN|ADD) ", shipped, re.MULTILINE)
    assert "pip" not in shipped
    copied = re.findall(r"^COPY --from=build (.*)", shipped, re.MULTILINE)
    assert len(copied) == len(re.findall("^COPY", shipped, re.MULTILINE))
    assert copied == [
        "/etc/passwd /etc/group /etc/",
        "--chown=10001:10001 /made/home /home/jobfetcher",
        "/opt/jobfetcher /opt/jobfetcher",
        "/made/sbom.cdx.json /usr/share/jobfetcher/",
    ]


def test_only_what_belongs_there_goes_into_a_build() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    assert "*" in ignored or {".env", ".git"} <= set(ignored)
    assert not any(re.fullmatch(r"!.*\.env", line) for line in ignored)


@pytest.mark.docker
def test_the_image_has_a_user_who_owns_his_home_and_nothing_else(engine: docker.APIClient, worker_image: str) -> None:
    """A worker that runs as this user cannot change its own program."""
    assert printed(engine, worker_image, "id", user="jobfetcher").startswith(
        "uid=10001(jobfetcher) gid=10001(jobfetcher) groups=10001(jobfetcher)"
    )
    owned = "find / -xdev -user jobfetcher 2>/dev/null; exit 0"
    assert printed(engine, worker_image, "sh", "-c", owned).split() == ["/home/jobfetcher"]
    writable = "find /opt /usr /etc /app -xdev ! -type l -writable 2>/dev/null; exit 0"
    assert printed(engine, worker_image, "sh", "-c", writable, user="jobfetcher") == ""
    assert printed(engine, worker_image, "sh", "-c", "echo $HOME", user="jobfetcher") == "/home/jobfetcher\n"


# -- the image of a release -------------------------------------------------------------------------------------------


class Checkout:
    """A small repository with this project's own scripts/image-release, and a Dockerfile of one layer."""

    def __init__(self, directory: Path, base: str) -> None:
        self.directory = directory
        (directory / "scripts").mkdir(parents=True)
        shutil.copy(REPOSITORY / "scripts" / "image-release", directory / "scripts")
        (directory / "pyproject.toml").write_text('version = "0.0.1.dev0"\n')
        (directory / "Dockerfile").write_text(f"ARG BASE_IMAGE={base}\nFROM ${{BASE_IMAGE}}\nLABEL a=b\n")
        self.git("init", "--quiet")
        self.commit()

    def git(self, *words: str) -> str:
        who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        command = ["git", *who, *words]
        return subprocess.run(command, cwd=self.directory, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self) -> None:
        self.git("add", ".")
        self.git("commit", "--quiet", "--message", "all")

    def release(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["scripts/image-release", *words]
        return subprocess.run(command, cwd=self.directory, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def pushed(engine: docker.APIClient, busybox: str, registry: Registry) -> Iterator[tuple[str, str]]:
    """An image's tag in a registry of our own, and the digest that the registry gave it."""
    name = f"{registry.address}/tests/base"
    engine.tag(busybox, name, "1")
    lines = list(engine.push(name, "1", stream=True, decode=True))
    [digest] = [line["aux"]["Digest"] for line in lines if "aux" in line]
    yield f"{name}:1", digest
    engine.remove_image(f"{name}:1")


@pytest.fixture
def released(engine: docker.APIClient) -> Iterator[str]:
    """The tag that the release gets; its image is gone afterwards."""
    yield "jobfetcher:0.0.1.dev0"
    if engine.images(name="jobfetcher:0.0.1.dev0"):
        engine.remove_image("jobfetcher:0.0.1.dev0")


@pytest.mark.parametrize(
    "base",
    [
        "python:3.12-slim",
        "python",
        "python@sha256:0123",
        f"python@sha512:{'0' * 128}",
        f"python:3.12-slim # @sha256:{'0' * 64}",
        "",
    ],
)
def test_no_release_is_built_from_a_base_without_a_digest(tmp_path: Path, base: str) -> None:
    require_program("git", "git")
    done = Checkout(tmp_path / "checkout", base).release()
    assert done.returncode == 1
    assert f"no release from {base}: a tag can be moved" in done.stderr
    assert done.stdout == ""


@pytest.mark.docker
@pytest.mark.registry
def test_a_release_is_built_from_the_digest_that_was_committed(
    engine: docker.APIClient, pushed: tuple[str, str], released: str, tmp_path: Path
) -> None:
    tag, digest = pushed
    require_program("docker", "docker.io")
    require_program("git", "git")
    checkout = Checkout(tmp_path / "checkout", tag)
    assert checkout.release().returncode == 1
    pinned = checkout.release("--pin")
    assert pinned.returncode == 0, pinned.stderr
    assert (checkout.directory / "Dockerfile").read_text().startswith(f"ARG BASE_IMAGE={tag}@{digest}\nFROM ")

    done = checkout.release()
    assert done.returncode == 1
    assert "no release from files that are not committed:" in done.stderr

    checkout.commit()
    done = checkout.release()
    assert done.returncode == 0, done.stderr
    assert listed(engine, released)["Labels"] == {
        "a": "b",
        "org.opencontainers.image.version": "0.0.1.dev0",
        "org.opencontainers.image.revision": checkout.git("rev-parse", "HEAD"),
        "org.opencontainers.image.base.digest": digest,
    }


def test_the_release_finds_the_base_of_this_dockerfile() -> None:
    """The script reads that line and writes it anew, so there is one, and it has an image's name."""
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    assert len(re.findall(r"^ARG BASE_IMAGE=[^@\s]+(?:@sha256:[0-9a-f]{64})?$", dockerfile, re.MULTILINE)) == 1
