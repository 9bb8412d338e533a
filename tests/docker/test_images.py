"""Images on the real engine and real registries: pulled, cached, refused, cut, and checked before they are run."""

import base64
import contextlib
import http.server
import io
import itertools
import json
import os
import socket
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import docker
import pytest

from jobfetcher.core.errors import JobFault, JobReason, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.run import Image
from jobfetcher.engine.api import EngineApi
from jobfetcher.engine.images import ImagePolicy, Images, PullPolicy
from tests.support import services
from tests.support.boxes import docker_bench, no_progress
from tests.support.engine_proxy import ENGINE_SOCKET, engine_proxy
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.jobs import Emitted, FakeClock

pytestmark = [pytest.mark.docker, pytest.mark.registry]

LAYER_BYTES = 3_000_000
AWAY = ImagePolicy(pull=PullPolicy.ALWAYS, registry_budget_s=0)  # one try


def no_event(_name: str, **_fields: object) -> None:
    """For who does not listen."""


@pytest.fixture(scope="module")
def protected() -> Iterator[services.Registry]:
    """A registry that asks for a password."""
    with services.running_registry(("lab", "not-a-secret")) as running:
        yield running


@dataclass(frozen=True)
class Shelf:
    """Puts images of its own on registries and on the engine; takes them off the engine at the end."""

    engine: docker.APIClient
    ids: set[str]
    names: set[str]

    def local(self, name: str, content: bytes = b"") -> str:
        """An image of one file (random if not given) with that name on the engine only."""
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            entry = tarfile.TarInfo("content")
            entry.size = len(content) or LAYER_BYTES
            tar.addfile(entry, io.BytesIO(content or os.urandom(LAYER_BYTES)))
        repository, _, tag = name.rpartition(":")
        said = self.engine.import_image_from_data(archive.getvalue(), repository, tag)
        self.ids.add(json.loads(said.splitlines()[-1])["status"])
        self.names.add(name)
        return name

    def pushed(self, registry: services.Registry, tag: str = "1", keep: bool = False) -> str:
        """A new image on that registry; on the engine too if it is to `keep` it."""
        name = self.local(f"{registry.address}/tests/{uuid4().hex[:8]}:{tag}")
        self.push(registry, name)
        if not keep:
            self.engine.remove_image(name)
        return name

    def digests(self) -> set[str]:
        """By-digest names of these repositories that the engine keeps when a tag moves on."""
        repositories = tuple(f"{name.rpartition(':')[0]}@" for name in self.names)
        listed = [digest for image in self.engine.images() for digest in image["RepoDigests"] or ()]
        return {digest for digest in listed if digest.startswith(repositories)}

    def push(self, registry: services.Registry, name: str) -> None:
        repository, _, tag = name.rpartition(":")
        username, password = registry.credentials or ("", "")
        auth = {"username": username, "password": password}
        said = self.engine.push(repository, tag, auth_config=auth if registry.credentials else None)
        assert "errorDetail" not in said, said


@pytest.fixture
def shelf(engine: docker.APIClient) -> Iterator[Shelf]:
    made = Shelf(engine, set(), set())
    yield made
    for name in made.names | made.ids | made.digests():
        with contextlib.suppress(docker.errors.ImageNotFound):
            engine.remove_image(name, force=True)


@dataclass(frozen=True)
class Prepare:
    """Images under one policy, called short."""

    images: Images
    events: list[str]

    def __call__(self, reference: str, halt: Halt | None = None) -> Image:
        return self.images.prepare(reference, halt or Halt(), no_progress)


@pytest.fixture
def prepare() -> Iterator[Callable[[ImagePolicy], Prepare]]:
    api = EngineApi()

    def make(policy: ImagePolicy) -> Prepare:
        events: list[str] = []
        return Prepare(Images(api, policy, lambda name, **_: events.append(name)), events)

    yield make
    api.close()


@contextlib.contextmanager
def busy_registry(registry: services.Registry) -> Iterator[tuple[str, threading.Event, list[str]]]:
    """A registry that passes everything on to that one, and says "too many requests" until the event is set; the list
    has what was asked of it."""
    asked_for: list[str] = []
    rested = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = self._answer()
            self.send_response(status)
            for name in ("Content-Type", "Docker-Content-Digest"):
                if name in headers:
                    self.send_header(name, headers[name])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def _answer(self) -> tuple[int, dict[str, str], bytes]:
            asked_for.append(f"{self.command} {self.path}")
            if not rested.is_set() and "/manifests/" in self.path:
                said = {"errors": [{"code": "TOOMANYREQUESTS", "message": "You have reached your pull rate limit."}]}
                return 429, {"Content-Type": "application/json"}, json.dumps(said).encode()
            accept = {"Accept": ", ".join(self.headers.get_all("Accept", []))}
            asked = urllib.request.Request(f"http://{registry.address}{self.path}", headers=accept)
            try:
                with urllib.request.urlopen(asked) as answer:  # noqa: S310
                    return answer.status, dict(answer.headers), answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, dict(error.headers), error.read()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer((services.LOOPBACK, 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"{services.LOOPBACK}:{server.server_address[1]}", rested, asked_for
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def black_hole(registry: services.Registry) -> Iterator[threading.Event]:
    """In the place of the registry, something that accepts and never answers; the event: somebody came."""
    registry.stop()
    host, _, port = registry.address.partition(":")
    came = threading.Event()
    taken: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(listener.accept()[0])
                came.set()

    listener = socket.create_server((host, int(port)))
    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield came
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for sock in taken:
            sock.close()
        registry.start()


# -- pulled and cached -------------------------------------------------------------------------------------------------


def test_a_pull_brings_the_image_and_counts_its_bytes(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    name = shelf.pushed(registry)
    seen: list[tuple[int, int]] = []
    image = prepare(AWAY).images.prepare(name, Halt(), lambda done, total: seen.append((done, total)))
    found = shelf.engine.get(f"{shelf.engine.base_url}/v{shelf.engine.api_version}/images/{name}/json").json()
    assert (image.id, image.reference, image.digest) == (found["Id"], name, found["RepoDigests"][0])
    assert image.size_bytes >= LAYER_BYTES
    done, total = seen[-1]
    assert done == total > LAYER_BYTES // 2
    assert all(before <= after <= total for (before, _), (after, total) in itertools.pairwise(seen))


def test_if_not_present_asks_nobody_when_it_is_here(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    careful = prepare(replace(AWAY, pull=PullPolicy.IF_NOT_PRESENT))
    name = shelf.pushed(registry)
    first = careful(name)
    registry.stop()
    try:
        assert first.pulled
        assert careful(name) == replace(first, pulled=False)
        assert careful(str(first.digest)).id == first.id
        assert prepare(AWAY)(str(first.digest)).id == first.id  # a digest cannot change: `always` asks nobody either
    finally:
        registry.start()


def test_a_local_image_works_where_nobody_is_asked(shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]) -> None:
    name = shelf.local(f"jobfetcher-test/local-{uuid4().hex[:8]}:1")
    for pull in (PullPolicy.IF_NOT_PRESENT, PullPolicy.NEVER):
        image = prepare(ImagePolicy(pull=pull))(name)
        assert image.reference == f"docker.io/{name}"
        assert image.digest is None


@pytest.mark.fault("T14")
def test_always_brings_what_the_tag_means_now_and_the_id_stays_what_was_checked(
    registry: services.Registry, shelf: Shelf, busybox: str, prepare: Callable[[ImagePolicy], Prepare], tmp_path: Path
) -> None:
    name = f"{registry.address}/tests/moving:1"
    repository, _, tag = name.rpartition(":")
    shelf.names.add(name)
    shelf.engine.tag(busybox, repository, tag)
    shelf.push(registry, name)
    checked = prepare(AWAY)(name)
    shelf.local(name)  # the tag moves: on this machine between the check and the run, and in the registry
    shelf.push(registry, name)
    with docker_bench(busybox, tmp_path / "files") as bench:
        assert bench.run(bench.spec("echo the same", image=checked))[1] == "the same"
    assert prepare(replace(AWAY, pull=PullPolicy.IF_NOT_PRESENT))(str(checked.digest)).id == checked.id
    shelf.engine.tag(busybox, repository, tag)
    assert prepare(AWAY)(name).id != checked.id


def test_two_jobs_that_want_the_same_image_pull_it_one_after_the_other(
    registry: services.Registry, shelf: Shelf
) -> None:
    name = shelf.pushed(registry)
    with engine_proxy() as proxy, contextlib.closing(EngineApi(proxy.url)) as api:
        images = Images(api, replace(AWAY, pull=PullPolicy.IF_NOT_PRESENT), no_event)
        found: list[Image] = []
        threads = [
            threading.Thread(target=lambda: found.append(images.prepare(name, Halt(), no_progress))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({image.id for image in found}) == 1
    assert len(found) == 4
    assert sum(b"/images/create" in request for request in proxy.requests) == 1


# -- whose image it is (D7) --------------------------------------------------------------------------------------------


@pytest.mark.fault("D7")
def test_only_an_image_that_was_not_here_before_counts_as_pulled(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    kept = shelf.pushed(registry, keep=True)
    always = prepare(AWAY)
    assert not always(kept).pulled, "the registry was asked, and had nothing newer"
    shelf.engine.tag(kept, "jobfetcher-test/somebodys", "1")
    shelf.names.add("jobfetcher-test/somebodys:1")
    shelf.engine.remove_image(kept)
    image = always(kept)
    assert not image.pulled, "it was here under another name"
    assert not always.images.forget(image.id, image.reference)


@pytest.mark.fault("D7")
def test_what_was_pulled_is_removed_with_all_its_names(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    always = prepare(AWAY)
    name = shelf.pushed(registry)
    by_tag = always(name)
    assert by_tag.pulled
    assert not always.images.forget(by_tag.id, str(by_tag.digest)), "somebody pulled it by its tag"
    assert always.images.forget(by_tag.id, by_tag.reference)
    by_digest = always(str(by_tag.digest))
    assert by_digest.pulled
    assert always.images.forget(by_digest.id, by_digest.reference)
    assert by_tag.id not in {image["Id"] for image in shelf.engine.images()}


@pytest.mark.fault("D7")
def test_an_older_image_whose_tag_moved_on_is_removed_and_the_newer_one_stays(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    always = prepare(AWAY)
    name = shelf.pushed(registry)
    older = always(name)
    shelf.local(name)
    shelf.push(registry, name)
    shelf.engine.remove_image(name)
    newer = always(name)
    assert newer.pulled
    assert newer.id != older.id
    assert always.images.forget(older.id, older.reference)
    assert always(name).id == newer.id


# -- the default: asked for each job, and nobody waits ----------------------------------------------------------------

NEWER = ImagePolicy()


def test_newer_is_the_default() -> None:
    assert NEWER.pull is PullPolicy.NEWER


def test_newer_asks_once_and_downloads_only_what_has_changed(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    pushed = shelf.pushed(registry)
    with busy_registry(registry) as (address, rested, asked):
        rested.set()
        name = pushed.replace(registry.address, address)
        shelf.names.add(name)
        newer = prepare(NEWER)
        first = newer(name)
        assert any("/blobs/" in request for request in asked)
        asked.clear()
        assert newer(name) == replace(first, pulled=False)
        [request] = [request for request in asked if not request.endswith("/v2/")]
        manifest = f"/v2/{name.removeprefix(f'{address}/').removesuffix(':1')}/manifests/1"
        assert request in {f"HEAD {manifest}", f"GET {manifest}"}
        shelf.local(pushed)
        shelf.push(registry, pushed)
        moved = newer(name)
        assert moved.id != first.id
        assert newer.events == []


@pytest.mark.fault("E7")
def test_newer_runs_the_local_image_at_once_while_the_registry_is_away(
    registry: services.Registry, shelf: Shelf
) -> None:
    kept, missing = shelf.pushed(registry, keep=True), shelf.pushed(registry)
    clock, emit = FakeClock(), Emitted()
    with contextlib.closing(EngineApi()) as api:
        policy = replace(NEWER, registry_budget_s=0)
        images = Images(api, policy, emit, clock=clock)
        registry.stop()
        try:
            assert images.prepare(kept, Halt(), no_progress).reference == kept
            assert images.prepare(kept, Halt(), no_progress).reference == kept
            clock.now += 301.0  # it is asked again, and is still away
            assert images.prepare(kept, Halt(), no_progress).reference == kept
            with pytest.raises(WorkerFault, match="out of reach"):
                images.prepare(missing, Halt(), no_progress)
        finally:
            registry.start()
        told = [event[:2] for event in emit.events]
        assert told == [("image_cached", "warning"), ("image_cached", "debug"), ("registry_said", "warning")]
        clock.now += 301.0
        assert images.prepare(kept, Halt(), no_progress).reference == kept
        assert [event[:2] for event in emit.events[3:]] == [("registry_back", "info")]


@pytest.mark.fault("E7")
def test_newer_waits_a_minute_at_most_for_a_registry_that_says_nothing(
    registry: services.Registry,
    shelf: Shelf,
    prepare: Callable[[ImagePolicy], Prepare],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobfetcher.engine.images._PATIENCE_S", 2.0)
    name = shelf.pushed(registry, keep=True)
    newer = prepare(NEWER)  # five minutes and half an hour for one that is not here
    with black_hole(registry) as came:
        started = time.monotonic()
        assert newer(name).reference == name
        assert time.monotonic() - started < 30
        assert came.wait(20)
    assert newer.events == ["image_cached"]


@pytest.mark.fault("E7")
def test_newer_runs_the_local_image_where_the_registry_asks_for_patience(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    pushed = shelf.pushed(registry)
    with busy_registry(registry) as (address, rested, _):
        rested.set()
        name = pushed.replace(registry.address, address)
        shelf.names.add(name)
        newer = prepare(NEWER)
        first = newer(name)
        rested.clear()
        assert newer(name).id == first.id
    assert newer.events == ["image_cached"]


@pytest.mark.fault("E6")
def test_newer_runs_what_was_made_here_though_no_registry_has_it(
    registry: services.Registry, protected: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    newer = prepare(NEWER)
    for address in (registry.address, protected.address):  # which say "not found", and "denied"
        name = shelf.local(f"{address}/tests/made-here:1")
        assert newer(name).reference == name
    elsewhere = shelf.pushed(registry, keep=True)  # under another name it came from a registry
    shelf.engine.tag(elsewhere, f"{registry.address}/tests/renamed", "1")
    shelf.names.add(f"{registry.address}/tests/renamed:1")
    assert newer(f"{registry.address}/tests/renamed:1").reference == f"{registry.address}/tests/renamed:1"


@pytest.mark.fault("E6")
def test_newer_does_not_run_what_was_taken_away_from_its_registry(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    name = shelf.pushed(registry, keep=True)
    newer = prepare(NEWER)
    digest = newer(name).digest
    assert digest is not None
    url = f"http://{registry.address}/v2/{name.removeprefix(f'{registry.address}/').removesuffix(':1')}/manifests"
    request = urllib.request.Request(f"{url}/{digest.partition('@')[2]}", method="DELETE")  # noqa: S310
    urllib.request.urlopen(request).close()  # noqa: S310
    with pytest.raises(JobFault, match="would use the local image") as taken:
        newer(name)
    assert taken.value.reason is JobReason.IMAGE_MISSING


@pytest.mark.fault("E6")
def test_newer_runs_what_it_was_given_once_though_its_login_has_run_out(
    protected: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    name = shelf.pushed(protected, keep=True)
    newer = prepare(NEWER)
    assert newer(name).reference == name
    assert newer.events == ["image_cached"]


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("E6")
def test_what_the_registry_does_not_have_fails_at_once(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    patient = prepare(ImagePolicy(pull=PullPolicy.ALWAYS))  # half an hour for a registry that is away; not for this
    started = time.monotonic()
    here = shelf.local(f"{registry.address}/tests/only-here:1")
    pushed = shelf.pushed(registry)
    for name in (
        f"{registry.address}/tests/none:1",
        f"{pushed.removesuffix(':1')}:none",
        f"{pushed.removesuffix(':1')}@sha256:{'0' * 64}",
        here,
    ):
        with pytest.raises(JobFault, match="does not have image") as missing:
            patient(name)
        assert missing.value.reason is JobReason.IMAGE_MISSING
    assert "PULL_POLICY=if-not-present would use the local image" in str(missing.value)
    assert time.monotonic() - started < 30


@pytest.mark.fault("E6")
@pytest.mark.parametrize("name", ["", "Upper/case", "https://example.org/x", "x:\x1b[31m", "x@sha256:12"])
def test_what_is_no_reference_is_the_jobs_fault(name: str, prepare: Callable[[ImagePolicy], Prepare]) -> None:
    with pytest.raises(JobFault, match="is not an image reference") as refused:
        prepare(ImagePolicy(pull=PullPolicy.ALWAYS))(name)
    assert refused.value.reason is JobReason.IMAGE_MISSING
    assert "\x1b" not in str(refused.value)


@pytest.mark.fault("T14")
def test_what_is_not_allowed_is_not_even_looked_for(busybox: str, prepare: Callable[[ImagePolicy], Prepare]) -> None:
    lab = ImagePolicy(allowed=("public.ecr.aws/*", "jobfetcher-test/*"), pull=PullPolicy.NEVER)
    for name in ("public.ecr.aws.evil.io/x", "evil.io/decode", "decode", "evil.io/jobfetcher-test/busybox"):
        with pytest.raises(WorkerFault, match="ALLOWED_IMAGES") as refused:
            prepare(lab)(name)
        assert refused.value.reason is WorkerReason.POLICY
    assert prepare(lab)(busybox).id


def test_never_pulls_nothing(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    with pytest.raises(WorkerFault, match="PULL_POLICY=never") as refused:
        prepare(ImagePolicy(pull=PullPolicy.NEVER))(shelf.pushed(registry))
    assert refused.value.reason is WorkerReason.POLICY


def with_platform(engine: docker.APIClient, name: str, architecture: str) -> None:
    """Load a copy of that image whose configuration says it is made for `architecture`."""
    copy = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(b"".join(engine.get_image(name)))) as saved,
        tarfile.open(fileobj=copy, mode="w") as changed,
    ):
        for entry in saved.getmembers():
            content = saved.extractfile(entry)
            data = content.read() if content else b""
            if entry.name.endswith(".json") and b'"architecture"' in data:  # the configuration; not the manifest
                data = json.dumps(json.loads(data) | {"architecture": architecture}).encode()
                entry.size = len(data)
            changed.addfile(entry, io.BytesIO(data))
    loaded = engine.post(f"{engine.base_url}/v{engine.api_version}/images/load", data=copy.getvalue())
    assert "error" not in loaded.text, loaded.text


@pytest.mark.fault("E8")
def test_an_image_for_another_machine_is_refused(shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]) -> None:
    ours = shelf.engine.version()["Arch"]
    other = "arm64" if ours != "arm64" else "amd64"
    name = shelf.local(f"jobfetcher-test/other-{uuid4().hex[:8]}:1")
    with_platform(shelf.engine, name, other)
    with pytest.raises(JobFault, match=f"image is {other}, this worker is {ours}") as refused:
        prepare(ImagePolicy(pull=PullPolicy.NEVER))(name)
    assert refused.value.reason is JobReason.IMAGE_ARCHITECTURE


# -- credentials -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("E6")
def test_a_private_registry_gives_to_those_who_logged_in(
    protected: services.Registry,
    shelf: Shelf,
    prepare: Callable[[ImagePolicy], Prepare],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = shelf.pushed(protected)

    def with_config(config: object) -> Prepare:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        return prepare(replace(AWAY, docker_config=str(path)))

    def login(password: str) -> object:
        return {"auths": {protected.address: {"auth": base64.b64encode(f"lab:{password}".encode()).decode()}}}

    nowhere = prepare(replace(AWAY, docker_config=str(tmp_path / "no-such-file")))
    with pytest.raises(JobFault, match="does not give image"):
        nowhere(name)
    for config in ({}, login("wrong")):
        with pytest.raises(JobFault) as denied:
            with_config(config)(name)
        assert denied.value.reason is JobReason.IMAGE_DENIED
        assert "wrong" not in str(denied.value)

    assert with_config(login("not-a-secret"))(name).reference == name
    shelf.engine.remove_image(name)

    helper = tmp_path / "bin/docker-credential-tests"
    helper.parent.mkdir()
    helper.write_text('#!/bin/sh\necho \'{"Username": "lab", "Secret": "not-a-secret"}\'\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    assert with_config({"credHelpers": {protected.address: "tests"}})(name).reference == name
    shelf.engine.remove_image(name)

    with (
        pytest.warns(UserWarning, match="not installed"),  # the SDK's own word on it
        pytest.raises(WorkerFault, match="credentials cannot be read"),
    ):
        with_config({"credsStore": "no-such-helper"})(name)


# -- a registry that is away -------------------------------------------------------------------------------------------


@pytest.mark.fault("E7")
def test_a_registry_that_is_down_is_tried_again(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    name = shelf.pushed(registry)
    registry.stop()
    retried = threading.Event()
    api = EngineApi()
    images = Images(api, ImagePolicy(pull=PullPolicy.ALWAYS, registry_budget_s=60), lambda *_, **__: None)
    found: list[Image] = []

    def waits(_why: str, for_s: float) -> None:
        assert 0 < for_s <= 60
        retried.set()

    thread = threading.Thread(target=lambda: found.append(images.prepare(name, Halt(), no_progress, waits)))
    thread.start()
    try:
        assert retried.wait(60)
    finally:
        registry.start()
    thread.join()
    assert [image.reference for image in found] == [name]
    api.close()


@pytest.mark.fault("E7")
def test_a_registry_that_has_had_too_many_requests_is_asked_again_later(
    registry: services.Registry, shelf: Shelf
) -> None:
    pushed = shelf.pushed(registry)
    with busy_registry(registry) as (address, rested, _), contextlib.closing(EngineApi()) as api:
        name = pushed.replace(registry.address, address)
        shelf.names.add(name)
        said: list[str] = []

        def waits(why: str, _for_s: float) -> None:
            said.append(why)
            rested.set()

        emit = Emitted()
        images = Images(api, ImagePolicy(pull=PullPolicy.ALWAYS, registry_budget_s=60), emit)
        image = images.prepare(name, Halt(), no_progress, waits)
    assert image.pulled
    assert len(said) == 1
    assert "asks to come later" in said[0]
    assert "pull rate limit" not in said[0]
    assert "pull rate limit" in str(emit.named("registry_said")[0]["message"])


@pytest.mark.fault("E7")
def test_a_pull_that_is_cut_in_the_middle_of_a_layer_ends_well(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    """The engine itself asks for the rest, 5 s later."""
    pushed = shelf.pushed(registry)
    with FaultProxy(f"http://{registry.address}") as proxy:
        name = pushed.replace(registry.address, proxy.url.removeprefix("http://"))
        shelf.names.add(name)
        proxy.then(*[Fault(cut_answer=LAYER_BYTES // 3)] * 6)  # it opens five for small things first
        image = prepare(AWAY)(name)
        assert image.size_bytes >= LAYER_BYTES
        assert any(one.answered == LAYER_BYTES // 3 for one in proxy.connections), "it was cut"


@pytest.mark.fault("E7")
def test_a_registry_that_stays_down_means_the_cached_image_or_the_workers_fault(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    kept, missing = shelf.pushed(registry, keep=True), shelf.pushed(registry)
    once = prepare(AWAY)
    registry.stop()
    try:
        assert once(kept).reference == kept
        assert once.events == ["image_cached"]
        with pytest.raises(WorkerFault, match="out of reach") as away:
            once(missing)
    finally:
        registry.start()
    assert away.value.reason is WorkerReason.REGISTRY


@pytest.mark.fault("E7")
def test_a_pull_in_which_nothing_moves_is_cut(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    name = shelf.pushed(registry)
    impatient = prepare(ImagePolicy(pull=PullPolicy.ALWAYS, registry_budget_s=0, inactivity_s=3))
    with black_hole(registry) as came:
        started = time.monotonic()
        with pytest.raises(WorkerFault, match="nothing moved for 3 s") as cut:
            impatient(name)
        assert time.monotonic() - started < 30
        assert came.wait(20)
    assert cut.value.reason is WorkerReason.REGISTRY


@pytest.mark.fault("B17")
def test_a_job_that_must_end_aborts_its_pull_at_once(
    registry: services.Registry, shelf: Shelf, prepare: Callable[[ImagePolicy], Prepare]
) -> None:
    name = shelf.pushed(registry)
    halt = Halt()
    set_at: list[float] = []

    def cancel() -> None:
        assert came.wait(60)
        set_at.append(time.monotonic())
        halt.set(StopReason.CANCELLED)

    with black_hole(registry) as came:
        canceller = threading.Thread(target=cancel)
        canceller.start()
        with pytest.raises(Stopped) as stopped:
            prepare(ImagePolicy(pull=PullPolicy.ALWAYS))(name, halt)
        assert time.monotonic() - set_at[0] < 20
        canceller.join()
    assert stopped.value.reason is StopReason.CANCELLED


def test_an_engine_that_dies_during_a_pull_is_the_workers_fault(tmp_path: Path) -> None:
    """The engine's answers up to the pull are passed on; then the line is cut in the middle of the progress."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client, socket.socket(socket.AF_UNIX) as engine:
                    request = client.recv(65536)
                    if b"/images/create" in request:
                        client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n{")
                    elif request:
                        engine.connect(ENGINE_SOCKET)
                        engine.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                        while answer := engine.recv(65536):
                            client.sendall(answer)

    path = tmp_path / "e.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    thread = threading.Thread(target=serve)
    thread.start()
    api = EngineApi(f"unix://{path}")
    try:
        with pytest.raises(WorkerFault) as fault:
            Images(api, AWAY, no_event).prepare("nowhere.example/x:1", Halt(), no_progress)
    finally:
        api.close()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
    assert fault.value.reason is WorkerReason.ENGINE
