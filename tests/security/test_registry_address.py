"""An image's name leads the engine to no service inside, and brings no words of one out (FAULTS.md T25).

The engine is the real one, and so is what listens: who is asked is counted there. Names are resolved by a stub, for
there is no name server here that could be made to lie.
"""

import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from jobfetcher import build
from jobfetcher.core.addresses import OwnHost
from jobfetcher.core.errors import JobFault, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.hosts import Proxies
from jobfetcher.engine.docker import DockerEngine
from jobfetcher.engine.images import _fault
from jobfetcher.engine.references import parse_reference
from jobfetcher.engine.registries import Egress, RegistryRules
from jobfetcher.settings import Settings
from tests.support.boxes import no_progress
from tests.support.engine_proxy import engine_proxy
from tests.support.jobs import Emitted

pytestmark = pytest.mark.fault("T25")

PUBLIC, INSIDE, HERE, METADATA = "93.184.216.34", "192.168.1.9", "127.0.0.1", "169.254.169.254"
#: An API that is nothing of this network.
OPEN_API, HERE_API = f"https://{PUBLIC}", "http://127.0.0.1:8000"
CANARY = "canary-of-an-inner-service"


class Service(http.server.ThreadingHTTPServer):
    """A service of this machine that nobody should be led to; answers everything as it was told."""

    def __init__(self, status: int = 200, headers: Mapping[str, str] | None = None, body: str = CANARY) -> None:
        super().__init__((HERE, 0), _Answer)
        self.answer = status, dict(headers or {}), body.encode()
        self.connections = 0

    def get_request(self) -> tuple[socket.socket, Any]:
        self.connections += 1
        return super().get_request()


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Service)
        status, headers, body = self.server.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing: the tests count connections."""


@contextlib.contextmanager
def listening(service: Service) -> Iterator[Service]:
    with service:
        thread = threading.Thread(target=service.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield service
        finally:
            service.shutdown()
            thread.join()


@contextlib.contextmanager
def engine_of(api_url: str, emit: Emitted, **more: Any) -> Iterator[DockerEngine]:
    """The engine as a worker of that API has it, which tries a registry once."""
    settings = Settings(api_url=api_url, path_base=Path("/nowhere"), **more)
    made = build.make_engine(settings, "registry-test", emit)
    policy = made._images._policy
    object.__setattr__(policy, "registry_budget_s", 0.0)  # it is frozen; half an hour is what a worker gives
    with contextlib.closing(made):
        yield made


def pulled(engine: DockerEngine, image: str) -> JobFault | WorkerFault:
    """How a pull of that image failed."""
    with pytest.raises((JobFault, WorkerFault)) as caught:
        engine.prepare(image, Halt(), no_progress)
    assert isinstance(caught.value, JobFault | WorkerFault)
    return caught.value


# -- whom the engine is asked to ask ----------------------------------------------------------------------------------


@pytest.mark.docker
@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "LOCALHOST", "127.1", "2130706433", "0x7f000001", "017700000001", "0x7f.1", "0.0.0.0"],
)
@pytest.mark.parametrize("policy", ["newer", "always", "if-not-present"])
def test_an_image_name_leads_to_no_service_of_this_machine(host: str, policy: str) -> None:
    with listening(Service()) as service, engine_of(OPEN_API, Emitted(), pull_policy=policy) as engine:
        fault = pulled(engine, f"{host}:{service.server_port}/a/b")
        assert service.connections == 0
    assert fault.reason is WorkerReason.POLICY
    assert "add it to REGISTRY_ALLOW, or name it in ALLOWED_IMAGES" in str(fault)


@pytest.mark.docker
def test_a_name_that_leads_inside_is_judged_by_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"registry.evil.example": (PUBLIC, HERE), "localhost": (HERE,)}
    monkeypatch.setattr(build, "resolve", answers.__getitem__, raising=False)
    with listening(Service()) as service, engine_of(OPEN_API, Emitted(), pull_policy="always") as engine:
        for host in answers:
            assert pulled(engine, f"{host}:{service.server_port}/a/b").reason is WorkerReason.POLICY
        assert service.connections == 0


@pytest.mark.docker
@pytest.mark.parametrize("setting", ["registry_allow", "allowed_images"])
def test_who_is_named_is_asked(setting: str) -> None:
    with listening(Service(404, body="{}")) as service:
        address = f"{HERE}:{service.server_port}"
        named = {"registry_allow": address, "allowed_images": f"{address}/*"}[setting]
        with engine_of(OPEN_API, Emitted(), pull_policy="always", **{setting: named}) as engine:
            pulled(engine, f"{address}/a/b")
        assert service.connections > 0
        asked = service.connections
        with engine_of(OPEN_API, Emitted(), pull_policy="always", allowed_images="*,127.*/*") as engine:
            assert pulled(engine, f"{address}/a/b").reason is WorkerReason.POLICY  # a glob names nobody
        assert service.connections == asked


@pytest.mark.docker
def test_where_the_api_is_on_this_machine_so_may_its_registry_be() -> None:
    with listening(Service(404, body="{}")) as service, engine_of(HERE_API, Emitted(), pull_policy="always") as engine:
        pulled(engine, f"{HERE}:{service.server_port}/a/b")
        assert service.connections > 0


@pytest.mark.docker
def test_a_local_image_of_a_refused_registry_runs_unasked_and_it_is_said_once(busybox: str, engine: Any) -> None:
    emit = Emitted()
    with listening(Service()) as service, engine_of(OPEN_API, emit) as ours:
        name = f"{HERE}:{service.server_port}/tests/refused"
        engine.tag(busybox, name, "1")
        try:
            assert ours.prepare(f"{name}:1", Halt(), no_progress).reference == f"{name}:1"
            assert ours.prepare(f"{name}:1", Halt(), no_progress).reference == f"{name}:1"
        finally:
            engine.remove_image(f"{name}:1")
        assert service.connections == 0
    [said] = emit.named("image_cached")
    assert "REGISTRY_ALLOW" in str(said["message"])


@pytest.mark.docker
def test_a_name_without_an_address_is_a_registry_out_of_reach(monkeypatch: pytest.MonkeyPatch, busybox: str) -> None:
    def nobody(_: str) -> tuple[str, ...]:
        raise OSError("no name server")

    monkeypatch.setattr(build, "resolve", nobody, raising=False)
    with engine_proxy() as proxy, engine_of(OPEN_API, Emitted(), docker_host=proxy.url) as engine:
        fault = pulled(engine, "registry.example/nowhere/to/be/found:1")
        assert fault.reason is WorkerReason.REGISTRY
        assert engine.prepare(busybox, Halt(), no_progress)  # of docker.io, which has no address either; it is here
        assert not [request for request in proxy.requests if b"/images/create" in request]


@pytest.mark.docker
@pytest.mark.fault("B17")
def test_a_job_that_must_end_waits_for_no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered, halt = threading.Event(), threading.Event(), Halt()

    def silent(_: str) -> tuple[str, ...]:
        asked.set()
        answered.wait(60)
        raise OSError("no name server")

    def cancel() -> None:
        asked.wait(60)
        halt.set(StopReason.CANCELLED)

    monkeypatch.setattr(build, "resolve", silent, raising=False)
    canceller = threading.Thread(target=cancel)
    canceller.start()
    began = time.monotonic()
    try:
        with engine_of(OPEN_API, Emitted()) as engine, pytest.raises(Stopped):
            engine.prepare("registry.example/nowhere/to/be/found:1", halt, no_progress)
        assert time.monotonic() - began < 30
    finally:
        answered.set()
        canceller.join()


# -- the rules, as a table --------------------------------------------------------------------------------------------

RESOLVED = {
    "registry-1.docker.io": (PUBLIC,),
    "hub.example": (PUBLIC, "2606:4700::1111"),
    "registry.lab": (INSIDE,),
    "registry.in.lab": (INSIDE,),
    "half.example": (PUBLIC, INSIDE),
    "me.example": (HERE,),
    "meta.example": (METADATA,),
    "azure.example": ("168.63.129.16",),
    "six.example": ("::ffff:127.0.0.1",),
    "nat64.example": ("64:ff9b::a9fe:a9fe",),
}


def resolver(host: str) -> tuple[str, ...]:
    if host not in RESOLVED:
        raise OSError("no such name")
    return RESOLVED[host]


def verdict(
    image: str,
    *,
    api: str = PUBLIC,
    allow: tuple[str, ...] = (),
    images: tuple[str, ...] = (),
    egress: Egress = Egress(),  # noqa: B008 - immutable
) -> WorkerReason | None:
    rules = RegistryRules(OwnHost(api, resolver), resolver, allow=frozenset(allow), images=images)
    try:
        rules.check(parse_reference(image), egress)
    except WorkerFault as fault:
        return WorkerReason(fault.reason)
    return None


POLICY, AWAY = WorkerReason.POLICY, WorkerReason.REGISTRY


@pytest.mark.parametrize(
    "image", ["busybox", "lab/tool:1", "hub.example/x", "8.8.8.8:5000/x", "[2606:4700::1111]:5000/x"]
)
def test_a_public_registry_is_asked(image: str) -> None:
    assert verdict(image) is None


@pytest.mark.parametrize(
    "image",
    [
        "127.0.0.1:1/x", "127.1:1/x", "0177.0.0.1:1/x", "[::1]:1/x", "[::ffff:7f00:1]:1/x", "[::]:1/x", "0.0.0.0:1/x",
        "0.0.0.1/x", "10.0.0.1/x", "192.168.1:5000/x", "3232235777:1/x", "100.64.0.1/x", "169.254.169.254/latest/x",
        "2852039166:80/x", "0xa9fea9fe:80/x", "100.100.100.200/x", "168.63.129.16/x", "[fd00:ec2::254]:80/x",
        "[fe80::1]:1/x", "224.0.0.1/x", "registry.lab/x", "REGISTRY.lab:5000/x", "half.example/x", "me.example:5000/x",
        "meta.example/x", "azure.example/x", "six.example:1/x", "nat64.example/x",
    ],
)  # fmt: skip
def test_no_spelling_of_an_address_inside_is_asked(image: str) -> None:
    assert verdict(image) is POLICY


@pytest.mark.parametrize(
    ("image", "api", "reason"),
    [
        ("registry.lab/x", INSIDE, None),
        ("10.0.0.1:5000/x", INSIDE, None),
        ("me.example/x", INSIDE, POLICY),
        ("me.example/x", HERE, None),
        ("registry.lab/x", HERE, None),
        ("meta.example/x", HERE, POLICY),
        ("169.254.169.254/x", INSIDE, POLICY),
        ("azure.example/x", HERE, POLICY),
        ("registry.lab/x", "half.example", POLICY),  # an API that is inside in part is not inside
        ("registry.lab/x", "unknown.example", AWAY),  # what the API is cannot be said
        ("hub.example/x", "unknown.example", None),
        ("meta.example/x", "unknown.example", POLICY),
    ],
)
def test_the_apis_own_class_opens_what_it_opens_for_storage(image: str, api: str, reason: WorkerReason | None) -> None:
    assert verdict(image, api=api) is reason


@pytest.mark.parametrize(
    ("image", "allow", "images", "reason"),
    [
        ("registry.lab:5000/x", ("registry.lab",), (), None),
        ("registry.lab:5000/x", ("registry.lab:5000",), (), None),
        ("registry.lab:22/x", ("registry.lab:5000",), (), POLICY),
        ("registry.lab/x", ("registry.lab:443",), (), None),
        ("registry.lab/x", ("*.lab",), (), None),
        ("registry.lab/x", ("192.168.0.0/16",), (), None),
        ("10.0.0.1/x", ("192.168.0.0/16",), (), POLICY),
        ("127.1:5000/x", ("127.0.0.1:5000",), (), None),
        ("meta.example/x", ("meta.example",), (), POLICY),  # others answer for the name
        ("169.254.169.254/x", ("0.0.0.0/0",), (), POLICY),
        ("169.254.169.254/x", ("169.254.169.254",), (), None),
        ("168.63.129.16/x", ("168.63.129.16/32",), (), None),
        ("registry.lab/x", (), ("registry.lab/*",), None),
        ("registry.lab/x", (), ("registry.lab/decode/*",), None),
        ("registry.lab:5000/x", (), ("registry.lab/*",), POLICY),
        ("registry.lab/x", (), ("*",), POLICY),
        ("registry.lab/x", (), ("*.lab/*", "registry.*/*", "*/x", "registry.lab*/x"), POLICY),
        ("registry.in.lab/x", (), ("*.in.lab/*",), None),
        ("registry.in.lab:5000/x", (), ("*.in.lab/*",), POLICY),
        ("registry.in.lab/x", (), ("*y.in.lab/*", "*.in.*/*"), POLICY),
        ("meta.example/x", (), ("meta.example/*",), POLICY),
        ("unknown.lab/x", (), (), AWAY),
        ("unknown.lab/x", ("unknown.lab",), (), None),  # the engine may know it from a hosts file of its own
        ("unknown.lab/x", (), ("unknown.lab/*",), None),
    ],
)
def test_what_the_owner_names_is_open(
    image: str, allow: tuple[str, ...], images: tuple[str, ...], reason: WorkerReason | None
) -> None:
    assert verdict(image, allow=allow, images=images) is reason


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("hub.example/x", None),
        ("unknown.example/x", None),  # the proxy may know it
        ("127.0.0.1:5000/x", POLICY),
        ("2852039166/x", None),  # without a dot or a port it is a name of docker.io
        ("2852039166:80/x", POLICY),
        ("registry.lab/x", POLICY),
        ("localhost:5000/x", AWAY),  # asked directly, whatever the proxy, and unknown to this test's resolver
        ("unknown.direct/x", AWAY),
    ],
)
def test_through_a_proxy_a_name_that_nobody_here_knows_is_the_proxys_to_judge(
    image: str, reason: WorkerReason | None
) -> None:
    proxied = Egress(Proxies("http://proxy:3128", "http://proxy:3128", ("direct",)))
    assert verdict(image, egress=proxied) is reason


def test_mirrors_of_docker_io_are_the_engine_owners_choice() -> None:
    """Where nothing outside has an address, a mirror may have the image all the same."""

    def nobody(_: str) -> tuple[str, ...]:
        raise OSError

    rules = RegistryRules(OwnHost(PUBLIC, nobody), nobody)
    rules.check(parse_reference("busybox"), Egress(has_mirrors=True))
    with pytest.raises(WorkerFault, match=r"registry-1\.docker\.io has no address"):
        rules.check(parse_reference("busybox"), Egress())
    with pytest.raises(WorkerFault):
        rules.check(parse_reference("hub.example/x"), Egress(has_mirrors=True))


def test_an_engine_says_how_it_reaches_registries() -> None:
    said = Egress.of(
        {"HttpProxy": "", "HttpsProxy": "http://p:1", "NoProxy": "a, .b", "RegistryConfig": {"Mirrors": ["https://m/"]}}
    )
    assert said == Egress(Proxies(None, "http://p:1", ("a", ".b")), has_mirrors=True)
    assert said.is_proxied
    for info in ({}, {"HttpProxy": "http://p:1"}, {"RegistryConfig": None, "NoProxy": None}):
        assert not Egress.of(info).is_proxied


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.docker
@pytest.mark.parametrize("status", [200, 201, 301, 400, 401, 403, 404, 418, 429, 500, 503])
@pytest.mark.parametrize("kind", ["text", "errors", "realm"])
def test_no_word_of_a_registry_or_of_where_it_leads_reaches_the_job(status: int, kind: str) -> None:
    """`realm`: the registry has its users sign in at an inner service, and the engine goes there."""
    errors = json.dumps({"errors": [{"code": CANARY.upper(), "message": CANARY, "detail": CANARY}], "details": CANARY})
    emit = Emitted()
    with listening(
        Service(status, {"Content-Type": "application/json"}, errors if kind == "errors" else CANARY)
    ) as inner:
        sign_in = {"WWW-Authenticate": f'Bearer realm="http://{HERE}:{inner.server_port}/{CANARY}",service="{CANARY}"'}
        first = Service(401, sign_in) if kind == "realm" else inner
        with contextlib.ExitStack() as opened:
            registry = opened.enter_context(listening(first)) if first is not inner else inner
            engine = opened.enter_context(engine_of(HERE_API, emit, pull_policy="always"))
            fault = pulled(engine, f"{HERE}:{registry.server_port}/a/b")
        assert inner.connections > 0
    assert CANARY not in str(fault).lower()
    assert "its words are in the log of the worker" in str(fault)
    [said] = emit.named("registry_said")
    assert f"{HERE}:{registry.server_port}/a/b" in str(said["message"])


@pytest.mark.parametrize("part", ["error", "errorDetail"])
def test_a_pull_that_fails_in_its_progress_says_what_it_means_and_no_more(part: str) -> None:
    from jobfetcher.engine import images

    wanted = parse_reference("hub.example/x")

    class Answer:
        def __init__(self) -> None:
            said: dict[str, object] = {"error": f"denied: {CANARY}", "errorDetail": {"message": f"denied: {CANARY}"}}
            self.lines = [json.dumps({part: said[part]}).encode(), b""]

        def readline(self, _: int) -> bytes:
            return self.lines.pop(0)

    with pytest.raises(JobFault, match="does not give image") as caught:
        images._follow(wanted, Answer(), images._Pull(no_progress, lambda: None))  # type: ignore[arg-type]  # one call of it
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("dial tcp 10.0.0.1:443: connect: connection refused", "is out of reach"),
        ("net/http: TLS handshake timeout", "is out of reach"),
        ("x509: certificate signed by unknown authority", "does not trust the certificate"),
        ("toomanyrequests: you are out", "asks to come later"),
        ("denied: go away", "does not give image"),
        ("manifest unknown", "does not have image"),
        ("no space left on device", "disk is full"),
        (f"hello from the inside, {CANARY}", "the registry's answer is not known"),
    ],
)
def test_what_a_registry_says_is_one_of_a_few_known_things(said: str, means: str) -> None:
    fault = _fault(parse_reference("hub.example/x"), f"{said} {CANARY}")
    assert means in str(fault)
    assert CANARY not in str(fault)


@pytest.mark.docker
def test_what_a_job_waits_for_has_no_word_of_its_registry() -> None:
    """Each wait becomes a note on the job; the same words are in the log once."""
    waits: list[str] = []
    emit = Emitted()
    with listening(Service(500)) as service, engine_of(HERE_API, emit, pull_policy="always") as engine:
        object.__setattr__(engine._images._policy, "registry_budget_s", 5.0)
        began = time.monotonic()
        with pytest.raises(WorkerFault):
            engine.prepare(f"{HERE}:{service.server_port}/a/b", Halt(), no_progress, lambda why, _: waits.append(why))
        assert time.monotonic() - began < 60
    assert waits
    assert not any(CANARY in why for why in waits)
    assert len(emit.named("registry_said")) == 1
