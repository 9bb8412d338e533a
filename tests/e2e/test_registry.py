"""Images that a worker pulls from a registry: open, with a password, missing, denied, and one that never arrives."""

import base64
import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from tests.support.services import LOOPBACK, Registry, running_registry
from tests.support.worker import Command, Lab, command

pytestmark = [pytest.mark.registry, pytest.mark.docker]

CREDENTIALS = ("lab", "a-registry-password")
OUT = {"output": "out"}


@contextmanager
def pushed(engine: docker.APIClient, source: str, registry: Registry, name: str, tag: str = "1") -> Iterator[str]:
    """The reference of an image that is in the registry, and not on the engine: neither before the block nor after."""
    repository = f"{registry.address}/{name}"
    reference = f"{repository}:{tag}"
    auth = dict(zip(("username", "password"), registry.credentials, strict=True)) if registry.credentials else None
    engine.tag(source, repository, tag)
    answer = engine.push(repository, tag, auth_config=auth)
    engine.remove_image(reference)
    assert "error" not in answer
    try:
        yield reference
    finally:
        if engine.images(name=reference):
            engine.remove_image(reference)
        for image in engine.images():  # what it was before it moved is kept by digest
            for digest in image["RepoDigests"] or ():
                if digest.startswith(f"{repository}@"):
                    engine.remove_image(digest)


def run_one(lab: Lab, directory: Path, *, policy: str = "if-not-present", **env: str) -> Command:
    """A worker that runs one job, pulling what it does not have; `policy` "": as a worker does of itself."""
    with command(["run", "--once"], {**lab.env(pull_policy=policy), **env}, directory) as worker:
        assert worker.wait() == 0, worker.errors
    return worker


def docker_config(directory: Path, registry: Registry, username: str, password: str) -> Path:
    """The directory that `docker login` would have written its file into."""
    directory.mkdir()
    token = base64.b64encode(f"{username}:{password}".encode()).decode()
    (directory / "config.json").write_text(json.dumps({"auths": {registry.address: {"auth": token}}}))
    return directory


@pytest.fixture(scope="module")
def closed_registry() -> Iterator[Registry]:
    """A registry that asks for a password."""
    with running_registry(CREDENTIALS) as registry:
        yield registry


def test_an_image_is_pulled_and_its_digest_recorded(lab: Lab, tmp_path: Path, registry: Registry) -> None:
    with pushed(lab.engine, lab.image, registry, "e2e/tool") as reference:
        job = lab.submit("echo pulled > /files/out/said", image=reference, files_up=OUT)
        run_one(lab, tmp_path)
        results = lab.server.results(job)
    assert lab.ended(job) == ("finished", "")
    assert results["output/out/said"] == b"pulled\n"
    tag = httpx.head(
        f"http://{registry.address}/v2/e2e/tool/manifests/1",
        headers={"Accept": "application/vnd.docker.distribution.manifest.v2+json"},
        trust_env=False,
    )
    digest = json.loads(results["log/jobfetcher/provenance.json"])["image"]["digest"]
    assert digest == f"{registry.address}/e2e/tool@{tag.headers['Docker-Content-Digest']}"


def test_a_tag_that_moved_is_brought_anew_without_any_setting(
    lab: Lab, tmp_path: Path, registry: Registry, engine: docker.APIClient
) -> None:
    with pushed(lab.engine, lab.image, registry, "e2e/moving") as reference:
        repository, _, tag = reference.rpartition(":")
        first = lab.submit("true", image=reference)
        run_one(lab, tmp_path, policy="")
        container = engine.create_container(reference)["Id"]
        engine.commit(container, repository, tag, changes=["ENV MOVED=yes"])
        engine.remove_container(container, v=True)
        assert "error" not in engine.push(repository, tag)
        engine.tag(lab.image, repository, tag)  # on this machine it is still what it was
        second = lab.submit("echo $MOVED > /files/out/said", image=reference, files_up=OUT)
        run_one(lab, tmp_path, policy="")
        assert [lab.ended(job)[0] for job in (first, second)] == ["finished", "finished"]
        assert lab.server.results(second)["output/out/said"] == b"yes\n"


def test_an_image_that_only_this_machine_has_runs_without_any_setting(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit("true")
    run_one(lab, tmp_path, policy="")
    assert lab.ended(job)[0] == "finished"


@pytest.mark.fault("E6", "A3")
def test_an_image_that_is_pruned_before_the_start_is_pulled_again(
    lab: Lab, tmp_path: Path, registry: Registry, engine: docker.APIClient
) -> None:
    container = engine.create_container(lab.image)["Id"]
    own = engine.commit(container, "jobfetcher-test/pruned", "1", changes=[f"LABEL made={tmp_path.name}"])["Id"]
    engine.remove_container(container, v=True)
    with pushed(engine, "jobfetcher-test/pruned:1", registry, "e2e/pruned") as reference:
        engine.remove_image("jobfetcher-test/pruned:1")
        ref = lab.server.put_input("in.txt", b"input")
        job = lab.submit("cp /files/in.txt /files/out/", image=reference, files_down={"in.txt": ref}, files_up=OUT)
        env = {**lab.env(pull_policy="newer"), "JOBFETCHER_FAILPOINT": "before:start=sleep5"}
        with command(["run", "--once"], env, tmp_path) as worker:
            worker.wait_for("waiting at before:start")
            engine.remove_image(own, force=True)
            assert worker.wait() == 0, worker.errors
        assert "its image was removed from this machine before the job could start; running it" in worker.errors
        results = lab.server.results(job)
    assert lab.ended(job) == ("finished", "")
    assert results["output/out/in.txt"] == b"input"


def test_a_private_image_is_pulled_with_the_credentials_of_docker_login(
    lab: Lab, tmp_path: Path, closed_registry: Registry
) -> None:
    login = docker_config(tmp_path / "login", closed_registry, *CREDENTIALS)
    with pushed(lab.engine, lab.image, closed_registry, "e2e/private") as reference:
        job = lab.submit("true", image=reference)
        worker = run_one(lab, tmp_path, DOCKER_CONFIG=str(login))
    assert lab.ended(job) == ("finished", "")
    assert CREDENTIALS[1] not in worker.output + worker.errors


@pytest.mark.fault("E6")
@pytest.mark.parametrize("password", [None, "not-the-password"])
def test_an_image_that_is_denied_is_an_error_and_the_registrys_words_are_in_the_log(
    lab: Lab, tmp_path: Path, closed_registry: Registry, password: str | None
) -> None:
    login = {}
    if password is not None:
        login["DOCKER_CONFIG"] = str(docker_config(tmp_path / "login", closed_registry, CREDENTIALS[0], password))
    with pushed(lab.engine, lab.image, closed_registry, "e2e/private") as reference:
        job = lab.submit("true", image=reference)
        worker = run_one(lab, tmp_path, **login)
    state, details = lab.ended(job)
    assert state == "error"
    assert f"the registry does not give image {reference} to this worker, or does not have it (" in details
    words = "no basic auth credentials" if password is None else "unauthorized"
    assert words in worker.errors
    assert words not in details
    assert lab.server.updates(job) == ["preprocessing", "error"]


@pytest.mark.fault("E6")
def test_an_image_that_is_missing_is_an_error_and_the_registrys_words_are_in_the_log(
    lab: Lab, tmp_path: Path, registry: Registry
) -> None:
    reference = f"{registry.address}/e2e/nothing:7"
    job = lab.submit("true", image=reference)
    worker = run_one(lab, tmp_path)
    state, details = lab.ended(job)
    assert state == "error"
    assert f"the registry does not have image {reference} (" in details
    assert "not found" in worker.errors or "manifest unknown" in worker.errors
    assert "manifest unknown" not in details
    assert lab.server.updates(job) == ["preprocessing", "error"]


@pytest.mark.fault("T25")
def test_it_is_said_once_where_nothing_but_the_worker_bounds_what_is_pulled(lab: Lab, tmp_path: Path) -> None:
    open_to_all = "ALLOWED_IMAGES, or a proxy of the engine's, closes that"
    for allowed, count in (("", 1), ("docker.io/*", 0)):
        env = {**lab.env(), "ALLOWED_IMAGES": allowed}
        with command(["run", "--exit-when-idle", "0.1"], env, tmp_path) as worker:
            assert worker.wait() == 0, worker.errors
        assert worker.errors.count(open_to_all) == count


# -- a pull that never ends -------------------------------------------------------------------------------------------


class _Stalling(ThreadingHTTPServer):
    """Passes questions to a registry; of a layer it sends one half and then nothing, until it is closed."""

    daemon_threads = False

    def __init__(self, registry: Registry) -> None:
        super().__init__((LOOPBACK, 0), _Passing)
        self.registry = registry
        self.stalled = threading.Event()
        self.closing = threading.Event()


class _Passing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, _Stalling)
        accepted = {"Accept": ", ".join(self.headers.get_all("Accept", ["*/*"]))}
        with httpx.Client(trust_env=False, base_url=f"http://{self.server.registry.address}") as client:
            reply = client.request(self.command, self.path, headers=accepted)
        self.send_response(reply.status_code)
        for name in ("Content-Type", "Content-Length", "Docker-Content-Digest", "Docker-Distribution-Api-Version"):
            if name in reply.headers:
                self.send_header(name, reply.headers[name])
        self.end_headers()
        if "/blobs/" not in self.path or len(reply.content) < LAYER_BYTES:
            self.wfile.write(reply.content)
            return
        self.wfile.write(reply.content[: LAYER_BYTES // 2])
        self.server.stalled.set()
        self.server.closing.wait()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the tests look at `stalled`."""


LAYER_BYTES = 256 * 1024


@contextmanager
def stalling(registry: Registry) -> Iterator[_Stalling]:
    with _Stalling(registry) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="stalling-registry")
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()


def new_image(engine: docker.APIClient, reference: str) -> None:
    """An image of one layer that no other image has, so that a pull must bring it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("noise")
        entry.size = LAYER_BYTES
        archive.addfile(entry, io.BytesIO(os.urandom(LAYER_BYTES)))
    engine.import_image_from_data(buffer.getvalue(), *reference.split(":"))


@pytest.mark.fault("B7")
def test_a_job_that_is_cancelled_while_its_image_comes_leaves_the_worker_free(
    lab: Lab, tmp_path: Path, registry: Registry
) -> None:
    new_image(lab.engine, "jobfetcher-test/noise:1")
    try:
        with pushed(lab.engine, "jobfetcher-test/noise:1", registry, "e2e/noise") as reference:
            lab.engine.remove_image("jobfetcher-test/noise:1")  # and its layer with it
            with stalling(registry) as server:
                stalled = reference.replace(registry.address, f"{LOOPBACK}:{server.server_port}")
                cancelled = lab.submit("true", image=stalled)
                following = lab.submit("true")
                worker_env = lab.env(pull_policy="if-not-present")
                with command(["run", "--exit-when-idle", "0.5"], worker_env, tmp_path) as worker:
                    assert server.stalled.wait(60), worker.errors
                    assert lab.server.state(following) == "queued"
                    lab.server.delete(cancelled)
                    assert worker.wait() == 0
                assert lab.engine.images(name=stalled) == []
    finally:
        for name in lab.engine.images(name="jobfetcher-test/noise:1", quiet=True):
            lab.engine.remove_image(name)
    assert lab.server.updates(cancelled) == ["preprocessing"]
    assert lab.ended(following) == ("finished", "")
