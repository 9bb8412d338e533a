"""What is in the worker's image: what its bill of materials says, each by a hash of the lock file; no installer (T24)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import docker
import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from scripts import sbom
from tests.support.lock_files import locked
from tests.support.services import REPOSITORY

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
